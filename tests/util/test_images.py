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


def test_an_image_is_turned_as_its_metadata_says(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :10] = 255
    for orientation, corner in ((1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for path in (tmp_path / f"{orientation}.png", tmp_path / f"{orientation}.jpg"):
            Image.fromarray(pixels).save(path, exif=exif)
            image = images.read_image(path)
            assert image.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3))
            assert image[corner].min() > 250
            assert images.read_image(path, turn=False)[0, 0].min() > 250


def test_grey_palette_and_rgba_images_are_read(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(rgb).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, np.full((4, 5), 7, np.uint8)])).save(tmp_path / "rgba.png")
    palette = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5), "P")
    palette.putpalette(rgb.tobytes())
    palette.save(tmp_path / "palette.png")
    grey = np.array(Image.fromarray(rgb).convert("L"))[..., None]
    assert (images.read_image(tmp_path / "grey.png") == grey).all()
    assert (images.read_image(tmp_path / "rgba.png") == rgb).all()
    assert (images.read_image(tmp_path / "palette.png") == rgb).all()


@pytest.mark.parametrize("head, what", [
    (b"heic\0\0\0\0mif1", "a HEIC photo"), (b"mif1\0\0\0\0avif", "an AVIF photo"),
    (b"avif\0\0\0\0mif1", "an AVIF photo"), (b"isom\0\0\0\0avc1", None)])
def test_photos_of_phones_are_named(tmp_path, head, what):
    path = tmp_path / "IMG_1.png"
    path.write_bytes(b"\0\0\0\x20ftyp" + head + bytes(99))
    assert images.photo_format(path) == what
    with pytest.raises(InputError, match=what or "is not an image") as error:
        images.read_image(path)
    assert "convert it" in str(error.value) or not what


def test_an_animations_hidden_picture_is_no_frame(tmp_path):
    hidden, *shown = [Image.new("RGB", (8, 6), (k, 0, 0)) for k in (200, 10, 20)]
    for first, rest, options in ((hidden, shown, {"default_image": True}), (shown[0], shown[1:], {})):
        first.save(tmp_path / "a.png", save_all=True, append_images=rest, **options)
        frames = images.animation_frames(Image.open(tmp_path / "a.png"))
        assert [frame.convert("RGB").getpixel((0, 0))[0] for frame in frames] == [10, 20]


# ---------------------------------------------------------------------------------------------------------
# Files that were made to break it

def right_checksums(content):
    """A PNG with the right checksums of its chunks, so that the decoder gets further."""
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        if end + 4 > len(content):
            break
        content[end:end + 4] = struct.pack(">I", zlib.crc32(content[at + 4:end]))
        at = end + 4
    return bytes(content)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, said", [                                 # the limits: ours, Pillow's, PNG's
    (10000, "10000 x 10000 pixels"), (60000, "bomb"), (2 ** 32 - 1, "is not an image")])
def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, width, said):
    small = bytearray(saved(Image.new("RGB", (8, 8)), "PNG"))
    small[16:24] = struct.pack(">II", width, width)
    (tmp_path / "a.png").write_bytes(right_checksums(small))
    with pytest.raises(InputError, match=f"a.png: .*{said}"):
        images.read_image(tmp_path / "a.png")


def mutate(content, rng):
    """Flips some bits, cuts a range out, doubles it, or puts random bytes in its place."""
    content, kind = bytearray(content), rng.integers(4)
    a, b = sorted(rng.integers(0, len(content), 2).tolist())
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    else:
        content[a:b] = (content[a:b] * 2, b"", rng.bytes(rng.integers(1, 40)))[kind - 1]
    is_png = content[:4] == b"\x89PNG" and rng.random() < 0.7
    return right_checksums(content) if is_png else bytes(content)


def read_or_refused(path, seeds, count, read):
    """Mutated files are read, or refused in a line that names the file; both happen."""
    rng, good = np.random.default_rng(5), 0
    for k in range(count):
        path.write_bytes(mutate(seeds[k % len(seeds)], rng))
        try:
            assert read(path)
            good += 1
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 400
    assert 0.01 * count < good < 0.9 * count


@pytest.mark.parametrize("count", [200, pytest.param(2600, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(tmp_path, count):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8))
    kinds = [(mode, "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")]
    kinds += [(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]
    seeds = [saved(picture.convert(mode), kind) for mode, kind in kinds]
    seeds.append(saved(picture, "JPEG", progressive=True))
    read_or_refused(tmp_path / "a_1.png", seeds, count,
                    lambda path: 0 < images.read_image(path).size <= 3 * images.MAX_PIXELS)
    read_or_refused(tmp_path / "a_1.png", seeds[1:3], count, lambda path: read_values(path)[0].size)


@pytest.mark.parametrize("count", [60, pytest.param(630, marks=pytest.mark.slow)])
def test_mutated_animations_are_read_or_refused(tmp_path, count):
    rng = np.random.default_rng(1)
    first, *rest = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(4)]
    seeds = [saved(first, kind, save_all=True, append_images=rest) for kind in ("GIF", "WEBP", "PNG")]

    def read(path):
        video = open_video(path)
        return len(list(video.read())) == len(video.names) == len(video.durations)

    read_or_refused(tmp_path / "animation", seeds, count, read)
