"""The pictures show what the run's files say: pixels and counts are read back from them."""
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import InputError
from dyncell import Genotype
from ops import AGGREGATIONS, OPERATIONS
from experiment import figures
from util import charts

FIRST = Genotype([("dec_prev", "layer2", "gap", "skip", "concat"),
                  ("dec_prev", "node0", "gap", "zero", "sum")])


def genotype(rng, layers):
    tokens = []
    for k in range(layers):
        tokens += [rng.randrange(n) for n in (5 + k, 5 + k, 12, 12, 6)]
    return Genotype.from_tokens(tokens)


def entry(k, reward, stopped=False, status="ok", cell=FIRST):
    return {"candidate": k, "tokens": cell.to_tokens(), "genotype": json.loads(cell.to_json()),
            "reward": reward, "half_reward": reward, "stopped": stopped, "status": status, "seconds": 1.0}


def write_log(path, log):
    path.write_text("".join(json.dumps(e) + "\n" for e in log))


def training(path, epochs, validated=(), **more):
    """A training's checkpoint, as far as the figures look at it; sequences of three frames."""
    history = []
    for epoch in range(1, epochs + 1):
        history.append({"epoch": epoch, "loss": 2 / epoch, "seconds": 1.0})
        if epoch in validated:
            history[-1]["val_miou"] = 0.5
    torch.save({"history": history, "recipe": {"sequence_length": 3}, **more}, path)


def example():
    """Two frames of the synthetic videos, top rows ignored. The cell is right, the baseline says class 1."""
    synthetic = data.Synthetic(split="test")
    images, labels = map(np.stack, zip(*(synthetic.read(clip[0]) for clip in synthetic.clips[:2])))
    labels[:, :20] = 255
    maps = {"images": images, "labels": labels, "baseline": np.ones_like(labels),
            "cell": np.where(labels == 255, 0, labels)}
    saved = {key: torch.from_numpy(value) for key, value in maps.items()}
    return {**saved, "names": ["000_0000", "001_0000"], "classes": synthetic.classes, "differ": [0.5, 0.25],
            "palette": synthetic.palette.tolist(), "cell_name": "cell-0"}


def row(title, miou, every=0):
    return {"name": title, "title": title, "key_frame_every": every, "test": {"miou": miou}}


