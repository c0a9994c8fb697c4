"""The pictures show what the run's files say: pixels, counts and layouts are checked against them."""
import itertools
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
from util import charts, label_maps

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
            "evaluate": ["fig5-examples", "table5-miou"]}


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
    assert figures.draw(tmp_path) == [] and not list(tmp_path.iterdir())
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


def test_the_command(run, tmp_path, capsys):
    figures.main([str(run)])
    assert capsys.readouterr().out.count(".png\n") == 8
    with pytest.raises(SystemExit):
        figures.main(["--help"])
    assert "python -m experiment.figures" in capsys.readouterr().out
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=str(folder)):
            figures.main([str(folder)])


def test_errors_name_the_file(tmp_path):
    (tmp_path / "static.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="static.pt"):
        figures.draw(tmp_path)
    (tmp_path / "search.jsonl").write_text("not JSON\n")
    with pytest.raises(InputError, match="search.jsonl"):
        figures.draw(tmp_path, "search")


# ---------------------------------------------------------------------------------------------------------
# Figs. 3 and 4

def pixel(canvas, plot, x, y):
    return canvas.finished().getpixel((int(plot.x(x)), int(plot.y(y))))


def islands(mask):
    """Number of connected regions (8 neighbours)."""
    left, count = {(y, x) for y, x in np.argwhere(mask).tolist()}, 0
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + i, x + j) for i, j in around} & left
            left -= near
            edge += near
    return count


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
    assert islands(pixels[..., 2] - pixels[..., 0] > 40) == len(log)


@pytest.mark.parametrize("count", [20, 300, 1000])
def test_the_best_candidate_is_on_top_and_the_mean_is_the_mean(count):
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


def test_random_search_stands_beside_or_alone():
    log = [entry(k, 0.5) for k in range(3)]
    other = [entry(0, 0.2), entry(1, 0.3), entry(2, 0.4, stopped=True)]
    for ppo in (log, []):
        canvas = figures.rewards(ppo, other)
        (plot,) = canvas.plots
        assert [pixel(canvas, plot, k, 0.5) for k in range(len(ppo))] == len(ppo) * [charts.BLUE]
        assert [pixel(canvas, plot, k, 0.2 + 0.1 * k) for k in range(2)] == 2 * [charts.VERMILLION]
        assert pixel(canvas, plot, 2, 0.4) not in (charts.BLUE, charts.VERMILLION)


def test_what_is_sampled_by_hand():
    assert figures.sampled([entry(0, 0.5)]) == ([["gap", "skip", "gap", "zero"]], [["concat", "sum"]],
                                                [["dec_prev", "layer2", "dec_prev"]])
    canvas = figures.sampling([entry(k, 0.5) for k in range(8)])          # the same cell eight times
    operations, aggregations, inputs = canvas.plots
    gap, concat = list(OPERATIONS).index("gap"), list(AGGREGATIONS).index("concat")
    for x in (0.05, 3.02, 6.95):                          # from the first candidate on, beside the marks
        assert pixel(canvas, operations, x, 50) == charts.STYLES[gap][1]
        assert pixel(canvas, inputs, x, 200 / 3) == figures.SOURCES[1]    # dec_prev has its colour of Fig. 7
    assert charts.STYLES[concat][1] in colours_of(canvas, aggregations)
    assert len(set(charts.STYLES)) >= len(OPERATIONS)


def colours_of(canvas, plot):
    box = [round(v) for v in (plot.left, plot.top, plot.right, plot.bottom)]
    return {colour for _, colour in canvas.finished().crop(box).getcolors(1 << 24)}


def test_lines_that_lie_on_each_other_are_all_seen():
    cell = Genotype([("dec_prev", "layer2", "gap", "skip", "sum"),  # sum and concat equally often, and so on
                     ("dec_prev", "layer2", "gap", "skip", "concat")])
    for count in (1, 2, 60):
        canvas = figures.sampling([entry(k, 0.5, cell=cell) for k in range(count)])
        operations, aggregations, inputs = canvas.plots
        assert set(charts.COLOURS) <= colours_of(canvas, operations)
        assert set(charts.COLOURS[:len(AGGREGATIONS)]) <= colours_of(canvas, aggregations)
        assert set(figures.SOURCES) <= colours_of(canvas, inputs)


