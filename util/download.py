"""Downloads a file, or a folder that is packed as a zip, by torch.hub. The result is complete or absent."""
import contextlib
import pathlib
import shutil
import socket
import sys
import tempfile

import torch

from util.errors import InputError, brief

STALL_SECONDS = 15                           # a download fails if nothing arrives for so long


def download(url, path, remedy, sha256):
    """Downloads a file to path, unless it exists. sha256: the first digits; remedy: a flag that avoids it."""
    if not path.exists():
        with downloading(url, path, remedy) as receive:
            path.parent.mkdir(parents=True, exist_ok=True)
            receive(str(path), sha256)       # torch.hub renames it when it is complete and has the hash


def download_zip(url, folder, inside, verify, remedy):
    """Downloads a zip and unpacks it. The folder in it that matches the pattern `inside` becomes `folder`.
    verify(path) raises ValueError if that holds something else, so the zip itself needs no hash."""
    near = next(parent for parent in folder.absolute().parents if parent.exists())    # no disk but folder's
    with downloading(url, folder, remedy) as receive, tempfile.TemporaryDirectory(".part", dir=near) as own:
        receive(f"{own}/zip")
        shutil.unpack_archive(f"{own}/zip", own, "zip")         # compares the checksums
        found, = pathlib.Path(own).glob(inside)
        verify(found)
        folder.parent.mkdir(parents=True, exist_ok=True)
        found.rename(folder)                 # fails if another command made it meanwhile


@contextlib.contextmanager
def downloading(url, path, remedy):
    """A context: yields torch.hub's download to a path. What fails becomes an InputError of one line."""
    print(f"downloading {url}", flush=True)
    before = socket.getdefaulttimeout()      # torch.hub sets none, and would wait forever
    socket.setdefaulttimeout(STALL_SECONDS)
    terminal = getattr(sys.stderr, "isatty", bool)()
    try:
        yield lambda *where: torch.hub.download_url_to_file(url, *where, progress=terminal)
    except Exception as error:               # servers, disks and zips raise many kinds
        if not path.exists():                # else another command was faster
            raise InputError(f"{url}: cannot be downloaded ({brief(error)}); try again, or put it at {path} "
                             f"by hand, or {remedy}") from None
    finally:
        socket.setdefaulttimeout(before)
