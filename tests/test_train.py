"""train.py, in its order: the recipe, a training's step, stored outputs, a candidate, the search, evaluation.

How trainings are stopped and continued is tested in experiment/test_runs.py, the flags in test_options.py.
"""
import dataclasses
import inspect
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
from plain_network import Plain
from whole_run import ARGUMENTS, calibrated, make_small, small, smoke

import controller
import data
import dyncell
import ops
import train
from controller import EarlyStop
from dyncell import Arch2, Arch2Quarter, Genotype, VideoSegmenter, make_cell
from experiment import runs
from experiment.networks import Network
from train import FeatureCache, Recipe, recipe_for, static_outputs, unroll
from util import files
from util.device import tf32


# ---- the recipe

@pytest.mark.parametrize("dataset, figures", [
    ("camvid", dict(
        static_epochs=2000, static_batch=32, static_crop=(600, 600), static_scale=(0.5, 2.0),     # Sect. 6
        static_lr_encoder=0.05, static_lr_decoder=0.01, momentum=0.9, auxiliary_weight=0.3,
        sequence_length=3, input_crop=600, input_pad=400, input_longer_side=0, meta_val_share=0.1,    # 4.1
        search_candidates=1000, search_epochs=20, search_batch=48, cell_lr=0.008, controller_lr=0.0001,
        cell_layers=5, early_stop=True, search_strategy="ppo",                        # 3.2, 3.3
        early_stop_rule="as-in-18", controller_clip=0.1, controller_baseline_decay=0.95,      # [18]
        controller_rollout=1, controller_replay=100, controller_epochs=1, controller_entropy=0.0,
        auxiliary_cell=True, gradient_norm=3.0,
        cells=2, cell_epochs=10, cell_batch=16, end_epochs=100, end_lr_cell=0.004,            # 4.2
        end_lr_static=0.0005, end_crop=(400, 480))),
    ("cityscapes", dict(
        static_epochs=1000, static_batch=28, static_crop=(800, 800), static_scale=(0.5, 2.0),
        sequence_length=2, input_longer_side=1024, input_crop=512,
        cell_layers=4, search_epochs=10, search_batch=48, cell_lr=0.008, cell_epochs=200, cell_batch=16,
        end_epochs=200, end_crop=(769, 769)))])
def test_the_papers_figures_written_out_by_hand(dataset, figures):
    recipe = dataclasses.asdict(recipe_for(dataset, "paper"))
    assert {name: recipe[name] for name in figures} == figures
    assert recipe_for("camvid", "paper") == Recipe()      # the defaults; and one's own dataset gets CamVid's
    assert recipe_for("mine", "short") == dataclasses.replace(recipe_for("camvid", "short"), dataset="mine")


def test_the_controller_knows_how_many_operations_and_inputs_there_are():
    """controller.py imports nothing of ours, so it has the counts as defaults. A cell takes all inputs."""
    of = inspect.signature(controller.Controller).parameters
    counts = [of[f"num_{name}"].default for name in ("inputs", "operations", "aggregations")]
    assert counts == [len(dyncell.INPUTS), len(ops.OPERATIONS), len(ops.AGGREGATIONS)]
    for cell in (dyncell.DynamicCell, dyncell.DecoderCell):
        assert list(inspect.signature(cell.forward).parameters)[1:] == [*dyncell.INPUTS, "layer1"]


# ---- a step

