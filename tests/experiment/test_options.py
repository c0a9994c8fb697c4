"""experiment/options.py: the command line, what the folder knows, and what is refused before any work."""
import dataclasses
import json
import pathlib
import shutil
import types

import pytest
from whole_run import arguments_of, as_script, copy_of, small, smoke

import data
import train
from data import InputError
from experiment import options, runs, schedules
from train import Recipe, recipe_for
from util import files


def parse(*words):
    return options.parse(words, Recipe, recipe_for, train.STAGES, "")


def remember(folder, recipe, schedule="short", data="/d"):
    """A folder in which a first call has decided."""
    folder.mkdir(exist_ok=True)
    files.save(folder / "recipe.json",
               {"schedule": schedule, "data": data, "recipe": dataclasses.asdict(recipe)})
    return "--run", str(folder)


# ---- a flag a field

@pytest.mark.parametrize("words, device, dataset, schedule", [
    ("", "cuda", "synthetic", "short"), ("--dataset camvid", "cpu", "camvid", "short"),
    ("--dataset camvid", "cuda", "camvid", "paper"), ("--dataset cityscapes", "mps", "cityscapes", "paper"),
    ("--dataset camvid --schedule paper", "cpu", "camvid", "paper")])
def test_a_first_call_takes_the_papers_schedule_where_there_is_a_gpu(
        monkeypatch, words, device, dataset, schedule):
    monkeypatch.setattr(options, "best_device", lambda: device)
    command = parse(*words.split())
    assert (command.recipe, command.schedule) == (recipe_for(dataset, schedule), schedule)
    assert command.run == pathlib.Path(f"runs/{dataset}")
    assert command.stages == list(train.STAGES) == "pretrain search finetune evaluate".split()


def test_every_field_is_a_flag_with_a_stage_and_a_source(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Recipe):
        assert options.flag(field.name) in said
        assert field.metadata["stage"] in ("pretrain", "search", "alone", "end", "amount")
        sources = [word for word in ("Sect.", "[ours]", "[18]") if word in field.metadata["help"]]
        assert sources or field.name in ("dataset", "seed"), field.name


def test_flags_take_values_of_their_fields_kind():
    line = ("--static-crop 48 64 --static-scale 0.5 1 --cell attention decoder --key-frames 0 3 5 "
            "--cell-lr 1e-3 --no-early-stop --seeds 3")
    assert parse(*line.split()).recipe == recipe_for(
        "synthetic", "short", static_crop=(48, 64), static_scale=(0.5, 1.0), cell=("attention", "decoder"),
        key_frames=(0, 3, 5), cell_lr=1e-3, early_stop=False, seeds=3)


def test_the_recipe_shown_is_the_one_that_would_be_used(capsys):
    line = "--schedule smoke --no-early-stop --cell attention --seeds 3"
    train.main([*line.split(), "--show-recipe"])
    shown = [line.split("  ")[1].split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert parse(*sum(shown, [])).recipe == parse(*line.split()).recipe


# ---- the folder knows

def test_what_a_call_does_not_say_is_the_folders(tmp_path):
    made = recipe_for("camvid", "short", seeds=3, key_frames=(7,))
    run = remember(tmp_path / "run", made, "short", "/somewhere")
    command = parse(*run)
    assert (command.recipe, command.schedule, command.data) == (made, "short", "/somewhere")
    assert parse(*run, "--stage", "evaluate", "--seeds", "4").recipe == dataclasses.replace(made, seeds=4)
    assert parse(*run, "--schedule", "smoke").recipe == recipe_for("camvid", "smoke")
    with pytest.raises(InputError, match="--dataset synthetic"):
        parse(*run, "--dataset", "synthetic")
    run = remember(tmp_path / "other", dataclasses.replace(made, encoder_weights="/w.pth"), "short", "/d")
    assert parse(*run, "--schedule", "smoke").recipe.encoder_weights == "/w.pth"


def test_the_tilde_is_the_home_folder_behind_an_equals_sign_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"x")
    command = parse("--dataset=camvid", "--data=~/d", "--run", "~/r", "--encoder-weights=~/w.pth")
    assert (command.data, command.run) == (str(tmp_path / "d"), tmp_path / "r")
    assert command.recipe.encoder_weights == str(tmp_path / "w.pth")


