"""ImageNet weights for the encoder, from where the user has them."""
import functools
import hashlib
import pathlib
import pickle

import torch

from data import InputError
from util import download


def load_encoder(encoder, source):
    """ImageNet weights into the encoder: "imagenet" (downloaded once), a file in torchvision's keys, or
    "none"."""
    if source == "none":
        print("the encoder starts from random weights (--encoder-weights none): on real images this costs much accuracy")
        return
    path = download.imagenet_weights() if source == "imagenet" else pathlib.Path(source)
    try:
        encoder.load_imagenet(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; --encoder-weights takes torchvision's mobilenet_v2") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: {reason}; --encoder-weights takes torchvision's mobilenet_v2") from None


@functools.cache
def digest(source):
    """The first digits of the SHA-256 of what --encoder-weights names; "none"; or None where it is not
    there."""
    if source == "imagenet":
        return download.IMAGENET[-12:-4]
    if source == "none":
        return source
    try:
        return hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()[:8]
    except OSError:
        return None