def test_few_candidates_are_called_few_and_a_new_operation_is_drawn_too(monkeypatch):
    def title_width(count):
        pixels = np.array(figures.sampling([entry(k, 0.5) for k in range(count)]).finished())
        return np.flatnonzero((pixels[10:42] < 128).any(axis=(0, 2))).max()

    assert title_width(49) > title_width(50) + 200
    monkeypatch.setitem(OPERATIONS, "my_op", torch.nn.Identity)           # the dict that every script shares
    cell = Genotype([("dec_prev", "layer2", "my_op", "skip", "sum")])
    canvas = figures.sampling([entry(k, 0.5, cell=cell) for k in range(8)])
    assert charts.STYLES[12 % len(charts.STYLES)][1] in colours_of(canvas, canvas.plots[0])


@pytest.mark.parametrize("log", [
    [entry(0, 0.5)], [entry(0, 0.0, status="out of memory")], [entry(k, math.nan) for k in range(9)],
    [entry(k, 0.4) for k in range(9)], [entry(k, 0.0, stopped=True) for k in range(30)],
    [entry(k, math.nan if k % 9 else 0.1) for k in range(30)]])
def test_odd_logs(log):
    for canvas in (figures.rewards(log), figures.rewards(log, log), figures.sampling(log)):
        canvas.finished()


def test_running_mean_by_hand():
    means = charts.running_mean([1, 3, math.nan, 5, math.nan, math.nan], 2)
    assert means[:5] == [1, 2, 3, 5, 5] and math.isnan(means[5])


# ---------------------------------------------------------------------------------------------------------
# Axes and curves

def test_ticks_enclose_the_values():
    assert charts.round_ticks([0.31, 0.68]) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert charts.round_ticks([1, 3], whole=True) == [1, 2, 3]
    assert charts.round_ticks([math.nan, math.inf]) == charts.round_ticks([])
    assert charts.round_ticks([]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 6)
        high = low + rng.choice([0, rng.random() * 10 ** rng.randint(-6, 6)])
        ticks = charts.round_ticks([low, high])
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-6 * step and high - 1e-6 * step <= ticks[-1] and 2 <= len(ticks) <= 7
        assert f"{step:.0e}"[0] in "125"


def test_losses_are_per_frame(tmp_path):
    """A history has those of a sequence: of two frames where the cell is trained alone, else of three."""
    training(tmp_path / "baseline.pt", 1)                                 # loss 2
    training(tmp_path / "cell-0-alone.pt", 4, genotype=FIRST.to_json())   # losses 2 / epoch
    training(tmp_path / "cell-0.pt", 1, genotype=FIRST.to_json())
    (name, canvas), _ = figures.draw_finetune(tmp_path)
    alone, whole = canvas.plots
    blue = charts.STYLES[1][1]
    assert [pixel(canvas, alone, e, 1 / e) for e in range(1, 5)] == 4 * [blue]
    assert pixel(canvas, whole, 1, 2 / 3) == blue                         # the baseline's point lies below it


def test_curves_pass_through_their_points():
    epochs = range(1, 11)
    lines = {"baseline": [(e, 3.0 - 0.1 * e) for e in epochs], "cell-0": [(e, 1.0) for e in epochs]}
    canvas = charts.curves("title", [("loss", lines), ("empty", {"baseline": [], "cell-0": []})])
    (plot,) = canvas.plots                                # the empty panel is left out
    for (name, line), (_, colour) in zip(lines.items(), charts.STYLES):
        assert all(pixel(canvas, plot, x, y) == colour for x, y in line), name
    for odd in ([2.0], [math.nan], [1.0, math.nan, 1.0], [math.inf, 0.0]):
        line = list(enumerate(odd, start=1))
        charts.curves("title", [("loss", {"a": line})]).finished()


# ---------------------------------------------------------------------------------------------------------
# Fig. 7

def test_spread_by_hand():
    assert charts.spread([0, 0], [2, 2]) == [-1, 1]
    assert charts.spread([0, 0], [2, 2], low=0) == [1, 3]
    assert charts.spread([5, 0, 9], [2, 2, 2]) == [5, 0, 9]              # far enough apart: left as they are
    assert charts.spread([1, 0, 30], [4, 2, 2], high=20) == pytest.approx([2, -1, 19])


