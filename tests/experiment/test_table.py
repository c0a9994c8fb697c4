"""experiment/networks.py and table.py: which networks are compared, adding to a finished run, the table."""
import itertools
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import arguments_of, content_of, copy_of, run, small, smoke

import data
import train
from data import InputError
from dyncell import CELLS, Arch2, DynamicCell, Genotype, VideoSegmenter
from experiment import networks, table
from experiment.networks import Network
from util import files


# ---- which networks

BEST = Genotype([(1, 2, 0, 0, 0), (2, 5, 0, 0, 0)])  # looks at dec_prev
BLIND = Genotype([(2, 3, 0, 0, 0), (2, 5, 0, 0, 0)])              # not at the past
FAILED = Genotype([(0, 2, 0, 0, 0), (2, 5, 0, 0, 0)])
CANDIDATES = [("ok", 0.3, BLIND), ("not finite", 0.0, FAILED), ("ok", 0.4, BEST), ("ok", 0.4, BEST)]


def write_log(run, name, candidates):
    """A finished search."""
    run.recipe.search_candidates = len(candidates)
    with open(run.path(name), "w") as file:
        for k, (status, reward, cell) in enumerate(candidates):
            entry = {"candidate": k, "status": status, "reward": reward, "half_reward": None}
            file.write(json.dumps({**entry, "tokens": cell.to_tokens()}) + "\n")


def names(run, **changes):
    vars(run.recipe).update(changes)
    return [network.name for network in networks.networks(run)]


def test_the_networks_are_baseline_best_cells_without_past_random_ones_and_named_ones(run):
    """Different cells; none that failed; the best one again without its past. Controls are what is no cell
    and what has no past: predict takes a cell that was found or named."""
    write_log(run, "search.jsonl", CANDIDATES)
    write_log(run, "random.jsonl", [CANDIDATES[0], *CANDIDATES[1:2] * 3])
    assert names(run, search_strategy="both", cells=3, cell=("warp", "decoder", f"own={BEST}")) == [
        "baseline", "cell-0", "cell-0-without-past", "cell-1", "random-0", "cell-warp", "cell-decoder",
        "cell-own"]
    found = networks.networks(run)
    assert [network.name for network in found if not network.past] == ["cell-0-without-past"]
    assert [network.name for network in found if network.control] == [
        "baseline", "cell-0-without-past", "cell-decoder"]
    assert [network.title for network in found] == [
        "baseline, fine-tuned", "cell-0, PPO", "cell-0 without the past", "cell-1, PPO",
        "random-0, random search", "warp", "the static decoder as the cell", "own"]
    assert names(run, search_strategy="random", cell=()) == ["baseline", "random-0"]


def test_seeds_cells_without_a_past_and_fewer_candidates(run):
    """A cell that does not look at the past has no row without it. Fewer candidates only use the first ones;
    more are not there yet."""
    write_log(run, "search.jsonl", CANDIDATES)
    assert names(run, cells=1, seeds=2, without_past=False) == [
        "baseline", "baseline-seed1", "cell-0", "cell-0-seed1"]
    assert [(found.seed, found.genotype) for found in networks.networks(run)[2:]] == [(0, BEST), (1, BEST)]
    assert names(run, without_past=True, seeds=1, search_candidates=1) == ["baseline", "cell-0"]
    assert networks.networks(run)[1].genotype == BLIND
    for count, said in (5, "has 4 of 5"), (1, ".*fail"):
        write_log(run, "search.jsonl", CANDIDATES if count == 5 else CANDIDATES[1:2])
        with pytest.raises(InputError, match=f"search.jsonl: {said}"):
            names(run, search_candidates=count)


