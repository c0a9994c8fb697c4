"""dyncell.py against the paper's numbers, formulas written out, and invariants.

Networks run in eval mode, in float64 and with random batch-norm statistics where values are compared: so
a difference is a difference in wiring, not in rounding, and no two branches look alike.
"""
import copy
import gc
import json
import math
import pathlib
import pickle
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncell
import ops
from dyncell import Arch2, DynamicCell, Genotype, Layer, VideoSegmenter, fold_batchnorm

WEIGHTS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "weights" / "mobilenet_v2_imagenet_encoder.pth"
OPS, AGGS = list(ops.OPERATIONS), list(ops.AGGREGATIONS)
DOUBLE = dict(dtype=torch.float64)
CHANNELS = dict(layer4_prev=320, dec_prev=64, layer2=32, layer3=96, layer4=320)            # Sect. 3.2, in this order
STEPS = dict(layer4_prev=32, dec_prev=8, layer2=8, layer3=16, layer4=32)
# Layer k has operations 2k and 2k + 1 and aggregation k: six layers hold every one of both tables.
EVERYTHING = Genotype([(k % 5, 5 + k - 1 if k else 4, OPS[2 * k], OPS[2 * k + 1], AGGS[k]) for k in range(6)])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def randomise(module, *inputs):
    """In eval mode, as after training: random scales (also negative) and shifts of the batch norms, statistics
    measured on the inputs; offsets and thetas away from where they start.

    With made-up statistics the signal dies on its way through the encoder: layer4 would not depend on the image,
    and no test would see a state that isn't handed on."""
    for m in module.double().modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.momentum = None                                             # running statistics = their mean so far
        if isinstance(m, ops.Deformable):
            nn.init.normal_(m.offset_mask.weight, std=0.02)
        if isinstance(m, ops.Affine):
            nn.init.normal_(m.theta.weight, std=0.02)
    module.train()(*inputs)
    return module.eval()


def random_tokens(rng, layers):
    return [token for k in range(layers)
            for token in (rng.randrange(5 + k), rng.randrange(5 + k), rng.randrange(12), rng.randrange(12), rng.randrange(6))]


def random_genotypes(count, seed=0):
    rng = random.Random(seed)
    return [Genotype.from_tokens(random_tokens(rng, 1 + n % 6)) for n in range(count)]