def test_a_recipe_of_another_version_is_named(tmp_path):
    saved = dataclasses.asdict(Recipe())
    saved["wings"] = saved.pop("momentum")
    files.save(tmp_path / "recipe.json", {"schedule": "short", "data": "d", "recipe": saved})
    with pytest.raises(InputError, match=r"recipe.json.*momentum, wings"):
        parse("--run", str(tmp_path), "--stage", "search")


@pytest.mark.parametrize("change, kept, lost", [
    ("--static-batch 4", [], ["static.pt"]),
    ("--search-epochs 2", ["recipe.json", "static.pt"], ["search.jsonl", "cell-0-alone.pt"]),
    ("--end-epochs 3", ["static.pt", "search.jsonl", "cell-0-alone.pt"], ["cell-0.pt", "results.json"])])
def test_a_change_that_cannot_be_continued_names_both_values_and_the_copy_command(
        smoke, small, change, kept, lost):
    with pytest.raises(InputError) as error:
        train.main([*arguments_of(smoke), *change.split()])
    message, (flag, value) = str(error.value), change.split()
    assert f"{flag} " in message and f"{value} now" in message and "there" in message
    command = message.partition("mkdir ")[2]
    assert all(f"{smoke}/{name} " in command for name in kept)
    assert not any(f"{smoke}/{name} " in command for name in lost)


def test_the_copy_command_starts_a_run_that_goes_on(smoke, small, tmp_path, capsys):
    folder = copy_of(smoke, tmp_path, "recipe.json", "static.pt", "search.jsonl", "random.jsonl",
                     "controller.pt", "baseline.pt")
    with pytest.raises(InputError) as error:
        train.main(["--run", str(folder), "--end-lr-static", "1e-3"])
    copied = str(error.value).partition(" && cp ")[2].split()
    new = pathlib.Path(copied.pop())
    new.mkdir()
    for path in copied:
        shutil.copy(path, new)
    train.main(["--run", str(new), "--end-lr-static", "1e-3", "--stage", "search"])
    assert "nothing is missing" in capsys.readouterr().out


# ---- what can't work; of the data: tests/test_data.py

@pytest.mark.parametrize("line, said", [
    ("--dataset kitti", "kitti"), ("--seeed 3", "--seeed"), ("--see 3", "--see"),
    ("--static-epochs many", "--static-epochs"), ("--static-epochs 0", "--static FILE"),
    ("--end-epochs -1", "0 or more"), ("--cell-lr nan", "above 0"), ("--key-frames 0 -3", "--key-frames -3"),
    ("--meta-val-share 1.5", "below 1"), ("--static-batch 1", "2 or more"),
    ("--static-scale 2 0.5", "--static-scale"), ("--sequence-length 1", "2 or more"),
    ("--sequence-length 9", "no clip of synthetic"), ("--cells 0 --cell", "--cells 0"),
    ("--key-frames", "one value or more"), ("--cell warp9", "warp9"), ("--cell nowhere.json", "nowhere.json"),
    ("--cell {}", "--cell"), ("--cell [1,2]", "five tokens"), ("--static nowhere.pt", "nowhere.pt"),
    ("--encoder-weights nowhere.pth", "nowhere.pth"), ("--device warp9", "--device warp9"),
    ("--dataset camvid --data nowhere", "nowhere: no such folder"),
    ("--dataset cityscapes --data nowhere", "nowhere: no such folder"),
    ("--stage search", "static.pt"), ("--stage finetune", "static.pt"), ("--stage evaluate", "baseline.pt"),
    ("--stage predict", "--input and --output"),
    ("--stage predict --input x --output y --key-frame-every -1", "--key-frame-every -1"),
    ("--stage predict --input x --output y --data z", "--data"), ("--input x", "--stage predict"),
    ("--key-frame-every 3", "--stage predict"), ("--save-confidence", "--stage predict"),
    ("--network static", "--network"), ("--stage evaluate --network x.pt --cell concat", "--cell"),
    ("--data x", "--data"), ("--latency-target 3", "--latency-weight"),
])
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_made(tmp_path, small, line, said):
    with pytest.raises(InputError) as error:
        train.main([*line.split(), "--run", str(tmp_path / "run")])
    assert said in str(error.value) and "\n" not in str(error.value)
    made = {path.name for path in (tmp_path / "run").glob("*")}
    assert made <= {"recipe.json", "lock"}


