"""train.py: the recipe against the paper, training loops that resume, the search's rules, the command line, a whole run."""
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import controller
import data
import ops
import train
from data import InputError
from dyncell import Arch2, Genotype, VideoSegmenter
from train import Recipe, Run, recipe_for

ROOT = pathlib.Path(train.__file__).parent


# ---- the recipe

def test_paper_recipe_for_camvid():
    """Every figure of PAPER.md's Sect. 3.3, 4.1, 4.2 and 6, written out by hand."""
    r = recipe_for("camvid", "paper")
    assert (r.static_epochs, r.static_batch, r.static_crop, r.static_scale) == (2000, 32, (600, 600), (0.5, 2.0))
    assert (r.static_lr_encoder, r.static_lr_decoder, r.momentum, r.auxiliary_weight, r.poly_power) == (0.05, 0.01, 0.9, 0.3, 0.9)
    assert (r.sequence_length, r.input_crop, r.input_pad, r.input_longer_side) == (3, 600, 400, 0)
    assert (r.cell_layers, r.meta_val_share, r.search_candidates) == (5, 0.1, 1000)
    assert (r.search_epochs, r.search_batch, r.cell_lr, r.early_stop) == (20, 48, 0.008, True)
    assert (r.controller_lr, r.controller_clip, r.controller_baseline_decay) == (0.0001, 0.1, 0.95)
    assert (r.cells, r.cell_epochs, r.cell_batch) == (2, 10, 16)
    assert (r.end_epochs, r.end_lr_cell, r.end_lr_static, r.end_crop) == (100, 0.004, 0.0005, (400, 480))


def test_paper_recipe_for_cityscapes():
    r = recipe_for("cityscapes", "paper")
    assert (r.static_epochs, r.static_batch, r.static_crop, r.static_scale) == (1000, 28, (800, 800), (0.5, 2.0))
    assert (r.sequence_length, r.input_longer_side, r.input_crop) == (2, 1024, 512)
    assert (r.cell_layers, r.search_epochs, r.search_batch, r.cell_lr) == (4, 10, 48, 0.008)
    assert (r.cell_epochs, r.end_epochs, r.cell_batch, r.end_crop) == (200, 200, 16, (769, 769))


def test_default_schedules():
    camvid, _ = train.settle_recipe(pathlib.Path("nowhere"), None, {"dataset": "camvid"}), None
    assert camvid == recipe_for("camvid", "paper") == Recipe()
    assert train.settle_recipe(pathlib.Path("nowhere"), None, {}) == recipe_for("synthetic", "short")


def test_controller_and_tables_agree():
    """controller.py imports nothing of ours, so it has the counts as defaults."""
    tokens = controller.Controller(5).random(500, torch.Generator().manual_seed(0)).reshape(-1, 5)
    assert tokens[:, 2:4].max() == len(ops.OPERATIONS) - 1 and tokens[:, 4].max() == len(ops.AGGREGATIONS) - 1


# ---- loops

def test_poly_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    rates = []
    for step in range(4):
        train.poly([optimizer], step, 4, 0.5)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.4 * 0.75 ** 0.5, 0.4 * 0.5 ** 0.5, 0.2])


