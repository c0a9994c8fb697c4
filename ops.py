"""Tables 1 and 2: every operation and every aggregation of the dynamic cell, in plain torch.

Read beside Sect. 3.2 of the paper. Everything maps (B, C, H, W) to (B, C, H, W) with C = 64 in a cell:
an *operation* takes one map, an *aggregation* takes two and gives one. Both dictionaries at the end
of this file are in token order: the controller's token 3 is the fourth entry.

What the paper does not fix (its tables are pictures in our source) is marked "[ours]".

    python ops.py       prints both tables: parameters, multiply-adds, time, memory
"""
import time

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------------------------------
# Sampling at fractional positions (used by the deformable convolution)

def sample_bilinear(x, rows, cols):
    """Bilinear samples of a map at fractional pixel positions.

    x           (B, C, H, W)
    rows, cols  (B, h, w)  pixel coordinates: (0, 0) is the centre of the first pixel, (H-1, W-1) of the last
    returns     (B, C, h, w)

    A corner outside the map counts as zero, so the answer fades over the last pixel's width and is zero
    beyond: the convention of deformable convolution. Differentiable in all three arguments.
    Raises ValueError when the shapes don't fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    if rows.dim() != 3 or rows.shape != cols.shape or rows.shape[0] != x.shape[0]:
        raise ValueError(f"rows and cols must both be (B, h, w) with B = {x.shape[0]}, "
                         f"got {tuple(rows.shape)} and {tuple(cols.shape)}")
    if 0 in (x.shape[0], x.shape[1], *rows.shape):                   # grid_sample refuses some empty inputs
        return x.new_zeros(x.shape[0], x.shape[1], *rows.shape[1:]) + 0 * x.sum()
    height, width = x.shape[-2:]
    # Pixel p of n sits at (2p + 1) / n - 1 when align_corners is False. The other convention, 2p / (n-1) - 1,
    # divides by zero for n = 1. grid_sample takes (x, y), that is (column, row).
    grid = torch.stack(((2 * cols + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)    # (B, h, w, 2)
    # grid_sample weighs floor(p) and floor(p) + 1, so the gradient at an integer position is not zero and
    # an offset that was initialised to zero can learn. It wants one dtype: the finer one, for the positions' sake.
    exact = torch.promote_types(x.dtype, grid.dtype)
    return F.grid_sample(x.to(exact), grid.to(exact), align_corners=False).to(x.dtype)


def _pair(value, name):
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one number or two, got {value}")
    return pair


def deform_conv2d(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """Deformable convolution, v1 without and v2 with a mask: a drop-in for torchvision.ops.deform_conv2d.

    input   (B, Cin, H, W)
    offset  (B, 2 * G * kh * kw, Ho, Wo)  in pixels. For each of G offset groups (each owns Cin / G
            neighbouring channels) and each tap i, j: channel 2 * (i * kw + j) is dy, the next one is dx
    weight  (Cout, Cin / groups, kh, kw)  weight groups as in conv2d, read off this shape
    bias    (Cout,)
    mask    (B, G * kh * kw, Ho, Wo)      multiplies each sample (v2)
    stride, padding, dilation             a number or (vertical, horizontal)
    returns (B, Cout, Ho, Wo)

    Output (y, x) is the sum over taps i, j of weight[i, j] times the input, sampled bilinearly with zeros
    outside, at row y * stride - padding + i * dilation + dy and the like for the column.
    Dai et al., Deformable Convolutional Networks, 2017; v2: Zhu et al., 2019.
    Raises ValueError naming the argument whose shape is wrong.
    """
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation")
    if min(sh, sw, dh, dw) < 1 or min(ph, pw) < 0:
        raise ValueError(f"stride {stride} and dilation {dilation} must be positive, padding {padding} not negative")
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"input must be (B, Cin, H, W) and weight (Cout, Cin / groups, kh, kw), "
                         f"got {tuple(input.shape)} and {tuple(weight.shape)}")
    B, cin, H, W = input.shape
    cout, cin_group, kh, kw = weight.shape
    taps = kh * kw
    if 0 in (H, W, cin, *weight.shape):
        raise ValueError(f"only the batch may be empty, got input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if cin % cin_group or cout % (cin // cin_group):
        raise ValueError(f"weight {tuple(weight.shape)} does not divide input's {cin} channels into weight groups")
    groups = cin // cin_group
    Ho = (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    Wo = (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    if Ho < 1 or Wo < 1:
        raise ValueError(f"input {H} x {W} is too small for weight {tuple(weight.shape)}: output {Ho} x {Wo}")
    offset_groups = offset.shape[1] // (2 * taps) if offset.dim() == 4 else 0
    if offset_groups < 1 or cin % offset_groups or offset.shape != (B, 2 * offset_groups * taps, Ho, Wo):
        raise ValueError(f"offset must be ({B}, 2 * G * {taps}, {Ho}, {Wo}) where G divides {cin}, "
                         f"got {tuple(offset.shape)}")
    if mask is not None and mask.shape != (B, offset_groups * taps, Ho, Wo):
        raise ValueError(f"mask must be ({B}, {offset_groups * taps}, {Ho}, {Wo}), got {tuple(mask.shape)}")
    if bias is not None and bias.shape != (cout,):
        raise ValueError(f"bias must be ({cout},), got {tuple(bias.shape)}")

    # On a CPU an image a thread at a time: its columns, 7 MB for 64 channels of 50 x 60, are then still in the cache
    # when the mask and the product read them. 0.78 of the time, forward + backward at (16, 64, 50, 60). What is left, 8
    # times a plain 3x3 convolution, is sampling (half of it), the product (a third) and the mask (an eighth).
    part = torch.get_num_threads()
    if input.device.type == "cpu" and B > part:
        masks = [None] * B if mask is None else mask.split(part)
        return torch.cat([deform_conv2d(x, o, weight, bias, stride, padding, dilation, m)
                          for x, o, m in zip(input.split(part), offset.split(part), masks)])

    # Positions need float32: bf16 has 8 bits, so it can't tell row 200.5 from row 201.
    exact = torch.promote_types(torch.promote_types(input.dtype, offset.dtype), torch.float32)
    new = dict(device=input.device, dtype=exact)
    row = torch.arange(Ho, **new)[:, None] * sh - ph + torch.arange(kh, **new).repeat_interleave(kw)[:, None, None] * dh
    col = torch.arange(Wo, **new)[None, :] * sw - pw + torch.arange(kw, **new).repeat(kh)[:, None, None] * dw
    offset = offset.to(exact).reshape(B * offset_groups, taps, 2, Ho, Wo)
    rows = (row + offset[:, :, 0]).flatten(1, 2)                          # (B*G, taps*Ho, Wo)
    cols = (col + offset[:, :, 1]).flatten(1, 2)
    # All taps in one sampling, then one matrix product: three times faster than a sampling for each tap.
    x = input.to(exact).reshape(B * offset_groups, cin // offset_groups, H, W)
    x = sample_bilinear(x, rows, cols)                                    # (B*G, Cin/G, taps*Ho, Wo)
    if mask is not None:
        x = x * mask.to(exact).reshape(B * offset_groups, 1, taps * Ho, Wo)
    columns = x.reshape(B, groups, cin_group * taps, Ho * Wo).to(weight.dtype)
    out = weight.reshape(groups, cout // groups, cin_group * taps) @ columns      # (B, groups, Cout/groups, Ho*Wo)
    out = out.reshape(B, cout, Ho, Wo)
    return out if bias is None else out + bias[:, None, None]


# ---------------------------------------------------------------------------------------------------------
# Building blocks

def conv_bn_relu(cin, cout, kernel=1, rate=1):
    """Convolution of the same size, batch norm, ReLU. `rate` is the dilation. No bias: BN has one."""
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False),
                         nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def resize(x, size):
    """Bilinear resize of (B, C, H, W) to (B, C, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv_of_concat(block, maps, size):
    """conv_bn_relu (1x1) of the concatenation of maps (B, C_k, h_k, w_k), each brought to `size` (h, w) -> (B, Cout, h, w).

    A 1x1 convolution looks at one pixel and a resize at one channel, so they commute. Where the maps differ in size each
    goes through its part of the weight at its own: a map of 45 x 60 and one of 23 x 30 take 0.75 of the time, trained 0.6."""
    if len({x.shape[-2:] for x in maps}) == 1:
        maps = [torch.cat(maps, dim=1)]
    conv, bn, relu = block
    weights = conv.weight.split([x.shape[1] for x in maps], dim=1)        # (Cout, C_k, 1, 1) each
    parts = [resize(F.conv2d(x, weight, bias), size) for x, weight, bias in zip(maps, weights, [conv.bias] + [None] * len(maps))]
    return relu(bn(sum(parts[1:], parts[0])))


def to_larger(x, y):
    """Both maps at the larger of their two resolutions (Sect. 3.2)."""
    size = larger(x, y)
    return resize(x, size), resize(y, size)


def larger(x, y):
    return [max(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:])]


