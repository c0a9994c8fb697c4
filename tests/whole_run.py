"""A whole run that is small: a few seconds, all stages. One is made for all tests that only look at it.

    from whole_run import small, run, smoke   fixtures. small: few, tiny videos; run: a new one of them;
                                         smoke: that of a finished one, to be read or copied, never written
    start(folder)                        train.main in a process of its own, which may be killed
"""
import multiprocessing
import os
import pathlib
import runpy
import shutil
import sys
import threading
import types

import pytest
import torch

import data
import dyncell
import train
from experiment import runs, table

ROOT, HERE = pathlib.Path(train.__file__).parent, pathlib.Path(__file__).parent
ARGUMENTS = ("--schedule smoke --seed 2 --search-strategy both --static-epochs 3 --static-batch 8 "
             "--static-crop 48 64 --validate-every 2 --search-batch 2 --meta-val-share 0.25 --cells 1 "
             "--static-optimizer sgd-adam --static-average 0.9 --cell-epochs 2 --cell-batch 4 --end-epochs 2 "
             "--end-crop 48 64 --key-frames 0 3").split()

# Processes are forked off one that has imported torch but never used it: that saves the import's seconds at
# each of many starts. (The first optimiser imports torch._dynamo.)
os.environ["PYTHONPATH"] = f"{ROOT}:{HERE}"
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["whole_run", "torch._dynamo", "torch.distributed.run"])


def make_shallow(set_attribute):
    """A static network of half as many modules, for tests of what is done with a network: 8 encoder blocks
    of 17, three operations of seven in each contextual cell. The real one is tested in tests/test_dyncell.py.

    set_attribute: setattr in a process of one's own, monkeypatch.setattr in a test."""
    set_attribute(dyncell.MobileNetV2, "SETTING", [
        (t, c, 2 if c == 96 else 1, s) for t, c, _, s in dyncell.MobileNetV2.SETTING])
    set_attribute(dyncell.MobileNetV2, "TAPPED", (2, 3, 6, 8))
    set_attribute(dyncell.ContextualCell, "OPS", ["conv3x3_r3", "gap", "conv3x3"])
    set_attribute(dyncell.ContextualCell, "forward", lambda cell, x: sum(op(x) for op in cell.ops))


def make_small(set_attribute):
    """Few, tiny videos and a shallow network; no times are taken."""
    make_shallow(set_attribute)
    set_attribute(data.Synthetic, "SPLITS", {"train": (4, 4), "val": (1, 4), "test": (2, 4)})
    set_attribute(data.Synthetic, "SIZE", (48, 64))
    set_attribute(runs, "SAVE_SECONDS", 0)                                # a checkpoint after every epoch
    set_attribute(table, "milliseconds_in_turn", lambda calls, repeats: dict.fromkeys(calls, 1.0))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setattr)


@pytest.fixture
def run(tmp_path, small):
    """A run that has not begun."""
    return runs.Run(tmp_path, train.recipe_for("synthetic", "smoke"), device="cpu")


def calibrated():
    """Arch2 with real statistics in its batch norms. With the initial ones layer4 is below half precision,
    and every network that was trained for a few steps only says the same class everywhere."""
    torch.manual_seed(0)
    static, videos = dyncell.Arch2(6), data.Synthetic(None, "train")
    for module in static.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(videos.read(clip[0])[0]) for clip in videos.clips])
        static.train()(data.normalise(images))
    return static.eval()


def arguments_of(folder):
    """The flags of the small run. Its encoder's weights lie in the folder of all tests."""
    encoder = next(parent / "encoder.pth" for parent in folder.parents if (parent / "encoder.pth").exists())
    return [*ARGUMENTS, "--encoder-weights", str(encoder), "--run", str(folder)]


def as_script(monkeypatch, name, *arguments):
    """`python NAME ARGUMENTS`, but for the process: importing torch takes seconds. -> exit status"""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def run_predict(run, source, output, *more):
    train.main(["--stage", "predict", "--run", str(run), "--input", str(source), "--output", str(output),
                *more])
    return output


def content_of(folder):
    """{name: content} of all files in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(folder, kill=None):
    """The small run's command in a process of its own. kill: None, or (seconds, signal) from when run_main's
    handlers are there."""
    return run_forked(command, folder, arguments_of(folder), kill)


def run_forked(function, folder, *arguments):
    """function(file for what it prints, *arguments) in a process of its own -> its .status and .output."""
    out = folder.parent / f"{folder.name}.out"
    process = FORKED.Process(target=function, args=(out, *arguments))
    process.start()
    process.join()
    return types.SimpleNamespace(status=process.exitcode, output=out.read_text())     # -9: killed by signal 9


def write_to(out):
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def command(out, arguments, kill):
    write_to(out)
    make_small(setattr)
    seconds, number = kill or (1e6, 0)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True                      # a mistake ends the process at once

    def main():
        timer.start()
        train.main(arguments)
        timer.cancel()
    data.run_main(main)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The finished run's folder. pytest sets up what two files import twice; it is made once."""
    folder = tmp_path_factory.getbasetemp() / "whole" / "run"
    if not folder.exists():
        folder.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            make_small(patch.setattr)
            torch.save(calibrated().encoder.state_dict(), folder.parents[1] / "encoder.pth")
        ended = start(folder)
        assert ended.status == 0, ended.output
    return folder


def copy_of(smoke, tmp_path, *names):
    """A copy of the finished run, or of some of its files."""
    folder = tmp_path / "run"
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(smoke, folder, ignore=lambda _, found: set(found) - set(names) if names else ())
    return folder
