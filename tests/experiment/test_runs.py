"""A run may be stopped anywhere and ends with the numbers of one left alone; else it is refused.

A training; the search's log; which recipes a folder takes; whole runs, killed; torchrun. `-m slow` runs the
long forms: 50 kills in all stages, ten workers killed.
"""
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import signal
import socket
import time
import uuid

import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from whole_run import (FORKED, arguments_of, copy_of, make_small, run, run_forked, small, smoke, start,
                       write_to)

import data
import train
from data import InputError
from dyncell import Genotype
from train import recipe_for
from experiment import networks, options, runs, schedules, table
from experiment.runs import Run, generator
from util import files
from util.progress import Progress


def run_in(folder):
    return Run(folder, options.folder_of(folder, train.Recipe)["recipe"], device="cpu")


# ---- a training: run.epochs, epoch.batches

TOKENS = [1, 2, 0, 0, 0, 2, 5, 0, 0, 0]
GENOTYPE = Genotype.from_tokens(TOKENS)


def train_tiny(run, stop_at=None, noise=1.0):
    """Linear regression of 9 numbers by two optimisers with a memory of their own: three epochs of four
    batches, or up to step number `stop_at`. Returns the weights and the losses."""
    torch.manual_seed(0)
    xs, ys, steps = torch.randn(9, 4), torch.arange(9.0)[:, None], 0
    model = torch.nn.Linear(4, 1)
    model.unused = torch.nn.Parameter(torch.ones(1, 1))                   # weight decay must not shrink it
    model.genotype, model.past = GENOTYPE, False                          # as a cell has
    optimizers = [torch.optim.Adam([model.weight], lr=0.1),
                  torch.optim.SGD([model.bias, model.unused], lr=0.01, momentum=0.9, weight_decay=0.1)]
    for epoch in run.epochs("tiny", 3, {"cell": model}, optimizers):
        for batch, done in epoch.batches(9, 2):
            steps += 1
            if steps == stop_at:
                raise KeyboardInterrupt
            x = torch.nn.functional.dropout(xs[batch], 0.2 * noise)       # by torch's own generator
            x = x + noise * torch.randn(x.shape, generator=epoch.rng)     # and by the epoch's
            loss = ((model(x) - ys[batch]) ** 2).mean()
            train.update(loss, optimizers, (1 - done) ** 0.9, run.world)
            epoch.log(loss)
    losses = [entry["loss"] for entry in run.checkpoint("tiny")["history"]]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("stop_at, every", [(1, 0), (4, 0), (5, 0), (9, 0), (12, 0), (9, 1000)])
def test_a_stopped_training_ends_with_the_same_weights(run, monkeypatch, stop_at, every):
    """Stopped in first and last steps of epochs; and where not every epoch is saved, but one in so many
    seconds. One file, which holds the optimisers until the training is finished."""
    weights, losses = train_tiny(run)
    run.path("tiny.pt").unlink()
    monkeypatch.setattr(runs, "SAVE_SECONDS", every)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(run, stop_at)
    assert run.path("tiny.pt").exists() == (stop_at > 4 and every == 0) and not run.finished("tiny")
    if run.path("tiny.pt").exists():
        saved = files.load(run.path("tiny.pt"))
        assert len(saved["optimizers"]) == 2 and len(saved["history"]) == (stop_at - 1) // 4
    again, losses_again = train_tiny(run)
    assert torch.equal(weights, again) and losses == losses_again and len(set(losses)) == 3
    saved = files.load(run.path("tiny.pt"))
    assert "optimizers" not in saved and run.finished("tiny")
    assert saved["genotype"] == GENOTYPE.to_json() and saved["past"] is False
    assert [path.name for path in run.folder.iterdir()] == ["tiny.pt"]


