"""experiment/networks.py and table.py: which networks are compared, adding to a finished run, the table."""
import json
import math
import shlex
import types
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from whole_run import arguments_of, content_of, copy_of, make_few, make_small, small, smoke

import data
import train
from data import InputError
from dyncell import CELLS, Arch2, DynamicCell, Genotype, VideoSegmenter
from train import recipe_for
from experiment import networks, table
from experiment.networks import Network
from experiment.runs import Run
from util import files


@pytest.fixture
def run(tmp_path, small):
    return Run(tmp_path, recipe_for("synthetic", "smoke"), device="cpu")


# ---- which networks

BEST = [(1, 2, 0, 0, 0), (2, 5, 0, 0, 0)]            # looks at dec_prev
BLIND = [(2, 3, 0, 0, 0), (2, 5, 0, 0, 0)]           # not at the past
FAILED = [(0, 2, 0, 0, 0), (2, 5, 0, 0, 0)]
CANDIDATES = [("ok", 0.3, BLIND), ("not finite", 0.0, FAILED), ("ok", 0.4, BEST), ("ok", 0.4, BEST)]


def write_log(run, name, candidates):
    """A finished search."""
    lines, run.recipe.search_candidates = [], len(candidates)
    for k, (status, reward, layers) in enumerate(candidates):
        entry = {"candidate": k, "status": status, "reward": reward, "half_reward": None}
        lines.append(json.dumps({**entry, "tokens": Genotype(layers).to_tokens()}))
    run.path(name).write_text("\n".join(lines) + "\n")


def trained(run, name, layers):
    """As if the cell had been trained."""
    torch.save({"genotype": Genotype(layers).to_json()}, run.path(f"{name}.pt"))


def names(run, **changes):
    for name, value in changes.items():
        setattr(run.recipe, name, value)
    return [network.name for network in networks.networks(run)]


