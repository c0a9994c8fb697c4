"""A file is complete or absent; JSON lines."""
import io
import json
import os
import pathlib
import warnings

import torch

from util.errors import InputError


def save(path, content):
    """Writes a temporary file, flushes it and renames it, so that a file is complete or absent. A path that
    ends in .json gets JSON, any other what torch.save writes."""
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


def load(path, wanted="restore it, or use another", absent=None):
    """The content that save() wrote, or of a file of weights. Only tensors and plain values are loaded, no
    code is run. absent: the content of a missing file. Raises InputError with the remedy, `wanted`."""
    path = pathlib.Path(path)
    if absent is not None and not path.exists():
        return absent
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with warnings.catch_warnings(action="ignore"):            # torch warns of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:               # a damaged file raises many kinds
        reason = "is damaged, cut short, or another kind of file (a web page, a Git LFS pointer, safetensors)"
        if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):
            reason = error.strerror.lower()
        elif "GLOBAL" in str(error) or "TorchScript" in str(error):
            reason = "holds a pickled object, which could run code and is not loaded; save its state_dict()"
        raise InputError(f"{path}: {reason}; {wanted}") from None


def read_log(path, cut=False):
    """A search's log, a line of JSON per candidate -> {number: entry} in order; {} if there is no file.
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
    return dict(sorted(log.items()))         # several processes write in any order
