"""Tables 1 and 2: every operation and every aggregation of the dynamic cell, in plain torch.

Read beside Sect. 3.2 of the paper. An *operation* takes one map and returns one; an *aggregation* takes two
maps and returns one. Maps are (B, C, H, W), with C = 64 in a cell. The dictionaries OPERATIONS and
AGGREGATIONS are in token order: the controller's token 3 is the fourth entry. tests/test_ops.py has each of
them once more, as plain loops.

The text of the paper leaves some details open. Decisions of this project are marked "[ours]", those taken
from the static networks' search of its authors "[18]".

    python ops.py       prints both tables: parameters, multiply-adds, time
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from util.costs import milliseconds_in_turn, multiply_adds, parameters, usable_device
from util.errors import run_main


# ---- Sampling at fractional positions ------------------------------------------------------------

def sample_bilinear(x, rows, cols):
    """Bilinear samples of a map at fractional pixel positions.

    x           (B, C, H, W)
    rows, cols  (B, h, w)  pixel coordinates: (0, 0) is the centre of the first pixel, (H-1, W-1) of the last
    returns     (B, C, h, w)

    A neighbouring pixel outside the map counts as zero. So the result fades to zero within one pixel of the
    border: the convention of deformable convolution. Differentiable in all three arguments."""
    H, W = x.shape[-2:]
    # grid_sample takes one dtype. Positions need float32: with the 8 significant bits of bf16, rows 200
    # and 200.5 are the same.
    exact = torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)
    rows, cols = rows.to(exact), cols.to(exact)
    # With align_corners=False pixel p of n has coordinate (2p + 1) / n - 1. With True it would be
    # 2p / (n - 1) - 1, a division by zero for n = 1. grid_sample takes (x, y), that is (column, row).
    grid = torch.stack(((2 * cols + 1) / W - 1, (2 * rows + 1) / H - 1), dim=-1)        # (B, h, w, 2)
    # grid_sample interpolates between floor(p) and floor(p) + 1, so the gradient at an integer position is
    # not zero, and an offset that starts at zero can learn.
    return F.grid_sample(x.to(exact), grid, align_corners=False).to(x.dtype)


def deform_conv2d(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """Deformable convolution: v1 without a mask, v2 with one. Replaces torchvision.ops.deform_conv2d.

    input   (B, Cin, H, W)
    offset  (B, 2 * G * kh * kw, Ho, Wo)  in pixels. For each of G offset groups (each owns Cin / G
            neighbouring channels) and each tap i, j: channel 2 * (i * kw + j) is dy, the next one is dx
    weight  (Cout, Cin / groups, kh, kw)  this shape also says how many groups (as in conv2d) there are
    bias    (Cout,)
    mask    (B, G * kh * kw, Ho, Wo)      multiplies each sample (v2)
    stride, padding, dilation             a number or (vertical, horizontal)
    returns (B, Cout, Ho, Wo)

        out(y, x) = sum over taps i, j of  weight(i, j) * mask(i, j, y, x) * input(row, col)
        row = y * stride - padding + i * dilation + dy(i, j, y, x)        col: the same with x, j and dx

    input(row, col) is bilinear, with zeros outside. tests/test_ops.py has this as loops.
    v1: Dai et al., Deformable Convolutional Networks, 2017; v2: Zhu et al., 2019.
    Raises ValueError naming the argument whose shape is wrong."""
    stride, padding, dilation = (tuple(pair) if isinstance(pair, (tuple, list)) else (pair, pair)
                                 for pair in (stride, padding, dilation))
    _check_deform(input, offset, weight, bias, mask, stride, padding, dilation)
    B, cin, H, W = input.shape
    cout, cin_group, kh, kw = weight.shape
    Ho, Wo = offset.shape[2:]
    taps, groups, G = kh * kw, cin // cin_group, offset.shape[1] // (2 * kh * kw)
    exact = torch.promote_types(torch.promote_types(input.dtype, offset.dtype), torch.float32)
    new = dict(device=input.device, dtype=exact)
    tap_row = torch.arange(kh, **new).repeat_interleave(kw) * dilation[0]     # (taps,): 0 0 0 1 1 1 2 2 2
    tap_col = torch.arange(kw, **new).repeat(kh) * dilation[1]                # (taps,): 0 1 2 0 1 2 0 1 2
    out_row = torch.arange(Ho, **new) * stride[0] - padding[0]                # (Ho,)
    out_col = torch.arange(Wo, **new) * stride[1] - padding[1]                # (Wo,)
    offset = offset.to(exact).reshape(B * G, taps, 2, Ho, Wo)
    rows = out_row[:, None] + tap_row[:, None, None] + offset[:, :, 0]        # (B*G, taps, Ho, Wo)
    cols = out_col[None, :] + tap_col[:, None, None] + offset[:, :, 1]
    # One sampling for all taps, then one matrix product: three times faster than one sampling per tap.
    x = input.to(exact).reshape(B * G, cin // G, H, W)
    x = sample_bilinear(x, rows.flatten(1, 2), cols.flatten(1, 2))            # (B*G, Cin/G, taps*Ho, Wo)
    if mask is not None:
        x = x * mask.to(exact).reshape(B * G, 1, taps * Ho, Wo)
    columns = x.reshape(B, groups, cin_group * taps, Ho * Wo).to(weight.dtype)
    out = weight.reshape(groups, cout // groups, cin_group * taps) @ columns  # (B, groups, *, Ho*Wo)
    out = out.reshape(B, cout, Ho, Wo)
    return out if bias is None else out + bias[:, None, None]


# ---- Building blocks -----------------------------------------------------------------------------

def conv_bn_relu(cin, cout, kernel=1, rate=1):
    """Convolution that keeps the resolution, BN, ReLU. `rate` is the dilation. No bias, as BN has one."""
    padding = rate * (kernel // 2)
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, padding=padding, dilation=rate, bias=False),
                         nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def resize(x, size):
    """Brings a coarse map (B, C, h, w) to the `size` (H, W) of a finer map of the same image, bilinearly.

    [ours] The map is enlarged by the *factor* f of the strides between the two, and the rest is cut off; [18]
    resizes to the size. So coarse pixel i covers the fine pixels f * i to f * i + f - 1. Of CamVid's 360 rows

        45 stay at 1/8     0 1 2 3 4 5 6 7  ...  40 41 42 43 44  .  .  .      . is cut off
        23 stay at 1/16     0   1   2   3   ...    20    21    22    .
        12 stay at 1/32       0       1     ...       10          11

    The reason: a convolution of stride 2, kernel 3 and padding 1 puts its output i at the input's pixel
    2 * i, whatever the size. F.interpolate(x, size=(H, W)) would give each of the 12 rows 3.75 of the 45:
    above those drawn here, and the farther down the more. By the factor all are equally far from their
    places, (f - 1) / 2 fine pixels, which a network learns. tests/test_ops.py brings positions down and up.
    Raises ValueError where no power of two leads from one size to the other."""
    factors = [factor(fine, coarse) for fine, coarse in zip(size, x.shape[-2:])]
    if factors == [1, 1]:
        return x
    x = F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=False)    # (B, C, f*h, f*w)
    return x[..., :size[0], :size[1]]                                                   # (B, C, H, W)


def factor(fine, coarse):
    """The smallest power of two f for which `coarse` pixels are what strides of 2 leave of `fine`: fine / f,
    rounded up. Raises ValueError if there is none."""
    f = 1
    while -(-fine // f) > max(1, coarse):                 # -(-a // b) rounds up
        f *= 2
    if -(-fine // f) != coarse:
        raise ValueError(f"{coarse} pixels don't become {fine} by a power of two")
    return f


def to_larger(x, y):
    """Brings both maps to the larger of their two resolutions: Sect. 3.1 in arch2, [ours] in a cell."""
    size = max(x.shape[-2:], y.shape[-2:], key=sum)       # both belong to one image: more rows, more columns
    return resize(x, size), resize(y, size)


# ---- Table 1: operations -------------------------------------------------------------------------
# The first eleven are those of the static search space [18], in its order.

def separable(channels, kernel, rate=1):
    """Depthwise kernel x kernel, pointwise 1x1, BN, ReLU."""
    # A depthwise convolution; the second class only avoids a fault of torch in bf16 on CPUs.
    conv = nn.Conv2d if (kernel, rate) == (3, 1) else DepthwiseInFloat32
    padding = rate * (kernel // 2)
    depthwise = conv(channels, channels, kernel, padding=padding, dilation=rate, groups=channels, bias=False)
    return nn.Sequential(depthwise, *conv_bn_relu(channels, channels))


class GlobalAverage(nn.Module):
    """gap: the mean over the image, 1x1 conv-BN-ReLU, expanded to the image's size again.

    Its batch norm sees one value per channel and image, so training needs a batch of two images or more."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv_bn_relu(channels, channels)

    def forward(self, x):
        mean = self.conv(x.mean((2, 3), keepdim=True))    # (B, C, 1, 1)
        return mean.expand(-1, -1, *x.shape[-2:])         # (B, C, H, W)