def test_batches_are_shuffled_anew_in_each_epoch_and_know_what_is_behind(run):
    orders, shares, line = [], [], torch.nn.Linear(1, 1)
    for epoch in run.epochs("b", 2, {"line": line}, []):
        orders.append([])
        for batch, done in epoch.batches(7, 3):
            orders[-1] += batch.tolist()
            shares.append(done)
            epoch.log(torch.zeros(()))
    assert shares == [0, 1 / 4, 2 / 4, 3 / 4]
    assert all(len(set(order)) == 6 for order in orders)                  # a smaller last batch is dropped
    assert orders[0] != orders[1]
    assert [len(batch) for batch in runs.batches(2, 8, generator(0))] == [2]          # fewer than a batch
    assert not list(run.epochs("none", 0, {"line": line}, [])) and run.finished("none")
    for every, expected in ((0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7])):
        assert [k + 1 for k in range(7) if runs.Epoch(run, "x", k, 7).due(every)] == expected
    keys = (0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (0, "a", 1, 1)
    assert len({torch.rand(1, generator=generator(*key)).item() for key in keys}) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_a_training_and_is_not_saved(run, value):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=f"x.*: the loss is {value}"):
        for epoch in run.epochs("x", 3, {"line": model}, []):
            for batch, _ in epoch.batches(4, 2):
                epoch.log(model.weight.sum().square() * (value if epoch.index == 1 else 1))
    assert len(files.load(run.path("x.pt"))["history"]) == 1


# ---- the search's log

LOGS = "search.jsonl", "random.jsonl"


def lines(*candidates):
    entry = {"status": "ok", "reward": 0.5, "half_reward": None, "tokens": TOKENS}
    return "".join(json.dumps({"candidate": k, **entry}) + "\n" for k in candidates)


def test_a_torn_last_line_is_cut_off_and_its_candidate_trained_again(run, capsys):
    path = run.path("log.jsonl")
    path.write_text(lines(0, 1) + lines(2)[:30])
    assert list(files.read_log(path)) == [0, 1]
    assert path.read_text() != lines(0, 1)                                # looking cuts nothing
    log = runs.Log(run, "log.jsonl")
    assert path.read_text() == lines(0, 1) and "the last line is incomplete and" in capsys.readouterr().out
    assert [k for k in range(4) if log.claim(k)] == [2, 3]
    with log.candidate(2, GENOTYPE) as entry:
        entry["reward"] = 0.7
    assert files.read_log(path)[2]["reward"] == log[2]["reward"] == 0.7 and not log.claim(2)


def test_the_logs_tokens_are_taken_where_another_processor_would_sample_others(run):
    """Sums may round otherwise there; the rewards belong to what was trained."""
    run.path("log.jsonl").write_text(lines(1))
    sampled = torch.tensor([TOKENS] * 4)
    sampled[1:, 1] += 1
    tokens = runs.Log(run, "log.jsonl").tokens([0, 1, 2], sampled)        # the last round may be shorter
    assert tokens.tolist() == [TOKENS, TOKENS, sampled[2].tolist()]


# ---- a result depends on the fields of its stage and of earlier ones, and on no other

MADE_BY = {"static.pt": "pretrain", "controller.pt": "search", "search.jsonl": "search",
           "random.jsonl": "search", "cell-0-alone.pt": "alone", "cell-0.pt": "end", "baseline.pt": "end",
           "results.json": None}                                          # its rows know what made them
STAGE_OF = {name: stage for stage, names in {
    "pretrain": " ".join(field.name for field in dataclasses.fields(train.Recipe)),       # but for these:
    "search": "weight_decay sequence_length input_longer_side input_crop input_pad cell_layers "
              "meta_val_share search_epochs search_batch cell_lr early_stop early_stop_rule controller_lr "
              "controller_clip controller_baseline_decay controller_rollout controller_replay "
              "controller_epochs controller_entropy distillation",
    "alone": "cell_epochs cell_batch", "end": "end_epochs end_lr_cell end_lr_static end_crop end_mirrored",
    "amount": "validate_every search_candidates search_strategy cells cell median_cell without_past seeds "
              "key_frames"}.items() for name in names.split()}


@pytest.mark.parametrize("file, stage", MADE_BY.items())
def test_a_field_of_a_files_own_and_earlier_stages_is_refused_and_no_other(
        smoke, tmp_path, monkeypatch, file, stage):
    monkeypatch.setattr(runs, "load", functools.cache(files.load))
    run = run_in(copy_of(smoke, tmp_path, file, "recipe.json"))
    recipe = run.recipe
    for name, own_stage in STAGE_OF.items():
        value, said = getattr(recipe, name), ""
        other = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.01,
                 str: lambda: value + "x", tuple: lambda: (*value, *value, "warp")}[type(value)]()
        run.recipe = dataclasses.replace(recipe, **{name: other})
        try:
            options.check_folder(run)
        except InputError as error:
            said = str(error)
        depends = stage is not None and runs.STAGES.index(own_stage) <= runs.STAGES.index(stage)
        assert bool(said) == depends, f"{file}, {name}: {said}"
        assert not said or re.search(rf"{file}: .*{runs.flag(name)} .* there, .* now", said)