def naive_cross_entropy(logits, labels, stride, weight):
    """In float64: each pixel of the loss by itself, the logits (at 1/8) bilinear between their pixels'
    centres, the label of the pixel just below and right of the middle of its block of stride x stride."""
    (_, _, h, w), (N, H, W), losses = logits.shape, labels.shape, []
    rows, cols = math.ceil(H / stride), math.ceil(W / stride)
    for n, r, c in np.ndindex(N, rows, cols):
        label = labels[n, min(r * stride + stride // 2, H - 1), min(c * stride + stride // 2, W - 1)]
        if label == data.IGNORE:
            continue
        y, x = (np.clip((at + 0.5) * stride / 8 - 0.5, 0, side - 1) for at, side in ((r, h), (c, w)))
        tents = np.maximum(0, 1 - abs(y - np.arange(h)))[:, None] * np.maximum(0, 1 - abs(x - np.arange(w)))
        z = (logits[n] * tents).sum((1, 2))
        losses.append((1 if weight is None else float(weight[label])) * (np.log(np.exp(z).sum()) - z[label]))
    return np.mean(losses)


@pytest.mark.parametrize("stride", [8, 4, 1])
@pytest.mark.parametrize("size", [(16, 16), (19, 33)])
def test_cross_entropy_against_a_naive_loop_at_each_resolution(stride, size):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, *size), generator=rng, dtype=torch.uint8)
    labels[labels == 3] = data.IGNORE
    logits = torch.randn(2, 3, *(math.ceil(side / 8) for side in size), generator=rng)
    for weight in (None, torch.tensor([0.5, 3.0, 1.0])):
        expected = naive_cross_entropy(logits.double().numpy(), labels.numpy(), stride, weight)
        assert train.cross_entropy(logits, labels, stride, weight).item() == pytest.approx(expected, rel=1e-5)
    assert train.cross_entropy(logits, torch.full_like(labels, data.IGNORE), stride).item() == 0
    fine = torch.randn(2, 3, *(math.ceil(side / 2) for side in size), generator=rng)      # never coarsened
    assert train.cross_entropy(fine, labels, stride) == train.cross_entropy(fine, labels, min(stride, 2))


def test_a_rare_class_weighs_more_and_the_mean_over_pixels_is_one(run):
    """1 / log(K + p), with shares p of the labelled pixels; 0: none."""
    frames = run.frames("train")
    assert frames.class_weights(0) is None
    labels = frames.labels
    labels[0] = data.IGNORE
    p = np.array([(labels == k).sum().item() for k in range(6)]) / labels[1:].numel()
    expected = 1 / np.log(1.1 + p)
    assert frames.class_weights(1.1).tolist() == pytest.approx(expected / (expected @ p), rel=1e-5)


@pytest.mark.parametrize("norm, steps", [(0, (5, 0.5, 13)), (2, (2, 0.5, 2)), (7, (5, 0.5, 7))])
def test_an_update_steps_every_optimiser_at_the_rate_and_clips_each_group_by_itself(norm, steps):
    """Gradients (3, 4), 0.5 and (5, 12), of norms 5, 0.5 and 13; the rates are 1, 1 and 1/4."""
    a, b, c = (torch.zeros(n, requires_grad=True) for n in (2, 1, 2))
    optimizers = [torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), torch.optim.SGD([c], lr=0.25)]
    for rate in (1, 0.75, 0.5):
        loss = 3 * a[0] + 4 * a[1] + 0.5 * b[0] + 5 * c[0] + 12 * c[1]
        train.update(loss, optimizers, rate, norm=norm)
    where = a.norm().item(), b.norm().item(), 4 * c.norm().item()
    assert where == pytest.approx([(1 + 0.75 + 0.5) * one for one in steps], rel=1e-5)


# ---- Sect. 4.1: what a search is given