def test_a_cell_is_a_name_a_file_a_checkpoint_or_a_text_and_may_get_a_name_of_its_own(smoke, tmp_path):
    """Also as a recipe keeps it."""
    own = files.load(smoke / "cell-0.pt")["genotype"]
    (tmp_path / "own.json").write_text(own)
    name, genotype = networks.cell_of(own)
    assert re.fullmatch("custom-.{6}", name)
    for text in (tmp_path / "own.json", smoke / "cell-0.pt", *networks.cell_texts([own]),
                 "".join(str(genotype).split())):                         # "node0=..."
        assert networks.cell_of(str(text)) == (name, genotype)
    assert networks.cell_of("decoder") == ("decoder", "decoder")
    assert networks.cell_of(CELLS["warp"].to_json()) == ("warp", CELLS["warp"])
    assert networks.cell_of(f"past={own}") == ("past", genotype)
    assert networks.cell_texts(["d2=decoder", "warp=warp", f"past={BEST}", f"past = {BEST}"]) == (
        "d2=decoder", "warp", f"past={BEST}")
    for argument, said in (("0=warp", "invalid"), ("a-seed1=warp", "invalid"), ("x=", "invalid"),
                           ("nowhere.json", "nowhere"), ("warp=concat", "two cells"),
                           ("baseline=warp", "two cells")):
        with pytest.raises(InputError, match=f"--cell.*{said}"):
            networks.cell_texts([argument])


@pytest.mark.parametrize("of", ["", "-alone"])
def test_a_trained_cell_keeps_its_name(run, of):
    """Also when a better one is found, or another one is random search's median; and no other cell may take
    it by --cell."""
    def trained(name):
        """As if BLIND had been trained by that name."""
        torch.save({"genotype": BLIND.to_json()}, run.path(f"{name}{of}.pt"))

    trained("cell-0")
    write_log(run, "search.jsonl", CANDIDATES)
    found = {network.name: network.genotype for network in networks.networks(run) if network.genotype}
    assert found == {"cell-0": BLIND, "cell-1": BEST, "cell-1-without-past": BEST}

    cells = [Genotype([(k, 0, 0, 0, 0), (2, 5, 0, 0, 0)]) for k in range(5)]
    write_log(run, "random.jsonl", [*zip(["ok"] * 5, (0.2, 0.5, 0.1, 0.4, 0.3), cells)])
    assert names(run, search_strategy="random", cells=1, median_cell=True)[2:] == ["random-median-0"]
    assert networks.networks(run)[2].genotype == cells[4]                 # 0.3
    trained("random-median-0")                                            # of a shorter search
    assert names(run)[2:] == ["random-median-0", "random-median-1"]
    assert len({network.title for network in networks.networks(run)}) == 4        # rows of one title are one
    trained("cell-x")
    with pytest.raises(InputError, match="--cell x: .*cell-x.pt"):
        names(run, cells=0, cell=(f"x={BEST}",))


# ---- the table

def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_table_has_a_row_of_every_network_and_key_frame_interval(smoke):
    """The best is the cell that is best on val, and no control."""
    out, results = (smoke.parent / "run.out").read_text(), results_of(smoke)
    rows, log = results["rows"], files.read_log(smoke / "search.jsonl").values()
    best = Genotype(max(log, key=lambda entry: entry["reward"])["tokens"])
    assert [(row["name"], row["key_frame_every"]) for row in rows] == [("static", 1), ("baseline", 1), *(
        (name, every) for name in ("cell-0", "cell-0-without-past", "random-0") for every in (0, 3))]
    assert rows[2]["genotype"] == str(best)
    for row in rows:
        assert row["ms_sequence"] == row["ms_clip"] == row["ms_key_frame"]            # all are 1 here
        scores = f"{100 * row['test']['miou']:.1f} +{100 * row['test']['consistency']:.1f}"
        assert re.search(f"{row['title']} .* {scores} +{row['parameters']:,} ", out)
    assert len({row["test"]["miou"] for row in rows}) > 5                 # the test sees more than one answer
    assert results["best"] == max(rows[2], rows[6], key=lambda row: row["val"]["miou"])["name"]
    for said in ("evaluate: stage 4 of 4", "[4/4] cell-0 on test 8/8", "These numbers mean nothing"):
        assert said in out