def test_the_exit_status_is_2_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert as_script(monkeypatch, "train.py", "--static-batch", "-1") == 2 and not any(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith("error: --static-batch -1: ")


@pytest.mark.parametrize("dataset, schedule, needs", [
    ("camvid", "short", {"pretrain": (2, 4), "search": (2, 4), "finetune": (2, 4), "evaluate": (0, 0)}),
    ("camvid", "paper", {"pretrain": (20, 30), "search": (6, 12), "finetune": (12, 22)}),
    ("cityscapes", "paper", {"search": (25, 45)})])
def test_too_little_memory_is_told_before_any_work(tmp_path, monkeypatch, dataset, schedule, needs):
    """In GB, on a CPU with bf16. CityScapes: mostly the stored outputs of 5,950 frames."""
    size, frames = ((1024, 2048), 5950) if dataset == "cityscapes" else ((360, 480), 367)
    run = runs.Run(tmp_path, recipe_for(dataset, schedule), device="cpu")
    monkeypatch.setattr(run, "frame_size", lambda: size)
    monkeypatch.setattr(run, "dataset", lambda split: types.SimpleNamespace(clips=[[None] * frames]))
    monkeypatch.setattr(schedules, "has_bf16", lambda device: True)
    for stage, (least, most) in needs.items():
        monkeypatch.setattr(schedules, "available", lambda device: most * 1e9)
        schedules.check_memory(run, stage)
        if least:
            monkeypatch.setattr(schedules, "available", lambda device: least * 1e9)
            with pytest.raises(InputError, match=f"{stage}: .* GB.*lower --.*--schedule short"):
                schedules.check_memory(run, stage)
    run.world = run.sharing = 2          # they share a batch, but each trains a candidate
    monkeypatch.setattr(schedules, "available", lambda device: 1.9 * needs["search"][0] * 1e9)
    with pytest.raises(InputError, match="search: .* GB"):
        schedules.check_memory(run, "search")
    if "pretrain" in needs:
        monkeypatch.setattr(schedules, "available", lambda device: needs["pretrain"][1] * 1e9)
        schedules.check_memory(run, "pretrain")


def test_a_batch_that_is_too_small_for_the_processes_is_refused(tmp_path):
    command = parse("--schedule", "smoke", "--cell-batch", "7", "--run", str(tmp_path / "run"))
    run = runs.Run(command.run, command.recipe, device="cpu")
    run.world = 4
    with pytest.raises(InputError, match="--cell-batch 7: 4 processes share it.* 8 or more"):
        options.check_run(run, command)


def test_too_few_sequences_are_refused_before_the_training(tmp_path, small, monkeypatch):
    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (1, 3), "val": (1, 4), "test": (1, 4)})
    with pytest.raises(InputError, match="1 sequences of 3 frames"):
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_stage_needs_the_ones_before_it_to_be_finished(smoke, small, tmp_path):
    folder = copy_of(smoke, tmp_path, "recipe.json", "baseline.pt")
    with pytest.raises(InputError, match="static.pt"):
        train.main([*arguments_of(folder), "--stage", "finetune"])
    (folder / "baseline.pt").unlink()
    shutil.copy(smoke / "static.pt", folder)
    with pytest.raises(InputError, match="baseline.pt"):
        train.main([*arguments_of(folder), "--stage", "evaluate"])
    with pytest.raises(InputError, match="search.jsonl"):
        train.main([*arguments_of(folder), "--stage", "finetune"])