def test_the_networks_are_baseline_best_cells_without_past_random_ones_and_named_ones(run):
    """Different cells; none that failed; the best one again without its past. Controls are what is no cell
    and what has no past: predict takes a cell that was found or named."""
    write_log(run, "search.jsonl", CANDIDATES)
    write_log(run, "random.jsonl", [CANDIDATES[0], *CANDIDATES[1:2] * 3])
    assert names(run, search_strategy="both", cells=3, cell=("warp", "decoder", f"own={Genotype(BEST)}")) == [
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
    assert names(run, cells=0, cell=("concat",)) == ["baseline", "cell-concat"]


def test_seeds_cells_without_a_past_and_fewer_candidates(run):
    """Every network is trained as often as there are seeds. A cell that does not look at the past has no
    row without it. Fewer candidates only use the first ones; more are not there yet."""
    write_log(run, "search.jsonl", CANDIDATES)
    assert names(run, cells=1, seeds=2) == ["baseline", "baseline-seed1", "cell-0", "cell-0-seed1",
                                            "cell-0-without-past", "cell-0-without-past-seed1"]
    assert [network.seed for network in networks.networks(run)] == [0, 1, 0, 1, 0, 1]
    assert names(run, seeds=1, without_past=False) == ["baseline", "cell-0"]
    assert networks.networks(run)[1].genotype == Genotype(BEST)
    assert names(run, without_past=True, search_candidates=1) == ["baseline", "cell-0"]
    assert networks.networks(run)[1].genotype == Genotype(BLIND)
    run.recipe.search_candidates = 5
    with pytest.raises(InputError, match="search.jsonl: has 4 of 5 candidates"):
        networks.networks(run)
    write_log(run, "search.jsonl", CANDIDATES[1:2])
    with pytest.raises(InputError, match="search.jsonl: has 1 .*0 did not fail"):
        networks.networks(run)


def test_name_equals_genotype_names_a_row(tmp_path):
    """For every form of a cell, and as a recipe keeps it. Without a name: test_cases.py."""
    genotype, path = Genotype(BEST), tmp_path / "x.json"
    path.write_text(genotype.to_json())
    for text in (genotype, genotype.to_json(), genotype.to_tokens(), path):
        assert networks.cell_of(f"past={text}") == ("past", genotype)
        assert networks.cell_texts([f"past={text}", f"past = {text}"]) == (f"past={genotype}",)
    assert networks.cell_texts(["d2=decoder", "warp=warp", "w2=warp"]) == (
        "d2=decoder", "warp", f"w2={CELLS['warp']}")
    assert networks.cell_of("".join(str(genotype).split()))[0].startswith("custom-")      # "node0=..."
    for arguments, said in ((["0=warp"], "invalid"), (["a-seed1=warp"], "invalid"), (["x="], "invalid"),
                            (["nowhere.json"], "nowhere"), (["warp=concat"], "two cells"),
                            (["decoder=warp"], "two cells"), (["x=warp", "x=concat"], "two cells")):
        with pytest.raises(InputError, match=f"--cell.*{said}"):
            networks.cell_texts(arguments)


@pytest.mark.parametrize("of", ["", "-alone"])
def test_a_trained_cell_keeps_its_name(run, of):
    """Also when a better one is found, or another one is random search's median; and no other cell may take
    it by --cell."""
    trained(run, f"cell-0{of}", BLIND)
    write_log(run, "search.jsonl", CANDIDATES)
    cells = {network.name: network.genotype for network in networks.networks(run) if network.genotype}
    best = Genotype(BEST)
    assert cells == {"cell-0": Genotype(BLIND), "cell-1": best, "cell-1-without-past": best}

    write_log(run, "random.jsonl", [("ok", reward, [(loc, 0, 0, 0, 0), (2, 5, 0, 0, 0)])
                                    for loc, reward in enumerate((0.2, 0.5, 0.1, 0.4, 0.3))])
    assert names(run, search_strategy="random", cells=1, median_cell=True)[2:] == ["random-median-0"]
    assert networks.networks(run)[2].genotype == Genotype([(4, 0, 0, 0, 0), (2, 5, 0, 0, 0)])      # 0.3
    trained(run, f"random-median-0{of}", BLIND)                           # of a shorter search
    assert names(run)[2:] == ["random-median-0", "random-median-1"]
    assert networks.networks(run)[2].genotype == Genotype(BLIND)

    trained(run, f"cell-x{of}", BLIND)
    assert names(run, cells=0, cell=(f"x={Genotype(BLIND)}",)) == ["baseline", "cell-x"]
    with pytest.raises(InputError, match="--cell x: .*cell-x.pt"):
        names(run, cell=(f"x={best}",))


def test_the_rise_of_the_rewards_is_said_where_there_are_enough(run, capsys):
    run.recipe.search_strategy = "both"
    write_log(run, "search.jsonl", [("ok", reward / 10, BEST) for reward in (1, 3, 2, 4, 5, 5, 6, 8, 9)])
    write_log(run, "random.jsonl", CANDIDATES[:3])
    table.print_rise(run)
    assert capsys.readouterr().out == "mean reward of PPO's candidates, 2 at a time: 0.20 0.30 0.50 0.70\n"


# ---- the table

def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_table_has_a_row_of_every_network_and_key_frame_interval(smoke):
    """The best is the cell that is best on val, and no control."""
    out, results = (smoke.parent / "run.out").read_text(), results_of(smoke)
    rows = results["rows"]
    log = [entry for entry in files.read_log(smoke / "search.jsonl").values() if entry["status"] == "ok"]
    best = Genotype.from_tokens(max(log, key=lambda entry: entry["reward"])["tokens"])
    assert [(row["name"], row["key_frame_every"]) for row in rows] == [
        ("static", 1), ("baseline", 1), ("cell-0", 0), ("cell-0", 3), ("cell-0-without-past", 0),
        ("cell-0-without-past", 3), ("random-0", 0), ("random-0", 3)]
    assert rows[2]["genotype"] == str(best)
    for row in rows:
        line = next(line for line in out.splitlines() if line.startswith(f"{row['title']:38}"))
        assert 0 < row["test"]["miou"] < 1 and 0 <= row["test"]["consistency"] <= 1
        assert row["ms_sequence"] == row["ms_clip"] == row["ms_key_frame"]            # all are 1 here
        assert f" {100 * row['test']['miou']:.1f} " in out and f"{row['parameters']:,}" in line
        assert all(iou is None or 0 <= iou <= 1 for iou in row["val"]["iou"].values())
    assert len({row["test"]["miou"] for row in rows}) > 5                 # the test sees more than one answer
    assert results["best"] == max(rows[2], rows[6], key=lambda row: row["val"]["miou"])["name"]


@pytest.mark.parametrize("rows, recipe", [(7, {}), (8, {}), (8, {"recipe": "another"})])
def test_a_table_that_was_cut_goes_on(smoke, small, tmp_path, monkeypatch, capsys, rows, recipe):
    """Before its last row, or after it and before its end. Other recipes' rows are scored again. The command
    that is printed last can be pasted."""
    folder, scored = copy_of(smoke, tmp_path).rename(tmp_path / "it's my run"), []
    before, evaluate_video = results_of(smoke), train.evaluate_video
    monkeypatch.setattr(train, "evaluate_video", lambda *a: scored.append(a[3:]) or evaluate_video(*a))
    kept = {"recipe": before["recipe"], "rows": before["rows"][:rows], **recipe}
    (folder / "results.json").write_text(json.dumps(kept))
    train.main([*arguments_of(folder), "--stage", "evaluate"])
    assert len(scored) == 16 if recipe else scored == [("val", 3), ("test", 3)] * (8 - rows)
    assert results_of(folder) == before
    words = shlex.split(capsys.readouterr().out.rpartition("python ")[2])
    assert words[words.index("--run") + 1] == str(folder)


def a_row(run, iou, **more):
    scores = {"miou": 0.0, "fwiou": 0.0, "macc": 0.0, "consistency": math.nan, "iou": iou}
    costs = {"parameters": 1, "multiply_adds": 1, "ms_encoder": 1, "ms_key_frame": 1, "ms_later_frame": 1}
    row = table.new_row(run, Network("baseline", "a title"), 1, {**costs, "machine": "here", **more},
                        {"val": scores, "test": scores})
    return {**row, **more}


def test_what_was_not_measured_is_no_zero_and_times_of_two_machines_are_told_apart(run, capsys):
    """Not one labelled pixel: every IoU is NaN."""
    classes = data.Synthetic.classes
    first = a_row(run, dict.fromkeys(classes, math.nan))
    assert first["test"]["miou"] is None and first["test"]["consistency"] is None
    assert a_row(run, dict.fromkeys(classes, 0.0))["test"]["miou"] == 0
    rows = [first, a_row(run, dict.fromkeys(classes, math.nan), machine="there", title="another")]
    for shown, marks in ((rows, "12"), (rows[:1], "")):
        table.print_table({"rows": shown, "reported": "test"})
        out = capsys.readouterr().out
        lines = [line for line in out.splitlines() if line.startswith(("a title", "another"))]
        assert [line[-3:] for line in lines[:2] if line.endswith("]")] == [f"[{mark}]" for mark in marks]
        assert ("[2] on there" in out) == bool(marks) and " 0.0 " not in out


def test_a_checkpoint_alone_reproduces_its_row_and_leaves_no_file(smoke, small, tmp_path, capsys):
    """On the data, in a folder without trainings, and without the encoder's weights."""
    flags = ["--dataset", "synthetic", "--schedule", "smoke", "--key-frames", "0", "3", "--encoder-weights",
             "nowhere", "--run", str(tmp_path), "--stage", "evaluate", "--network"]
    for name in ("cell-0", "static"):
        train.main([*flags, str(smoke / f"{name}.pt")])
        out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for row in results_of(smoke)["rows"]:
            if row["name"] == name:
                interval = {0: "first only", 1: "every", 3: "every 3"}[row["key_frame_every"]]
                scores = [f"{100 * row['test'][key]:.1f}" for key in ("miou", "consistency")]
                assert any(line.startswith(" ".join([name, interval, *scores])) for line in out)
    assert content_of(tmp_path) == {}
    other = files.load(smoke / "cell-0.pt")
    files.save(tmp_path / "other.pt", {**other, "classes": other["classes"][::-1]})
    with pytest.raises(InputError, match="other.pt: its classes"):
        train.main([*flags, str(tmp_path / "other.pt")])


def test_examples_are_the_frames_of_each_quarter_that_differ_most(run):
    """In the share of their labelled pixels. No other label maps are kept: on CityScapes each has two million
    pixels. An unlabelled frame, which the baseline leaves out, is no example."""
    frames = run.frames("test")                                           # 2 clips of 4, so quarters of 2
    frames.labels[:] = 0
    frames.labels[:, 40:] = data.IGNORE                                   # 40 of 48 rows are labelled
    frames.list[3] = data.Frame(frames.list[3].image, None)
    living, most = [], 0

    def predictions(which, height):
        nonlocal most
        for k, label in enumerate(frames.labels):
            if which == "baseline" and frames.list[k].label is None:
                continue
            pred = torch.zeros_like(label)
            pred[:height * (k % 4 + 1)] = 1                               # a clip's later frames differ more
            pred[40:] = height                                            # ignored
            living.append(weakref.ref(pred))
            yield k, pred, label
            del pred
            most = max(most, sum(there() is not None for there in living))

    chosen = table.differing_frames(frames, predictions("baseline", 0), predictions("cell", 1), "cell-0")
    expected = [1, 2, 5, 7]
    assert chosen["names"] == [f"{k // 4:03d}_{k % 4:04d}" for k in expected]
    assert chosen["cell"][:, :40].sum((1, 2)).tolist() == [64 * (k % 4 + 1) for k in expected]
    assert chosen["differ"] == [(k % 4 + 1) / 40 for k in expected]
    assert most <= 2 * 4 + 3                                              # and those at hand


# ---- time

@pytest.mark.parametrize("every, sequence, clip", [(0, 6, 5), (3, 6, 6.5), (1, 10, 10), (2, 8, 7), (9, 6, 5)])
def test_mean_times_by_hand(every, sequence, clip):
    """Table 5's: a key frame takes 10 ms, a later one 4. A sequence of three, clips of four and of eight."""
    costs = {"ms_key_frame": 10.0, "ms_later_frame": 4.0}
    assert table.mean_ms(costs, every, [3]) == pytest.approx(sequence)
    assert table.mean_ms(costs, every, [4, 8]) == pytest.approx(clip)


def test_frames_are_timed_as_they_are_evaluated_padded_and_in_float32(run, monkeypatch):
    """The network pads 48 x 64 to 56. What each call runs: the encoder's input, then decoder or cell."""
    video, seen, called = VideoSegmenter(Arch2(6), DynamicCell(BEST, 6), pad=56).eval(), [], {}
    for kind, method in (Arch2, "encode"), (Arch2, "decode"), (DynamicCell, "forward"):
        def note(self, *x, method=method, real=getattr(kind, method), **more):
            seen.append(x[0] if method == "encode" else method)
            return real(self, *x, **more)
        monkeypatch.setattr(kind, method, note)

    def milliseconds_in_turn(calls, repeats):
        for name, call in calls.items():
            seen.clear()
            call()
            image, *called[name] = seen
            assert image.shape == (1, 3, 56, 64) and image.is_contiguous(memory_format=torch.channels_last)
            assert (image[:, :, :4] == 0).all() and (image[:, :, 4] != 0).any()
            assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(table, "milliseconds_in_turn", milliseconds_in_turn)
    assert table.frame_costs(run, video)["parameters"] == sum(p.numel() for p in video.parameters())
    assert called == {"ms_encoder": [], "ms_key_frame": ["decode"], "ms_later_frame": ["forward"]}


def test_latency_is_a_factor_of_the_reward(run, monkeypatch):
    """Sect. 1's outlook: reward * (time / target) ** -W. Times in ms: the cell's 4, the decoder's 16."""
    monkeypatch.setattr(table, "milliseconds_in_turn", lambda calls: {
        name: call() and {"cell": 4.0, "decoder": 16.0}[name] for name, call in calls.items()})
    static = Arch2(6).eval()
    with torch.no_grad():
        _, layer2, layer3, layer4 = features = static.encode(torch.rand(2, 3, 48, 64))
        maps = {"layer2": layer2, "layer3": layer3, "layer4": layer4, "dec": static.decode(features)[0]}
    stored = types.SimpleNamespace(maps={name: x.half() for name, x in maps.items()})
    for weight, target, reward in ((0.0, 1.0, 0.6), (0.5, 1.0, 0.3), (0.5, 0.0, 1.2)):
        run.recipe.latency_weight, run.recipe.latency_target, entry = weight, target, {"reward": 0.6}
        table.weigh_latency(run, Genotype(BEST), static, stored, entry)
        assert entry == ({"reward": pytest.approx(reward), "ms": 4.0} if weight else {"reward": 0.6})


# ---- a finished run is added to

def test_what_is_compared_may_change_and_what_stands_stays(smoke, small, tmp_path, capsys):
    """More candidates, a second cell, a cell by name, another key-frame interval. A better cell is found,
    and the first keeps its name."""
    folder = copy_of(smoke, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    rows = results_of(smoke)["rows"]
    first = Genotype.from_json(files.load(smoke / "cell-0.pt")["genotype"])
    log = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    worst, best = sorted(log, key=lambda entry: entry["reward"])[::3]
    worst["reward"], best["reward"] = 1.0, 0.9    # as if the search had found it later
    (folder / "search.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    more = ["--search-candidates", "6", "--search-strategy", "ppo", "--cells", "2", "--no-without-past",
            "--cell", "decoder", "--key-frames", "0", "2"]
    train.main([*arguments_of(folder), *more])

    assert len(files.read_log(folder / "search.jsonl")) == 6
    out, results = capsys.readouterr().out, results_of(folder)
    assert "pretrain: nothing is missing" in out and "search: done in" in out
    new = results["rows"][len(rows):]
    assert results["rows"][:len(rows)] == rows
    assert sorted((row["name"], row["key_frame_every"]) for row in new) == sorted(
        [("cell-0", 2), ("cell-1", 0), ("cell-1", 2), ("cell-decoder", 0), ("cell-decoder", 2)])
    cells = {row["name"]: row["genotype"] for row in results["rows"]}
    assert cells["cell-0"] == str(first) and cells["cell-1"] == str(Genotype.from_tokens(worst["tokens"]))
    for name, content in before.items():
        assert name in ("controller.pt", "examples.pt") or (folder / name).read_bytes() == content
    found = [row for row in results["rows"]
             if row["key_frame_every"] == 0 and row["name"] in ("cell-0", "cell-1", "random-0")]
    assert results["best"] == max(found, key=lambda row: row["val"]["miou"])["name"]


def test_named_cells_and_seeds_need_no_search(smoke, small, tmp_path, capsys):
    """With --end-epochs 0 the static network stays as it is: what are its features worth to a cell?"""
    folder = copy_of(smoke, tmp_path, "static.pt")
    flags = "--cells 0 --cell attention decoder --seeds 2 --end-epochs 0 --key-frames 0"
    train.main([*arguments_of(folder), *flags.split()])
    out, results = capsys.readouterr().out, results_of(folder)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["static", "baseline", "baseline-seed1", "cell-attention", "cell-attention-seed1",
                          "cell-decoder", "cell-decoder-seed1"]
    assert not list(folder.glob("*.jsonl")) and results["best"].startswith("cell-attention")
    adds = {name: row["multiply_adds"] for name, row in rows.items()}
    assert adds["cell-decoder"] == adds["static"] > adds["cell-attention"]
    names = "static", "cell-attention", "cell-attention-alone", "cell-attention-seed1"
    static, cell, alone, other = (files.load(folder / f"{name}.pt") for name in names)
    assert all(torch.equal(value, cell["static"][key]) for key, value in static["static"].items())
    assert all(torch.equal(value, cell["cell"][key]) for key, value in alone["cell"].items())
    assert rows["static"]["test"] == rows["baseline"]["test"] != rows["cell-attention"]["test"]
    assert not torch.equal(cell["cell"]["classifier.bias"], other["cell"]["classifier.bias"])
    scores = [100 * rows[name]["test"]["miou"] for name in ("cell-attention", "cell-attention-seed1")]
    assert f"{np.mean(scores):.1f} ±{np.std(scores, ddof=1):.1f}" in out


# ---- real layouts

def imitate(dataset, root):
    """A few small clips in the layout of a real dataset: pictures and labels from the synthetic videos."""
    source = data.Synthetic(None, "train")
    for split in ("train", "val", "test"):
        for c, clip in enumerate(source.clips[:4 if split == "train" else 2]):
            for t, frame in enumerate(clip[:4 if dataset == "camvid" else 2]):
                (image, label), name = source.read(frame), f"clip{c}_{30 * t:06d}.png"
                if dataset == "camvid":
                    files = {f"{split}/{name}": image, f"{split}annot/{name}": label}
                else:                        # only the second frame is annotated
                    place, name = f"{split}/ulm", f"ulm_{c:06d}_{18 + t:06d}"
                    files = {f"leftImg8bit_sequence/{place}/{name}_leftImg8bit.png": image}
                    if t == 1:               # labelIds 7, 8, 11 and 12 are classes, 9 and 10 not
                        files[f"gtFine/{place}/{name}_gtFine_labelIds.png"] = label + 7
                for path, pixels in files.items():
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(root / path)


@pytest.mark.parametrize("dataset, length, make", [("camvid", 3, make_few), ("cityscapes", 2, make_small)])
def test_every_stage_runs_on_a_real_layout(dataset, length, make, monkeypatch, tmp_path, capsys):
    """One of them with the whole arch2."""
    make(monkeypatch.setattr)
    imitate(dataset, tmp_path / "data")
    flags = ("--schedule smoke --encoder-weights none --search-batch 2 --cell-batch 2 --static-batch 4 "
             "--meta-val-share 0.25 --cells 1 --search-candidates 2 --no-without-past").split()
    if dataset == "cityscapes":
        flags += "--input-longer-side 96 --input-crop 64".split()
    folders = "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")
    train.main(["--dataset", dataset, *folders, *flags])
    results, out = results_of(tmp_path / "run"), capsys.readouterr().out
    assert [row["name"] for row in results["rows"]] == ["static", "baseline", "cell-0"]
    assert results["reported"] == ("test" if dataset == "camvid" else "val")
    assert f"{results['reported']} split" in out and "the encoder starts from random weights" in out
    assert files.load(tmp_path / "run" / "recipe.json")["recipe"]["sequence_length"] == length
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert {"curve-pretrain", "fig3-rewards", "fig4-sampling", "curve-finetune"} <= figures
    assert {"fig5-examples", "fig7-cell-0"} <= figures