@pytest.mark.parametrize("rows, recipe", [(7, {}), (8, {}), (8, {"recipe": "another"})])
def test_a_table_that_was_cut_goes_on(smoke, small, tmp_path, monkeypatch, capsys, rows, recipe):
    """Before its last row, or after it and before its end. Other recipes' rows are scored again. The command
    that is printed last can be pasted."""
    folder, scored = copy_of(smoke, tmp_path).rename(tmp_path / "it's my run"), []
    before, evaluate_video = results_of(smoke), train.evaluate_video
    monkeypatch.setattr(train, "evaluate_video", lambda *a: scored.append(a[3:]) or evaluate_video(*a))
    if rows == 8 and not recipe:                  # only the end is missing: best on val is not best on test
        worse, better = sorted((before["rows"][2], before["rows"][6]), key=lambda row: row["val"]["miou"])
        worse["test"]["miou"], better["test"]["miou"] = 1.0, 0.0
    kept = {"recipe": before["recipe"], "rows": before["rows"][:rows], **recipe}
    (folder / "results.json").write_text(json.dumps(kept))
    train.main([*arguments_of(folder), "--stage", "evaluate"])
    assert len(scored) == 16 if recipe else scored == [("val", 3), ("test", 3)] * (8 - rows)
    assert results_of(folder) == before
    words = shlex.split(capsys.readouterr().out.rpartition("python ")[2])
    assert words[words.index("--run") + 1] == str(folder)


def test_what_was_not_measured_is_no_zero_and_the_end_names_machines_and_rewards(run, monkeypatch, capsys):
    """Not one labelled pixel: every IoU is NaN."""
    rows, costs = [], ("parameters", "multiply_adds", "ms_encoder", "ms_key_frame", "ms_later_frame")
    for iou, machine in (math.nan, "here"), (0.0, "there"):
        scores = {"miou": 0.0, "consistency": math.nan, "iou": dict.fromkeys(data.Synthetic.classes, iou)}
        monkeypatch.setattr(table, "frame_costs", lambda *_: {**dict.fromkeys(costs, 1), "machine": machine})
        rows += table.rows_of(run, Network("baseline", machine), None, [1], lambda *_: scores)
    assert [row["test"]["miou"] for row in rows] == [None, 0] and rows[0]["test"]["consistency"] is None
    files.save(run.path("results.json"), {"rows": rows, "reported": "test"})
    write_log(run, "random.jsonl", CANDIDATES[:3])                # too few for quarters
    write_log(run, "search.jsonl", [("ok", reward / 10, BEST) for reward in (1, 3, 2, 4, 5, 5, 6, 8, 9)])
    run.recipe.search_strategy = "both"
    table.print_end(run)
    lines = capsys.readouterr().out.splitlines()
    assert "times on here; there" in lines and not re.search("^here .* 0.0 ", "\n".join(lines), re.MULTILINE)
    said = [line for line in lines if line.startswith("mean reward")]
    assert said == ["mean reward of PPO's candidates, 2 at a time: 0.20 0.30 0.50 0.70"]


def test_a_checkpoint_alone_reproduces_its_row_and_leaves_no_file(smoke, small, tmp_path, capsys):
    """On the data, in a folder without trainings, without the encoder's weights, and train is not read."""
    flags = [*"--dataset synthetic --schedule smoke --key-frames 0 3 --encoder-weights nowhere".split(),
             "--sequence-length", "9", "--run", str(tmp_path), "--stage", "evaluate", "--network"]
    intervals = {0: "first only", 1: "every", 3: "every 3"}
    for name in ("cell-0", "static"):
        train.main([*flags, str(smoke / f"{name}.pt")])
        out = " ".join(capsys.readouterr().out.split())
        for row in (row for row in results_of(smoke)["rows"] if row["name"] == name):
            scores = [f"{100 * row['test'][key]:.1f}" for key in ("miou", "consistency")]
            assert " ".join([name, intervals[row["key_frame_every"]], *scores]) in out
    assert content_of(tmp_path) == {}
    other = files.load(smoke / "cell-0.pt")
    files.save(tmp_path / "other.pt", {**other, "classes": other["classes"][::-1]})
    with pytest.raises(InputError, match="other.pt: its classes"):
        train.main([*flags, str(tmp_path / "other.pt")])


