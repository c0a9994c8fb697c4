"""Reads image files, and says what is wrong with them."""
import contextlib
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from util.errors import InputError, brief

warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # open_image has its own message
MAX_PIXELS = 2 ** 26                         # 67 megapixels; a larger image is refused before it is decoded
FORMATS = "PNG", "JPEG"                      # only these: Pillow starts ghostscript for an EPS named .png
MODES = "RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr"         # eight bits per channel


def open_image(path, formats=FORMATS, small=False):
    """-> a decoded Pillow image. small=True decodes a JPEG at 1/8 of its size, as a quick check. Raises
    InputError naming a file that is missing, too large or broken."""
    try:
        image = Image.open(path, formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{path}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
        if small:
            image.draft(image.mode, (1, 1))
        image.load()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read; change its permissions") from None
    except Exception as error:               # Pillow's decoders raise many kinds on a broken file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"not {' or '.join(formats)}" if unknown else brief(error)
        raise InputError(f"{path}: is not an image that can be decoded ({reason}); replace or remove "
                         "it") from None
    return image
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


def turn(image):
    """The transpose that brings a phone's image upright, from its metadata; None if it needs none."""
    with contextlib.suppress(Exception):     # broken metadata is ignored
        return TURNS.get(image.getexif().get(0x0112))


def check_mode(path, image):
    if image.mode not in MODES:
        raise InputError(f"{path}: pixels of mode {image.mode} (16 bit or float); convert it to 8-bit RGB")


def read_image(path, formats=FORMATS):
    """An image file as (H, W, 3) uint8, upright. Grey, palette and RGBA images are converted to RGB (alpha
    is dropped). Raises InputError naming the file."""
    image = open_image(path, formats)
    check_mode(path, image)
    if turn(image) is not None:
        image = image.transpose(turn(image))
    return np.array(image.convert("RGB"))


def look_at_image(path):
    """(width, height) of the image that read_image would return, or its InputError, in less time."""
    image = open_image(path, small=True)
    check_mode(path, image)
    with Image.open(path, formats=FORMATS) as header:
        width, height = header.size
    sideways = TURNS[5], TURNS[6], TURNS[7], TURNS[8]
    return (height, width) if turn(image) in sideways else (width, height)


def read_label(path, ids):
    """A label map as (H, W) uint8 class numbers. ids (256,) maps the file's values to classes; -1 marks a
    value that must not occur. Raises InputError naming the file."""
    image = open_image(path)
    if image.mode not in ("L", "P"):
        raise InputError(f"{path}: pixels of mode {image.mode}; a label map has 8-bit class numbers")
    raw = np.array(image)
    label = ids[raw]
    if label.min(initial=0) < 0:
        raise InputError(f"{path}: label value {raw[label < 0][0]} is no class number; is this the "
                         "coloured map, not the map of class numbers?")
    return label.astype(np.uint8)