@pytest.fixture
def run(tmp_path, small):
    """Few, tiny synthetic videos."""
    recipe = recipe_for("synthetic", "smoke", search_batch=2, search_epochs=2, loss_stride=2, static_batch=4,
                        cell_batch=2, early_stop_rule="average")
    return runs.Run(tmp_path, recipe, device="cpu")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """(static, meta-train, meta-val) of the run above, made once for all tests. The two share their stored
    outputs: frames of this size are neither resized nor cropped nor padded."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        run = runs.Run(tmp_path_factory.mktemp("untrained"), recipe_for("synthetic", "smoke"), device="cpu")
        static = run.to_device(calibrated())
        windows = run.frames("train").windows(3)
        stored = static_outputs(run, static, windows)
        train_windows, val_windows = data.meta_split(windows, 0.2, torch.Generator().manual_seed(0))
        return static, (stored, train_windows), (stored, val_windows)


def close(a, b):
    """To half precision and bf16."""
    return (a - b).norm() < 0.03 * b.norm()


def test_meta_train_and_meta_val_share_no_frame():
    windows = torch.arange(100)[:, None] + torch.arange(3)
    meta_train, meta_val = data.meta_split(windows, 0.1, torch.Generator().manual_seed(0))
    assert not torch.isin(meta_train, meta_val).any() and 10 <= len(meta_val) <= 20
    assert len(meta_train) >= 100 - len(meta_val) - 8                     # few are in neither


def test_a_search_learns_from_resized_and_padded_frames_and_scores_on_those_as_they_are(
        run, untrained, monkeypatch):
    run.recipe.input_longer_side, run.recipe.input_pad, run.recipe.input_crop = 128, 104, 64
    static, seen = untrained[0], []
    monkeypatch.setattr(run, "load", lambda name: types.SimpleNamespace(static=static))
    monkeypatch.setattr(train, "explore", lambda *arguments: seen.extend(arguments[4:]))
    train.search(run)
    for transformed, (stored, windows) in zip((True, False), seen, strict=True):
        images, labels = run.frames("train")[windows.unique()]            # those to learn from in two parts
        images = data.normalise(images)
        if transformed:                                                   # 96 x 128, then 104 x 128
            images, labels = data.pad(*data.resize_longer_side(images, labels, 128), 104)
        with torch.no_grad(), run.autocast():
            features = static.encode(images)
            expected = *features[1:], static.decode(features)[0]
        assert stored.crop == (64 if transformed else None) and "layer1" not in stored.maps
        assert torch.equal(stored.maps["labels"], labels)
        for name, x in zip(("layer2", "layer3", "layer4", "dec"), expected):
            assert stored.maps[name].dtype == torch.half and close(stored.maps[name].float(), x.float())


def marked(numbers, top, left, height, width, step):
    """Every step-th pixel of pieces of frames: (n, 3, h, w), the frame's number, row and column."""
    rows = top[:, None, None] + torch.arange(0, height, step)[:, None]    # (n, h, 1)
    columns = left[:, None, None] + torch.arange(0, width, step)          # (n, 1, w)
    return torch.stack(torch.broadcast_tensors(numbers[:, None, None], rows, columns), dim=1)


@pytest.mark.parametrize("height, width, crop", [(160, 96, 64), (112, 136, 64), (40, 48, 60), (40, 48, None)])
def test_a_sequence_of_large_frames_is_cropped_at_a_random_place_its_own(height, width, crop):
    """All of its maps and frames at the same place; every multiple of 32 pixels is one. CamVid's 480 x 400 is
    smaller than the crop of 600: nothing is cropped."""
    windows, rng, places = torch.tensor([[2, 3], [3, 4], [9, 10], [12, 13]]), torch.Generator(), []
    stored, strides = windows.unique(), FeatureCache.STRIDE
    maps = {name: marked(stored, 0 * stored, 0 * stored, height, width, strides[name]) for name in strides}
    cache, sizes = FeatureCache(stored, maps, crop), [min(side, crop or side) for side in (height, width)]
    for _ in range(40):
        frames = list(cache.pick(windows, rng))
        corners = frames[0]["labels"][:, 1:, 0, 0].long()                 # (B, 2)
        places += map(tuple, corners.tolist())
        for frame, numbers in zip(frames, windows.T, strict=True):
            for name, x in frame.items():
                assert torch.equal(x.long(), marked(numbers, *corners.T, *sizes, strides[name]))
    for side, size, found in zip((height, width), sizes, zip(*places)):
        assert set(found) == set(range(0, side - size + 1, 32))
    assert (len(set(places[:4])) > 1) == (height > 40)    # within a batch, too


