"""Batch norms folded into the convolutions before them, for inference."""
import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(module):
    """A copy of the module in eval mode whose batch norms are folded into the convolutions before them.
    It computes the same function as module.eval(), up to rounding. A batch norm that doesn't directly
    follow an nn.Conv2d, as in Deformable, becomes a `Scale`: one multiply-add per value. One without running
    statistics stays: it normalises each batch by itself, also in eval mode."""
    holder = nn.Sequential(copy.deepcopy(module)).eval()  # the module may itself be a batch norm
    for parent in list(holder.modules()):
        children = list(parent.named_children())
        for (before, conv), (name, bn) in zip([("", None), *children], children):
            if not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is None:
                continue
            if isinstance(parent, nn.Sequential) and isinstance(conv, nn.Conv2d):
                setattr(parent, before, fuse_conv_bn_eval(conv, bn))
                setattr(parent, name, nn.Identity())
            else:
                setattr(parent, name, Scale(bn))
    return holder.eval()[0]


class Scale(nn.Module):
    """A batch norm in eval mode: x * scale + shift, with one scale and one shift per channel."""

    def __init__(self, bn):
        super().__init__()
        weight, bias = (bn.weight.detach(), bn.bias.detach()) if bn.affine else (1, 0)
        scale = weight / (bn.running_var + bn.eps).sqrt()
        self.scale = nn.Parameter(scale[:, None, None])
        self.shift = nn.Parameter((bias - bn.running_mean * scale)[:, None, None])

    def forward(self, x):
        return x * self.scale + self.shift
