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


def test_contact_sheet_shows_frames_over_their_labels():
    """Five frames of each clip, or all that there are."""
    videos = data.Synthetic(None, "val")
    videos.clips[1] = videos.clips[1][:2]
    image = charts.contact_sheet({"val": videos}).finished()
    for row, times in enumerate([(0, 2, 4, 6, 9), (0, 1), (0, 2, 4, 6, 9)]):
        for column, time in enumerate(times):
            x, y = 148 + 264 * column, 136 + 432 * row                    # the middle, at twice the size
            pixels, labels = videos.read(videos.clips[row][time])
            assert image.getpixel((x, y)) == tuple(pixels[48, 64])
            assert image.getpixel((x, y + 192)) == tuple(videos.palette[labels[48, 64]])


def test_a_class_whose_name_the_font_lacks_has_its_number(monkeypatch):
    """Text that is no UTF-8 is drawn, too: with ?. Three classes find room in a row."""
    texts, canvas, colours = [], charts.Canvas(400, 100), [*PALETTE, (9, 9, 9)]
    canvas.text(0, 0, "\udcff")
    monkeypatch.setattr(canvas, "text", lambda x, y, text, **_: texts.append(text))
    canvas.class_legend(20, ["zero", "été", "", "\udcff"], colours)
    assert texts[1::2] == ["zero", "class 1", "class 2", "class 3"]
    seen = [canvas.finished().getpixel((29 + 111 * (k % 3), 20 + 26 * (k // 3))) for k in range(4)]
    assert seen == colours
