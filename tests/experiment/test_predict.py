"""experiment/predict.py: one's own video, by a network of a finished run. Inputs as people have them."""
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image, ImageSequence
from whole_run import as_script, content_of, run_predict, small, smoke

import data
import train
from data import InputError
from dyncell import Arch2, VideoSegmenter
from experiment import options
from experiment import predict
from experiment import runs
from util import files


def picture(k, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), np.uint8))


def folder_of(folder, *names, size=(64, 48), first=0):
    """Different pictures; first: the number of the first one."""
    folder.mkdir()
    for k, name in enumerate(names, first):
        picture(k, size).save(folder / name)
    return folder


def maps(out, folder="labels"):
    return [np.array(Image.open(path)) for path in sorted((out / folder).iterdir())]


@pytest.fixture
def frames_folder(tmp_path, small):
    """The first test clip as PNG files."""
    dataset, folder = data.Synthetic(None, "test"), folder_of(tmp_path / "frames")
    for frame in dataset.clips[0]:
        Image.fromarray(dataset.read(frame)[0]).save(folder / f"{frame.image.name}.png")
    return folder


# ---- what is written

@pytest.mark.parametrize("every", [0, 3])
def test_the_labels_are_those_that_evaluate_scores(smoke, frames_folder, tmp_path, every):
    flags = "--network", "cell-0", "--key-frame-every", str(every)
    out = run_predict(smoke, frames_folder, tmp_path / "out", *flags)
    sure = run_predict(smoke, frames_folder, tmp_path / "sure", *flags, "--save-confidence")
    run = runs.Run(smoke, options.folder_of(smoke, train.Recipe)["recipe"], device="cpu")
    network = run.load("cell-0")
    preds = [pred for _, pred, _ in train.segment_clips(run, "x", network, "test", every)][:4]
    assert len(torch.stack(preds).unique()) > 1 and (np.stack(maps(out)) == torch.stack(preds).numpy()).all()
    image = Image.open(out / "labels/000_0000.png")
    assert image.mode == "P" and image.getpalette()[:18] == data.Synthetic.palette.ravel().tolist()
    assert len(maps(out, "overlay")) == Image.open(out / "overlay.webp").n_frames == 4
    assert all((a == b).all() for a, b in zip(maps(out), maps(sure)))
    first, _ = network.probabilities(np.array(Image.open(sorted(frames_folder.iterdir())[0])))
    assert np.abs(maps(sure, "confidence")[0] - 255 * first.amax(dim=0).numpy()).max() < 0.51       # rounded
    rows = json.loads((out / "classes.json").read_text())
    assert [row["name"] for row in rows] == data.Synthetic.classes and rows[1]["colour"] == [230, 159, 0]
    assert Image.open(out / "legend.png").width > 100


def test_label_maps_of_cityscapes_are_official_ones_too(small, tmp_path, capsys):
    """And a size unlike the training's is said."""
    torch.manual_seed(0)
    torch.save({"static": Arch2(19).half().state_dict(), "classes": data.CityScapes.classes,
                "palette": data.CityScapes.palette.tolist(), "size": (48, 64)}, tmp_path / "arch2.pt")
    frames = folder_of(tmp_path / "frames", "1.png", size=(160, 120))
    out = run_predict(tmp_path, frames, tmp_path / "out", "--network", str(tmp_path / "arch2.pt"))
    assert "was trained on frames of 64 x 48" in capsys.readouterr().out
    assert (maps(out, "labelIds")[0] == np.array(data.CityScapes.EVALUATED)[maps(out)[0]]).all()


@pytest.mark.parametrize("kind, hidden", [("gif", False), ("webp", False), ("png", True)])
def test_an_animation_keeps_its_timing(smoke, frames_folder, tmp_path, kind, hidden):
    """hidden: an APNG has a picture for programs that don't know animations; it is no frame."""
    first, *rest = [Image.open(path) for path in sorted(frames_folder.iterdir())[:3]]
    more = {"default_image": True, "append_images": [first, *rest]} if hidden else {"append_images": rest}
    first.save(tmp_path / f"a.{kind}", save_all=True, duration=[40, 80, 200], **more)
    out = run_predict(smoke, tmp_path / f"a.{kind}", tmp_path / "out", "--network", "static")
    frames = ImageSequence.Iterator(Image.open(out / "overlay.webp"))
    durations = [frame.load() and frame.info["duration"] for frame in frames]     # known once it is loaded
    assert len(maps(out)) == 3 and durations == [40, 80, 200]


