"""util/label_maps.py: the forms of tables that are taken, and label maps that say something else."""
import base64
import types

import numpy as np
import pytest
from PIL import Image

from data import CamVid, Frames
from util import label_maps
from util.errors import InputError

COLOURS = np.array([(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128)], np.uint8)
LABEL = np.arange(48).reshape(6, 8).astype(np.uint8) % 4


class Mine(CamVid):
    IDS, classes, palette = dict(zip(range(4), range(4))), list("abcd"), COLOURS


def save(path, label=LABEL, colours=None, **options):
    image = Image.fromarray(label)
    if colours is not None:
        image.putpalette(np.asarray(colours, np.uint8).tobytes())
    path.parent.mkdir(exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for k in range(3):
        save(tmp_path / f"train/a_{k}.png", np.full((6, 8, 3), k, np.uint8))
        save(tmp_path / f"trainannot/a_{k}.png")
    return tmp_path


def brought(**given):
    tables = dict(classes=["sky", "road"], palette=[[255, 0, 51], [0, 255, 0]], IDS=[0, 1])
    dataset = types.SimpleNamespace(**tables | given)
    label_maps.normal_form(dataset, "Mine")
    return [*map(type, dataset.classes)], dataset.classes, dataset.palette.tolist(), dataset.IDS.tolist()


@pytest.mark.parametrize("attribute, taken, refused", [
    ("classes", [("sky", "road"), np.array(["sky", "road"]), {1: "road", 0: "sky"}],
     ["sky", {1: "sky", 2: "road"}, ["sky", "sky"]]),
    ("palette", [((255, 0, 51), (0, 255, 0)), np.array([[1, 0, .2], [0, 1, 0]]),
                 {1: (0, 255, 0), 0: (255, 0, 51)}],
     [[(0, 0, 0)], [(0, 0)] * 2, [(0, 0, 300)] * 2, [(0, 0, -1)] * 2, ["red", "blue"]]),
    ("IDS", [{1: 1, 0: 0}, [(0, 5), (1, 1), (0, 0)], iter([(0, 0), (1, 1)]), np.arange(2, dtype=np.uint8)],
     [{0: "sky"}, [(0, 1, 2)], [(256, 0)], {-1: 0}, [0, 256], [0, -2], [0.5, 1.0], [0, 2]])])
def test_forms_of_the_tables(attribute, taken, refused):
    for form in taken:
        assert brought(**{attribute: form}) == brought()                  # of pairs the later one counts
    assert brought()[0] == [str, str]                                     # a checkpoint has no numpy.str_
    for form in refused:
        with pytest.raises(InputError, match=f"^Mine.*{attribute}"):
            brought(**{attribute: form})


def test_label_maps_that_agree_are_read(folder):
    save(folder / "trainannot/a_1.png", LABEL, COLOURS, bits=2)
    save(folder / "trainannot/a_2.png", LABEL, np.arange(768) // 3)       # grey colours
    assert (Frames(Mine(folder, "train")).labels.numpy() == LABEL).all()


def refused(folder, said, kind=Mine):
    with pytest.raises(InputError, match=said):
        Frames(kind(folder, "train"))


def test_quantised_colours_and_other_palettes_are_refused(folder):
    order = np.array([2, 0, 3, 1])                                        # the right colours, other values
    save(folder / "trainannot/a_1.png", np.argsort(order)[LABEL].astype(np.uint8), COLOURS[order])
    refused(folder, r"a_1.png: value 0, class 0 by IDS, has .*\(192, 192, 128\)")

    class Merged(Mine):                      # a class of several values has a colour that is none of theirs
        IDS, classes, palette = [0, 1, 1, 1], ["a", "rest"], [COLOURS[0], (9, 99, 9)]

    for k in range(3):
        save(folder / f"trainannot/a_{k}.png", LABEL, COLOURS)
    Frames(Merged(folder, "train"))
    save(folder / "trainannot/a_2.png", LABEL, COLOURS[[0, 3, 2, 1]])     # only the other maps show it
    refused(folder, "has the colour .* in .*trainannot/a_", Merged)
    save(folder / "trainannot/a_2.png", LABEL, COLOURS)
    save(folder / "trainannot/a_0.png", LABEL, COLOURS[[0, 1, 2, 0]])     # class 0's colour
    refused(folder, "a_0.png: value 3, class 1", Merged)


@pytest.mark.parametrize("mode, kind", [("L", "JPEG"), ("1", "PNG"), ("RGB", "PNG")])
def test_a_label_map_of_another_kind_is_named_for_what_it_is(folder, mode, kind):
    Image.fromarray(LABEL).convert(mode).save(folder / "trainannot/a_1.png", kind)
    refused(folder, f"a_1.png: is a {kind} of mode {mode}")


def test_few_bits_of_grey_are_named(folder):
    """Pillow reads their values spread over 0..255: here 17 for class 1, in all of 8 x 6 pixels."""
    (folder / "trainannot/a_1.png").write_bytes(base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAGBAAAAAAenm0mAAAADklEQVR42mMQBAIGXAQAGAYBmavl+QwAAAAASUVORK5CYII="))
    refused(folder, "a_1.png: .* 4 bits")


@pytest.mark.parametrize("value, upright", [(3, True), (6, False), (6, True)])
def test_image_and_label_map_are_turned_both_or_not_at_all(folder, capsys, monkeypatch, value, upright):
    """Labels as stored: nothing is turned, and that is said. Labels with the same metadata, or without but of
    the turned image's size: the image is turned. A frame without a label, a_2, follows the others."""
    stored, exif = np.zeros((6, 8, 3), np.uint8), Image.Exif()
    stored[:2], exif[0x0112] = 250, value
    label = stored[..., 0] // 250
    for k in range(3):
        save(folder / f"train/a_{k}.png", stored, exif=exif)
        asks = {"exif": exif} if upright and value == 3 else {}
        save(folder / f"trainannot/a_{k}.png", np.rot90(label, -1) if upright and not asks else label, **asks)
    (folder / "trainannot/a_2.png").unlink()
    monkeypatch.setattr(Mine, "UNLABELLED", True)
    (image, label), _, (last, _) = map((dataset := Mine(folder, "train")).read, dataset.clips[0])
    assert ((image[..., 0] > 200) == label).all() and (last == image).all()
    assert (image.shape != stored.shape or (image != stored).any()) == upright
    assert capsys.readouterr().out.count("none is turned") == (not upright)
