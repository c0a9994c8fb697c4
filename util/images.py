"""Reads image files, and says what is wrong with them."""
import contextlib
import itertools
import warnings

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from PIL.Image import Transpose

from util.errors import InputError, brief

warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # open_image has its own message
MAX_PIXELS = 2 ** 26                         # 67 megapixels; a larger image is refused before it is decoded
FORMATS = "PNG", "JPEG"                      # only these: Pillow starts ghostscript for an EPS named .png
MODES = "RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr"         # eight bits per channel


def open_image(path, formats=FORMATS):
    """-> a decoded Pillow image. Raises InputError naming a file that is missing, too large or broken."""
    try:
        image = Image.open(path, formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{path}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
        image.load()
    except InputError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror.lower()}; check this path and its permissions") from None
    except Exception as error:               # Pillow's decoders raise many kinds on a broken file
        if photo := photo_format(path):
            raise InputError(f"{path}: is {photo}; convert it to PNG or JPEG") from None
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"not {' or '.join(formats)}" if unknown else brief(error)
        raise InputError(f"{path}: is not an image that can be decoded ({reason}); replace or remove "
                         "it") from None
    return image


def photo_format(path):
    """"a HEIC photo" or "an AVIF photo" for such a file, else None. Its container is that of MP4 videos, and
    only the brands in its head tell them apart."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(32)
        if head[4:8] != b"ftyp":
            return None
        if b"avif" in head or b"avis" in head:
            return "an AVIF photo"
        if any(brand in head for brand in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1")):
            return "a HEIC photo"


# Orientation in the metadata (EXIF) -> what brings the stored pixels upright. 5 to 8 swap the sides.
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
           5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


def orientation(image):
    """The orientation of a Pillow image, 2 to 8; 1 if it is upright as stored, or the metadata is broken."""
    with contextlib.suppress(Exception):
        value = image.getexif().get(0x0112)
        return value if value in UPRIGHT else 1
    return 1


def upright(image):
    """A Pillow image -> the same, turned as its metadata say."""
    turn = orientation(image)
    return image.transpose(UPRIGHT[turn]) if turn > 1 else image


def read_image(path, formats=FORMATS, turn=True):
    """An image file as (H, W, 3) uint8, upright unless turn is False. Grey, palette and RGBA images are
    converted to RGB (alpha is dropped). Raises InputError naming the file."""
    image = open_image(path, formats)
    if image.mode not in MODES:
        raise InputError(f"{path}: pixels of mode {image.mode} (16 bit or float); convert it to 8-bit RGB")
    return np.array((upright(image) if turn else image).convert("RGB"))


def animation_frames(animation):
    """The frames of an animated Pillow image, one after the other. The first picture of an APNG may be one
    for programs that can't show animations; then it is no frame."""
    frames = ImageSequence.Iterator(animation)
    return itertools.islice(frames, 1 if getattr(animation, "default_image", False) else 0, None)