def cell_inputs(height=33, width=47, batch=2, dtype=torch.float64):
    """The five inputs for an image of that size: sizes are fractions rounded up."""
    return [torch.randn(batch, CHANNELS[name], -(-height // step), -(-width // step), dtype=dtype)
            for name, step in STEPS.items()]


def up(x, like):
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------
# The encoder

def torchvision_shapes():
    """Keys and shapes of torchvision's mobilenet_v2().features[:18], from the table of the MobileNet-v2 paper."""
    shapes = {}

    def conv_bn(conv, bn, *weight):
        shapes[f"{conv}.weight"] = weight
        shapes.update({f"{bn}.{field}": weight[:1] for field in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("features.0.0", "features.0.1", 32, 3, 3, 3)
    outputs = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    for k, (cin, cout) in enumerate(zip([32] + outputs, outputs), start=1):
        prefix, hidden, i = f"features.{k}.conv.", cin if k == 1 else 6 * cin, 0
        if k > 1:                                                         # the first block has no 1x1 expansion
            conv_bn(f"{prefix}0.0", f"{prefix}0.1", hidden, cin, 1, 1)
            i = 1
        conv_bn(f"{prefix}{i}.0", f"{prefix}{i}.1", hidden, 1, 3, 3)
        conv_bn(f"{prefix}{i + 1}", f"{prefix}{i + 2}", cout, hidden, 1, 1)
    return shapes


def torchvision_state():
    """What torchvision's file holds: the features, and a head that the network has no place for."""
    state = {key: torch.randn(shape) if shape else torch.tensor(7) for key, shape in torchvision_shapes().items()}
    state |= {"features.18.0.weight": torch.zeros(1280, 320, 1, 1), "classifier.1.weight": torch.zeros(1000, 1280),
              "classifier.1.bias": torch.zeros(1000)}
    return state | {f"features.18.1.{field}": torch.zeros(1280) for field in ("weight", "bias", "running_mean", "running_var")}


def test_encoder_has_torchvisions_keys():
    state = dyncell.MobileNetV2().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == torchvision_shapes()
    assert list(state) == list(torchvision_shapes())


def test_encoder_by_hand():
    """The network recomputed from its state dict alone: strides, ReLU6 and shortcuts as in the paper of MobileNet-v2."""
    image = torch.randn(2, 3, 45, 38, **DOUBLE)
    encoder = randomise(dyncell.MobileNetV2(), image)
    state = encoder.state_dict()

    def conv_bn(x, conv, bn, stride=1, groups=1):
        weight, bn = state[f"{conv}.weight"], [state[f"{bn}.{f}"] for f in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups), *bn)

    x, taps = F.relu6(conv_bn(image, "features.0.0", "features.0.1", 2)), []
    for k in range(1, 18):
        c, stride, h = f"features.{k}.conv.", 2 if k in (2, 4, 7, 14) else 1, x
        if k > 1:
            h = F.relu6(conv_bn(h, f"{c}0.0", f"{c}0.1"))
        i = int(k > 1)
        h = F.relu6(conv_bn(h, f"{c}{i}.0", f"{c}{i}.1", stride, h.shape[1]))
        h = conv_bn(h, f"{c}{i + 1}", f"{c}{i + 2}")
        x = x + h if x.shape == h.shape and stride == 1 else h
        if k in (3, 6, 13, 17):
            taps.append(x)
    for actual, expected in zip(encoder(image), taps, strict=True):
        close(actual, expected, 1e-7)


@pytest.mark.parametrize("size", [(33, 47), (64, 96), (65, 31), (1, 100), (97, 2)], ids=str)
def test_resolutions(size):
    """Each tap rounds up; dec and pred are at layer2's resolution, whatever the size."""
    arch2 = Arch2(7).eval()
    with torch.no_grad():
        features = arch2.encode(torch.randn(2, 3, *size))
        dec, pred = arch2.decode(features)
    assert [tuple(x.shape) for x in features] == [
        (2, channels, math.ceil(size[0] / step), math.ceil(size[1] / step))
        for channels, step in ((24, 4), (32, 8), (96, 16), (320, 32))]
    assert dec.shape == (2, 64, *features[1].shape[2:]) and pred.shape == (2, 7, *features[1].shape[2:])


def test_loads_torchvisions_file():
    encoder, state = dyncell.MobileNetV2(), torchvision_state()
    encoder.load_imagenet(dict(state))
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the ImageNet encoder lies in ../shared, which is not here")
def test_loads_the_shared_weights():
    encoder, state = dyncell.MobileNetV2(), torch.load(WEIGHTS, weights_only=True)
    encoder.load_imagenet(state)
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape", "empty"])
def test_refuses_other_weights(change):
    state, key = torchvision_state(), "features.5.conv.1.0.weight"
    value = state.pop(key)
    if change != "missing":
        state |= {"extra": {key: value, "features.19.weight": value}, "renamed": {f"module.{key}": value},
                  "shape": {key: value[:-1]}, "empty": {}}[change]
    with pytest.raises(ValueError, match="features"):
        dyncell.MobileNetV2().load_imagenet({} if change == "empty" else state)


# ---------------------------------------------------------------------------------------------------------
# arch2

@pytest.mark.parametrize("num_classes, total", [(11, 2_846_283), (19, 2_850_899)])
def test_arch2_parameters(num_classes, total):
    """Table 5, to the last one; encoder and decoder as measured on the code of [18]."""
    arch2 = Arch2(num_classes)
    assert ops.parameters(arch2) == total
    assert ops.parameters(arch2.encoder) == 1_811_712
    assert total - 1_811_712 == 1_034_571 + (num_classes - 11) * (9 * 64 + 1)
    assert ops.parameters(Arch2(num_classes, auxiliary=True)) == total + 3 * num_classes * (9 * 64 + 1)


def contextual(cell, x):
    """Sect. 3.1: [5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], node by node."""
    rate3_of_0, gap_of_0, conv3_of_0, conv1_of_3, conv3_of_2, rate3_of_5, conv1_of_6 = cell.ops
    node1, node2, node3 = rate3_of_0(x), gap_of_0(x), conv3_of_0(x)
    node5, node6 = conv1_of_3(node3), conv3_of_2(node2)
    return node1 + (node2 + node3) + (node5 + node6) + (rate3_of_5(node5) + conv1_of_6(node6))


def test_contextual_cell():
    x = torch.randn(2, 64, 7, 9, **DOUBLE)
    cell = randomise(dyncell.ContextualCell(), x)
    convs = [[m for m in op.modules() if isinstance(m, nn.Conv2d)] for op in cell.ops]
    assert [(c.kernel_size[0], c.dilation[0]) for c, in convs] == [(3, 3), (1, 1), (3, 1), (1, 1), (3, 1), (3, 3), (1, 1)]
    assert isinstance(cell.ops[1], ops.GlobalAverage)
    close(cell(x), contextual(cell, x))


def test_arch2_by_hand():
    """Connections [[1, 3], [4, 3], [2, 2]]; blocks 5 and 6 concatenated, ReLU, 1x1; auxiliary classifiers on all three."""
    image = torch.randn(2, 3, 50, 70, **DOUBLE)
    arch2 = randomise(Arch2(5, auxiliary=True), image)
    features = arch2.encode(image)
    _, tap1, tap2, tap3 = (adapt(x) for adapt, x in zip(arch2.adapt, features, strict=True))

    def branch(side, x):
        context, conv = side
        return conv(contextual(context, x))

    def block(k, x, y):                                                   # here the second is never larger
        left = branch(arch2.blocks[k].left, x)
        return left + up(branch(arch2.blocks[k].right, y), left)

    node4 = block(0, tap1, tap3)
    node5, node6 = block(1, node4, tap3), block(2, tap2, tap2)
    conv, bn = [m for m in arch2.out.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    expected = bn(conv(torch.cat((node5, up(node6, node5)), 1).relu())).relu()
    dec, pred = arch2.decode(features)
    close(dec, expected)
    close(pred, arch2.classifier(expected))
    close(arch2(image), pred)
    main, auxiliary = arch2.forward_auxiliary(image)
    close(main, pred)
    for actual, head, node in zip(auxiliary, arch2.auxiliary, (node4, node5, node6), strict=True):
        close(actual, head(node))


# ---------------------------------------------------------------------------------------------------------
# The genotype

def test_genotype_round_trips():
    for genotype in random_genotypes(200):
        tokens = genotype.to_tokens()
        assert len(tokens) == 5 * len(genotype) and all(type(t) is int for t in tokens)
        assert genotype == Genotype.from_tokens(tokens) == Genotype.from_tokens(torch.tensor(tokens))
        assert genotype == Genotype.from_tokens(np.array(tokens)) == Genotype.from_tokens(tuple(tokens))
        assert genotype == Genotype.from_json(genotype.to_json()) == Genotype(genotype) == Genotype(list(genotype))
        assert genotype == copy.deepcopy(genotype) == pickle.loads(pickle.dumps(genotype))
        assert type(copy.deepcopy(genotype)) is Genotype and len({genotype, Genotype(genotype)}) == 1


def test_genotype_by_hand():
    """Inputs 0 to 4, then a result a layer; the output is what no later layer sampled."""
    tokens = [1, 2, 11, 2, 1,   5, 3, 9, 0, 3,   0, 4, 4, 10, 0,   6, 6, 8, 6, 5]
    genotype = Genotype.from_tokens(tokens)
    assert genotype == (Layer(1, 2, "deform3x3", "sep3x3", "concat"), Layer(5, 3, "skip", "conv1x1", "attention"),
                        Layer(0, 4, "gap", "zero", "sum"), Layer(6, 6, "sep5x5_r6", "conv3x3_r12", "affine"))
    assert list(genotype.output()) == [7, 8]                              # node0 went into node1, node1 into node3
    assert list(Genotype.from_tokens(tokens[:10]).output()) == [6]
    assert list(Genotype.from_tokens(tokens[:5]).output()) == [5]
    independent = Genotype.from_tokens([0, 1, 0, 0, 0] * 4)
    assert list(independent.output()) == [5, 6, 7, 8]
    for name in ("layer4_prev", "dec_prev", "layer2", "layer3", "layer4", "deform3x3", "sep5x5_r6", "attention", "affine"):
        assert name in str(genotype) and name in genotype.to_json()       # readable: names, not numbers
    assert "layer2" not in str(independent)


@pytest.mark.parametrize("tokens", [
    [], [0, 0, 0, 0], [0] * 6, [5, 0, 0, 0, 0], [0, 5, 0, 0, 0], [0, 0, 12, 0, 0], [0, 0, 0, 12, 0], [0, 0, 0, 0, 6],
    [-1, 0, 0, 0, 0], [0, 0, 0, 0, -1], [0, 0, 0, 0, 0, 6, 0, 0, 0, 0], [0, 0, 0, 0, True], [0, 0, 0, 1.0, 0],
    [0, 0, math.nan, 0, 0], [0, 0, "skip", 0, 0], [0, 0, None, 0, 0], [[0, 0, 0, 0, 0]], [0, 0, 0, 0, 10**300], "00000",
    torch.zeros(5), torch.zeros(1, 5, dtype=torch.long), torch.zeros(5, dtype=torch.bool), torch.tensor(3), None, 3,
], ids=lambda tokens: f"{type(tokens).__name__} {tokens!s:.24}")
def test_genotype_refuses_tokens(tokens):
    with pytest.raises(ValueError):
        Genotype.from_tokens(tokens)


GOOD = dict(loc1="dec_prev", loc2="layer2", op1="deform3x3", op2="skip", agg="concat")


@pytest.mark.parametrize("text", [
    "", "no", "[", "null", "3", "{}", "[]", "[[]]", "[null]", '["skip"]', '[[0, 0, "skip", "skip", "sum"]]', None, 3,
    b"\xff", "[" * 100_000, json.dumps(GOOD), json.dumps([{**GOOD, "op3": "skip"}]),
    json.dumps([{k: v for k, v in GOOD.items() if k != "agg"}]),
    *(json.dumps([{**GOOD, key: value}]) for key, value in (
        ("op1", "conv7x7"), ("op1", "sum"), ("agg", "skip"), ("loc1", "node0"), ("loc2", "node-1"), ("loc1", "layer1"),
        ("loc1", 5), ("loc1", -1), ("loc1", True), ("loc1", 1.0), ("loc2", None), ("op2", 12), ("op2", False), ("agg", [0]),
        ("agg", {"sum": 1}), ("op1", math.nan), ("op1", ""), ("op1", "SKIP"), ("op1", 10**300)))],
    ids=lambda text: repr(text)[:90])
def test_genotype_refuses_json(text):
    with pytest.raises(ValueError):
        Genotype.from_json(text)


@pytest.mark.parametrize("layers", ["skip", b"skip", None, 3, [3], ["abcde"], [()], [(0, 0, "skip", "skip")], [None], {}],
                         ids=str)
def test_genotype_refuses_layers(layers):
    with pytest.raises(ValueError):
        Genotype(layers)


def genotype_or_valueerror(make, argument):
    """Nothing else may come out, and a genotype that comes out survives its own round trip."""
    try:
        genotype = make(argument)
    except ValueError:
        return False
    assert type(genotype) is Genotype and Genotype.from_tokens(genotype.to_tokens()) == genotype
    return True


def test_fuzz_tokens():
    rng, accepted = random.Random(0), 0
    odd = [True, False, 1.0, 0.5, math.nan, math.inf, "0", "skip", "", None, -1, 12, 2**70, [], (), {}, [0], b"0", 1j, object()]
    for n in range(10_000):
        tokens = random_tokens(rng, rng.randrange(1, 6)) if n % 2 else [rng.randrange(-1, 7) for _ in range(rng.randrange(12))]
        for _ in range(rng.randrange(3)):
            tokens.insert(rng.randrange(len(tokens) + 1), rng.choice(odd + [rng.randrange(13)] * 20))
            if tokens and rng.random() < 0.8:
                tokens.pop(rng.randrange(len(tokens)))
        accepted += genotype_or_valueerror(Genotype.from_tokens, tokens)
    assert 1500 < accepted < 7500                                          # the fuzz reaches both sides


def test_fuzz_json():
    rng, accepted = random.Random(0), 0
    pieces = ["[", "]", "{", "}", ",", ":", '"', "\\", "0", "1", "-", "e9", "null", "true", "NaN", "node0", "layer2", "\x00",
              "\ud800", "é", '"op1": "zero",']
    for genotype in random_genotypes(1000, seed=1):
        text = genotype.to_json()
        for _ in range(rng.randrange(1, 4)):
            i, j = rng.randrange(len(text) + 1), rng.randrange(1, 12)
            text = rng.choice([text[:i] + text[i + j:], text[:i] + rng.choice(pieces) + text[i:], text[:i],
                               text[:i] + rng.choice(pieces) + text[i + j:], text[:i] + text[i:i + j] + text[i:],
                               text.replace(rng.choice(OPS + AGGS), rng.choice(OPS + AGGS + ["3", "nothing"]), 1)])
        accepted += genotype_or_valueerror(Genotype.from_json, text)
    assert 5 < accepted < 250


# ---------------------------------------------------------------------------------------------------------
# Cells by name

# What the paper says of the published cells: layers, classes, added parameters in millions (Table 5), what else Fig. 7 uses.
PUBLISHED = {"cell0": (5, 11, 0.50, "attention"), "cell1": (5, 11, 0.34, "conv3d"),
             "cell2": (4, 19, 0.39, "conv3d"), "cell3": (4, 19, 0.45, "affine")}


def path_to_output(genotype, start):
    """Whether an input reaches the output by operations that let something of it through, pixel by pixel."""
    reached = {list(CHANNELS).index(start)}
    for k, x in enumerate(genotype):
        if any(loc in reached and op not in ("zero", "gap") for loc, op in ((x.loc1, x.op1), (x.loc2, x.op2))):
            reached.add(5 + k)
    return bool(reached & set(genotype.output()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_reconstructed_cell_is_what_the_paper_says(name):
    genotype, (layers, classes, millions, also) = dyncell.CELLS[name], PUBLISHED[name]
    assert len(genotype) == layers
    assert ops.parameters(DynamicCell(genotype, classes)) == pytest.approx(1e6 * millions, abs=0.02e6)
    operations, aggregations = [op for x in genotype for op in (x.op1, x.op2)], [x.agg for x in genotype]
    assert "deform3x3" in operations
    assert 1 in genotype.inputs() and 0 not in genotype.inputs()          # dec of the previous frame, not its layer4
    assert set(aggregations) == {"concat", also}
    assert aggregations.count("concat") > aggregations.count(also)
    # And what makes it a cell that one would believe in: it sees the current frame, and the past reaches the output.
    assert {2, 3, 4} <= set(genotype.inputs()) and "zero" not in operations
    assert all(path_to_output(genotype, start) for start in CHANNELS if start != "layer4_prev")


@torch.no_grad()
def test_handmade_cells_are_what_their_names_say():
    inputs = cell_inputs()
    cells = {name: randomise(DynamicCell(genotype, 4), *inputs) for name, genotype in dyncell.CELLS.items()}
    assert list(cells) == ["propagate", "warp", "predictive", "affine", "attention", "concat", *PUBLISHED]
    layer2, layer3, layer4 = (lambda cell, k=k, name=name: cell.adapt[name](inputs[k])
                              for k, name in ((2, "layer2"), (3, "layer3"), (4, "layer4")))
    dec = inputs[1]

    def mix(c, past, current):
        a = c.agg[2].gate(torch.cat((past, current), 1)).sigmoid()
        return a * past + (1 - a) * current
    join = {name: lambda x, y, conv=cell.agg: conv[0].conv(torch.cat((x, y), 1)) for name, cell in cells.items()}
    nodes = {
        "propagate": lambda c: dec,
        "warp": lambda c: c.op1[1](join["warp"](dec, layer2(c))) + up(layer4(c), dec),
        "predictive": lambda c: c.agg[0](layer2(c), dec),
        "affine": lambda c: c.agg[1].conv(torch.cat((c.agg[0](dec, layer2(c)), up(layer4(c), dec)), 1)),
        "concat": lambda c: torch.cat((join["concat"](dec, layer2(c)),
                                       up(c.agg[1].conv(torch.cat((layer3(c), up(layer4(c), layer3(c))), 1)), dec)), 1),
        "attention": lambda c: mix(c, c.op1[2](dec), c.op2[2](c.agg[1].conv(torch.cat(
            (up(c.op1[1](layer4(c)), dec),
             c.op2[1](c.agg[0].conv(torch.cat((c.op1[0](layer2(c)), up(c.op2[0](layer3(c)), dec)), 1)))), 1))))}
    for name, node in nodes.items():
        close(cells[name](*inputs)[0], cells[name].out(node(cells[name])), 1e-6)
    assert isinstance(cells["warp"].op1[1], ops.Deformable)
    kinds = [type(cells[name].agg[0]) for name in ("predictive", "affine")]
    assert kinds == [ops.Predictive, ops.Affine]


def test_main_prints_table_5(capsys, monkeypatch):
    """Every row, on images small enough for a test; ratios are what the times say."""
    frame_calls = dyncell.frame_calls
    monkeypatch.setattr(dyncell, "frame_calls", lambda width, height, *rest: frame_calls(width // 8, height // 8, *rest))
    dyncell.main()
    text = capsys.readouterr().out
    for name in ("encoder alone", "arch2", "arch2, as it is", *(f"arch2 + {name}" for name in dyncell.CELLS)):
        assert re.search(rf"^{re.escape(name)} +[\d,]+ +\d+\.\d\d +\d+\.\d +\d+\.\d\d +\d+\.\d\d$", text, re.M), name
    rows = {line[:22].strip(): line[22:].split() for line in text.split("2048 x 1024")[0].splitlines()}
    assert rows["encoder alone"][3] == "1.00" and rows["arch2"][0] == "2,846,283" and rows["arch2"][4] == "1.00"
    assert "0.55" in text and "960 x 720" in text


# ---------------------------------------------------------------------------------------------------------
# The cell

def test_cell_parameters_by_hand():
    """A 1x1 conv-BN-ReLU to 64 for each input that is used and is not 64 wide, and nothing for the others."""
    def expected(widths, nodes, inside=0):
        return sum(64 * width + 128 for width in widths) + inside + 64 * 64 * nodes + 128 + 5 * (9 * 64 + 1)

    for genotype, parameters in [
            ([(1, 1, "skip", "skip", "sum")], expected([], 1)),
            ([(1, 2, "skip", "skip", "sum")], expected([32], 1)),
            ([(2, 2, "skip", "zero", "sum")], expected([32], 1)),
            ([(3, 4, "conv1x1", "gap", "sum")], expected([96, 320], 1, 2 * (64 * 64 + 128))),
            ([(0, 4, "skip", "skip", "sum")] * 2, expected([320, 320], 2)),
            ([(0, 1, "skip", "skip", "concat"), (5, 5, "skip", "skip", "sum")], expected([320], 1, 128 * 64 + 128))]:
        assert ops.parameters(DynamicCell(genotype, 5)) == parameters


def test_random_cells_run():
    """Any genotype gives a cell of the right size and shape; every parameter that it holds takes part."""
    table = {name: ops.parameters(make(64)) for name, make in (ops.OPERATIONS | ops.AGGREGATIONS).items()}
    inputs = cell_inputs(dtype=torch.float32)
    for n, genotype in enumerate(random_genotypes(200, seed=2)):
        cell, nodes = DynamicCell(genotype, 11), len(genotype.output())
        used = {list(CHANNELS)[loc] for x in genotype for loc in (x.loc1, x.loc2) if loc < 5} - {"dec_prev"}
        assert ops.parameters(cell) == (sum(table[x.op1] + table[x.op2] + table[x.agg] for x in genotype)
                                        + sum(64 * CHANNELS[name] + 128 for name in used)
                                        + 64 * 64 * nodes + 128 + 11 * (9 * 64 + 1))
        backward = n % 10 == 0
        with torch.set_grad_enabled(backward):
            dec, pred = cell.train(backward)(*inputs)
        assert dec.shape == (2, 64, 5, 6) and pred.shape == (2, 11, 5, 6) and torch.isfinite(pred).all()
        if backward:
            pred.square().mean().backward()
            learns = {name: p.grad is not None and torch.isfinite(p.grad).all() for name, p in cell.named_parameters()}
            if not any("zero" in (x.op1, x.op2) for x in genotype):       # behind a zero there is nothing to learn
                assert all(learns.values())
            assert learns["classifier.weight"] and learns["classifier.bias"]


def test_cell_reads_only_its_inputs():
    """What the genotype does not sample does not count; layer2 gives the resolution only."""
    for genotype in random_genotypes(20, seed=3):
        inputs = cell_inputs()
        cell = randomise(DynamicCell(genotype, 3), *inputs)
        used = {loc for x in genotype for loc in (x.loc1, x.loc2)}
        garbage = [x if k in used else torch.full_like(x, math.nan) for k, x in enumerate(inputs)]
        close(cell(*garbage), cell(*inputs))


def test_cell_by_hand():
    genotype = Genotype([("dec_prev", "layer4_prev", "sep3x3", "conv1x1", "attention"),    # node0, 1/8
                         ("layer3", "layer4", "skip", "gap", "sum"),                       # node1, 1/16
                         ("node0", "layer2", "deform3x3", "skip", "concat"),               # node2, 1/8
                         ("layer4", "node1", "conv3x3_r3", "sep5x5", "predictive"),        # node3, 1/16
                         ("node2", "node2", "zero", "skip", "conv3d")])                    # node4, 1/8
    inputs = cell_inputs(70, 50)
    cell = randomise(DynamicCell(genotype, 4), *inputs)
    layer4_prev, dec_prev, layer2, layer3, layer4 = (
        cell.adapt[name](x) if x.shape[1] != 64 else x for name, x in zip(CHANNELS, inputs))

    x, y = cell.op1[0](dec_prev), up(cell.op2[0](layer4_prev), dec_prev)
    a = cell.agg[0].gate(torch.cat((x, y), 1)).sigmoid()
    node0 = a * x + (1 - a) * y
    node1 = layer3 + up(cell.op2[1](layer4), layer3)
    node2 = cell.agg[2].conv(torch.cat((cell.op1[2](node0), layer2), 1))
    x, y = up(cell.op1[3](layer4), layer3), cell.op2[3](node1)
    patches = F.unfold(y, 3, padding=1).unflatten(1, (64, 9)).unflatten(-1, y.shape[-2:])  # (B, 64, 9, H, W)
    node3 = (patches * cell.agg[3].filters(x).softmax(1)[:, None]).sum(2)
    node4 = cell.agg[4].conv(torch.cat((torch.zeros_like(node2), node2), 1))
    dec = cell.out(torch.cat((up(node3, layer2), node4), 1))              # node0, 1, 2 were sampled

    assert genotype.output() == [8, 9]
    actual, pred = cell(*inputs)
    close(actual, dec, 1e-6)
    close(pred, cell.classifier(dec), 1e-6)


# ---------------------------------------------------------------------------------------------------------
# The network over a video

RECURRENT = Genotype([(1, 0, "sep3x3", "conv1x1", "concat"), (2, 4, "skip", "conv1x1", "sum")])


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(1)
    frames = torch.randn(2, 5, 3, 33, 47, **DOUBLE)
    return randomise(VideoSegmenter(Arch2(4), DynamicCell(RECURRENT, 4)), frames), frames


def steps(segmenter, frames):
    state, logits = None, []
    for frame in frames.unbind(1):
        out, state = segmenter.step(frame, state)
        logits.append(out)
    return torch.stack(logits, 1)


@torch.no_grad()
def test_clip_equals_steps(video):
    segmenter, frames = video
    logits = segmenter(frames)
    assert logits.shape == (2, 5, 4, 5, 6)
    close(logits, steps(segmenter, frames))
    # Fig. 1 written out: the static network once, then encoder and cell, on the frame before and this one.
    features = segmenter.static.encode(frames[:, 0])
    dec, pred = segmenter.static.decode(features)
    close(logits[:, 0], pred)
    for t in range(1, 5):
        last4, features = features[3], segmenter.static.encode(frames[:, t])
        dec, pred = segmenter.cell(last4, dec, *features[1:])
        close(logits[:, t], pred)
    assert (logits[:, 1:] - steps(VideoSegmenter(segmenter.static, None), frames)[:, 1:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 9])
def test_key_frames_restart_the_state(video, every):
    segmenter, frames = video
    close(segmenter(frames, key_frame_every=every),
          torch.cat([steps(segmenter, part) for part in frames.split(every, dim=1)], dim=1))


@torch.no_grad()
def test_without_a_cell_it_is_the_static_network(video):
    segmenter, frames = video
    baseline = VideoSegmenter(segmenter.static, None)
    expected = segmenter.static(frames.flatten(0, 1)).unflatten(0, (2, 5))
    for logits in (baseline(frames), baseline(frames, key_frame_every=2), steps(baseline, frames),
                   segmenter(frames, key_frame_every=1)):
        close(logits, expected)


@pytest.mark.parametrize("options, reaches", [({}, True), (dict(key_frame_every=3), False), (dict(key_frame_every=4), True)],
                         ids=str)
def test_gradient_through_time(video, options, reaches):
    """The last frame's logits depend on the first image, unless a key frame lies between; never on the future."""
    segmenter, frames = video[0], video[1][:1, :4].clone().requires_grad_()
    logits = segmenter(frames, **options)
    past, = torch.autograd.grad(logits[:, -1].square().sum(), frames, retain_graph=True)
    assert past[:, 3].abs().max() > 0 and bool(past[:, 0].abs().max() > 0) is reaches
    future, = torch.autograd.grad(logits[:, 1].square().sum(), frames)
    assert not future[:, 2:].any()


@torch.no_grad()
def test_stream_memory_does_not_grow(video):
    """A state owns what it shows: no view into a clip, no graph; and nothing else stays alive from step to step."""
    segmenter, frames = video
    state, alive = None, []
    for t in range(8):
        logits, state = segmenter.step(frames[:, t % 5], state)
        for x in state:
            assert x.grad_fn is None and x.untyped_storage().nbytes() == x.numel() * x.element_size()
        assert [tuple(x.shape) for x in state] == [(2, 320, 2, 2), (2, 64, 5, 6)]
        gc.collect()
        alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert len(set(alive[1:])) == 1


# ---------------------------------------------------------------------------------------------------------
# fold_batchnorm

def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def cases_to_fold():
    yield "arch2", lambda: Arch2(5, auxiliary=True), lambda: [torch.randn(2, 3, 40, 50, **DOUBLE)]
    yield "cell with every operation and aggregation", lambda: DynamicCell(EVERYTHING, 5), cell_inputs
    yield "video", lambda: VideoSegmenter(Arch2(5), DynamicCell(RECURRENT, 5)), lambda: [torch.randn(2, 2, 3, 40, 50, **DOUBLE)]
    yield "conv with bias", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), lambda: [torch.randn(2, 3, 5, 5, **DOUBLE)]
    # Not right after a convolution: nothing to fold it into.
    yield "after a ReLU", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), \
        lambda: [torch.randn(2, 3, 5, 5, **DOUBLE)]
    yield "first", lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), lambda: [torch.randn(2, 3, 5, 5, **DOUBLE)]
    yield "alone", lambda: nn.BatchNorm2d(3), lambda: [torch.randn(2, 3, 5, 5, **DOUBLE)]


@torch.no_grad()
@pytest.mark.parametrize("make, inputs", [pytest.param(make, inputs, id=name) for name, make, inputs in cases_to_fold()])
def test_fold_batchnorm(make, inputs):
    inputs = inputs()
    module = randomise(make(), *inputs)
    expected = module(*inputs)
    module.train()                                                        # folding says eval mode, whatever it finds
    before = {key: value.clone() for key, value in module.state_dict().items()}
    norms = len(batch_norms(module))
    folded = fold_batchnorm(module)
    assert not batch_norms(folded) and not folded.training
    actual = folded(*inputs)
    for a, e in zip(*((out if isinstance(out, tuple) else (out,)) for out in (actual, expected)), strict=True):
        close(a, e, 1e-6)
    # The original is as it was, and shares no memory with the copy.
    for p in folded.parameters():
        p.zero_()
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert len(batch_norms(module)) == norms and all(m.training for m in module.modules())


def test_everything_holds_everything():
    assert {name for x in EVERYTHING for name in (x.op1, x.op2)} == set(OPS) and {x.agg for x in EVERYTHING} == set(AGGS)


def test_cell_trains_in_bfloat16_channels_last():
    """As it is trained where the device has it: every operation and aggregation, one after the other."""
    cell = DynamicCell(EVERYTHING, 5).to(memory_format=torch.channels_last)
    inputs = [x.to(memory_format=torch.channels_last) for x in cell_inputs(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        _, pred = cell(*inputs)
    pred.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all()
               for name, p in cell.named_parameters() if name.startswith(("out", "classifier")))


def test_a_cell_without_the_past():
    """past=False: the previous frame's layer4 and dec have no say, as if they were zeros."""
    genotype = Genotype([("layer4_prev", "dec_prev", "conv1x1", "sep3x3", "concat"), ("node0", "layer2", "skip", "skip", "sum")])
    torch.manual_seed(0)
    seeing = DynamicCell(genotype, 3).eval()
    blind = DynamicCell(genotype, 3, past=False).eval()
    blind.load_state_dict(seeing.state_dict())
    layer4_prev, dec_prev, *current = (torch.randn(1, channels, *size) for channels, size in
                                       ((320, (2, 3)), (64, (8, 12)), (32, (8, 12)), (96, (4, 6)), (320, (2, 3))))
    for a, b in zip(blind(layer4_prev, dec_prev, *current), seeing(0 * layer4_prev, 0 * dec_prev, *current)):
        assert torch.equal(a, b)
    assert not torch.equal(blind(layer4_prev, dec_prev, *current)[0], seeing(layer4_prev, dec_prev, *current)[0])
