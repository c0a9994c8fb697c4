"""Tables 1 and 2: every fast operation beside its definition, written as loops in float64.

The definitions use numpy and share nothing with the code under test. A bilinear sample is the sum over ALL
pixels of tent(row - i) * tent(col - j) * x[i, j], where tent(d) = max(0, 1 - |d|).
"""
import copy
import itertools
from functools import partial

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


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def off_integer(*shape, spread=2):
    """Random numbers at least 0.2 from every integer, where bilinear sampling has no kink: for gradcheck."""
    return torch.randint(-spread, spread, shape) + 0.2 + 0.6 * torch.rand(shape, **DOUBLE)


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
        f = 2 ** np.ceil(np.log2(new / old))
        source = np.clip((np.arange(new) + 0.5) / f - 0.5, 0, old - 1)
        return tent(source[:, None] - np.arange(old))
    return matrix(height, x.shape[-2]) @ x @ matrix(width, x.shape[-1]).T


def kernels(module):
    return [p for p in module.parameters() if p.dim() == 4]


def expect_convolution(rate, module, x):
    for weight in kernels(module):                        # one, or depthwise then pointwise
        x = naive_conv(x, weight, rate if weight.shape[-1] > 1 else 1)
    return bn_relu(module, x)


def expect_deform(module, x):
    maps = naive_conv(x, module.offset_mask.weight, bias=module.offset_mask.bias)
    offset, mask = torch.tensor(maps).split((18, 9), dim=1)               # (B, 27, H, W)
    one = (1, 1)
    out = naive_deform(torch.tensor(x), offset, module.weight, None, one, one, one, mask.sigmoid())
    return bn_relu(module, out)


def expect_conv3d(module, x, y):
    """The kernel's two parts, for x and y, lie behind each other: (C, 2C, 3, 3) -> (C, C, 2, 3, 3)."""
    weight = torch.stack(kernels(module)[0].detach().chunk(2, dim=1), dim=2)
    stacked = torch.tensor(np.stack((x, y), axis=2))                      # (B, C, 2, H, W)
    return bn_relu(module, F.conv3d(stacked, weight, padding=(0, 1, 1)).squeeze(2).numpy())


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


OPERATIONS = {                                                            # Table 1
    **dict.fromkeys(("conv1x1", "conv3x3", "sep3x3", "sep5x5"), partial(expect_convolution, 1)),
    **dict.fromkeys(("conv3x3_r3", "sep3x3_r3"), partial(expect_convolution, 3)),
    "conv3x3_r12": partial(expect_convolution, 12), "sep5x5_r6": partial(expect_convolution, 6),
    "gap": lambda m, x: 0 * x + bn_relu(m, naive_conv(x.mean((2, 3), keepdims=True), *kernels(m))),
    "skip": lambda m, x: x, "zero": lambda m, x: 0 * x,
    "deform3x3": expect_deform}
AGGREGATIONS = {                                                          # Table 2
    "sum": lambda m, x, y: x + y,
    "concat": lambda m, x, y: bn_relu(m, naive_conv(np.concatenate((x, y), 1), *kernels(m))),
    "conv3d": expect_conv3d, "attention": expect_attention,
    "predictive": expect_predictive, "affine": expect_affine}


# ---- sampling, deform_conv2d ---------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(4, 7), (5, 2), (1, 6), (1, 1)])
def test_sample_bilinear(height, width):
    x = torch.randn(2, 3, height, width, **DOUBLE)
    # On the border, within, between border and zero, one pixel out, far out: every pair of them.
    positions = ([0, n - 1, (n - 1) / 2, 0.3 * n, -0.25, n - 0.6, -1, n, -1.5, n + 0.5, -1e4, 1e9]
                 for n in (height, width))
    rows, cols = torch.tensor(list(itertools.product(*positions)), **DOUBLE).T        # (144,)
    rows, cols = (torch.stack((t, t.flip(0))).reshape(2, 9, 16) for t in (rows, cols))  # differs in the batch
    actual = ops.sample_bilinear(x, rows, cols)
    for b, i, j in itertools.product(range(2), range(9), range(16)):
        close(actual[b, :, i, j], naive_sample(x[b].numpy(), rows[b, i, j].item(), cols[b, i, j].item()))
    where = off_integer(2, 2, 3, 2).requires_grad_()
    torch.autograd.gradcheck(ops.sample_bilinear, (x.requires_grad_(), *where))


# stride, padding, dilation, weight groups, offset groups; nothing the same in both directions.
GEOMETRY = [((2, 1), (1, 0), (2, 1), 2, 3), ((1, 1), (0, 0), (1, 1), 1, 1), ((1, 2), (0, 2), (1, 2), 3, 2),
            ((3, 1), (2, 1), (1, 3), 1, 6), ((1, 3), (3, 0), (2, 1), 6, 1), ((2, 2), (1, 3), (3, 2), 2, 2)]


