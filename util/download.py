"""Downloads a file, or a folder that is packed as a zip. The result is complete or absent, even if two
commands download it at once: each has temporary files of its own and renames them at the end.

A failure is an InputError of one line: the address, the problem, where a file put by hand goes, a remedy."""
import contextlib
import hashlib
import pathlib
import re
import socket
import sys
import tempfile
import zipfile
import zlib
from http.client import HTTPException

import torch

from util.errors import InputError, brief

STALL_SECONDS = 15                           # a download fails if nothing arrives for so long
# What servers, disks and zips raise. RuntimeError: the hash is another one (torch.hub).
FAULTS = OSError, ValueError, RuntimeError, EOFError, HTTPException, zipfile.BadZipFile, zlib.error


def download(url, path, remedy, sha256):
    """Downloads a file to path -> path. A file that exists is only verified.

    sha256: its first digits, in hexadecimal; remedy: the flag that avoids the download."""
    path = pathlib.Path(path)
    with explained(f"{url}: cannot be downloaded", path, remedy):
        if not path.exists():
            receive(url, path, sha256)
        elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256):
            raise ValueError(f"{path} is another file; remove it")
    return path


def download_zip(url, folder, inside, verify, remedy):
    """Downloads a zip and unpacks its files whose names match the pattern `inside` into a new folder. The
    pattern's group is the path there, so it must not match "..". If FOLDER.zip exists, it is used, and kept.

    verify(folder) raises ValueError if it holds something else, so the zip itself needs no hash."""
    archive = by_hand = folder.with_name(folder.name + ".zip")
    problem = f"{by_hand}: cannot be used as {url}" if by_hand.exists() else f"{url}: cannot be downloaded"
    with explained(problem, by_hand, remedy):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as own:
            if not by_hand.exists():
                archive = pathlib.Path(own, "zip")
                receive(url, archive)
            part = pathlib.Path(own, "part")
            unpack(archive, part, inside)
            verify(part)
            try:
                part.rename(folder)
            except OSError:
                if not folder.exists():      # else another command was faster
                    raise


@contextlib.contextmanager
def explained(problem, by_hand, remedy):
    """A context: turns what fails in it into an InputError."""
    try:
        yield
    except FAULTS as error:
        remedies = f"try again, or put the file at {by_hand}, or {remedy}"
        raise InputError(f"{problem} ({brief(error)}); {remedies}") from None


def receive(url, path, sha256=None):
    """Downloads a file with torch.hub, which renames it when it is complete and has the hash."""
    print(f"downloading {url}", flush=True)
    bar = sys.stderr is not None and sys.stderr.isatty()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()      # torch.hub sets none, and would wait forever
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256, progress=bar)
    finally:
        socket.setdefaulttimeout(before)


def unpack(archive, folder, inside):
    """Unpacks the files of a zip that are wanted, see download_zip."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if match := re.fullmatch(inside, member.filename):
                path = folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read(member))           # zipfile compares the checksum