def test_stored_outputs_are_unrolled_as_a_video_is(run, untrained):
    """Two places unroll a cell over frames, train.unroll and VideoSegmenter: they give the same logits."""
    static, (stored, _), _ = untrained
    genotype = Genotype([("layer4_prev", "dec_prev", "conv1x1", "sep3x3", "concat"),
                         ("node0", "layer2", "skip", "conv3x3", "sum"),
                         ("layer3", "layer4", "conv1x1", "conv1x1", "sum")])          # all five inputs
    cell = run.to_device(make_cell(genotype, static)).eval()
    for copied, of_static in zip(cell.classifier.parameters(), static.classifier.parameters(), strict=True):
        assert torch.equal(copied, of_static)                             # [ours] it starts as a copy
    images, labels = run.frames("train")[[[0, 1, 2, 3]]]
    with torch.no_grad(), run.autocast():
        expected = VideoSegmenter(static, cell).eval()(data.normalise(images))[0]     # (4, C, h, w)
        rolled = unroll(run, cell, stored.pick(torch.arange(4)[None]))
        other = unroll(run, cell, stored.pick(torch.tensor([[1, 1, 2, 3]])))          # another past
    for t, (pred, label) in enumerate(rolled, start=1):
        assert close(pred[0].float(), expected[t].float()) and torch.equal(label, labels[:, t])
    assert len(rolled) == 3 and not close(other[0][0][0].float(), expected[1].float())
    loss = sum(train.cross_entropy(pred, label, run.recipe.loss_stride) for pred, label in rolled)
    found = train.cell_loss(run, cell, stored.pick(torch.arange(4)[None]))        # Sect. 4
    assert found.item() == pytest.approx(loss.item(), rel=1e-4)
    run.recipe.distillation, teacher = 0.5, static(data.normalise(images[0])).detach()[1:]
    q, p = (x.float().div(2).softmax(1).double() for x in (teacher, torch.cat([pred for pred, _ in rolled])))
    taught = train.cell_loss(run, cell, stored.pick(torch.arange(4)[None]), static) - found
    assert taught.item() == pytest.approx(-2 * (q * p.log()).sum(1).mean(dim=(1, 2)).sum().item(), rel=1e-3)


# ---- Sect. 3.3: a candidate

GENOTYPE = Genotype([("dec_prev", "layer2", "skip", "conv1x1", "sum")])


def candidate(run, untrained, k=3, average=None):
    """The log's entry of candidate k. average: of the early stop's rule of that name."""
    early_stop = EarlyStop("average", 0.9)
    early_stop.value = average
    run.path("log.jsonl").unlink(missing_ok=True)
    with runs.Log(run, "log.jsonl").candidate(k, GENOTYPE) as entry:
        train.train_candidate(run, *untrained, k, GENOTYPE, early_stop, entry)
    entry.pop("seconds")
    return entry


def test_a_candidate_can_be_made_again_and_another_number_is_another_one(run, untrained, monkeypatch):
    """The early stop is asked with the half-way score and a draw of the candidate's own. The reward is the
    geometric mean of three scores."""
    asked = []
    monkeypatch.setattr(EarlyStop, "promising", lambda _, *question: asked.append(question) or True)
    first, again, other = [candidate(run, untrained, k) for k in (3, 3, 4)]
    assert first == again and first["reward"] != other["reward"]
    halves, draws = zip(*asked)
    assert list(halves) == [entry["half_reward"] for entry in (first, again, other)]
    assert draws[0] == draws[1] != draws[2] and all(0 <= draw < 1 for draw in draws)
    assert first["reward"] == pytest.approx((first["miou"] * first["fwiou"] * first["macc"]) ** (1 / 3))


def test_a_candidate_learns_from_meta_train_and_is_scored_on_meta_val_half_way_and_at_the_end(
        run, untrained, monkeypatch):
    seen, pick = [], FeatureCache.pick
    monkeypatch.setattr(FeatureCache, "pick", lambda stored, windows, *rng: (
        seen.extend(map(tuple, windows.tolist())) or pick(stored, windows, *rng)))
    run.recipe.search_epochs = 4
    candidate(run, untrained)
    train_windows, val_windows = (sorted(map(tuple, windows.tolist())) for _, windows in untrained[1:])
    parts = [sorted(part) for _, part in itertools.groupby(seen, val_windows.__contains__)]
    assert parts == 2 * [sorted(2 * train_windows), val_windows]          # two epochs, half way; and again
    run.recipe.early_stop, rewards = False, []
    for run.recipe.search_epochs in (1, 40):              # scored on what it learned from
        rewards.append(candidate(run, (untrained[0], untrained[1], untrained[1]))["reward"])
    assert rewards[1] > 2 * rewards[0]


