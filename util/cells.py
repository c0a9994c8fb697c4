"""What may stand where a cell does: a genotype's cell, or arch2's own decoder as the strictest control."""
import copy
import hashlib
import pathlib

import torch

from data import InputError
from dyncell import CELLS, DynamicCell, Genotype
from util import weights

DECODER = "decoder"                          # stands where a genotype does


class Decoder(torch.nn.Module):
    """A copy of arch2's decoder as a cell that doesn't look at the past. [ours] It says what a cell's
    structure is worth: it is trained alone and end to end by the same steps as the cells. (No block of
    arch2 uses layer1.)"""

    def __init__(self, static):
        super().__init__()
        self.static = copy.deepcopy(static)
        self.static.encoder = None

    @property
    def classifier(self):
        return self.static.classifier

    def forward(self, layer4_prev, dec_prev, layer2, layer3, layer4):
        return self.static.decode((None, layer2, layer3, layer4))


def make_cell(genotype, static, past=True):
    """A Genotype, its JSON text or DECODER -> the module. past=False: zeros in place of the previous
    frame."""
    if genotype == DECODER:
        return Decoder(static)
    if not isinstance(genotype, Genotype):
        genotype = Genotype.from_json(genotype)
    return DynamicCell(genotype, static.num_classes, past)


def as_text(genotype):
    """What a checkpoint holds: JSON, or DECODER."""
    return genotype.to_json() if isinstance(genotype, Genotype) else genotype


def cell_of(text):
    """What --cell was given -> a name for files, and a Genotype or DECODER.

    A name of CELLS, "decoder", a JSON file, a checkpoint of a cell, or a genotype as it is printed or as
    JSON. A cell of one's own is named by its content. Raises InputError."""
    if text == DECODER or text in CELLS:
        return text, CELLS.get(text, DECODER)
    try:
        genotype = Genotype(read_cell(text))
    except ValueError as error:
        raise InputError(f"argument --cell: invalid choice: {text[:60]!r} ({error}); it takes "
                         f"{', '.join(CELLS)}, {DECODER}, a file of a "
                         "genotype's JSON or of a trained cell, or a genotype as it is printed") from None
    for name, known in CELLS.items():
        if genotype == known:
            return name, known
    return f"custom-{hashlib.sha256(genotype.to_json().encode()).hexdigest()[:6]}", genotype


def read_cell(text):
    """The text, or what the file of this name holds."""
    path = pathlib.Path(text)
    if not text.lower().endswith((".json", ".jsonl", ".pt", ".txt")):
        return text
    try:
        if path.suffix == ".pt":
            return weights.read(path, "--cell takes a trained cell")["genotype"]
        return path.read_text()
    except KeyError:
        raise ValueError("no cell's checkpoint") from None
    except OSError as error:
        raise ValueError(error.strerror) from None


def cell_text(text):
    """The same, to be kept in a recipe: a name, or the printed genotype. A file may move."""
    name, genotype = cell_of(text)
    return name if genotype == DECODER or name in CELLS else str(genotype)
