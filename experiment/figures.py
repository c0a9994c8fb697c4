"""Figs. 3, 4, 5 and 7 of the paper, its Tables 3 and 4 and the training curves, drawn from a run's folder.

    python -m experiment.figures RUN       draws every figure whose input is there into RUN/figures

curve-pretrain, fig3-rewards, fig4-sampling, curve-finetune, fig7-cell-K, fig5-examples, tables3-4-miou"""
import argparse
import itertools
import math
import pathlib

import numpy as np

from dyncell import INPUTS, Genotype, location
from ops import AGGREGATIONS, OPERATIONS
from util.charts import (BLUE, COLOURS, INK, LIGHT, ORANGE, SKY, VERMILLION, Canvas, axes, colourise,
                         round_ticks, save_png, sheet)
from util.errors import InputError, run_main
from util.files import load, read_log

STYLES = [(colour, width) for width in (3, 1.5) for colour in COLOURS]    # of lines: thick, then thin


def panels(title, xlabel, parts):
    """Plots below each other -> a canvas. parts: {label of y: {name: [(x, y), ...]}}; what has no points is
    left out. Names and last values are at the right of a plot."""
    parts = {label: lines for label, lines in parts.items() if any(lines.values())}
    height = max(240, *(25 * len(lines) for lines in parts.values()))
    canvas = Canvas(1000, 60 + (height + 110) * len(parts))
    canvas.text(74, 26, title, 20)
    for part, (label, lines) in enumerate(parts.items()):
        xs, ys = zip(*itertools.chain(*lines.values()))
        top, ticks = 90 + (height + 110) * part, (round_ticks(xs, 11, 1), round_ticks(ys))
        at = axes(canvas, (74, top, 750, top + height), *ticks, xlabel, label)
        for k, ((name, line), style) in enumerate(zip(lines.items(), itertools.cycle(STYLES))):
            if line:
                canvas.line([at(*point) for point in line], *style)
                canvas.mark("disc", style[0], *at(*line[-1]), 3)  # so that a single point is seen
                canvas.line([(774, top + 12 + 25 * k), (798, top + 12 + 25 * k)], *style)
                canvas.text(810, top + 12 + 25 * k, f"{name}  {line[-1][1]:.3g}")
    return canvas


def running_mean(points, window):
    """Points (x, y) -> at each x the mean of the last `window` values y, from the first full window on."""
    xs, ys = zip(*points)
    return list(zip(xs[window - 1:], np.convolve(ys, np.full(window, 1 / window), "valid")))