@pytest.mark.parametrize("average, stopped", [(0.99, True), (0.0001, False), (None, False)])
def test_a_candidate_below_the_running_average_is_stopped_half_way(run, untrained, average, stopped):
    entry, recipe = candidate(run, untrained, average=average), run.recipe
    assert entry["stopped"] == stopped and entry["half_reward"] > 0
    assert (entry["reward"] == entry["half_reward"]) == stopped
    for changes in ({"early_stop": False}, {"search_epochs": 1, "search_batch": 1000}) if stopped else ():
        run.recipe = dataclasses.replace(recipe, **changes)               # without it, or with one step
        entry = candidate(run, untrained, average=average)
        assert not entry["stopped"] and entry["half_reward"] is None


@pytest.mark.parametrize("error, status", [(None, "not finite"), (MemoryError(), "out of memory")])
def test_a_candidate_that_fails_gets_no_reward_and_is_logged(run, untrained, monkeypatch, error, status):
    """A search whose first candidates all fail alike stops and says why."""
    def cell_loss(run, cell, sequences, static):
        if error:
            raise error
        return next(cell.parameters()).sum() * math.inf

    monkeypatch.setattr(train, "cell_loss", cell_loss)
    entry = candidate(run, untrained)
    assert (entry["status"], entry["reward"], entry["half_reward"]) == (status, 0, None)
    assert entry["tokens"] == GENOTYPE.to_tokens() and files.read_log(run.path("log.jsonl")).keys() == {3}
    run.recipe.search_candidates, run.recipe.controller_rollout = 1000, 1
    with pytest.raises(data.InputError, match="first 4 candidates failed"):
        train.explore(run, "ppo", runs.Log(run, "other.jsonl"), *untrained)
    monkeypatch.setattr(train, "cell_loss", lambda *_: 1 / 0)             # any other error stops at once
    with pytest.raises(RuntimeError, match=r"candidate 3 failed: node0 = sum\(skip\(dec_prev\)"):
        candidate(run, untrained)
    assert not run.path("log.jsonl").exists()


# ---- the search: candidates are not trained here, their rewards are made up

@pytest.fixture
def explored(run, monkeypatch):
    """A function: explores with n candidates in a folder, and gives the log, the controller's file (None for
    random search) and the early stop's running average as train_candidate found it, by candidate. Candidate
    2 fails."""
    averages, halves = {}, [0.5, 0.3, None, 0.9, 0.1, 0.2, 0.4]

    def train_candidate(run, static, meta_train, meta_val, k, genotype, early_stop, entry):
        averages[k] = early_stop.value
        if halves[k] is None:
            raise runs.NotFinite("made up")
        entry.update(reward=sum(genotype.to_tokens()) % 7 / 7, half_reward=halves[k])

    def explored(count, strategy="ppo", folder="one"):
        averages.clear()
        run.folder.joinpath(folder).mkdir(exist_ok=True)
        recipe = dataclasses.replace(run.recipe, search_candidates=count)
        again = runs.Run(run.folder / folder, recipe, device="cpu")
        log = runs.Log(again, "log.jsonl")
        train.explore(again, strategy, log, None, None, None)
        for entry in log.values():
            entry.pop("seconds")
        path = again.path("controller.pt")
        return log, torch.load(path, weights_only=True) if path.exists() else None, dict(averages)

    monkeypatch.setattr(train, "train_candidate", train_candidate)
    run.recipe.controller_lr, run.recipe.controller_rollout = 0.1, 2      # what it learns is seen at once
    return explored


def fresh_controller(run):
    torch.manual_seed(runs.generator(run.recipe.seed, "controller").initial_seed())
    fresh = controller.Controller(run.recipe.cell_layers)
    torch.manual_seed(1)                                  # torch's own generator has no say in its samples
    return fresh


