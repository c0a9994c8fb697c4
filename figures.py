"""Figs. 3, 4, 5 and 7 of the paper and the training curves, drawn from a run's folder alone (Pillow only).

    python figures.py RUN       draws every figure whose input is there into RUN/figures

    figure                input                          what it shows
    curve-pretrain.png    static.pt                      loss and val mIoU of the static network (Sect. 6)
    fig3-rewards.png      search.jsonl, random.jsonl     reward of each candidate (Sect. 3.3)
    fig4-sampling.png     search.jsonl                   what the controller samples, over the search
    curve-finetune.png    baseline.pt, cell-K*.pt        losses on the full training split (Sect. 4.2)
    fig7-cell-K.png       cell-K.pt                      the found cells as diagrams
    fig5-examples.png     examples.pt                    image, ground truth, baseline, cell (Figs. 5 and 6)

In the order of the file: label maps in colour, a canvas, a plot, the figures, the run folder. Colours are Okabe and
Ito's, told apart by the colour-blind, and never alone: a shape, a dash or a word says the same.
"""
import functools
import json
import math
import os
import pathlib
import pickle
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import IGNORE, InputError, run_main
from dyncell import INPUTS, Genotype, location
from ops import AGGREGATIONS, OPERATIONS

INK, GREY, LIGHT, PALE, TINT = (0, 0, 0), (110, 110, 110), (215, 215, 215), (242, 242, 242), (214, 232, 245)
BLUE, SKY, VERMILLION, ORANGE = (0, 114, 178), (86, 180, 233), (213, 94, 0), (230, 159, 0)
GREEN, PURPLE = (0, 158, 115), (204, 121, 167)
STYLES = [(shape, colour) for shape in ("line", "dashed") for colour in (INK, BLUE, VERMILLION, GREEN, ORANGE, PURPLE)]


# ---------------------------------------------------------------------------------------------------------
# Label maps in colour, for predictions too

def _table(palette):
    """(256, 3) uint8: the colour of each label value, black where there is no class."""
    return np.concatenate([palette, np.zeros((256 - len(palette), 3))]).astype(np.uint8)


def colourise(labels, palette):
    """(H, W) uint8 labels -> (H, W, 3) uint8; 255 is black."""
    return _table(palette)[np.asarray(labels)]


def overlay(image, labels, palette, alpha=0.5):
    """(H, W, 3) uint8: the labels' colours over the image, `alpha` of them; ignored pixels stay as they are."""
    image, ignored = np.asarray(image), np.asarray(labels) == IGNORE
    colours = colourise(labels, palette)
    colours[ignored] = image[ignored]
    return np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), alpha))