# ---------------------------------------------------------------------------------------------------------
# Table 1: operations. The first eleven are those of the static search space [18], in its order.

class DepthwiseInFloat32(nn.Conv2d):
    """A depthwise convolution that stays in its weight's precision under autocast: every one but 3x3 with stride and rate 1.

    In bf16 and channels_last on a CPU torch 2.13's backward pass takes 4 to 16 times as long when it is strided or 5x5 (without,
    a step of pretraining takes 1.2 times as long); dilated, its weight gradient is wrong as well (relative error 1.4, at times
    NaN: it reads memory that nobody wrote)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def separable(channels, kernel, rate=1):
    """Depthwise kernel x kernel, pointwise 1x1, BN, ReLU."""
    conv = nn.Conv2d if (kernel, rate) == (3, 1) else DepthwiseInFloat32
    depthwise = conv(channels, channels, kernel, padding=rate * (kernel // 2), dilation=rate, groups=channels, bias=False)
    return nn.Sequential(depthwise, *conv_bn_relu(channels, channels))


class GlobalAverage(nn.Module):
    """gap: the mean over the image, 1x1 conv-BN-ReLU, spread over the image again.

    In training mode its batch norm sees one value a channel and image: it needs a batch of two or more."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv_bn_relu(channels, channels)

    def forward(self, x):
        return self.conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])       # (B, C, 1, 1) -> (B, C, H, W)


