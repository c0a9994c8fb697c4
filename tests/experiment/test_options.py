"""util/options.py: the command line, and what is said before any work when what was typed can't work."""
import dataclasses
import json
import pathlib
import shutil

import pytest
from whole_run import arguments_of, as_script, copy_of, small, smoke

import data
import train
from data import InputError
from train import Recipe, recipe_for
from util import download
from experiment import options


def parse(*words):
    return options.parse(words, Recipe, recipe_for, train.STAGES, "")


# ---- a flag a field

@pytest.mark.parametrize("words, dataset, schedule", [
    ("", "synthetic", "short"), ("--dataset camvid", "camvid", "paper"),
    ("--dataset cityscapes", "cityscapes", "paper"),
    ("--dataset camvid --schedule smoke", "camvid", "smoke")])
def test_each_dataset_has_its_schedule_and_folder(words, dataset, schedule):
    command = parse(*words.split())
    assert command.recipe == recipe_for(dataset, schedule)
    assert command.run == pathlib.Path(f"runs/{dataset}")
    assert command.stages == list(train.STAGES) == "pretrain search finetune evaluate".split()


def test_every_field_is_a_flag_whose_help_names_a_section_or_says_ours(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Recipe):
        assert options.flag(field.name) in said
        sources = [word for word in ("Sect.", "[ours]", "[18]") if word in field.metadata["help"]]
        assert sources or field.name in ("dataset", "seed"), field.name


def test_flags_take_values_of_their_fields_kind():
    line = ("--static-crop 48 64 --static-scale 0.5 1 --cell attention decoder --key-frames 0 3 5 "
            "--cell-lr 1e-3 --no-early-stop --cell-mirrored --seeds 3")
    assert parse(*line.split()).recipe == recipe_for(
        "synthetic", "short", static_crop=(48, 64), static_scale=(0.5, 1.0), cell=("attention", "decoder"),
        key_frames=(0, 3, 5), cell_lr=1e-3, early_stop=False, cell_mirrored=True, seeds=3)


def test_one_stage_takes_what_the_folder_says(tmp_path):
    """All stages take the schedule's; --schedule and flags come before the folder."""
    made = recipe_for("camvid", "short", seeds=3, key_frames=(7,))
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(made)))
    run = "--run", str(tmp_path)
    assert parse(*run, "--stage", "evaluate").recipe == made
    assert parse(*run, "--stage", "evaluate", "--seeds", "4").recipe == dataclasses.replace(made, seeds=4)
    smoke = recipe_for("synthetic", "smoke")
    assert parse(*run, "--stage", "evaluate", "--schedule", "smoke").recipe == smoke
    assert parse(*run).recipe == recipe_for("synthetic", "short")


def test_a_recipe_of_another_version_is_named(tmp_path):
    saved = dataclasses.asdict(Recipe())
    saved["wings"] = saved.pop("momentum")
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"recipe.json: made by another version \(momentum, wings\); use"):
        parse("--run", str(tmp_path), "--stage", "search")


# ---- what can't work; of the data: tests/test_data.py

