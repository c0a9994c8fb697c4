"""Downloads, verifies and unpacks what a run needs from the web: CamVid and the encoder's ImageNet weights.

Whatever the server sends or the archive holds, the result is complete and correct, or there is none. In
that case an InputError says in one line what is wrong and what to do instead."""
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

from util.errors import InputError, brief
from util.progress import Progress

STALL_SECONDS = 30                           # a download fails if nothing arrives for so long
MAX_BYTES = 2 ** 31                          # the most that is downloaded, or unpacked from an archive


# ---------------------------------------------------------------------------------------------------------
# A file from the web

def download(url, path, remedy, sha256="", size=None):
    """Downloads a file to path and verifies it -> path. A file that exists is only verified.

    sha256 may be just the first digits. The file is received as path.part. The next call resumes that part
    if the server supports it; a part that turns out wrong is removed. Raises InputError with the address,
    the problem, where to put the file by hand, and the remedy (a flag)."""
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
    """Raises ValueError unless the file has this size (if given) and its SHA-256 begins with `sha256`."""
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(2 ** 20):
            digest.update(block)
    found = digest.hexdigest()
    if not found.startswith(sha256) or size not in (None, path.stat().st_size):
        raise ValueError(f"{wrong}, its SHA-256 begins with {found[:8]}{remedy}")


def receive(url, part, size):
    """Downloads an address into the file `part`; continues at the file's end if the server supports it.

    Raises ValueError, or what urllib raises, if the server stalls, ends early or sends something else."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:      # nothing follows: the part is complete, or wrong
            part.unlink()
            return receive(url, part, size)
        raise
    with response:
        rest = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if start and response.status == 206 and not rest:                 # not the range that was requested
            part.unlink()
            return receive(url, part, size)
        if start and response.status == 206:
            total = int(rest[1])
        else:                                # it sends the whole file, maybe without its size
            start = 0
            total = int(response.headers.get("Content-Length") or size or 0)
        if total > MAX_BYTES or size not in (None, total):
            allowed = f"not {size:,}" if size else "too many"
            raise ValueError(f"the server announces {total:,} bytes, {allowed}")
        part.parent.mkdir(parents=True, exist_ok=True)
        progress = Progress(f"downloading {url}", total // 1000, done=start // 1000, unit=" kB")
        received = write_blocks(response, part, start, total, progress)
        if received < total:
            raise ValueError(f"it ended after {received:,} of {total:,} bytes")


def write_blocks(response, part, received, total, progress):
    """Appends the response to a file that has `received` bytes -> its new size. Raises ValueError if there
    are too many."""
    limit = total or MAX_BYTES
    with open(part, "ab" if received else "wb") as file:
        while block := response.read1(2 ** 16):
            received += len(block)
            if received > limit:
                part.unlink()
                raise ValueError(f"the server sends more than {limit:,} bytes")
            file.write(block)
            progress.update(received // 1000)
    return received


# ---------------------------------------------------------------------------------------------------------
# An archive

def extract(archive, target, inside, verify=lambda folder: None):
    """Unpacks the files of a zip or tar whose names match the pattern `inside`. The pattern's group is the
    path in target.

    Everything is unpacked to a temporary folder, checked by verify(folder), and renamed, so target is
    complete or absent. Raises InputError naming the archive, and a member that lies outside the folder, is
    a link or a device, or is too large."""
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)                             # left by a killed process
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
    """Yields (name, size, kind, function that opens it) for each member of a zip or tar. kind is
    stat.S_IFREG for a file, stat.S_IFDIR for a folder, or another of stat's kinds."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)
                if not kind:                 # made on a system without Unix modes
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