def test_examples_are_the_frames_of_each_quarter_that_differ_most(run):
    """In the share of their labelled pixels. An unlabelled frame, which the baseline leaves out, is no
    example."""
    frames = run.frames("test")                                           # 2 clips of 4, so quarters of 2
    frames.labels[:] = 0
    frames.labels[:, 40:] = data.IGNORE                                   # 40 of 48 rows are labelled
    frames.list[3] = data.Frame(frames.list[3].image, None)

    def predictions(kind, numbers):
        for k in numbers:
            pred = torch.full_like(frames.labels[k], kind)
            pred[k % 4 + 1:40] = 0                                        # a clip's later frames differ more
            yield k, pred, frames.labels[k]

    both, expected = (predictions(0, [0, 1, 2, 4, 5, 6, 7]), predictions(1, range(8))), [1, 2, 5, 7]
    chosen = table.differing_frames(frames, *both, "cell-0")
    assert chosen["names"] == [f"{k // 4:03d}_{k % 4:04d}" for k in expected]
    assert chosen["cell"][:, :40].sum((1, 2)).tolist() == [64 * (k % 4 + 1) for k in expected]
    assert chosen["differ"] == [(k % 4 + 1) / 40 for k in expected]


# ---- time

@pytest.mark.parametrize("every, sequence, clip", [(0, 6, 5), (3, 6, 6.5), (1, 10, 10), (2, 8, 7)])
def test_mean_times_by_hand(every, sequence, clip):
    """Table 5's: a key frame takes 10 ms, a later one 4. A sequence of three, clips of four and of eight."""
    costs = {"ms_key_frame": 10.0, "ms_later_frame": 4.0}
    assert table.mean_ms(costs, every, [3]) == pytest.approx(sequence)
    assert table.mean_ms(costs, every, [4, 8]) == pytest.approx(clip)


def test_frames_are_timed_as_they_are_evaluated(run, monkeypatch):
    """The network pads 48 x 64 to 56. What each call runs: encoder, then decoder or cell."""
    video, seen, called = VideoSegmenter(Arch2(6), DynamicCell(BEST, 6), pad=56).eval(), [], {}
    for kind, method in (Arch2, "encode"), (Arch2, "decode"), (DynamicCell, "forward"):
        def note(self, x, *others, method=method, real=getattr(kind, method), **more):
            seen.append((method, x))
            return real(self, x, *others, **more)
        monkeypatch.setattr(kind, method, note)

    def milliseconds_in_turn(calls, repeats):
        for name, call in calls.items():
            seen.clear()
            call()
            called[name], (image, *_) = zip(*seen)
            assert image.shape == (1, 3, 56, 64) and image.is_contiguous(memory_format=torch.channels_last)
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(table, "milliseconds_in_turn", milliseconds_in_turn)
    table.frame_costs(run, video)
    assert called == {"ms_encoder": ("encode",), "ms_key_frame": ("encode", "decode"),
                      "ms_later_frame": ("encode", "forward")}


# ---- a finished run is added to, a run of one's own

