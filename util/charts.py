"""Drawing: label maps in colour, a canvas, axes, sheets of pictures. Colours are Okabe and Ito's, which the
colour-blind can tell apart. A shape, a width or a word always repeats what a colour says."""
import functools
import math
import os
import pathlib
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.label_maps import IGNORE

INK, GREY, LIGHT, PALE = (0, 0, 0), (110, 110, 110), (215, 215, 215), (242, 242, 242)
BLUE, SKY, VERMILLION, ORANGE = (0, 114, 178), (86, 180, 233), (213, 94, 0), (230, 159, 0)
COLOURS = BLUE, VERMILLION, (0, 158, 115), ORANGE, (204, 121, 167), INK
ZOOM = 3                                     # a canvas is drawn larger by this, then reduced: smooth lines
SHAPES = {"disc": (24, 0), "diamond": (4, 45), "arrow": (3, 270)}         # sides, rotation; an arrow's head
font = functools.lru_cache(ImageFont.load_default)


def colourise(labels, palette, ignored=0):
    """(H, W) uint8 labels -> (H, W, 3) uint8. Ignored pixels are black, or have another grey value."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)], colours[IGNORE] = palette, ignored
    return colours[np.asarray(labels)]


def overlay(image, labels, palette):
    """The mean of image and labels' colours -> (H, W, 3) uint8. Ignored pixels keep the image's colour."""
    colours = np.where(np.asarray(labels)[..., None] == IGNORE, image, colourise(labels, palette))
    return np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), 0.5))


def save_indexed(path, labels, palette):
    """Writes (H, W) labels as a PNG that holds the class numbers and shows the palette's colours."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(colourise(range(256), palette).tobytes())    # mode L becomes P; 255 needs 256 entries
    save_png(path, image)


def save_png(path, image):
    """Writes a temporary file and renames it, so that a picture is complete or absent."""
    image.save(f"{path}.writing", "PNG")
    os.replace(f"{path}.writing", path)


class Canvas:
    """A white picture to draw on, in pixels of the finished one, y downwards. `height` may be lowered."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.large = Image.new("RGB", (ZOOM * width, ZOOM * height), "white")
        self.pen = ImageDraw.Draw(self.large)

    def finished(self):
        return self.large.reduce(ZOOM).crop((0, 0, self.width, self.height))

    def line(self, points, colour, width=2):
        self.pen.line([(ZOOM * x, ZOOM * y) for x, y in points], colour, round(ZOOM * width), joint="curve")

    def text(self, x, y, text, size=16, colour=INK, anchor="lm"):
        """anchor, as in Pillow, is the point of the text at (x, y): "lm" is the middle of its left edge."""
        text = re.sub("[^ -~±]", "?", text)  # nearly all else is not in Pillow's font
        self.pen.text((ZOOM * x, ZOOM * y), text, colour, font(ZOOM * size), anchor)

    def box(self, x, y, width, height, text="", fill=PALE, outline=INK):
        """A box around (x, y), with the text in it."""
        corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        self.pen.rounded_rectangle([ZOOM * c for c in corners], 4 * ZOOM, fill, outline, 2 * ZOOM)
        self.text(x, y, text, anchor="mm")

    def mark(self, shape, colour, x, y, r=5, hollow=False):
        """shape: one of SHAPES, of radius r."""
        self.pen.regular_polygon((ZOOM * x, ZOOM * y, ZOOM * r), *SHAPES[shape], None if hollow else colour,
                                 colour, 2 * ZOOM)

    def class_legend(self, y, classes, palette):
        """Draws swatches and names, or numbers if the font lacks these, from y downwards -> the last y."""
        names = [c if re.fullmatch("[ -~]+", c) else f"class {k}" for k, c in enumerate(classes)]
        step = 48 + 9 * max(map(len, names))
        across = max(1, (self.width - 20) // step)
        for k, (name, colour) in enumerate(zip(names, palette)):
            x, below = 29 + step * (k % across), y + 26 * (k // across)
            self.box(x, below, 18, 16, "", tuple(map(int, colour)), GREY)
            self.text(x + 17, below, name)
        return below


def round_ticks(values, at_most=6, least=0):
    """Ticks that enclose the values: {value: text}, 1, 2 or 5 times a power of ten apart, `least` or more."""
    low, high = min(values, default=0), max(values, default=1)
    if high - low < 1e-6:                    # one value, or all the same
        low, high = low - 0.5, high + 0.5
    power = max(least, 10.0 ** math.floor(math.log10((high - low) / at_most)))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= at_most:
            return {k * step: f"{k * step:.6g}" for k in range(first, last + 1)}


def axes(canvas, box, xticks, yticks, xlabel="", ylabel=""):
    """Draws a grid at the ticks, {value: text}, into box = (left, top, right, bottom) -> a function that
    takes values x, y to their point of the canvas; values outside are drawn at the edge."""
    left, top, right, bottom = box

    def at(x, y):
        return (np.interp(x, (min(xticks), max(xticks)), (left, right)),
                np.interp(y, (min(yticks), max(yticks)), (bottom, top)))

    for value, text in xticks.items():
        x, _ = at(value, 0)
        canvas.line([(x, top), (x, bottom)], LIGHT, 1)
        canvas.text(x, bottom + 9, text, anchor="ma")
    for value, text in yticks.items():
        _, y = at(0, value)
        canvas.line([(left, y), (right, y)], LIGHT, 1)
        canvas.text(left - 8, y, text, anchor="rm")
    canvas.text((left + right) / 2, bottom + 32, xlabel, anchor="ma")
    canvas.text(left, top - 20, ylabel, colour=GREY)
    return at


def sheet(rows, classes, palette, width=256):
    """Rows of pictures, words above each row, and a legend of the classes -> a canvas. rows: [(words,
    pictures)]. Each picture, (H, W, 3) uint8, has this width, and the height that is right for the first."""
    H, W = rows[0][1][0].shape[:2]
    height, across = round(width * H / W), max(len(pictures) for _, pictures in rows)
    canvas = Canvas(max(700, 32 + across * (width + 8)), 60 + (height + 48) * len(rows) + 26 * len(classes))
    for row, (words, pictures) in enumerate(rows):
        y = 40 + (height + 48) * row
        canvas.text(20, y - 14, words)
        for k, pixels in enumerate(pictures):                     # box: small ones are enlarged as blocks
            picture = Image.fromarray(pixels).resize((ZOOM * width, ZOOM * height), Image.Resampling.BOX)
            canvas.large.paste(picture, (ZOOM * (20 + k * (width + 8)), ZOOM * y))
    canvas.height = 24 + canvas.class_legend(y + height + 28, [*classes, "ignored"], [*palette, (255,) * 3])
    return canvas


def contact_sheet(datasets, clips=3, frames=5):
    """{split: dataset} -> a canvas: frames of the first clips of each split, labels below them. A dataset has
    clips, read(frame) -> (image, labels), classes and palette."""
    rows = []
    for split, dataset in datasets.items():
        for clip in dataset.clips[:clips]:
            names, pictures = [pathlib.Path(frame.image).stem for frame in clip], []
            for k in sorted(set(np.linspace(0, len(clip) - 1, frames).astype(int))):
                image, labels = dataset.read(clip[k])
                pictures.append(np.concatenate([image, colourise(labels, dataset.palette, 255)]))
            rows.append((f"{split}: {len(clip)} frames, {names[0]} to {names[-1]}", pictures))
    return sheet(rows, dataset.classes, dataset.palette)
