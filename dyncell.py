"""The networks: MobileNet-v2, arch2, and the dynamic cell that takes the decoder's place (Sect. 3.1, 3.2).

    image 0 --encoder--> layer1..4 --decoder of arch2--> dec --classifier--> pred        (a key frame)
                              layer4 |       | dec
                                     v       v
    image 1 --encoder--> layer2..4 --> dynamic cell --> dec --classifier--> pred         (every later frame)

In the order of the paper: the encoder and arch2 (Sect. 3.1), the genotype and the cell (Sect. 3.2), the
network over a video. Images are RGB, normalised; sizes are fractions of the image, rounded up.

    python dyncell.py       prints Table 5: parameters, multiply-adds and time a frame, for arch2 and CELLS
"""
import collections
import collections.abc
import copy
import json
import operator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ops import (AGGREGATIONS, OPERATIONS, DepthwiseInFloat32, conv_bn_relu, conv_of_concat, milliseconds_in_turn,
                 multiply_adds, parameters, resize, to_larger)

WIDTH = 64                                   # channels of dec and of every node of a cell (Sect. 3.1; cells: [ours])
TAPS = 24, 32, 96, 320                       # channels of layer1 (1/4), layer2 (1/8), layer3 (1/16), layer4 (1/32)


# ---------------------------------------------------------------------------------------------------------
# Sect. 3.1: the encoder, MobileNet-v2 [Sandler et al. 2018]

