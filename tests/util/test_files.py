"""util/files.py: a file is complete or absent, and one that can't be read is named."""
import os
import resource

import pytest
import torch

from util import files
from util.errors import InputError


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"static": Evil()}, tmp_path / "static.pt")
    with pytest.raises(InputError, match="static.pt: holds a pickled object"):
        files.load(tmp_path / "static.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.json"])
def test_a_file_is_whole_or_not_there_and_a_broken_one_is_named(tmp_path, name):
    """A file that must not become so large ends as one on a full disk does."""
    path, before = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    files.save(path, {"a": [1, 2]})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            files.save(path, {"a": [3] * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files.load(path) == {"a": [1, 2]} and [p.name for p in tmp_path.iterdir()] == [name]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{name}: is damaged.*; restore it"):
        files.load(path)


LINE = '{"candidate": 0, "status": "ok", "reward": 0.5, "half_reward": null, "tokens": [1]}\n'


@pytest.mark.parametrize("text", [
    "nonsense\n", "[1]\n", '{"candidate": 0}\n', LINE.replace("0,", "[0],"), LINE + LINE])
def test_a_log_with_a_line_that_is_no_candidates_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text + LINE.replace("0,", "5,"))
    with pytest.raises(InputError, match="log.jsonl: line [0-9]+ is not a candidate's"):
        files.read_log(tmp_path / "log.jsonl")
