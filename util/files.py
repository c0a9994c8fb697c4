"""A file is complete or absent; JSON lines."""
import io
import json
import os
import pathlib

import torch

from util.errors import InputError, brief


def save(path, content):
    """Writes a temporary file, flushes it and renames it, so that a file is complete or absent. A path that
    ends in .json gets JSON, any other what torch.save writes."""
    path = pathlib.Path(path)
    beside, whole = path.with_name(path.name + ".writing"), io.BytesIO()
    if path.suffix == ".json":
        whole.write(json.dumps(content, indent=1).encode())
    else:
        torch.save(content, whole)
    try:
        with open(beside, "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:                                 # after a full disk: the previous file is kept
        beside.unlink(missing_ok=True)


def load(path):
    """The content that save() wrote. Raises InputError naming the file if it can't be read."""
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:               # a damaged file raises many kinds
        reason = f"{type(error).__name__}: {brief(error)[:60]}"
        raise InputError(f"{path}: is damaged, or not a file that this program wrote ({reason}); restore it, "
                         "or use another") from None


def fill(module, state, path):
    """load_state_dict (strict). Raises InputError naming the file when it holds another network's state."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is the checkpoint of another network ({brief(error)[:120]}); use another "
                         "--run") from None


def read_log(path, cut=False):
    """A search's log, a line of JSON per candidate -> {number: entry} in the file's order; {} if none exists.

    An incomplete last line (the process was killed while writing it) is ignored; cut=True removes it from
    the file. Raises InputError for any other bad line, and for two lines of one candidate."""
    if not path.exists():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn and cut:
        print(f"{path}: the last line is incomplete and was removed")
        os.truncate(path, len(whole + newline))
    log, fields = {}, {"candidate", "tokens", "reward", "half_reward", "status"}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if entry["candidate"] in log or not fields <= entry.keys():
                raise ValueError
            log[entry["candidate"]] = entry
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path}: line {number} is not a candidate's, or the second of one; restore the "
                             "file or use another --run") from None
    return log
