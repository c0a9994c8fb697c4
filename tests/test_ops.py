"""Tables 1 and 2: every fast operation beside its definition, written as loops in float64.

The definitions here use numpy and a tent function, so they share nothing with the code under test:
a bilinear sample is the sum over ALL pixels of tent(row - i) * tent(col - j) * x[i, j], where
tent(d) = max(0, 1 - |d|), which is zero outside without any case distinction.
"""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import ops
from util.costs import parameters

EVERY = [pytest.param(table[name], inputs, name, id=name)
         for table, inputs in ((ops.OPERATIONS, 1), (ops.AGGREGATIONS, 2)) for name in table]
DOUBLE = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def off_integer(*shape, spread=2):
    """Random numbers at least 0.2 from every integer, where bilinear sampling has no kink: for gradcheck."""
    return torch.randint(-spread, spread, shape) + 0.2 + 0.6 * torch.rand(shape, **DOUBLE)


def strided(x):
    """The same values, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def randomise(module):
    """Everything away from where it starts: offsets, thetas, batch norms (also negative scales)."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.eval()


# ---- the definitions -----------------------------------------------------------------------------------

def tent(distance):
    return np.maximum(0, 1 - np.abs(distance))


def naive_sample(plane, row, col):
    """(..., H, W) at one position -> (...)."""
    height, width = plane.shape[-2:]
    return tent(row - np.arange(height)) @ plane @ tent(col - np.arange(width))


def naive_deform(input, offset, weight, bias, stride, padding, dilation, mask):
    """Deformable convolution as in the papers, one multiplication at a time."""
    x, offset, weight = (t.detach().numpy() for t in (input, offset, weight))
    (B, cin, _, _), (cout, cin_group, kh, kw) = x.shape, weight.shape
    Ho, Wo = offset.shape[2:]
    G = offset.shape[1] // (2 * kh * kw)
    out = np.zeros((B, cout, Ho, Wo))
    for b, o, r, s, c, i, j in itertools.product(*map(range, (B, cout, Ho, Wo, cin_group, kh, kw))):
        channel = o // (cout // (cin // cin_group)) * cin_group + c  # weight group of o, then c within it
        group, tap = channel // (cin // G), i * kw + j
        dy, dx = offset[b, group * 2 * kh * kw + 2 * tap:, r, s][:2]
        sample = naive_sample(x[b, channel], r * stride[0] - padding[0] + i * dilation[0] + dy,
                              s * stride[1] - padding[1] + j * dilation[1] + dx)
        m = 1 if mask is None else mask[b, group * kh * kw + tap, r, s].item()
        out[b, o, r, s] += weight[o, c, i, j] * m * sample
    return out if bias is None else out + bias.detach().numpy()[:, None, None]


def naive_conv(x, weight, rate=1, bias=None):
    """Same-size convolution, zeros outside. A weight (C, 1, k, k) on C > 1 channels is depthwise."""
    B, C, H, W = x.shape
    weight = weight.detach().numpy()
    half, out = weight.shape[-1] // 2, np.zeros((B, len(weight), H, W))
    for r, s, i, j in itertools.product(range(H), range(W), range(2 * half + 1), range(2 * half + 1)):
        row, col = r + (i - half) * rate, s + (j - half) * rate
        if 0 <= row < H and 0 <= col < W:
            w = weight[:, :, i, j]
            out[:, :, r, s] += x[:, :, row, col] * w[:, 0] if w.shape[1] != C else x[:, :, row, col] @ w.T
    return out if bias is None else out + bias.detach().numpy()[:, None, None]