class Zero(nn.Module):
    """zero: with it the controller can leave out an input."""

    def forward(self, x):
        return torch.zeros_like(x)


class DeformConv2d(nn.Module):
    """Modulated deformable convolution (v2) that predicts its own offsets and mask, for any network.

    x (B, cin, H, W) -> (B, cout, H / stride, W / stride), rounded up. kernel: an odd number.
    Offsets (pixels) and mask come from a convolution whose weight and bias start at zero: training starts
    from a plain convolution times sigmoid(0) = 1/2."""

    def __init__(self, cin, cout, kernel=3, stride=1, dilation=1, bias=True):
        super().__init__()
        self.stride, self.padding, self.dilation = stride, dilation * (kernel // 2), dilation
        self.taps = kernel ** 2
        self.offset_mask = nn.Conv2d(cin, 3 * self.taps, kernel, stride, self.padding, dilation)
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        self.weight = nn.Parameter(nn.Conv2d(cin, cout, kernel).weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None

    def forward(self, x):
        offset, mask = self.offset_mask(x).split((2 * self.taps, self.taps), dim=1)   # (B, *, h, w)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation,
                             mask.sigmoid())


class Deformable(DeformConv2d):
    """deform3x3: modulated deformable 3x3 convolution, BN (which cancels the factor 1/2), ReLU."""

    def __init__(self, channels):
        super().__init__(channels, channels, bias=False)
        self.bn_relu = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.bn_relu(super().forward(x))


# ---- Table 2: aggregations of two maps -----------------------------------------------------------
# The paper names them (Sect. 3.2); the formulas are [ours]. Predictive and affine are not symmetric.

class Aggregation(nn.Module):
    """Brings both maps to the larger resolution, then lets the subclass combine them."""

    def forward(self, x, y):
        return self.combine(*to_larger(x, y))


class Sum(Aggregation):
    """x + y, the aggregation of [18]."""

    def combine(self, x, y):
        return x + y


class Concat(Aggregation):
    """Channel-wise concatenation [x; y], convolution back to C channels, BN, ReLU.

    concat has kernel 1, conv3d kernel 3. A 3D convolution, kernel (2, 3, 3), of the two maps stacked along
    time covers both at once, so this is the same function with the same 2 * 9 * C * C weights. The reason:
    a rank-5 weight can't be channels_last. tests/test_ops.py compares it with nn.Conv3d."""

    def __init__(self, channels, kernel=1):
        super().__init__()
        self.conv = conv_bn_relu(2 * channels, channels, kernel)

    def combine(self, x, y):
        return self.conv(torch.cat((x, y), dim=1))        # (B, 2C, H, W) -> (B, C, H, W)


class Attention(Aggregation):
    """Dense attention: a gate per pixel and channel says how much of each map passes.

    a = sigmoid(3x3 convolution of [x; y]), result a * x + (1 - a) * y"""

    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def combine(self, x, y):
        a = self.gate(torch.cat((x, y), dim=1)).sigmoid()             # (B, 2C, H, W) -> (B, C, H, W)
        exact = torch.promote_types(x.dtype, y.dtype)  # lerp needs one dtype; under autocast a is bf16
        # a * x + (1 - a) * y, written as lerp(y, x, a) = y + a * (x - y)
        return torch.lerp(y.to(exact), x.to(exact), a.to(exact))


class Predictive(Aggregation):
    """A 3x3 filter per pixel, its taps a softmax, predicted from x and applied to y (Li et al. [14]).

    f = softmax over 9 taps of a 3x3 convolution of x
    result(row, col) = sum over taps i, j of  f(i, j, row, col) * y(row + i - 1, col + j - 1)"""

    def __init__(self, channels):
        super().__init__()
        self.filters = nn.Conv2d(channels, 9, 3, padding=1)  # one filter per pixel for all channels

    def combine(self, x, y):
        f = self.filters(x).softmax(dim=1)                # (B, 9, H, W), tap (i, j) is channel 3 * i + j
        H, W = y.shape[-2:]
        y = F.pad(y, (1, 1, 1, 1))                        # (B, C, H + 2, W + 2), row -1 comes first
        out = 0
        for i in range(3):
            for j in range(3):
                out = out + f[:, 3 * i + j, None] * y[:, :, i:i + H, j:j + W]             # (B, C, H, W)
        return out


class Affine(Aggregation):
    """Spatial transformer [11]: x is resampled by a 2x3 matrix and then added to y. The matrix is predicted
    from the global mean of [x; y] and starts as the identity.

    theta = linear(mean of [x; y]); result(row, col) = x at theta (col, row, 1) + y(row, col)

    Coordinates run from -1 to 1 over the image, as in F.affine_grid. That function is not used, as it can't
    be exported with a variable height and width."""

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Linear(2 * channels, 6)
        nn.init.zeros_(self.theta.weight)
        self.theta.bias.data = torch.tensor([1., 0, 0, 0, 1, 0])

    def combine(self, x, y):
        weight, bias = self.theta.weight, self.theta.bias
        kind = torch.promote_types(weight.dtype, torch.float32)       # positions need float32
        # and matrix products for them float64 on a GPU, which may round factors in float32 to 10 bits (TF32)
        exact = torch.float64 if x.device.type == "cuda" else kind
        with torch.autocast(x.device.type, enabled=False):
            means = torch.cat((x.mean((2, 3)), y.mean((2, 3))), dim=1).to(exact)        # (B, 2C)
            theta = F.linear(means, weight.to(exact), bias.to(exact)).reshape(-1, 2, 3)
            axes = ((2 * torch.arange(n, device=x.device, dtype=exact) + 1) / n - 1 for n in x.shape[-2:])
            row, col = torch.meshgrid(*axes, indexing="ij")                             # (H, W) each
            place = torch.stack((col, row, torch.ones_like(row)), dim=-1)               # (H, W, 3)
            grid = torch.einsum("bij,hwj->bhwi", theta, place)    # theta (col, row, 1): (B, H, W, 2)
            moved = F.grid_sample(x.to(kind), grid.to(kind), align_corners=False)       # (B, C, H, W)
            return moved.to(weight.dtype) + y


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
    "conv3d":     lambda channels: Concat(channels, kernel=3),
    "attention":  Attention,
    "predictive": Predictive,
    "affine":     Affine,
}


