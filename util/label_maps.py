"""Label maps, and the tables that say what their values mean: many forms are taken, and brought to one."""
import contextlib
import pathlib
import threading

import numpy as np
from PIL import Image

from util.errors import InputError, brief
from util.images import FORMATS, open_image, orientation, read_image, upright

IGNORE = 255
NEAR = 16                                    # two colours whose channels differ by at most this are the same


def ids(table):
    """The meaning of a label map's values -> (256,) array, the class of each value; -1: must not occur.

    table: a dict {value: class}, pairs (value, class), of which later ones count, or a list whose entry k is
    the class of value k. Class 255 is ignored. Raises InputError."""
    pairs = table.items() if isinstance(table, dict) else table
    try:
        given = np.array(list(pairs))
    except (TypeError, ValueError):          # no sequence, or one of unequal parts
        given = np.array(None)
    if given.ndim == 1:
        given = np.stack([np.arange(len(given)), given], axis=1)          # (N, 2): value, class
    if given.ndim != 2 or given.shape[1] != 2 or given.dtype.kind not in "iu" or not (
            0 <= given[:, 0].min() and given[:, 0].max() <= 255 and
            -1 <= given[:, 1].min() and given[:, 1].max() <= IGNORE):
        raise InputError("IDS: must be a dict {value: class}, pairs (value, class), or a table with a class "
                         f"for each value; values and classes are 0 to 255, and class {IGNORE} is ignored")
    classes = np.full(256, -1)
    classes[given[:, 0]] = given[:, 1]
    return classes


def in_order(table):
    """A list, tuple or array as a list; {number: entry} in the order of its numbers, which count from 0."""
    if isinstance(table, dict) and set(table) == set(range(len(table))):
        return [table[k] for k in range(len(table))]
    return None if isinstance(table, (dict, str)) or not np.iterable(table) else list(table)


def class_names(classes):
    """The names of the classes -> a list of str. Raises InputError."""
    names = in_order(classes)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"classes: is {str(classes)[:40]!r}; it must be a list of names, or {{number: "
                         "name}} with numbers from 0")
    if len(set(names)) < len(names):
        raise InputError(f"classes: names {max(names, key=names.count)!r} twice; rename one of them")
    return [str(name) for name in names]


def palette_array(palette, count):
    """The colours of `count` classes, 0 to 255, or 0 to 1 if none is above 1 -> (count, 3) uint8. Raises
    InputError."""
    with contextlib.suppress(TypeError, ValueError):              # no numbers
        colours = np.array(in_order(palette), float)
        if colours.shape == (count, 3) and 0 <= colours.min() and colours.max() <= 255:
            return np.rint(colours * (255 if colours.max() <= 1 else 1)).astype(np.uint8)
    raise InputError(f"palette: is {brief(palette)[:60]}; it needs a colour of three numbers, 0 to 255 or 0 "
                     f"to 1, for each of the {count} classes")


def normal_form(dataset, name):
    """Brings `classes`, `palette` and, if there is one, IDS of a dataset or its class to one form: a list of
    str, (C, 3) uint8, (256,). Raises InputError where that can't be done."""
    for attribute in ("classes", "palette", "read"):
        if not hasattr(dataset, attribute):
            raise InputError(f"{name}.{attribute}: is not there; a dataset is a class with classes, palette, "
                             "clips and read(frame), as data.Files is")
    try:
        dataset.classes = class_names(dataset.classes)
        dataset.palette = palette_array(dataset.palette, len(dataset.classes))
        if hasattr(dataset, "IDS"):
            dataset.IDS = ids(dataset.IDS)
    except InputError as error:
        raise InputError(f"{name}.{error}") from None


