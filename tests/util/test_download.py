"""util/download.py and CamVid from the web, against a server of our own."""
import concurrent.futures
import hashlib
import http.server
import io
import os
import pathlib
import threading
import time
import zipfile

import pytest
import torch
from whole_run import FORKED, content_of

import data
import train
from experiment import weights
from util import download
from util.errors import InputError


def zipped(files):
    """{name: content} -> the bytes of a zip, not compressed."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)              # without a time
    return file.getvalue()


BODY = zipped({"top/inner/b.txt": b"good" * 1000, "README": b""})
DIGITS = hashlib.sha256(BODY).hexdigest()[:8]
LABELS = "2ca5830fa5c25a5d3845f881ecb67dcef0809986d1b4abdf01623503bcd7140f"       # of conftest's small CamVid


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's `body`, once all requests that it waits for are there."""

    def do_GET(self):
        self.server.requests += 1
        self.server.together.wait(60)
        mode, body = self.server.mode, self.server.body
        self.send_response(404 if mode == "404" else 200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body[:-9] if mode == "stalls" else body)
        time.sleep(mode == "stalls")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.body, server.requests, server.together = "good", BODY, 0, threading.Barrier(1)
        server.url = f"http://127.0.0.1:{server.server_port}/net-{DIGITS}.pth"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def get(url, path):
    download.download(url, path, "pass --data DIR", DIGITS)


def get_zip(url, folder):
    download.download_zip(url, folder, "*/inner", lambda part: None, "pass --data DIR")


@pytest.mark.parametrize("load, mode, said", [
    (get, "stalls", "timed out"), (get, "evil", "hash"), (get_zip, "evil", "CRC"), (get_zip, "404", "404")])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, load, mode, said):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    server.mode, server.body = mode, BODY.replace(b"good", b"evil") if mode == "evil" else BODY
    path = tmp_path / ("file" if load is get else "new/folder")
    with pytest.raises(InputError, match=f"^{server.url}: .*{said}.*; .*{path} by hand, or pass --data DIR$"):
        load(server.url, path)
    assert not [*tmp_path.iterdir()]


def test_two_commands_that_download_at_once_both_succeed(server, tmp_path):
    """Both requests are there before either is answered; the slower command finds the other's result."""
    with concurrent.futures.ProcessPoolExecutor(2, FORKED) as pool:
        for load, name in ((get_zip, "folder"), (get, "file")):
            server.together, path = threading.Barrier(2), tmp_path / "new" / name
            assert [*pool.map(load, [server.url] * 2, [path] * 2)] == [None] * 2      # or what one raised
    get(server.url, tmp_path / "new/file")                                # asks for nothing
    assert server.requests == 4 and (tmp_path / "new/folder/b.txt").read_bytes() == b"good" * 1000
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"folder", "file"}


def test_what_is_not_downloaded(tmp_path):
    """A folder that exists, another dataset with CamVid's layout."""
    data.fetch(data.CamVid, tmp_path, given=False)
    with pytest.raises(InputError, match="nowhere: no such folder; .*--data"):
        data.fetch(type("Mine", (data.CamVid,), {}), tmp_path / "nowhere", given=False)


@pytest.mark.camvid
def test_the_constants_are_the_public_camvids():
    data.verify_camvid(pathlib.Path(os.environ["CAMVID"]))


def test_camvid_from_the_web(camvid, server, monkeypatch):
    """The encoder's weights come first; without them nothing else is loaded. Another CamVid is refused."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(camvid / "hub"))
    monkeypatch.setattr(weights, "IMAGENET", server.url)
    monkeypatch.setattr(data, "CAMVID_URL", server.url)
    monkeypatch.setattr(data, "CAMVID_SHAPES", dict.fromkeys(("train", "val", "test"), (6, 6, 8)))
    files = {f"SegNet/CamVid/{name}": content for name, content in content_of(camvid).items()}
    (camvid / "work").mkdir()
    monkeypatch.chdir(camvid / "work")
    by_hand = camvid / f"hub/checkpoints/net-{DIGITS}.pth"
    with pytest.raises(InputError, match=f"{by_hand}: is damaged.*--encoder-weights"):
        train.main(["--dataset", "camvid"])
    assert server.requests == 1 and by_hand.read_bytes() == BODY
    server.body = zipped(files)
    with pytest.raises(InputError, match="not the public CamVid"):        # its labels have another hash
        data.fetch(data.CamVid, "data/camvid", given=False)
    assert not [*pathlib.Path().iterdir()]
    monkeypatch.setattr(data, "CAMVID_LABELS", LABELS)
    data.fetch(data.CamVid, "data/camvid", given=False)
    assert {f"SegNet/CamVid/{name}" for name in content_of(pathlib.Path("data/camvid"))} == {*files}
    assert os.listdir("data") == ["camvid"]