def test_ppo_samples_from_the_controller_that_the_rewards_train_and_random_search_uniformly(run, explored):
    log, _, _ = explored(4)
    first = fresh_controller(run).sample(2, runs.generator(0, "sample", 0))[0]
    untaught = fresh_controller(run).sample(2, runs.generator(0, "sample", 2))[0]
    tokens = [log[k]["tokens"] for k in range(4)]
    assert tokens[:2] == first.tolist() and tokens[2:] != untaught.tolist()
    log, saved, _ = explored(5, "random", "other")
    drawn = [fresh_controller(run).random(2, runs.generator(0, "random", first)) for first in (0, 2, 4)]
    assert [log[k]["tokens"] for k in range(5)] == torch.cat(drawn)[:5].tolist() and saved is None


@pytest.mark.parametrize("rule, before, replay", [("as-in-18", 0.01, 100), ("average", None, 0)])
def test_the_early_stop_and_ppo_learn_once_a_round_and_ppo_from_whole_rounds(
        run, explored, monkeypatch, rule, before, replay):
    """The recipe says which early stop and which PPO."""
    told, r = [], run.recipe

    class Noted(controller.PPO):
        def update(self, tokens, old_log_prob, reward, failed):
            told.append((reward.tolist(), failed.tolist()))
            assert (self.replay, self.epochs, self.entropy_weight, self.clip) == (replay, 3, 0.5, 0.1)
            return super().update(tokens, old_log_prob, reward, failed)

    monkeypatch.setattr(train, "PPO", Noted)
    r.early_stop_rule, r.controller_replay, r.controller_epochs, r.controller_entropy = rule, replay, 3, 0.5
    log, _, averages = explored(5)                                        # the fifth waits for a sixth
    if rule == "average":                                                 # halves .5 .3 | None .9 | .1
        assert [averages[2], averages[4]] == pytest.approx([0.48, 0.522])
    assert averages[0] == averages[1] == before != averages[2] == averages[3] != averages[4]
    assert [failed for _, failed in told] == [[False, False], [True, False]]
    assert sum((reward for reward, _ in told), []) == pytest.approx([log[k]["reward"] for k in range(4)])


@pytest.mark.parametrize("strategy", ["ppo", "random"])
@pytest.mark.parametrize("before, lost", [(3, set()), (6, {1, 2}), (4, {0, 2})], ids=str)
def test_a_search_is_replayed_from_its_log_and_trains_only_what_it_lacks(
        run, explored, strategy, before, lost):
    """Whatever the log of a first call has lost, and at however many candidates that call stopped, all is as
    if six had been wanted at once. Rounds are of two: 3 cut one, which is sampled whole."""
    at_once, saved_at_once, averages_at_once = explored(6, strategy, "at once")
    explored(before, strategy)
    path = run.path("one/log.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for k, line in enumerate(lines) if k not in lost))
    log, saved, averages = explored(6, strategy)
    assert log == at_once and averages.keys() == lost | set(range(before, 6))
    assert averages.items() <= averages_at_once.items()
    if strategy == "ppo":
        assert saved["candidates"] == 6
        torch.testing.assert_close(saved["controller"], saved_at_once["controller"], rtol=0, atol=0)


# ---- Sect. 6, 4.2: which losses and which optimisers

def first_step(monkeypatch, training, *arguments):
    """(loss, optimisers, norm) of a training's first step. Each cross-entropy of labelled pixels is 1."""
    class_weights, seen = torch.ones(1), []

    def update(loss, optimizers, rate, world, norm=0.0):
        seen.extend((float(loss), optimizers, norm))
        assert rate == 1
        raise KeyboardInterrupt

    def cross_entropy(logits, labels, stride, weight):
        assert weight is class_weights and stride == 2 and logits.shape[-1] == labels.shape[-1] / 8
        return (labels != data.IGNORE).any().float()

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "cross_entropy", cross_entropy)
    monkeypatch.setattr(data.Frames, "class_weights", lambda frames, K: class_weights)
    with pytest.raises(KeyboardInterrupt):
        training(*arguments)
    return seen


@pytest.mark.parametrize("name, kinds, cell", [
    ("sgd", ["SGD"], True), ("sgd-adam", ["SGD", "Adam"], False), ("adamw", ["AdamW"], True)])