def rewards(log, random=()):
    """Fig. 3: the reward of every candidate of PPO's search, of random search, or of both."""
    canvas, both = Canvas(1000, 556), [*log, *random]
    canvas.text(74, 26, "Reward on meta-val; hollow: of a candidate that was stopped half way; black: failed")
    at = axes(canvas, (74, 120, 975, 486), round_ticks([e["candidate"] for e in both], 15, 1),
              round_ticks([e["reward"] for e in both if e["status"] == "ok"]), "candidate")
    looks = {"PPO": (log, "disc", SKY, BLUE), "random search": (random, "diamond", ORANGE, VERMILLION)}
    for y, (name, (entries, shape, light, dark)) in zip((62, 88), looks.items()):
        for e in entries:                    # a failed one has reward 0; it is drawn at the plot's bottom
            colour = light if e["status"] == "ok" else INK
            canvas.mark(shape, colour, *at(e["candidate"], e["reward"]), 4, hollow=e["stopped"])
        if good := [(e["candidate"], e["reward"]) for e in entries if e["status"] == "ok"]:
            window, best = min(len(good), max(5, len(good) // 20)), max(reward for _, reward in good)
            canvas.line([at(*point) for point in running_mean(good, window)], dark, 3)
            canvas.mark(shape, dark, 82, y)
            canvas.text(98, y, f"{name}, best {best:.3f}; line: mean of the last {window} that did not fail")
    return canvas


def sampling(log):
    """Fig. 4: shares of operations, aggregations and inputs among the last candidates."""
    window, parts = max(1, min(len(log) // 2, max(10, len(log) // 10))), {}
    cells = [Genotype.from_tokens(entry["tokens"]) for entry in log]
    for label, known, found in (
            ("operations", OPERATIONS, [[op for layer in cell for op in layer[2:4]] for cell in cells]),
            ("aggregations", AGGREGATIONS, [[layer.agg for layer in cell] for cell in cells]),
            ("inputs, of the locations that are inputs", INPUTS,  # some are: layer 0 samples nothing else
             [[INPUTS[k] for layer in cell for k in layer[:2] if k < len(INPUTS)] for cell in cells])):
        lines = parts[f"{label}, % (by chance {100 / len(known):.3g})"] = {}
        for name in known:
            shares = [(e["candidate"], 100 * n.count(name) / len(n)) for e, n in zip(log, found)]
            lines[name] = running_mean(shares, window)
    return panels(f"What is sampled: shares among the last {window} candidates", "candidate", parts)


def table(results):
    """The mIoU of Table 3 (CamVid) or 4 (CityScapes) as a picture, at the first key-frame interval."""
    split, lines, intervals = results["reported"], {}, {}
    for row in results["rows"]:
        title, miou = row["title"], row[split]["miou"]    # None: no frame of the split has labels
        if intervals.setdefault(title, row["key_frame_every"]) == row["key_frame_every"] and miou is not None:
            lines.setdefault(title, []).append(100 * miou)
    left, bottom = 40 + 8 * max(map(len, lines), default=0), 45 + 30 * len(lines)
    canvas = Canvas(left + 660, bottom + 40)
    canvas.text(20, 26, f"mIoU on {split}, %; rings: seeds, bar: their mean")
    at = axes(canvas, (left, 75, left + 540, bottom), round_ticks([*itertools.chain(*lines.values())], 8),
              {-k: title for k, title in enumerate(lines)})
    for k, values in enumerate(lines.values()):
        x, y = at(np.mean(values), -k)
        canvas.line([(x, y - 11), (x, y + 11)], BLUE, 4)
        for value in values:
            canvas.mark("disc", INK, *at(value, -k), hollow=True)
        std = f" ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        canvas.text(left + 556, y, f"{np.mean(values):.1f}{std}")
    return canvas


def examples(saved):
    """Figs. 5 and 6: rows of image, ground truth, baseline, cell, from the content of examples.pt."""
    images, *maps = (np.asarray(saved[key]) for key in ("images", "labels", "baseline", "cell"))
    columns, rows = f"ground truth, baseline, {saved['cell_name']}; the last two differ on", []
    for k, (name, share) in enumerate(zip(saved["names"], saved["differ"])):
        pictures = [images[k], *(colourise(labels[k], saved["palette"], 255) for labels in maps)]
        rows.append((f"{name}, {columns} {100 * share:.1f} % of the labelled pixels", pictures))
    return sheet(rows, saved["classes"], saved["palette"])


def cell(genotype, title):
    """Fig. 7: a cell as a wiring diagram. A row reads as a layer's tokens do: two locations, two operations,
    an aggregation. Lines join at dots only. What no later layer samples leaves to the right (Sect. 3.2)."""
    wire = [76 + 110 * k for k in range(len(INPUTS))]     # x of each pool position's vertical line
    wire += [wire[-1] + 66 + 14 * k for k in range(len(genotype))]
    left, bottom = wire[-1] + 24, 130 + 108 * len(genotype)       # left: of the operations
    agg, out, starts = left + 230, left + 340, [108] * len(INPUTS)        # starts: y where a wire begins
    canvas = Canvas(out + 90, bottom + 60)
    canvas.text(24, 26, title, 20)
    for k, name in enumerate(INPUTS):
        canvas.box(wire[k], 90, 104, 36, name, outline=COLOURS[k] if k in genotype.inputs() else LIGHT)
    for k, layer in enumerate(genotype):
        node, y = len(INPUTS) + k, 182 + 108 * k
        starts.append(y + 52)
        for source, op, at in (layer.loc1, layer.op1, y - 22), (layer.loc2, layer.op2, y + 22):
            colour = COLOURS[source] if source < len(INPUTS) else INK
            canvas.line([(wire[source], starts[source]), (wire[source], at), (left - 4, at)], colour, 2.5)
            canvas.mark("disc", colour, wire[source], at, 4)
            canvas.mark("arrow", colour, left - 7, at, 6)
            canvas.line([(left, at), (agg, at)], INK, 2.5)
            canvas.box(left + 58, at, 116, 32, op)
        if node in genotype.output():
            canvas.line([(agg, y), (out, y), (out, bottom + 24)], INK, 2.5)
        else:                                # back to the left, to the wire that later layers sample
            canvas.line([(agg, y), (agg, starts[node]), (wire[node], starts[node])], INK, 2.5)
        canvas.box(agg, y, 160, 76, f"{location(node)} = {layer.agg}")
    canvas.box(out, bottom + 24, 140, 36, "concat, conv1x1")
    return canvas


def series(saved, key, unit=1):
    """The values of `key` in a training's history as points (epoch, value / unit)."""
    return [(entry["epoch"], entry[key] / unit) for entry in saved.get("history", [])
            if math.isfinite(entry.get(key, math.nan))]


def draw_pretrain(folder):
    saved = load(folder / "static.pt", absent={})
    parts = {"loss, with auxiliary losses": {"static network": series(saved, "loss")},
             "mIoU on val, %": {"static network": series(saved, "val_miou", 0.01)}}
    if saved.get("history"):
        yield "curve-pretrain", panels("Pre-training", "epoch", parts)


def draw_search(folder):
    log, random = (list(read_log(folder / name).values()) for name in ("search.jsonl", "random.jsonl"))
    if log or random:
        yield "fig3-rewards", rewards(log, random)
    if log:
        yield "fig4-sampling", sampling(log)


def draw_finetune(folder):
    alone, whole, genotypes = {}, {}, {}     # genotypes: {text: the first name that has it}
    for name in sorted({path.stem.removesuffix("-alone") for kind in ("baseline", "cell", "random")
                        for path in folder.glob(f"{kind}*.pt")}):
        first, last = (load(folder / f"{name}{of}.pt", absent={}) for of in ("-alone", ""))
        length = (first or last)["recipe"]["sequence_length"]
        # A loss is summed over all frames of a sequence; of a cell that is trained alone, but the first.
        alone[name], whole[name] = series(first, "loss", length - 1), series(last, "loss", length)
        genotypes.setdefault((first or last).get("genotype", "decoder"), name)
    parts = {"loss per frame: cell alone": alone, "loss per frame: end to end": whole}
    if any((*alone.values(), *whole.values())):
        yield "curve-finetune", panels("Training on the full training split", "epoch", parts)
    for text, name in genotypes.items():
        if text != "decoder":
            yield f"fig7-{name}", cell(Genotype(text), name)


def draw_evaluate(folder):
    if saved := load(folder / "examples.pt", absent={}):
        yield "fig5-examples", examples(saved)
    if "reported" in (results := load(folder / "results.json", absent={})):        # else it is not finished
        yield "tables3-4-miou", table(results)


STAGES = dict(pretrain=draw_pretrain, search=draw_search, finetune=draw_finetune, evaluate=draw_evaluate)


def draw(folder, stage=None, again=True):
    """Draws what a run's folder has the input of, all or of one stage, again or only if missing -> paths."""
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
    parser = argparse.ArgumentParser("python -m experiment.figures", description="Draws a run's figures.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/synthetic")
    for folder in parser.parse_args(arguments).runs:
        if not (written := draw(folder)):
            raise InputError(f"{folder}: holds nothing that can be drawn; give the folder of a run")
        print(*written, sep="\n")


if __name__ == "__main__":
    run_main(main)