def test_a_long_video_has_a_short_animation(smoke, frames_folder, tmp_path, monkeypatch, capsys):
    """The network is the best on val if none is named, and a GPU works in float32."""
    precise, segment = [], VideoSegmenter.segment
    monkeypatch.setattr(VideoSegmenter, "segment", lambda *inputs: (
        precise.append(not torch.backends.cudnn.allow_tf32) or segment(*inputs)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(predict, "ANIMATION", (2, 32))                    # frames and width at most
    animation = Image.open(run_predict(smoke, frames_folder, tmp_path / "out") / "overlay.webp")
    said, best = capsys.readouterr().out, files.load(smoke / "results.json")["best"]
    assert animation.n_frames == 2 and animation.width == 32 and "one frame in 2" in said
    assert f"predict: {best} of {smoke}, 6 classes: ground, stripes" in said
    assert precise == [True] * 4 and torch.backends.cudnn.allow_tf32


# ---- key frames

@pytest.mark.parametrize("every", ["0", "2"])
def test_a_clip_and_what_follows_a_long_gap_begin_with_a_key_frame(smoke, small, tmp_path, capsys, every):
    """So they get the labels that they get alone, at any distance of key frames."""
    names = [f"a_{k}.png" for k in (8, 9, 10, 40, 41, 42)] + ["b_1.png", "b_2.png"]
    whole, flags = folder_of(tmp_path / "whole", *names), ("--network", "cell-0", "--key-frame-every", every)
    out = run_predict(smoke, whole, tmp_path / "out", *flags)
    assert "parts between long gaps: 3" in capsys.readouterr().out
    for part in (names[:3], names[3:6], names[6:]):
        frames = folder_of(tmp_path / part[0], *part, first=names.index(part[0]))
        alone = run_predict(smoke, frames, tmp_path / f"{part[0]}.out", *flags)
        for path in (alone / "labels").iterdir():
            assert path.read_bytes() == (out / "labels" / path.name).read_bytes()


# ---- inputs as people have them

def test_names_in_numeric_order_hidden_files_and_names_that_are_no_utf_8(smoke, small, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "f", "frame10.png", "frame9.png", "frame1.png", "frame2.JPG")
    (folder / ".frame0.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("mine")
    assert predict.open_video(folder).names == ["frame1", "frame2", "frame9", "frame10"]
    picture(0).save(os.path.join(os.fsencode(folder), b"stra\xdfe_1.png"))
    status = as_script(monkeypatch, "train.py", "--stage", "predict", "--run", smoke, "--input", folder,
                       "--output", tmp_path / "out")
    assert status == 0 and b"stra\xdfe_1.png" in os.listdir(os.fsencode(tmp_path / "out" / "labels"))


def test_a_phones_picture_is_one_image_and_upright(tmp_path):
    """It holds a preview, too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "a.jpg", "MPO", exif=exif, save_all=True, append_images=[picture(1, (16, 12))])
    video = predict.open_video(tmp_path / "a.jpg")
    assert video.names == ["a"] and video.size == (64, 48)
    assert [image.shape for image in video.read()] == [(64, 48, 3)]


@pytest.mark.parametrize("name, head, said", [
    ("a b.mp4", b"", r"a video; .*ffmpeg -i '.*a b.mp4' frames/%06d.png"), ("a", b"0000ftypisom", "a video"),
    ("a.jpg", b"0000ftypavif", "AVIF"), ("folder/a.HEIC", b"0000ftypheic", "a.HEIC: is a HEIC"),
    ("folder/a.mov", b"", "a.mov: is a video"), ("folder/a.txt", b"", "holds no .png")])
def test_what_is_no_video_of_frames_is_named_with_what_to_do(tmp_path, name, head, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes(100))
    with pytest.raises(InputError, match=said):
        predict.open_video(path.parent if "folder" in name else path)


def test_what_is_wrong_with_frames_is_said_at_once_before_the_work(smoke, frames_folder, tmp_path):
    first, second, third, fourth = sorted(frames_folder.iterdir())
    first.with_suffix(".heic").write_bytes(b"0000ftypheic")       # would be left out
    Image.open(second).save(second.with_suffix(".jpg"))           # would be written to the same file
    third.write_bytes(third.read_bytes()[:1000])
    Image.new("RGB", (48, 64)).save(fourth)
    with pytest.raises(InputError, match="4 problems") as told:
        run_predict(smoke, frames_folder, tmp_path / "out", "--network", "static")
    for said in ("a HEIC or AVIF photo", r"0001.(png|jpg): has the name of 000_0001.(jpg|png)",
                 "000_0002.png: cannot be read", "000_0003.png: 48 x 64, most others 64 x 48"):
        assert re.search(said, str(told.value))
    assert not (tmp_path / "out").exists()
    gif = [picture(k, (8 + k, 6 + k)).convert("P") for k in range(2)]     # the second beyond the screen
    parts = *GifImagePlugin.getheader(gif[0])[0], *map(b"".join, map(GifImagePlugin.getdata, gif)), b";"
    first.write_bytes(b"".join(parts))
    with pytest.raises(InputError, match=r"frame 1 cannot be read .*\(7, 9\), .* \(6, 8\)"):
        predict.open_video(first)


# ---- which network

@pytest.mark.parametrize("arguments, said", [("--output new", "--run, --network: .*--network camvid"),
    ("--output new --run SMOKE --network NOSUCH", "NOSUCH.pt: no such file; .* has baseline, .*static"),
    ("--output new --run SMOKE --network cell-0 --cell warp", "--cell: .*--network"),
    ("--output new --run SMOKE --static-epochs 77", "--static-epochs: does nothing"),
    ("--output full --run SMOKE", "full: holds files already")])
def test_a_network_is_named_and_nothing_is_overwritten(smoke, small, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    full = folder_of(tmp_path / "full", "mine.png")
    with pytest.raises(InputError, match=said):
        train.main(["--stage", "predict", "--input", "full", *arguments.replace("SMOKE", str(smoke)).split()])
    assert list(content_of(full)) == ["mine.png"] and not (tmp_path / "new").exists()


def test_a_checkpoint_alone_is_enough_and_is_read_anew(smoke, frames_folder, tmp_path, monkeypatch):
    """As networks/camvid.pt, which comes with the project."""
    monkeypatch.setattr(predict, "SHIPPED", tmp_path)
    for name, network in (("cell-0", "camvid"), ("static", str(tmp_path / "camvid.pt"))):     # the same path
        (tmp_path / "camvid.pt").write_bytes((smoke / f"{name}.pt").read_bytes())
        same = run_predict(smoke, frames_folder, tmp_path / name, "--network", name)
        alone = run_predict(tmp_path / "no", frames_folder, tmp_path / f"{name}.o", "--network", network)
        assert content_of(alone) == content_of(same)