def cells():
    """Random cells, and the extremes: everything from one input, a chain, all side by side."""
    rng = random.Random(1)
    chain = [(0, 0)] + [(4 + k, 4 + k) for k in range(1, 5)]
    extremes = [[(1, 1)] * 5, chain, [(k, 4 - k) for k in range(5)], [(0, 4), (5, 0), (6, 0), (7, 0), (0, 4)]]
    found = [genotype(rng, 1 + k % 5) for k in range(50)]
    for places in extremes:
        found.append(Genotype([(a, b, "conv3x3_r12", "conv3x3_r12", "predictive") for a, b in places]))
    return found


def test_no_text_is_crossed_whatever_the_cell():
    for g in cells():
        boxes, edges = figures.cell_layout(g)
        assert len(boxes) == 5 + 3 * len(g) + 1
        rectangles = np.array([box[:4] for box in boxes], float)          # x0, y0, x1, y1
        for k, (x0, y0, x1, y1) in enumerate(rectangles):
            others = np.delete(rectangles, k, axis=0)
            apart = (others[:, 2] < x0) | (others[:, 0] > x1) | (others[:, 3] < y0) | (others[:, 1] > y1)
            assert apart.all(), g
            assert all(charts.text_width(word) < x1 - x0 for word in boxes[k][5])    # text stays in its box
        for _, line, _ in edges:
            fine = np.linspace(0, 1, 6)[:, None, None]
            points = (np.array(line[:-1]) * (1 - fine) + np.array(line[1:]) * fine).reshape(-1, 1, 2)
            inside = ((points > rectangles[:, :2] + 1e-6) & (points < rectangles[:, 2:] - 1e-6)).all(axis=2)
            assert not inside.any(), g


def test_lines_join_what_the_genotype_says():
    """Following every line from its source arrives at the operations that sample it."""
    for g in cells():
        boxes, edges = figures.cell_layout(g)
        assert [box[4] for box in boxes[:5]] == ["input" if k in g.inputs() else "unused" for k in range(5)]
        middles = [(x0 + x1) / 2 for x0, _, x1, *_ in boxes]
        starts = {k: [(middles[k], boxes[k][3])] for k in range(5)}       # where a source's line can go on
        operands = {}                     # rounded (x, y) of an operation's top -> (node, 0 or 1)
        for x, (_, y0, _, y1, kind, words) in zip(middles, boxes):
            if kind == "agg":
                node = 5 + int(words[1].removeprefix("node"))
                starts[node] = [(x, y1)]
                for slot, port in enumerate((x - figures.APART, x + figures.APART)):
                    operands[round(port), round(y0 - 20 - figures.OP[1])] = node, slot
        arrivals, lanes = [], []                          # lanes: where they end, one row further down
        gutters = [edge for edge in edges if len(edge[1]) > 2]            # not from operation to aggregation
        for source, line, arrow in sorted(gutters, key=lambda edge: edge[1][0][1]):
            assert min(math.dist(line[0], start) for start in starts[source]) < 1e-6
            if arrow:
                arrivals.append((operands.get((round(line[-1][0]), round(line[-1][1])), "output"), source))
            else:
                starts[source].append(line[-1])
                lanes.append(line[-1])
                further = [points[0] for other, points, _ in gutters if other == source]
                assert min(math.dist(start, line[-1]) for start in further) < 1e-6
        assert all(a[1] != b[1] or abs(a[0] - b[0]) > 20 for a, b in itertools.combinations(lanes, 2))
        expected = [((5 + k, slot), loc) for k, layer in enumerate(g) for slot, loc in enumerate(layer[:2])]
        assert sorted(map(str, arrivals)) == sorted(map(str, expected + [("output", k) for k in g.output()]))


def test_a_cell_is_drawn_with_its_colours():
    image = figures.cell(FIRST, "cell-0").finished()
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {figures.SOURCES[1], figures.SOURCES[2]} <= colours            # dec_prev and layer2
    assert not {figures.SOURCES[k] for k in (0, 3, 4)} & colours          # the unused ones are grey


