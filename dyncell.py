"""The networks: MobileNet-v2, arch2, and the dynamic cell that takes the decoder's place (Sect. 3.1, 3.2).

    image 0 --encoder--> layer1..4 --decoder of arch2--> dec --classifier--> pred    (a key frame)
                              layer4 |       | dec
                                     v       v
    image 1 --encoder--> layer2..4 --> dynamic cell --> dec --classifier--> pred     (every later frame)

Images are RGB and normalised. A size such as 1/8 is that fraction of the image's, rounded up.

    python dyncell.py       prints Table 5: parameters, multiply-adds and time per frame
"""
import collections
import copy
import json
import re
import reprlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import normalise, pad
from ops import AGGREGATIONS, OPERATIONS, DepthwiseInFloat32, conv_bn_relu, resize, separable, to_larger
from util import files
from util.costs import milliseconds_in_turn, multiply_adds, parameters, usable_device
from util.errors import InputError, brief, run_main
from util.fold import fold_batchnorm

WIDTH = 64                     # channels of arch2's dec

# ---- Sect. 3.1: the encoder, MobileNet-v2 [Sandler et al. 2018] -----------------------------------------

class InvertedResidual(nn.Module):
    """1x1 conv to `expand` times the channels, depthwise 3x3, linear 1x1. Shortcut if the shape is kept."""

    def __init__(self, cin, cout, stride, expand):
        super().__init__()
        hidden = cin * expand
        widen = [] if expand == 1 else [self.conv_bn_relu6(cin, hidden, 1)]     # not in the first block
        self.conv = nn.Sequential(*widen, self.conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
                                  nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.shortcut = stride == 1 and cin == cout

    @staticmethod
    def conv_bn_relu6(cin, cout, kernel, stride=1, groups=1):
        conv = DepthwiseInFloat32 if stride > 1 and groups > 1 else nn.Conv2d     # see ops.separable
        return nn.Sequential(conv(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
                             nn.BatchNorm2d(cout), nn.ReLU6(inplace=True))

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNet-v2, width 1, without its last 1x1 convolution and classifier. Keys as in torchvision."""

    SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
               (6, 320, 1, 1))           # expand, channels, repeats, stride
    TAPPED = 3, 6, 13, 17          # last block of 24, 32, 96 and 320 channels

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
        """(B, 3, H, W) -> layer1 (B, 24, H/4, W/4), layer2 (B, 32, H/8, W/8), layer3 (B, 96, H/16, W/16),
        layer4 (B, 320, H/32, W/32)."""
        taps, x = [], image
        for k, block in enumerate(self.features):
            x = block(x)
            if k in self.TAPPED:
                taps.append(x)
        return tuple(taps)

    def load_imagenet(self, state):
        """[ours] Loads torchvision's state dict without its head. Raises RuntimeError naming unknown keys."""
        head = "features.18.", "classifier."
        self.load_state_dict({key: value for key, value in state.items() if not key.startswith(head)})


# ---- Sect. 3.1, Fig. 2: the static network, arch2 of [18] -----------------------------------------------

class StaticNetwork(nn.Module):
    """What every static network has. Sect. 3.1: the method "is not directly tied to a concrete architecture".
    Another network is a subclass with an entry in STATICS. It defines
    name        its key in STATICS; a checkpoint holds it
    channels    widths of layer1 (1/4 of the image), layer2 (1/8), layer3 (1/16), layer4 (1/32)
    width       channels of dec; [ours] the nodes of its cells have as many
    Classifier  class of its last part: Classifier(num_classes) is a module, called as classifier(dec, layer1)
                -> pred. A cell has one of its own, which starts as a copy. layer1 may be None if
                .needs_layer1 is False, in decode's features, too
    __init__(num_classes, auxiliary=None), which sets .num_classes, .encoder and .classifier; see Arch2
    decode(features) -> dec (B, width, H/8, W/8), pred: logits (B, num_classes, h, w). h and w are its own
                choice, and its cells predict at the same size"""

    def encode(self, image):                  # (B, 3, H, W), normalised -> features: layer1, ..., layer4
        return self.encoder(image)

    def forward(self, image):                 # -> pred
        return self.decode(self.encode(image))[1]

    def forward_auxiliary(self, image):       # -> pred, list of auxiliary predictions of pred's size
        return self(image), []


class ContextualCell(nn.Module):
    """[18]: 5, (0, 0, 4, 1), (3, 2, 0, 1), (5, 6, 5, 0). Node 0 is the input, node 1 entry 5 of OPERATIONS on
    it. (p, q, a, b) appends three nodes, entry a on node p, entry b on node q and their sum, so the sums are
    nodes 4, 7 and 10. The output adds up node 1 and the sums."""

    OPS = "conv3x3_r3  gap conv3x3  conv1x1 conv3x3  conv3x3_r3 conv1x1".split()     # 5  4, 1  0, 1  5, 0

    def __init__(self):
        super().__init__()
        self.ops = nn.ModuleList(OPERATIONS[name](WIDTH) for name in self.OPS)

    def forward(self, x):
        node1, node2, node3 = self.ops[0](x), self.ops[1](x), self.ops[2](x)
        node5, node6 = self.ops[3](node3), self.ops[4](node2)
        node8, node9 = self.ops[5](node5), self.ops[6](node6)
        return node1 + (node2 + node3) + (node5 + node6) + (node8 + node9)


class Block(nn.Module):
    """Adds two branches, each a contextual cell and a 1x1 convolution, at the larger resolution."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(ContextualCell(), conv_bn_relu(WIDTH, WIDTH))
        self.right = nn.Sequential(ContextualCell(), conv_bn_relu(WIDTH, WIDTH))

    def forward(self, x, y):
        x, y = to_larger(self.left(x), self.right(y))
        return x + y


class Classifier(nn.Conv2d):
    """A 3x3 convolution of dec, at 1/8 of the image."""

    needs_layer1 = False

    def __init__(self, num_classes):
        super().__init__(WIDTH, num_classes, 3, padding=1)

    def forward(self, dec, layer1=None):
        return super().forward(dec)


class Arch2(StaticNetwork):
    """The static network. 2,846,283 parameters for 11 classes, as in Table 5. pred is at 1/8, as dec is.
    In [18]'s notation its decoder is (1, 3), (4, 3), (2, 2): maps 0 to 3 are layer1 to layer4, and a block
    joins each pair to one more map, 4 to 6. dec is made of those that no block uses, 5 and 6.
    auxiliary adds a head to every block's output, for training only (Sect. 6). "cell" is a contextual cell
    and a classifier, as in [18]'s code; "classifier" [ours] a classifier alone, which costs less."""

    name = "arch2"
    channels = 24, 32, 96, 320                                        # MobileNet-v2's
    width = WIDTH
    Classifier = Classifier

    def __init__(self, num_classes, auxiliary=None):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = MobileNetV2()
        self.adapt = nn.ModuleList(conv_bn_relu(channels, WIDTH) for channels in self.channels)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Sequential(nn.ReLU(), *conv_bn_relu(2 * WIDTH, WIDTH))
        self.classifier = self.Classifier(num_classes)
        self.auxiliary = nn.ModuleList()
        for _ in self.blocks if auxiliary else ():
            before = [ContextualCell()] if auxiliary == "cell" else []
            self.auxiliary.append(nn.Sequential(*before, Classifier(num_classes)))

    def decode_blocks(self, features):
        """Four features -> dec, pred, and the blocks' outputs (for the auxiliary heads)."""
        map1, map2, map3 = (self.adapt[k](features[k]) for k in (1, 2, 3))      # no block uses layer1
        map4 = self.blocks[0](map1, map3)                             # (B, 64, H/8, W/8)
        map5 = self.blocks[1](map4, map3)                             # (B, 64, H/8, W/8)
        map6 = self.blocks[2](map2, map2)                             # (B, 64, H/16, W/16)
        dec = self.out(torch.cat([map5, resize(map6, map5.shape[-2:])], dim=1))           # (B, 64, H/8, W/8)
        return dec, self.classifier(dec, features[0]), (map4, map5, map6)

    def decode(self, features):
        return self.decode_blocks(features)[:2]

    def forward_auxiliary(self, image):
        _, pred, blocks = self.decode_blocks(self.encode(image))
        return pred, [resize(head(x), pred.shape[-2:]) for head, x in zip(self.auxiliary, blocks)]


class QuarterClassifier(nn.Module):
    """[ours] dec is enlarged to 1/4 and layer1 added; one separable 3x3, then a 3x3 convolution."""

    needs_layer1 = True

    def __init__(self, num_classes):
        super().__init__()
        self.adapt = conv_bn_relu(Arch2.channels[0], WIDTH)
        self.mix = separable(WIDTH, 3)
        self.classifier = Classifier(num_classes)

    def forward(self, dec, layer1):
        x = resize(dec, layer1.shape[-2:]) + self.adapt(layer1)       # (B, 64, H/4, W/4)
        return self.classifier(self.mix(x))                           # (B, num_classes, H/4, W/4)


class Arch2Quarter(Arch2):
    """[ours] arch2 that predicts at 1/4 of the image and so can hold a pole. 6,464 parameters more."""

    name = "arch2-quarter"
    Classifier = QuarterClassifier


STATICS = {network.name: network for network in (Arch2, Arch2Quarter)}


# ---- Sect. 3.2: the genotype, a string of five tokens per layer -----------------------------------------

INPUTS = "layer4_prev", "dec_prev", "layer2", "layer3", "layer4"      # the five inputs (Sect. 3.1), in order


def location(k):
    """The name of position k of the pool: an input, or the result of layer k - 5."""
    return INPUTS[k] if k < len(INPUTS) else f"node{k - len(INPUTS)}"


# A layer of a cell: agg(op1(pool[loc1]), op2(pool[loc2])). loc1 and loc2 are positions, the others names.
Layer = collections.namedtuple("Layer", "loc1 loc2 op1 op2 agg")


class Genotype(tuple):
    """The structure of a cell: a checked tuple of `Layer`. Raises ValueError unless it is made from
    - layers, [("dec_prev", "layer2", "skip", "skip", "concat"), ...], or dicts with Layer's keys. Locations,
      operations and aggregations are given by name or by number;
    - 5L tokens, as the controller samples them: a list, tuple, tensor or array of whole numbers;
    - text: as str(genotype) prints it, or JSON of layers or of tokens."""

    def __new__(cls, cell):
        if isinstance(cell, str) and cell.lstrip().startswith("node"):            # the printed form
            text = "".join(cell.split())                  # without blanks and line ends
            found = re.findall(r"(\w+)\((\w+)\((\w+)\),(\w+)\((\w+)\)\)", text)
            made = cls([(loc1, loc2, op1, op2, agg) for agg, op1, loc1, op2, loc2 in found])
            if text != str(made).replace(" ", ""):        # the pattern missed a part, or `out` is wrong
                raise ValueError(f"not what this genotype prints, which ends with {str(made)[-40:]!r}")
            return made
        if isinstance(cell, str):
            cell = json.loads(cell)
        if isinstance(cell, (torch.Tensor, np.ndarray)):
            cell = cell.tolist()                          # with Python's own numbers
        if not isinstance(cell, (list, tuple)) or not cell:
            raise ValueError(f"a genotype is a list of layers or of tokens; got {reprlib.repr(cell)}")
        if all(type(token) is int for token in cell):     # a bool is no token
            cell = [cell[k:k + 5] for k in range(0, len(cell), 5)]
        layers, pool, ops, aggs = [], list(INPUTS), list(OPERATIONS), list(AGGREGATIONS)
        for layer in cell:
            try:
                layer = Layer(**layer) if isinstance(layer, dict) else Layer(*layer)
            except TypeError:
                raise ValueError(f"a layer is {Layer._fields}; got {reprlib.repr(layer)}") from None
            names = []
            for token, known in zip(layer, (pool, pool, ops, ops, aggs)):
                names.append(known[token] if type(token) is int and 0 <= token < len(known) else token)
                if names[-1] not in known:
                    raise ValueError(f"{reprlib.repr(token)} is not 0 to {len(known) - 1} or in {known}")
            layers.append(Layer(pool.index(names[0]), pool.index(names[1]), *names[2:]))
            pool.append(location(len(pool)))
        return super().__new__(cls, layers)

    from_json = from_tokens = classmethod(lambda cls, cell: cls(cell))    # the constructor, by other names

    def to_tokens(self):
        """List of 5L ints."""
        ops, aggs = list(OPERATIONS), list(AGGREGATIONS)
        return [k for x in self for k in (*x[:2], ops.index(x.op1), ops.index(x.op2), aggs.index(x.agg))]

    def to_json(self):
        """JSON text: a list of layers with names."""
        layers = [layer._replace(loc1=location(layer.loc1), loc2=location(layer.loc2)) for layer in self]
        return json.dumps([layer._asdict() for layer in layers])

    def __str__(self):
        """node0 = concat(skip(dec_prev), skip(layer2)); ...; out = [node1]"""
        lines = [f"node{k} = {agg}({op1}({location(loc1)}), {op2}({location(loc2)}))"
                 for k, (loc1, loc2, op1, op2, agg) in enumerate(self)]
        return "; ".join([*lines, f"out = [{', '.join(map(location, self.output()))}]"])

    def inputs(self):
        """Pool positions of the inputs that some layer samples."""
        return [k for k in range(len(INPUTS)) if any(k in layer[:2] for layer in self)]

    def output(self):
        """Pool positions of the results that no later layer samples: the cell's output joins them."""
        results = range(len(INPUTS), len(INPUTS) + len(self))
        return [k for k in results if not any(k in layer[:2] for layer in self)]


# Cells by name. Those made by hand are one idea each of how to reuse the previous frame.
CELLS = {name: Genotype(text) for name, text in {
    # The previous dec through the 1x1 conv-BN-ReLU that ends every cell: the least a cell can do.
    "propagate": "node0 = sum(skip(dec_prev), zero(dec_prev)); out = [node0]",
    # The previous dec moved by offsets that see both frames, plus the current one: GRFP [20], NetWarp [9].
    "warp": """node0 = concat(skip(dec_prev), skip(layer2));
               node1 = sum(deform3x3(node0), skip(layer4)); out = [node1]""",
    # Filters from the current frame: Li [14].
    "predictive": "node0 = predictive(skip(layer2), skip(dec_prev)); out = [node0]",
    # One affine motion for the whole image [11], joined with the current layers.
    "affine": """node0 = affine(skip(dec_prev), skip(layer2));
                 node1 = concat(skip(node0), skip(layer4)); out = [node1]""",
    # How much of the previous dec to keep beside the current layers, per pixel and channel.
    "attention": """node0 = concat(sep3x3(layer2), sep3x3(layer3));
                    node1 = concat(sep3x3(layer4), sep3x3(node0));
                    node2 = attention(sep3x3(dec_prev), sep3x3(node1)); out = [node2]""",
    # The previous dec concatenated with the current layers, without any motion.
    "concat": """node0 = concat(skip(dec_prev), skip(layer2));
                 node1 = concat(skip(layer3), skip(layer4)); out = [node0, node1]""",
    # [ours] Reconstructions of the published cells, NOT the originals: Fig. 7 is a picture that we don't
    # have. What the paper's text says of a cell holds for its reconstruction, as does its size in Table 5:
    # +0.50 and +0.34 M for CamVid (cell0, cell1), +0.39 and +0.45 M for CityScapes (cell2, cell3). Random
    # search found them, with a preference for cheap ones. cell3 was rearranged by hand to be cheaper.
    "cell0": """node0 = concat(skip(dec_prev), skip(layer2));
                node1 = attention(deform3x3(layer4), sep5x5(layer3));
                node2 = concat(conv3x3_r12(node1), conv3x3_r3(layer4));
                node3 = attention(conv3x3_r3(node1), conv3x3(node2));
                node4 = concat(conv3x3(layer4), conv3x3_r3(node3)); out = [node0, node4]""",
    "cell1": """node0 = conv3d(sep3x3_r3(layer3), conv3x3_r3(layer4));
                node1 = concat(conv3x3_r12(node0), conv3x3(layer4));
                node2 = concat(conv1x1(dec_prev), skip(layer2));
                node3 = concat(conv1x1(node1), gap(layer4));
                node4 = concat(conv1x1(node3), deform3x3(layer4)); out = [node2, node4]""",
    "cell2": """node0 = concat(conv3x3_r12(layer3), conv3x3(layer4));
                node1 = concat(conv3x3_r3(layer4), conv1x1(layer2));
                node2 = conv3d(deform3x3(layer4), conv3x3_r3(node0));
                node3 = concat(skip(dec_prev), conv3x3_r3(node2)); out = [node1, node3]""",
    "cell3": """node0 = affine(conv3x3_r3(dec_prev), conv3x3(layer2));
                node1 = concat(deform3x3(layer4), conv3x3(layer3));
                node2 = concat(deform3x3(node1), conv3x3(layer4));
                node3 = concat(deform3x3(node2), deform3x3(layer3)); out = [node0, node3]""",
}.items()}
DECODER = "decoder"                     # stands in place of a genotype, see DecoderCell


# ---- Sect. 3.2: the dynamic cell ------------------------------------------------------------------------

class DynamicCell(nn.Module):
    """The cell that a genotype describes, with only the modules that it uses. [ours] Every node is as wide as
    dec (64). Inputs of another width and the concatenated output go through 1x1 conv-BN-ReLU, the output at
    the resolution of layer2.

    genotype: anything that `Genotype` takes. past=False puts zeros in place of the previous frame's maps, to
    measure how much the cell gains from them. static: the static network that it works with, or its class."""

    def __init__(self, genotype, num_classes, past=True, static=Arch2):
        super().__init__()
        self.genotype, self.past, width = Genotype(genotype), past, static.width
        channels = static.channels[3], width, *static.channels[1:]    # of INPUTS
        adapted = [k for k in self.genotype.inputs() if channels[k] != width]
        self.adapt = nn.ModuleDict({INPUTS[k]: conv_bn_relu(channels[k], width) for k in adapted})
        self.op1 = nn.ModuleList(OPERATIONS[layer.op1](width) for layer in self.genotype)
        self.op2 = nn.ModuleList(OPERATIONS[layer.op2](width) for layer in self.genotype)
        self.agg = nn.ModuleList(AGGREGATIONS[layer.agg](width) for layer in self.genotype)
        self.output = self.genotype.output()
        self.out = conv_bn_relu(len(self.output) * width, width)
        self.classifier = static.Classifier(num_classes)  # make_cell copies the static network's into it

    def forward(self, layer4_prev, dec_prev, layer2, layer3, layer4, layer1=None):
        """Maps (B, C, h, w) at 1/32, 1/8, 1/8, 1/16, 1/32; arch2's have 320, 64, 32, 96, 320 channels. layer1
        (24, 1/4) is for a classifier that uses it. -> dec (B, 64, H/8, W/8), pred (B, num_classes, h, w)"""
        if not self.past:
            layer4_prev, dec_prev = torch.zeros_like(layer4_prev), torch.zeros_like(dec_prev)
        inputs = zip(INPUTS, (layer4_prev, dec_prev, layer2, layer3, layer4))
        pool = [self.adapt[name](x) if name in self.adapt else x for name, x in inputs]
        for layer, op1, op2, agg in zip(self.genotype, self.op1, self.op2, self.agg):
            pool.append(agg(op1(pool[layer.loc1]), op2(pool[layer.loc2])))      # (B, 64, h, w)
        results = [resize(pool[k], layer2.shape[-2:]) for k in self.output]
        dec = self.out(torch.cat(results, dim=1))                     # (B, 64 n, h, w) -> (B, 64, H/8, W/8)
        return dec, self.classifier(dec, layer1)


class DecoderCell(nn.Module):
    """[ours] A copy of the static network's decoder, used as a cell that ignores the previous frame. It is
    trained by the same steps as the cells, so the difference shows what a cell's structure is worth."""

    def __init__(self, static):
        super().__init__()
        self.static = copy.deepcopy(static)
        self.static.encoder = None

    def forward(self, layer4_prev, dec_prev, layer2, layer3, layer4, layer1=None):
        return self.static.decode((layer1, layer2, layer3, layer4))


def make_cell(genotype, static, past=True):
    """A genotype, or "decoder" -> the cell. [ours] Its classifier starts as the static network's."""
    if isinstance(genotype, str) and genotype == DECODER:
        return DecoderCell(static)
    cell = DynamicCell(genotype, static.num_classes, past, static)
    cell.classifier.load_state_dict(static.classifier.state_dict())
    return cell


# ---- Sect. 3.1, 4: the network over a video -------------------------------------------------------------

State = collections.namedtuple("State", "layer4 dec")     # what a frame passes on to the next one


class VideoSegmenter(nn.Module):
    """The static network segments a key frame; on every later frame its encoder runs alone, and the cell
    takes the decoder's place:

        frame 0:   dec_0, pred_0 = decoder(layer1_0 .. layer4_0)
        frame t:   dec_t, pred_t = cell(layer4_(t-1), dec_(t-1), layer2_t, layer3_t, layer4_t)

    So dec of frame 0 is the static decoder's, and from then on the cell's own output goes in again. cell=None
    is the per-frame baseline: every frame is a key frame.
    [ours] `segment` and `probabilities` pad sides of less than `pad` pixels, as training does (Sect. 4.1:
    480x360 to 480x400 for CamVid), and enlarge a frame whose longer side is less than `enlarge` pixels, as
    thin things are lost in small frames. `load` sets .classes, list of names, and .palette, (C, 3) uint8."""

    def __init__(self, static, cell, pad=0, enlarge=0):
        super().__init__()
        self.static, self.cell, self.pad, self.enlarge = static, cell, pad, enlarge
        self.classes = self.palette = None

    @classmethod
    def load(cls, path):
        """A checkpoint of train.py (static.pt, cell-0.pt, ...) -> the whole network, float32, in eval mode.
        Nothing else is needed. Raises InputError naming the file if it holds no finished network."""
        saved = files.load(path)
        if not isinstance(saved, dict) or "static" not in saved or "optimizers" in saved:
            raise InputError(f"{path}: no finished network; take static.pt or cell-0.pt of a finished run")
        try:
            static = STATICS[saved.get("network", "arch2")](len(saved["classes"]))
            video = cls(static, None, (saved.get("recipe") or {}).get("input_pad", 0)).eval()
            if "cell" in saved:
                video.cell = make_cell(saved.get("genotype"), static, saved.get("past", True)).eval()
            for name, module in video.named_children():   # static, and cell if it has one
                module.load_state_dict(saved[name])       # float32, also from tensors in half precision
            video.classes, video.palette = list(saved["classes"]), np.array(saved["palette"], np.uint8)
        except (KeyError, ValueError, RuntimeError) as error:     # of STATICS, a genotype, the states
            raise InputError(f"{path}: holds an unknown network ({brief(error)})") from None
        return video

    def decode(self, features, state):
        """A frame's features, the previous frame's state -> as `step`."""
        if state is None or self.cell is None:
            dec, logits = self.static.decode(features)
        else:
            dec, logits = self.cell(state.layer4, state.dec, *features[1:], layer1=features[0])
        return logits, State(features[3], dec)

    def step(self, image, state=None):
        """One frame of a stream, or of B streams at once: (B, 3, H, W), normalised, and the state that the
        last step returned (None: a key frame of every stream) -> logits (B, C, h, w), at 1/8 for arch2, new
        state. Raises ValueError when the state belongs to frames of another size."""
        features = self.static.encode(image)
        if state is not None and state.dec[:, 0].shape != features[1][:, 0].shape:        # both are at 1/8
            raise ValueError("the state belongs to a frame of another size; start with state=None")
        return self.decode(features, state)

    def forward(self, frames):
        """frames (B, T, 3, H, W), normalised; the first is a key frame -> logits (B, T, C, h, w)."""
        B, T = frames.shape[:2]
        features = self.static.encode(frames.flatten(0, 1))           # of all frames at once: (B*T, C, h, w)
        features = [x.unflatten(0, (B, T)) for x in features]         # (B, T, C, h, w)
        logits, state = [], None
        for t in range(T):
            pred, state = self.decode([x[:, t] for x in features], state)
            logits.append(pred)
        return torch.stack(logits, dim=1)

    def segment(self, image, state=None):
        """As `step`, for one frame: pixels (H, W, 3) uint8, RGB, a tensor or array -> labels (H, W) uint8 on
        the module's device, new state. Raises ValueError when these can't be used, or in training mode."""
        logits, state = self._logits(image, state)
        return logits.argmax(dim=0).to(torch.uint8), state

    def probabilities(self, image, state=None):
        """As `segment`, but returns probabilities (C, H, W), float32, which sum to 1 over the classes."""
        logits, state = self._logits(image, state)
        return logits.float().softmax(dim=0), state

    def prepare(self, image):
        """(H, W, 3) uint8 -> what `segment` gives to `step`, (1, 3, H', W'): normalised, enlarged to (h, w),
        padded; and (h, w)."""
        like = next(self.static.parameters())             # has the device and the dtype
        x = normalise(image[None].to(like.device))                    # (1, 3, H, W)
        scale = max(1, self.enlarge / max(image.shape[:2]))
        h, w = (round(scale * side) for side in image.shape[:2])
        if scale > 1:
            x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False)     # (1, 3, h, w)
        x, _ = pad(x, torch.zeros(1, h, w), self.pad)                 # (1, 3, H', W')
        return x.to(like.dtype).contiguous(memory_format=torch.channels_last), (h, w)

    @torch.no_grad()
    def _logits(self, image, state):
        """(H, W, 3) uint8 -> logits (C, H, W) at the image's size, new state."""
        if self.training or any(part.training for part in self.children()):
            raise ValueError("segment() and probabilities() need eval mode: call .eval() first")
        if not torch.is_tensor(image):
            image = torch.from_numpy(np.array(image))     # a copy, as a view may be read-only or reversed
        kind, shape = image.dtype, tuple(image.shape)
        if kind != torch.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"an image must be (H, W, 3) uint8, RGB; got {shape} {kind}")
        x, (h, w) = self.prepare(image)
        logits, state = self.step(x, state)                           # (1, C, H'/8, W'/8) for arch2
        logits = resize(logits, x.shape[-2:])                         # (1, C, H', W')
        top, left = (x.shape[2] - h) // 2, (x.shape[3] - w) // 2      # where `pad` has put the image
        logits = logits[..., top:top + h, left:left + w]              # (1, C, h, w)
        if (h, w) != shape[:2]:
            logits = F.interpolate(logits, shape[:2], mode="bilinear", align_corners=False)
        return logits[0], state                                       # (C, H, W)