def save_indexed(path, labels, palette):
    """Writes (H, W) labels as a PNG that holds the class numbers and shows the palette's colours."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(_table(palette).tobytes())           # mode L becomes P; all 256 entries, so that 255 stays 255
    save_png(path, image)


def save_png(path, image):
    """Written beside and renamed: a picture is whole or not there."""
    beside = f"{path}.writing"
    image.save(beside, "PNG")
    os.replace(beside, path)


# ---------------------------------------------------------------------------------------------------------
# A canvas: lines, boxes, marks, text

ZOOM = 3                                     # drawn so much larger and then shrunk, which smooths the lines


@functools.lru_cache
def font(size):
    return ImageFont.load_default(size)


def text_width(text, size=16):
    return font(ZOOM * size).getlength(text) / ZOOM


def zoomed(points):
    return [(ZOOM * x, ZOOM * y) for x, y in points]


class Canvas:
    """A white picture. Coordinates are pixels of the finished one, y downwards; the height may be lowered later."""

    def __init__(self, width, height):
        self.width, self.height = math.ceil(width), math.ceil(height)
        self.large = Image.new("RGB", (ZOOM * self.width, ZOOM * self.height), "white")
        self.pen = ImageDraw.Draw(self.large)
        self.pictures, self.plots = [], []

    def finished(self):
        image = self.large.reduce(ZOOM).crop((0, 0, self.width, math.ceil(self.height)))
        for x, y, picture in self.pictures:
            image.paste(picture, (x, y))
        return image

    def line(self, points, colour, width=2, dash=None):
        """dash: pixels drawn and pixels left out."""
        pieces = [np.asarray(points, float)]
        if dash:
            length = np.append(0, np.hypot(*np.diff(pieces[0], axis=0).T).cumsum())      # up to each point
            steps = [np.linspace(start, start + dash[0], 8) for start in np.arange(0, length[-1], sum(dash))]
            pieces = [np.stack([np.interp(step, length, axis) for axis in pieces[0].T], axis=1) for step in steps]
        for piece in pieces:
            self.pen.line(zoomed(piece), colour, round(ZOOM * width), joint="curve")

    def box(self, x0, y0, x1, y1, fill=None, outline=None, radius=0):
        self.pen.rounded_rectangle(zoomed([(x0, y0), (x1, y1)]), ZOOM * radius, fill, outline, 2 * ZOOM)

    def text(self, x, y, text, size=16, colour=INK, anchor="lm"):
        """anchor as in Pillow: (x, y) is the middle (m) of the left (l) edge, or the middle of all (mm), ..."""
        self.pen.text((ZOOM * x, ZOOM * y), text, colour, font(ZOOM * size), anchor)

    def picture(self, x, y, pixels, size):
        """(H, W, 3) uint8 at (width, height); where it is enlarged, each pixel becomes a block."""
        self.pictures.append((x, y, Image.fromarray(pixels).resize(size, Image.Resampling.BOX)))

    def mark(self, shape, colour, x, y, r=5):
        """A dot of a plot, or a line or swatch of a legend."""
        if shape in ("line", "dashed"):
            self.line([(x - 12, y), (x + 12, y)], colour, 3, (6, 3) if shape == "dashed" else None)
        elif shape == "swatch":
            self.box(x - 9, y - 8, x + 9, y + 8, colour)
        elif shape == "cross":
            for sign in (-1, 1):
                self.line([(x - r, y - sign * r), (x + r, y + sign * r)], colour)
        elif shape in ("disc", "ring"):
            corners = zoomed([(x - r, y - r), (x + r, y + r)])
            self.pen.ellipse(corners, colour if shape == "disc" else None, colour, 2 * ZOOM)
        else:                                # diamond or hollow; larger, since a diamond looks smaller than a disc
            corners = [(x, y - 1.2 * r), (x + 1.2 * r, y), (x, y + 1.2 * r), (x - 1.2 * r, y)]
            self.pen.polygon(zoomed(corners), colour if shape == "diamond" else None, colour, 2 * ZOOM)

    def legend(self, x, y, width, entries):
        """Rows of (shape, colour, text) from (x, y) downwards, on each as many as fit; the last row's y."""
        across = 0
        for shape, colour, text in entries:
            if across and across + 54 + text_width(text) > width:
                across, y = 0, y + 26
            self.mark(shape, colour, x + across + 12, y)
            self.text(x + across + 32, y, text)
            across += 54 + text_width(text)
        return y


