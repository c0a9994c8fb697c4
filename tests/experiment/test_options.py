"""experiment/options.py: the command line, what the folder knows, and what is refused before any work."""
import dataclasses
import pathlib
import shutil
import types

import pytest
from whole_run import arguments_of, copy_of, small, smoke

import train
from data import InputError
from dyncell import Arch2
from experiment import options, runs, schedules
from train import Recipe, recipe_for
from util import files
from util.progress import Progress


def parse(*words):
    return options.parse(words, Recipe, recipe_for, train.STAGES, "")


# ---- a flag a field

@pytest.mark.parametrize("line, device, schedule", [("--dataset camvid --device cpu", "cuda", "short"),
    ("--dataset synthetic", "cuda", "short"), ("--dataset camvid", "cpu", "short"),
    ("--dataset cityscapes", "mps", "paper"), ("--dataset camvid --schedule paper", "cpu", "paper")])
def test_a_first_call_takes_the_papers_schedule_where_there_is_a_gpu(monkeypatch, line, device, schedule):
    monkeypatch.setattr(options, "best_device", lambda: device)
    command, dataset = parse(*line.split()), line.split()[1]
    assert (command.recipe, command.schedule) == (recipe_for(dataset, schedule), schedule)
    assert command.run == pathlib.Path(f"runs/{dataset}") and command.stages == list(train.STAGES)


def test_every_field_is_a_flag_of_its_kind_and_the_recipe_shown_can_be_typed(capsys):
    line = ("--static-crop 48 64 --static-scale 0.5 1 --cell attention decoder --key-frames 0 3 5 "
            "--cell-lr 1e-3 --no-early-stop --seeds 3").split()
    recipe = recipe_for("synthetic", "smoke", static_crop=(48, 64), static_scale=(0.5, 1.0), seeds=3,
                        cell=("attention", "decoder"), key_frames=(0, 3, 5), early_stop=False, cell_lr=1e-3)
    train.main(["--schedule", "smoke", *line, "--show-recipe"])
    shown = [line.split("  ")[1].split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert parse("--schedule", "smoke", *line).recipe == parse(*sum(shown, [])).recipe == recipe
    assert len(shown) == len(dataclasses.fields(Recipe))
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--seeds" in capsys.readouterr().out


# ---- the folder knows

def test_what_a_call_does_not_say_is_the_folders(tmp_path):
    made = recipe_for("camvid", "short", seeds=3, key_frames=(7,), encoder_weights="/w.pth")
    saved = {"schedule": "short", "data": "/d", "recipe": dataclasses.asdict(made)}
    run = "--run", str(tmp_path)
    files.save(tmp_path / "recipe.json", saved)
    command = parse(*run)
    assert (command.recipe, command.schedule, command.data) == (made, "short", "/d")
    assert parse(*run, "--stage", "evaluate", "--seeds", "4").recipe == dataclasses.replace(made, seeds=4)
    smoke = recipe_for("camvid", "smoke", encoder_weights="/w.pth")       # another schedule, the same files
    assert parse(*run, "--schedule", "smoke").recipe == smoke
    assert parse(*run, "--data", "/moved").data == "/moved"                # as "/d" is no more
    files.save(tmp_path / "recipe.json", dict(saved, data="/"))
    assert parse(*run, *"--data /e --stage evaluate --network x".split()).data == "/e"    # makes nothing
    for flag, other in ("--dataset", "synthetic"), ("--data", "/e"):
        with pytest.raises(InputError, match=f"{flag} {other}: .* is a run on"):
            parse(*run, flag, other)
    saved["recipe"]["wings"] = saved["recipe"].pop("momentum")
    files.save(tmp_path / "recipe.json", saved)
    with pytest.raises(InputError, match="recipe.json.*momentum, wings"):
        parse(*run)


def test_the_tilde_is_the_home_folder_behind_an_equals_sign_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"x")
    command = parse("--dataset=camvid", "--data=~/d", "--run", "~/r", "--encoder-weights=~/w.pth")
    assert (command.data, command.run) == (str(tmp_path / "d"), tmp_path / "r")
    assert command.recipe.encoder_weights == str(tmp_path / "w.pth")


@pytest.mark.parametrize("change, kept, lost", [("--static-batch 4", [], ["static.pt"]),
    ("--search-epochs 2", ["recipe.json", "static.pt"], ["search.jsonl", "cell-0-alone.pt"]),
    ("--end-epochs 3", ["static.pt", "search.jsonl", "cell-0-alone.pt"], ["cell-0.pt", "results.json"])])
def test_a_change_that_cannot_be_continued_names_both_values_and_the_copy_command(
        smoke, small, capsys, tmp_path, change, kept, lost):
    (flag, value), folder = change.split(), copy_of(smoke, tmp_path)
    with pytest.raises(InputError, match=f"{flag} .* there, {value} now") as error:
        train.main([*arguments_of(folder), *change.split()])
    assert (folder / "recipe.json").read_bytes() == (smoke / "recipe.json").read_bytes()
    copied = str(error.value).partition(" && cp ")[2].split()
    names = [pathlib.Path(path).name for path in copied]
    assert set(kept) <= set(names) and not set(lost) & set(names)
    if change.startswith("--end"):           # and it starts a run that goes on
        new = pathlib.Path(copied.pop())
        new.mkdir()
        for path in copied:
            shutil.copy(path, new)
        train.main(["--run", str(new), *change.split(), "--stage", "search"])
        assert "nothing is missing" in capsys.readouterr().out


# ---- what can't work; of the data: tests/test_data.py