def test_pretraining_has_two_rates_and_auxiliary_losses(run, monkeypatch, name, kinds, cell):
    run.recipe = dataclasses.replace(
        run.recipe, static_optimizer=name, static_lr_encoder=0.3, static_lr_decoder=0.2, gradient_norm=4.0,
        static_weight_decay=0.1, auxiliary_weight=0.25, auxiliary_cell=cell)
    models = []
    monkeypatch.setattr(run, "to_device", lambda model: models.append(model) or model)
    loss, optimizers, norm = first_step(monkeypatch, train.pretrain, run)
    assert loss == 1 + 0.25 * 3 and norm == 4 and [type(one).__name__ for one in optimizers] == kinds
    groups, (model,) = [group for optimizer in optimizers for group in optimizer.param_groups], models
    assert [group["lr"] for group in groups] == [0.3, 0.2] and groups[0].get("momentum", 0.9) == 0.9
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert [*map(id, groups[0]["params"])] == [*map(id, model.encoder.parameters())]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    assert model.state_dict().keys() == Arch2(6, "cell" if cell else "classifier").state_dict().keys()


@pytest.mark.parametrize("decay, name", [(0.75, "poly"), (0.0, "cosine")])
def test_the_running_mean_of_the_weights_is_kept_at_each_rate(run, monkeypatch, decay, name):
    """mean = d * mean + (1 - d) * weights from the first step on; one weight stands for all."""
    rates, weights, update = [], [], train.update
    run.recipe.static_average, run.recipe.static_rate, run.recipe.static_epochs = decay, name, 2

    def noted(loss, optimizers, rate, world, norm):
        rates.append(rate)
        update(loss, optimizers, rate, world, norm)
        weights.append(optimizers[0].param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(train, "update", noted)
    train.pretrain(run)
    mean, steps = weights[0], np.arange(len(rates))
    for later in weights[1:]:
        mean = decay * mean + (1 - decay) * later
    saved = files.load(run.path("static.pt"))["static"]["encoder.features.0.0.weight"]
    assert (weights[-1] - weights[0]).abs().max() > 1e-3
    torch.testing.assert_close(saved, mean, rtol=0, atol=1e-6)
    left = 1 - steps / len(steps)
    warm = (steps + 1) / 50                               # of the first 50 steps
    expected = left ** 0.9 if name == "poly" else warm * (1 - np.cos(np.pi * left)) / 2
    assert rates == pytest.approx(expected.tolist())


def check_optimizer(optimizer, kind, rate, module):
    """It has the parameters of this module."""
    group, = optimizer.param_groups
    assert isinstance(optimizer, kind) and (group["lr"], group["weight_decay"]) == (rate, 1e-5)
    assert group.get("momentum", 0.9) == 0.9
    torch.testing.assert_close(group["params"], [*module.parameters()], rtol=0, atol=0)


def test_the_cell_alone_is_trained_by_adam_on_every_frame_but_the_first(run, untrained, monkeypatch):
    """Its classifier starts as the static network's."""
    run.save("static", {"static": untrained[0]}, history=[])
    network = Network("y", "", GENOTYPE)
    loss, (adam,), norm = first_step(monkeypatch, train.finetune_cells, run, [network])
    assert loss == 2 and norm == 0
    torch.manual_seed(runs.generator(run.recipe.seed, "y").initial_seed())
    check_optimizer(adam, torch.optim.Adam, run.recipe.cell_lr, make_cell(GENOTYPE, untrained[0]))


@pytest.mark.parametrize("with_cell, blank", [(True, 0), (True, 1), (False, 0), (False, 1)])
def test_end_to_end_is_by_two_optimisers_on_every_frame(run, untrained, monkeypatch, with_cell, blank):
    """The baseline has no cell. The cell starts as it was trained alone. Where the key frame has no label
    (blank), as in CityScapes, the static network's prediction of the last frame counts."""
    static, cell, augment = untrained[0], make_cell(GENOTYPE, untrained[0]), data.augment
    run.save("static", {"static": static}, history=[])
    run.save("x-alone", {"cell": cell}, history=[])

    def augment_and_blank(*arguments):
        images, labels = augment(*arguments)
        labels[:, :blank] = data.IGNORE
        return images, labels

    monkeypatch.setattr(data, "augment", augment_and_blank)
    network = Network("x", "", GENOTYPE if with_cell else None)
    loss, (sgd, *adams), norm = first_step(monkeypatch, train.finetune_end_to_end, run, network)
    assert loss == (3 if with_cell else 3 - blank) and norm == 0 and len(adams) == with_cell
    check_optimizer(sgd, torch.optim.SGD, run.recipe.end_lr_static, static)
    for adam in adams:
        check_optimizer(adam, torch.optim.Adam, run.recipe.end_lr_cell, cell)


def test_end_to_end_the_static_network_learns_but_its_batch_norms_keep_their_statistics(smoke):
    before = files.load(smoke / "static.pt")["static"]
    for name in ("baseline", "cell-0"):
        after = files.load(smoke / f"{name}.pt")["static"]
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert "classifier.bias" in changed and not [key for key in changed if "running" in key]
        assert any(key.startswith("encoder.") for key in changed)


# ---- evaluation

class Answers:
    """A 'network' that answers with label maps made before, and notes which frames were key frames and which
    were segmented in float32."""

    cell = "a cell"

    def __init__(self, maps):
        self.maps, self.key_frames, self.precise = iter(maps), [], []

    def segment(self, image, state):
        self.key_frames.append(state is None)
        self.precise.append(not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32))
        return next(self.maps), "state"


