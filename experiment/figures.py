"""Figs. 3, 4, 5 and 7 of the paper, its Tables 3 and 4 and the training curves, drawn from a run's folder.

    python -m experiment.figures RUN       draws every figure whose input is there into RUN/figures

    figure                input                          what it shows
    curve-pretrain.png    static.pt                      loss and val mIoU of the static network (Sect. 6)
    fig3-rewards.png      search.jsonl, random.jsonl     reward of each candidate (Sect. 3.3)
    fig4-sampling.png     search.jsonl                   what the controller samples (Sect. 4.1, Results)
    curve-finetune.png    baseline.pt, cell-K*.pt        losses on the full training split (Sect. 4.2)
    fig7-cell-K.png       cell-K.pt                      the found cells as diagrams (Sect. 4.3)
    fig5-examples.png     examples.pt                    image, ground truth, baseline, cell (Figs. 5 and 6)
    tables3-4-miou.png    results.json                   mIoU of every network, of each seed and in the mean
"""
import argparse
import itertools
import math
import pathlib

import numpy as np

from dyncell import INPUTS, Genotype, location
from ops import AGGREGATIONS, OPERATIONS
from util.charts import (BLUE, COLOURS, GREY, INK, LIGHT, ORANGE, PALE, SKY, STYLES, TINT, VERMILLION, Canvas,
                         Plot, class_legend, round_ticks, save_png, sheet, shown, text_width)
from util.errors import InputError, run_main
from util.files import load, read_log

SOURCES = COLOURS[:len(INPUTS)]              # the five inputs of a cell, in Figs. 4 and 7
FEW = 50                                     # fewer candidates don't show what a controller has learned


# ---- Plots of lines by name, for Fig. 4 and the training curves -------------------------------------------

