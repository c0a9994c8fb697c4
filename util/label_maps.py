"""Label maps, and the tables that say what their values mean: many forms are taken, and brought to one."""
import contextlib
import pathlib

import numpy as np
from PIL import Image

from util.errors import InputError, brief
from util.images import open_image, read_image, upright

IGNORE = 255
NEAR = 16                                    # two colours whose channels differ by at most this are the same


def ids(table):
    """The meaning of a label map's values -> (256,) array, the class of each value; -1: must not occur.
    table: a dict {value: class}, pairs (value, class), of which later ones count, or a list whose entry k is
    the class of value k. Class 255 is ignored. Raises ValueError, TypeError or LookupError."""
    given, meaning = np.array(list(table.items() if isinstance(table, dict) else table)), np.full(256, -1)
    if given.ndim == 1:
        given = np.stack([np.arange(len(given)), given], axis=1)
    values, classes = given.T                # (N,) each
    if given.dtype.kind not in "iu" or values.min() < 0 or classes.min() < -1 or classes.max() > IGNORE:
        raise ValueError("values and classes must be 0 to 255")
    meaning[values] = classes
    return meaning


def normal_form(dataset, name):
    """Brings `classes`, `palette` and, if there is one, IDS of a dataset or its class to one form: a list of
    str, (C, 3) uint8, (256,). Raises InputError where that can't be done, or they don't agree."""
    try:
        names = [str(dataset.classes[k]) for k in range(len(dataset.classes))]        # {number: name}, too
        colours = np.array([dataset.palette[k] for k in range(len(dataset.palette))], float)        # (C, 3)
        meaning = ids(getattr(dataset, "IDS", range(len(names))))
        distinct, inside = len({*names}) == len(names), 0 <= colours.min() <= colours.max() <= 255
        if not distinct or not inside or colours.shape != (len(names), 3):
            raise ValueError("they do not agree")
    except (TypeError, ValueError, LookupError) as error:
        raise InputError(f"{name}: `classes` must be different names, `palette` three numbers for each, 0 to "
                         f"255 or 0 to 1, IDS {{value: class}} ({brief(error)[:60]})") from None
    if (used := meaning[meaning != IGNORE].max()) >= len(names):
        raise InputError(f"{name}.IDS: gives classes up to {used}, but `classes` has {len(names)} names")
    dataset.classes, dataset.IDS = names, meaning
    dataset.palette = np.rint(colours * (255 if colours.max() <= 1 else 1)).astype(np.uint8)


class Reader:
    """Reads the images and label maps of one split of a dataset in normal form, by one rule for all.
    They are turned upright where their metadata ask for it. The first image that asks decides: if its label
    map does not ask and has the size of the image as stored, none is turned."""

    def __init__(self, dataset):
        self.dataset, self.colours, self.turn = dataset, {}, True
        for path, label_path in sum(dataset.clips, []):           # a broken file is reported when it is read
            with contextlib.suppress(Exception), Image.open(path) as image, Image.open(label_path) as label:
                # Not a PNG's own getexif(), which decodes the image.
                turn, label_turn = (Image.Image.getexif(x).get(0x0112, 1) for x in (image, label))
                if turn > 1:
                    self.turn = label_turn > 1 or label.size != image.size
                    break
        if not self.turn:
            print(f"{pathlib.Path(path).parent}: metadata ask to turn images, but their label maps fit them "
                  "as stored, so none is turned")

    def read(self, image_path, label_path=None):
        """-> (H, W, 3) uint8 image and (H, W) uint8 classes, all IGNORE without a label map. Raises
        InputError naming the file that can't be decoded, or has a wrong size, value or colour."""
        image = read_image(image_path, turn=self.turn)
        if label_path is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        values, colours = read_values(label_path, self.turn)
        label, (H, W) = self.dataset.IDS[values], image.shape[:2]         # (H, W)
        if label.min() < 0:
            raise InputError(f"{label_path}: label value {values[label < 0][0]} is no class number in IDS")
        if label.shape != (H, W):
            raise InputError(f"{label_path}: {label.shape[1]} x {label.shape[0]}, but its image is {W} x {H}")
        self.check_colours(label_path, colours)
        return image, label.astype(np.uint8)

    def check_colours(self, path, colours):
        """Raises InputError where the colours of an indexed label map say that its values are other classes
        than IDS says (as if it was quantised), or than in the maps before it. A ramp of greys says nothing.
        A value has its class's colour; if its class has several values, then only no other class's."""
        classes, palette = self.dataset.IDS, self.dataset.palette.astype(int)
        if all(colour == (value,) * 3 for value, colour in colours.items()):
            return
        for value, colour in colours.items():
            k, (first, where) = classes[value], self.colours.setdefault(value, (colour, path))
            near = np.abs(palette - colour).max(axis=1) <= NEAR           # (C,)
            if k != IGNORE and not near[k] and (near.any() or (classes == k).sum() == 1):
                first, where = tuple(palette[k].tolist()), "the palette"
            if colour != first:
                raise InputError(f"{path}: value {value}, class {k} by IDS, has the colour {colour}, but "
                                 f"{first} in {where}; correct the map, IDS, or the palette")


def read_values(path, turn=True):
    """A label map -> its values, (H, W) uint8, and {value: (red, green, blue)} of those that occur if it is
    an indexed PNG, else {}. turn: upright, as its metadata say. Raises InputError for another kind."""
    image = open_image(path)
    bits = pathlib.Path(path).read_bytes()[24]                    # of a PNG
    # A JPEG changes the numbers, and Pillow would spread grey values of fewer bits over 0..255.
    if image.format != "PNG" or image.mode not in ("L", "P") or image.mode == "L" and bits < 8:
        raise InputError(f"{path}: is a {image.format} of mode {image.mode}, {bits} bits; save label maps as "
                         "PNG, grey or indexed, with 8-bit class numbers")
    values, palette = np.array(upright(image, turn)), image.getpalette("RGB") or []
    there = [value for value in np.unique(values).tolist() if 3 * value < len(palette)]
    return values, {value: tuple(palette[3 * value:3 * value + 3]) for value in there}
