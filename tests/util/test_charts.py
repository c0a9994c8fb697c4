"""Pictures are checked against what they show: their pixels are read back."""

import numpy as np
import torch
from PIL import Image

import data
from util import charts

LABELS = np.array([[0, 1], [2, 255]], np.uint8)
PALETTE = [(10, 20, 30), (200, 0, 0), (0, 200, 0)]


def test_colours_by_hand_and_indexed_files(tmp_path):
    for ignored in 0, 255:
        colours = charts.colourise(torch.from_numpy(LABELS), PALETTE, ignored)
        assert colours.tolist() == [[[10, 20, 30], [200, 0, 0]], [[0, 200, 0], [ignored] * 3]]
    image = np.full((2, 2, 3), 100, np.uint8)
    assert charts.overlay(image, LABELS, PALETTE).tolist() == [
        [[55, 60, 65], [150, 50, 50]], [[50, 150, 50], [100, 100, 100]]]
    for values in (LABELS, LABELS.T, LABELS.astype(np.int64)):    # and not contiguous
        charts.save_indexed(str(tmp_path / "a.png"), values, PALETTE)
        image = Image.open(tmp_path / "a.png")
        assert image.mode == "P" and (np.array(image) == values).all()
        assert (np.array(image.convert("RGB")) == charts.colourise(values, PALETTE)).all()
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_ticks_enclose_the_values_and_y_points_upwards():
    for values, ticks in (([0.31, 0.68], "0.3 0.4 0.5 0.6 0.7"), ([-12.1, 7], "-15 -10 -5 0 5 10"),
                          ([0.3], "-0.2 0 0.2 0.4 0.6 0.8"), ([], "0 0.2 0.4 0.6 0.8 1")):
        assert " ".join(charts.round_ticks(values).values()) == ticks
    assert [*charts.round_ticks([1, 3], least=1)] == [1, 2, 3]            # whole numbers
    at = charts.axes(charts.Canvas(120, 240), (10, 20, 110, 220), {0: "", 2: ""}, {0: "", 1: ""})
    assert (at(0, 0), at(1, 1), at(3, 0.25)) == ((10, 220), (60, 20), (110, 170))     # 3: at the edge


class Videos:
    """Pixels are (clip, frame, 0), labels the frame's number. Names are no UTF-8: they are drawn with ?."""
    classes, palette = ["zero", "été", "", "\udcff"], [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)]

    def __init__(self, *lengths):
        self.clips = [[data.Frame(f"\udcff{clip}{time}", None) for time in range(length)]
                      for clip, length in enumerate(lengths)]

    def read(self, frame):
        clip, time = map(int, frame.image[1:])
        pixels = np.full((96, 128, 3), (10 * clip, time, 0), np.uint8)
        return pixels, np.minimum(pixels[..., 1], 3)


def test_contact_sheet_shows_frames_over_their_labels_and_numbers_names_that_the_font_lacks(monkeypatch):
    texts, text = [], charts.Canvas.text
    monkeypatch.setattr(charts.Canvas, "text", lambda *a, **more: texts.append(a[3]) or text(*a, **more))
    image = charts.contact_sheet({"train": Videos(9, 2, 1, 5), "val": Videos(3)}).finished()  # three a split
    assert texts[-9::2] == ["zero", "class 1", "class 2", "class 3", "ignored"]
    for row, times in enumerate(([0, 2, 4, 6, 8], [0, 1], [0], [0, 1, 2])):
        for column, time in enumerate(times):
            x, y = 148 + 264 * column, 136 + 432 * row
            assert image.getpixel((x, y)) == (10 * (row % 3), time, 0)
            assert image.getpixel((x, y + 192)) == Videos.palette[min(time, 3)]
    assert [image.getpixel((29 + 111 * k, image.height - 24)) for k in range(4)] == Videos.palette
