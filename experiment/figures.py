"""Figs. 3, 4, 5 and 7 of the paper, its Table 5 and the training curves, drawn from a run's folder alone.

    python -m experiment.figures RUN       draws every figure whose input is there into RUN/figures

    figure                input                          what it shows
    curve-pretrain.png    static.pt                      loss and val mIoU of the static network (Sect. 6)
    fig3-rewards.png      search.jsonl, random.jsonl     reward of each candidate (Sect. 3.3)
    fig4-sampling.png     search.jsonl                   what the controller samples, over the search
    curve-finetune.png    baseline.pt, cell-K*.pt        losses on the full training split (Sect. 4.2)
    fig7-cell-K.png       cell-K.pt                      the found cells as diagrams
    fig5-examples.png     examples.pt                    image, ground truth, baseline, cell (Figs. 5 and 6)
    table5-miou.png       results.json                   mIoU of every network, of each seed and in the mean

In the order of the file: label maps in colour, a canvas, a plot, the figures, the run folder. Colours are
Okabe and Ito's, which the colour-blind can tell apart. A shape, a dash or a word always repeats what a
colour says.
"""
import argparse
import math
import os
import pathlib

import numpy as np

from dyncell import INPUTS, Genotype, location
from ops import AGGREGATIONS, OPERATIONS
from util.charts import (BLUE, GREEN, GREY, INK, LIGHT, MARKS, ORANGE, PALE, PURPLE, SKY, STYLES, TINT, VERMILLION,
                         Canvas, Plot, class_legend, curves, round_ticks, running_mean, save_png, shown, spread,
                         text_width, zoomed)
from util.errors import InputError, run_main
from util.files import load, read_log

SOURCES = BLUE, VERMILLION, GREEN, ORANGE, PURPLE         # the five inputs of a cell


# ---------------------------------------------------------------------------------------------------------
# Label maps in colour, for predictions too


# ---------------------------------------------------------------------------------------------------------
# A canvas: lines, boxes, marks, text


# ---------------------------------------------------------------------------------------------------------
# A plot: axes with ticks at round numbers, dots, lines


# ---------------------------------------------------------------------------------------------------------
# Fig. 3: rewards. Fig. 4: what is sampled. Both are drawn from the search's log

FEW = 50                                     # fewer candidates don't show what a controller has learned


def outcome(entry):
    """"full", "stopped" (its reward is the half-way one) or "failed"."""
    if entry["status"] != "ok" or not math.isfinite(entry["reward"]):
        return "failed"
    return "stopped" if entry["stopped"] else "full"


KINDS = {"stopped": "stopped half way", "full": "trained in full", "failed": "failed, not in the mean"}
SEARCHES = {                                 # the style of the mean, and a mark for each outcome
    "controller": (("line", INK),
                   {"stopped": ("ring", SKY), "full": ("disc", BLUE), "failed": ("cross", BLUE)}),
    "random": (("dashed", VERMILLION),
               {"stopped": ("hollow", ORANGE), "full": ("diamond", VERMILLION),
                "failed": ("cross", VERMILLION)})}


def rewards(log, random=()):
    """Fig. 3: the reward of every candidate of the controller's search, of random search, or of both.
    Stopped candidates are hollow marks; failed ones are crosses at the bottom of the plot."""
    searches = {name: entries for name, entries in (("controller", log), ("random", random)) if entries}
    both = [*log, *random]
    good = [e for e in both if outcome(e) != "failed"]
    top = 84 + 26 * len(searches)
    canvas = Canvas(1000, top + 420)
    title = "Reward over the search" if log else "Reward over the random search"
    finished = [e for e in log or random if outcome(e) != "failed"]
    if finished:
        best = max(finished, key=lambda e: e["reward"])
        title += f": best {best['reward']:.3f}, candidate {best['candidate']}"
    canvas.text(74, 26, title, 20)
    what = "reward: geometric mean of mIoU, frequency-weighted IoU and mean class accuracy on meta-val"
    if any("ms" in e for e in both):
        what += ", weighted by the time"
    numbers = [e["candidate"] for e in both]
    plot = Plot(canvas, (74, top, 975, top + 350), numbers, [e["reward"] for e in good], "candidate", what)
    for row, (name, entries) in enumerate(searches.items()):
        draw_search_in(plot, 62 + 26 * row, name if random else "", entries, *SEARCHES[name])
    return canvas