def test_cross_entropy_is_the_mean_over_labelled_pixels_nearest_the_centre():
    labels = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    labels[0, 4, 4], labels[0, 4, 12], labels[0, 0, 0] = 1, 0, 2          # the last one is nobody's centre
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(1)
    assert train.cross_entropy(logits, labels).item() == pytest.approx(-(log_p[0, 1, 0, 0] + log_p[0, 0, 0, 1]).item() / 2, rel=1e-5)
    assert train.cross_entropy(logits, torch.full_like(labels, 255)).item() == 0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A smoke run on few, short synthetic videos."""
    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (6, 6), "val": (1, 4), "test": (2, 4)})
    recipe = recipe_for("synthetic", "smoke", search_batch=4, search_epochs=2)
    return Run(tmp_path, recipe, device="cpu")


@pytest.mark.parametrize("stop_at", [1, 5, 8, 11])
def test_a_stopped_training_ends_with_the_same_weights(run, monkeypatch, stop_at):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    x, y = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9.0)[:, None]

    def go(name, stop_at=None):
        torch.manual_seed(0)
        model, calls = torch.nn.Linear(4, 1), [0]

        def loss_of(indices, rng):
            calls[0] += 1
            if calls[0] == stop_at:
                raise KeyboardInterrupt
            inputs = torch.nn.functional.dropout(x[indices], 0.2) + torch.randn(1, generator=rng)       # both generators
            return ((model(inputs) - y[indices]) ** 2).mean()

        history = train.fit(run, name, model, [torch.optim.Adam(model.parameters(), lr=0.1)], 3, 9, 2, loss_of)
        return model.weight.detach(), [entry["loss"] for entry in history]

    whole = go("training")
    run.path("training.partial.pt").unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):
        go("training", stop_at)
    again = go("training")
    assert torch.equal(whole[0], again[0]) and whole[1] == again[1]


def test_a_loss_that_is_not_finite_stops_a_training(run):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="the loss is nan"):
        train.fit(run, "x", model, [torch.optim.SGD(model.parameters(), lr=1)], 1, 2, 1, lambda i, rng: model.weight.sum() * float("nan"))


# ---- the search

def test_meta_split_is_disjoint_in_frames():
    windows = torch.arange(100)[:, None] + torch.arange(3)
    for seed in range(20):
        a, b = train.meta_split(windows, 0.1, torch.Generator().manual_seed(seed))
        assert not torch.isin(a, b).any() and 10 <= len(b) <= 20 and len(a) >= 100 - len(b) - 8


@pytest.fixture
def parts(run):
    torch.manual_seed(0)
    static = run.to_device(Arch2(run.num_classes))
    for module in static.modules():          # real statistics: with the initial ones layer4 is below half precision
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    static(run.prepared("train", torch.arange(8))[0])
    static.eval()
    cache = train.Cache(run, static)
    return static, cache, *train.meta_split(run.frames("train").windows(3), 0.2, torch.Generator().manual_seed(0))


GENOTYPE = Genotype([("dec_prev", "layer2", "skip", "conv1x1", "sum")])


def test_cache_holds_what_the_static_network_says(run, parts):
    static, cache, *_ = parts
    images, labels = run.prepared("train", torch.tensor([7]))
    with torch.no_grad(), run.autocast():
        features = static.encode(images)
        dec, _ = static.decode(features)
    for name, x in zip(cache.LAYERS, (*features[1:], dec)):
        assert (cache(name, torch.tensor([7])) - x).norm() < 0.03 * x.norm()                     # another batch, then half
    assert torch.equal(cache.labels[7], labels[0])


def test_a_candidate_learns_and_is_reproducible(run, parts):
    a, b = (train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], None) for _ in range(2))
    other = train.try_candidate(run, *parts[:1], GENOTYPE, 4, *parts[1:], None)
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert a["reward"] > 0 and a["status"] == "ok" and not a["stopped"] and a["reward"] != other["reward"]
    assert a["reward"] == pytest.approx((a["miou"] * a["fwiou"] * a["macc"]) ** (1 / 3))


def test_an_unpromising_candidate_is_stopped_half_way(run, parts):
    entry = train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], average=0.99)
    assert entry["stopped"] and entry["reward"] == entry["half_reward"] < 0.99
    run.recipe.early_stop = False
    entry = train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], average=0.99)
    assert not entry["stopped"] and entry["half_reward"] is None
    run.recipe.early_stop, run.recipe.search_epochs, run.recipe.search_batch = True, 1, 1000        # one step has no half
    entry = train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], average=0.99)
    assert not entry["stopped"] and entry["half_reward"] is None


def test_latency_in_the_reward(run, parts):
    """Sect. 1's outlook: reward x (time / target) ** -W."""
    plain = train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], None)
    run.recipe.latency_weight, run.recipe.latency_target = 0.5, 0.001     # a thousandth of a millisecond: all are far too slow
    slow = train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], None)
    assert slow["ms"] > 0 and "ms" not in plain and slow["miou"] == plain["miou"]
    assert slow["reward"] == pytest.approx(plain["reward"] * (slow["ms"] / 0.001) ** -0.5)
    assert slow["half_reward"] == pytest.approx(plain["half_reward"] * (slow["ms"] / 0.001) ** -0.5)
    run.recipe.latency_target = 0.0          # the time of arch2's decoder
    assert train.try_candidate(run, *parts[:1], GENOTYPE, 3, *parts[1:], None)["reward"] > slow["reward"]


@pytest.mark.parametrize("strategy", ["ppo", "random"])
def test_a_search_asks_for_what_its_strategy_draws(run, monkeypatch, strategy):
    """With rewards of our own: rounds of two, the early stop's average moves after a round, the log is what was asked for."""
    seen, halves = [], [0.5, 0.3, None, 0.9, 0.1]

    def try_candidate(run, static, genotype, k, *more):
        seen.append(more[-1])
        return {"candidate": k, "status": "ok", "stopped": False, "reward": 0.1 * k, "half_reward": halves[k], "tokens": genotype.to_tokens()}
    monkeypatch.setattr(train, "try_candidate", try_candidate)
    run.recipe.search_candidates = 5
    train.explore(run, strategy, run.path("log.jsonl"), lambda: (None,))
    assert seen == [None, None, pytest.approx(0.48), pytest.approx(0.48), pytest.approx(0.522)]           # decay 0.9
    log = train.read_log(run.path("log.jsonl"))
    torch.manual_seed(train.generator(0, "controller").initial_seed())
    fresh = controller.Controller(run.recipe.cell_layers)
    for first in (0, 2, 4) if strategy == "random" else (0,):
        draw = train.generator(0, "sample" if strategy == "ppo" else "random", first)
        count = min(2, 5 - first)
        tokens = fresh.sample(count, draw)[0] if strategy == "ppo" else fresh.random(count, draw)
        assert [log[first + k]["tokens"] for k in range(count)] == tokens.tolist()