class Zero(nn.Module):
    """zero: the controller's way to say "not this input"."""

    def forward(self, x):
        return torch.zeros_like(x)


class Deformable(nn.Module):
    """deform3x3: modulated deformable 3x3 convolution (v2), BN, ReLU.

    Offsets (pixels) and mask come from a 3x3 convolution that starts at zero, weight and bias: training
    starts from a plain 3x3 convolution (times sigmoid(0) = 1/2, which the batch norm takes out)."""

    def __init__(self, channels):
        super().__init__()
        self.offset_mask = nn.Conv2d(channels, 3 * 9, 3, padding=1)       # 18 offsets, 9 masks
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        self.weight = nn.Parameter(nn.Conv2d(channels, channels, 3).weight.detach().clone())
        self.bn_relu = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def forward(self, x):
        offset, mask = self.offset_mask(x).split((18, 9), dim=1)
        return self.bn_relu(deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid()))


# ---------------------------------------------------------------------------------------------------------
# Table 2: aggregations of two maps. The order matters for predictive and affine. Formulas: [ours], Sect. 3.2.

class Aggregation(nn.Module):
    """Brings both maps to the larger resolution, then lets the subclass combine them."""

    def forward(self, x, y):
        return self.combine(*to_larger(x, y))


class Sum(Aggregation):
    """x + y, the aggregation of [18]."""

    def combine(self, x, y):
        return x + y