def deform_case(stride, padding, dilation, groups, offset_groups, batch=2):
    """Random arguments in torchvision's order: map 5 x 4, kernel 3 x 2. Samples lie in and out of the map."""
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, p, d, k, s in zip((5, 4), padding, dilation, (3, 2), stride)]
    return dict(input=torch.randn(batch, 6, 5, 4, **DOUBLE),
                offset=off_integer(batch, offset_groups * 12, *out),
                weight=torch.randn(12, 6 // groups, 3, 2, **DOUBLE), bias=torch.randn(12, **DOUBLE),
                stride=stride, padding=padding, dilation=dilation,
                mask=torch.rand(batch, offset_groups * 6, *out, **DOUBLE))


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_deform_conv2d(geometry):
    """Against the loops, with and without mask and bias, contiguous or not; an empty batch; the gradient."""
    full = deform_case(*geometry)
    tensors = {name: x for name, x in full.items() if torch.is_tensor(x)}
    for left_out in ({}, {"mask": None}, {"bias": None}, {"mask": None, "bias": None}):
        expected = naive_deform(**full | left_out)
        close(ops.deform_conv2d(**full | left_out), expected)
        other = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
        close(ops.deform_conv2d(**full | other | left_out), expected)
    assert ops.deform_conv2d(**deform_case(*geometry, batch=0)).shape == (0, *expected.shape[1:])
    torch.autograd.gradcheck(lambda *t: ops.deform_conv2d(**full | dict(zip(tensors, t))),
                             [x.requires_grad_() for x in tensors.values()], fast_mode=True)


@pytest.mark.parametrize("name, shapes", {
    "offset": [(2, 36, 3, 3), (1, 36, 2, 3), (2, 35, 2, 3), (2, 48, 2, 3)],           # 48: four groups of six
    "mask": [(2, 36, 2, 3), (2, 18, 3, 2)], "bias": [(11,), (1,)],
    "weight": [(12, 4, 3, 2), (11, 3, 3, 2), (12, 3, 3)], "input": [(6, 5, 7)]}.items())
def test_deform_conv2d_refuses(name, shapes):
    for shape in shapes:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            ops.deform_conv2d(**deform_case(*GEOMETRY[0]) | {name: torch.zeros(shape)})


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
        axes = torch.arange(height, **DOUBLE), torch.arange(width, **DOUBLE)
        maps = [torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]]          # at 1/1: (1, 2, h, w)
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


@pytest.mark.parametrize("rows, size", [(4, (4, 6)), (4, (9, 5)), (4, (4, 4)), (4, (3, 10)), (0, (4, 5))])
def test_a_size_that_no_strides_connect_is_refused(rows, size):
    with pytest.raises(ValueError, match="power of two"):
        ops.resize(torch.zeros(1, 1, rows, 5), size)


# ---- the tables ----------------------------------------------------------------------------------------

def test_order_and_parameters():
    """The tokens' order, and by hand, at 64 channels: a tap of a convolution has 64 * 64, a BN has 128."""
    conv, bn = 64 * 64, 128
    expected = dict(
        conv1x1=conv + bn, conv3x3=9 * conv + bn, sep3x3=9 * 64 + conv + bn, sep5x5=25 * 64 + conv + bn,
        gap=conv + bn, conv3x3_r3=9 * conv + bn, conv3x3_r12=9 * conv + bn, sep3x3_r3=9 * 64 + conv + bn,
        sep5x5_r6=25 * 64 + conv + bn, skip=0, zero=0, deform3x3=(9 * 64 * 27 + 27) + 9 * conv + bn,
        sum=0, concat=2 * conv + bn, conv3d=2 * 9 * conv + bn, attention=2 * 9 * conv + 64,
        predictive=9 * 64 * 9 + 9, affine=128 * 6 + 6)
    made = [(name, parameters(make(64))) for name, make in (ops.OPERATIONS | ops.AGGREGATIONS).items()]
    assert made == [*expected.items()]


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