def draw_search_in(plot, y, name, entries, style, marks):
    """One search in Fig. 3: its candidates, their running mean, and its row of the legend at y."""
    canvas, legend = plot.canvas, []
    window = max(5, round(len(entries) / 20))
    r = 5 if len(entries) <= 200 else 4 if len(entries) <= 500 else 3
    for kind, words in KINDS.items():
        chosen = [e for e in entries if outcome(e) == kind]
        if chosen:
            floor = plot.yrange[0]
            points = [(e["candidate"], floor if kind == "failed" else e["reward"]) for e in chosen]
            plot.dots(points, *marks[kind], r)
            legend.append((*marks[kind], words))
    if len(entries) > window:                # the mean begins with the first full window
        values = [math.nan if outcome(e) == "failed" else e["reward"] for e in entries]
        line = list(zip([e["candidate"] for e in entries], running_mean(values, window)))
        plot.line(line[window - 1:], *style, 3)
        legend.append((*style, f"mean of the last {window}"))
    canvas.text(74, y, name)
    canvas.legend(174 if name else 74, y, 820, legend)


def sampled(log):
    """The parts of each candidate, as three lists of lists of names: its 2L operations, its L aggregations,
    and those of its locations that are inputs (there are always some, as layer 0 can sample nothing
    else)."""
    operations, aggregations, inputs = [], [], []
    for entry in log:
        genotype = Genotype.from_tokens(entry["tokens"])
        locations = [k for layer in genotype for k in (layer.loc1, layer.loc2)]
        operations.append([op for layer in genotype for op in (layer.op1, layer.op2)])
        aggregations.append([layer.agg for layer in genotype])
        inputs.append([location(k) for k in locations if k < len(INPUTS)])
    return operations, aggregations, inputs


