"""The two kinds of cell: that of a genotype, and, as the strictest control, arch2's own decoder."""
import copy
import hashlib
import pathlib

import torch

from data import InputError
from dyncell import CELLS, DynamicCell, Genotype
from util import weights

DECODER = "decoder"                          # used in place of a genotype


class Decoder(torch.nn.Module):
    """A copy of arch2's decoder, used as a cell that ignores the previous frame. [ours] It is trained alone
    and end to end by the same steps as the cells, so the difference shows what a cell's structure is worth.
    (A cell gets no layer1, and no block of arch2 uses it.)"""

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
    """A Genotype, its JSON text or DECODER -> the module. past=False: zeros replace the previous frame's
    maps."""
    if genotype == DECODER:
        return Decoder(static)
    if not isinstance(genotype, Genotype):
        genotype = Genotype.from_json(genotype)
    return DynamicCell(genotype, static.num_classes, past)


def as_text(genotype):
    """A Genotype or DECODER -> the text that a checkpoint holds."""
    return genotype.to_json() if isinstance(genotype, Genotype) else genotype


def cell_of(text):
    """The argument of --cell -> a name for files, and a Genotype or DECODER.

    The argument may be a name in CELLS, "decoder", a JSON file, a checkpoint of a cell, or a genotype as
    JSON or as it is printed. A cell that is not in CELLS is named by a hash. Raises InputError for anything
    else."""
    if text == DECODER or text in CELLS:
        return text, CELLS.get(text, DECODER)
    try:
        genotype = Genotype(read_cell(text))
    except ValueError as error:
        raise InputError(f"argument --cell: invalid choice: {text[:60]!r} ({error}); it takes "
                         f"{', '.join(CELLS)}, {DECODER}, a JSON file of a genotype, a checkpoint of a "
                         "cell, or a genotype as it is printed") from None
    for name, known in CELLS.items():
        if genotype == known:
            return name, known
    return f"custom-{hashlib.sha256(genotype.to_json().encode()).hexdigest()[:6]}", genotype


def read_cell(text):
    """The content of the file of this name, or the text itself if it is no file name."""
    path = pathlib.Path(text)
    if not text.lower().endswith((".json", ".jsonl", ".pt", ".txt")):
        return text
    try:
        if path.suffix == ".pt":
            return weights.read(path, "--cell takes a trained cell")["genotype"]
        return path.read_text()
    except KeyError:
        raise ValueError("not the checkpoint of a cell") from None
    except OSError as error:
        raise ValueError(error.strerror) from None


def cell_text(text):
    """The argument of --cell as a recipe keeps it: a name or the printed genotype, never a file, which may
    move."""
    name, genotype = cell_of(text)
    return name if genotype == DECODER or name in CELLS else str(genotype)