@pytest.mark.parametrize("sizes", [(3, 5, 3, 1, 1), (4, 2, 5, 2, 1, False), (2, 3, 3, 2, 3), (1, 1, 1, 3, 1)])
def test_the_deformable_layer_starts_as_a_convolution_and_learns_its_offsets(sizes):
    """Zero offsets, masks sigmoid(0) = 1/2, and a gradient of the offsets that is not zero there."""
    layer, (cin, _, kernel, stride, dilation, *_) = ops.DeformConv2d(*sizes).double(), sizes
    x, padding = torch.randn(2, cin, 7, 8, **DOUBLE), dilation * (kernel // 2)
    out = layer(x)
    close(out, F.conv2d(x, layer.weight / 2, layer.bias, stride, padding, dilation).detach())
    out.square().sum().backward()
    assert layer.offset_mask.weight.grad.abs().sum((1, 2, 3)).min() > 0   # dy and dx of each tap, then masks


def test_affine_starts_as_the_sum():
    module, (x, y) = ops.AGGREGATIONS["affine"](4).double(), torch.randn(2, 2, 4, 5, 8, **DOUBLE)
    close(module(x, y), x + y, 1e-6)


@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_gradient(make, inputs, name):
    """In the inputs (of two resolutions) and in every parameter."""
    module = randomise(make(4)).double()
    weights = dict(module.named_parameters())
    maps = [torch.randn(2, 4, *size, **DOUBLE, requires_grad=True) for size in ((5, 4), (3, 2))[:inputs]]
    torch.autograd.gradcheck(lambda *t: functional_call(module, dict(zip(weights, t[inputs:])), t[:inputs]),
                             (*maps, *weights.values()), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_invariants(make, inputs, name):
    """Memory layout says nothing; the inputs, which other layers of a cell read too, stay as they are; zero
    stops what is not finite."""
    module = randomise(make(4)).double()
    for size in ((6, 5), (1, 5), (5, 1), (1, 1)):
        maps = [torch.randn(3, 4, *size, **DOUBLE) for _ in range(inputs)]
        before = [t.clone() for t in maps]
        out = module(*maps)
        assert out.shape == (3, 4, *size) and all(map(torch.equal, maps, before))
        close(module(*(t.contiguous(memory_format=torch.channels_last) for t in maps)), out, 1e-6)
        if name == "zero":
            assert not module(maps[0] / 0).any()


@pytest.mark.parametrize("make, inputs, name", EVERY)
def test_bf16_autocast(make, inputs, name):
    """Values and gradients against float64: bf16 with channels_last, as in training, and inputs of both
    types, as in a cell. In eval mode: batch statistics would divide by small, rounded deviations. torch's own
    bf16 weight gradient of a dilated depthwise convolution is garbage on a CPU, see DepthwiseInFloat32."""
    module, there = make(64).eval(), torch.randn(4, 64, 23, 30)
    for key, bias in module.named_parameters():
        if key in ("offset_mask.bias", "theta.bias"):    # off the pixels, where bilinear sampling has kinks
            bias.data += torch.empty_like(bias).uniform_(0.2, 0.3) / (1 if key[0] == "o" else 20)
    maps = [torch.randn(4, 64, 23, 30).relu() for _ in range(inputs)]

    def value_and_gradients(*types):
        exact = torch.float64 in types
        copied = copy.deepcopy(module).to(types[0] if exact else None, memory_format=torch.channels_last)
        leaves = [x.to(kind, memory_format=torch.channels_last).requires_grad_()
                  for x, kind in zip(maps, types)]
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            out = copied(*leaves)
        (out * there.to(out.dtype) + 0 * sum(leaves)).sum().backward()    # `zero` has no gradient of its own
        return [out, *(x.grad for x in (*copied.parameters(), *leaves))]

    expected = value_and_gradients(*[torch.float64] * inputs)
    for types in itertools.product((torch.float32, torch.bfloat16), repeat=inputs):
        for got, want in zip(value_and_gradients(*types), expected, strict=True):
            assert (got.double() - want).norm() <= 0.06 * want.norm() + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16] + ["tf32"] * torch.cuda.is_available())
def test_positions_are_exact_in_half_precision(kind, monkeypatch):
    """bf16 can't tell row 200.5 from 200, float16 and TF32 2049 from 2048. Only values are rounded, not
    positions: columns alternate -1 and 1, so a sample in the wrong place has the wrong sign."""
    if kind == "tf32":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    to = dict(device="cuda") if kind == "tf32" else dict(dtype=kind)
    x = (2.0 * (torch.arange(6000) % 2) - 1).expand(1, 2, 3, 6000)
    affine, deformable = ops.AGGREGATIONS["affine"](2), ops.DeformConv2d(2, 2)
    # Only the middle tap, so that signs come through.
    deformable.weight.data = torch.eye(2)[:, :, None, None] * torch.eye(3)[1, :, None] * torch.eye(3)[1]
    for module, maps in ((affine, (x, x)), (deformable, (x,))):
        expected, out = module(*maps), module.to(**to)(*(x.to(**to) for x in maps))
        assert out.dtype == to.get("dtype", torch.float32)
        close(out.float().cpu(), expected, 0.02)
