"""util/images.py: what is read and how, and files that were made to break it."""
import io
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from experiment.predict import open_video
from util import images, label_maps
from util.errors import InputError


def test_an_image_is_turned_as_its_metadata_says(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :10] = 255
    for orientation, corner in ((1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("png", "jpg"):
            path = tmp_path / f"{orientation}.{kind}"
            Image.fromarray(pixels).save(path, exif=exif)
            image = images.read_image(path)
            assert image.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3))
            assert image[corner].min() > 250
            assert images.look_at_image(path) == image.shape[1::-1]


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
    for first, options in ((hidden, {"default_image": True}), (shown.pop(0), {})):
        rest = shown if not options else [Image.new("RGB", (8, 6), (k, 0, 0)) for k in (10, 20)]
        first.save(tmp_path / "a.png", save_all=True, append_images=rest, **options)
        frames = images.animation_frames(Image.open(tmp_path / "a.png"))
        assert [frame.convert("RGB").getpixel((0, 0))[0] for frame in frames] == [10, 20]


# ---------------------------------------------------------------------------------------------------------
# Bombs and fuzz

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, mode=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(size):
    """`size` zeros, compressed, without ever holding them."""
    deflate = zlib.compressobj(9)
    parts = [deflate.compress(bytes(min(2 ** 20, size - k))) for k in range(0, size, 2 ** 20)]
    return b"".join(parts) + deflate.flush()


READ_ALL_IN_BOUNDED_MEMORY = """
import pathlib, resource, sys
from util import images
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 30, size + 2 ** 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, images.read_image(path).shape)
    except images.InputError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_in_bounded_memory(tmp_path):
    """In a process of its own, which may have 1 GiB of address space more than it has at its start."""
    text = zeros(2 ** 28)
    pixels = chunk(b"IDAT", zeros(8 * 25))
    bombs = {"huge": png(60000, 60000, chunk(b"IDAT", zeros(2 ** 20))),   # over Pillow's own limit
             "large": png(10000, 10000, chunk(b"IDAT", zeros(10 ** 6))),  # between ours and its
             "negative": png(2 ** 32 - 1, 2 ** 32 - 1, chunk(b"IDAT", b"")),
             "text": png(8, 8, chunk(b"zTXt", b"k\0\0" + text), pixels),
             "itxt": png(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + text), pixels),
             "profile": png(8, 8, chunk(b"iCCP", b"k\0\0" + text), pixels),
             "idat": png(8, 8, chunk(b"IDAT", text))}
    for name, content in bombs.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    Image.new("L", (65500, 1100)).save(tmp_path / "wide.jpg", quality=1)
    done = subprocess.run([sys.executable, "-c", READ_ALL_IN_BOUNDED_MEMORY, tmp_path], capture_output=True,
                          text=True, cwd=pathlib.Path(images.__file__).parents[1])
    *lines, megabytes = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and len(lines) == 8 and int(megabytes) < 300
    said = {pathlib.Path(line.split()[0].rstrip(":")).stem: line for line in lines}
    assert "10000 x 10000 pixels; the limit is 67108864" in said["large"]
    assert "65500 x 1100 pixels" in said["wide"]
    assert all("is not an image" in said[name] for name in ("huge", "negative", "text", "itxt"))
    assert all("(8, 8, 3)" in said[name] or "is not an image" in said[name] for name in ("profile", "idat"))


def mutate(content, rng):
    """One of: flipped bits, cut, a range doubled, random bytes put in, ranges swapped, a length changed."""
    content, kind = bytearray(content), rng.integers(6)
    a, b = sorted(rng.integers(0, len(content), 2).tolist())
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif kind == 4:
        content[a:b] = content[b:] + content[a:b][::-1]
    else:
        at, new = {1: (len(content), b""), 2: (a, content[a:b]), 3: (a, rng.bytes(rng.integers(1, 40))),
                   5: (a + 4, rng.bytes(4))}[kind]
        content[a:at] = new
    if content[:4] == b"\x89PNG" and rng.random() < 0.7:
        right_checksums(content)
    return bytes(content)


def right_checksums(content):
    """Corrects those of a PNG's chunks, so that the decoder gets further."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        if end + 4 > len(content):
            break
        content[end:end + 4] = struct.pack(">I", zlib.crc32(content[at + 4:end]))
        at = end + 4


def pictures(rng):
    """Small files of each kind that is read; the last is a label map."""
    picture, files = Image.fromarray(rng.integers(0, 256, (23, 31, 3), np.uint8)), []
    for mode, kind, options in (("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("RGBA", "PNG", {}),
                                ("1", "PNG", {}), ("RGB", "JPEG", {}), ("L", "JPEG", {}),
                                ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True})):
        file = io.BytesIO()
        picture.convert(mode).save(file, kind, **options)
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 12, (23, 31), np.uint8)).save(file, "PNG")            # a label map
    files.append(file.getvalue())
    return files


@pytest.mark.parametrize("count", [200, pytest.param(2600, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(tmp_path, count):
    rng = np.random.default_rng(5)
    seeds, path, table = pictures(rng), tmp_path / "0001TP_000000.png", label_maps.ids(range(12))

    def is_read(reader, *more):
        try:
            pixels = reader(path, *more)
            assert pixels.dtype == np.uint8 and 0 < pixels.size <= 3 * images.MAX_PIXELS
            return True
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 400
            return False

    read = {images.read_image: 0, label_maps.read_label: 0}
    for k in range(count):
        path.write_bytes(mutate(seeds[k % len(seeds)], rng))
        read[images.read_image] += is_read(images.read_image)
        path.write_bytes(mutate(seeds[-1], rng))
        read[label_maps.read_label] += is_read(label_maps.read_label, table)
    assert all(0.01 * count < number < 0.9 * count for number in read.values())   # both ends were reached


@pytest.mark.parametrize("count", [60, pytest.param(630, marks=pytest.mark.slow)])
def test_mutated_animations_are_read_or_refused(tmp_path, count):
    rng, seeds, path, read = np.random.default_rng(1), [], tmp_path / "animation", []
    first, *rest = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(4)]
    for kind in ("GIF", "WEBP", "PNG"):
        first.save(path, kind, save_all=True, append_images=rest)
        seeds.append(path.read_bytes())
    for k in range(count):
        path.write_bytes(mutate(seeds[k % 3], rng))
        try:
            video = open_video(path)
            read.append(len(list(video.read())) == len(video.names) == len(video.durations))
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert all(read) and count / 12 < len(read) < count * 5 / 6