@pytest.mark.parametrize("line, said", [
    ("--dataset kitti", "invalid choice: 'kitti'"),
    ("--seeed 3", "unrecognized arguments: --seeed 3"),
    ("--see 3", "unrecognized arguments: --see 3"),
    ("--static-epochs many", "argument --static-epochs: invalid int value: 'many'"),
    ("--cell warp9", "invalid choice: 'warp9'"),
    ("--static-epochs 0", "--static-epochs 0: must be more than 0"),
    ("--end-epochs -1", "--end-epochs -1: must be 0 or more"),
    ("--cell-lr nan", "--cell-lr nan: must be more than 0"),
    ("--key-frames 0 -3", "--key-frames -3: must be 0 or more"),
    ("--meta-val-share 1.5", "--meta-val-share 1.5: must be below 1"),
    ("--controller-clip 1.5", "--controller-clip 1.5: must be below 1"),
    ("--static-batch 1", "--static-batch 1: must be 2 or more"),
    ("--static-scale 2 0.5", "--static-scale (2.0, 0.5): the first number must not be"),
    ("--sequence-length 1", "--sequence-length 1: must be 2 or more, as a cell"),
    ("--sequence-length 9", "--sequence-length 9: no clip of synthetic has so many"),
    ("--cells 0 --cell", "--cells 0: there is no cell to train"),
    ("--key-frames", "--key-frames: must have one value or more"),
    ("--dataset camvid", "put the file at data/camvid.zip, or pass --data DIR"),
    ("--dataset camvid --data nowhere", "http://127.0.0.1:9/camvid.zip: cannot be downloaded"),
    ("--dataset cityscapes --data nowhere", "nowhere: no such folder"),
    ("--stage search", "static.pt: is not there or not finished, and --stage search needs it"),
    ("--stage finetune", "static.pt: is not there or not finished, and --stage finetune needs it"),
    ("--stage evaluate", "baseline.pt: is not there or not finished, and --stage evaluate needs it"),
    ("--stage predict", "--input and --output: needed for --stage predict"),
    ("--stage predict --input x --output y --key-frame-every -1", "--key-frame-every -1: must be 0 or more"),
    ("--input x", "--input: does nothing without --stage predict"),
    ("--stage pretrain --output x", "--output: does nothing without --stage predict"),
    ("--key-frame-every 3", "--key-frame-every: does nothing without --stage predict"),
    ("--network static", "--network: does nothing without --stage predict"),
    ("--data x", "--data: does nothing with the synthetic videos"),
    ("--stage predict --input x --output y --data z", "--data: does nothing with --stage predict"),
    ("--latency-target 3", "--latency-target: does nothing without --latency-weight"),
    ("--static nowhere.pt", "nowhere.pt: no such file; --static takes"),
    ("--cell nowhere.json", "'nowhere.json' (No such file or directory)"),
    ("--cell nowhere.pt", "--cell"), ("--cell {}", "--cell"),
    ("--cell sum(skip(dec),skip(dec))", "--cell"),
    ("--cell [1,2]", "a genotype has five tokens per layer, got 2 tokens"),
    ("--encoder-weights nowhere.pth", "nowhere.pth: no such file"),
    ("--device warp9", "--device warp9"),
])
def test_what_cannot_work_is_told_in_one_line_and_nothing_is_made(tmp_path, small, monkeypatch, line, said):
    monkeypatch.setattr(download, "CAMVID_URL", "http://127.0.0.1:9/camvid.zip")      # no network
    with pytest.raises(InputError) as error:
        train.main([*line.split(), "--run", str(tmp_path / "run")])
    assert said in str(error.value) and "\n" not in str(error.value)
    made = {path.name for path in (tmp_path / "run").glob("*")}
    assert made <= {"recipe.json", "lock"}


def test_the_exit_status_is_2_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert as_script(monkeypatch, "train.py", "--static-batch", "-1") == 2 and not any(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: --static-batch -1: must be more than 0\n"


def test_a_recipe_with_which_nothing_was_made_is_replaced(tmp_path, small, monkeypatch):
    run = "--run", str(tmp_path)
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        train.main([*run, "--encoder-weights", "nowhere.pth"])
    other = parse(*run, "--schedule", "smoke")
    with options.open_run(other):
        assert json.loads((tmp_path / "recipe.json").read_text())["encoder_weights"] == "none"


def test_too_few_sequences_are_told_before_the_training(tmp_path, small, monkeypatch):
    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (1, 3), "val": (1, 4), "test": (1, 4)})
    with pytest.raises(InputError, match="has 1 sequences of 3 frames; each process needs two"):
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_stage_needs_the_ones_before_it_to_be_finished(smoke, small, tmp_path):
    folder = copy_of(smoke, tmp_path, "recipe.json", "baseline.pt")
    with pytest.raises(InputError, match="static.pt: is not there or not finished"):
        train.main([*arguments_of(folder), "--stage", "finetune"])
    (folder / "baseline.pt").unlink()
    shutil.copy(smoke / "static.pt", folder)
    with pytest.raises(InputError, match="baseline.pt: is not there or not finished"):
        train.main([*arguments_of(folder), "--stage", "evaluate"])
    with pytest.raises(InputError, match="search.jsonl: every candidate failed"):
        train.main([*arguments_of(folder), "--stage", "finetune"])
