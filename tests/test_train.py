"""train.py, in its order: the recipe, a training's step, stored outputs, a candidate, the search, evaluation.

How trainings are stopped and continued is tested in util/test_runs.py, the flags in util/test_options.py.
"""
import dataclasses
import json
import math

import pytest
import torch
from whole_run import calibrated, make_small, small, smoke

import controller
import data
import ops
import train
from dyncell import Arch2, Genotype, VideoSegmenter
from train import Recipe, StaticOutputs, recipe_for, roll
from util import runs

meta_split = getattr(train, "meta_split", None) or data.meta_split


# ---- the recipe

@pytest.mark.parametrize("dataset, figures", [
    ("camvid", dict(
        static_epochs=2000, static_batch=32, static_crop=(600, 600), static_scale=(0.5, 2.0),     # Sect. 6
        static_lr_encoder=0.05, static_lr_decoder=0.01, momentum=0.9, auxiliary_weight=0.3,
        sequence_length=3, input_crop=600, input_pad=400, input_longer_side=0, meta_val_share=0.1,    # 4.1
        search_candidates=1000, search_epochs=20, search_batch=48, cell_lr=0.008, controller_lr=0.0001,
        cell_layers=5, early_stop=True, search_strategy="ppo",                        # 3.2, 3.3
        controller_clip=0.1, controller_baseline_decay=0.95,                          # [18]
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


def test_the_defaults_of_the_flags_are_the_papers_for_camvid():
    assert recipe_for("camvid", "paper") == Recipe()


def test_ones_own_dataset_needs_no_schedule():
    assert recipe_for("mine", "short") == dataclasses.replace(recipe_for("camvid", "short"), dataset="mine")


def test_the_controller_knows_how_many_operations_there_are():
    """controller.py imports nothing of ours, so it has the counts as defaults."""
    rng = torch.Generator().manual_seed(0)
    tokens = controller.Controller(5).random(500, rng).reshape(-1, 5)     # loc1, loc2, op1, op2, agg
    assert tokens[:, 2:4].max() == len(ops.OPERATIONS) - 1
    assert tokens[:, 4].max() == len(ops.AGGREGATIONS) - 1


# ---- a step

def test_cross_entropy_is_the_mean_over_the_labelled_pixels_at_the_centres():
    labels = torch.full((1, 16, 16), data.IGNORE, dtype=torch.uint8)
    labels[0, 4, 4], labels[0, 4, 12] = 1, 0                              # centres of the two upper logits
    labels[0, 0, 0] = 2                                                   # nobody's centre
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(1)
    expected = -(log_p[0, 1, 0, 0] + log_p[0, 0, 0, 1]) / 2
    assert train.cross_entropy(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert train.cross_entropy(logits, torch.full_like(labels, data.IGNORE)).item() == 0


def test_an_update_steps_every_optimiser_at_the_poly_rate():
    """Sect. 6: lr * (1 - step / steps) ** power. The gradient is 1 here, so a step's length is the rate."""
    fast, slow = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizers = [torch.optim.SGD([fast], lr=0.4), torch.optim.SGD([slow], lr=0.1)]
    where = [0.0]
    for step in range(4):
        train.update(fast.sum() + slow.sum(), optimizers, step / 4, 0.5)
        where.append(-fast.item())
    steps = [after - before for before, after in zip(where, where[1:])]
    assert steps == pytest.approx([0.4, 0.4 * 0.75 ** 0.5, 0.4 * 0.5 ** 0.5, 0.4 * 0.25 ** 0.5])
    assert slow.item() == pytest.approx(fast.item() / 4)


# ---- Sect. 4.1: what a search is given

@pytest.fixture
def run(tmp_path, small):
    """Few, tiny synthetic videos."""
    recipe = recipe_for("synthetic", "smoke", search_batch=2, search_epochs=2)
    return runs.Run(tmp_path, recipe, device="cpu")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """(static, stored outputs, meta-train, meta-val) of the run above, made once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        run = runs.Run(tmp_path_factory.mktemp("untrained"), recipe_for("synthetic", "smoke"), device="cpu")
        torch.manual_seed(0)
        images, _ = train.prepare(run, "train", torch.arange(8))
        static = calibrated(run.to_device(Arch2(run.num_classes)), images)
        stored = StaticOutputs(run, static)
        windows = run.frames("train").windows(3)
        return static, stored, *meta_split(windows, 0.2, torch.Generator().manual_seed(0))


def test_meta_train_and_meta_val_share_no_frame():
    windows = torch.arange(100)[:, None] + torch.arange(3)
    for seed in range(20):
        meta_train, meta_val = meta_split(windows, 0.1, torch.Generator().manual_seed(seed))
        assert not torch.isin(meta_train, meta_val).any()
        assert 10 <= len(meta_val) <= 20
        assert len(meta_train) >= 100 - len(meta_val) - 8                 # few are in neither


def test_too_few_sequences_for_a_search_are_refused():
    with pytest.raises(data.InputError, match="3 sequences are too few for a search"):
        meta_split(torch.arange(3)[:, None] + torch.arange(3), 0.1, torch.Generator())


def test_the_frames_of_a_search_are_resized_cropped_at_the_centre_and_padded(run):
    (image, label), number = run.frames("train")[5], torch.tensor([5])    # 48 x 64
    run.recipe.input_crop, run.recipe.input_pad = 40, 56
    images, labels = train.prepare(run, "train", number)
    assert images.shape == (1, 3, 56, 40) and labels.shape == (1, 56, 40)
    assert torch.equal(images[0, :, 8:48], data.normalise(image)[:, 4:44, 12:52])
    assert torch.equal(labels[0, 8:48], label[4:44, 12:52])
    assert images[0, :, :8].abs().max() == 0 and (labels[0, :8] == data.IGNORE).all()
    run.recipe.input_crop, run.recipe.input_pad, run.recipe.input_longer_side = 600, 0, 32
    images, labels = train.prepare(run, "train", number)
    assert images.shape == (1, 3, 24, 32)
    assert set(labels.unique().tolist()) <= set(label.unique().tolist())


LAYERS = "layer2", "layer3", "layer4", "dec"


def say(run, static, images):
    """{name: what the static network says of these images}"""
    with torch.no_grad(), run.autocast():
        features = static.encode(images)
        dec, _ = static.decode(features)
    return dict(zip(LAYERS, (*features[1:], dec)))


def close(a, b):
    """To half precision and bf16."""
    return (a - b).norm() < 0.03 * b.norm()


def test_stored_outputs_are_what_the_static_network_says(run, untrained):
    static, stored, *_ = untrained
    images, labels = train.prepare(run, "train", torch.tensor([7]))
    for name, x in say(run, static, images).items():
        assert close(stored(name, torch.tensor([7])), x)
        assert not close(stored(name, torch.tensor([6])), x)
    assert torch.equal(stored.labels[7], labels[0])


def test_mirror_images_are_stored_after_all_others(run, untrained):
    static, plain, *_ = untrained
    both, k = StaticOutputs(run, static, mirrored=True), torch.tensor([3])
    images, _ = train.prepare(run, "train", k)
    assert torch.equal(both.labels[both.count + k], plain.labels[k].flip(-1))
    for name, x in say(run, static, images.flip(-1)).items():
        assert close(both(name, both.count + k), x)
        assert torch.equal(both(name, k), plain(name, k))


def test_stored_outputs_are_rolled_as_a_video_is(run, untrained):
    """Two places roll a cell over frames, train.roll and VideoSegmenter: they give the same logits."""
    static, stored, *_ = untrained
    genotype = Genotype([("layer4_prev", "dec_prev", "conv1x1", "sep3x3", "concat"),
                         ("node0", "layer2", "skip", "conv3x3", "sum"),
                         ("layer3", "layer4", "conv1x1", "conv1x1", "sum")])          # all five inputs
    cell = train.new_cell(run, static, genotype, runs.generator(0)).eval()
    window = torch.arange(4)[None]
    images, _ = train.prepare(run, "train", window[0])
    with torch.no_grad(), run.autocast():
        expected = VideoSegmenter(static, cell).eval()(images[None])[0]   # (4, C, h, w)
        rolled = roll(cell, stored, window)
        other = roll(cell, stored, torch.tensor([[1, 1, 2, 3]]))          # another past
    assert len(rolled) == 3
    for pred, wanted in zip(rolled, expected[1:]):
        assert close(pred[0].float(), wanted.float())
    assert not close(other[0][0].float(), expected[1].float())


def test_dropout_zeroes_whole_channels_of_all_that_a_cell_sees(untrained):
    _, stored, *_ = untrained
    seen = []

    def cell(*inputs):
        seen.extend(inputs)
        return inputs[1], inputs[1]

    window = torch.arange(6)[:, None] + torch.arange(2)                   # (6, 2)
    plain = [stored(name, window[:, t]) for name, t in
             (("layer4", 0), ("dec", 0), ("layer2", 1), ("layer3", 1), ("layer4", 1))]
    roll(cell, stored, window)
    assert all(torch.equal(a, b) for a, b in zip(seen, plain))
    seen.clear()
    torch.manual_seed(0)
    roll(cell, stored, window, dropout=0.25)
    for x, dropped in zip(plain, seen):
        gone = (dropped == 0).flatten(2).all(2)                           # (6, C)
        silent = (x == 0).flatten(2).all(2)
        kept = ~gone[..., None, None].expand_as(x)
        assert torch.equal(dropped[kept], (x * (1 / 0.75))[kept])
        assert 0.1 < (gone & ~silent).sum() / (~silent).sum() < 0.4


def test_a_sequences_loss_is_the_sum_over_its_frames_after_the_first(run, untrained):
    static, stored, *_ = untrained
    cell = train.new_cell(run, static, GENOTYPE, runs.generator(0)).eval()
    window = torch.arange(3)[None]
    with torch.no_grad(), run.autocast():
        logits = roll(cell, stored, window)
    expected = sum(train.cross_entropy(logits[t - 1], stored.labels[t][None]) for t in (1, 2))
    assert train.cell_loss(run, cell, stored, window).item() == pytest.approx(expected.item(), rel=1e-4)


# ---- Sect. 3.3: a candidate

GENOTYPE = Genotype([("dec_prev", "layer2", "skip", "conv1x1", "sum")])


def candidate(run, untrained, k=3, average=None):
    """The log's entry of candidate k."""
    static, stored, meta_train, meta_val = untrained
    run.path("log.jsonl").unlink(missing_ok=True)
    with run.log("log.jsonl").candidate(k, GENOTYPE) as entry:
        train.train_candidate(run, static, stored, k, GENOTYPE, meta_train, meta_val, average, entry)
    entry.pop("seconds")
    return entry


def test_a_candidate_can_be_made_again_and_another_number_is_another_one(run, untrained):
    first, again, other = (candidate(run, untrained, k) for k in (3, 3, 4))
    assert first == again and first["reward"] != other["reward"]
    assert first["status"] == "ok" and not first["stopped"]


def test_a_reward_is_the_geometric_mean_of_three_scores(run, untrained):
    entry = candidate(run, untrained)
    product = entry["miou"] * entry["fwiou"] * entry["macc"]
    assert 0 < entry["reward"] < 1 and entry["reward"] == pytest.approx(product ** (1 / 3))


def test_a_candidate_is_trained_on_meta_train_and_scored_on_meta_val_half_way_and_at_the_end(
        run, untrained, monkeypatch):
    _, _, meta_train, meta_val = untrained
    score, cell_loss, seen = train.score, train.cell_loss, []

    def noted_score(run, cell, stored, windows, *more):
        assert torch.equal(windows, meta_val)
        seen.append("scored")
        return score(run, cell, stored, windows, *more)

    def noted_loss(run, cell, stored, window, *more):
        assert cell.training and all(frames in meta_train.tolist() for frames in window.tolist())
        seen.append("trained")
        return cell_loss(run, cell, stored, window, *more)

    monkeypatch.setattr(train, "score", noted_score)
    monkeypatch.setattr(train, "cell_loss", noted_loss)
    run.recipe.search_epochs = 4
    candidate(run, untrained)
    steps = len(seen) - 2
    half = ["trained"] * (steps // 2) + ["scored"]
    assert steps > 2 and steps % 2 == 0 and seen == 2 * half


def test_a_candidate_learns(run, untrained):
    static, stored, meta_train, _ = untrained
    run.recipe.early_stop, run.recipe.search_epochs = False, 12
    short = candidate(run, (static, stored, meta_train, meta_train))
    run.recipe.search_epochs = 40
    longer = candidate(run, (static, stored, meta_train, meta_train))
    assert longer["reward"] > short["reward"] + 0.05


@pytest.mark.parametrize("average, stopped", [(0.99, True), (0.0001, False), (None, False)])
def test_a_candidate_below_the_running_average_is_stopped_half_way(run, untrained, average, stopped):
    entry = candidate(run, untrained, average=average)
    assert entry["stopped"] == stopped and entry["half_reward"] > 0
    assert (entry["reward"] == entry["half_reward"]) == stopped


@pytest.mark.parametrize("changes", [{"early_stop": False}, {"search_epochs": 1, "search_batch": 1000}])
def test_without_early_stop_or_with_one_step_nothing_is_stopped(run, untrained, changes):
    run.recipe = dataclasses.replace(run.recipe, **changes)
    entry = candidate(run, untrained, average=0.99)
    assert not entry["stopped"] and entry["half_reward"] is None


def test_latency_is_a_factor_of_the_reward(run, untrained):
    """Sect. 1's outlook: reward * (time / target) ** -W."""
    plain = candidate(run, untrained)
    run.recipe.latency_weight, run.recipe.latency_target = 0.5, 0.001     # a microsecond: all are too slow
    slow = candidate(run, untrained)
    factor = (slow["ms"] / 0.001) ** -0.5
    assert "ms" not in plain and slow["ms"] > 0 and slow["miou"] == plain["miou"]
    assert slow["reward"] == pytest.approx(plain["reward"] * factor)
    assert slow["half_reward"] == pytest.approx(plain["half_reward"] * factor)
    run.recipe.latency_target = 0.0                                       # the time of arch2's decoder
    assert candidate(run, untrained)["reward"] > slow["reward"]


@pytest.mark.parametrize("error, status", [
    (None, "not finite"),
    (torch.OutOfMemoryError("full"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (MemoryError(), "out of memory")])
def test_a_candidate_that_fails_gets_no_reward_and_is_logged(run, untrained, monkeypatch, error, status):
    def cell_loss(run, cell, *_):
        if error:
            raise error
        return next(cell.parameters()).sum() * math.inf

    monkeypatch.setattr(train, "cell_loss", cell_loss)
    entry = candidate(run, untrained)
    line, = (json.loads(line) for line in run.path("log.jsonl").read_text().splitlines())
    assert (entry["status"], entry["reward"], entry["half_reward"]) == (status, 0, None)
    assert line["status"] == status and line["tokens"] == GENOTYPE.to_tokens()


def test_any_other_error_stops_the_search_and_names_the_genotype(run, untrained, monkeypatch):
    monkeypatch.setattr(train, "cell_loss", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"candidate 3 failed: node0 = sum\(skip\(dec_prev\)"):
        candidate(run, untrained)
    assert not list(run.folder.glob("*.jsonl"))


# ---- the search: candidates are not trained here, their rewards are made up

@pytest.fixture
def explored(run, monkeypatch):
    """A function: explores with n candidates in a folder, and gives the log, the controller's file (None for
    random search) and what train_candidate was given as running average, by candidate."""
    averages, halves = {}, [0.5, 0.3, None, 0.9, 0.1, 0.2, 0.4]

    def train_candidate(run, static, stored, k, genotype, meta_train, meta_val, average, entry):
        averages[k] = average
        entry.update(reward=sum(genotype.to_tokens()) % 7 / 7, half_reward=halves[k])

    def explored(count, strategy="ppo", folder="one"):
        averages.clear()
        run.folder.joinpath(folder).mkdir(exist_ok=True)
        recipe = dataclasses.replace(run.recipe, search_candidates=count)
        again = runs.Run(run.folder / folder, recipe, device="cpu")
        again._frames = run._frames
        train.explore(again, strategy, again.log("log.jsonl"), None, None)
        log = runs.read_log(again.path("log.jsonl"))
        for entry in log.values():
            entry.pop("seconds")
        path = again.path("controller.pt")
        return log, torch.load(path, weights_only=True) if path.exists() else None, dict(averages)

    monkeypatch.setattr(train, "train_candidate", train_candidate)
    run.recipe.controller_lr, run.recipe.controller_rollout = 0.1, 2      # what it learns is seen at once
    return explored


def tokens_of(log):
    return torch.tensor([log[k]["tokens"] for k in sorted(log)])


def fresh_controller(run):
    torch.manual_seed(runs.generator(run.recipe.seed, "controller").initial_seed())
    return controller.Controller(run.recipe.cell_layers)


def test_ppo_samples_its_candidates_from_the_controller_that_their_rewards_train(run, explored):
    log, _, _ = explored(4)
    first = fresh_controller(run).sample(2, runs.generator(0, "sample", 0))[0]
    untaught = fresh_controller(run).sample(2, runs.generator(0, "sample", 2))[0]
    assert torch.equal(tokens_of(log)[:2], first) and not torch.equal(tokens_of(log)[2:], untaught)


def test_random_search_draws_every_token_uniformly(run, explored):
    log, saved, _ = explored(5, "random")
    drawn = [fresh_controller(run).random(2, runs.generator(0, "random", first)) for first in (0, 2, 4)]
    assert torch.equal(tokens_of(log), torch.cat(drawn)[:5]) and saved is None


def test_the_running_average_of_the_early_stop_moves_once_a_round(explored):
    _, _, averages = explored(5)                                          # halves .5 .3 | None .9 | .1
    second, third = pytest.approx(0.48), pytest.approx(0.522)
    assert averages == {0: None, 1: None, 2: second, 3: second, 4: third}


@pytest.mark.parametrize("strategy", ["ppo", "random"])
@pytest.mark.parametrize("before", [2, 3, 4])
def test_a_finished_search_goes_on_to_more_candidates(explored, strategy, before):
    """Rounds are of two: 3 cut one, which is sampled whole. All is as if 6 had been wanted at once."""
    explored(before, strategy)
    log, saved, averages = explored(6, strategy)
    at_once, saved_at_once, averages_at_once = explored(6, strategy, "other")
    assert log == at_once and list(averages) == list(range(before, 6))
    assert averages.items() <= averages_at_once.items()
    if strategy == "ppo":
        assert saved["candidates"] == 6
        for key, value in saved["controller"].items():
            assert torch.equal(value, saved_at_once["controller"][key])


def test_the_controller_learns_from_whole_rounds_only(explored):
    _, two, _ = explored(2)
    _, three, _ = explored(3)
    _, four, _ = explored(4)
    weights = [saved["controller"]["embed.weight"] for saved in (two, three, four)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("lost", [{0}, {1, 2}, {3, 4, 5}, set(range(6))])
def test_a_search_is_replayed_from_its_log_and_trains_only_what_it_lacks(run, explored, lost):
    whole, saved, _ = explored(6)
    path = run.path("one/log.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for k, line in enumerate(lines) if k not in lost))
    again, saved_again, averages = explored(6)
    assert again == whole and averages.keys() == lost
    for key, value in saved["controller"].items():
        assert torch.equal(value, saved_again["controller"][key])


# ---- Sect. 6, 4.2: which losses and which optimisers

class FirstStep(Exception):
    """Carries the loss and the optimisers out of a training."""


def first_step(monkeypatch, training, *arguments):
    """(loss, optimisers) of a training's first step. Each cross-entropy is 1."""
    def update(loss, optimizers, *_):
        raise FirstStep(float(loss), optimizers)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "cross_entropy", lambda *_: torch.ones(()))
    with pytest.raises(FirstStep) as caught:
        training(*arguments)
    return caught.value.args


def same_parameters(group, parameters):
    return {id(p) for p in group["params"]} == {id(p) for p in parameters}


def test_pretraining_is_by_sgd_with_two_rates_and_auxiliary_losses(run, monkeypatch):
    run.recipe.auxiliary_weight, run.recipe.static_lr_encoder, run.recipe.static_lr_decoder = 0.25, 0.3, 0.2
    loss, (optimizer,) = first_step(monkeypatch, train.pretrain, run)
    auxiliary = len(Arch2(6, auxiliary=True).forward_auxiliary(torch.zeros(2, 3, 32, 32))[1])
    assert auxiliary > 0 and loss == 1 + 0.25 * auxiliary
    encoder, decoder = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD) and (encoder["lr"], decoder["lr"]) == (0.3, 0.2)
    assert encoder["momentum"] == decoder["momentum"] == 0.9
    counts = [sum(p.numel() for p in group["params"]) for group in (encoder, decoder)]
    whole = Arch2(6, auxiliary=True)
    assert counts[0] == sum(p.numel() for p in whole.encoder.parameters())
    assert sum(counts) == sum(p.numel() for p in whole.parameters())


def test_the_cell_alone_is_trained_by_adam_on_every_frame_but_the_first(run, untrained, monkeypatch):
    static, stored, *_ = untrained
    cell = train.new_cell(run, static, GENOTYPE, runs.generator(0))
    loss, (optimizer,) = first_step(monkeypatch, train.finetune_cell, run, "x-alone", cell, stored, {})
    group, = optimizer.param_groups
    assert loss == 2 and isinstance(optimizer, torch.optim.Adam) and group["lr"] == run.recipe.cell_lr
    assert same_parameters(group, cell.parameters())


@pytest.mark.parametrize("with_cell", [True, False])
def test_end_to_end_is_by_two_optimisers_on_every_frame(run, untrained, monkeypatch, with_cell):
    """The baseline has no cell."""
    static = untrained[0]
    cell = train.new_cell(run, static, GENOTYPE, runs.generator(0)) if with_cell else None
    video = VideoSegmenter(static, cell)
    loss, optimizers = first_step(monkeypatch, train.finetune_end_to_end, run, "x", video, {})
    sgd, adam = optimizers[0], optimizers[1:]
    assert loss == 3 and isinstance(sgd, torch.optim.SGD) and len(adam) == with_cell
    assert sgd.param_groups[0]["lr"] == run.recipe.end_lr_static
    assert same_parameters(sgd.param_groups[0], static.parameters())
    if with_cell:
        group, = adam[0].param_groups
        assert isinstance(adam[0], torch.optim.Adam) and group["lr"] == run.recipe.end_lr_cell
        assert same_parameters(group, cell.parameters())


def test_end_to_end_the_static_network_learns_but_its_batch_norms_keep_their_statistics(smoke):
    before = runs.load(smoke / "static.pt")["static"]
    for name in ("baseline", "cell-0", "random-0"):
        after = runs.load(smoke / f"{name}.pt")["static"]
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert "classifier.bias" in changed and not [key for key in changed if "running" in key]
        assert any(key.startswith("encoder.") for key in changed)


# ---- evaluation

class Answers:
    """A 'network' that answers with label maps made before, and notes on which frames it had no past."""

    def __init__(self, maps):
        self.maps, self.k, self.key_frames = maps, -1, []

    def segment(self, image, state):
        self.k += 1
        if state is None:
            self.key_frames.append(self.k)
        return self.maps[self.k], "state"

    def to(self, **_):
        return self


@pytest.fixture
def answered(run, monkeypatch):
    """A function: evaluates made-up answers on test, two clips of four frames."""
    monkeypatch.setattr(train, "fold_batchnorm", lambda video: video)
    return lambda answers, every=0: train.evaluate_video(run, answers, "test", every)


def test_an_evaluation_scores_every_frame_of_every_clip_and_its_consistency(run, answered):
    labels = run.frames("test").labels
    scores = answered(Answers(list(labels)))
    assert scores["miou"] == scores["fwiou"] == scores["macc"] == 1 and scores["consistency"] == 1
    assert list(scores["iou"]) == data.Synthetic.classes

    maps = [label.clone() for label in labels]
    maps[5] = torch.zeros_like(labels[5])                                 # one wrong frame of eight
    confusion, steady = data.Confusion(run.num_classes), data.Consistency(3)
    for pred, label in zip(maps, labels):
        confusion.update(pred, label)
    for first in (0, 1, 4, 5):                                            # three in a row, never across clips
        steady.update(maps[first:first + 3], labels[first:first + 3])
    scores = answered(Answers(maps))
    _, miou, fwiou, macc, _ = confusion.scores()
    assert (scores["miou"], scores["fwiou"], scores["macc"]) == (miou, fwiou, macc) and miou < 1
    assert scores["consistency"] == steady.score() < 1


@pytest.mark.parametrize("every, expected", [
    (0, [0, 4]), (1, list(range(8))), (3, [0, 3, 4, 7]), (9, [0, 4])])
def test_key_frames_are_the_first_of_a_clip_and_every_nth(run, answered, every, expected):
    answers = Answers(list(run.frames("test").labels))
    answered(answers, every)
    assert answers.key_frames == expected
