"""Drawing: label maps in colour, a canvas, a plot, a contact sheet. Colours are
Okabe and Ito's, which the colour-blind can tell apart. A shape, a dash or a word always repeats what a
colour says."""
import functools
import math
import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from util.errors import InputError

IGNORE = 255
INK, GREY, LIGHT, PALE, TINT = (0, 0, 0), (110, 110, 110), (215, 215, 215), (242, 242, 242), (214, 232, 245)
BLUE, SKY, VERMILLION, ORANGE = (0, 114, 178), (86, 180, 233), (213, 94, 0), (230, 159, 0)
GREEN, PURPLE = (0, 158, 115), (204, 121, 167)
COLOURS = INK, BLUE, VERMILLION, GREEN, ORANGE, PURPLE
STYLES = [("line", colour) for colour in COLOURS] + [("dashed", colour) for colour in COLOURS]
MARKS = "disc", "hollow", "ring", "diamond", "cross"      # for lines that may cover each other


def _table(palette):
    """(256, 3) uint8: the colour of each label value, black for values without a class."""
    return np.concatenate([palette, np.zeros((256 - len(palette), 3))]).astype(np.uint8)


def colourise(labels, palette):
    """(H, W) uint8 labels -> (H, W, 3) uint8; 255 is black."""
    return _table(palette)[np.asarray(labels)]


def shown(labels, palette):
    """colourise() for viewing: ignored pixels are white with grey stripes, unlike any class."""
    labels = np.asarray(labels)
    row, column = np.indices(labels.shape)
    period = max(8, labels.shape[1] // 32)
    colours, ignored = colourise(labels, palette), labels == IGNORE
    colours[ignored] = 255
    colours[ignored & ((row + column) % period < period / 4)] = 160
    return colours


def overlay(image, labels, palette, alpha=0.5):
    """(H, W, 3) uint8: the labels' colours blended over the image, with weight `alpha`. Ignored pixels keep
    the image's colour."""
    image, ignored = np.asarray(image), np.asarray(labels) == IGNORE
    colours = colourise(labels, palette)
    colours[ignored] = image[ignored]
    return np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), alpha))