def test_what_is_compared_may_change_and_what_stands_stays(smoke, small, tmp_path):
    """More candidates, a second cell, a cell by name, another key-frame interval. A better cell is found,
    and the first keeps its name."""
    folder, rows = copy_of(smoke, tmp_path), results_of(smoke)["rows"]
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    log = [*files.read_log(folder / "search.jsonl").values()]
    worst, best = sorted(log, key=lambda entry: entry["reward"])[::3]
    worst["reward"], best["reward"] = 1.0, 0.9    # as if the search had found it later
    (folder / "search.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    more = "--search-candidates 6 --search-strategy ppo --cells 2 --no-without-past --cell decoder"
    train.main([*arguments_of(folder), *more.split(), "--key-frames", "0", "2"])

    assert len(files.read_log(folder / "search.jsonl")) == 6
    new = results_of(folder)["rows"]
    assert new[:len(rows)] == rows
    assert {(row["name"], row["key_frame_every"]) for row in new[len(rows):]} == {
        ("cell-0", 2), ("cell-1", 0), ("cell-1", 2), ("cell-decoder", 0), ("cell-decoder", 2)}
    cells = {row["name"]: row["genotype"] for row in new}
    assert cells["cell-0"] == rows[2]["genotype"] and cells["cell-1"] == str(Genotype(worst["tokens"]))
    for name, content in before.items():
        assert name in ("controller.pt", "examples.pt") or (folder / name).read_bytes() == content


def test_named_cells_and_seeds_need_no_search(smoke, small, tmp_path, capsys):
    """With --end-epochs 0 the static network stays as it is: what are its features worth to a cell?"""
    folder = copy_of(smoke, tmp_path, "static.pt")
    flags = "--cells 0 --cell attention decoder --seeds 2 --end-epochs 0 --key-frames 0"
    train.main([*arguments_of(folder), *flags.split()])
    rows = {row["name"]: row for row in results_of(folder)["rows"]}
    assert list(rows) == ["static", "baseline", "baseline-seed1", "cell-attention", "cell-attention-seed1",
                          "cell-decoder", "cell-decoder-seed1"]
    assert not list(folder.glob("*.jsonl")) and results_of(folder)["best"].startswith("cell-attention")
    adds = {name: row["multiply_adds"] for name, row in rows.items()}
    assert adds["cell-decoder"] == adds["static"] > adds["cell-attention"]
    names = "static", "cell-attention", "cell-attention-alone", "cell-attention-seed1"
    static, cell, alone, other = (files.load(folder / f"{name}.pt") for name in names)
    assert all(torch.equal(value, cell["static"][key]) for key, value in static["static"].items())
    assert all(torch.equal(value, cell["cell"][key]) for key, value in alone["cell"].items())
    assert rows["static"]["test"] == rows["baseline"]["test"] != rows["cell-attention"]["test"]
    assert not torch.equal(cell["cell"]["classifier.bias"], other["cell"]["classifier.bias"])
    scores = [100 * rows[name]["test"]["miou"] for name in ("cell-attention", "cell-attention-seed1")]
    assert f"{np.mean(scores):.1f} ±{np.std(scores, ddof=1):.1f}" in capsys.readouterr().out


def test_every_stage_runs_on_the_layout_of_cityscapes(small, tmp_path, capsys):
    """Pictures and labels from the synthetic videos. Only the second frame of each clip is annotated, and val
    is reported."""
    source = data.Synthetic(None, "train")
    for split, (c, clip) in itertools.product(("train", "val", "test"), enumerate(source.clips)):
        for t, frame in enumerate(clip[:2]):
            image, label = source.read(frame)
            for kind, name, pixels in (("leftImg8bit_sequence", "leftImg8bit", image),
                                       ("gtFine", "gtFine_labelIds", label + 7))[:1 + t]:
                path = tmp_path / "data" / kind / split / "ulm" / f"ulm_{c:06d}_{18 + t:06d}_{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)    # labelIds 7, 8, 11 and 12 are classes, 9 and 10 not
    flags = ("--dataset cityscapes --schedule smoke --encoder-weights none --search-batch 2 --cell-batch 2 "
             "--static-batch 4 --meta-val-share 0.25 --cells 1 --search-candidates 2 --no-without-past "
             "--input-longer-side 96 --input-crop 64")
    train.main([*flags.split(), "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")])
    results = results_of(tmp_path / "run")
    assert [row["name"] for row in results["rows"]] == ["static", "baseline", "cell-0"]
    assert results["reported"] == "val" and "val split" in capsys.readouterr().out
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 7


def test_sparse_labels_and_splits_of_different_sizes_train(small, tmp_path, monkeypatch):
    class Mine(data.Synthetic):
        def __init__(self, root, split):
            super().__init__(root, split)
            self.SIZE = {"train": (48, 64), "val": (32, 64), "test": (64, 96)}[split]
            for clip in self.clips:
                clip[::2] = [frame._replace(label=None) for frame in clip[::2]]

        def read(self, frame):
            image, label = super().read(frame)
            return image, label if frame.label else label * 0 + data.IGNORE

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
    monkeypatch.setattr(Mine, "classes", [*Mine.classes[::-1]])
    with pytest.raises(InputError, match="pt: holds no result of a training on these classes"):
        train.main(["--run", str(tmp_path / "run")])