class Concat(Aggregation):
    """Channel-wise concatenation, 1x1 conv-BN-ReLU back to C."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv_bn_relu(2 * channels, channels)

    def forward(self, x, y):
        return conv_of_concat(self.conv, (x, y), larger(x, y))            # (B, 2C, H, W) -> (B, C, H, W)


class Conv3d(Aggregation):
    """3D convolution, kernel (2, 3, 3), of the two maps stacked along time, BN, ReLU.

    Its kernel covers both maps at once, so it is a 3x3 convolution of their concatenation: the same
    function and the same 2 * 9 * C * C weights. Written so, it can be channels_last, which a rank-5
    weight can't. tests/test_ops.py holds it against nn.Conv3d."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv_bn_relu(2 * channels, channels, 3)

    def combine(self, x, y):
        return self.conv(torch.cat((x, y), dim=1))


class Attention(Aggregation):
    """Dense attention: a = sigmoid(3x3 conv of [x; y]) per pixel and channel; a * x + (1 - a) * y."""

    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def combine(self, x, y):
        a = self.gate(torch.cat((x, y), dim=1)).sigmoid()
        exact = torch.promote_types(x.dtype, y.dtype)                     # under autocast a is bf16; lerp wants one dtype
        return torch.lerp(y.to(exact), x.to(exact), a.to(exact))


class Predictive(Aggregation):
    """3x3 filters per pixel, softmax over the nine taps, predicted from x and applied to y (Li et al. [14])."""

    def __init__(self, channels):
        super().__init__()
        self.filters = nn.Conv2d(channels, 9, 3, padding=1)               # one filter a pixel, shared by the channels

    def combine(self, x, y):
        filters = self.filters(x).softmax(dim=1)                          # (B, 9, H, W), tap t = 3 * i + j
        (height, width), y = y.shape[-2:], F.pad(y, (1, 1, 1, 1))
        return sum(filters[:, 3 * i + j, None] * y[:, :, i:i + height, j:j + width]
                   for i in range(3) for j in range(3))


class Affine(Aggregation):
    """Spatial transformer [11]: a 2x3 matrix from the global mean of [x; y] resamples x, which is added to y.

    The matrix starts as the identity. Coordinates run from -1 to 1 over the image (torch's affine_grid)."""

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Linear(2 * channels, 6)
        nn.init.zeros_(self.theta.weight)
        with torch.no_grad():
            self.theta.bias.copy_(torch.tensor([1., 0, 0, 0, 1, 0]))

    def combine(self, x, y):
        exact = self.theta.weight.dtype
        with torch.autocast(x.device.type, enabled=False):                # affine_grid is a product: no bf16 positions
            theta = self.theta(torch.cat((x.mean((2, 3)), y.mean((2, 3))), dim=1).to(exact))          # (B, 2C) -> (B, 6)
            grid = F.affine_grid(theta.reshape(-1, 2, 3), x.shape, align_corners=False)    # (B, H, W, 2)
            return F.grid_sample(x.to(exact), grid, align_corners=False) + y


OPERATIONS = {
    "conv1x1":     lambda channels: conv_bn_relu(channels, channels),
    "conv3x3":     lambda channels: conv_bn_relu(channels, channels, 3),
    "sep3x3":      lambda channels: separable(channels, 3),
    "sep5x5":      lambda channels: separable(channels, 5),
    "gap":         GlobalAverage,
    "conv3x3_r3":  lambda channels: conv_bn_relu(channels, channels, 3, rate=3),
    "conv3x3_r12": lambda channels: conv_bn_relu(channels, channels, 3, rate=12),
    "sep3x3_r3":   lambda channels: separable(channels, 3, rate=3),
    "sep5x5_r6":   lambda channels: separable(channels, 5, rate=6),
    "skip":        lambda channels: nn.Identity(),
    "zero":        lambda channels: Zero(),
    "deform3x3":   Deformable,
}

