"""What holds for every test: the path, one thread, a seed, slow tests on demand.

    python -m pytest            the tests; `-m slow` those that take long, `-m "slow or not slow"` all of them
    CAMVID=DIR python -m pytest also those on the real CamVid
"""
import os
import pathlib
import sys

os.environ["OMP_NUM_THREADS"] = "1"          # before torch is imported; the scripts of tests inherit it
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)                     # more of them, on a busy machine, wait for each other


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only where the -m expression names it")
    config.addinivalue_line("markers", "camvid: needs the real CamVid, CAMVID=DIR python -m pytest")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "camvid" in item.keywords and "CAMVID" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs the real CamVid: CAMVID=DIR python -m pytest"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def camvid(tmp_path):
    """A folder like CamVid's: in each split two clips of three frames of 6x8; labels count 0..11."""
    rng = np.random.default_rng(0)
    label = Image.fromarray((np.arange(48).reshape(6, 8) % 12).astype(np.uint8))
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for t in (0, 30, 60):
            for name in (f"0001TP_{t:06d}", f"Seq05VD_f{t:05d}"):
                image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
                image.save(tmp_path / split / f"{name}{'.jpg' if t else '.png'}")
                label.save(tmp_path / f"{split}annot" / f"{name}.png")
    return tmp_path
