"""util/predict.py: one's own video, by a network of a finished run."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import content_of, run_predict, small, smoke

import data
import train
from data import InputError
from experiment import figures
from experiment import options
from experiment import predict
from experiment import runs
from util import files, charts


@pytest.fixture
def frames_folder(tmp_path, small):
    """The first test clip as PNG files."""
    dataset, folder = data.Synthetic(None, "test"), tmp_path / "frames"
    folder.mkdir()
    for frame in dataset.clips[0]:
        Image.fromarray(dataset.read(frame)[0]).save(folder / f"{frame.image.name}.png")
    return folder


@pytest.mark.parametrize("every", [0, 3])
def test_predict_writes_the_labels_that_evaluate_scores(smoke, frames_folder, tmp_path, every):
    out = tmp_path / "out"
    run_predict(smoke, frames_folder, out, "--network", "cell-0", "--key-frame-every", str(every))
    path = smoke / "recipe.json"
    run = runs.Run(smoke, options.as_recipe(files.load(path), path, train.Recipe), device="cpu")
    preds = [pred for _, pred, _ in train.segment_clips(run, run.load("cell-0"), "test", every)]
    written = sorted((out / "labels").iterdir())
    assert len(written) == len(data.Synthetic(None, "test").clips[0])
    for path, pred in zip(written, preds):
        picture = Image.open(path)
        assert picture.mode == "P" and (np.array(picture) == pred.numpy()).all()
        assert picture.getpalette()[:18] == data.Synthetic.palette.ravel().tolist()
    assert len(torch.cat(preds).unique()) > 1
    assert len(list((out / "overlay").iterdir())) == Image.open(out / "overlay.webp").n_frames == len(written)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_keeps_its_timing(smoke, frames_folder, tmp_path, kind):
    first, *rest = [Image.open(path) for path in sorted(frames_folder.iterdir())[:3]]
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=rest, duration=[40, 80, 200])
    run_predict(smoke, tmp_path / f"a.{kind}", tmp_path / "out", "--network", "static")
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 3
    durations = []
    with Image.open(tmp_path / "out" / "overlay.webp") as animation:
        for k in range(animation.n_frames):
            animation.seek(k)
            animation.load()
            durations.append(animation.info["duration"])
    assert durations == [40, 80, 200]


def test_one_image_is_taken_and_classes_and_a_legend_lie_beside_the_label_maps(
        smoke, frames_folder, tmp_path):
    out = tmp_path / "out"
    run_predict(smoke, next(frames_folder.iterdir()), out)
    assert len(list((out / "labels").iterdir())) == 1
    rows = json.loads((out / "classes.json").read_text())
    assert [row["name"] for row in rows] == data.Synthetic.classes and rows[1]["colour"] == [230, 159, 0]
    assert Image.open(out / "legend.png").width > 100


def test_a_long_video_has_a_short_animation(smoke, frames_folder, tmp_path, monkeypatch, capsys):
    """And the network is the best on val if none is named."""
    monkeypatch.setattr(predict, "ANIMATION", (2, 32))                    # frames and width at most
    run_predict(smoke, frames_folder, tmp_path / "out")
    animation, said = Image.open(tmp_path / "out" / "overlay.webp"), capsys.readouterr().out
    assert animation.n_frames == 2 and animation.width == 32 and "one frame in 2" in said
    best = files.load(smoke / "results.json")["best"]
    assert f"predict: 4 frames by {best}, key frame first only" in said


def spoil(folder, fault):
    path = sorted(folder.iterdir())[2]
    if fault == "size":
        Image.new("RGB", (48, 64)).save(path)
    elif fault == "broken":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "jpeg":
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
        path = path.with_suffix(".jpg")
        path.write_bytes(path.read_bytes()[:500])
    elif fault == "twice":
        Image.open(path).save(path.with_suffix(".jpg"))
    else:
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("fault, said", [
    ("size", "000_0002.png: 48 x 64, most others 64 x 48"), ("broken", "000_0002.png: is not an image"),
    ("jpeg", "000_0002.jpg: is not an image"), ("empty", "holds no .png or .jpg"),
    ("twice", "000_0002.png: would be written to the same file as 000_0002.jpg")])
def test_what_is_wrong_with_a_frame_is_said_before_the_work(smoke, frames_folder, tmp_path, fault, said):
    spoil(frames_folder, fault)
    with pytest.raises(InputError, match=said):
        run_predict(smoke, frames_folder, tmp_path / "out", "--network", "static")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("network, every", [("static", 0), ("cell-0", 0), ("cell-0", 2)])
def test_a_prediction_that_was_stopped_continues_to_the_same_pictures(
        smoke, frames_folder, tmp_path, monkeypatch, network, every):
    flags, written = ("--network", network, "--key-frame-every", str(every)), charts.save_indexed
    run_predict(smoke, frames_folder, tmp_path / "whole", *flags)

    def stop(path, *more):
        if path.stem.endswith("3"):
            raise KeyboardInterrupt
        written(path, *more)
    monkeypatch.setattr(figures, "save_indexed", stop)
    with pytest.raises(KeyboardInterrupt):
        run_predict(smoke, frames_folder, tmp_path / "out", *flags)
    monkeypatch.setattr(figures, "save_indexed", written)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 3
    run_predict(smoke, frames_folder, tmp_path / "out", *flags)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    with pytest.raises(InputError, match="out: holds a prediction of other frames or by another network"):
        run_predict(smoke, frames_folder, tmp_path / "out", "--network", "baseline")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_nothing_is_overwritten_or_made_for_what_is_not_there(smoke, frames_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for source, output, network, said in (
            ("frames", "out", "static", "holds files already"),
            ("nowhere", "new", "static", "nowhere: no such file"),
            ("frames", "new", "NOSUCH", "NOSUCH.pt: no such file; there are baseline, .*cell-0, .*static")):
        with pytest.raises(InputError, match=said):
            run_predict(smoke, tmp_path / source, tmp_path / output, "--network", network)
    assert content_of(tmp_path / "out").keys() == {"mine.txt"} and not (tmp_path / "new").exists()
