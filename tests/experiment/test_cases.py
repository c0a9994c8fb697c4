"""What people do with it: a test of each kind of use that once failed. docs/cases.md has what each prints."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import arguments_of, content_of, run_predict, small, smoke

import data
import train
from data import InputError
from dyncell import CELLS, Arch2
from experiment import networks
from experiment import memory
from experiment import predict
from experiment import runs
from util.progress import Progress
from util import files


def picture(k, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), np.uint8))


def folder_of(folder, *names, size=(64, 48)):
    folder.mkdir()
    for k, name in enumerate(names):
        picture(k, size).save(folder / name)
    return folder


# ---- 1. memory

def test_too_little_memory_is_told_with_the_flags_that_help(small, tmp_path, monkeypatch):
    """Whatever counts as too little memory: tests/util/test_runs.py."""
    def forward(*_):
        raise MemoryError
    monkeypatch.setattr(Arch2, "forward_auxiliary", forward)
    with pytest.raises(InputError, match="^pretrain: out of memory on cpu .*--static-batch .*--schedule "
                                         "short") as told:
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert "\n" not in str(told.value) and Progress.stage == ""


def test_what_the_machine_lacks_is_said_and_stops_nothing(small, tmp_path, monkeypatch, capsys):
    """Little memory, no fcntl to lock with, and ranks in the environment that are not torchrun's."""
    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(memory, "there", lambda device: 1e6)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    train.main(["--schedule", "smoke", "--run", str(tmp_path / "run"), "--stage", "pretrain"])
    assert (tmp_path / "run" / "static.pt").exists()
    said = capsys.readouterr().out
    assert "can't be locked here" in said
    said = [line for line in said.splitlines() if "will need about" in line]
    assert len(said) == 1 and said[0].startswith("pretrain: ") and "--static-batch" in said[0]


# ---- 2. predict, input

def test_frames_are_in_numeric_order_and_hidden_files_are_passed_over(tmp_path):
    folder = folder_of(tmp_path / "f", "frame10.png", "frame9.png", "frame1.png", "Frame2.JPG", ".frame3.png")
    (folder / ".frame0.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("mine")
    assert predict.open_video(folder).names == ["Frame2", "frame1", "frame9", "frame10"]


@pytest.mark.parametrize("name, head", [("a.mp4", b""), ("a", b"\0\0\0\x20ftypisom"),
                                        ("a.bin", b"\x1aE\xdf\xa3"), ("a.x", b"RIFF1234AVI "),
                                        ("folder/a.mov", b"")])
def test_a_video_gets_the_line_that_makes_frames_of_it(tmp_path, name, head):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes(100))
    with pytest.raises(InputError, match=r"is a video; .*ffmpeg -i .* frames/%06d.png"):
        predict.open_video(path.parent if "/" in name else path)


def test_a_phones_picture_is_one_image_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[picture(1, (16, 12))],
                    exif=exif)
    video = predict.open_video(tmp_path / "phone.jpg")
    assert video.names == ["phone"] and video.size == (48, 64)
    assert [image.shape for image in video.read()] == [(64, 48, 3)]
    for kind in ("png", "webp"):
        picture(0).save(tmp_path / f"one.{kind}", exif=exif)
        assert predict.open_video(tmp_path / f"one.{kind}").size == (48, 64)


# ---- 3. predict, output

def test_a_checkpoint_alone_is_enough(smoke, small, tmp_path):
    frames = folder_of(tmp_path / "f", "1.png", "2.png")
    (tmp_path / "mail").mkdir()
    path = tmp_path / "mail" / "the best.pt"
    path.write_bytes((smoke / "cell-0.pt").read_bytes())
    out = run_predict(tmp_path / "nowhere", frames, tmp_path / "out", "--network", str(path))
    same = run_predict(smoke, frames, tmp_path / "same", "--network", "cell-0")
    assert content_of(out / "labels") == content_of(same / "labels")
    with pytest.raises(InputError, match="--static-epochs 77: does nothing with --stage predict"):
        run_predict(smoke, frames, tmp_path / "new", "--static-epochs", "77")


def test_a_network_of_another_program_run_with_some_fields_is_taken(small, tmp_path):
    """As ../shared/weights/arch2_camvid_600_epochs_h200.pt: it has no input_pad, no classes."""
    recipe = {"dataset": "camvid", "static_crop": (480, 600)}
    torch.save({"static": Arch2(11).state_dict(), "history": [], "recipe": recipe}, tmp_path / "arch2.pt")
    out = run_predict(tmp_path / "nowhere", folder_of(tmp_path / "f", "1.png"), tmp_path / "out",
                      "--network", str(tmp_path / "arch2.pt"))
    assert json.loads((out / "classes.json").read_text())[10]["name"] == "bicyclist"


