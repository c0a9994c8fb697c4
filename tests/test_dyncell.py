"""dyncell.py against the paper's numbers, formulas written out, and invariants.

Networks run in eval mode, in float64 and with random batch-norm statistics where values are compared: so
a difference is a difference in wiring, not in rounding, and no two branches look alike.
"""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_network import Plain
from torch import nn
from whole_run import make_shallow

import controller
import data
import dyncell
import ops
from dyncell import (CELLS, STATICS, Arch2, Arch2Quarter, DynamicCell, Genotype, Layer, VideoSegmenter,
                     fold_batchnorm, make_cell)
from util.costs import parameters

OPS, AGGS = list(ops.OPERATIONS), list(ops.AGGREGATIONS)
DOUBLE = dict(dtype=torch.float64)
CHANNELS = dict(layer4_prev=320, dec_prev=64, layer2=32, layer3=96, layer4=320)  # Sect. 3.1, in this order
STEPS = dict(layer4_prev=32, dec_prev=8, layer2=8, layer3=16, layer4=32)
# Layer k has operations 2k and 2k + 1 and aggregation k: six layers hold every one of both tables.
EVERYTHING = Genotype([(k % 5, 5 + k - 1 if k else 4, OPS[2 * k], OPS[2 * k + 1], AGGS[k]) for k in range(6)])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def randomise(module, *inputs):
    """In eval mode, as after training: random scales (also negative) and shifts of the batch norms, their
    statistics measured on the inputs; offsets and thetas away from where they start.

    With made-up statistics the signal dies on its way through the encoder: layer4 would not depend on the
    image, and no test would see a state that isn't handed on."""
    for m in module.double().modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.momentum = None  # running statistics = their mean so far
        if isinstance(m, ops.Deformable):
            nn.init.normal_(m.offset_mask.weight, std=0.02)
        if isinstance(m, ops.Affine):
            nn.init.normal_(m.theta.weight, std=0.02)
    module.train()(*inputs)
    return module.eval()


def random_genotypes(count, seed=0):                      # of one to six layers
    rng = torch.Generator().manual_seed(seed)
    return [Genotype(controller.Controller(1 + n % 6).random(1, rng)[0]) for n in range(count)]


