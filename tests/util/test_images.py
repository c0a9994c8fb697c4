"""util/images.py: what is read and how, and files that were made to break it."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from experiment.predict import open_video
from util import images
from util.errors import InputError
from util.label_maps import read_values


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_an_image_is_turned_as_its_metadata_says(orientation, corner):
    pixels, exif = np.zeros((20, 30, 3), np.uint8), Image.Exif()
    pixels[:10, :10], exif[0x0112] = 255, orientation
    content = saved(Image.fromarray(pixels), "JPEG", exif=exif)
    image = images.read_image(io.BytesIO(content))
    assert image.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3)) and image[corner].min() > 250
    assert images.read_image(io.BytesIO(content), turn=False)[0, 0].min() > 250


def test_grey_palette_and_rgba_images_are_read(recwarn):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    palette = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5), "P")
    palette.putpalette(rgb.tobytes())
    palette.info["transparency"] = bytes(range(20))
    grey = Image.fromarray(rgb).convert("L")
    for image, expected in ((grey, np.array(grey)[..., None]), (palette, rgb),
                            (Image.fromarray(np.dstack([rgb, np.full((4, 5), 7, np.uint8)])), rgb)):
        assert (images.read_image(io.BytesIO(saved(image, "PNG"))) == expected).all() and not recwarn.list


def right_checksums(content):
    """A PNG with the right checksums of its chunks."""
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        content[end:end + 4] = struct.pack(">I", zlib.crc32(content[at + 4:end]))
        at = end + 4
    return bytes(content)


def mutate(content, rng):
    """Flips some bits, or cuts a range out. Most PNGs get right checksums, else nothing in them was read."""
    content = bytearray(content)
    if rng.random() < 0.5:
        a, b = sorted(rng.integers(0, len(content), 2))
        del content[a:b]
    for at in rng.integers(len(content), size=rng.integers(9)):
        content[at] ^= 1 << rng.integers(8)
    return right_checksums(content) if content[:4] == b"\x89PNG" and rng.random() < 0.7 else bytes(content)


def read_video(path):
    video = open_video(path)
    return len(list(video.read())) == len(video.names) == len(video.durations)


FIRST, *REST = map(Image.fromarray, np.random.default_rng(1).integers(0, 256, (4, 20, 24, 3), np.uint8))
STILL = [saved(FIRST.convert(mode), "PNG") for mode in ("L", "P", "RGB", "RGBA", "1")]
STILL += [saved(FIRST.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")]
MOVING = [saved(FIRST, kind, save_all=True, append_images=REST) for kind in ("GIF", "WEBP", "PNG")]


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds, read", [
    (STILL, lambda path: images.read_image(path).size), (STILL[:2], lambda path: read_values(path)[0].size),
    (MOVING, read_video)], ids=["image", "label map", "animation"])
def test_mutated_files_are_read_or_refused(tmp_path, seeds, read, count):
    """In a line that names the file; both happen."""
    path, rng, good = tmp_path / "a_1.png", np.random.default_rng(5), 0
    for k in range(count):
        path.write_bytes(mutate(seeds[k % len(seeds)], rng))
        try:
            assert read(path)
            good += 1
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 400
    assert 0.01 * count < good < 0.9 * count