@pytest.fixture
def answered(run, monkeypatch):
    """A function: evaluates made-up answers on test, two clips of four frames."""
    monkeypatch.setattr(train, "fold_batchnorm", lambda video: types.SimpleNamespace(to=lambda **_: video))
    return lambda answers, every=0: train.evaluate_video(run, "answers", answers, "test", every)


def test_an_evaluation_scores_every_frame_of_every_clip_and_its_consistency(run, answered):
    labels = run.frames("test").labels
    maps = [label.clone() for label in labels]
    maps[5] = torch.zeros_like(labels[5])                                 # one wrong frame of eight
    confusion, steady = data.Confusion(run.num_classes), data.Consistency(3)
    for pred, label in zip(maps, labels):
        confusion.update(pred, label)
    for first in (0, 1, 4, 5):                                            # three in a row, never across clips
        steady.update(maps[first:first + 3], labels[first:first + 3])
    scores, expected = answered(Answers(maps)), confusion.scores()
    assert scores["miou"] == expected["miou"] < 1 and scores["consistency"] == steady.score() < 1
    assert scores["iou"] == dict(zip(data.Synthetic.classes, expected.iou))


def test_key_frames_are_the_first_of_a_clip_and_every_nth(run, answered):
    """In float32, also where training has rounded more. A frame without a label hands on its state, too."""
    frames = run.frames("test")
    frames.list[1] = frames.list[1]._replace(label=None)
    for every, expected in ((0, [0, 4]), (1, [*range(8)]), (3, [0, 3, 4, 7])):
        answers = Answers(frames.labels)
        with tf32(True):                                                  # as in a training
            answered(answers, every)
            assert answers.precise == [True] * 8 and torch.backends.cuda.matmul.allow_tf32
        assert [k for k, key_frame in enumerate(answers.key_frames) if key_frame] == expected


# ---- another static network

@pytest.mark.parametrize("network", [Plain, Arch2Quarter])
def test_another_static_network_goes_through_all_stages(network, tmp_path, small, monkeypatch):
    """Sect. 3.1: the method is not tied to a concrete architecture. Plain has other widths than arch2, and
    arch2-quarter predicts at 1/4, with layer1."""
    monkeypatch.setitem(dyncell.STATICS, network.name, network)
    run, names = tmp_path / "run", {"static", "baseline", "cell-0", "cell-decoder"}
    train.main([*ARGUMENTS, "--static-network", network.name, "--encoder-weights", "none", "--run", str(run),
                "--search-strategy", "ppo", "--cell", "decoder"])
    assert {row["name"] for row in json.loads((run / "results.json").read_text())["rows"]} >= names
    for name in names:
        video = VideoSegmenter.load(run / f"{name}.pt")
        labels, _ = video.segment(torch.zeros(48, 64, 3, dtype=torch.uint8))
        assert type(video.static) is network and labels.shape == (48, 64)