def test_the_table_of_networks(run):
    """Baseline, best cells, the best one without its past, random search's, cells by name; each as often as there are seeds."""
    best, blind, other = ([(1, 2, 0, 0, 0), (2, 5, 0, 0, 0)], [(2, 3, 0, 0, 0), (2, 5, 0, 0, 0)], [(0, 2, 0, 0, 0), (2, 5, 0, 0, 0)])
    lines = [{"candidate": k, "status": status, "reward": reward, "half_reward": None, "tokens": sum(map(list, layers), [])}
             for k, (status, reward, layers) in enumerate([("ok", .3, blind), ("not finite", .0, other), ("ok", .4, best), ("ok", .4, best)])]
    for name, chosen in (("search.jsonl", lines), ("random.jsonl", [dict(lines[0], candidate=0)])):
        run.path(name).write_text("".join(json.dumps(line) + "\n" for line in chosen))
    run.recipe.search_strategy, run.recipe.cells, run.recipe.cell, run.recipe.seeds = "both", 3, ("warp", "decoder"), 1
    assert [(n.name, n.past) for n in train.networks(run)] == [
        ("baseline", True), ("cell-0", True), ("cell-0-without-past", False), ("cell-1", True), ("random-0", True),
        ("cell-warp", True), ("cell-decoder", True)]
    run.recipe.cells, run.recipe.seeds, run.recipe.cell, run.recipe.search_strategy = 1, 2, (), "ppo"
    assert [(n.name, n.seed) for n in train.networks(run)] == [("baseline", 0), ("baseline-seed1", 1), ("cell-0", 0), ("cell-0-seed1", 1),
                                                                ("cell-0-without-past", 0), ("cell-0-without-past-seed1", 1)]
    run.path("search.jsonl").write_text(json.dumps(lines[0]) + "\n")      # a cell that doesn't look at the past has no such row
    assert [n.name for n in train.networks(run)] == ["baseline", "baseline-seed1", "cell-0", "cell-0-seed1"]


def test_the_stored_outputs_are_rolled_as_a_video_is(run, parts):
    """Two places roll a cell over frames, Cache.roll and VideoSegmenter: the same logits, to half precision and bf16."""
    static, cache, *_ = parts
    genotype = Genotype([("layer4_prev", "dec_prev", "conv1x1", "sep3x3", "concat"), ("node0", "layer2", "skip", "conv3x3", "sum"),
                         ("layer3", "layer4", "conv1x1", "conv1x1", "sum")])
    cell, window = train.new_cell(run, static, genotype, train.generator(0)).eval(), torch.arange(5)[None]
    images, _ = run.prepared("train", window[0])
    with torch.no_grad(), run.autocast():
        expected = VideoSegmenter(static, cell).eval()(images[None])[0].float()           # (5, C, h, w)
        rolled = [pred[0] for pred, _ in cache.roll(cell, window)]
        other = [pred[0] for pred, _ in cache.roll(cell, window[:, [1, 1, 2, 3, 4]])]
    for pred, wrong, wanted in zip(rolled, other, expected[1:]):
        assert (pred - wanted).norm() < 0.03 * wanted.norm()
    assert (other[0] - expected[1]).norm() > 0.03 * expected[1].norm()    # the test sees another past


def test_dropout_of_stored_channels(run, parts):
    """A share of the channels is zero, whole ones, the rest is scaled up; a cell that passes all on sees it. 0.0 leaves all as it is."""
    _, cache, *_ = parts
    seen = []

    def cell(*inputs):
        seen.extend(inputs)
        return inputs[1], inputs[1]

    window = torch.arange(6)[:, None] + torch.arange(2)
    torch.manual_seed(0)
    list(cache.roll(cell, window, dropout=0.25))
    names = "layer4", "dec", "layer2", "layer3", "layer4"
    for name, index, dropped in zip(names, (0, 0, 1, 1, 1), seen):
        plain = cache(name, window[:, index])
        gone = (dropped == 0).flatten(2).all(2)
        there = ~gone[..., None, None].expand_as(plain)
        assert torch.equal(dropped[there], (plain * (1 / 0.75))[there])
        share = (gone & (plain != 0).flatten(2).any(2)).sum() / (plain != 0).flatten(2).any(2).sum()
        assert 0.1 < share < 0.4
    seen.clear()
    list(cache.roll(cell, window))
    assert all(torch.equal(a, cache(name, window[:, index])) for name, index, a in zip(names, (0, 0, 1, 1, 1), seen))