class Reader:
    """Reads the images and label maps of one split of a dataset, which has IDS (as by ids), `classes`,
    `palette` and `clips`. It holds all of them to one rule in what their files say besides pixels: the
    orientation in their metadata, and the colours of indexed label maps."""

    def __init__(self, dataset):
        self.dataset, self.colours, self.upright, self.lock = dataset, {}, None, threading.Lock()

    def read(self, image_path, label_path=None):
        """-> (H, W, 3) uint8 image and (H, W) uint8 classes, all IGNORE without a label map.

        Raises InputError naming the file that can't be decoded, or has a wrong size, value or colour."""
        image = read_image(image_path, wanted=self.turned)
        if label_path is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        values, colours = read_values(label_path, self.turned)
        label = to_classes(label_path, values, self.dataset.IDS)
        self.compare(label_path, colours)
        if label.shape != image.shape[:2]:
            how = {None: "", True: " (upright, as its metadata say)",
                   False: " (as stored; its metadata ask to turn it)"}[self.upright]
            raise InputError(f"{label_path}: {label.shape[1]} x {label.shape[0]}, but its image "
                             f"{pathlib.Path(image_path).name} is {image.shape[1]} x {image.shape[0]}{how}; "
                             "they must have the same size")
        return image, label

    def turned(self):
        """Whether images and label maps are turned upright where their metadata ask for it: what most label
        maps of the split fit. If they fit both ways, nothing is turned. Asked only where it matters."""
        with self.lock:                      # frames are read by several threads
            if self.upright is None:
                pairs = [(frame.image, frame.label) for clip in self.dataset.clips for frame in clip]
                votes, count = 0, 0          # for upright, less those for as stored
                for image, label in [map(look, pair) for pair in pairs if pair[1] is not None]:
                    if image and label and max(image[1], label[1]) > 1:
                        sizes = [size[::-1] if turn > 4 else size for size, turn in (image, label)]
                        stored = image[0] == label[0] and label[1] == 1
                        votes, count = votes + (sizes[0] == sizes[1]) - stored, count + 1
                self.upright = votes > 0 or count == 0
                if not self.upright:
                    print(f"{pathlib.Path(pairs[0][0]).parent}: the metadata of {count} images ask to turn "
                          "them, but their label maps fit the images as stored, so none is turned")
            return self.upright

    def compare(self, path, colours):
        """Raises InputError where the colours of an indexed label map say that its values are other classes
        than in the label maps before it, or than IDS says."""
        table, palette, name = self.dataset.IDS, self.dataset.palette, type(self.dataset).__name__
        value = wrong_colour(colours, table, palette)
        if value is not None:
            k = table[value]
            raise InputError(f"{path}: value {value} is {self.dataset.classes[k]!r} by {name}.IDS, but has "
                             f"the colour {colours[value]}, not {tuple(palette[k].tolist())} as in "
                             f"{name}.palette; correct IDS, the palette, or the map")
        for value, colour in colours.items():
            first, other = self.colours.setdefault(value, (colour, path))
            if colour != first:
                raise InputError(f"{path}: value {value} has the colour {colour}, but {first} in "
                                 f"{pathlib.Path(other).name}, so it means another class; save all label "
                                 "maps with one palette")


def read_values(path, wanted=lambda: True):
    """A label map -> its values, (H, W) uint8, and {value: (red, green, blue)} of those that occur if it is
    an indexed PNG, else {}. wanted: see images.upright. Raises InputError naming a file of another kind."""
    image = open_image(path)
    if image.format in ("JPEG", "MPO"):
        raise InputError(f"{path}: is a JPEG, which changes class numbers; save label maps as PNG")
    if image.mode not in ("L", "P", "1"):
        raise InputError(f"{path}: pixels of mode {image.mode}; a label map has 8-bit class numbers")
    with open(path, "rb") as file:
        bits = file.read(25)[24]
    if image.mode != "P" and bits < 8:       # Pillow would spread the values over 0..255
        raise InputError(f"{path}: grey values of {bits} bit; a label map has 8-bit class numbers, so save "
                         "it with 8 bits per pixel")
    image, colours = upright(image, wanted), {}
    values = np.array(image)
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        colours = {v: tuple(palette[v].tolist()) for v in np.unique(values).tolist() if v < len(palette)}
    return values, colours


def to_classes(path, values, table):
    """The values of a label map -> its classes, (H, W) uint8, by a table of ids(). Raises InputError."""
    label = table[values]
    if label.min(initial=0) < 0:
        raise InputError(f"{path}: label value {values[label < 0][0]} is no class number in IDS; is this "
                         "the coloured map, not the map of class numbers?")
    return label.astype(np.uint8)


def read_label(path, table):
    """A label map as (H, W) uint8 classes. Raises InputError naming the file."""
    return to_classes(path, read_values(path)[0], table)


def wrong_colour(colours, table, palette):
    """An indexed label map says by its colours, too, what its values mean -> the first value whose colour is
    not that of its class, or None. For a class of several values: whose colour is that of another class.

    Maps that were quantised from coloured ones have values in any order. A ramp of greys says nothing."""
    if all(colour == (value,) * 3 for value, colour in colours.items()):
        return None
    for value, colour in colours.items():
        k = table[value]
        if k not in (-1, IGNORE):
            near = np.abs(palette.astype(int) - colour).max(axis=1) <= NEAR       # (C,)
            if not near[k] and (near.any() or (table == k).sum() == 1):
                return value


def look(path):
    """(width, height) of an image file as stored, and its orientation; None if it can't be read."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return image.size, orientation(image)