def save_indexed(path, labels, palette):
    """Writes (H, W) labels as a PNG that holds the class numbers and shows the palette's colours."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(_table(palette).tobytes())   # mode L becomes P; needs all 256 entries for label 255
    save_png(path, image)


def save_png(path, image, description="a figure"):
    """Writes a temporary file and renames it, so that a picture is complete or absent. The description is
    stored in it."""
    beside, text = f"{path}.writing", PngInfo()
    text.add_text("Description", description)
    image.save(beside, "PNG", pnginfo=text)
    os.replace(beside, path)
ZOOM = 3                                     # all is drawn larger by this, then shrunk: smooth lines


@functools.lru_cache
def font(size):
    return ImageFont.load_default(size)


def text_width(text, size=16):
    return font(ZOOM * size).getlength(text) / ZOOM


def zoomed(points):
    return [(ZOOM * x, ZOOM * y) for x, y in points]


class Canvas:
    """A white picture to draw on. Coordinates are pixels of the finished picture, y downwards. `height` may
    be lowered before it is finished."""

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
        """dash: how many pixels to draw, and how many to leave out."""
        x, y = np.asarray(points, float).T                                # (N,)
        pieces = [np.stack((x, y), axis=1)]
        if dash:
            length = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())          # up to each point
            pieces = []
            for start in np.arange(0, length[-1], sum(dash)):
                at = np.linspace(start, start + dash[0], 8)
                pieces.append(np.stack((np.interp(at, length, x), np.interp(at, length, y)), axis=1))
        for piece in pieces:
            self.pen.line(zoomed(piece), colour, round(ZOOM * width), joint="curve")

    def box(self, x0, y0, x1, y1, fill=None, outline=None, radius=0):
        self.pen.rounded_rectangle(zoomed([(x0, y0), (x1, y1)]), ZOOM * radius, fill, outline, 2 * ZOOM)

    def text(self, x, y, text, size=16, colour=INK, anchor="lm"):
        """anchor, as in Pillow, is the point of the text at (x, y): "lm" is the middle of its left edge."""
        self.pen.text((ZOOM * x, ZOOM * y), text, colour, font(ZOOM * size), anchor)

    def picture(self, x, y, pixels, size):
        """Puts pixels (H, W, 3) uint8 at (x, y), resized to size (width, height). If enlarged, a pixel
        becomes a block."""
        self.pictures.append((x, y, Image.fromarray(pixels).resize(size, Image.Resampling.BOX)))

    def mark(self, shape, colour, x, y, r=5):
        """Draws a dot of a plot, or a line or a swatch of a legend."""
        if shape in ("line", "dashed"):
            self.line([(x - 12, y), (x + 12, y)], colour, 3, (6, 3) if shape == "dashed" else None)
        elif shape == "swatch":
            self.box(x - 9, y - 8, x + 9, y + 8, colour)
        elif shape == "striped":             # ignored pixels
            stripes = shown(np.full((16, 18), IGNORE), [(0, 0, 0)])
            self.pictures.append((round(x) - 9, round(y) - 8, Image.fromarray(stripes)))
            self.box(x - 10, y - 9, x + 9, y + 8, None, LIGHT)
        elif shape == "cross":
            for sign in (-1, 1):
                self.line([(x - r, y - sign * r), (x + r, y + sign * r)], colour)
        elif shape in ("disc", "ring"):
            corners = zoomed([(x - r, y - r), (x + r, y + r)])
            self.pen.ellipse(corners, colour if shape == "disc" else None, colour, 2 * ZOOM)
        else:                                # diamond or hollow; a diamond looks smaller than a disc
            d = 1.2 * r
            corners = [(x, y - d), (x + d, y), (x, y + d), (x - d, y)]
            self.pen.polygon(zoomed(corners), colour if shape == "diamond" else None, colour, 2 * ZOOM)

    def legend(self, x, y, width, entries):
        """Draws (shape, colour, text) entries in rows from (x, y) downwards -> the last row's y. A row
        holds as many as fit."""
        across = 0
        for shape, colour, text in entries:
            if across and across + 54 + text_width(text) > width:
                across, y = 0, y + 26
            self.mark(shape, colour, x + across + 12, y)
            self.text(x + across + 32, y, text)
            across += 54 + text_width(text)
        return y


def class_legend(classes, palette):
    """The entries of a legend: a swatch for each class, and one for ignored pixels."""
    entries = [("swatch", tuple(map(int, colour)), name) for colour, name in zip(palette, classes)]
    return entries + [("striped", None, "ignored")]


def spread(wanted, sizes, low=-math.inf, high=math.inf):
    """Moves intervals of these sizes apart until none overlap -> their centres. They move as little as
    possible (least squares) from `wanted`, and stay between low and high if they fit.

    This is isotonic regression: let an interval's offset be its start minus the sizes before it. Offsets
    must not decrease from interval to interval; neighbours whose offsets would decrease get their mean."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    before = np.append(0, np.cumsum([sizes[k] for k in order]))
    blocks = []                              # [sum of offsets, count] of neighbours with one offset
    for k, offset in zip(order, before):
        total, count = wanted[k] - sizes[k] / 2 - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before_total, before_count = blocks.pop()
            total, count = before_total + total, before_count + count
        blocks.append([total, count])
    starts = []
    for total, count in blocks:
        starts += [total / count] * count
    centres = [0.0] * len(wanted)
    for k, start, offset in zip(order, starts, before):
        centres[k] = float(max(min(start, high - before[-1]), low) + offset + sizes[k] / 2)
    return centres