def sampling(log):
    """Fig. 4: shares of operations, aggregations and inputs among the last candidates."""
    window = max(1, min(len(log) // 2, max(10, len(log) // 10)))
    candidates = [entry["candidate"] for entry in log]
    canvas, top = Canvas(1000, 1240), 124
    few = f" ({len(log)} candidates: too few to mean anything)" if len(log) < FEW else ""
    canvas.text(74, 26, "What is sampled" + few, 20)
    note = f"share among the last {window} candidates, of fewer at the start; "
    note += "dotted: if all were sampled equally often"
    canvas.text(74, 58, note, colour=GREY)
    inputs = [("line", colour) for colour in SOURCES]     # as in Fig. 7
    panels = (("operations, %", 330, OPERATIONS, STYLES), ("aggregations, %", 240, AGGREGATIONS, STYLES),
              ("inputs, % of the locations that are inputs", 240, INPUTS, inputs))
    for (title, height, names, styles), parts in zip(panels, sampled(log)):
        lines = {}
        for name in names:
            lines[name] = running_mean([100 * part.count(name) / len(part) for part in parts], window)
        highest = max(max(line) for line in lines.values())
        plot = Plot(canvas, (74, top, 750, top + height), candidates, [0, highest], "candidate", title)
        shares(plot, candidates, lines, styles)
        top += height + 120
    return canvas


def shares(plot, candidates, lines, styles):
    """A panel of Fig. 4. Lines may cover each other, so each has marks at places of its own.

    lines: {name: one value per candidate}. Each name stands beside the end of its line; names that would
    overlap are moved apart."""
    canvas, count = plot.canvas, len(lines)
    equal = plot.y(100 / count)
    canvas.line([(plot.left, equal), (plot.right, equal)], GREY, 1, (2, 4))
    if len(candidates) == 1:                 # drawn as a short level line
        candidates = [candidates[0] - 0.4, candidates[0] + 0.4]
        lines = {name: line * 2 for name, line in lines.items()}
    styles = [styles[k % len(styles)] for k in range(count)]
    for line, style in zip(lines.values(), styles):
        plot.line(zip(candidates, line), *style, 2)
    ends = [plot.y(line[-1]) for line in lines.values()]
    places = spread(ends, [24] * count, plot.top - 12, plot.bottom + 12)
    for k, (name, line) in enumerate(lines.items()):
        shape, colour = styles[k]
        at = np.arange(k + 0.5, 4 * count, count) / (4 * count)     # four marks at places of its own
        xs = candidates[0] + at * (candidates[-1] - candidates[0])
        plot.dots(zip(xs, np.interp(xs, candidates, line)), MARKS[k % len(MARKS)], colour, 4)
        # A thin line leads from the line's end to its name.
        canvas.line([(plot.x(candidates[-1]), ends[k]), (774, places[k])], colour, 0.5)
        canvas.mark(shape, colour, 788, places[k])
        canvas.mark(MARKS[k % len(MARKS)], colour, 788, places[k], 4)
        canvas.text(810, places[k], f"{name}  {line[-1]:.0f} %")


# ---------------------------------------------------------------------------------------------------------
# Training curves


def series(epochs, key, unit=1):
    """The values of `key` in a history as points (epoch, value / unit)."""
    return [(entry["epoch"], entry[key] / unit) for entry in epochs if key in entry]


# ---------------------------------------------------------------------------------------------------------
# Table 5

def table(results):
    """[ours] Table 5's mIoU as a picture, from the content of results.json. Of several key-frame distances
    the first is drawn."""
    split, lines, distances = results["reported"], {}, {}         # title: mIoU of each seed in %; distance
    for row in results["rows"]:
        every = distances.setdefault(row["title"], row["key_frame_every"])
        if every == row["key_frame_every"] and row[split]["miou"] is not None:
            lines.setdefault(row["title"], []).append(100 * row[split]["miou"])
    baseline = [row["title"] for row in results["rows"] if row["name"] == "baseline"]
    left, top = 44 + max(map(text_width, lines), default=0), 92
    right, bottom = left + 540, top + 20 + 30 * len(lines)
    canvas = Canvas(right + 120, bottom + 60)
    canvas.text(20, 26, f"mIoU on {split}, %", 20)
    canvas.text(20, 58, "rings: seeds; bar: their mean; dashed: the baseline trained as long", colour=GREY)
    ticks = round_ticks([value for values in lines.values() for value in values], 8)

    def x(value):
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    for value in ticks:
        canvas.line([(x(value), top), (x(value), bottom)], LIGHT, 1)
        canvas.text(x(value), bottom + 9, f"{value:.6g}", anchor="ma")
    for k, (title, values) in enumerate(lines.items()):
        y, mean = top + 25 + 30 * k, np.mean(values)
        if title in baseline:
            canvas.line([(x(mean), top), (x(mean), bottom)], VERMILLION, 2, (6, 4))
        canvas.text(left - 16, y, title, anchor="rm")
        canvas.line([(x(mean), y - 11), (x(mean), y + 11)], BLUE, 4)
        for value in values:
            canvas.mark("ring", INK, x(value), y)
        deviation = f" ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        canvas.text(right + 16, y, f"{mean:.1f}{deviation}")
    return canvas


# ---------------------------------------------------------------------------------------------------------
# Figs. 5 and 6: examples

def examples(saved):
    """Rows of image, ground truth, baseline, cell, from the content of examples.pt."""
    images, *maps = (np.asarray(saved[key]) for key in ("images", "labels", "baseline", "cell"))
    rows, height, width = maps[0].shape
    scale = 300 // width if width <= 150 else 320 / width                 # small: a whole number
    size = round(scale * width), round(scale * height)
    total, below = 4 * size[0] + 3 * 8, size[1] + 40
    entries = class_legend(saved["classes"], saved["palette"])
    canvas = Canvas(total + 40, 90 + rows * below + 26 * len(entries))
    for k, heading in enumerate(("image", "ground truth", "baseline", saved["cell_name"])):
        canvas.text(20 + k * (size[0] + 8) + size[0] / 2, 28, heading, 20, anchor="mm")
    for row, (name, differ) in enumerate(zip(saved["names"], saved["differ"])):
        y = 50 + row * below
        caption = f"{name}: the networks differ on {100 * differ:.1f} % of the labelled pixels"
        canvas.text(20, y + size[1] + 16, caption, colour=GREY)
        for k, pixels in enumerate([images[row]] + [shown(m[row], saved["palette"]) for m in maps]):
            canvas.picture(20 + k * (size[0] + 8), y, pixels, size)
    canvas.height = canvas.legend(20, 68 + rows * below, total, entries) + 24
    return canvas


# ---------------------------------------------------------------------------------------------------------
# The contact sheet of python data.py


# ---------------------------------------------------------------------------------------------------------
# Fig. 7: a cell as a diagram

OP, AGG, INPUT, OUTPUT = (116, 32), (116, 48), (124, 52), (170, 48)       # widths and heights of the boxes
# APART: from a layer's middle to its operations; GUTTER: between rows; LANE: width of a passing line
APART, GUTTER, LANE = 64, 64, 24


def cell_layout(genotype):
    """Places a cell's boxes and lines -> boxes (x0, y0, x1, y1, kind, lines of text), and edges (source,
    points, whether it ends in an arrow).

    Row 0 holds the inputs, the last row the output. A layer (two operations above their aggregation) stands
    one row below the lowest of its two sources. A source that is sampled further down passes the rows
    between in a lane of its own. Curves run only in the gutters between rows, so no line crosses a box in
    any cell."""
    out = len(INPUTS) + len(genotype)
    takes = {len(INPUTS) + k: (layer.loc1, layer.loc2) for k, layer in enumerate(genotype)}
    takes[out] = tuple(genotype.output())
    depth = dict.fromkeys(range(len(INPUTS)), 0)
    lowest = {}                              # source: the last row that samples it
    for node, sources in takes.items():
        depth[node] = 1 + max(depth[s] for s in sources)
        for s in sources:
            lowest[s] = max(depth[node], lowest.get(s, 0))

    at = {k: 136 * k for k in range(len(INPUTS))}         # x where a source leaves the row above
    boxes, edges, y = [], [], INPUT[1]
    for k, name in enumerate(INPUTS):
        words = (name.removesuffix("_prev"), "previous frame" if name.endswith("_prev") else "current frame")
        kind = "input" if k in lowest else "unused"
        boxes.append((at[k] - INPUT[0] / 2, 0, at[k] + INPUT[0] / 2, y, kind, words))
    for row in range(1, depth[out] + 1):
        nodes = [node for node in takes if depth[node] == row]
        lanes = [s for s in lowest if depth[s] < row < lowest[s]]
        width, height = 2 * APART + OP[0], OP[1] + 20 + AGG[1]
        if row == depth[out]:
            width, height = max(OUTPUT[0], 26 * len(takes[out])), OUTPUT[1]
        wanted = [sum(at[s] for s in takes[node]) / len(takes[node]) for node in nodes]
        wanted += [at[s] for s in lanes]
        places = spread(wanted, [width + 20] * len(nodes) + [LANE] * len(lanes))
        top, bottom, above = y + GUTTER, y + GUTTER + height, at
        at = dict(zip(nodes + lanes, places))
        for node in nodes:
            x = at[node]
            if node == out:
                words = "output", "concat, conv1x1"
                boxes.append((x - width / 2, top, x + width / 2, bottom, "output", words))
                wanted = [above[s] for s in takes[out]]
                ports = spread(wanted, [26] * len(wanted), x - width / 2, x + width / 2)
            else:
                layer, ports = genotype[node - len(INPUTS)], (x - APART, x + APART)
                words = layer.agg, location(node)
                boxes.append((x - AGG[0] / 2, bottom - AGG[1], x + AGG[0] / 2, bottom, "agg", words))
                for port, op in zip(ports, (layer.op1, layer.op2)):
                    kind = "zero" if op == "zero" else "op"
                    boxes.append((port - OP[0] / 2, top, port + OP[0] / 2, top + OP[1], kind, (op,)))
                    edges.append((node, [(port, top + OP[1]), ((port + x) / 2, bottom - AGG[1])], False))
            for s, port in zip(takes[node], ports):
                edges.append((s, curve(above[s], y, port, top), True))
        for s in lanes:
            edges.append((s, curve(above[s], y, at[s], top) + [(at[s], bottom)], False))
        y = bottom
    return boxes, edges


def curve(x0, y0, x1, y1):
    """A Bezier curve downwards, vertical at both ends."""
    t = np.linspace(0, 1, 40)
    return list(zip(x0 + (x1 - x0) * t * t * (3 - 2 * t), y0 + (y1 - y0) * (1.5 * t * (1 - t) + t ** 3)))


def cell(genotype, title):
    """Fig. 7: a cell as a diagram. Lines from an input have its colour, lines from a layer are black."""
    boxes, edges = cell_layout(genotype)
    note = "operands of an aggregation from left to right; grey: an input that is not used, or zero"
    xs = [box[0] for box in boxes] + [box[2] for box in boxes]
    for _, line, _ in edges:
        xs += [x for x, _ in line]
    width = max(max(xs) - min(xs), text_width(note), text_width(title, 20))
    canvas = Canvas(width + 48, max(box[3] for box in boxes) + 112)
    canvas.text(24, 26, title, 20)
    canvas.text(24, canvas.height - 24, note, colour=GREY)
    dx, dy = 24 - min(xs), 58
    for source, line, ends in edges:
        colour = SOURCES[source] if source < len(INPUTS) else INK
        canvas.line(np.add(line, (dx, dy)), colour, 2.5)
        if ends:
            x, y = np.add(line[-1], (dx, dy))
            canvas.pen.polygon(zoomed([(x, y + 1), (x - 6, y - 10), (x + 6, y - 10)]), colour)
    looks = {"unused": (None, LIGHT, (150, 150, 150)), "op": (PALE, INK, INK), "zero": (None, GREY, GREY),
             "agg": (TINT, INK, INK), "output": (TINT, INK, INK)}         # fill, outline, ink
    for k, (x0, y0, x1, y1, kind, words) in enumerate(boxes):
        fill, outline, ink = (None, SOURCES[k], INK) if kind == "input" else looks[kind]
        canvas.box(x0 + dx, y0 + dy, x1 + dx, y1 + dy, fill, outline, 8 if kind in ("op", "zero") else 3)
        x, y = (x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy
        canvas.text(x, y - 9 if len(words) > 1 else y, words[0], 16, ink, "mm")
        canvas.text(x, y + 9, "".join(words[1:]), 14, GREY if ink == INK else ink, "mm")
    return canvas


# ---------------------------------------------------------------------------------------------------------
# The run folder

def content(path):
    """The content of a checkpoint, finished or not; {} if there is no file."""
    return load(path) if path.exists() else {}


def candidates(path):
    """The entries of a search's log, sorted by candidate: several processes may write them in any order."""
    return sorted(read_log(path).values(), key=lambda entry: entry["candidate"])


def draw_pretrain(folder):
    epochs = content(folder / "static.pt").get("history", [])
    if epochs:
        panels = [("loss, with auxiliary losses", {"static network": series(epochs, "loss")}),
                  ("mIoU on val, %", {"static network": series(epochs, "val_miou", 0.01)})]
        yield "curve-pretrain", curves("Pre-training", panels)


def draw_search(folder):
    log, random = candidates(folder / "search.jsonl"), candidates(folder / "random.jsonl")
    if log or random:
        yield "fig3-rewards", rewards(log, random)
    if log:
        yield "fig4-sampling", sampling(log)


def draw_finetune(folder):
    names = []
    for kind in ("baseline", "cell", "random"):
        found = {path.stem.removesuffix("-alone") for path in folder.glob(f"{kind}*.pt")}
        names += sorted(found, key=lambda name: (len(name), name))
    alone, whole, genotypes = {}, {}, {}
    for name in names:
        first, last = content(folder / f"{name}-alone.pt"), content(folder / f"{name}.pt")
        # Histories hold losses per sequence, summed over all frames but the first (alone) or over all
        # frames (end to end).
        alone[name] = whole[name] = []
        if first:
            alone[name] = series(first["history"], "loss", first["recipe"]["sequence_length"] - 1)
        if last:
            whole[name] = series(last["history"], "loss", last["recipe"]["sequence_length"])
        text = last.get("genotype") or first.get("genotype")
        if text not in (None, "decoder", *genotypes.values()):            # not for another seed's same cell
            genotypes[name] = text
    panels = [("loss per frame: cell alone", alone), ("loss per frame: end to end", whole)]
    if any(alone.values()) or any(whole.values()):
        yield "curve-finetune", curves("Training on the full training split", panels)
    found = {}
    for entry in candidates(folder / "random.jsonl") + candidates(folder / "search.jsonl"):
        found[Genotype.from_tokens(entry["tokens"])] = entry["reward"]
    for name, text in genotypes.items():
        genotype = Genotype.from_json(text)
        reward = f": reward {found[genotype]:.3f} in the search" if genotype in found else ""
        yield f"fig7-{name}", cell(genotype, name + reward)


def draw_evaluate(folder):
    saved = content(folder / "examples.pt")
    if saved and len(saved["names"]):
        yield "fig5-examples", examples(saved)
    results = content(folder / "results.json")
    if "reported" in results:                # else the evaluation is not finished
        yield "table5-miou", table(results)


STAGES = {"pretrain": draw_pretrain, "search": draw_search, "finetune": draw_finetune,
          "evaluate": draw_evaluate}


def draw(folder, stage=None, again=True):
    """Draws every figure whose input is in the run's folder, or those of one stage -> the paths.
    again=False draws only missing figures. Raises InputError naming a file that can't be read."""
    folder, written = pathlib.Path(folder), []
    for name in [stage] if stage else STAGES:
        for figure, canvas in STAGES[name](folder):
            (folder / "figures").mkdir(exist_ok=True)
            path = folder / "figures" / f"{figure}.png"
            if again or not path.exists():
                save_png(path, canvas.finished())
                written.append(path)
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiment.figures",
        description="Draws Figs. 3, 4, 5 and 7, Table 5 and the training curves of runs of train.py into "
                    "RUN/figures, as far as the runs have made their inputs. Takes seconds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/synthetic")
    for folder in parser.parse_args(arguments).runs:
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder; python -m experiment.figures RUN draws a run of train.py")
        written = draw(folder)
        if not written:
            raise InputError(f"{folder}: holds nothing that can be drawn; is it the folder of a run?")
        for path in written:
            print(path)


if __name__ == "__main__":
    run_main(main)
