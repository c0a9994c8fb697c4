"""util/errors.py: mistakes end in one line and exit status 2, wherever a script's output goes."""
import errno
import os
import signal
import sys

import pytest
import torch

from util.errors import InputError, each, out_of_memory, run_main


def test_the_problems_of_all_splits_are_listed_once():
    def look(split):
        if split != "test":
            raise InputError("Mine.IDS: wrong", *(f"{split}/{k}.png: broken" for k in range(6)))
        return split

    with pytest.raises(InputError) as error:
        each(look, ("train", "val", "test"))
    lines = str(error.value).splitlines()
    assert lines[0] == "13 problems, the first ten:" and len(lines) == 11
    assert each(look, ("test",)) == {"test": "test"}


def test_a_script_says_one_line_and_leaves_no_handlers(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_main(lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 128 + signal.SIGTERM and capsys.readouterr().err == "\nstopped\n"
    with pytest.raises(SystemExit):
        run_main(lambda: os.kill(os.getpid(), signal.SIGINT), continues=True)
    assert "the same command continues" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


class Plain:
    """What stands in for stdout in some programs, without isatty() and reconfigure()."""
    text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [None, Plain()], ids=["none", "plain"])
def test_a_script_works_without_a_terminal_or_any_output(monkeypatch, stream):
    def main():
        print("mIoU 66 ± 1")
        raise InputError("a.png: no such file")

    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2 and (not stream or stream.text.endswith("± 1\nerror: a.png: no such file\n"))


@pytest.mark.parametrize("number, room", [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EACCES, False),
                                          (errno.EIO, False)])
def test_only_a_full_disk_is_told_to_make_room(capsys, number, room):
    def main():
        raise OSError(number, os.strerror(number), "frames/1.png")

    with pytest.raises(SystemExit):
        run_main(main)
    said = capsys.readouterr().err
    assert "frames/1.png" in said and said.count("\n") == 1 and ("make room" in said) == room


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("full"), True), (MemoryError(), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False), (ValueError("no"), False)])
def test_what_is_out_of_memory(error, expected):
    assert out_of_memory(error) == expected