def round_ticks(values, at_most=6, whole=False):
    """Ticks that enclose the values, 1, 2 or 5 times a power of ten apart. Without values: 0 to 1."""
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
    """Axes on a canvas in box = (left, top, right, bottom), for the given values. x is a whole number."""

    def __init__(self, canvas, box, xs, ys, xlabel, ylabel):
        self.canvas, (self.left, self.top, self.right, self.bottom) = canvas, box
        canvas.plots.append(self)
        xticks = round_ticks(xs, (self.right - self.left) // 60, whole=True)
        yticks = round_ticks(ys)
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
        """shape: "line" or "dashed". A value that is not finite interrupts it. A single value is a dot."""
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
    """At each value the mean of the last `window` values, at the start of fewer. NaNs are left out."""
    means = []
    for k in range(len(values)):
        finite = [v for v in values[max(0, k + 1 - window):k + 1] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def curves(title, panels):
    """Panels side by side: (label of y, {network: [(epoch, value), ...]}). Empty ones are left out."""
    names = list(panels[0][1])
    styles = {name: STYLES[k % len(STYLES)] for k, name in enumerate(names)}
    panels = [(ylabel, lines) for ylabel, lines in panels if any(lines.values())]
    canvas = Canvas(500 * len(panels) + 20, 500)
    canvas.text(74, 26, title, 20)
    canvas.legend(74, 62, canvas.width - 74, [(*style, name) for name, style in styles.items()])
    for k, (ylabel, lines) in enumerate(panels):
        points = [point for line in lines.values() for point in line]
        xs, ys = [1] + [x for x, _ in points], [y for _, y in points]
        plot = Plot(canvas, (500 * k + 74, 132, 500 * k + 490, 430), xs, ys, "epoch", ylabel)
        for name, line in lines.items():
            plot.line(line, *styles[name], 2.5 if len(line) <= 500 else 1.5)
            if len(line) <= 50:
                plot.dots(line, "disc", styles[name][1], 3.5)
    return canvas
CONTACT_SHEET = "a contact sheet by data.py"              # is stored in the picture


def contact_sheet(datasets, clips=3, frames=5, width=256):
    """{split: dataset} -> a canvas with some frames of the first clips of each split, labels below them,
    the clip's name at the left; at the end the classes' colours."""
    margin, rows = 180, []
    for split, dataset in datasets.items():
        rows += [(split, dataset, clip) for clip in dataset.clips[:clips]]
    H, W = dataset.read(dataset.clips[0][0])[1].shape
    height = round(width * H / W)
    entries = class_legend(dataset.classes, dataset.palette)
    step = 2 * height + 24
    canvas = Canvas(margin + frames * (width + 8) + 12, step * len(rows) + 26 * len(entries) + 60)
    y = 20
    for split, dataset, clip in rows:
        canvas.text(20, y + 12, split, 20)
        for line, words in enumerate((name_of(clip[0]), f"to {name_of(clip[-1])}", f"{len(clip)} frames")):
            canvas.text(20, y + 42 + 22 * line, words, colour=GREY)
        chosen = sorted(set(np.linspace(0, len(clip) - 1, frames).astype(int)))
        for column, k in enumerate(chosen):
            image, label = dataset.read(clip[k])
            x = margin + column * (width + 8)
            canvas.picture(x, y, image, (width, height))
            canvas.picture(x, y + height, shown(label, dataset.palette), (width, height))
        y += step
    canvas.height = canvas.legend(20, y + 10, canvas.width - 40, entries) + 24
    return canvas


def name_of(frame):
    return pathlib.Path(frame.image).stem


def check_output(path):
    """Raises InputError unless path ends in .png and is new or an earlier contact sheet."""
    path = pathlib.Path(path)
    if path.suffix != ".png":
        raise InputError(f"--output {path}: must end in .png")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")
    if path.exists():
        try:
            with Image.open(path, formats=["PNG"]) as image:
                ours = image.info.get("Description") == CONTACT_SHEET
        except Exception:                    # Pillow raises many kinds on what is no PNG
            ours = False
        if not ours:
            raise InputError(f"{path}: exists already and is no contact sheet; choose another --output")
