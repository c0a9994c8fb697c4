"""Reads image files, and says what is wrong with them."""
import collections
import contextlib
import mimetypes
from concurrent.futures import ThreadPoolExecutor
from shlex import quote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.errors import InputError, brief

FORMATS = "PNG", "JPEG"                      # only these: Pillow starts ghostscript for an EPS named .png


def open_image(path, formats=FORMATS):
    """-> a decoded Pillow image. Raises InputError naming a file that is missing or broken."""
    try:
        image = Image.open(path, formats=formats)
        image.load()
        return image
    except Exception as error:               # Pillow's decoders raise many kinds on a broken file
        if kind := other_kind(path):
            raise InputError(f"{path}: is {kind}") from None
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"not {' or '.join(formats)}" if unknown else getattr(error, "strerror", 0) or brief(error)
        raise InputError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from None


def other_kind(path):
    """What a file is that is often taken for an image, and the remedy; None for all others. The files of
    photos (HEIC, AVIF) and of MP4 videos have the same head, but for the brands in it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(32)
        if head[4:8] == b"ftyp" and any(brand in head for brand in (b"heic", b"heix", b"mif1", b"avif")):
            return "a HEIC or AVIF photo; convert it to PNG or JPEG"
        if (head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[8:12] == b"AVI "     # Matroska, WebM
                or (mimetypes.guess_type(path)[0] or "").startswith("video/")):
            return f"a video; extract its frames (mkdir frames; ffmpeg -i {quote(str(path))} frames/%06d.png)"


def upright(image, turn=True):
    """A copy of a Pillow image, turned as its metadata (EXIF) say, unless broken or turn is False."""
    image = image.copy()
    image.info.pop("transparency", None)     # of a palette; Pillow would warn that RGB has none
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image) if turn else image
    return image


def read_image(path, formats=FORMATS, turn=True):
    """An image file as (H, W, 3) uint8, upright unless turn is False. Grey, palette and RGBA images are
    converted to RGB (alpha is dropped). Raises InputError naming the file."""
    image = open_image(path, formats)
    if image.mode[0] in "IF":                # convert() would cut their values off at 255
        raise InputError(f"{path}: pixels of mode {image.mode} (16 bit or float); convert it to 8-bit RGB")
    return np.array(upright(image, turn).convert("RGB"))


def read_all(read, frames, keep=True, problems=(), show=lambda done, total: None):
    """read(frame), a tuple of arrays (H, W, ...), for all frames, with threads -> the arrays of all frames
    stacked, (N, H, W, ...) each, and the frames' size (H, W). keep=False: checks them only, () for arrays.
    Raises InputError: `problems`, bad files, sizes unlike most. show(done, total) is called after each."""
    problems, sizes, kept = [*problems], {}, []

    def attempt(frame):
        try:
            arrays = read(frame)
        except InputError as error:
            return error
        sizes[frame] = arrays[0].shape[:2]
        return arrays if keep else None

    with ThreadPoolExecutor(8) as pool:      # Pillow decodes without holding the GIL
        for done, result in enumerate(pool.map(attempt, frames), start=1):
            if isinstance(result, InputError):
                problems += result.args
            elif keep:
                kept.append(result)
            show(done, len(frames))
    usual = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    for frame in frames:                     # Frames of data.py, or paths
        if (size := sizes.get(frame, usual)) != usual:
            problems.append(f"{getattr(frame, 'image', frame)}: {size[1]} x {size[0]}, most others "
                            f"{usual[1]} x {usual[0]}; all must have the same size")
    if problems:
        raise InputError(*problems)
    return tuple(map(np.stack, zip(*kept))), usual