# Other values of later stages' fields, with which the small run still works.
OF_THE_SEARCH = ("--search-epochs 9 --cell-lr 0.5 --cell-layers 3 --meta-val-share 0.4 --controller-lr 0.5 "
                 "--sequence-length 4 ").split()
OF_LATER_STAGES = ("--cell-epochs 7 --cell-batch 5 --end-epochs 9 --end-crop 16 16 --end-lr-cell 0.7 "
                   "--end-lr-static 0.7 --cells 3 --cell warp --no-without-past --seeds 4 --key-frames 7"
                   ).split()


@pytest.mark.parametrize("stage, told, kept, made", [
    ("pretrain", OF_THE_SEARCH + OF_LATER_STAGES + ["--validate-every", "0"], [], ["static.pt"]),
    ("search", OF_LATER_STAGES, ["static.pt"], [*LOGS, "controller.pt"])])
def test_a_stage_makes_the_same_whatever_later_stages_are_told(
        smoke, small, tmp_path, stage, told, kept, made):
    folder = copy_of(smoke, tmp_path, "recipe.json", *kept)
    train.main([*arguments_of(folder), *told, "--stage", stage])
    for name in made:
        assert outcome_of(folder / name) == outcome_of(smoke / name), name


# ---- whole runs

def test_two_commands_do_not_work_on_one_run_at_once(smoke, small):
    with runs.locked(run_in(smoke)), pytest.raises(InputError, match="run: another process uses it"):
        train.main(arguments_of(smoke))


def test_what_the_machine_lacks_is_said_and_stops_nothing(small, tmp_path, monkeypatch, capsys):
    """No fcntl to lock with (Windows), and ranks in the environment that are not torchrun's."""
    monkeypatch.delattr(runs, "fcntl")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    train.main(["--schedule", "smoke", "--run", str(tmp_path / "run"), "--stage", "pretrain"])
    assert (tmp_path / "run" / "static.pt").exists()
    assert "can't be locked here" in capsys.readouterr().out


def outcome_of(path):
    """What a file holds and must not depend on how often its run was stopped, as a text: all but the measured
    times. Nor does a training depend on whether it looks at val."""
    if path.suffix == ".png":
        return "drawn"
    if path.suffix == ".jsonl":
        log = files.read_log(path)
        content = [{**log[k], "seconds": 0} for k in sorted(log)]         # of two processes one may be faster
    else:
        content = {**files.load(path), "recipe": None}
        content["history"] = [entry["loss"] for entry in content.get("history", [])]
    return json.dumps(content, default=lambda tensor: hashlib.sha256(tensor.numpy().tobytes()).hexdigest())


def assert_same(folder, smoke):
    """All files of two folders."""
    a, b = ({str(path.relative_to(one)): outcome_of(path) for path in one.rglob("*.*")
             if path.name != "recipe.json"} for one in (folder, smoke))
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name] != b[name]]


def test_a_finished_run_has_these_files_and_the_same_command_again_changes_none(smoke, small, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in smoke.rglob("*.*") if path.name != "recipe.json"}

    before, recipe = times(), (smoke / "recipe.json").read_text()
    networks = ["baseline", "cell-0", "cell-0-without-past", "random-0"]
    train.main(arguments_of(smoke))
    out = capsys.readouterr().out
    assert out.count(": nothing is missing") == 4 and "baseline, fine-tuned" in out
    assert times() == before and (smoke / "recipe.json").read_text() == recipe        # written again
    alone = [f"{name}-alone" for name in networks[1:]]
    assert {path.name for path in smoke.iterdir()} == {
        "recipe.json", "lock", "search.jsonl", "random.jsonl", "results.json", "figures",
        *(f"{name}.pt" for name in ["static", "controller", "examples", *networks, *alone])}
    for path in smoke.glob("*.pt"):
        assert not {"optimizers", "average"} & files.load(path).keys()