# ---- The tables that `python ops.py` prints ------------------------------------------------------

def main(arguments=None):
    import argparse
    parser = argparse.ArgumentParser(
        description="Prints Tables 1 and 2: the cost of every operation and aggregation at 1/8 of a CamVid "
                    "frame. It takes about five seconds on one core.")
    parser.add_argument("--device", default="cpu", help="any torch device, such as cuda (default: cpu)")
    device = usable_device(parser.parse_args(arguments).device)
    torch.manual_seed(0)
    x, y = (torch.randn(1, 64, 45, 60).to(device) for _ in range(2))
    print(f"At 64 channels, 45 x 60 (1/8 of a CamVid frame), batch 1, float32, device {device},\n"
          f"{torch.get_num_threads()} threads. ms: a forward pass.")
    for title, table, inputs in (("Table 1: operations", OPERATIONS, [x]),
                                 ("Table 2: aggregations", AGGREGATIONS, [x, y])):
        modules = {name: make(64).to(device).eval() for name, make in table.items()}
        with torch.no_grad():
            ms = milliseconds_in_turn({name: lambda module=module: module(*inputs)
                                       for name, module in modules.items()})
        print(f"\n{title:24} {'parameters':>10} {'M mult-adds':>12} {'ms':>8}")
        for token, (name, module) in enumerate(modules.items()):
            macs = multiply_adds(module, *inputs) / 1e6
            print(f"{token:3} {name:20} {parameters(module):10,} {macs:12.1f} {ms[name]:8.2f}")