# ---- Table 5, which `python dyncell.py` prints ----------------------------------------------------------

@torch.no_grad()
def print_table_5(device, camvid=(360, 480), cityscapes=(1024, 2048)):
    """Prints Table 5 for frames of (height, width): the encoder, static networks, cells on a later frame."""
    print(f"Table 5: one frame, float32, device {device}, {torch.get_num_threads()} threads, batch norms "
          "folded. 'arch2 + ...':\na later frame. cell0 to cell3 are reconstructions. Times are medians.")
    tables = ("CamVid", camvid, 11, CELLS, 9), ("CityScapes", cityscapes, 19, ["cell2", "cell3"], 3)
    for title, size, C, cells, repeats in tables:
        image = torch.randn(1, 3, *size, device=device).to(memory_format=torch.channels_last)
        statics, calls = {name: network(C) for name, network in STATICS.items()}, {}
        modules = {"encoder alone": statics["arch2"].encoder, **statics}
        for name in cells:
            modules[f"arch2 + {name}"] = VideoSegmenter(statics["arch2"], DynamicCell(CELLS[name], C))
        for name, module in modules.items():
            ready = fold_batchnorm(module).to(device, memory_format=torch.channels_last)
            calls[name] = lambda ready=ready: ready(image)
            if isinstance(ready, VideoSegmenter):
                calls[name] = lambda ready=ready, state=ready.step(image)[1]: ready.step(image, state)
        ms = milliseconds_in_turn(calls, repeats)
        print(f"\n{title:24}  parameters  G mult-adds       ms  / encoder  / arch2")
        for name, call in calls.items():
            count, time = parameters(modules[name]), ms[name]
            print(f"{name:24} {count:11,} {multiply_adds(call) / 1e9:12.2f} {time:8.1f} "
                  f"{time / ms['encoder alone']:10.2f} {time / ms['arch2']:8.2f}")
    print("Paper, a 1080Ti, mean of a video with its key frame: 50.5 to 52.6 ms / 92.4 ms = 0.55 to 0.57.\n"
          "The encoder alone is the floor of a later frame.")


def main(arguments=None):
    import argparse
    parser = argparse.ArgumentParser(description="Prints Table 5. It takes about a minute on one core.")
    parser.add_argument("--device", default="cpu", help="any torch device, such as cuda (default: cpu)")
    print_table_5(usable_device(parser.parse_args(arguments).device))


if __name__ == "__main__":
    run_main(main)