def killed_again_and_again(smoke, tmp_path, kills, everywhere=False, seed=0):
    """Starts the run, kills it after a random time, and again; everywhere=True: also until a kill came in
    each stage, which is a matter of the machine's speed. Returns the stages in which kills came."""
    signals = signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM
    rng, folder, stages, starts = random.Random(seed), copy_of(smoke, tmp_path / "0", "nothing"), [], 0
    while True:
        starts += 1
        kill = None
        if len(stages) < kills or everywhere and set(stages) != set(train.STAGES):
            latest = rng.choice((1.0, 3.0)) * (1 + starts / 50)           # a whole run: 4 s, or more
            kill = rng.uniform(0, latest), signals[len(stages) % 4]
        ended = start(folder, kill=kill)
        assert ended.status in (0, -9, 130, 143), ended.output[-3000:]
        assert starts < 10 * kills
        if ended.status:
            finished = re.findall("^[a-z]+: (?:done in|nothing is missing)", ended.output, re.MULTILINE)
            stages.append(list(train.STAGES)[min(len(finished), 3)])
            continue
        assert_same(folder, smoke)
        if not kill:
            return stages
        folder = copy_of(smoke, tmp_path / str(starts), "nothing")        # done before the kill came


def test_a_run_that_is_killed_3_times_ends_with_the_same_numbers(smoke, tmp_path):
    assert len(killed_again_and_again(smoke, tmp_path, 3)) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_50_times_in_all_stages_ends_with_the_same_numbers(smoke, tmp_path):
    assert len(killed_again_and_again(smoke, tmp_path, 50, everywhere=True, seed=1)) >= 50


def test_the_time_left_is_what_the_folder_lacks_at_the_pace_of_the_stages_before(smoke, small, run):
    made, new = (schedules.pixels_of(one) for one in (run_in(smoke), run))
    assert made["pretrain"] == made["search"] == 0 < min(new["pretrain"], new["search"])
    run.expected = {"pretrain": 10, "search": 20, "finetune": 30}
    with table.stage(run, "pretrain", ["pretrain", "search", "finetune"]) as missing:
        assert missing and Progress.after == schedules.seconds_of(run, ["search", "finetune"]) == 50
        assert 0 < Progress.ends - time.time() <= 10
    assert Progress.after is None and run.taken["pretrain"] > 0
    run.taken = {"pretrain": 110}
    assert schedules.seconds_of(run, ["search", "finetune"]) == pytest.approx(50 * (110 + 50) / (10 + 50))


# ---- torchrun

def one_of_two(rank, port, folder):
    """A process of a pair, as torchrun starts it. It writes down what the tests below look at."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    run = Run(folder, recipe_for("synthetic", "smoke"), device="cpu")
    torch.save([train_tiny(run, noise=0.0)[0], draw(run), ask(run)], folder / f"rank-{rank}")
    run.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """What the first process and the second have written down."""
    folder = tmp_path_factory.mktemp("two")
    folder.joinpath("search.jsonl").write_text(lines(0, 1, 2, 3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKED.Process(target=one_of_two, args=(rank, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [files.load(folder / f"rank-{rank}") for rank in (0, 1)]


def test_two_processes_share_every_batch_and_train_as_one_does(run, in_two_processes):
    """Of a model without batch norms and dropout: to rounding. A parameter that nothing uses stays."""
    (a, _, _), (b, _, _) = in_two_processes
    assert torch.equal(a, b) and 1 in a
    torch.testing.assert_close(a, train_tiny(run, noise=0.0)[0])


def draw(run):
    draws = []
    for epoch in run.epochs("x", 2, {"line": torch.nn.Linear(1, 1)}, []):
        for batch, _ in epoch.batches(8, 4):
            draws.append((batch.tolist(), torch.rand(1, generator=epoch.rng).item(), torch.rand(1).item()))
            epoch.log(torch.zeros(()))
    return draws


def test_each_process_has_its_share_of_a_batch_and_its_own_augmentation(in_two_processes):
    (_, first, _), (_, second, _) = in_two_processes
    for epoch in (0, 2):
        shares = [batch for step in (epoch, epoch + 1) for batch in (first[step][0], second[step][0])]
        assert [len(share) for share in shares] == [2, 2, 2, 2] and sorted(sum(shares, [])) == list(range(8))
    for kind in (1, 2):                                                   # the epoch's generator, torch's own
        assert len({step[kind] for step in first + second}) == 8


def ask(run):
    """The second process looks at an empty folder. Only the first one is to make the table, or to report a
    mistake."""
    def mistake():
        raise InputError("a mistake")

    run.save("static", {"line": torch.nn.Linear(1, 1)}, history=[])
    if run.rank:
        run.folder = run.folder / "nowhere"
    stages = [table.done(run, stage) for stage in ("pretrain", "search", "finetune", "evaluate")]
    log, names = runs.Log(run, "search.jsonl"), [network.name for network in networks.networks(run)]
    try:
        run.first(mistake)
    except (InputError, SystemExit) as error:
        said = str(error), bool(table.Table(run).missing())
    return (names, stages, list(log), run.finished("static"), run.finished("baseline")), said


def test_one_process_looks_at_the_folder_and_all_follow(in_two_processes):
    """Else one that looks later, at more files, does other work, and both wait forever."""
    (_, _, (first, said)), (_, _, (second, also_said)) = in_two_processes
    assert first == second and first[0] == ["baseline", "cell-0", "cell-0-without-past"]
    assert first[2:] == ([0, 1, 2, 3], True, False)
    assert said == ("a mistake", True) and also_said == ("2", False)


def worker(arguments, die_at):
    """The small run's command; the second process kills itself in its step number die_at."""
    calls, update = 0, train.update

    def update_or_die(*arguments):
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        update(*arguments)

    make_small(setattr)
    train.update = update_or_die
    data.run_main(lambda: train.main(arguments))


