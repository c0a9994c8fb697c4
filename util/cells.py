"""What may stand where a cell does: a genotype's cell, or arch2's own decoder as the strictest control."""
import copy

import torch

from dyncell import DynamicCell, Genotype

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