def bn_relu(module, x):
    """In eval mode, by the one batch norm that the module has."""
    bn, = (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    mean, var, scale, shift = (t.detach().numpy()[:, None, None]
                               for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return np.maximum(0, (x - mean) / np.sqrt(var + bn.eps) * scale + shift)


def naive_resize(x, height, width):
    """Coarse pixel i covers fine pixels f * i to f * i + f - 1; bilinear between the middles of those, the
    border repeated. As a matrix for each axis."""
    def matrix(new, old):
        f = 2 ** math.ceil(math.log2(new / old))
        source = np.clip((np.arange(new) + 0.5) / f - 0.5, 0, old - 1)
        return tent(source[:, None] - np.arange(old))
    return matrix(height, x.shape[-2]) @ x @ matrix(width, x.shape[-1]).T


def kernels(module):
    return [p for p in module.parameters() if p.dim() == 4]


def expect_convolution(rate):
    def expected(module, x):
        for weight in sorted(kernels(module), key=lambda w: -w.shape[-1]):  # one, or depthwise then pointwise
            x = naive_conv(x, weight, rate if weight.shape[-1] > 1 else 1)
        return bn_relu(module, x)
    return expected


def expect_deform(module, x):
    maps = naive_conv(x, module.offset_mask.weight, bias=module.offset_mask.bias)
    offset, mask = torch.tensor(maps).split((18, 9), dim=1)               # (B, 27, H, W)
    one = (1, 1)
    out = naive_deform(torch.tensor(x), offset, module.weight, None, one, one, one, mask.sigmoid())
    return bn_relu(module, out)


def expect_conv3d(module, x, y):
    weight, = kernels(module)  # (C, 2C, 3, 3): first x's part, then y's
    channels = len(weight)
    conv = nn.Conv3d(channels, channels, (2, 3, 3), padding=(0, 1, 1), bias=False, **DOUBLE)
    with torch.no_grad():
        conv.weight[:, :, 0], conv.weight[:, :, 1] = weight[:, :channels], weight[:, channels:]
        out = conv(torch.stack((torch.tensor(x), torch.tensor(y)), dim=2)).squeeze(2)
    return bn_relu(module, out.numpy())


def expect_attention(module, x, y):
    a = 1 / (1 + np.exp(-naive_conv(np.concatenate((x, y), 1), module.gate.weight, bias=module.gate.bias)))
    return a * x + (1 - a) * y


def expect_predictive(module, x, y):
    filters = np.exp(naive_conv(x, module.filters.weight, bias=module.filters.bias))
    filters /= filters.sum(1, keepdims=True)
    (B, _, H, W), out = y.shape, np.zeros(y.shape)
    for b, r, s, i, j in itertools.product(*map(range, (B, H, W, 3, 3))):
        if 0 <= r + i - 1 < H and 0 <= s + j - 1 < W:
            out[b, :, r, s] += filters[b, 3 * i + j, r, s] * y[b, :, r + i - 1, s + j - 1]
    return out


def expect_affine(module, x, y):
    (B, _, H, W), out = x.shape, y.copy()
    weight, bias = module.theta.weight.detach().numpy(), module.theta.bias.detach().numpy()
    for b, r, s in itertools.product(range(B), range(H), range(W)):
        theta = (weight @ np.concatenate((x[b].mean((1, 2)), y[b].mean((1, 2)))) + bias).reshape(2, 3)
        u, v = theta @ [(2 * s + 1) / W - 1, (2 * r + 1) / H - 1, 1]  # in [-1, 1] over the image, x first
        out[b, :, r, s] += naive_sample(x[b], ((v + 1) * H - 1) / 2, ((u + 1) * W - 1) / 2)
    return out


OPERATIONS = {                                                            # Table 1, in this order
    "conv1x1": expect_convolution(1),
    "conv3x3": expect_convolution(1),
    "sep3x3": expect_convolution(1),
    "sep5x5": expect_convolution(1),
    "gap": lambda m, x: 0 * x + bn_relu(m, naive_conv(x.mean((2, 3), keepdims=True), *kernels(m))),
    "conv3x3_r3": expect_convolution(3),
    "conv3x3_r12": expect_convolution(12),
    "sep3x3_r3": expect_convolution(3),
    "sep5x5_r6": expect_convolution(6),
    "skip": lambda m, x: x,
    "zero": lambda m, x: 0 * x,
    "deform3x3": expect_deform,
}
AGGREGATIONS = {                                                          # Table 2
    "sum": lambda m, x, y: x + y,
    "concat": lambda m, x, y: bn_relu(m, naive_conv(np.concatenate((x, y), 1), *kernels(m))),
    "conv3d": expect_conv3d,
    "attention": expect_attention,
    "predictive": expect_predictive,
    "affine": expect_affine,
}
PARAMETERS = {  # by hand, at 64 channels; BN has 128
    "conv1x1": 64 * 64 + 128, "conv3x3": 9 * 64 * 64 + 128, "sep3x3": 9 * 64 + 64 * 64 + 128,
    "sep5x5": 25 * 64 + 64 * 64 + 128, "gap": 64 * 64 + 128, "conv3x3_r3": 9 * 64 * 64 + 128,
    "conv3x3_r12": 9 * 64 * 64 + 128, "sep3x3_r3": 9 * 64 + 64 * 64 + 128,
    "sep5x5_r6": 25 * 64 + 64 * 64 + 128,
    "skip": 0, "zero": 0, "deform3x3": (9 * 64 * 27 + 27) + 9 * 64 * 64 + 128,
    "sum": 0, "concat": 128 * 64 + 128, "conv3d": 2 * 9 * 64 * 64 + 128, "attention": 9 * 128 * 64 + 64,
    "predictive": 9 * 64 * 9 + 9, "affine": 128 * 6 + 6,
}


# ---- sample_bilinear -----------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(4, 7), (5, 2), (1, 6), (1, 1)])
def test_sample_bilinear(height, width):
    x = torch.randn(2, 3, height, width, **DOUBLE)
    # On the border, within, between border and zero, one pixel out, far out: every pair of them.
    def positions(size):
        within = [0, size - 1, (size - 1) / 2, 0.3 * size]
        return within + [-0.25, size - 0.6, -1, size, -1.5, size + 0.5, -1e4, 1e9]
    rows, cols = torch.tensor(list(itertools.product(positions(height), positions(width))), **DOUBLE).T
    rows, cols = (torch.stack((t, t.flip(0))).reshape(2, 9, 16) for t in (rows, cols))  # differs in the batch
    actual = ops.sample_bilinear(x, rows, cols)
    assert actual.shape == (2, 3, 9, 16)
    for b, i, j in itertools.product(range(2), range(9), range(16)):
        close(actual[b, :, i, j], naive_sample(x[b].numpy(), rows[b, i, j].item(), cols[b, i, j].item()))
    close(ops.sample_bilinear(strided(x), strided(rows), strided(cols)), actual)
    where = off_integer(2, 2, 3, 2).requires_grad_()
    torch.autograd.gradcheck(ops.sample_bilinear, (x.requires_grad_(), *where))


# ---- deform_conv2d -------------------------------------------------------------------------------------

# stride, padding, dilation, weight groups, offset groups; nothing the same in both directions.
GEOMETRY = [((2, 1), (1, 0), (2, 1), 2, 3), ((1, 1), (0, 0), (1, 1), 1, 1), ((1, 2), (0, 2), (1, 2), 3, 2),
            ((3, 1), (2, 1), (1, 3), 1, 6), ((1, 3), (3, 0), (2, 1), 6, 1), ((2, 2), (1, 3), (3, 2), 2, 2)]


def deform_case(stride, padding, dilation, groups, offset_groups, batch=2, kernel=(3, 2), size=(5, 4)):
    """Random arguments in torchvision's order: 6 channels in, 12 out, map 5 x 4, kernel 3 x 2. Samples lie
    in and out of the map."""
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)]
    taps = kernel[0] * kernel[1]
    return dict(input=torch.randn(batch, 6, *size, **DOUBLE),
                offset=off_integer(batch, 2 * offset_groups * taps, *out),
                weight=torch.randn(12, 6 // groups, *kernel, **DOUBLE), bias=torch.randn(12, **DOUBLE),
                stride=stride, padding=padding, dilation=dilation,
                mask=torch.rand(batch, offset_groups * taps, *out, **DOUBLE))


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_deform_conv2d(geometry):
    """Against the loops, with and without mask and bias, contiguous or not."""
    full = deform_case(*geometry)
    for left_out in ({}, {"mask": None}, {"bias": None}, {"mask": None, "bias": None}):
        case = full | left_out
        expected = naive_deform(**case)
        close(ops.deform_conv2d(**case), expected)
        close(ops.deform_conv2d(*(strided(x) if torch.is_tensor(x) else x for x in case.values())), expected)


@pytest.mark.parametrize("left_out", ["", "mask"])
@pytest.mark.parametrize("geometry", GEOMETRY[:3], ids=str)
def test_deform_conv2d_gradient(geometry, left_out):
    case = {name: x for name, x in deform_case(*geometry, batch=1).items() if name != left_out}
    leaves = {name: x.requires_grad_() for name, x in case.items() if torch.is_tensor(x)}
    torch.autograd.gradcheck(lambda *tensors: ops.deform_conv2d(**case | dict(zip(leaves, tensors))),
                             tuple(leaves.values()))


def test_empty_maps_and_batches():
    for batch, channels, h, w in ((0, 3, 2, 2), (2, 3, 2, 0), (2, 0, 2, 2)):
        x = torch.randn(batch, channels, 5, 4, requires_grad=True)
        out = ops.sample_bilinear(x, torch.zeros(batch, h, w), torch.zeros(batch, h, w))
        assert out.shape == (batch, channels, h, w)
        out.sum().backward()
        assert x.grad.shape == x.shape and not x.grad.any()
    case = deform_case(*GEOMETRY[0], batch=0)
    weight, bias = case["weight"].requires_grad_(), case["bias"].requires_grad_()
    out = ops.deform_conv2d(**case)
    assert out.shape == (0, 12, 2, 3)
    out.sum().backward()
    assert not weight.grad.any() and not bias.grad.any()


# ---- resize --------------------------------------------------------------------------------------------

def test_maps_of_any_size_lie_where_they_belong():
    """Rows and columns of every size from 33 to 130. A map that holds each pixel's position goes down by the
    encoder's strides, where kernel 3 with padding 1 puts output i at input 2 * i, and up again. Then every
    pixel holds its position, up to the constant (f - 1) / 2 that the strides leave: no drift. Only beyond
    the outermost coarse pixels, where bilinear sampling repeats the border, it holds theirs."""
    middle = torch.zeros(2, 1, 3, 3, **DOUBLE)
    middle[:, :, 1, 1] = 1                                # each output is the input in the kernel's middle
    for height in range(33, 131):
        width = 163 - height                              # 130 to 33: odd where the height is even
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        maps = [torch.stack((rows, cols))[None].double()]             # at 1/1, 1/2, ... 1/32: (1, 2, h, w)
        while len(maps) < 6:
            maps.append(F.conv2d(maps[-1], middle, stride=2, padding=1, groups=2))
        for fine, coarse in itertools.combinations(range(6), 2):
            f, (h, w), (H, W) = 2 ** (coarse - fine), maps[coarse].shape[2:], maps[fine].shape[2:]
            assert (ops.factor(H, h), ops.factor(W, w)) == (f, f)
            up, _ = ops.to_larger(maps[coarse], maps[fine])
            row, col = (torch.arange(n, **DOUBLE) - (f - 1) / 2 for n in (H, W))
            row, col = row.clamp(0, f * (h - 1)), col.clamp(0, f * (w - 1))
            expected = torch.stack(torch.meshgrid(row, col, indexing="ij"))[None]
            close(up, expected * 2 ** fine)               # in pixels of the map at 1/1


def test_where_strides_leave_no_rest_a_resize_to_the_size_is_the_same():
    x = torch.randn(2, 3, 4, 5)
    for f in (2, 4, 8, 32):
        expected = F.interpolate(x, size=(4 * f, 5 * f), mode="bilinear", align_corners=False)
        assert torch.equal(ops.resize(x, (4 * f, 5 * f)), expected)
    assert ops.resize(x, (4, 5)) is x
    for size in ((4, 6), (9, 5), (4, 4), (3, 10)):        # what no strides connect is refused
        with pytest.raises(ValueError, match="power of two"):
            ops.resize(x, size)


# ---- the tables ----------------------------------------------------------------------------------------

def test_names_are_in_token_order():
    assert list(ops.OPERATIONS) == ("conv1x1 conv3x3 sep3x3 sep5x5 gap conv3x3_r3 conv3x3_r12 "
                                    "sep3x3_r3 sep5x5_r6 skip zero deform3x3").split()
    assert list(ops.AGGREGATIONS) == "sum concat conv3d attention predictive affine".split()


@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_parameters(make, inputs, name):
    assert parameters(make(64)) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    module = randomise(ops.OPERATIONS[name](4)).double()
    x = torch.randn(2, 4, 15, 14, **DOUBLE)  # larger than 12, so that all taps of r12 meet it
    close(module(x), OPERATIONS[name](module, x.numpy()), 1e-6)


# The second input smaller, the first one smaller, both the same; not the same factor in both directions.
@pytest.mark.parametrize("sizes", [((7, 5), (4, 2)), ((2, 3), (8, 5)), ((6, 7), (6, 7)), ((1, 1), (4, 3)),
                                   ((1, 2), (1, 7))], ids=str)
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregation(name, sizes):
    module = randomise(ops.AGGREGATIONS[name](4)).double()
    x, y = (torch.randn(2, 4, *size, **DOUBLE) for size in sizes)
    large = [naive_resize(t.numpy(), *max(sizes)) for t in (x, y)]
    close(module(x, y), AGGREGATIONS[name](module, *large), 1e-6)


@pytest.mark.parametrize("cin, cout, kernel, stride, dilation, bias", [
    (3, 5, 3, 1, 1, True), (4, 2, 5, 2, 1, False), (2, 3, 3, 2, 3, True), (1, 1, 1, 3, 1, True)])
def test_the_deformable_layer_starts_as_a_convolution_and_learns_its_offsets(
        cin, cout, kernel, stride, dilation, bias):
    """Zero offsets, masks sigmoid(0) = 1/2, and a gradient of the offsets that is not zero there. With other
    offsets and masks the layer is the definition."""
    layer = ops.DeformConv2d(cin, cout, kernel, stride, dilation, bias).double()
    x, padding = torch.randn(2, cin, 7, 8, **DOUBLE), dilation * (kernel // 2)
    out = layer(x)
    close(out, F.conv2d(x, layer.weight / 2, layer.bias, stride, padding, dilation).detach())
    out.square().sum().backward()
    per_map = layer.offset_mask.weight.grad.abs().sum((1, 2, 3))          # dy and dx of each tap, then masks
    assert per_map.min() > 0
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    maps = F.conv2d(x, layer.offset_mask.weight, layer.offset_mask.bias, stride, padding, dilation)
    offset, mask = maps.detach().split((2 * kernel ** 2, kernel ** 2), dim=1)
    pairs = [(value, value) for value in (stride, padding, dilation)]
    close(layer(x), naive_deform(x, offset, layer.weight, layer.bias, *pairs, mask.sigmoid()))


def test_affine_starts_as_the_sum():
    module, (x, y) = ops.AGGREGATIONS["affine"](4).double(), torch.randn(2, 2, 4, 5, 8, **DOUBLE)
    close(module(x, y), x + y, 1e-6)


@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_gradient(make, inputs, name):
    """In the inputs (of two resolutions) and in every parameter."""
    module = randomise(make(4)).double()
    names, values = zip(*module.named_parameters()) if PARAMETERS[name] else ((), ())
    maps = [torch.randn(2, 4, *size, **DOUBLE, requires_grad=True) for size in ((5, 4), (3, 2))[:inputs]]
    torch.autograd.gradcheck(lambda *t: functional_call(module, dict(zip(names, t[inputs:])), t[:inputs]),
                             (*maps, *values), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_invariants(make, inputs, name):
    """One of a batch is what it is alone; memory layout says nothing; maps one pixel wide work; the inputs,
    which other layers of a cell read too, stay as they are; zero stops what is not finite."""
    module = randomise(make(4)).double()
    for height, width in ((6, 5), (1, 5), (5, 1), (1, 1)):
        maps = [torch.randn(3, 4, height, width, **DOUBLE) for _ in range(inputs)]
        before = [t.clone() for t in maps]
        out = module(*maps)
        assert out.shape == (3, 4, height, width)
        close(module(*(t[1:2] for t in maps)), out[1:2], 1e-6)
        close(module(*(t.contiguous(memory_format=torch.channels_last) for t in maps)), out, 1e-6)
        assert all(map(torch.equal, maps, before))
        if name == "zero":
            assert not module(maps[0] / 0).any()


@pytest.mark.parametrize("size", [(45, 60), (23, 30), (12, 15)])
@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_bf16_autocast(make, inputs, name, size):
    """Values and gradients at the sizes of a CamVid frame's layers against float64: bf16 with channels_last,
    as in training, and inputs of both types, as in a cell.

    torch's own bf16 weight gradient of a dilated depthwise convolution is garbage on a CPU, see
    DepthwiseInFloat32."""
    module = make(64).eval()  # eval: batch statistics would divide by small, rounded deviations
    maps, there = [torch.randn(4, 64, *size).relu() for _ in range(inputs)], torch.randn(4, 64, *size)
    for key, bias in module.named_parameters():
        if key in ("offset_mask.bias", "theta.bias"):  # off the pixels, where bilinear sampling has kinks
            bias.data += torch.empty_like(bias).uniform_(0.2, 0.3) / (1 if key[0] == "o" else 20)

    def value_and_gradients(module, *types):
        module = copy.deepcopy(module).to(memory_format=torch.channels_last)
        leaves = [x.to(kind, memory_format=torch.channels_last).requires_grad_()
                  for x, kind in zip(maps, types)]
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.float64 not in types):
            out = module(*leaves)
        if out.requires_grad:
            (out * there.to(out.dtype)).sum().backward()
        return [out, *(x.grad for x in (*module.parameters(), *leaves) if x.grad is not None)]

    expected = value_and_gradients(copy.deepcopy(module).double(), *[torch.float64] * inputs)
    mixed = itertools.product((torch.float32, torch.bfloat16), repeat=inputs)
    for types in mixed if size == (12, 15) else [[torch.float32] * inputs]:
        for got, want in zip(value_and_gradients(module, *types), expected, strict=True):
            assert (got.double() - want).norm() <= 0.06 * want.norm() + 1e-6


# ---- half precision, devices, compilers ----------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_positions_are_exact_in_half_precision(kind):
    """bf16 can't tell row 200.5 from 200, float16 2049 from 2048. After .half() only values are rounded, not
    positions: columns alternate -1 and 1, so a sample in the wrong place has the wrong sign."""
    x = (2.0 * (torch.arange(3000) % 2) - 1).expand(1, 2, 3, 3000)
    affine, deformable = ops.AGGREGATIONS["affine"](2), ops.DeformConv2d(2, 2)
    # Only the middle tap, so that signs come through.
    deformable.weight.data = torch.eye(2)[:, :, None, None] * torch.eye(3)[1, :, None] * torch.eye(3)[1]
    for module, maps in ((affine, (x, x)), (deformable, (x,))):
        expected, out = module(*maps), module.to(kind)(*(x.to(kind) for x in maps))
        assert out.dtype == kind
        close(out.float(), expected, 0.02)
    cols, rows = torch.arange(0.25, 2999)[None, None], torch.zeros(1, 1, 2999)        # 0.25, 1.25, ...
    # The first sixty columns are exact in 8 bits; their places between -1 and 1 would not be.
    for rows, cols in ((rows, cols), (rows[..., :60].to(kind), cols[..., :60].to(kind))):
        out = ops.sample_bilinear(x.to(kind), rows, cols)
        assert out.dtype == kind
        close(out[0, 0, 0].float(), x[0, 0, 0, :cols.numel()] / 2, 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_tf32_does_not_round_positions(monkeypatch):
    """Columns alternate as above: TF32 has 11 bits, like float16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = (2.0 * (torch.arange(6000, device="cuda") % 2) - 1).expand(1, 2, 3, 6000)
    with torch.no_grad():
        close(ops.AGGREGATIONS["affine"](2).cuda()(x, x).cpu(), 2 * x.cpu(), 0.02)


def test_depthwise_stays_in_float32_on_a_cpu_only(monkeypatch):
    """The workaround is for CPUs: elsewhere autocast decides. "meta" is a device without numbers."""
    conv, x = ops.DepthwiseInFloat32(4, 4, 5, padding=2, groups=4, bias=False), torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.float32 and nn.Conv2d.forward(conv, x).dtype == torch.bfloat16
    monkeypatch.setattr(torch, "autocast", None)          # not even asked for
    conv, x = conv.to("meta", torch.bfloat16), x.to("meta", torch.bfloat16)
    assert conv(x).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("make, inputs, name", EVERY)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_and_exports(make, inputs, name):
    """Made at one size, right at any height and width; traced, for any batch, too."""
    module, dim = randomise(make(4)), torch.export.Dim
    h, w = dim("h", min=2, max=64), dim("w", min=2, max=64)

    def maps(batch, h, w):                                # the second one smaller
        return tuple(torch.randn(batch, 4, f * h, f * w) for f in (4, 2)[:inputs])

    sizes = tuple({2: f * h, 3: f * w} for f in (4, 2)[:inputs])
    exported = torch.export.export(module, maps(2, 2, 3), dynamic_shapes=sizes).module()
    traced = torch.jit.trace(module, maps(2, 2, 3))
    for made, x in ((exported, maps(2, 5, 4)), (traced, maps(2, 5, 4)), (traced, maps(3, 2, 3))):
        close(made(*x), module(*x), 1e-5)


# ---- what is refused -----------------------------------------------------------------------------------

def test_sample_bilinear_refuses():
    for x, rows, cols in (((3, 5, 4), (1, 2, 2), (1, 2, 2)), ((2, 3, 5, 4), (2, 2, 2), (2, 2, 3)),
                          ((2, 3, 5, 4), (1, 2, 2), (1, 2, 2)), ((2, 3, 5, 4), (2, 4), (2, 4))):
        with pytest.raises(ValueError, match="must be"):
            ops.sample_bilinear(torch.zeros(x), torch.zeros(rows), torch.zeros(cols))


@pytest.mark.parametrize("name, values", {
    "offset": [(2, 36, 3, 3), (1, 36, 2, 3), (2, 35, 2, 3), (2, 0, 2, 3), (36, 2, 3), (2, 48, 2, 3)],
    "mask": [(2, 36, 2, 3), (2, 18, 3, 2), (1, 18, 2, 3), (18, 2, 3)], "bias": [(11,), (12, 1), ()],
    "weight": [(12, 4, 3, 2), (12, 12, 3, 2), (11, 3, 3, 2), (12, 3, 6), (12, 3, 9, 9), (0, 3, 3, 2)],
    "input": [(6, 5, 4), (2, 7, 5, 4), (2, 0, 5, 4), (2, 6, 1, 1)],
    "stride": [0, (1, 2, 3)], "padding": [-1, (1,)], "dilation": [(2, -1)]}.items())
def test_deform_conv2d_refuses(name, values):
    for value in values:                                  # 48 offsets: four groups of six channels
        case = deform_case(*GEOMETRY[0])
        case[name] = torch.zeros(value, **DOUBLE) if torch.is_tensor(case[name]) else value
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            ops.deform_conv2d(**case)
