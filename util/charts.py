"""Drawing: label maps in colour, a canvas, a plot, sheets of pictures. Colours are Okabe and Ito's, which the
colour-blind can tell apart. A shape, a dash or a word always repeats what a colour says."""
import functools
import math
import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.label_maps import IGNORE

INK, GREY, LIGHT, PALE, TINT = (0, 0, 0), (110, 110, 110), (215, 215, 215), (242, 242, 242), (214, 232, 245)
BLUE, SKY, VERMILLION, ORANGE = (0, 114, 178), (86, 180, 233), (213, 94, 0), (230, 159, 0)
GREEN, PURPLE = (0, 158, 115), (204, 121, 167)
COLOURS = BLUE, VERMILLION, GREEN, ORANGE, PURPLE, INK
STYLES = [("line", colour) for colour in COLOURS] + [("dashed", colour) for colour in COLOURS]


# ---------------------------------------------------------------------------------------------------------
# Label maps in colour

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
    image, ignored = np.asarray(image), np.asarray(labels)[..., None] == IGNORE
    colours = np.where(ignored, image, colourise(labels, palette))
    return np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), alpha))


def save_indexed(path, labels, palette):
    """Writes (H, W) labels as a PNG that holds the class numbers and shows the palette's colours."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(_table(palette).tobytes())   # mode L becomes P; needs all 256 entries for label 255
    save_png(path, image)


def save_png(path, image):
    """Writes a temporary file and renames it, so that a picture is complete or absent."""
    image.save(f"{path}.writing", "PNG")
    os.replace(f"{path}.writing", path)


# ---------------------------------------------------------------------------------------------------------
# A canvas: lines, boxes, marks, text

ZOOM = 3                                     # all is drawn larger by this, then reduced: smooth lines
DIAMOND = (0, -1), (1, 0), (0, 1), (-1, 0)


@functools.lru_cache
def font(size):
    return ImageFont.load_default(size)


def drawable(text):
    """The text with ? for each character that Pillow's font doesn't have, which is nearly all but ASCII."""
    box = bytes(font(16).getmask("\uffff"))               # is drawn for what is missing
    return "".join(c if c.isprintable() and bytes(font(16).getmask(c)) != box else "?" for c in text)


def text_width(text, size=16):
    return font(ZOOM * size).getlength(drawable(text)) / ZOOM


def zoomed(points):
    return [(ZOOM * x, ZOOM * y) for x, y in points]


class Canvas:
    """A white picture to draw on. Coordinates are pixels of the finished picture, y downwards. `height` may
    be lowered before it is finished."""

    def __init__(self, width, height):
        self.width, self.height = math.ceil(width), math.ceil(height)
        self.large = Image.new("RGB", (ZOOM * self.width, ZOOM * self.height), "white")
        self.pen, self.pictures, self.plots = ImageDraw.Draw(self.large), [], []

    def finished(self):
        image = self.large.reduce(ZOOM).crop((0, 0, self.width, math.ceil(self.height)))
        for x, y, picture in self.pictures:
            image.paste(picture, (x, y))
        return image

    def line(self, points, colour, width=2, dash=None):
        """points: (x, y), of any number. dash: how many pixels to draw, and how many to leave out."""
        pieces = [points] if len(points) else []
        if dash and pieces:
            x, y = np.transpose(points)
            length = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())          # up to each point
            at = [np.linspace(start, start + dash[0], 8) for start in np.arange(0, length[-1], sum(dash))]
            pieces = [np.transpose((np.interp(s, length, x), np.interp(s, length, y))) for s in at]
        for piece in pieces:
            self.pen.line(zoomed(piece), colour, round(ZOOM * width), joint="curve")

    def box(self, x0, y0, x1, y1, fill=None, outline=None, radius=0):
        self.pen.rounded_rectangle(zoomed([(x0, y0), (x1, y1)]), ZOOM * radius, fill, outline, 2 * ZOOM)

    def text(self, x, y, text, size=16, colour=INK, anchor="lm"):
        """anchor, as in Pillow, is the point of the text at (x, y): "lm" is the middle of its left edge."""
        self.pen.text((ZOOM * x, ZOOM * y), drawable(text), colour, font(ZOOM * size), anchor)

    def picture(self, x, y, pixels, size):
        """Puts pixels (H, W, 3) uint8 at (x, y), resized to size (width, height): enlarged as blocks."""
        self.pictures.append((x, y, Image.fromarray(pixels).resize(size, Image.Resampling.BOX)))

    def mark(self, shape, colour, x, y, r=5):
        """Draws a dot of a plot, an arrow's head, or a line or a swatch of a legend."""
        if shape in ("line", "dashed"):
            self.line([(x - 12, y), (x + 12, y)], colour, 3, (6, 3) if shape == "dashed" else None)
        elif shape == "swatch":
            self.box(x - 9, y - 8, x + 9, y + 8, colour)
        elif shape == "striped":             # ignored pixels, as shown() draws them
            self.picture(round(x) - 9, round(y) - 8, shown(np.full((16, 18), IGNORE), [INK]), (18, 16))
        elif shape == "cross":
            self.line([(x - r, y - r), (x + r, y + r)], colour)
            self.line([(x - r, y + r), (x + r, y - r)], colour)
        elif shape in ("disc", "ring"):
            corners = zoomed([(x - r, y - r), (x + r, y + r)])
            self.pen.ellipse(corners, colour if shape == "disc" else None, colour, 2 * ZOOM)
        else:                                # a diamond looks smaller than a disc
            corners = [(-r, -r), (r, 0), (-r, r)] if shape == "arrow" else np.multiply(1.2 * r, DIAMOND)
            corners = zoomed([(x + dx, y + dy) for dx, dy in corners])
            self.pen.polygon(corners, None if shape == "hollow" else colour, colour, 2 * ZOOM)

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
    """The entries of a legend: a swatch for each class, and one for ignored pixels. A class whose name the
    font can't draw has its number instead."""
    names = [name if name and drawable(name) == name else f"class {k}" for k, name in enumerate(classes)]
    entries = [("swatch", tuple(map(int, colour)), name) for colour, name in zip(palette, names)]
    return [*entries, ("striped", None, "ignored")]