# ---- What the method does without: a check, and a workaround for CPUs ----------------------------

def _check_deform(input, offset, weight, bias, mask, stride, padding, dilation):
    """Raises ValueError naming the argument of deform_conv2d whose shape is wrong."""
    (B, cin, *size), (cout, cin_group, *kernel) = input.shape, weight.shape
    if len(size) != 2 or len(kernel) != 2 or cin % cin_group or cout % (cin // cin_group):
        raise ValueError("weight must be (Cout, Cin / groups, kh, kw) with groups that divide Cin and Cout, "
                         f"got {tuple(weight.shape)} for an input (B, Cin, H, W) of {tuple(input.shape)}")
    kh, kw = kernel
    Ho, Wo = ((n + 2 * p - d * (k - 1) - 1) // s + 1
              for n, p, d, k, s in zip(size, padding, dilation, kernel, stride))
    G = math.gcd(cin, offset.shape[1] // (2 * kh * kw))   # if no number of groups fits, offset is refused
    for name, tensor, shape in (("offset", offset, (B, 2 * G * kh * kw, Ho, Wo)), ("bias", bias, (cout,)),
                                ("mask", mask, (B, G * kh * kw, Ho, Wo))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


class DepthwiseInFloat32(nn.Conv2d):
    """A depthwise convolution that stays in float32 under autocast on a CPU; elsewhere an ordinary one.

    Used for every depthwise convolution except 3x3 with stride 1 and rate 1. Else the backward pass of torch
    2.13 in bf16 on a CPU takes 4 to 16 times as long (strided or 5x5), or also has a wrong weight gradient
    (dilated: a relative error of 1.4, sometimes NaN), as it reads uninitialised memory."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


if __name__ == "__main__":
    run_main(main)