def launch(out, arguments, die_at):
    """What `torchrun --standalone --nproc-per-node 2` does, without importing torch three times."""
    write_to(out)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", max_restarts=0,
                          rdzv_endpoint="localhost:0", run_id=str(uuid.uuid4()), start_method="fork")
    elastic_launch(config, worker)(arguments, die_at)


def torchrun(folder, *arguments, die_at=0):
    """Ends as it should: with status 0, or, where a process dies, with another one."""
    ended = run_forked(launch, folder, [*arguments_of(folder), *arguments], die_at)
    assert (ended.status == 0) == (die_at == 0), ended.output


def test_two_processes_search_the_same_candidates_as_one_even_if_one_was_killed(smoke, tmp_path):
    """On the same static network. In a round the faster process takes more."""
    folder = copy_of(smoke, tmp_path, "recipe.json", "static.pt")
    torchrun(folder, "--stage", "search", die_at=2)               # in its first candidate
    assert sum(len(files.read_log(folder / name)) for name in LOGS) < 8
    torchrun(folder, "--stage", "search")
    for name in (*LOGS, "controller.pt"):
        assert outcome_of(folder / name) == outcome_of(smoke / name), name


def test_a_worker_that_is_killed_once_stops_the_run_and_the_run_goes_on(smoke, tmp_path):
    """Without a search: where every process asked the disk by itself whether there is work, one would be
    ahead of the other and both wait forever."""
    flags = "--cells", "0", "--cell", "concat", "--key-frames", "0"
    whole = copy_of(smoke, tmp_path / "whole", "nothing")
    folder = copy_of(smoke, tmp_path / "died", "nothing")
    torchrun(whole, *flags)
    assert (whole / "results.json").exists()
    torchrun(folder, *flags, die_at=14)               # the end of the baseline's second epoch; one is saved
    assert len(files.load(folder / "baseline.pt")["optimizers"]) == 1
    torchrun(folder, *flags, "--stage", "finetune")
    for name in ("static", "baseline", "cell-concat-alone", "cell-concat"):
        assert outcome_of(folder / f"{name}.pt") == outcome_of(whole / f"{name}.pt"), name


@pytest.mark.slow
def test_workers_that_are_killed_10_times_in_all_trainings_stop_the_run_and_it_goes_on(smoke, tmp_path):
    whole = copy_of(smoke, tmp_path / "whole", "nothing")
    folder = copy_of(smoke, tmp_path / "died", "nothing")
    torchrun(whole)
    for die_at in (2, 4, 3, 2, 4, 5, 6, 7, 9, 6):
        torchrun(folder, die_at=die_at)
        assert not (folder / "results.json").exists()
    torchrun(folder)
    assert_same(folder, whole)
