"""Pictures are checked against what they show: their pixels are read back."""
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from util import charts, label_maps

LABELS = np.array([[0, 1], [2, 255]], np.uint8)
PALETTE = np.array([(10, 20, 30), (200, 0, 0), (0, 200, 0)], np.uint8)


def test_colourise_and_overlay_by_hand():
    expected = [[[10, 20, 30], [200, 0, 0]], [[0, 200, 0], [0, 0, 0]]]
    for labels, palette in ((LABELS, PALETTE), (torch.from_numpy(LABELS), PALETTE.tolist())):
        colours = charts.colourise(labels, palette)
        assert colours.dtype == np.uint8 and colours.tolist() == expected
    image = np.full((2, 2, 3), 100, np.uint8)
    expected = [[[55, 60, 65], [150, 50, 50]], [[50, 150, 50], [100, 100, 100]]]
    assert charts.overlay(image, LABELS, PALETTE).tolist() == expected
    assert (charts.overlay(image, LABELS, PALETTE, alpha=0) == 100).all() and (image == 100).all()


def test_what_is_ignored_looks_like_no_class():
    """White with grey stripes: not black, which CamVid's pedestrians, (64, 64, 0), are close to."""
    pixels = charts.shown(np.full((64, 64), 255, np.uint8), data.CamVid.palette)
    assert {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} == {(255, 255, 255), (160, 160, 160)}
    labels = np.arange(11, dtype=np.uint8)[None]
    assert (charts.shown(labels, data.CamVid.palette) == data.CamVid.palette).all()


def test_indexed_png_round_trip(tmp_path):
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (37, 53)).astype(np.uint8)
    for values, kind in ((labels, np.uint8), (labels.T, np.int64)):       # and not contiguous
        charts.save_indexed(str(tmp_path / "a.png"), values.astype(kind), PALETTE)
        image = Image.open(tmp_path / "a.png")
        assert image.mode == "P" and (np.array(image) == values).all()
        assert (np.array(image.convert("RGB")) == charts.colourise(values, PALETTE)).all()
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (label_maps.read_values(tmp_path / "a.png")[0] == values).all()


def test_names_that_the_font_lacks_are_numbered():
    names = ["road", "été", "\u5929\u7a7a", "", "a\nb", "\udcff"]     # the last: bytes that are no UTF-8
    texts = [text for _, _, text in charts.class_legend(names, [(0, 0, 0)] * 6)]
    assert texts == ["road", "class 1", "class 2", "class 3", "class 4", "class 5", "ignored"]
    charts.Canvas(100, 50).text(0, 20, names[-1])                         # elsewhere it is a question mark
    assert charts.drawable("0\u5929~ ±") == "0?~ ±"
    assert charts.text_width("\u5929") == charts.text_width("?")


def test_ticks_enclose_the_values():
    assert charts.round_ticks([0.31, 0.68]) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert charts.round_ticks([1, 3], whole=True) == [1, 2, 3]
    assert charts.round_ticks([math.nan, math.inf]) == charts.round_ticks([])
    assert charts.round_ticks([]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 6)
        high = low + rng.choice([0, rng.random() * 10 ** rng.randint(-6, 6)])
        ticks = charts.round_ticks([low, high])
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-6 * step and high - 1e-6 * step <= ticks[-1] and 2 <= len(ticks) <= 7
        assert f"{step:.0e}"[0] in "125"


class Videos:
    """Clips of any length, for which pixels are (clip, frame, 0) and the label is the frame's number."""
    classes, palette = ["zero", "one", "two"], [(200, 0, 0), (0, 200, 0), (0, 0, 200)]

    def __init__(self, *lengths):
        self.clips = []
        for c, length in enumerate(lengths):
            self.clips.append([data.Frame(f"clip{c}_{t:03d}.png", None) for t in range(length)])

    def read(self, frame):
        clip, time = int(frame.image[4]), int(frame.image[6:9])
        image = np.zeros((96, 128, 3), np.uint8) + np.array([10 * clip, time, 0], np.uint8)
        return image, np.full((96, 128), min(time, 2), np.uint8)


def test_contact_sheet_shows_frames_over_each_clip_and_their_labels():
    canvas = charts.contact_sheet({"train": Videos(9, 2, 1, 5), "val": Videos(3)})       # three a split
    image = canvas.finished()
    for row, times in enumerate(([0, 2, 4, 6, 8], [0, 1], [0], [0, 1, 2])):
        for column in range(5):
            x, y = 180 + 264 * column + 128, 20 + row * (2 * 192 + 24) + 96
            at, below = image.getpixel((x, y)), image.getpixel((x, y + 192))
            if column < len(times):
                assert at == (10 * (row if row < 3 else 0), times[column], 0)
                assert below == Videos.palette[min(times[column], 2)]
            else:
                assert at == below == (255, 255, 255)
    legend = image.crop((0, image.height - 60, image.width, image.height))
    assert {*Videos.palette, (160, 160, 160)} <= {colour for _, colour in legend.getcolors(1 << 24)}