def cell_inputs(height=33, width=47, batch=2, dtype=torch.float64):
    """The five inputs for an image of that size: sizes are fractions rounded up."""
    return [torch.randn(batch, CHANNELS[name], -(-height // step), -(-width // step), dtype=dtype)
            for name, step in STEPS.items()]


def up(x, like):
    """By the factor of the strides, then cut: ops.resize."""
    (height, width), factor = like.shape[-2:], 2 ** math.ceil(math.log2(like.shape[-2] / x.shape[-2]))
    return F.interpolate(x, scale_factor=factor, mode="bilinear")[:, :, :height, :width]


# ---- The encoder ---------------------------------------------------------------------------------

def test_encoder_by_hand():
    """The network recomputed from its state dict: strides, ReLU6, shortcuts as in the MobileNet-v2 paper."""
    image = torch.randn(2, 3, 45, 38, **DOUBLE)
    encoder = randomise(dyncell.MobileNetV2(), image)
    state = encoder.state_dict()

    def conv_bn(x, conv, bn, stride=1, groups=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        fields = "running_mean", "running_var", "weight", "bias"
        return F.batch_norm(x, *(state[f"{bn}.{field}"] for field in fields))

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
    close(encoder(image), tuple(taps), 1e-7)


# ---- arch2 ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_classes, total", [(11, 2_846_283), (19, 2_850_899)])
def test_arch2_parameters(num_classes, total):
    """Table 5, to the last one; encoder and decoder as measured on the code of [18]."""
    arch2, heads = Arch2(num_classes), 3 * num_classes * (9 * 64 + 1)
    assert parameters(arch2) == total and parameters(arch2.encoder) == 1_811_712
    assert parameters(Arch2(num_classes, auxiliary="classifier")) == total + heads
    cells = 3 * parameters(dyncell.ContextualCell())
    assert parameters(Arch2(num_classes, auxiliary="cell")) == total + heads + cells


def contextual(cell, x):
    """Sect. 3.1: [5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], node by node."""
    assert [OPS.index(name) for name in cell.OPS] == [5, 4, 1, 0, 1, 5, 0]
    rate3_of_0, gap_of_0, conv3_of_0, conv1_of_3, conv3_of_2, rate3_of_5, conv1_of_6 = cell.ops
    node1, node2, node3 = rate3_of_0(x), gap_of_0(x), conv3_of_0(x)
    node5, node6 = conv1_of_3(node3), conv3_of_2(node2)
    return node1 + (node2 + node3) + (node5 + node6) + (rate3_of_5(node5) + conv1_of_6(node6))


@pytest.mark.parametrize("kind", ["cell", "classifier"])
def test_arch2_by_hand(kind):
    """Connections [[1, 3], [4, 3], [2, 2]]; blocks 5 and 6 concatenated, ReLU, 1x1. An auxiliary head is a
    contextual cell, as in [18]'s code, and a classifier; its prediction is brought to the output's size."""
    image = torch.randn(2, 3, 50, 70, **DOUBLE)
    arch2 = Arch2(5, auxiliary=kind).double().train()
    arch2.forward_auxiliary(image)
    arch2 = randomise(arch2, image)
    features = arch2.encode(image)
    _, tap1, tap2, tap3 = (adapt(x) for adapt, x in zip(arch2.adapt, features, strict=True))

    def branch(side, x):
        context, conv = side
        return conv(contextual(context, x))

    def block(k, x, y):  # here the second is never larger
        left = branch(arch2.blocks[k].left, x)
        return left + up(branch(arch2.blocks[k].right, y), left)

    node4, node6 = block(0, tap1, tap3), block(2, tap2, tap2)
    node5 = block(1, node4, tap3)
    conv, bn = [m for m in arch2.out.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    expected = bn(conv(torch.cat((node5, up(node6, node5)), 1).relu())).relu()
    dec, pred = arch2.decode(features)
    close(dec, expected)
    close(pred, arch2.classifier(expected))
    _, auxiliary = arch2.forward_auxiliary(image)
    for actual, head, node in zip(auxiliary, arch2.auxiliary, (node4, node5, node6), strict=True):
        *cell, classifier = head
        assert len(cell) == (kind == "cell")
        close(actual, up(classifier(contextual(cell[0], node) if cell else node), pred))


# ---- The genotype --------------------------------------------------------------------------------

def test_every_form_of_a_genotype_is_read():
    for genotype in [*random_genotypes(20), *CELLS.values()]:
        tokens, text, printed = genotype.to_tokens(), genotype.to_json(), str(genotype)
        layers = json.loads(text)                         # dicts
        for form in (genotype, tuple(map(tuple, genotype)), layers, [[*layer.values()] for layer in layers],
                     tokens, torch.tensor(tokens), np.array(tokens).reshape(-1, 5), text, json.dumps(tokens),
                     printed, "  " + printed.replace("; ", ";\n"), printed.replace(" ", "")):
            for made in (Genotype(form), Genotype.from_json(form), Genotype.from_tokens(form)):
                assert made == genotype and all(type(token) is int for token in made.to_tokens())


def test_genotype_by_hand():
    """Inputs 0 to 4, then a result a layer; the output is what no later layer sampled."""
    tokens = [1, 2, 11, 2, 1,   5, 3, 9, 0, 3,   0, 4, 4, 10, 0,   6, 6, 8, 6, 5]
    genotype = Genotype.from_tokens(tokens)
    assert genotype == (Layer(1, 2, "deform3x3", "sep3x3", "concat"),
                        Layer(5, 3, "skip", "conv1x1", "attention"), Layer(0, 4, "gap", "zero", "sum"),
                        Layer(6, 6, "sep5x5_r6", "conv3x3_r12", "affine"))
    assert genotype.output() == [7, 8]                    # node0 went into node1, node1 into node3
    assert genotype.inputs() == [0, 1, 2, 3, 4] and Genotype(tokens[:5]).inputs() == [1, 2]
    assert str(genotype) == ("node0 = concat(deform3x3(dec_prev), sep3x3(layer2)); "
                             "node1 = attention(skip(node0), conv1x1(layer3)); "
                             "node2 = sum(gap(layer4_prev), zero(layer4)); "
                             "node3 = affine(sep5x5_r6(node1), conv3x3_r12(node1)); out = [node2, node3]")
    assert json.loads(genotype.to_json())[1] == dict(loc1="node0", loc2="layer3", op1="skip", op2="conv1x1",
                                                     agg="attention")


PRINTED = "node0 = concat(skip(dec_prev), skip(layer2)); node1 = sum(gap(node0), zero(layer4)); out = [node1]"
GOOD = dict(loc1="dec_prev", loc2="layer2", op1="deform3x3", op2="skip", agg="concat")
HOSTILE = [
    *([], [0] * 6, [5, 0, 0, 0, 0], [0, 0, 12, 0, 0], [0, 0, 0, 0, 6], [-1, 0, 0, 0, 0], [0, 0, 0, 0, True]),
    *(torch.zeros(5), None, ["abcde"], "attention", [{**GOOD, "op3": "skip"}], [{**GOOD, "op2": "sum"}]),
    *(PRINTED.replace("[node1]", "[node0, node1]"), PRINTED.replace("node1 =", "node2 =")),
    *(PRINTED[:k] + PRINTED[k + 1:] for k in range(len(PRINTED)) if PRINTED[k] != " ")]      # a letter lost


def test_what_is_no_genotype_is_refused():
    assert len(Genotype(PRINTED)) == len(Genotype([GOOD])) + 1 == 2
    for hostile in HOSTILE:
        with pytest.raises(ValueError) as caught:
            Genotype(hostile)
        assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) < 300, hostile


# ---- The cell ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, layers, classes, millions, also", [
    ("cell0", 5, 11, 0.50, "attention"), ("cell1", 5, 11, 0.34, "conv3d"), ("cell2", 4, 19, 0.39, "conv3d"),
    ("cell3", 4, 19, 0.45, "affine")])
def test_reconstructed_cell_is_what_the_paper_says(name, layers, classes, millions, also):
    """Added parameters in millions (Table 5), and what it uses beside concatenation (Fig. 7)."""
    genotype = CELLS[name]
    assert len(genotype) == layers
    assert parameters(DynamicCell(genotype, classes)) == pytest.approx(1e6 * millions, abs=0.02e6)
    operations, aggregations = [op for x in genotype for op in (x.op1, x.op2)], [x.agg for x in genotype]
    assert "deform3x3" in operations and "zero" not in operations
    assert genotype.inputs() == [1, 2, 3, 4]              # dec of the previous frame, not its layer4
    assert set(aggregations) == {"concat", also} and aggregations.count("concat") > aggregations.count(also)


@torch.no_grad()
def test_random_cells_run():
    """Inputs that a cell does not sample have no say and no modules; the others become as wide as dec."""
    for genotype in random_genotypes(36, seed=2):
        used = {loc for layer in genotype for loc in layer[:2]}
        inputs = [x if k in used else torch.full_like(x, math.nan)
                  for k, x in enumerate(cell_inputs(dtype=torch.float32))]
        cell = DynamicCell(genotype, 11).eval()
        dec, pred = cell(*inputs)
        assert set(cell.adapt) == {dyncell.INPUTS[k] for k in used - {1} if k < 5}
        assert dec.shape == (2, 64, 5, 6) and pred.shape == (2, 11, 5, 6) and torch.isfinite(pred).all()


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

    actual, pred = cell(*inputs)
    close(actual, dec, 1e-6)
    close(pred, cell.classifier(dec), 1e-6)


def test_a_cell_without_the_past():
    """past=False: the previous frame's layer4 and dec have no say, as if they were zeros."""
    seeing, blind = DynamicCell(RECURRENT, 3).eval(), DynamicCell(RECURRENT, 3, past=False).eval()
    blind.load_state_dict(seeing.state_dict())
    layer4_prev, dec_prev, *current = cell_inputs(dtype=torch.float32)
    actual = blind(layer4_prev, dec_prev, *current)
    assert all(map(torch.equal, actual, seeing(0 * layer4_prev, 0 * dec_prev, *current)))
    assert not torch.equal(actual[0], seeing(layer4_prev, dec_prev, *current)[0])


# ---- The network over a video --------------------------------------------------------------------

RECURRENT = Genotype([(1, 0, "sep3x3", "conv1x1", "concat"), (2, 4, "skip", "conv1x1", "sum")])


@pytest.fixture(scope="module")
def video():
    """A network and frames. Its predictions differ between pixels and between frames."""
    torch.manual_seed(1)
    frames = torch.randn(2, 5, 3, 33, 47, **DOUBLE)
    return randomise(VideoSegmenter(Arch2(11), DynamicCell(RECURRENT, 11)), frames), frames


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
    assert logits.shape == (2, 5, 11, 5, 6)
    close(logits, steps(segmenter, frames))
    # Fig. 1 written out: the static network once, then encoder and cell, on the frame before and this one.
    features = segmenter.static.encode(frames[:, 0])
    dec, pred = segmenter.static.decode(features)
    close(logits[:, 0], pred)
    for t in range(1, 5):
        last4, features = features[3], segmenter.static.encode(frames[:, t])
        dec, pred = segmenter.cell(last4, dec, *features[1:])
        close(logits[:, t], pred)


def test_gradient_through_time(video):
    """The last logits depend on every image."""
    segmenter, frames = video[0], video[1].clone().requires_grad_()
    past, = torch.autograd.grad(segmenter(frames)[:, -1].square().sum(), frames)
    assert (past.flatten(2).abs().amax(2) > 0).all()


# ---- A stream of pixels --------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, enlarge", [(60, 90, 0), (63, 67, 0), (80, 75, 64), (50, 18, 96)])
def test_segment_by_hand(video, height, width, enlarge, monkeypatch):
    """A longer side below `enlarge` is enlarged to it. Sides below 70 are padded to it with ImageNet's mean,
    evenly, the odd pixel after. The labels of the image alone come back, at its own size."""
    segmenter, _ = video
    monkeypatch.setattr(segmenter, "pad", 70)
    monkeypatch.setattr(segmenter, "enlarge", enlarge)
    h, w = (round(side * max(1, enlarge / max(height, width))) for side in (height, width))
    (top, bottom), (left, right) = ((max(0, 70 - n) // 2, (max(0, 70 - n) + 1) // 2) for n in (h, w))
    mean, deviation = torch.tensor(data.MEAN), torch.tensor(data.STD)
    state, own = None, None
    for k, image in enumerate(torch.randint(256, (2, height, width, 3), dtype=torch.uint8)):
        x = ((image / 255 - mean) / deviation).permute(2, 0, 1)[None]     # (1, 3, H, W)
        x = F.interpolate(x, (h, w), mode="bicubic")
        x = F.pad(x, (left, right, top, bottom)).double()
        with torch.no_grad():
            logits, state = segmenter.step(x, state)
        expected = up(logits, x)[:, :, top:top + h, left:left + w]
        expected = F.interpolate(expected, (height, width), mode="bilinear")[0]
        chances, _ = segmenter.probabilities(image, own)
        # Once a tensor, once an array with negative strides.
        labels, own = segmenter.segment(image.numpy()[:, ::-1].copy()[:, ::-1] if k else image, own)
        assert chances.dtype == torch.float32 and labels.dtype == torch.uint8
        close(chances, expected.softmax(0).float(), 1e-3)
        assert torch.equal(labels, expected.argmax(0).to(torch.uint8)) and len(labels.unique()) > 1
        close(own.dec, state.dec, 1e-5)
    assert not own.dec.requires_grad and (labels != segmenter.segment(image)[0]).any()    # the state counts


def test_segment_and_step_refuse(video):
    """What would give wrong labels without a word: floats, training mode, the state of another video."""
    (segmenter, _), good = video, torch.zeros(40, 50, 3, dtype=torch.uint8)
    _, state = segmenter.segment(good)
    for image in (good.float(), good[0], good.permute(2, 0, 1), good[:0]):
        with pytest.raises(ValueError, match="an image must be"):
            segmenter.segment(image)
    for other in ((1, 3, 40, 60), (2, 3, 40, 50)):                    # the last: a batch
        with pytest.raises(ValueError, match="another size"):
            segmenter.step(torch.zeros(other, **DOUBLE), state)
    segmenter.cell.train()
    with pytest.raises(ValueError, match="eval"):
        segmenter.probabilities(good)
    segmenter.eval()


# ---- Other static networks (Sect. 3.1: "not directly tied to a concrete architecture") -----------

@torch.no_grad()
@pytest.mark.parametrize("network", [Arch2, Arch2Quarter, Plain])
def test_static_network_and_its_cells(network):
    """The interface, as the docstring of StaticNetwork says it. Frames of 33 x 47, and every operation."""
    frames = torch.randn(2, 3, 3, 33, 47, **DOUBLE)
    video = VideoSegmenter(network(5), None)
    video.cell = make_cell(EVERYTHING, video.static)
    randomise(video, frames)
    static, size = video.static, (9, 12) if network is Arch2Quarter else (5, 6)
    features = static.encode(frames[:, 0])
    dec, pred = static.decode(features)
    sizes = (9, 12), (5, 6), (3, 3), (2, 2)               # rounded up
    assert [tuple(x.shape[1:]) for x in features] == [(n, *s) for n, s in zip(network.channels, sizes)]
    assert dec.shape == (2, network.width, 5, 6) and pred.shape == (2, 5, *size)
    close(static(frames[:, 0]), pred)
    main, auxiliary = network(5, auxiliary="classifier").double().forward_auxiliary(frames[:, 0])
    assert all(x.shape == main.shape == pred.shape for x in auxiliary)
    logits = video(frames)
    assert logits.shape == (2, 3, 5, *size)
    close(logits, steps(video, frames))
    close(fold_batchnorm(video)(frames), logits, 1e-6)    # small modules: tests/util/test_fold.py
    # Its decoder as the cell: every frame is then decoded as a key frame.
    decoder = VideoSegmenter(static, make_cell("decoder", static)).eval()
    close(decoder(frames), VideoSegmenter(static, None)(frames))


def test_arch2_quarter_by_hand():
    """arch2, but for the classifier: dec at 1/4, layer1 added, one separable 3x3 and the 3x3 classifier."""
    image = torch.randn(2, 3, 50, 70, **DOUBLE)
    quarter = randomise(Arch2Quarter(5), image)
    layer1, *_ = features = quarter.encode(image)
    (dec, pred), parts = quarter.decode(features), quarter.classifier
    close(pred, parts.classifier(parts.mix(up(dec, layer1) + parts.adapt(layer1))))
    assert parameters(quarter) - parameters(Arch2(5)) == (24 * 64 + 128) + (9 * 64 + 64 * 64 + 128)


def checkpoint(video, path, **change):
    """Saves what train.py writes of a network, in half precision, with some keys changed; None: left out."""
    saved = {"network": video.static.name, "static": video.static.state_dict(), "classes": list("abcde"),
             "palette": [[k, 0, 255] for k in range(5)], "recipe": {"input_pad": 70}}
    if video.cell is not None:
        cell = video.cell
        saved.update(cell=cell.state_dict(), genotype=cell.genotype.to_json(), past=cell.past)
    for part in {"static", "cell"} & saved.keys():
        saved[part] = {key: x.half() if x.is_floating_point() else x for key, x in saved[part].items()}
    torch.save({key: value for key, value in (saved | change).items() if value is not None}, path)


@pytest.mark.parametrize("network, genotype", [
    (Arch2, None), (Arch2Quarter, CELLS["attention"]), (Plain, CELLS["attention"])])
def test_load(network, genotype, tmp_path, monkeypatch):
    """A checkpoint alone gives network, classes and colours. If it names no network it is arch2."""
    monkeypatch.setitem(STATICS, "plain", Plain)
    video = VideoSegmenter(network(5), None)
    video.cell = genotype and make_cell(genotype, video.static, past=False)
    randomise(video, torch.randn(2, 2, 3, 64, 96, **DOUBLE))
    checkpoint(video, tmp_path / "x.pt", **(dict(network=None, recipe=None) if network is Arch2 else {}))
    loaded = VideoSegmenter.load(tmp_path / "x.pt")
    assert type(loaded.static) is network and not any(m.training for m in loaded.modules())
    assert loaded.pad == (0 if network is Arch2 else 70)
    assert loaded.classes == list("abcde") and loaded.palette.tolist() == [[k, 0, 255] for k in range(5)]
    assert loaded.cell is None or loaded.cell.genotype == genotype and loaded.cell.past is False
    expected = video.half().float()                       # the same rounding
    image = torch.randint(256, (60, 90, 3), dtype=torch.uint8)
    expected.pad, (_, state) = loaded.pad, loaded.segment(image)
    close(loaded.probabilities(image, state)[0], expected.probabilities(image, state)[0], 1e-4)


@pytest.mark.parametrize("change, word", [
    ({"optimizers": []}, "no finished network"), ({"static": None}, "no finished network"),
    ({"network": "arch3"}, "unknown"), ({"genotype": "[]"}, "unknown"),
    ({"classes": list("abcd")}, "unknown network")])
def test_load_refuses(change, word, tmp_path):
    """static None: the checkpoint of a cell alone."""
    checkpoint(VideoSegmenter(Arch2(5), DynamicCell(CELLS["propagate"], 5)), tmp_path / "x.pt", **change)
    with pytest.raises(data.InputError, match=rf"x.pt: .*{word}"):
        VideoSegmenter.load(tmp_path / "x.pt")


# ---- torch.compile, torch.export, torch.jit.trace ------------------------------------------------

class Step(VideoSegmenter):
    """A later frame, with tensors only, as these tools want it."""

    def forward(self, image, layer4, dec):                # the state of the frame before
        logits, state = self.step(image, dyncell.State(layer4, dec))
        return logits, *state


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_later_frame_of_any_operations_compiles_to_one_graph_and_exports_and_traces(monkeypatch):
    make_shallow(monkeypatch.setattr)
    module = Step(Arch2Quarter(3), make_cell(EVERYTHING, Arch2Quarter(3))).eval()
    inputs = (torch.randn(1, 3, 64, 96), *cell_inputs(64, 96, 1, torch.float32)[:2])
    for made in (torch.export.export(module, inputs).module(), torch.jit.trace(module, inputs),
                 torch.compile(module, fullgraph=True, backend="eager")):
        close(made(*inputs), module(*inputs), 1e-5)


def test_table_5(monkeypatch, capsys):
    """What `python dyncell.py` prints, on small frames and with every time 1.5 ms."""
    make_shallow(monkeypatch.setattr)
    monkeypatch.setattr(dyncell, "milliseconds_in_turn", lambda calls, *_: dict.fromkeys(calls, 1.5))
    dyncell.print_table_5(torch.device("cpu"), (64, 64), (64, 96))
    camvid, _ = capsys.readouterr().out.split("CityScapes")
    rows = {line[:24].strip(): line[24:].split() for line in camvid.splitlines()}
    assert {"encoder alone", *STATICS, *(f"arch2 + {name}" for name in CELLS)} <= rows.keys()
    assert float(rows["arch2 + propagate"][1]) < float(rows["arch2"][1])      # a later frame's multiply-adds
    both = parameters(Arch2(11)) + parameters(DynamicCell(CELLS["cell0"], 11))
    assert rows["arch2 + cell0"][::2] == [f"{both:,}", "1.5", "1.00"]
