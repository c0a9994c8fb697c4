"""The pictures show what the run's files say: pixels and counts are read back from them."""
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from controller import Controller
from data import InputError
from dyncell import Genotype
from ops import OPERATIONS
from experiment import figures
from util import charts

FIRST = Genotype([("dec_prev", "layer2", "gap", "skip", "concat"),
                  ("dec_prev", "node0", "gap", "zero", "sum")])


def genotype(seed, layers):
    return Genotype(Controller(layers).random(1, torch.Generator().manual_seed(seed))[0])


def entry(k, reward, stopped=False, status="ok", cell=FIRST):
    return {"candidate": k, "tokens": cell.to_tokens(), "reward": reward, "half_reward": reward,
            "stopped": stopped, "status": status}


def write_log(path, log):
    path.write_text("".join(json.dumps(e) + "\n" for e in log))


def training(path, epochs, **more):
    """A training's checkpoint, as far as the figures look at it; sequences of three frames."""
    history = [{"epoch": epoch, "loss": 2 / epoch, "val_miou": 0.5} for epoch in range(1, epochs + 1)]
    torch.save({"history": history, "recipe": {"sequence_length": 3}, **more}, path)


def example():
    """Two frames of the synthetic videos, top rows ignored. The cell is right, the baseline says class 1."""
    synthetic = data.Synthetic(split="test")
    images, labels = map(np.stack, zip(*(synthetic.read(clip[0]) for clip in synthetic.clips[:2])))
    labels[:, :20] = 255
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    return {"images": images, "labels": labels, "baseline": torch.ones_like(labels), "cell": labels % 255,
            "names": ["000_0000", "001_0000"], "classes": synthetic.classes, "differ": [0.5, 0.25],
            "palette": synthetic.palette.tolist(), "cell_name": "cell-0"}


RESULTS = {"reported": "test", "rows": [
    {"title": title, "key_frame_every": every, "test": {"miou": miou}} for title, miou, every in
    (("baseline", 0.52, 1), ("cell", 0.7, 0), ("cell", 0.9, 10), ("cell", 0.6, 0), ("no labels", None, 0))]}


BY_STAGE = {"pretrain": ["curve-pretrain"], "search": ["fig3-rewards", "fig4-sampling"],
            "finetune": ["curve-finetune", "fig7-cell-0", "fig7-cell-1"],
            "evaluate": ["fig5-examples", "tables3-4-miou"]}


@pytest.fixture
def drawn(monkeypatch):
    """A list of the plots that are drawn, each as a function (x, y) -> the colour there."""
    plots, axes = [], figures.axes

    def note(canvas, *arguments):
        at = axes(canvas, *arguments)
        plots.append(lambda x, y: canvas.finished().getpixel(tuple(map(int, at(x, y)))))
        return at
    monkeypatch.setattr(figures, "axes", note)
    return plots


def test_every_figure_is_drawn_and_not_blank(tmp_path, capsys, drawn):
    """Of each genotype one diagram, and none of the decoder. Losses are per frame: a history has those of a
    sequence, of two frames where the cell is trained alone, else of three."""
    log = [entry(k, 0.3 + 0.01 * k, k % 3 == 1, cell=genotype(k, 3)) for k in range(12)]
    write_log(tmp_path / "search.jsonl", log[::-1])               # several processes write in any order
    write_log(tmp_path / "random.jsonl", [entry(k, 0.3) for k in range(12)])
    for name, more in (("static", {}), ("baseline", {}), ("cell-decoder", {"genotype": "decoder"})):
        training(tmp_path / f"{name}.pt", 6, **more)
    for name in ("cell-0", "cell-0-alone", "cell-1", "cell-0-without-past"):
        training(tmp_path / f"{name}.pt", 4, genotype=genotype(int(name[5]), 3).to_json())
    torch.save(example(), tmp_path / "examples.pt")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    figures.main([str(tmp_path)])
    paths = [tmp_path / "figures" / f"{name}.png" for names in BY_STAGE.values() for name in names]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)      # nothing half-written is left
    assert all(len(Image.open(path).getcolors(1 << 24)) > 20 for path in paths)
    alone, whole = drawn[6:8]                                             # before: two, one and three
    assert (alone(2, 2 / 2 / 2), whole(2, 2 / 2 / 3)) == (charts.COLOURS[1], charts.COLOURS[4])
    for stage, names in BY_STAGE.items():                                 # a stage draws its own
        assert [path.stem for path in figures.draw(str(tmp_path), stage)] == names


