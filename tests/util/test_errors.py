"""util/errors.py: mistakes end in one line and exit status 2, wherever a script's output goes."""
import os
import signal
import sys
import types

import pytest
import torch

from util.errors import InputError, out_of_memory, run_main
from util.progress import Progress


def ended(function):
    """The exit status of run_main with such a main()."""
    with pytest.raises(SystemExit) as stop:
        run_main(function)
    return stop.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_says_one_line_and_leaves_no_handler(capsys, number):
    before = signal.getsignal(number)
    assert ended(lambda: os.kill(os.getpid(), number)) == 128 + number
    assert capsys.readouterr().err == "\nstopped\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("written", [None, []], ids=["none", "write() alone"])
def test_a_script_works_without_a_terminal_or_any_output(monkeypatch, written):
    def main():
        print("mIoU 66 ± 1")
        Progress("search", 1).update(1, loss=0.25)
        raise InputError("a.png: no such file")

    stream = None if written is None else types.SimpleNamespace(write=written.append)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert ended(main) == 2
    lines = ["mIoU 66 ± 1", "search 1/1  loss 0.25", "error: a.png: no such file"]
    assert not stream or "".join(written).splitlines() == lines


def test_what_the_system_refuses_is_one_line_that_names_the_file(capsys):
    assert ended(lambda: open("frames/1.png")) == 2
    said = capsys.readouterr().err
    assert "frames/1.png" in said and "room" in said and said.count("\n") == 1


@pytest.mark.parametrize("error, expected", [(torch.OutOfMemoryError("full"), True), (MemoryError(), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False)])
def test_what_is_out_of_memory(error, expected):
    assert out_of_memory(error) == expected
