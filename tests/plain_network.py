"""Another static network than arch2, in a few lines: an example of dyncell.StaticNetwork, for tests."""
from torch import nn

import dyncell
from ops import conv_bn_relu, resize


class PlainClassifier(dyncell.Classifier):
    def __init__(self, num_classes):
        nn.Conv2d.__init__(self, Plain.width, num_classes, 1)


class Plain(dyncell.StaticNetwork):
    """MobileNet-v2 whose layer4 is narrowed to 128 channels. dec (48 channels) is a 3x3 convolution of the
    sum of layer2 to layer4, each by 1x1 conv-BN-ReLU to 48 channels and at 1/8. No auxiliary heads."""

    name = "plain"
    channels = 24, 32, 96, 128
    width = 48
    Classifier = PlainClassifier

    def __init__(self, num_classes, auxiliary=None):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = dyncell.MobileNetV2()
        self.narrow = conv_bn_relu(320, self.channels[3])
        self.adapt = nn.ModuleList(conv_bn_relu(channels, self.width) for channels in self.channels[1:])
        self.out = conv_bn_relu(self.width, self.width, 3)
        self.classifier = self.Classifier(num_classes)

    def encode(self, image):
        layer1, layer2, layer3, layer4 = self.encoder(image)
        return layer1, layer2, layer3, self.narrow(layer4)

    def decode(self, features):
        layer1, *others = features
        size = others[0].shape[-2:]
        maps = [resize(adapt(x), size) for adapt, x in zip(self.adapt, others)]   # (B, 48, H/8, W/8), three
        dec = self.out(sum(maps))
        return dec, self.classifier(dec, layer1)
