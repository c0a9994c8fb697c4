"""util/predict.py: one's own video, by a network of a finished run."""
import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import small, smoke

import data
import train
from data import InputError
from util import figures, options, predict, runs


@pytest.fixture
def frames_folder(tmp_path, small):
    """The first test clip as PNG files."""
    dataset, folder = data.Synthetic(None, "test"), tmp_path / "frames"
    folder.mkdir()
    for frame in dataset.clips[0]:
        Image.fromarray(dataset.read(frame)[0]).save(folder / f"{frame.image.name}.png")
    return folder


def run_predict(smoke, source, output, *more):
    train.main(["--stage", "predict", "--run", str(smoke), "--input", str(source), "--output", str(output),
                *more])


@pytest.mark.parametrize("every", [0, 3])
def test_predict_writes_the_labels_that_evaluate_scores(smoke, frames_folder, tmp_path, every):
    out = tmp_path / "out"
    run_predict(smoke, frames_folder, out, "--network", "cell-0", "--key-frame-every", str(every))
    path = smoke / "recipe.json"
    run = runs.Run(smoke, options.as_recipe(runs.load(path), path, train.Recipe), device="cpu")
    preds = [pred for _, pred, _ in train.segment_clips(run, run.load("cell-0"), "test", every)]
    written = sorted((out / "labels").iterdir())
    assert len(written) == len(data.Synthetic(None, "test").clips[0])
    for path, pred in zip(written, preds):
        picture = Image.open(path)
        assert picture.mode == "P" and (np.array(picture) == pred.numpy()).all()
        assert picture.getpalette()[:18] == data.Synthetic.palette.ravel().tolist()
    assert len(torch.cat(preds).unique()) > 1
    assert len(list((out / "overlay").iterdir())) == Image.open(out / "overlay.webp").n_frames == len(written)


def test_the_network_is_the_best_on_val_if_none_is_named(smoke, frames_folder, tmp_path, capsys):
    run_predict(smoke, frames_folder, tmp_path / "out")
    best = runs.load(smoke / "results.json")["best"]
    assert f"predict: 4 frames by {best}, key frame first only" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "one"])
def test_animations_and_one_image_are_taken(smoke, frames_folder, tmp_path, kind):
    first, *rest = [Image.open(path) for path in sorted(frames_folder.iterdir())]
    source = tmp_path / ("one.png" if kind == "one" else f"animation.{kind}")
    more = {} if kind == "one" else {"save_all": True, "append_images": rest}
    first.save(source, **more)
    run_predict(smoke, source, tmp_path / "out", "--network", "static")
    assert len(list((tmp_path / "out" / "labels").iterdir())) == (1 if kind == "one" else 1 + len(rest))


def test_a_long_video_has_a_short_animation(smoke, frames_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "ANIMATION", (2, 32))                    # frames and width at most
    run_predict(smoke, frames_folder, tmp_path / "out", "--network", "static")
    animation = Image.open(tmp_path / "out" / "overlay.webp")
    assert animation.n_frames == 2 and animation.width == 32 and "one frame in 2" in capsys.readouterr().out


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


class Stop(Exception):
    """Ctrl-C, to the work."""


@pytest.mark.parametrize("network", ["static", "cell-0"])
@pytest.mark.parametrize("every", [0, 2])
def test_a_prediction_that_was_stopped_continues_to_the_same_pictures(
        smoke, frames_folder, tmp_path, monkeypatch, network, every):
    flags, written = ("--network", network, "--key-frame-every", str(every)), figures.save_indexed
    run_predict(smoke, frames_folder, tmp_path / "whole", *flags)

    def stop(path, *more):
        if path.stem.endswith("3"):
            raise Stop
        written(path, *more)
    monkeypatch.setattr(figures, "save_indexed", stop)
    with pytest.raises(Stop):
        run_predict(smoke, frames_folder, tmp_path / "out", *flags)
    monkeypatch.setattr(figures, "save_indexed", written)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 3
    run_predict(smoke, frames_folder, tmp_path / "out", *flags)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(InputError, match="out: holds a prediction of other frames or by another network"):
        run_predict(smoke, frames_folder, tmp_path / "out", "--network", "baseline")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_overwritten(smoke, frames_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files already"):
        run_predict(smoke, frames_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("source, network, said", [("nowhere", "static", "nowhere: no such file"),
                                                   ("frames", "cell-7", "cell-7.pt: no such file")])
def test_what_is_not_there_is_told_and_nothing_is_made(smoke, frames_folder, tmp_path, source, network, said):
    with pytest.raises(InputError, match=said):
        run_predict(smoke, tmp_path / source, tmp_path / "new", "--network", network)
    assert not (tmp_path / "new").exists()