def test_label_maps_of_cityscapes_are_official_ones_too(small, tmp_path):
    torch.manual_seed(0)
    torch.save({"static": Arch2(19).state_dict(), "recipe": {"dataset": "cityscapes"}}, tmp_path / "arch2.pt")
    out = run_predict(tmp_path / "nowhere", folder_of(tmp_path / "f", "1.png"), tmp_path / "out",
                      "--network", str(tmp_path / "arch2.pt"))
    official, ours = (np.array(Image.open(out / folder / "1.png")) for folder in ("labelIds", "labels"))
    assert (official == np.array(data.CityScapes.EVALUATED)[ours]).all()


def test_frames_of_quite_another_size_are_said_once(smoke, small, tmp_path, capsys):
    for size, times in (((64, 48), 0), ((60, 80), 0), ((256, 192), 1)):
        frames = folder_of(tmp_path / str(size), "1.png", "2.png", size=size)
        run_predict(smoke, frames, tmp_path / f"out{size}")
        assert capsys.readouterr().out.count("was trained on frames of 64 x 48") == times


# ---- 4. one's own cell

def test_a_cell_is_a_name_a_file_a_checkpoint_or_a_text(smoke, tmp_path):
    own = files.load(smoke / "cell-0.pt")["genotype"]
    (tmp_path / "own.json").write_text(own)
    name, genotype = networks.cell_of(own)
    assert name.startswith("custom-") and len(name) == len("custom-") + 6
    for text in (str(tmp_path / "own.json"), str(smoke / "cell-0.pt"), str(genotype),
                 *networks.cell_texts([own]),
                 json.dumps({"tokens": genotype.to_tokens()}),
                 json.dumps({"genotype": json.loads(own), "reward": 0.5})):
        assert networks.cell_of(text) == (name, genotype)
    assert networks.cell_of("decoder") == ("decoder", "decoder")
    for text in ("warp", CELLS["warp"].to_json(), str(CELLS["warp"])):
        assert networks.cell_of(text) == ("warp", CELLS["warp"]) and networks.cell_texts([text]) == ("warp",)


# ---- 5. one's own data: the checks are in tests/test_data.py

def test_sparse_labels_and_splits_of_different_sizes_train(small, tmp_path, monkeypatch):
    class Mine(data.Synthetic):
        def __init__(self, root, split):
            super().__init__(root, split)
            self.SIZE = {"train": (48, 64), "val": (32, 64), "test": (64, 96)}[split]
            for clip in self.clips:
                clip[::2] = [frame._replace(label=None) for frame in clip[::2]]

        def read(self, frame):
            image, label = super().read(frame)
            return image, label if frame.label else np.full_like(label, data.IGNORE)

    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (2, 6), "val": (1, 6), "test": (1, 6)})
    monkeypatch.setitem(data.DATASETS, "mine", Mine)
    (tmp_path / "root").mkdir()
    flags = ("--dataset mine --schedule smoke --encoder-weights none --static-lr-encoder 0.001 "
             "--static-batch 4 --search-batch 2 --cell-batch 2 --cells 0 --cell concat")
    train.main([*flags.split(), "--data", str(tmp_path / "root"), "--run", str(tmp_path / "run")])
    text = (tmp_path / "run" / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)                # no NaN
    assert results["rows"][0]["test"]["consistency"] is None
    assert files.load(tmp_path / "run" / "static.pt")["size"] == (48, 64)


# ---- 7. the machine: with too little memory, above

def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        data.run_main(lambda: train.main(["--schedule", "smoke", "--run", str(tmp_path / "file" / "run")]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert str(tmp_path / "file") in said and "make room" not in said


# ---- 8. what it says while it works

def test_it_says_the_stage_and_at_the_end_what_to_do_next(smoke, small, capsys):
    said = (smoke.parent / "run.out").read_text()
    assert "evaluate: stage 4 of 4" in said and "[4/4] frames of test 8/8" in said
    assert "These numbers mean nothing" in said and f"--stage predict --run {smoke} --input" in said
    train.main([*arguments_of(smoke), "--stage", "search"])
    assert "next: the same command with --stage finetune" in capsys.readouterr().out