class InvertedResidual(nn.Module):
    """1x1 conv to `expand` times the channels, depthwise 3x3, linear 1x1; a shortcut where the shape stays."""

    def __init__(self, cin, cout, stride, expand):
        super().__init__()
        hidden = cin * expand
        widen = [] if expand == 1 else [self.conv_bn_relu6(cin, hidden, 1)]       # the first block doesn't widen
        self.conv = nn.Sequential(*widen, self.conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
                                  nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.shortcut = stride == 1 and cin == cout

    @staticmethod
    def conv_bn_relu6(cin, cout, kernel, stride=1, groups=1):
        conv = DepthwiseInFloat32 if stride > 1 and groups > 1 else nn.Conv2d
        return nn.Sequential(conv(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
                             nn.BatchNorm2d(cout), nn.ReLU6(inplace=True))

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNet-v2, width 1, without its last 1x1 convolution and classifier. Keys as in torchvision."""

    SETTING = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    TAPPED = 3, 6, 13, 17                    # last block of 24, 32, 96 and 320 channels

    def __init__(self):
        super().__init__()
        blocks, cin = [InvertedResidual.conv_bn_relu6(3, 32, 3, stride=2)], 32
        for expand, cout, repeats, stride in self.SETTING:
            for k in range(repeats):
                blocks.append(InvertedResidual(cin, cout, stride if k == 0 else 1, expand))
                cin = cout
        self.features = nn.Sequential(*blocks)
        for module in self.modules():        # torchvision's initialisation, for training from scratch
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, image):
        """(B, 3, H, W) -> layer1 (B, 24, H/4, W/4), layer2 (32, 1/8), layer3 (96, 1/16), layer4 (320, 1/32)."""
        taps, x = [], image
        for k, block in enumerate(self.features):
            x = block(x)
            if k in self.TAPPED:
                taps.append(x)
        return tuple(taps)

    def load_imagenet(self, state):
        """Loads torchvision's state dict, strictly, leaving out the head (features.18 and the classifier).

        Raises ValueError naming the keys when they are others than torchvision's."""
        state = {key: value for key, value in state.items() if not key.startswith(("features.18.", "classifier."))}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError("not torchvision's mobilenet_v2: " + " ".join(str(error).split())[:300]) from None


# ---------------------------------------------------------------------------------------------------------
# Sect. 3.1, Fig. 2: the static network, arch2 of [18]

# [18]'s own notation. Its operations are numbered as ours in ops.OPERATIONS (0 conv1x1, 1 conv3x3, 4 gap, 5 rate 3).
CONTEXTUAL_CELL = 5, (0, 0, 4, 1), (3, 2, 0, 1), (5, 6, 5, 0)
CONNECTIONS = (1, 3), (4, 3), (2, 2)
NAMED_OPERATIONS = list(OPERATIONS.items())


class ContextualCell(nn.Module):
    """Node 0 is the input, node 1 = op5(node 0). An entry (p, q, a, b) appends three nodes: op_a(node p),
    op_b(node q) and their sum. The output adds up those of node 1 and the sums that no entry uses:

        node 4 = gap(node 0) + conv3x3(node 0)           (its parts are nodes 2 and 3)
        node 7 = conv1x1(node 3) + conv3x3(node 2)       (5 and 6)
        node 10 = conv3x3_r3(node 5) + conv1x1(node 6)   (8 and 9)
        output = node 1 + node 4 + node 7 + node 10
    """

    def __init__(self):
        super().__init__()
        first, *self.entries = CONTEXTUAL_CELL
        numbers = [first] + [op for _, _, a, b in self.entries for op in (a, b)]
        self.ops = nn.ModuleList(NAMED_OPERATIONS[number][1](WIDTH) for number in numbers)
        used = {node for p, q, _, _ in self.entries for node in (p, q)}
        sums = [4 + 3 * k for k in range(len(self.entries))]
        self.output = [node for node in (0, 1, *sums) if node not in used]

    def forward(self, x):
        op = iter(self.ops)
        nodes = [x, next(op)(x)]
        for p, q, _, _ in self.entries:
            a, b = next(op)(nodes[p]), next(op)(nodes[q])
            nodes += [a, b, a + b]
        return sum(nodes[k] for k in self.output)


class Block(nn.Module):
    """A connection (i, j) of the decoder: a contextual cell and a 1x1 conv on each of two maps of the pool, summed."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(ContextualCell(), conv_bn_relu(WIDTH, WIDTH))
        self.right = nn.Sequential(ContextualCell(), conv_bn_relu(WIDTH, WIDTH))

    def forward(self, x, y):
        x, y = to_larger(self.left(x), self.right(y))
        return x + y


def classifier(num_classes):
    return nn.Conv2d(WIDTH, num_classes, 3, padding=1)


class Arch2(nn.Module):
    """The static network. 2,846,283 parameters for 11 classes, as in Table 5.

    auxiliary=True adds a classifier on every block's output, for training only (Sect. 6)."""

    def __init__(self, num_classes, auxiliary=False):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = MobileNetV2()
        self.adapt = nn.ModuleList(conv_bn_relu(channels, WIDTH) for channels in TAPS)
        self.blocks = nn.ModuleList(Block() for _ in CONNECTIONS)
        used = {k for pair in CONNECTIONS for k in pair}
        self.unused = [k for k in range(len(TAPS), len(TAPS) + len(CONNECTIONS)) if k not in used]    # blocks 5 and 6
        self.needed = used                   # arch2 adapts layer1 but no block uses it: weights kept, time saved
        self.out = nn.Sequential(nn.ReLU(), *conv_bn_relu(len(self.unused) * WIDTH, WIDTH))
        self.classifier = classifier(num_classes)
        self.auxiliary = nn.ModuleList(classifier(num_classes) for _ in CONNECTIONS) if auxiliary else None

    def encode(self, image):
        """(B, 3, H, W) -> (layer1, layer2, layer3, layer4)."""
        return self.encoder(image)

    def decode_blocks(self, features):
        """Four features -> dec, pred, and the blocks' outputs (for the auxiliary classifiers)."""
        pool = [adapt(x) if k in self.needed else None for k, (adapt, x) in enumerate(zip(self.adapt, features))]
        for (i, j), block in zip(CONNECTIONS, self.blocks):
            pool.append(block(pool[i], pool[j]))                          # (B, 64, ...)
        size = features[1].shape[-2:]                                     # block 5 is at 1/8, block 6 at 1/16
        dec = self.out(torch.cat([resize(pool[k], size) for k in self.unused], dim=1))     # (B, 64, H/8, W/8)
        return dec, self.classifier(dec), pool[len(TAPS):]

    def decode(self, features):
        """(layer1, layer2, layer3, layer4) -> dec (B, 64, H/8, W/8), pred (B, num_classes, H/8, W/8)."""
        return self.decode_blocks(features)[:2]

    def forward(self, image):
        """(B, 3, H, W) -> pred (B, num_classes, H/8, W/8), logits."""
        return self.decode(self.encode(image))[1]

    def forward_auxiliary(self, image):
        """(B, 3, H, W) -> pred and a list of the auxiliary predictions, each at its block's resolution."""
        _, pred, blocks = self.decode_blocks(self.encode(image))
        return pred, [head(block) for head, block in zip(self.auxiliary or (), blocks)]


# ---------------------------------------------------------------------------------------------------------
# Sect. 3.2: the genotype, a string of five tokens a layer

INPUTS = "layer4_prev", "dec_prev", "layer2", "layer3", "layer4"          # the pool a cell starts with, in token order
INPUT_CHANNELS = 320, WIDTH, 32, 96, 320


class Layer(collections.namedtuple("Layer", "loc1 loc2 op1 op2 agg")):
    """agg(op1(pool[loc1]), op2(pool[loc2])): locations are positions in the pool, the rest are names."""


def _name(value, names, what):
    """A name, from itself or from its token."""
    names = list(names)
    if isinstance(value, str):
        if value in names:
            return value
        raise ValueError(f"unknown {what} {value[:40]!r}; known: {', '.join(names)}")
    return names[_token(value, len(names), what)]


def _token(value, count, what):
    if isinstance(value, bool):
        raise ValueError(f"{what} must be a whole number, got {value}")
    try:
        number = operator.index(value)                    # takes numpy's and torch's integers, refuses 1.0
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {str(value)[:40]!r}") from None
    if not 0 <= number < count:
        raise ValueError(f"{what} must be from 0 to {count - 1}, got {str(number)[:40]}")
    return number


class Genotype(tuple):
    """The structure of a cell: a tuple of `Layer`, checked.

    Genotype([(1, 2, "sep3x3", "skip", "concat"), ...]); operations and aggregations also by token. A location
    is a position in the pool, 0 to 4 the five inputs (`INPUTS`), 5 + k the result of layer k, or its name.
    Raises ValueError when it isn't a cell."""

    def __new__(cls, layers):
        if isinstance(layers, (str, bytes)) or not isinstance(layers, collections.abc.Iterable):
            raise ValueError("a genotype is a sequence of layers")
        checked = []
        for k, layer in enumerate(layers):
            pool = INPUTS + tuple(f"node{i}" for i in range(k))
            if isinstance(layer, (str, bytes)) or not isinstance(layer, collections.abc.Sequence) or len(layer) != 5:
                raise ValueError(f"layer {k} must be (loc1, loc2, op1, op2, agg), got {str(layer)[:60]!r}")
            loc1, loc2, op1, op2, agg = layer
            checked.append(Layer(pool.index(_name(loc1, pool, f"location in layer {k}")),
                                 pool.index(_name(loc2, pool, f"location in layer {k}")),
                                 _name(op1, OPERATIONS, f"operation in layer {k}"),
                                 _name(op2, OPERATIONS, f"operation in layer {k}"),
                                 _name(agg, AGGREGATIONS, f"aggregation in layer {k}")))
        if not checked:
            raise ValueError("a genotype needs at least one layer")
        return super().__new__(cls, checked)

    def __reduce__(self):                                 # so that copy and pickle go through the check too
        return Genotype, (tuple(tuple(layer) for layer in self),)

    @classmethod
    def from_tokens(cls, tokens):
        """5L whole numbers, (loc1, loc2, op1, op2, agg) a layer: what the controller samples."""
        tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if not isinstance(tokens, collections.abc.Iterable):
            raise ValueError(f"tokens must be a sequence of whole numbers, got {str(tokens)[:40]!r}")
        tokens = list(tokens)
        if not tokens or len(tokens) % 5:
            raise ValueError(f"a genotype has five tokens a layer, got {len(tokens)} tokens")
        for token in tokens:
            _token(token, 10**6, "token")
        return cls([tuple(tokens[k:k + 5]) for k in range(0, len(tokens), 5)])

    def to_tokens(self):
        """List of 5L ints."""
        ops, aggs = list(OPERATIONS), list(AGGREGATIONS)
        return [t for x in self for t in (x.loc1, x.loc2, ops.index(x.op1), ops.index(x.op2), aggs.index(x.agg))]

    def to_json(self):
        """JSON text: a list of layers with names."""
        return json.dumps([dict(layer._asdict(), loc1=location(layer.loc1), loc2=location(layer.loc2)) for layer in self])

    @classmethod
    def from_json(cls, text):
        """The inverse of to_json. Raises ValueError on anything else."""
        try:
            layers = json.loads(text)
        except (TypeError, RecursionError) as error:      # a malformed text raises JSONDecodeError, a ValueError
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(layers, list) or not all(isinstance(x, dict) and x.keys() == set(Layer._fields) for x in layers):
            raise ValueError(f"a genotype in JSON is a list of objects with the keys {', '.join(Layer._fields)}")
        return cls([tuple(x[field] for field in Layer._fields) for x in layers])

    def output(self):
        """Pool positions of the results that no later layer sampled; the cell's output concatenates them."""
        used = {loc for layer in self for loc in (layer.loc1, layer.loc2)}
        return [len(INPUTS) + k for k in range(len(self)) if len(INPUTS) + k not in used]

    def inputs(self):
        """Pool positions of the inputs that some layer samples."""
        return sorted({loc for layer in self for loc in (layer.loc1, layer.loc2) if loc < len(INPUTS)})

    def __str__(self):
        lines = [f"node{k} = {x.agg}({x.op1}({location(x.loc1)}), {x.op2}({location(x.loc2)}))" for k, x in enumerate(self)]
        return "; ".join(lines + [f"out = [{', '.join(location(k) for k in self.output())}]"])


def location(k):
    """Name of a pool position."""
    return INPUTS[k] if k < len(INPUTS) else f"node{k - len(INPUTS)}"


# ---------------------------------------------------------------------------------------------------------
# Sect. 3.2: the dynamic cell

class DynamicCell(nn.Module):
    """The cell a genotype describes, with only the modules that it uses.

    [ours] 64 channels everywhere; inputs of another width go through 1x1 conv-BN-ReLU, dec goes in as it
    is; the concatenated output goes through 1x1 conv-BN-ReLU at the resolution of layer2.

    past=False puts zeros in place of the previous frame: what the past is worth."""

    def __init__(self, genotype, num_classes, past=True):
        super().__init__()
        self.genotype, self.past = Genotype(genotype), past
        self.adapt = nn.ModuleDict({INPUTS[k]: conv_bn_relu(INPUT_CHANNELS[k], WIDTH)
                                    for k in self.genotype.inputs() if INPUT_CHANNELS[k] != WIDTH})
        self.op1 = nn.ModuleList(OPERATIONS[layer.op1](WIDTH) for layer in self.genotype)
        self.op2 = nn.ModuleList(OPERATIONS[layer.op2](WIDTH) for layer in self.genotype)
        self.agg = nn.ModuleList(AGGREGATIONS[layer.agg](WIDTH) for layer in self.genotype)
        self.output = self.genotype.output()
        self.out = conv_bn_relu(len(self.output) * WIDTH, WIDTH)
        self.classifier = classifier(num_classes)         # starts as a copy of the static one: see train.new_cell

    def forward(self, layer4_prev, dec_prev, layer2, layer3, layer4):
        """(B, 320, 1/32), (B, 64, 1/8), (B, 32, 1/8), (B, 96, 1/16), (B, 320, 1/32)
        -> dec (B, 64, H/8, W/8), pred (B, num_classes, H/8, W/8)."""
        if not self.past:
            layer4_prev, dec_prev = torch.zeros_like(layer4_prev), torch.zeros_like(dec_prev)
        pool = [self.adapt[name](x) if name in self.adapt else x
                for name, x in zip(INPUTS, (layer4_prev, dec_prev, layer2, layer3, layer4))]
        for layer, op1, op2, agg in zip(self.genotype, self.op1, self.op2, self.agg):
            pool.append(agg(op1(pool[layer.loc1]), op2(pool[layer.loc2])))
        dec = conv_of_concat(self.out, [pool[k] for k in self.output], layer2.shape[-2:])     # (B, 64, H/8, W/8)
        return dec, self.classifier(dec)


State = collections.namedtuple("State", "layer4 dec")     # what a frame hands to the next one


class VideoSegmenter(nn.Module):
    """The network over a video: arch2 on the first frame, encoder and cell on every later one (Fig. 1).

    cell=None is the per-frame baseline: arch2 on every frame."""

    def __init__(self, static, cell):
        super().__init__()
        self.static, self.cell = static, cell

    def follow(self, features, state):
        """One frame's features and the state before it (None: a key frame) -> logits (B, C, H/8, W/8), state."""
        if state is None or self.cell is None:
            dec, logits = self.static.decode(features)
        else:
            dec, logits = self.cell(state.layer4, state.dec, *features[1:])
        return logits, State(features[3], dec)

    def step(self, image, state=None):
        """For streams: (B, 3, H, W) and the state the last step returned (None: a key frame) -> logits, state."""
        return self.follow(self.static.encode(image), state)

    def forward(self, frames, key_frame_every=0):
        """frames (B, T, 3, H, W) -> logits (B, T, C, H/8, W/8). The first frame is a key frame and, if
        key_frame_every is not 0, so is every such frame after it."""
        B, T = frames.shape[:2]
        features = self.static.encode(frames.flatten(0, 1))               # all frames at once: (B*T, C, h, w)
        features = [x.unflatten(0, (B, T)) for x in features]
        logits, state = [], None
        for t in range(T):
            if key_frame_every and t % key_frame_every == 0:
                state = None
            pred, state = self.follow([x[:, t] for x in features], state)
            logits.append(pred)
        return torch.stack(logits, dim=1)


# ---------------------------------------------------------------------------------------------------------
# For inference

def fold_batchnorm(module):
    """A copy of the module in eval mode whose batch norms are folded into the convolutions before them.

    The same function as module.eval(), to rounding. Where a batch norm follows no convolution directly
    (in Deformable its weights are applied by deform_conv2d) it becomes one multiply-add a channel."""
    def fold(parent):
        before = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if isinstance(parent, nn.Sequential) and isinstance(before, nn.Conv2d):
                    setattr(parent, before_name, fuse_conv_bn_eval(before, child))
                    setattr(parent, name, nn.Identity())
                else:
                    setattr(parent, name, Scale(child))
            else:
                fold(child)
            before_name, before = name, child
        return parent

    return fold(nn.Sequential(copy.deepcopy(module)).eval()).eval()[0]    # wrapped: the module may itself be a batch norm


class Scale(nn.Module):
    """What a batch norm is in eval mode: x * scale + shift, a channel each."""

    def __init__(self, bn):
        super().__init__()
        scale = bn.weight.detach() / (bn.running_var + bn.eps).sqrt()
        self.scale = nn.Parameter(scale[:, None, None])
        self.shift = nn.Parameter((bn.bias.detach() - bn.running_mean * scale)[:, None, None])

    def forward(self, x):
        return x * self.scale + self.shift


# ---------------------------------------------------------------------------------------------------------
# Cells by name

CELLS = {name: Genotype(layers) for name, layers in {
    # Made by hand, each one idea of how to reuse the frame before.
    "propagate": [("dec_prev", "dec_prev", "skip", "zero", "sum")],       # the previous dec passed on: the floor
    "warp": [("dec_prev", "layer2", "skip", "skip", "concat"),            # previous dec moved by offsets that see both
             ("node0", "layer4", "deform3x3", "skip", "sum")],            # frames, plus the current: GRFP [20], NetWarp [9]
    "predictive": [("layer2", "dec_prev", "skip", "skip", "predictive")],           # filters from the current frame: Li [14]
    "affine": [("dec_prev", "layer2", "skip", "skip", "affine"),          # one affine motion for the whole image [11],
               ("node0", "layer4", "skip", "skip", "concat")],            # joined with the current layers
    "attention": [("layer2", "layer3", "sep3x3", "sep3x3", "concat"),     # per pixel and channel, how much of the previous
                  ("layer4", "node0", "sep3x3", "sep3x3", "concat"),      # dec to keep beside the current layers
                  ("dec_prev", "node1", "sep3x3", "sep3x3", "attention")],
    "concat": [("dec_prev", "layer2", "skip", "skip", "concat"),          # previous dec beside the current layers, no motion
               ("layer3", "layer4", "skip", "skip", "concat")],
    # [ours] Reconstructions of the published cells, NOT the originals: Fig. 7 is a picture that we don't have. Found by
    # random search, cheap ones preferred (cell3 then rearranged by hand to be cheaper). Of each everything holds that the
    # paper says in words of that cell, and its size in Table 5.
    "cell0": [("dec_prev", "layer2", "skip", "skip", "concat"),           # CamVid, +0.50 M, also attention
              ("layer4", "layer3", "deform3x3", "sep5x5", "attention"),
              ("node1", "layer4", "conv3x3_r12", "conv3x3_r3", "concat"),
              ("node1", "node2", "conv3x3_r3", "conv3x3", "attention"),
              ("layer4", "node3", "conv3x3", "conv3x3_r3", "concat")],
    "cell1": [("layer3", "layer4", "sep3x3_r3", "conv3x3_r3", "conv3d"),  # CamVid, +0.34 M, also conv3d
              ("node0", "layer4", "conv3x3_r12", "conv3x3", "concat"),
              ("dec_prev", "layer2", "conv1x1", "skip", "concat"),
              ("node1", "layer4", "conv1x1", "gap", "concat"),
              ("node3", "layer4", "conv1x1", "deform3x3", "concat")],
    "cell2": [("layer3", "layer4", "conv3x3_r12", "conv3x3", "concat"),   # CityScapes, +0.39 M, also conv3d
              ("layer4", "layer2", "conv3x3_r3", "conv1x1", "concat"),
              ("layer4", "node0", "deform3x3", "conv3x3_r3", "conv3d"),
              ("dec_prev", "node2", "skip", "conv3x3_r3", "concat")],
    "cell3": [("dec_prev", "layer2", "conv3x3_r3", "conv3x3", "affine"),  # CityScapes, +0.45 M, also affine
              ("layer4", "layer3", "deform3x3", "conv3x3", "concat"),
              ("node1", "layer4", "deform3x3", "conv3x3", "concat"),
              ("node2", "layer3", "deform3x3", "deform3x3", "concat")],
}.items()}


# ---------------------------------------------------------------------------------------------------------
# Table 5

def frame_calls(width, height, arch2, cells):
    """What is done to a frame, by name: encoder alone, arch2, arch2 + each cell on a later frame; for inference."""
    image = torch.randn(1, 3, height, width).to(memory_format=torch.channels_last)
    arch2 = fold_batchnorm(arch2).to(memory_format=torch.channels_last)
    calls = {"encoder alone": lambda: arch2.encode(image), "arch2": lambda: arch2(image)}
    _, state = VideoSegmenter(arch2, None).step(image)
    for name, cell in cells.items():
        video = VideoSegmenter(arch2, fold_batchnorm(cell).to(memory_format=torch.channels_last))
        calls[f"arch2 + {name}"] = lambda video=video: video.step(image, state)
    return calls


def print_frames(title, calls, counts, repeats):
    ms = milliseconds_in_turn(calls, repeats)
    print(f"\n{title:22} {'parameters':>11} {'G mult-adds':>12} {'ms':>8} {'/ encoder':>10} {'/ arch2':>8}")
    for name, call in calls.items():
        print(f"{name:22} {counts[name]:11,} {multiply_adds(call) / 1e9:12.2f} {ms[name]:8.1f} "
              f"{ms[name] / ms['encoder alone']:10.2f} {ms[name] / ms['arch2']:8.2f}")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    image, arch2 = torch.randn(1, 3, 360, 480), {classes: Arch2(classes).eval() for classes in (11, 19)}
    cells = {name: DynamicCell(cell, 19 if name in ("cell2", "cell3") else 11).eval() for name, cell in CELLS.items()}
    counts = {f"arch2 + {name}": parameters(VideoSegmenter(arch2[cell.classifier.out_channels], cell))
              for name, cell in cells.items()}
    counts |= {"encoder alone": parameters(arch2[11].encoder),
               "arch2": parameters(arch2[11]), "arch2, as it is": parameters(arch2[11])}
    print(f"Table 5: one frame, float32, {torch.get_num_threads()} threads, batch norms folded and channels_last but for arch2,\n"
          "as it is; with a cell: a later frame. cell0 to cell3 are reconstructions. Medians of calls made in turn.")

    calls = frame_calls(480, 360, arch2[11], cells)
    calls["arch2, as it is"] = lambda: arch2[11](image)
    print_frames("480 x 360 (CamVid)", calls, counts, repeats=9)

    counts["arch2"] = parameters(arch2[19])
    calls = frame_calls(2048, 1024, arch2[19], {name: cells[name] for name in ("propagate", "cell2", "cell3")})
    print_frames("2048 x 1024 (CityScapes)", calls, counts, repeats=3)
    print("Paper, on a 1080Ti: 50.5 to 52.6 ms / 92.4 ms = 0.55 to 0.57. The encoder alone is the floor of a later frame.")

    print(f"\n{'time against pixels':22} {'arch2 ms':>11} {'ms / Mpixel':>12} {'+ cell1 ms':>10} {'ms / Mpixel':>12}")
    for width, height in ((240, 180), (480, 360), (960, 720)):
        ms = milliseconds_in_turn(frame_calls(width, height, arch2[11], {"cell1": cells["cell1"]}), repeats=5)
        key, later, pixels = ms["arch2"], ms["arch2 + cell1"], width * height / 1e6
        print(f"{width:5} x {height:<14} {key:11.1f} {key / pixels:12.0f} {later:10.1f} {later / pixels:12.0f}")


if __name__ == "__main__":
    main()