def running_mean(values, window):
    """At each value the mean of the last `window` values, at the start of fewer. NaNs are left out."""
    means = []
    for k in range(len(values)):
        finite = [v for v in values[max(0, k + 1 - window):k + 1] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def panels(title, xlabel, parts, note="beside a name: its last value", shares=False):
    """Plots below each other -> a canvas. parts: {label of y: {name: [(x, y), ...]}}; what has no points is
    left out. shares: y starts at 0, and a dotted line shows equal shares."""
    parts = {label: lines for label, lines in parts.items() if any(lines.values())}
    heights = [max(240, 27 * len(lines)) for lines in parts.values()]
    canvas, top = Canvas(1000, 124 + sum(heights) + 110 * len(parts)), 124
    canvas.text(74, 26, title, 20)
    canvas.text(74, 58, note, colour=GREY)
    for (label, lines), height in zip(parts.items(), heights):
        xs, ys = zip(*(point for line in lines.values() for point in line))
        equal, box = 100 / len(lines), (74, top, 750, top + height)
        plot = Plot(canvas, box, xs, [*ys, 0, equal] if shares else ys, xlabel, label)
        if shares:
            canvas.line([(74, plot.y(equal)), (750, plot.y(equal))], GREY, 1, (2, 4))
        draw_lines(plot, lines)
        top += height + 110
    return canvas


def draw_lines(plot, lines):
    """The lines of one of `panels`. At the end of each its name and last value, as close as others allow."""
    ends, below = [], plot.bottom + 36       # below: y of the name below
    for (name, line), (shape, colour) in zip(lines.items(), itertools.cycle(STYLES)):
        line = [point for point in line if math.isfinite(point[1])]
        if len(line) == 1:                   # drawn as a short level line
            line = [(line[0][0] - 0.4, line[0][1]), (line[0][0] + 0.4, line[0][1])]
        if line:
            plot.line(line, shape, colour)
            x, y = line[-1]
            ends.append((plot.y(y), plot.x(x), f"{name}  {y:.3g}", shape, colour))
    ends.sort(key=lambda end: end[0])        # from top to bottom
    for above in reversed(range(len(ends))):                              # number of names above
        y, x, words, shape, colour = ends[above]
        below = min(max(y, plot.top - 12 + 24 * above), below - 24)
        plot.canvas.line([(x, y), (774, below)], colour, 0.5)             # from the line to its name
        plot.canvas.mark(shape, colour, 788, below)
        plot.canvas.text(810, below, words)


# ---- Fig. 3: rewards --------------------------------------------------------------------------------------

KINDS = "stopped half way", "trained in full", "failed, not in the mean"
LOOKS = {                                    # the marks of these three kinds, and the style of the mean
    "PPO": (("ring", SKY), ("disc", BLUE), ("cross", BLUE), ("line", INK)),
    "random search": (("hollow", ORANGE), ("diamond", VERMILLION), ("cross", VERMILLION),
                      ("dashed", VERMILLION))}


def kind_of(entry):
    """One of KINDS. The reward of a candidate that was stopped is the half-way one."""
    failed = entry["status"] != "ok" or not math.isfinite(entry["reward"])
    return KINDS[2 if failed else 0 if entry["stopped"] else 1]


def rewards(log, random=()):
    """Fig. 3: the reward of every candidate of PPO's search, of random search, or of both. Failed candidates
    are at the bottom of the plot."""
    both, canvas = [*log, *random], Canvas(1000, 556)
    canvas.text(74, 26, "Reward over the search", 20)
    good = [e["reward"] for e in both if kind_of(e) != KINDS[2]]
    label = "reward: geometric mean of mIoU, frequency-weighted IoU and mean class accuracy on meta-val"
    label += ", weighted by the time" if any("ms" in e for e in both) else ""
    plot = Plot(canvas, (74, 136, 975, 486), [e["candidate"] for e in both], good, "candidate", label)
    for y, name, entries in (62, "PPO", log), (88, "random search", random):
        values = [math.nan if kind_of(e) == KINDS[2] else e["reward"] for e in entries]
        legend, window = [], max(5, round(len(entries) / 20))
        for kind, look in zip(KINDS, LOOKS[name]):
            points = [(e["candidate"], plot.yrange[0] if kind == KINDS[2] else e["reward"])
                      for e in entries if kind_of(e) == kind]
            plot.dots(points, *look, 5 if len(entries) <= 200 else 3)
            legend += [(*look, kind)] if points else []
        if len(entries) > window:            # the mean begins with the first full window
            line = list(zip([e["candidate"] for e in entries], running_mean(values, window)))
            plot.line(line[window - 1:], *LOOKS[name][-1], 3)
            legend.append((*LOOKS[name][-1], f"mean of the last {window}"))
        best = max([value for value in values if math.isfinite(value)], default=math.nan)
        canvas.text(74, y, f"{name}, best {best:.3f}" if entries else "")
        canvas.legend(284, y, 710, legend)
    return canvas


# ---- Fig. 4: what is sampled ------------------------------------------------------------------------------

def sampled(entry):
    """The parts of a candidate, as lists of names: its 2L operations, its L aggregations, and those of its
    locations that are inputs (there are always some, as layer 0 can sample nothing else)."""
    layers = Genotype.from_tokens(entry["tokens"])
    locations = [k for layer in layers for k in (layer.loc1, layer.loc2)]
    return ([op for layer in layers for op in (layer.op1, layer.op2)], [layer.agg for layer in layers],
            [INPUTS[k] for k in locations if k < len(INPUTS)])


def sampling(log):
    """Fig. 4: shares of operations, aggregations and inputs among the last candidates."""
    window, parts = max(1, min(len(log) // 2, max(10, len(log) // 10))), {}
    few = f" ({len(log)} candidates: too few to mean anything)" if len(log) < FEW else ""
    note = f"share among the last {window} candidates; dotted: if all were sampled equally often"
    for label, names, candidates in zip(
            ("operations, %", "aggregations, %", "inputs, % of the locations that are inputs"),
            (OPERATIONS, AGGREGATIONS, INPUTS), zip(*map(sampled, log))):
        parts[label] = {}
        for name in names:
            shares = running_mean([100 * part.count(name) / len(part) for part in candidates], window)
            parts[label][name] = list(zip([entry["candidate"] for entry in log], shares))
    return panels("What is sampled" + few, "candidate", parts, note, shares=True)


# ---- Tables 3 and 4 ---------------------------------------------------------------------------------------

def table(results):
    """The mIoU of Table 3 (CamVid) or 4 (CityScapes) as a picture, from the content of results.json. Of
    several key-frame intervals the first is drawn."""
    split, lines, intervals, baseline = results["reported"], {}, {}, None
    for row in results["rows"]:
        title, miou = row["title"], row[split]["miou"]    # None: no frame of the split has labels
        if intervals.setdefault(title, row["key_frame_every"]) == row["key_frame_every"] and miou is not None:
            lines.setdefault(title, []).append(100 * miou)
            baseline = title if row["name"] == "baseline" else baseline
    left, top, bottom = 44 + max(map(text_width, lines), default=0), 92, 112 + 30 * len(lines)
    canvas = Canvas(left + 660, bottom + 60)
    canvas.text(20, 26, f"mIoU on {split}, %", 20)
    canvas.text(20, 58, "rings: seeds; bar: their mean; dashed: the baseline, fine-tuned", colour=GREY)
    ticks = round_ticks([value for values in lines.values() for value in values], 8)

    def x(value):
        return left + 540 * (value - ticks[0]) / (ticks[-1] - ticks[0])

    for value in ticks:
        canvas.line([(x(value), top), (x(value), bottom)], LIGHT, 1)
        canvas.text(x(value), bottom + 9, f"{value:.6g}", anchor="ma")
    for k, (title, values) in enumerate(lines.items()):
        y, mean = top + 25 + 30 * k, np.mean(values)
        if title == baseline:
            canvas.line([(x(mean), top), (x(mean), bottom)], VERMILLION, 2, (6, 4))
        canvas.text(left - 16, y, title, anchor="rm")
        canvas.line([(x(mean), y - 11), (x(mean), y + 11)], BLUE, 4)
        for value in values:
            canvas.mark("ring", INK, x(value), y)
        std = f" ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        canvas.text(left + 556, y, f"{mean:.1f}{std}")
    return canvas


# ---- Figs. 5 and 6: examples ------------------------------------------------------------------------------

def examples(saved):
    """Rows of image, ground truth, baseline, cell, from the content of examples.pt."""
    images, *maps = (np.asarray(saved[key]) for key in ("images", "labels", "baseline", "cell"))
    rows, height, width = maps[0].shape
    scale = 300 // width if width <= 150 else 320 / width                 # small: a whole number
    pictures = []
    for k in range(rows):
        share = f"{100 * saved['differ'][k]:.1f} % of the"
        words = saved["names"][k], "the networks differ on", share, "labelled pixels"
        columns = [[images[k]]] + [[shown(labels[k], saved["palette"])] for labels in maps]
        pictures.append((words, columns))
    return sheet(pictures, (round(scale * width), round(scale * height)),
                 class_legend(saved["classes"], saved["palette"]),
                 ("image", "ground truth", "baseline", saved["cell_name"]))


# ---- Fig. 7: a cell as a diagram --------------------------------------------------------------------------

LAYER = 108                                  # height of a layer's row


def wire(k):
    """x of the vertical line on which pool position k can be sampled: below its box for an input, right of
    the inputs for a layer's result."""
    return 76 + 110 * k if k < len(INPUTS) else 32 + 110 * len(INPUTS) + 14 * (k - len(INPUTS))


def box(canvas, x, y, width, height, words, fill, outline=INK, ink=INK):
    """A box around (x, y) with one or two lines of text."""
    canvas.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, fill, outline, 4)
    canvas.text(x, y - 9 if len(words) > 1 else y, words[0], 16, ink, "mm")
    canvas.text(x, y + 9, "".join(words[1:]), 14, GREY, "mm")


def cell(genotype, title):
    """Fig. 7: a cell as a wiring diagram. A row reads as a layer's tokens do: two locations, two operations,
    an aggregation. A dot joins lines; lines that cross without one don't touch. What no later layer samples
    leaves to the right, for the output (Sect. 3.2)."""
    left = wire(len(INPUTS) + len(genotype)) + 10         # of the operations
    agg, out, bottom = left + 220, left + 330, 140 + LAYER * len(genotype)
    canvas, starts = Canvas(out + 100, bottom + 92), {}   # starts: y at which a source's wire begins
    canvas.text(24, 26, title, 20)
    for k, name in enumerate(INPUTS):
        words = name.removesuffix("_prev"), ("previous" if name.endswith("_prev") else "current") + " frame"
        looks = (SOURCES[k], INK) if k in genotype.inputs() else (LIGHT, GREY)
        box(canvas, wire(k), 82, 104, 52, words, None, *looks)
        starts[k] = 108
    for k, layer in enumerate(genotype):
        node, y = len(INPUTS) + k, 182 + LAYER * k
        for source, op, at in (layer.loc1, layer.op1, y - 22), (layer.loc2, layer.op2, y + 22):
            colour = SOURCES[source] if source < len(INPUTS) else INK
            canvas.line([(wire(source), starts[source]), (wire(source), at), (left - 4, at)], colour, 2.5)
            canvas.mark("disc", colour, wire(source), at, 4)
            canvas.mark("arrow", colour, left - 7, at, 6)
            canvas.line([(left, at), (agg, at)], INK, 2.5)
            box(canvas, left + 58, at, 116, 32, (op,), PALE, *((GREY, GREY) if op == "zero" else ()))
        if node in genotype.output():
            canvas.line([(agg, y), (out, y), (out, bottom + 24)], INK, 2.5)
        else:                                # back to the left, to the wire that later layers sample
            starts[node] = y + 52
            canvas.line([(agg, y), (agg, starts[node]), (wire(node), starts[node])], INK, 2.5)
        box(canvas, agg, y, 116, 76, (layer.agg, location(node)), TINT)
    box(canvas, out, bottom + 40, 150, 48, ("output", "concat, conv1x1"), TINT)
    canvas.text(24, bottom + 60, "a dot joins lines; grey: an input that is not used, or zero", colour=GREY)
    return canvas


# ---- The run folder ---------------------------------------------------------------------------------------

def content(path):
    """The content of a checkpoint, finished or not; {} if there is no file."""
    return load(path) if path.exists() else {}


def series(saved, key, unit=1):
    """The values of `key` in a training's history as points (epoch, value / unit)."""
    return [(entry["epoch"], entry[key] / unit) for entry in saved.get("history", []) if key in entry]


def draw_pretrain(folder):
    saved = content(folder / "static.pt")
    parts = {"loss, with auxiliary losses": {"static network": series(saved, "loss")},
             "mIoU on val, %": {"static network": series(saved, "val_miou", 0.01)}}
    if saved.get("history"):
        yield "curve-pretrain", panels("Pre-training", "epoch", parts)


def draw_search(folder):
    # Sorted, as several processes may write candidates in any order.
    log, random = ([entry for _, entry in sorted(read_log(folder / name).items())]
                   for name in ("search.jsonl", "random.jsonl"))
    if log or random:
        yield "fig3-rewards", rewards(log, random)
    if log:
        yield "fig4-sampling", sampling(log)


def draw_finetune(folder):
    names = []
    for kind in ("baseline", "cell", "random"):
        found = {path.stem.removesuffix("-alone") for path in folder.glob(f"{kind}*.pt")}
        names += sorted(found, key=lambda name: (len(name), name))
    alone, whole, genotypes = {}, {}, {}     # genotypes: {text: the first name that has it}
    for name in names:
        first, last = content(folder / f"{name}-alone.pt"), content(folder / f"{name}.pt")
        # Histories hold losses per sequence, summed over all frames but the first (alone) or over all
        # frames (end to end).
        length = (first or last)["recipe"]["sequence_length"]
        alone[name], whole[name] = series(first, "loss", length - 1), series(last, "loss", length)
        genotypes.setdefault((first or last).get("genotype", "decoder"), name)
    parts = {"loss per frame: cell alone": alone, "loss per frame: end to end": whole}
    if any((*alone.values(), *whole.values())):
        yield "curve-finetune", panels("Training on the full training split", "epoch", parts)
    for text, name in genotypes.items():
        if text != "decoder":
            yield f"fig7-{name}", cell(Genotype(text), name)


def draw_evaluate(folder):
    saved, results = content(folder / "examples.pt"), content(folder / "results.json")
    if saved:
        yield "fig5-examples", examples(saved)
    if "reported" in results:                # else the evaluation is not finished
        yield "tables3-4-miou", table(results)


STAGES = {"pretrain": draw_pretrain, "search": draw_search, "finetune": draw_finetune,
          "evaluate": draw_evaluate}


def draw(folder, stage=None, again=True):
    """Draws every figure whose input is in the run's folder, or those of one stage -> the paths.
    again=False draws only missing figures. Raises InputError naming a file that can't be read."""
    folder, written = pathlib.Path(folder), []
    for name in [stage] if stage else STAGES:
        for figure, canvas in STAGES[name](folder):
            path = folder / "figures" / f"{figure}.png"
            if again or not path.exists():
                path.parent.mkdir(exist_ok=True)
                save_png(path, canvas.finished())
                written.append(path)
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiment.figures",
        description="Draws the figures of runs of train.py, whose inputs are there, into RUN/figures.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/synthetic")
    for folder in parser.parse_args(arguments).runs:
        if not (written := draw(folder)):
            raise InputError(f"{folder}: holds nothing that can be drawn; give the folder of a run")
        print(*written, sep="\n")


if __name__ == "__main__":
    run_main(main)