@pytest.mark.parametrize("line, said", [
    ("--dataset kitti", "kitti"), ("--static-epochs 0", "--static FILE"), ("--end-epochs -1", "0 or more"),
    ("--cell-lr nan", "above 0"), ("--key-frames 0 -3", "--key-frames -3"), ("--key-frames", "--key-frames"),
    ("--meta-val-share 1", "below 1"), ("--cell warp9", "warp9"),
    ("--class-weights 1", "above 1"), ("--cells 0 --cell", "--cells 0"), ("--device warp9", "warp9"),
    ("--sequence-length 9", "--sequence-length 9"), ("--static nowhere.pt", "nowhere.pt: no such"),
    ("--dataset camvid --data nowhere", "nowhere: no such folder"), ("--data x", "--data"),
    ("--stage search", "static.pt"), ("--stage evaluate", "baseline.pt"), ("--network static", "--network"),
    ("--stage evaluate --network x.pt --cell concat", "--cell"), ("--save-confidence", "--stage predict"),
    ("--stage evaluate --network x.pt --input-pad 9", "--input-pad"), ("--stage predict", "needs both"),
    ("--stage evaluate --enlarge 9", "--network"), ("--stage predict --input x --output y --data z", "data"),
    ("--stage predict --key-frame-every -1", "0 or more"), ("--stage predict --enlarge -1", "0 or more")])
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_made(tmp_path, small, line, said):
    with pytest.raises(InputError) as error:
        train.main([*line.split(), "--run", str(tmp_path / "run")])
    assert said in str(error.value) and "\n" not in str(error.value)
    made = {path.name for path in (tmp_path / "run").glob("*")}
    assert made == ({"recipe.json", "lock"} if line in ("--stage search", "--stage evaluate") else set())


@pytest.mark.parametrize("dataset, schedule, needs", [
    ("camvid", "short", {"pretrain": (2, 4), "search": (2, 4), "finetune": (2, 4)}),
    ("camvid", "paper", {"pretrain": (20, 30), "search": (6, 12), "finetune": (12, 22)}),
    ("cityscapes", "paper", {"search": (25, 45)})])
def test_too_little_memory_is_told_before_any_work(tmp_path, monkeypatch, dataset, schedule, needs):
    """In GB, on a CPU with bf16. CityScapes: mostly the stored outputs of 5,950 frames."""
    size, frames = ((1024, 2048), 5950) if dataset == "cityscapes" else ((360, 480), 367)
    run = runs.Run(tmp_path, recipe_for(dataset, schedule), device="cpu")
    monkeypatch.setattr(run, "frame_size", lambda: size)
    monkeypatch.setattr(run, "dataset", lambda split: types.SimpleNamespace(clips=[[None] * frames]))
    monkeypatch.setattr(schedules, "has_bf16", lambda device: True)

    def lacking(gigabytes, stage):
        monkeypatch.setattr(schedules, "available", lambda device: gigabytes * 1e9)
        return schedules.lacking(run, run.recipe, [stage])
    for stage, (least, most) in needs.items():
        assert f"{stage}: needs" in lacking(least, stage) and lacking(most, stage) == ""
    run.world = run.sharing = 2          # they share a batch, but each trains a candidate
    assert lacking(1.9 * needs["search"][0], "search")
    assert not lacking(needs.get("pretrain", (0, 40))[1], "pretrain")


def test_the_schedule_is_said_before_a_download_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="cannot be downloaded"):
        train.main(["--dataset", "camvid", "--schedule", "short", "--encoder-weights", "none"])
    assert capsys.readouterr().out.startswith("runs/camvid: camvid, schedule short, on")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code, said", [(130, "the same command continues\n"), (2, "")])
def test_a_stopped_run_says_that_it_continues_and_a_mistake_does_not(small, tmp_path, capsys, code, said):
    command = parse("--schedule", "smoke", "--run", str(tmp_path / "run"), "--device", "cpu")
    with pytest.raises(SystemExit), options.open_run(command, recipe_for):
        raise SystemExit(code)
    assert capsys.readouterr().err == said


def test_out_of_memory_is_told_with_the_flags_that_help(small, tmp_path, monkeypatch):
    def forward(*_):
        raise MemoryError
    monkeypatch.setattr(Arch2, "forward_auxiliary", forward)
    with pytest.raises(InputError, match="pretrain: out of memory on cpu .*--static-batch") as told:
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert "\n" not in str(told.value) and Progress.stage == ""


def test_the_first_lines_say_the_time_and_whether_the_other_recipe_fits(
        tmp_path, monkeypatch, camvid, capsys):
    monkeypatch.setattr(schedules, "seconds_per_pixel", lambda run: 1e-6)
    monkeypatch.setattr(schedules, "has_bf16", lambda device: True)
    line = f"--dataset camvid --data {camvid} --run {tmp_path / 'run'} --encoder-weights none --device cpu"
    for memory, schedule in ((99, "paper"), (8, "short"), (3, "paper")):
        monkeypatch.setattr(schedules, "available", lambda device: memory * 1e9)
        command = parse(*line.split(), "--schedule", schedule)
        run = runs.Run(command.run, command.recipe, command.data, command.device)
        schedules.announce(run, command, recipe_for)
        first, other = capsys.readouterr().out.splitlines()
        assert f"about {schedules.duration(sum(run.expected.values()))} for" in first
        assert f"--schedule {'short' if schedule == 'paper' else 'paper'}" in other
        assert ("needs" in other) == (memory < 99), other
    with pytest.raises(InputError, match="pretrain: .* GB.*lower --.*--schedule short"):
        options.check_run(run, command)