def test_mirror_images_in_the_cache(run, parts):
    static, plain, *_ = parts
    both, k = train.Cache(run, static, mirrored=True), torch.tensor([3])
    assert torch.equal(both.labels[both.count + k], plain.labels[k].flip(-1))
    images, _ = run.prepared("train", k)
    with torch.no_grad(), run.autocast():
        layer2 = static.encode(images.flip(-1))[1]
    assert (both("layer2", both.count + k) - layer2).norm() < 0.03 * layer2.norm()
    assert (both("layer2", k) - plain("layer2", k)).norm() == 0


@pytest.mark.parametrize("fault, status", [(lambda *_: torch.tensor(float("inf")), "not finite"),
                                           (torch.OutOfMemoryError("full"), "out of memory"),
                                           (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"), (MemoryError(), "out of memory")])
def test_a_candidate_that_fails_gets_no_reward(run, parts, monkeypatch, fault, status):
    def cell_loss(*arguments):
        if isinstance(fault, BaseException):
            raise fault
        return fault()
    monkeypatch.setattr(train, "cell_loss", cell_loss)
    entry = train.try_candidate(run, *parts[:1], GENOTYPE, 0, *parts[1:], None)
    assert (entry["status"], entry["reward"]) == (status, 0.0) and json.dumps(entry)


def test_any_other_error_stops_the_search_and_names_the_genotype(run, parts, monkeypatch):
    monkeypatch.setattr(train, "cell_loss", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"candidate 0 failed: node0 = sum\(skip\(dec_prev\)"):
        train.try_candidate(run, *parts[:1], GENOTYPE, 0, *parts[1:], None)


# ---- the command line

@pytest.mark.parametrize("line, said", [
    ("--dataset kitti", "invalid choice: 'kitti'"),
    ("--seeed 3", "unrecognized arguments: --seeed 3"),
    ("--static-epochs many", "argument --static-epochs: invalid int value: 'many'"),
    ("--static-epochs 0", "--static-epochs 0: must be more than 0"),
    ("--cell-lr nan", "--cell-lr nan: must be more than 0"),
    ("--meta-val-share 1.5", "--meta-val-share 1.5: must be below 1"),
    ("--sequence-length 1", "--sequence-length 1: a cell needs a frame before"),
    ("--dataset camvid", "put the file at data/camvid.zip, or pass --data DIR"),
    ("--controller-clip 1.5", "--controller-clip 1.5: must be below 1"),
    ("--static-batch 1", "--static-batch 1: must be 2 or more"),
    ("--cells 0 --cell", "--cells 0: then --cell must name a cell"),
    ("--key-frames", "--key-frames: must have one distance or more"),
    ("--static-scale 2 0.5", "--static-scale (2.0, 0.5): the first must not be above"),
    ("--sequence-length 9", "--sequence-length 9: no synthetic clip has so many frames"),
    ("--dataset camvid --data nowhere", "http://127.0.0.1:9/camvid.zip: cannot be downloaded"),
    ("--dataset cityscapes --data nowhere", "nowhere: no such folder; put the dataset there or pass --data DIR"),
    ("--stage search", "static.pt: no such file, --stage search needs it"),
    ("--stage evaluate", "baseline.pt: no such file, --stage evaluate needs it"),
    ("--encoder-weights nowhere.pth", "nowhere.pth: no such file"),
    ("--device warp9", "--device warp9"),
])
def test_wrong_arguments_are_told_in_one_line(tmp_path, monkeypatch, line, said):
    monkeypatch.setattr(data.CamVid, "URL", "http://127.0.0.1:9/camvid.zip")             # as without a network
    with pytest.raises(InputError) as error:
        train.main([*line.split(), "--run", str(tmp_path / "run")])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_exit_status_is_2_with_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--static-batch", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --static-batch -1: must be more than 0\n" and not any(tmp_path.iterdir())


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"static": Evil()}, tmp_path / "static.pt")
    with pytest.raises(InputError, match="static.pt: cannot be read"):
        train.load(tmp_path / "static.pt")
    assert not (tmp_path / "owned").exists()


def test_encoder_weights_of_another_network_are_refused(tmp_path):
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: not torchvision's mobilenet_v2"):
        train.load_encoder(Arch2(2).encoder, tmp_path / "other.pth")


def test_a_broken_file_of_any_split_shows_before_the_training(tmp_path):
    for split in ("train", "val", "test"):
        for folder, mode in ((split, "RGB"), (split + "annot", "L")):
            (tmp_path / folder).mkdir()
            for t in (0, 30, 60, 90):
                Image.new(mode, (64, 64)).save(tmp_path / folder / f"A_{t:06d}.png")
    (tmp_path / "test" / "A_000030.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="test/A_000030.png: is not an image"):
        train.main(["--dataset", "camvid", "--data", str(tmp_path), "--schedule", "smoke", "--encoder-weights", "none", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "static.pt").exists()
    (tmp_path / "valannot" / "A_000030.png").unlink()
    with pytest.raises(InputError, match="has no label valannot/A_000030.png"):
        train.main(["--dataset", "camvid", "--data", str(tmp_path), "--encoder-weights", "none", "--run", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# ---- a whole run

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = subprocess.run([sys.executable, ROOT / "train.py", "--schedule", "smoke", "--run", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done


def copy_of(smoke, tmp_path):
    return pathlib.Path(shutil.copytree(smoke[0], tmp_path / "run"))


def test_smoke_run_writes_its_folder_and_its_table(smoke):
    folder, done = smoke
    for name in "recipe.json static.pt search.jsonl controller.pt baseline.pt cell-0.pt cell-1.pt results.json".split():
        assert (folder / name).exists()
    assert not list(folder.glob("*.partial.pt")) and not list(folder.glob("*.writing")) and done.stderr == ""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    log = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    assert [entry["candidate"] for entry in log] == [0, 1, 2, 3]
    best = max(log, key=lambda entry: entry["reward"])
    uses_past = {0, 1} & set(Genotype.from_tokens(best["tokens"]).inputs())
    assert [row["name"] for row in rows] == ["static", "baseline", "cell-0"] + ["cell-0-without-past"] * bool(uses_past) + ["cell-1"]
    for row in rows:
        assert f"{row['title']:38}" in done.stdout and f" {100 * row['test']['miou']:.1f} " in done.stdout
        assert 0 < row["test"]["miou"] < 1 and 0 <= row["test"]["consistency"] <= 1 and row["ms_later_frame"] > 0
    assert rows[2]["genotype"] == str(Genotype.from_tokens(best["tokens"]))
    assert json.loads((folder / "recipe.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(recipe_for("synthetic", "smoke"))))


def test_the_same_command_again_skips_what_stands(smoke, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in smoke[0].iterdir() if p.name != "lock"}
    train.main(["--schedule", "smoke", "--run", str(smoke[0])])
    out = capsys.readouterr().out
    assert out.count("skipped") == 4 and "per-frame baseline, trained as long" in out
    assert before == {p.name: p.stat().st_mtime_ns for p in smoke[0].iterdir() if p.name != "lock"}


def test_a_search_that_was_cut_goes_on_to_the_same_log(smoke, tmp_path, capsys):
    folder = copy_of(smoke, tmp_path)
    log = (folder / "search.jsonl").read_text()
    (folder / "controller.pt").unlink()
    (folder / "search.jsonl").write_text("".join(log.splitlines(True)[:3]) + '{"candidate": 3, "rew')
    # In a process of its own with the first run's threads, since sums in another order round differently.
    done = subprocess.run([sys.executable, ROOT / "train.py", "--run", folder, "--stage", "search"], capture_output=True, text=True)
    assert done.returncode == 0 and "the last line is torn, cut off" in done.stdout

    def same(text):
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
    assert same((folder / "search.jsonl").read_text()) == same(log)
    a, b = (torch.load(f / "controller.pt", weights_only=True)["controller"] for f in (folder, smoke[0]))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_recipe_is_refused_by_field(smoke, tmp_path):
    with pytest.raises(InputError, match="static_epochs 1 there, 7 now"):
        train.main(["--run", str(smoke[0]), "--schedule", "smoke", "--static-epochs", "7"])
    with pytest.raises(InputError, match="static_epochs 1 there, 10 now.*more"):         # the default schedule is short
        train.main(["--run", str(smoke[0])])
    with pytest.raises(InputError, match="is the recipe of another run"):
        train.main(["--run", str(smoke[0]), "--schedule", "short"])
    folder = copy_of(smoke, tmp_path)
    (folder / "controller.pt").unlink()
    lines = (folder / "search.jsonl").read_text().splitlines(True)
    (folder / "search.jsonl").write_text("".join(lines + lines[1:2]))
    with pytest.raises(InputError, match="search.jsonl: a line is no candidate's, or a candidate has two"):
        train.main(["--run", str(folder), "--stage", "search"])


def test_a_checkpoint_of_another_recipe_is_refused_by_field(smoke, tmp_path):
    """A static network may come from a run that differs in the search only."""
    for changed, said in (({"search_batch": 16}, None), ({"static_epochs": 7}, "static_epochs 1 there, 7 now"),
                          ({"dataset": "camvid", "seed": 5}, "dataset 'synthetic' there, 'camvid' now; seed 0 there, 5 now")):
        run = Run(smoke[0], dataclasses.replace(recipe_for("synthetic", "smoke"), **changed), device="cpu")
        if said:
            with pytest.raises(InputError, match=f"static.pt: is the checkpoint of another recipe \\({said}"):
                train.load_video(run, "static")
        else:
            train.load_video(run, "static")
            with pytest.raises(InputError, match="cell-0.pt: .*search_batch 32 there, 16 now"):
                train.load_video(run, "cell-0")
    saved = torch.load(smoke[0] / "static.pt", weights_only=True)
    saved["recipe"]["wings"] = saved["recipe"].pop("momentum")
    torch.save(saved, tmp_path / "static.pt")
    with pytest.raises(InputError, match="static.pt: made by another version \\(momentum, wings\\)"):
        train.load_video(Run(tmp_path, recipe_for("synthetic", "smoke"), device="cpu"), "static")


def test_what_is_compared_may_be_given_anew(smoke, tmp_path, capsys):
    """A finished run gets another cell and another key-frame distance; what it has stands."""
    folder = copy_of(smoke, tmp_path)
    before = json.loads((folder / "results.json").read_text())["rows"]
    train.main(["--run", str(folder), "--schedule", "smoke", "--cell", "decoder", "concat", "--key-frames", "0", "2"])
    results, out = json.loads((folder / "results.json").read_text()), capsys.readouterr().out
    assert "pretrain: static.pt there, skipped" in out and "search: controller.pt there, skipped" in out
    assert results["rows"][:len(before)] == before
    assert sorted((row["name"], row["key_frame_every"]) for row in results["rows"][len(before):]) == sorted(
        [(row["name"], 2) for row in before if row["genotype"]] + [(f"cell-{name}", every) for name in ("decoder", "concat") for every in (0, 2)])
    found = [row for row in results["rows"] if row["name"] in ("cell-0", "cell-1", "cell-concat") and row["key_frame_every"] == 0]
    assert results["best"] == max(found, key=lambda row: row["val"]["miou"])["name"]     # neither decoder nor the past zeroed
    assert json.loads((folder / "recipe.json").read_text())["cell"] == ["decoder", "concat"]
    assert (folder / "figures" / "fig7-cell-concat.png").exists() and not list(folder.glob("*.partial*"))
    train.main(["--run", str(folder), "--schedule", "smoke"])             # not given: the folder's
    assert "evaluate: results.json there, skipped" in capsys.readouterr().out
    assert json.loads((folder / "recipe.json").read_text())["cell"] == ["decoder", "concat"]


def test_the_best_cell_is_no_control(run):
    """Those have a row each, but what predict takes is a cell that was found or named."""
    genotype = Genotype([(1, 2, 0, 0, 0)])
    assert [network.control for network in (train.Network("baseline", ""), train.Network("cell-0", "", genotype),
                                            train.Network("cell-0-without-past", "", genotype, past=False),
                                            train.Network("cell-decoder", "", train.DECODER))] == [True, False, True, True]


def test_too_few_sequences_are_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (1, 3), "val": (1, 4), "test": (1, 4)})
    with pytest.raises(InputError, match="its train split has 1 sequences of 3 frames; each process needs two"):
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_log_of_another_processor_is_taken_as_it_is(smoke, tmp_path, capsys):
    """There the sampled tokens may differ; the rewards belong to the logged ones."""
    folder = copy_of(smoke, tmp_path)
    log = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    log[1]["tokens"][2] = (log[1]["tokens"][2] + 1) % 12
    (folder / "search.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "controller.pt").unlink()
    train.main(["--run", str(folder), "--stage", "search"])
    assert "the log's candidate 1 is not the one this machine would sample" in capsys.readouterr().out
    assert (folder / "controller.pt").exists()


def test_a_recipe_with_which_nothing_was_made_is_replaced(tmp_path):
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        train.main(["--run", str(tmp_path), "--encoder-weights", "nowhere.pth"])
    assert train.settle_recipe(tmp_path, None, {}) == recipe_for("synthetic", "short")


def test_a_checkpoint_of_another_network_is_named(smoke, tmp_path):
    folder = copy_of(smoke, tmp_path)
    run = Run(folder, recipe_for("synthetic", "smoke"), device="cpu")
    torch.save({"static": Arch2(3).state_dict(), "recipe": dataclasses.asdict(run.recipe)}, folder / "baseline.pt")
    with pytest.raises(InputError, match="baseline.pt: is the checkpoint of another network"):
        train.load_video(run, "baseline")
    with pytest.raises(InputError, match="controller.pt: holds no network"):
        train.load_video(run, "controller")


def test_a_static_network_of_another_run_is_taken_over(smoke, tmp_path):
    """Its folder had no recipe.json: it gets one, so that a single stage finds it."""
    (tmp_path / "static.pt").write_bytes((smoke[0] / "static.pt").read_bytes())
    arguments = ["--schedule", "smoke", "--cell-layers", "1", "--search-candidates", "1", "--run", str(tmp_path)]
    train.main([*arguments, "--stage", "search"])
    assert json.loads((tmp_path / "recipe.json").read_text())["cell_layers"] == 1
    (tmp_path / "controller.pt").unlink()
    (tmp_path / "search.jsonl").write_bytes((smoke[0] / "search.jsonl").read_bytes())
    with pytest.raises(InputError, match="search.jsonl: candidate 0 has 10 tokens, not 5: of another recipe"):
        train.main(["--run", str(tmp_path), "--stage", "search"])


def test_ones_own_dataset_needs_no_schedule():
    assert recipe_for("mine", "short") == dataclasses.replace(recipe_for("camvid", "short"), dataset="mine")


def test_a_batch_that_is_too_small_to_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match="--cell-batch 7: 4 processes share it, two images each at the least: 8 or more"):
        Run(tmp_path, recipe_for("synthetic", "smoke", cell_batch=7), device="cpu").join()
    signal.signal(signal.SIGTERM, handler)


def test_two_processes_on_one_run(smoke):
    import fcntl
    with open(smoke[0] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process works on this run"):
            train.main(["--run", str(smoke[0]), "--schedule", "smoke"])


def imitate(dataset, root):
    """A few small clips in the layout of a real dataset: pictures and labels from the synthetic videos."""
    source = data.Synthetic(None, "train")
    for split in ("train", "val", "test"):
        for c, clip in enumerate(source.clips[:8 if split == "train" else 2]):
            for t, frame in enumerate(clip[:4 if dataset == "camvid" else 2]):
                image, label = source.read(frame)
                if dataset == "camvid":
                    paths = root / split / f"clip{c}_{30 * t:06d}.png", root / f"{split}annot" / f"clip{c}_{30 * t:06d}.png"
                else:
                    name, label = f"ulm_{c:06d}_{18 + t:06d}", label + 7  # labelIds 7, 8, 11 and 12 are classes, 9 and 10 not
                    paths = (root / "leftImg8bit_sequence" / split / "ulm" / f"{name}_leftImg8bit.png",
                             root / "gtFine" / split / "ulm" / f"{name}_gtFine_labelIds.png")
                for path, pixels in zip(paths, (image, label)):
                    if dataset == "camvid" or t == 1 or "left" in path.name:          # CityScapes: the second is annotated
                        path.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("dataset", ["camvid", "cityscapes"])
def test_every_stage_runs_on_a_real_layout(dataset, tmp_path, capsys):
    imitate(dataset, tmp_path / "data")
    train.main(["--dataset", dataset, "--data", str(tmp_path / "data"), "--schedule", "smoke", "--encoder-weights", "none",
                "--search-batch", "4", "--cell-batch", "4", "--meta-val-share", "0.2", "--run", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    networks = {row["name"] for row in results["rows"]}
    assert results["reported"] == ("test" if dataset == "camvid" else "val") and networks >= {"static", "baseline", "cell-0", "cell-1"}
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == len(networks - {"cell-0-without-past"}) + 3
    assert f"{results['reported']} split" in capsys.readouterr().out


def test_cells_by_name_need_no_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (4, 4), "val": (1, 4), "test": (1, 4)})
    train.main(["--schedule", "smoke", "--cells", "0", "--cell", "attention", "decoder", "--seeds", "2", "--cell-mirrored", "--cell-batch", "4",
                "--run", str(tmp_path)])
    out = capsys.readouterr().out
    assert "search: none" in out and not (tmp_path / "search.jsonl").exists() and "mean ± deviation over seeds" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["static", "baseline", "baseline-seed1", "cell-attention", "cell-attention-seed1",
                                                        "cell-decoder", "cell-decoder-seed1"]
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["cell-decoder"]["multiply_adds"] == rows["static"]["multiply_adds"] > rows["cell-attention"]["multiply_adds"]
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["cell"] for name in ("cell-attention", "cell-attention-seed1"))
    assert results["best"].startswith("cell-") and not torch.equal(a["classifier.bias"], b["classifier.bias"])
    scores = [100 * rows[name]["test"]["miou"] for name in ("cell-attention", "cell-attention-seed1")]
    assert f"{np.mean(scores):.1f} ±{np.std(scores, ddof=1):.1f}" in out


def test_cells_alone_keep_the_static_network(smoke, tmp_path):
    """--end-epochs 0: what the frozen static network's features are worth to a cell, cheaply."""
    shutil.copy(smoke[0] / "static.pt", tmp_path)
    train.main(["--schedule", "smoke", "--cells", "0", "--cell", "concat", "--end-epochs", "0", "--run", str(tmp_path)])
    static, cell, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("static", "cell-concat", "cell-concat-alone"))
    assert all(torch.equal(value, cell["static"][key]) for key, value in static["static"].items())
    assert all(torch.equal(value, cell["cell"][key]) for key, value in alone["cell"].items())
    static, baseline, cell = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert static["test"] == baseline["test"] != cell["test"]


def test_without_a_search_a_cell_must_be_named(tmp_path):
    with pytest.raises(InputError, match="--cells 0: then --cell must name a cell"):
        train.main(["--cells", "0", "--run", str(tmp_path / "other")])


# ---- predict

@pytest.fixture
def frames_folder(tmp_path):
    """The first test clip as PNG files."""
    dataset, folder = data.Synthetic(None, "test"), tmp_path / "frames"
    folder.mkdir()
    for frame in dataset.clips[0]:
        Image.fromarray(dataset.read(frame)[0]).save(folder / f"{frame.image.name}.png")
    return folder


def predict(smoke, source, output, *more):
    train.main(["--stage", "predict", "--run", str(smoke[0]), "--input", str(source), "--output", str(output), *more])


@pytest.mark.parametrize("every", [0, 3])
def test_predict_writes_what_evaluate_scores(smoke, frames_folder, tmp_path, every):
    out = tmp_path / "out"
    predict(smoke, frames_folder, out, "--network", "cell-0", "--key-frame-every", str(every))
    run = Run(smoke[0], recipe_for("synthetic", "smoke"), device="cpu")
    _, preds = train.evaluate_video(run, train.load_video(run, "cell-0"), "test", every)
    paths = sorted((out / "labels").iterdir())
    assert len(paths) == len(data.Synthetic(None, "test").clips[0])
    for path, pred in zip(paths, preds):
        picture = Image.open(path)
        assert picture.mode == "P" and (np.array(picture) == pred.numpy()).all()
        assert picture.getpalette()[:18] == data.Synthetic.palette.ravel().tolist()
    assert len(list((out / "overlay").iterdir())) == Image.open(out / "overlay.webp").n_frames == len(paths)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "one"])
def test_predict_takes_animations_and_one_image(smoke, frames_folder, tmp_path, kind):
    first, *rest = [Image.open(path) for path in sorted(frames_folder.iterdir())]
    source = tmp_path / ("one.png" if kind == "one" else f"animation.{kind}")
    first.save(source, **({} if kind == "one" else dict(save_all=True, append_images=rest)))
    predict(smoke, source, tmp_path / "out", "--network", "static")
    assert len(list((tmp_path / "out" / "labels").iterdir())) == (1 if kind == "one" else 1 + len(rest))


def spoil(folder, fault):
    path = sorted(folder.iterdir())[2]
    if fault == "size":
        Image.new("RGB", (64, 96)).save(path)
    elif fault == "broken":
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "empty":
        [p.unlink() for p in folder.iterdir()]


@pytest.mark.parametrize("fault, said, done", [("size", "000_0002 is 64 x 96, the first 128 x 96", 2), ("broken", "000_0002.png: is not an image", 2),
                                               ("empty", "holds no .png or .jpg", 0)])
def test_predict_says_what_is_wrong_with_frames(smoke, frames_folder, tmp_path, fault, said, done):
    spoil(frames_folder, fault)
    with pytest.raises(InputError, match=said):
        predict(smoke, frames_folder, tmp_path / "out", "--network", "static")
    assert len(list((tmp_path / "out").glob("labels/*"))) == done


def test_predict_overwrites_nothing(smoke, frames_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files already"):
        predict(smoke, frames_folder, tmp_path / "out")
    with pytest.raises(InputError, match="--input and --output: needed"):
        train.main(["--stage", "predict", "--run", str(smoke[0])])
    with pytest.raises(InputError, match="nowhere: no such file"):
        predict(smoke, tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(InputError, match="cell-7.pt: no such file"):
        predict(smoke, frames_folder, tmp_path / "new", "--network", "cell-7")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"] and not (tmp_path / "new").exists()


def test_share_of_differing_pixels_is_of_the_labelled_ones(run):
    """Ignored pixels neither differ nor count: 6 of 8 labelled ones here."""
    frames = run.frames("test")
    frames.labels[0] = data.IGNORE
    frames.labels[0, 0, :8] = 1
    ours = [torch.zeros_like(label) for label in frames.labels]
    other = [pred.clone() for pred in ours]
    other[0][0, :6], other[0][1] = 1, 1                                   # six that are labelled, and a row that is not
    chosen = train.differing_frames(run, "test", ours, other, "cell-0")
    assert chosen["differ"][0] == 6 / 8