def spread(wanted, sizes, low=-math.inf, high=math.inf):
    """Centres of intervals of these sizes, moved apart as little as possible (least squares) so that none overlap.

    Isotonic regression: a position less the sizes before it must not decrease; neighbours where it would share their
    mean. Where all fit between low and high they stay there."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    before = np.append(0, np.cumsum([sizes[k] for k in order]))
    blocks = []                              # [sum, count] of positions less the sizes before
    for k, offset in zip(order, before):
        blocks.append([wanted[k] - sizes[k] / 2 - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    starts = [total / count for total, count in blocks for _ in range(count)]
    centres = [0.0] * len(wanted)
    for k, start, offset in zip(order, starts, before):
        centres[k] = float(max(min(start, high - before[-1]), low) + offset + sizes[k] / 2)
    return centres


# ---------------------------------------------------------------------------------------------------------
# A plot: axes with round ticks, dots, lines

def round_ticks(values, at_most=6, whole=False):
    """Ticks 1, 2 or 5 times a power of ten apart that enclose the values; 0 to 1 where there are none."""
    values = [v for v in values if math.isfinite(v)] or [0, 1]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * max(abs(low), abs(high)):     # one value, or all the same
        low, high = low - (0.05 * abs(low) or 0.5), high + (0.05 * abs(high) or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        step = max(step, 1) if whole else step
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= at_most:
            return [k * step for k in range(first, last + 1)]


class Plot:
    """Axes on a canvas in box = (left, top, right, bottom), for the values given; x counts something."""

    def __init__(self, canvas, box, xs, ys, xlabel, ylabel):
        self.canvas, (self.left, self.top, self.right, self.bottom) = canvas, box
        canvas.plots.append(self)
        xticks, yticks = round_ticks(xs, (self.right - self.left) // 60, whole=True), round_ticks(ys)
        margin = 0.02 * (max(xs) - min(xs)) or 0.5
        self.xrange, self.yrange = (min(xs) - margin, max(xs) + margin), (yticks[0], yticks[-1])
        for value in yticks:
            canvas.line([(self.left, self.y(value)), (self.right, self.y(value))], LIGHT, 1)
            canvas.text(self.left - 8, self.y(value), f"{value:.6g}", anchor="rm")
        for value in xticks:
            if self.xrange[0] <= value <= self.xrange[1]:
                canvas.line([(self.x(value), self.bottom), (self.x(value), self.bottom + 5)], INK, 1)
                canvas.text(self.x(value), self.bottom + 9, f"{value:.6g}", anchor="ma")
        canvas.line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], INK, 1)
        canvas.text((self.left + self.right) / 2, self.bottom + 32, xlabel, anchor="ma")
        canvas.text(self.left, self.top - 20, ylabel, colour=GREY)

    def x(self, value):
        low, high = self.xrange
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value):
        low, high = self.yrange
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def dots(self, points, shape, colour, r=5):
        for x, y in points:
            if math.isfinite(y):
                self.canvas.mark(shape, colour, self.x(x), self.y(y), r)

    def line(self, points, shape, colour, width=2):
        """shape: line or dashed. Interrupted where a value is not finite; a value that stands alone is a dot."""
        pieces = [[]]
        for x, y in points:
            if math.isfinite(y):
                pieces[-1].append((self.x(x), self.y(y)))
            else:
                pieces.append([])
        for piece in pieces:
            if len(piece) == 1:
                self.canvas.mark("disc", colour, *piece[0])
            elif piece:
                self.canvas.line(piece, colour, width, (7, 4) if shape == "dashed" else None)


def running_mean(values, window):
    """Mean of the last `window` values at each one; NaNs are left out."""
    parts = (values[max(0, k + 1 - window):k + 1] for k in range(len(values)))
    finite = ([v for v in part if math.isfinite(v)] for part in parts)
    return [sum(part) / len(part) if part else math.nan for part in finite]


# ---------------------------------------------------------------------------------------------------------
# Fig. 3: rewards. Fig. 4: what is sampled. Both from the lines of the search's log

def outcome(entry):
    """full, stopped (then its reward is the one half way) or failed."""
    failed = entry["status"] != "ok" or not math.isfinite(entry["reward"])
    return "failed" if failed else "stopped" if entry["stopped"] else "full"


def rewards(log, random=()):
    """Fig. 3: every candidate's reward; stopped ones hollow, failed ones crosses on the floor of the plot."""
    window, r = max(5, round(len(log) / 20)), 5 if len(log) <= 200 else 4 if len(log) <= 500 else 3
    best = max((e for e in log if outcome(e) != "failed"), key=lambda e: e["reward"], default=None)
    both, top = [*log, *random], 136 if random else 110
    canvas = Canvas(1000, top + 420)
    title = f": best {best['reward']:.3f}, candidate {best['candidate']}" if best else ""
    canvas.text(74, 26, "Reward over the search" + title, 20)
    plot = Plot(canvas, (74, top, 975, top + 350), [e["candidate"] for e in both],
                [e["reward"] for e in both if outcome(e) != "failed"], "candidate",
                "reward: geometric mean of mIoU, frequency-weighted IoU and mean class accuracy on meta-val" +
                ", weighted by the time" * any("ms" in e for e in both))
    kinds = ("stopped", "stopped half way"), ("full", "trained in full"), ("failed", "failed, not in the mean")
    for y, name, entries, style, marks in (
            (62, "controller", log, ("line", INK), (("ring", SKY), ("disc", BLUE), ("cross", BLUE))),
            (88, "random", random, ("dashed", VERMILLION),
             (("hollow", ORANGE), ("diamond", VERMILLION), ("cross", VERMILLION)))):
        legend = []
        for (kind, words), mark in zip(kinds, marks):
            chosen = [e for e in entries if outcome(e) == kind]
            plot.dots([(e["candidate"], plot.yrange[0] if kind == "failed" else e["reward"]) for e in chosen], *mark, r)
            legend += [(*mark, words)] if chosen else []
        if len(entries) > window:            # the mean begins with the first full window
            means = running_mean([math.nan if outcome(e) == "failed" else e["reward"] for e in entries], window)
            plot.line([(e["candidate"], mean) for e, mean in zip(entries, means)][window - 1:], *style, 3)
            legend.append((*style, f"mean of the last {window}"))
        if random:
            canvas.text(74, y, name)
        canvas.legend(174 if random else 74, y, 820, legend)
    return canvas