# ---------------------------------------------------------------------------------------------------------
# Table 5, Fig. 5, label maps

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
    for row in range(2):
        for y, x in ((5, 64), (40, 10), (60, 100), (90, 64)):
            left, top = 20 + 2 * x, 50 + row * (192 + 40) + 2 * y         # 128 x 96 frames, twice as large
            label, truth = int(saved["labels"][row, y, x]), image.getpixel((left + 264, top))
            assert image.getpixel((left, top)) == tuple(saved["images"][row, y, x].tolist())
            assert truth == palette[label] if label != 255 else min(truth) >= 160
            assert image.getpixel((left + 2 * 264, top)) == palette[1]
            assert image.getpixel((left + 3 * 264, top)) == palette[int(saved["cell"][row, y, x])]
    for key in ("images", "labels", "baseline", "cell"):                  # large frames shrink
        saved[key] = saved[key].repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)
    assert figures.examples(saved).width == 4 * 320 + 3 * 8 + 40


def test_what_is_ignored_looks_like_no_class():
    """White with grey stripes: not black, which CamVid's pedestrians, (64, 64, 0), are close to."""
    pixels = charts.shown(np.full((64, 64), 255, np.uint8), data.CamVid.palette)
    assert {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} == {(255, 255, 255), (160, 160, 160)}
    labels = np.arange(11, dtype=np.uint8)[None]
    assert (charts.shown(labels, data.CamVid.palette) == data.CamVid.palette).all()


LABELS = np.array([[0, 1], [2, 255]], np.uint8)
PALETTE = np.array([(10, 20, 30), (200, 0, 0), (0, 200, 0)], np.uint8)


def test_colourise_and_overlay_by_hand():
    expected = [[[10, 20, 30], [200, 0, 0]], [[0, 200, 0], [0, 0, 0]]]
    for labels, palette in ((LABELS, PALETTE), (torch.from_numpy(LABELS), PALETTE.tolist())):
        colours = charts.colourise(labels, palette)
        assert colours.dtype == np.uint8 and colours.tolist() == expected
    image = np.full((2, 2, 3), 100, np.uint8)
    expected = [[[55, 60, 65], [150, 50, 50]], [[50, 150, 50], [100, 100, 100]]]
    assert charts.overlay(image, LABELS, PALETTE).tolist() == expected
    assert charts.overlay(image, LABELS, PALETTE, alpha=0).tolist() == image.tolist()
    assert (image == 100).all()


def test_indexed_png_round_trip(tmp_path):
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (37, 53)).astype(np.uint8)
    for values, kind in ((labels, np.uint8), (labels.T, np.int64)):       # and not contiguous
        charts.save_indexed(str(tmp_path / "a.png"), values.astype(kind), PALETTE)
        image = Image.open(tmp_path / "a.png")
        assert image.mode == "P" and (np.array(image) == values).all()
        assert (np.array(image.convert("RGB")) == charts.colourise(values, PALETTE)).all()
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (label_maps.read_label(tmp_path / "a.png", np.arange(256)) == values).all()


# ---------------------------------------------------------------------------------------------------------
# The contact sheet of python data.py

class Videos:
    """Clips of any length, for which pixels are (clip, frame, 0) and the label is the frame's number."""
    classes, palette = ["zero", "one", "two"], [(200, 0, 0), (0, 200, 0), (0, 0, 200)]

    def __init__(self, *lengths):
        self.clips = []
        for c, length in enumerate(lengths):
            self.clips.append([data.Frame(f"clip{c}_{t:03d}.png", None) for t in range(length)])

    def read(self, frame):
        clip, time = int(frame.image[4]), int(frame.image[6:9])
        image = np.zeros((96, 128, 3), np.uint8) + np.array([10 * clip, time, 0], np.uint8)
        return image, np.full((96, 128), min(time, 2), np.uint8)


def test_contact_sheet_shows_frames_over_each_clip_and_their_labels():
    canvas = charts.contact_sheet({"train": Videos(9, 2, 1, 5), "val": Videos(3)})       # three a split
    image = canvas.finished()
    for row, times in enumerate(([0, 2, 4, 6, 8], [0, 1], [0], [0, 1, 2])):
        for column in range(5):
            x, y = 180 + 264 * column + 128, 20 + row * (2 * 192 + 24) + 96
            at, below = image.getpixel((x, y)), image.getpixel((x, y + 192))
            if column < len(times):
                clip = row if row < 3 else 0
                assert at == (10 * clip, times[column], 0)
                assert below == Videos.palette[min(times[column], 2)]
            else:
                assert at == below == (255, 255, 255)
    legend = image.crop((0, image.height - 60, image.width, image.height))
    assert {*Videos.palette, (160, 160, 160)} <= {colour for _, colour in legend.getcolors(1 << 24)}