RESULTS = {"reported": "test", "rows": [
    row("baseline", 0.5, 1), row("cell", 0.7), row("cell", 0.9, 10), row("cell", 0.6),
    row("nothing labelled", None)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with everything in it."""
    folder, rng = tmp_path_factory.mktemp("run"), random.Random(0)
    log = [entry(k, 0.3 + 0.01 * k, stopped=k % 3 == 1, cell=genotype(rng, 3)) for k in range(12)]
    write_log(folder / "search.jsonl", log)
    write_log(folder / "random.jsonl", [entry(k, 0.3) for k in range(12)])
    training(folder / "static.pt", 6, (3, 6))
    training(folder / "baseline.pt", 4)
    for k in range(2):
        text = json.dumps(log[-1 - k]["genotype"])
        training(folder / f"cell-{k}-alone.pt", 4, genotype=text)
        training(folder / f"cell-{k}.pt", 4, genotype=text)
    training(folder / "cell-decoder.pt", 4, genotype="decoder")           # no cell, so no diagram
    shutil.copy(folder / "cell-0.pt", folder / "cell-0-without-past.pt")  # no diagram of its own
    torch.save(example(), folder / "examples.pt")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


BY_STAGE = {"pretrain": ["curve-pretrain"], "search": ["fig3-rewards", "fig4-sampling"],
            "finetune": ["curve-finetune", "fig7-cell-0", "fig7-cell-1"],
            "evaluate": ["fig5-examples", "tables3-4-miou"]}


def test_every_figure_is_drawn_and_not_blank(run):
    paths = figures.draw(run)
    assert [path.name for path in paths] == [f"{name}.png" for names in BY_STAGE.values() for name in names]
    assert sorted((run / "figures").iterdir()) == sorted(paths)           # nothing half-written is left
    for path in paths:
        image = Image.open(path)
        assert image.mode == "RGB" and min(image.size) >= 200
        colours = {colour: count for count, colour in image.getcolors(1 << 24)}
        assert len(colours) > 20 and colours[255, 255, 255] < 0.99 * image.width * image.height, path
    for stage, names in BY_STAGE.items():                                 # a stage draws its own
        assert [path.stem for path in figures.draw(str(run), stage)] == names


def test_what_is_missing_is_left_out(tmp_path):
    write_log(tmp_path / "random.jsonl", [entry(k, 0.3 + 0.1 * k) for k in (2, 0, 1)])
    assert [path.stem for path in figures.draw(tmp_path)] == ["fig3-rewards"]     # a random search alone
    training(tmp_path / "static.pt", 2, optimizers=[])                    # a training that goes on
    training(tmp_path / "cell-0-alone.pt", 2, genotype=FIRST.to_json())
    (tmp_path / "search.jsonl").write_text(json.dumps(entry(0, 0.3)) + '\n{"candidate": 1, "tok')
    drawn = [path.stem for path in figures.draw(tmp_path)]
    assert drawn == ["curve-pretrain", "fig3-rewards", "fig4-sampling", "curve-finetune", "fig7-cell-0"]
    assert figures.draw(tmp_path, again=False) == []
    (tmp_path / "figures/fig3-rewards.png").unlink()
    assert [path.stem for path in figures.draw(tmp_path, again=False)] == ["fig3-rewards"]


def test_the_command_and_its_errors(run, tmp_path, capsys):
    figures.main([str(run)])
    assert capsys.readouterr().out.count(".png\n") == 8
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=str(folder)):
            figures.main([str(folder)])
    assert not list(tmp_path.iterdir())
    for name, stage in (("static.pt", "pretrain"), ("search.jsonl", "search")):
        (tmp_path / name).write_text("nonsense\n")
        with pytest.raises(InputError, match=name):
            figures.draw(tmp_path, stage)


# ---------------------------------------------------------------------------------------------------------
# Figs. 3 and 4, training curves

def pixel(canvas, plot, x, y):
    return canvas.finished().getpixel((int(plot.x(x)), int(plot.y(y))))


def test_each_candidate_is_a_mark_where_the_log_says():
    log = [entry(0, 0.31), entry(1, 0.27, stopped=True), entry(2, 0.0, status="not finite"), entry(3, 0.47),
           entry(4, 0.38, stopped=True)]
    canvas = figures.rewards(log)                         # too few for a running mean
    (plot,) = canvas.plots
    assert plot.yrange[0] > 0                             # the failed one does not stretch the axis
    for e in log:
        at = pixel(canvas, plot, e["candidate"], e["reward"] if e["status"] == "ok" else plot.yrange[0])
        assert at == (charts.BLUE if not e["stopped"] else (255, 255, 255)), e
    pixels = np.array(canvas.finished(), int)[int(plot.top):int(plot.bottom) + 6, int(plot.left):]
    blue = (pixels[..., 2] - pixels[..., 0] > 40).any(0)                  # columns
    assert (blue[1:] > blue[:-1]).sum() == len(log)                       # no other mark

    other = [entry(0, 0.2), entry(1, 0.3), entry(2, 0.4, stopped=True)]   # random search, beside it or alone
    for ppo in ([entry(k, 0.5) for k in range(3)], []):
        canvas = figures.rewards(ppo, other)
        (plot,) = canvas.plots
        assert [pixel(canvas, plot, k, 0.5) for k in range(len(ppo))] == len(ppo) * [charts.BLUE]
        assert [pixel(canvas, plot, k, 0.2 + 0.1 * k) for k in range(2)] == 2 * [charts.VERMILLION]
        assert min(pixel(canvas, plot, 2, 0.4)) > 200                     # hollow


@pytest.mark.parametrize("count", [20, 1000])
def test_the_mean_is_the_mean_of_the_last(count):
    means = figures.running_mean([1, 3, math.nan, 5, math.nan, math.nan], 2)
    assert means[:5] == [1, 2, 3, 5, 5] and math.isnan(means[5])
    rng = random.Random(count)
    log = [entry(k, rng.uniform(0.2, 0.5)) for k in range(count)]
    log[count // 2] = entry(count // 2, 0.8)
    canvas = figures.rewards(log)
    (plot,) = canvas.plots
    assert pixel(canvas, plot, count // 2, 0.8) == charts.BLUE
    window = max(5, count // 20)
    mean = sum(e["reward"] for e in log[-window - 1:-1]) / window     # not the last: a line's end is blurred
    assert max(pixel(canvas, plot, count - 2, mean)) < 60
    # No line before the first full window.
    left, right = int(plot.left) + 2, int(plot.x(window - 1)) - 2
    assert np.array(canvas.finished())[int(plot.top):int(plot.bottom) - 1, left:right].max(axis=2).min() > 60


def test_what_is_sampled_by_hand_also_by_a_new_operation(monkeypatch):
    assert figures.sampled(entry(0, 0.5)) == (["gap", "skip", "gap", "zero"], ["concat", "sum"],
                                              ["dec_prev", "layer2", "dec_prev"])
    for count in (1, 8):                                  # the same cell eight times
        canvas = figures.sampling([entry(k, 0.5) for k in range(count)])
        operations, aggregations, inputs = canvas.plots
        for x in np.linspace(0.05, count - 1.05, 3) if count > 1 else [0]:
            assert pixel(canvas, operations, x, 50) == charts.STYLES[list(OPERATIONS).index("gap")][1]
            assert pixel(canvas, inputs, x, 200 / 3) == figures.SOURCES[1]        # dec_prev, as in Fig. 7
    assert pixel(canvas, aggregations, 3, 50) in [charts.STYLES[k][1] for k in range(2)]  # sum under concat
    assert len(set(charts.STYLES)) >= len(OPERATIONS) and len(set(figures.SOURCES)) == 5
    monkeypatch.setitem(OPERATIONS, "my_op", torch.nn.Identity)           # the dict that every script shares
    cell = Genotype([("dec_prev", "layer2", "my_op", "my_op", "sum")])
    canvas = figures.sampling([entry(k, 0.5, cell=cell) for k in range(8)])
    assert pixel(canvas, canvas.plots[0], 3, 100) == charts.STYLES[12 % len(charts.STYLES)][1]


@pytest.mark.parametrize("log", [
    [entry(0, 0.5)], [entry(0, 0.0, status="out of memory")], [entry(k, math.nan) for k in range(9)],
    [entry(k, 0.4) for k in range(9)], [entry(k, 0.0, stopped=True) for k in range(30)],
    [entry(k, math.nan if k % 9 else 0.1) for k in range(30)]])
def test_odd_logs(log):
    for canvas in (figures.rewards(log), figures.rewards(log, log), figures.sampling(log)):
        canvas.finished()


def test_losses_are_per_frame(tmp_path):
    """A history has those of a sequence: of two frames where the cell is trained alone, else of three."""
    training(tmp_path / "baseline.pt", 1)                                 # loss 2
    training(tmp_path / "cell-0-alone.pt", 4, genotype=FIRST.to_json())   # losses 2 / epoch
    training(tmp_path / "cell-0.pt", 1, genotype=FIRST.to_json())
    (_, canvas), _ = figures.draw_finetune(tmp_path)
    alone, whole = canvas.plots
    (_, first), (_, second) = charts.STYLES[:2]
    for epoch, loss in (1.1, 0.95), (2, 1 / 2), (3, 1 / 3):
        assert np.abs(np.subtract(pixel(canvas, alone, epoch, loss), second)).max() < 40, epoch
    assert pixel(canvas, whole, 1, 2 / 3) in (first, second)


def test_names_stand_beside_the_ends_of_their_lines_in_their_order():
    """Twelve lines end at one point, others far from it: the names don't overlap and stay at the plot."""
    for ends in ([0.0] * 12, [1.0] * 12, [1.0, 0.5, *[0.0] * 10], [k % 3 for k in range(24)]):
        lines = {str(k): [(0, end / 2), (9, end)] for k, end in enumerate([*ends, math.nan])}
        canvas = figures.panels("title", "x", {"y": lines, "empty": {"a": []}})
        (plot,) = canvas.plots                            # the empty one is left out
        pixels = np.array(canvas.finished(), int)[:, 778:798]             # the samples of the lines
        rows = np.flatnonzero((pixels.max(2) - pixels.min(2) > 60).any(1) | (pixels.max(2) < 60).any(1))
        places = [row for row in rows if row - 1 not in rows]
        assert len(places) == len(ends) and min(np.diff(places)) >= 20
        assert plot.top - 16 <= places[0] and places[-1] <= plot.bottom + 16


# ---------------------------------------------------------------------------------------------------------
# Fig. 7

def cells():
    """Random cells, and the extremes: everything from one input, a chain, all side by side."""
    rng = random.Random(1)
    chain = [(0, 0)] + [(4 + k, 4 + k) for k in range(1, 5)]
    found = [genotype(rng, 1 + k % 8) for k in range(12)]
    side, far = [(k, 4 - k) for k in range(5)], [(0, 4), (5, 0), (6, 0), (7, 0), (0, 4)]
    for places in ([(1, 1)] * 5, chain, side, far):
        found.append(Genotype([(a, b, "conv3x3_r12", "conv3x3_r12", "predictive") for a, b in places]))
    return found


def test_lines_join_what_the_genotype_says():
    """Each operation's line has the colour of its source, and a dot on the wire of its source alone."""
    for g in cells():
        image = figures.cell(g, "cell").finished()
        end = figures.wire(5 + len(g))                    # the operations begin right of it
        for k, layer in enumerate(g):
            for source, y in (layer.loc1, 160 + 108 * k), (layer.loc2, 204 + 108 * k):
                colour = figures.SOURCES[source] if source < 5 else charts.INK
                assert {image.getpixel((x, y)) for x in (end - 4, end - 1)} == {colour}, g
                for other in range(5 + k):                # beside a wire, and above the line
                    corner = image.getpixel((int(figures.wire(other)) + 2, y - 3))
                    assert (corner == colour) == (other == source), (g, k, other)
            # From the aggregation to the right, for the output, or down, for the layers below.
            right = image.getpixel((end + 308, 182 + 108 * k)) == charts.INK
            down = image.getpixel((end + 230, 226 + 108 * k)) == charts.INK
            assert right == (5 + k in g.output()) and down == (not right)


def test_a_cell_is_drawn_with_its_colours_and_words_in_their_boxes():
    image = figures.cell(FIRST, "cell-0").finished()
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {figures.SOURCES[1], figures.SOURCES[2]} <= colours            # dec_prev and layer2
    assert not {figures.SOURCES[k] for k in (0, 3, 4)} & colours          # the unused ones are grey
    assert max(map(charts.text_width, [*OPERATIONS, *AGGREGATIONS])) < 112
    assert max(charts.text_width(name, 14) for name in ("previous frame", "current frame")) < 102


# ---------------------------------------------------------------------------------------------------------
# Tables 3 and 4, Fig. 5

def test_the_table_has_a_ring_per_seed_and_a_bar_at_the_mean(tmp_path):
    """Read off the picture: ticks are at 50, 52, ..., 70 % (540 pixels)."""
    canvas = figures.table(RESULTS)
    pixels, left = np.array(canvas.finished()), canvas.width - 120 - 540
    for y, rings, bar in ((117, [50], 50), (147, [60, 70], 65)):
        for k in range(50, 71):
            x = left + 27 * (k - 50)
            ring, middle = pixels[y, x - 5:x + 6], pixels[y - 9, x]
            assert ((ring == charts.INK).all(-1).sum() >= 2) == (k in rings), (y, k)
            assert (middle == charts.BLUE).all() == (k == bar), (y, k)
    dashed = pixels[130:, left - 1:left + 2].astype(int)                  # below the baseline's bar
    assert (dashed[..., 0] > dashed[..., 2] + 60).any(-1).sum() > 10
    assert canvas.height == 92 + 20 + 2 * 30 + 60                         # two lines
    (tmp_path / "results.json").write_text(json.dumps({"rows": RESULTS["rows"]}))         # not finished
    assert figures.draw(tmp_path) == []


def test_examples_show_the_maps():
    saved = example()
    image, palette = figures.examples(saved).finished(), [tuple(colour) for colour in saved["palette"]]
    start = image.width - 4 * 264 - 12
    for row in range(2):
        for y, x in ((5, 64), (40, 10), (60, 100), (90, 64)):
            left, top = start + 2 * x, 50 + row * (192 + 24) + 2 * y      # 128 x 96 frames, twice as large
            label, truth = int(saved["labels"][row, y, x]), image.getpixel((left + 264, top))
            assert image.getpixel((left, top)) == tuple(saved["images"][row, y, x].tolist())
            assert truth == palette[label] if label != 255 else min(truth) >= 160
            assert image.getpixel((left + 2 * 264, top)) == palette[1]
            assert image.getpixel((left + 3 * 264, top)) == palette[int(saved["cell"][row, y, x])]
    for key in ("images", "labels", "baseline", "cell"):                  # large frames are reduced
        saved[key] = saved[key].repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)
    assert figures.examples(saved).width == start + 4 * 328 + 12