def sampled(log):
    """What each candidate is made of: its 2L operations, its L aggregations, its locations that are inputs (never none,
    as layer 0 samples inputs only). Three lists of lists of names."""
    genotypes = [Genotype.from_tokens(entry["tokens"]) for entry in log]
    return ([[op for layer in g for op in (layer.op1, layer.op2)] for g in genotypes],
            [[layer.agg for layer in g] for g in genotypes],
            [[location(k) for layer in g for k in (layer.loc1, layer.loc2) if k < len(INPUTS)] for g in genotypes])


def sampling(log):
    """Fig. 4: shares of operations, aggregations and inputs among the last candidates."""
    window = max(1, min(len(log) // 2, max(10, len(log) // 10)))
    candidates = [entry["candidate"] for entry in log][window - 1:]       # from the first full window on
    canvas, top = Canvas(1000, 1240), 124
    canvas.text(74, 26, "What is sampled" + (f": share among the last {window} candidates" if window > 1 else ""), 20)
    canvas.text(74, 58, "dotted: if all were sampled equally often", colour=GREY)
    panels = (("operations, %", 330, OPERATIONS), ("aggregations, %", 240, AGGREGATIONS),
              ("inputs, % of the locations that are inputs", 240, INPUTS))
    for (title, height, names), parts in zip(panels, sampled(log)):
        lines = {}
        for name in names:
            lines[name] = running_mean([100 * part.count(name) / len(part) for part in parts], window)[window - 1:]
        highest = max(max(line) for line in lines.values())
        plot = Plot(canvas, (74, top, 760, top + height), candidates, [0, highest], "candidate", title)
        equal = plot.y(100 / len(lines))
        canvas.line([(plot.left, equal), (plot.right, equal)], GREY, 1, (2, 4))
        # Names beside the lines' ends, moved apart; a thin line leads from each end to its name.
        places = spread([plot.y(line[-1]) for line in lines.values()], [24] * len(lines), top - 12, top + height + 12)
        for (name, line), style, y in zip(lines.items(), STYLES * len(lines), places):
            plot.line(zip(candidates, line), *style, 2)
            canvas.line([(plot.x(candidates[-1]), plot.y(line[-1])), (784, y)], style[1], 0.5)
            canvas.mark(*style, 796, y)
            canvas.text(816, y, f"{name}  {line[-1]:.0f} %")
        top += height + 120
    return canvas


# ---------------------------------------------------------------------------------------------------------
# Training curves

def curves(title, panels):
    """Panels (what and unit, {network: [(epoch, value), ...]}) side by side, without the empty ones."""
    styles = dict(zip(panels[0][1], STYLES * len(panels[0][1])))
    panels = [(ylabel, lines) for ylabel, lines in panels if any(lines.values())]
    canvas = Canvas(500 * len(panels) + 20, 500)
    canvas.text(74, 26, title, 20)
    canvas.legend(74, 62, canvas.width - 74, [(*style, name) for name, style in styles.items()])
    for k, (ylabel, lines) in enumerate(panels):
        xs, ys = zip(*(point for line in lines.values() for point in line))
        plot = Plot(canvas, (500 * k + 74, 132, 500 * k + 490, 430), [1, *xs], ys, "epoch", ylabel)
        for name, line in lines.items():
            plot.line(line, *styles[name], 2.5 if len(line) <= 500 else 1.5)
            if len(line) <= 50:
                plot.dots(line, "disc", styles[name][1], 3.5)
    return canvas


def series(epochs, key, unit=1):
    return [(entry["epoch"], entry[key] / unit) for entry in epochs if key in entry]


# ---------------------------------------------------------------------------------------------------------
# Figs. 5 and 6: examples

def examples(saved):
    """Rows of image, ground truth, baseline, cell, from the content of examples.pt."""
    images, *maps = (np.asarray(saved[key]) for key in ("images", "labels", "baseline", "cell"))
    rows, height, width = maps[0].shape
    scale = 300 // width if width <= 150 else 320 / width                 # a small frame grows by a whole number
    size = round(scale * width), round(scale * height)
    total, below = 4 * size[0] + 3 * 8, size[1] + 40
    entries = [("swatch", tuple(colour), name) for colour, name in zip(saved["palette"], saved["classes"])]
    entries.append(("swatch", INK, "ignored"))
    canvas = Canvas(total + 40, 90 + rows * below + 26 * len(entries))
    for k, heading in enumerate(("image", "ground truth", "baseline", saved["cell_name"])):
        canvas.text(20 + k * (size[0] + 8) + size[0] / 2, 28, heading, 20, anchor="mm")
    for row, (name, differ) in enumerate(zip(saved["names"], saved["differ"])):
        y = 50 + row * below
        caption = f"{name}: the networks differ on {100 * differ:.1f} % of the labelled pixels"
        canvas.text(20, y + size[1] + 16, caption, colour=GREY)
        for k, pixels in enumerate([images[row]] + [colourise(m[row], saved["palette"]) for m in maps]):
            canvas.picture(20 + k * (size[0] + 8), y, pixels, size)
    canvas.height = canvas.legend(20, 68 + rows * below, total, entries) + 24
    return canvas


# ---------------------------------------------------------------------------------------------------------
# Fig. 7: a cell as a diagram

OP, AGG, INPUT, OUTPUT = (116, 32), (116, 48), (124, 52), (170, 48)       # widths and heights of the boxes
APART, GUTTER, LANE = 64, 64, 24             # an operation from its layer's middle; between rows; a line past a row
SOURCES = BLUE, VERMILLION, GREEN, ORANGE, PURPLE         # lines from the five inputs


def cell_layout(genotype):
    """Where everything stands: boxes (x0, y0, x1, y1, kind, lines of text), edges (source, points, has an arrowhead).

    Row 0 holds the inputs, the last row the output; a layer, two operations over their aggregation, stands one row
    below the deepest thing it samples. What is sampled further down passes the rows between in a lane of its own.
    Curves run in the gutters between rows only, so no line can cross a box, whatever the genotype."""
    out = len(INPUTS) + len(genotype)
    takes = {len(INPUTS) + k: (layer.loc1, layer.loc2) for k, layer in enumerate(genotype)}
    takes[out] = tuple(genotype.output())
    depth, lowest = dict.fromkeys(range(len(INPUTS)), 0), {}              # lowest: the row where a source is last taken
    for node, sources in takes.items():
        depth[node] = 1 + max(depth[s] for s in sources)
        for s in sources:
            lowest[s] = max(depth[node], lowest.get(s, 0))

    at = {k: 136 * k for k in range(len(INPUTS))}                         # x where a source leaves the row above
    boxes, edges, y = [], [], INPUT[1]
    for k, name in enumerate(INPUTS):
        words = (name.removesuffix("_prev"), "previous frame" if name.endswith("_prev") else "current frame")
        boxes.append((at[k] - INPUT[0] / 2, 0, at[k] + INPUT[0] / 2, y, "input" if k in lowest else "unused", words))
    for row in range(1, depth[out] + 1):
        nodes = [node for node in takes if depth[node] == row]
        lanes = [s for s in lowest if depth[s] < row < lowest[s]]
        width, height = 2 * APART + OP[0], OP[1] + 20 + AGG[1]
        if row == depth[out]:
            width, height = max(OUTPUT[0], 26 * len(takes[out])), OUTPUT[1]
        places = spread([sum(at[s] for s in takes[node]) / len(takes[node]) for node in nodes] + [at[s] for s in lanes],
                        [width + 20] * len(nodes) + [LANE] * len(lanes))
        top, bottom, above, at = y + GUTTER, y + GUTTER + height, at, dict(zip(nodes + lanes, places))
        for node in nodes:
            x = at[node]
            if node == out:
                boxes.append((x - width / 2, top, x + width / 2, bottom, "output", ("output", "concat, conv1x1")))
                ports = spread([above[s] for s in takes[out]], [26] * len(takes[out]), x - width / 2, x + width / 2)
            else:
                layer, ports = genotype[node - len(INPUTS)], (x - APART, x + APART)
                words = layer.agg, location(node)
                boxes.append((x - AGG[0] / 2, bottom - AGG[1], x + AGG[0] / 2, bottom, "agg", words))
                for port, op in zip(ports, (layer.op1, layer.op2)):
                    kind = "zero" if op == "zero" else "op"
                    boxes.append((port - OP[0] / 2, top, port + OP[0] / 2, top + OP[1], kind, (op,)))
                    edges.append((node, [(port, top + OP[1]), ((port + x) / 2, bottom - AGG[1])], False))
            edges += [(s, curve(above[s], y, port, top), True) for s, port in zip(takes[node], ports)]
        edges += [(s, curve(above[s], y, at[s], top) + [(at[s], bottom)], False) for s in lanes]
        y = bottom
    return boxes, edges


def curve(x0, y0, x1, y1):
    """A Bezier curve downwards, upright at both ends."""
    t = np.linspace(0, 1, 40)
    return list(zip(x0 + (x1 - x0) * t * t * (3 - 2 * t), y0 + (y1 - y0) * (1.5 * t * (1 - t) + t ** 3)))


def cell(genotype, title):
    """Fig. 7. Lines from an input have its colour, lines from a layer are black."""
    boxes, edges = cell_layout(genotype)
    note = "operands of an aggregation from left to right; grey: an input that is not used, or zero"
    xs = [x for box in boxes for x in (box[0], box[2])] + [x for _, line, _ in edges for x, _ in line]
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
    for k, (x0, y0, x1, y1, kind, words) in enumerate(boxes):
        fill, outline, ink = {"input": (None, SOURCES[k % len(INPUTS)], INK), "unused": (None, LIGHT, (150, 150, 150)),
                              "op": (PALE, INK, INK), "zero": (None, GREY, GREY)}.get(kind, (TINT, INK, INK))
        canvas.box(x0 + dx, y0 + dy, x1 + dx, y1 + dy, fill, outline, 8 if kind in ("op", "zero") else 3)
        x, y = (x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy
        canvas.text(x, y - 9 if len(words) > 1 else y, words[0], 16, ink, "mm")
        canvas.text(x, y + 9, "".join(words[1:]), 14, GREY if ink == INK else ink, "mm")
    return canvas


# ---------------------------------------------------------------------------------------------------------
# The run folder

def read_log(path):
    """The lines of a JSON-lines log but for a last one that is still being written; [] where there is no file."""
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    try:                                     # several processes write as they come
        return sorted(map(json.loads, lines), key=lambda entry: entry["candidate"])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: a line is no candidate's; restore it or remove the file") from None


def load(path):
    """A checkpoint's content; {} where there is no file."""
    try:                                     # mmap: only what is looked at is read, not the weights
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True) if path.exists() else {}
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: cannot be read ({reason}); remove it to make it anew") from None


def history(folder, name):
    """Of a finished training, or of one that goes on; [] where there is none."""
    return (load(folder / f"{name}.pt") or load(folder / f"{name}.partial.pt")).get("history", [])


def draw_pretrain(folder):
    if epochs := history(folder, "static"):
        panels = [("loss, with auxiliary losses", {"static network": series(epochs, "loss")}),
                  ("mIoU on val, %", {"static network": series(epochs, "val_miou", 0.01)})]
        yield "curve-pretrain", curves("Pre-training", panels)


def draw_search(folder):
    if log := read_log(folder / "search.jsonl"):
        yield "fig3-rewards", rewards(log, read_log(folder / "random.jsonl"))
        yield "fig4-sampling", sampling(log)


def draw_finetune(folder):
    cells = {path.name.split(".")[0].removesuffix("-alone") for kind in ("cell", "random") for path in folder.glob(f"{kind}-*.pt")}
    cells, panels = sorted(cells, key=lambda name: (len(name), name)), []
    baselines = sorted({path.name.split(".")[0] for path in folder.glob("baseline*.pt")})
    for what, suffix in ("cell alone", "-alone"), ("end to end", ""):
        lines = {name: series(history(folder, name + suffix), "loss") for name in [*baselines, *cells]}
        panels.append((f"loss, summed over a sequence: {what}", lines))
    if any(line for _, lines in panels for line in lines.values()):
        yield "curve-finetune", curves("Training on the full training split", panels)
    found = {Genotype.from_tokens(entry["tokens"]): entry["reward"]
             for log in ("random.jsonl", "search.jsonl") for entry in read_log(folder / log)}
    drawn = {"decoder"}                      # a seed more, or the past zeroed, is the same cell
    for name in cells:
        if (text := load(folder / f"{name}.pt").get("genotype")) and text not in drawn:
            drawn.add(text)
            genotype = Genotype.from_json(text)
            reward = f": reward {found[genotype]:.3f} in the search" if genotype in found else ""
            yield f"fig7-{name}", cell(genotype, name + reward)


def draw_evaluate(folder):
    if (saved := load(folder / "examples.pt")) and len(saved["names"]):
        yield "fig5-examples", examples(saved)


STAGES = {"pretrain": draw_pretrain, "search": draw_search, "finetune": draw_finetune, "evaluate": draw_evaluate}


def draw(folder, stage=None, again=True):
    """Draws every figure whose input is in the run's folder, or those of one stage; the paths of what was written.
    again=False: only those that are missing."""
    folder, written = pathlib.Path(folder), []
    for name in [stage] if stage else STAGES:
        for figure, canvas in STAGES[name](folder):
            (folder / "figures").mkdir(exist_ok=True)
            path = folder / "figures" / f"{figure}.png"
            if again or not path.exists():
                save_png(path, canvas.finished())
                written.append(path)
    return written


def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError("usage: python figures.py RUN, the folder of a run")
    if not os.path.isdir(arguments[0]):
        raise InputError(f"{arguments[0]}: no such folder; python figures.py RUN draws a run of train.py")
    written = draw(arguments[0])
    if not written:
        raise InputError(f"{arguments[0]}: holds nothing that can be drawn; is it the folder of a run?")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