# ---------------------------------------------------------------------------------------------------------
# A plot: axes with ticks at round numbers, dots, lines

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
        yticks, margin = round_ticks(ys), 0.02 * (max(xs) - min(xs)) or 0.5
        self.xrange, self.yrange = (min(xs) - margin, max(xs) + margin), (yticks[0], yticks[-1])
        for value in yticks:
            canvas.line([(self.left, self.y(value)), (self.right, self.y(value))], LIGHT, 1)
            canvas.text(self.left - 8, self.y(value), f"{value:.6g}", anchor="rm")
        for value in round_ticks(xs, (self.right - self.left) // 60, whole=True):
            if self.xrange[0] <= value <= self.xrange[1]:
                canvas.line([(self.x(value), self.bottom), (self.x(value), self.bottom + 5)], INK, 1)
                canvas.text(self.x(value), self.bottom + 9, f"{value:.6g}", anchor="ma")
        canvas.line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], INK, 1)
        canvas.text((self.left + self.right) / 2, self.bottom + 32, xlabel, anchor="ma")
        canvas.text(self.left, self.top - 20, ylabel, colour=GREY)

    def x(self, value):
        return np.interp(value, self.xrange, (self.left, self.right))

    def y(self, value):
        return np.interp(value, self.yrange, (self.bottom, self.top))

    def dots(self, points, shape, colour, r=5):
        for x, y in points:
            self.canvas.mark(shape, colour, self.x(x), self.y(y), r)

    def line(self, points, shape, colour, width=2):
        """shape: "line" or "dashed". Values that are not finite are left out."""
        points = [(self.x(x), self.y(y)) for x, y in points if math.isfinite(y)]
        self.canvas.line(points, colour, width, (7, 4) if shape == "dashed" else None)


# ---------------------------------------------------------------------------------------------------------
# Sheets of pictures

def sheet(rows, size, entries, headings=()):
    """Rows of pictures with words at their left, a legend at the end -> a canvas.

    rows: [(words, columns)]; a column is a list of pictures, (H, W, 3) uint8, above each other. Each is drawn
    at size (width, height). headings: the columns' names."""
    width, height = size
    left = math.ceil(40 + max([140] + [text_width(word) for words, _ in rows for word in words]))
    across = max(len(columns) for _, columns in rows)
    step = 24 + max(max(height * len(columns[0]), 24 * len(words)) for words, columns in rows)
    canvas, y = Canvas(left + across * (width + 8) + 12, 90 + step * len(rows) + 26 * len(entries)), 20
    for k, heading in enumerate(headings):
        y = 50
        canvas.text(left + k * (width + 8) + width / 2, 28, heading, 20, anchor="mm")
    for words, columns in rows:
        for k, word in enumerate(words):
            canvas.text(20, y + 12 + 22 * k, word, colour=GREY if k else INK)
        for k, column in enumerate(columns):
            for below, pixels in enumerate(column):
                canvas.picture(left + k * (width + 8), y + below * height, pixels, size)
        y += step
    canvas.height = canvas.legend(20, y + 10, canvas.width - 40, entries) + 24
    return canvas


def contact_sheet(datasets, clips=3, frames=5, width=256):
    """{split: dataset} -> a canvas: some frames of the first clips of each split, labels below them. A
    dataset has clips (lists of frames), read(frame) -> (image, labels), classes and palette."""
    rows = []
    for split, dataset in datasets.items():
        for clip in dataset.clips[:clips]:
            names, columns = [pathlib.Path(frame.image).stem for frame in clip], []
            for k in sorted(set(np.linspace(0, len(clip) - 1, frames).astype(int))):
                image, labels = dataset.read(clip[k])
                columns.append([image, shown(labels, dataset.palette)])
            rows.append(((split, names[0], f"to {names[-1]}", f"{len(clip)} frames"), columns))
    H, W = rows[0][1][0][0].shape[:2]
    return sheet(rows, (width, round(width * H / W)), class_legend(dataset.classes, dataset.palette))
