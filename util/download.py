"""Downloads a file, or a folder that is packed as a zip, by torch.hub. The result is complete or absent, even
if two commands download it at once: each has temporary files of its own and renames them at the end."""
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
    """Downloads a file to path, unless it exists. sha256: its first digits, in hexadecimal; remedy: the flag
    that avoids the download. Raises InputError."""
    if not path.exists():
        with downloading(url, path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            receive(url, path, sha256)       # torch.hub renames it when it is complete and has the hash


def download_zip(url, folder, inside, verify, remedy):
    """Downloads a zip and unpacks it. The folder in it that matches the pattern `inside` becomes `folder`.

    verify(path) raises ValueError if that holds something else, so the zip itself needs no hash. Raises
    InputError."""
    near = next(parent for parent in folder.absolute().parents if parent.exists())    # no disk but folder's
    with downloading(url, folder, remedy), tempfile.TemporaryDirectory(".part", folder.name, near) as own:
        receive(url, pathlib.Path(own, "zip"))
        shutil.unpack_archive(pathlib.Path(own, "zip"), own, "zip")       # compares the checksums
        found, = pathlib.Path(own).glob(inside)
        verify(found)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            found.rename(folder)
        except OSError:
            if not folder.exists():          # else another command was faster
                raise


@contextlib.contextmanager
def downloading(url, path, remedy):
    """A context: what fails in it becomes an InputError of one line."""
    print(f"downloading {url}", flush=True)
    before = socket.getdefaulttimeout()      # torch.hub sets none, and would wait forever
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    except Exception as error:               # servers, disks and zips raise many kinds
        raise InputError(f"{url}: cannot be downloaded ({brief(error)}); try again, or put it at {path} "
                         f"by hand, or {remedy}") from None
    finally:
        socket.setdefaulttimeout(before)


def receive(url, path, sha256=None):
    """torch.hub's download, with its bar on a terminal."""
    torch.hub.download_url_to_file(url, str(path), sha256, progress=getattr(sys.stderr, "isatty", bool)())