AGGREGATIONS = {
    "sum":        lambda channels: Sum(),
    "concat":     Concat,
    "conv3d":     Conv3d,
    "attention":  Attention,
    "predictive": Predictive,
    "affine":     Affine,
}


# ---------------------------------------------------------------------------------------------------------
# What each costs

def parameters(module):
    """Number of trainable numbers."""
    return sum(p.numel() for p in module.parameters())


def multiply_adds(function, *inputs):
    """Multiply-adds of one call, as counted by torch: convolutions and matrix products only. Bilinear
    sampling, sums and norms are not in it (4 a sample, 1, 2 an element)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() // 2


def milliseconds_in_turn(calls, repeats=5):
    """Median wall time in ms of each of several calls (name -> function), after a round that does not count.

    They take turns, so that whatever else the machine does hits them all alike and their ratios hold. The second of two
    calls is timed: the first brings the weights back into the cache after the other calls' turns."""
    def wait():
        if torch.accelerator.is_available():                              # a GPU works on after the call returned
            torch.accelerator.synchronize()

    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: sorted(t[1:])[repeats // 2] for name, t in times.items()}


def milliseconds(function, *inputs, repeats=5):
    """Median wall time of a call in ms, after one that does not count."""
    return milliseconds_in_turn({"": lambda: function(*inputs)}, repeats)[""]


def megabytes_kept(module, *inputs):
    """Memory that a call makes and keeps until its backward pass, its result included: every storage once."""
    given = {x.untyped_storage().data_ptr() for x in (*inputs, *module.parameters(), *module.buffers())}
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()        # held, so that no address comes again
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        note(module(*inputs))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given) / 1e6


def print_costs(title, modules, inputs):
    """A row a module."""
    def forward(module):
        with torch.no_grad():
            module(*inputs)

    def forward_backward(module):
        out = module(*inputs)
        if out.requires_grad:                                             # zero has nothing to learn
            out.sum().backward()

    ms = milliseconds_in_turn({(name, run): lambda module=module, run=run: run(module)
                               for name, module in modules.items() for run in (forward, forward_backward)})
    print(f"\n{title:24} {'parameters':>10} {'M mult-adds':>12} {'ms forward':>11} {'ms fwd+bwd':>11} {'MB kept':>8}")
    for token, (name, module) in enumerate(modules.items()):
        print(f"{token:3} {name:20} {parameters(module):10,} {multiply_adds(module, *inputs) / 1e6:12.1f} "
              f"{ms[name, forward]:11.2f} {ms[name, forward_backward]:11.2f} {megabytes_kept(module, *inputs):8.1f}")


def main():
    torch.manual_seed(0)
    channels, size = 64, (45, 60)                                         # 1/8 of a CamVid frame
    print(f"at {channels} channels, {size[0]} x {size[1]} (1/8 of a CamVid frame), batch 1, float32, "
          f"{torch.get_num_threads()} threads.\nMB kept: what a forward pass makes and keeps for the backward one, its result included")
    for title, table, count in (("Table 1: operations", OPERATIONS, 1), ("Table 2: aggregations", AGGREGATIONS, 2)):
        modules = {name: make(channels).eval() for name, make in table.items()}
        print_costs(title, modules, [torch.randn(1, channels, *size, requires_grad=True) for _ in range(count)])
    modules = {name: OPERATIONS[name](channels).eval() for name in ("conv3x3", "deform3x3")}
    print_costs("batch 16, 50 x 60", modules, [torch.randn(16, channels, 50, 60, requires_grad=True)])


if __name__ == "__main__":
    main()