def test_what_is_missing_is_left_out(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        figures.main([str(tmp_path)])
    write_log(tmp_path / "random.jsonl", [entry(k, 0.3 + 0.1 * k) for k in (2, 0, 1)])
    (tmp_path / "results.json").write_text(json.dumps({"rows": RESULTS["rows"]}))         # not finished
    assert [path.stem for path in figures.draw(tmp_path)] == ["fig3-rewards"]     # a random search alone
    training(tmp_path / "static.pt", 2, optimizers=[])                    # a training that goes on
    training(tmp_path / "cell-0-alone.pt", 1, genotype=FIRST.to_json())
    failed = json.dumps(entry(0, 0.0, status="not finite"))
    (tmp_path / "search.jsonl").write_text(failed + '\n{"candidate": 1, "tok')
    assert [path.stem for path in figures.draw(tmp_path)] == [
        "curve-pretrain", "fig3-rewards", "fig4-sampling", "curve-finetune", "fig7-cell-0"]
    (tmp_path / "figures/fig3-rewards.png").unlink()
    assert [path.stem for path in figures.draw(tmp_path, again=False)] == ["fig3-rewards"]


def test_each_candidate_is_a_mark_where_the_log_says(drawn):
    """A candidate that was stopped is hollow; one that failed is black, at the bottom of the plot. The line
    is the mean of the last five that did not fail."""
    log = [entry(0, 0.31), entry(1, 0.27, stopped=True), entry(2, 0.0, status="not finite"), entry(3, 0.47),
           *(entry(k, 0.4) for k in range(4, 9))]
    figures.rewards(log, [entry(0, 0.4)])
    seen = [drawn[0](*at) for at in ((0, 0.31), (1, 0.27), (2, 0), (2, 0.25), (3, 0.47))]
    assert seen == [charts.SKY, charts.LIGHT, charts.INK, charts.INK, charts.SKY]
    assert drawn[0](0, 0.4) == charts.ORANGE              # the random search's
    assert drawn[0](6, (0.27 + 0.47 + 3 * 0.4) / 5) == charts.BLUE


def test_what_is_sampled_by_hand_also_by_a_new_operation(drawn, monkeypatch):
    """FIRST samples gap, skip, gap, zero; concat, sum; dec_prev, layer2, dec_prev."""
    monkeypatch.setitem(OPERATIONS, "my_op", torch.nn.Identity)           # the dict that every script shares
    new = Genotype([("dec_prev", "layer2", "my_op", "my_op", "concat")])
    style = dict(zip(OPERATIONS, itertools.cycle(figures.STYLES)))
    figures.sampling([entry(k, 0.5, cell=FIRST if k < 15 else new) for k in range(30)])
    operations, aggregations, inputs = drawn
    assert operations(12, 50) == style["gap"][0] and operations(27, 100) == style["my_op"][0]
    assert inputs(12, 200 / 3) == charts.COLOURS[1]                       # dec_prev, as in Fig. 7
    assert aggregations(12, 50) in charts.COLOURS[:2] and aggregations(27, 100) == charts.COLOURS[1]


@pytest.mark.parametrize("layers", [1, 5])
def test_lines_join_what_the_genotype_says(layers):
    """Each operation's line has the colour of its source, and a dot on the wire of its source alone."""
    g = genotype(layers, layers)
    image = figures.cell(g, "cell").finished()
    wire = [76, 186, 296, 406, 516, *range(582, 582 + 14 * layers, 14)]
    for k, layer in enumerate(g):
        for source, y in (layer.loc1, 160 + 108 * k), (layer.loc2, 204 + 108 * k):
            colour = charts.COLOURS[source] if source < 5 else charts.INK
            assert image.getpixel((wire[-1] + 12, y)) == colour
            for other in range(5 + k):                    # beside a wire, and above the line
                assert (image.getpixel((wire[other] + 2, y - 3)) == colour) == (other == source), (k, other)
        # From the aggregation to the right, for the output, or down, for the layers below.
        right = image.getpixel((wire[-1] + 24 + 325, 182 + 108 * k)) == charts.INK
        down = image.getpixel((wire[-1] + 24 + 230, 226 + 108 * k)) == charts.INK
        assert right == (5 + k in g.output()) and down == (not right)


def test_the_table_has_a_ring_per_seed_and_a_bar_at_the_mean(drawn):
    """At the first key-frame interval, in rows 0 and -1. What was not measured has no row."""
    figures.table(RESULTS)
    ink = {(k, row) for k in range(50, 71) for row in (0, -1) if drawn[0](k - 0.18, row) == charts.INK}
    assert ink == {(52, 0), (60, -1), (70, -1)}
    assert drawn[0](65, -1) == drawn[0](52, 0) == charts.BLUE


def test_examples_show_the_maps():
    image, palette = figures.examples(saved := example()).finished(), [*map(tuple, saved["palette"])]
    for row, y, x in itertools.product(range(2), (5, 40, 60, 90), (10, 64, 100)):
        label, pixel = int(saved["labels"][row, y, x]), tuple(saved["images"][row, y, x].tolist())
        seen = [image.getpixel((20 + 264 * k + 2 * x, 40 + 240 * row + 2 * y)) for k in range(4)]
        truth = palette[label] if label < 6 else (255, 255, 255)
        assert seen == [pixel, truth, palette[1], palette[int(saved["cell"][row, y, x])]]
