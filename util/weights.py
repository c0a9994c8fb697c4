"""Weights that somebody else made: for the encoder, for the static network, for predict. What the file is
and how it is wrapped."""
import functools
import hashlib
import pathlib
import warnings

import torch

from data import InputError, brief
from util import download

FILES = "encoder_weights", "static"          # fields of the recipe that name such a file
ENCODER = "--encoder-weights takes torchvision's mobilenet_v2 (its state_dict)"
STATIC = "--static takes a static.pt of this program"
# What the first bytes say of a file that torch can't read.
HEADS = {
    b"": "is empty",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself (git lfs pull)",
    b"<": "is a web page, not the file itself",
    b"\x89HDF": "is an HDF5 file (Keras)",
    b"\x1f\x8b": "is packed by gzip",
    b"{": "is a JSON text",
}


def read(path, wanted):
    """The content of a file of weights: tensors and plain values, never code. Raises InputError that says
    what the file is and what is wanted."""
    try:
        with warnings.catch_warnings():      # it warns of a TorchScript archive, then refuses it
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {wanted}") from None
    except Exception as error:               # torch.load raises many kinds
        raise InputError(f"{path}: {what_is(path, error)}; {wanted}") from None


def what_is(path, error):
    """What stands in the place of weights."""
    if pathlib.Path(path).is_dir():
        return "is a folder"
    try:
        with open(path, "rb") as file:
            head = file.read(200).lstrip()
    except OSError as other:
        return f"cannot be read ({other.strerror})"
    for start, said in HEADS.items():
        if head.startswith(start) if start else not head:
            return said
    if head[8:9] == b"{":
        return "is a safetensors file"
    reason = " ".join(str(error).split())
    if head[:2] == b"PK" and "GLOBAL" not in reason and "TorchScript" not in reason:
        return "is cut short, or another archive, so get it again"
    if "GLOBAL" in reason or "TorchScript" in reason or head[:1] == b"\x80":
        return "holds a whole pickled object, whose code is not run: save its state_dict() in its place"
    return f"holds no weights ({reason[:100]})"


def state_of(content, key):
    """The state that holds `key`, in whatever dictionaries and behind whatever prefix ("module.",
    "backbone."): without both. None where there is none."""
    if not isinstance(content, dict):
        return None
    for name in content:
        if isinstance(name, str) and name.endswith(key) and name[:-len(key)][-1:] in ("", "."):
            prefix = name[:-len(key)]
            return {k[len(prefix):]: v for k, v in content.items() if str(k).startswith(prefix)}
    for inner in content.values():
        if (state := state_of(inner, key)) is not None:
            return state
    return None


def find(path, key, wanted):
    """A file's content, and the state in it that holds `key`. Raises InputError."""
    content = read(path, wanted)
    state = state_of(content, key)
    if state is None:
        raise InputError(f"{path}: has no {key}, so it is of another network; {wanted}")
    return content, state


def look(recipe):
    """Raises InputError if pretraining can't begin from what the recipe names, before the data is read."""
    if recipe.static != "none":
        find(recipe.static, "encoder.features.0.0.weight", STATIC)
    elif recipe.encoder_weights not in ("none", "imagenet"):
        find(recipe.encoder_weights, "features.0.0.weight", ENCODER)


def begin(model, recipe, classes):
    """Gives a static network what pretraining begins from: --static, a network that was trained before, here
    or on another dataset, or else the encoder's weights."""
    if recipe.static == "none":
        load_encoder(model.encoder, recipe.encoder_weights)
    else:
        load_static(model, recipe, list(classes))


def load_encoder(encoder, source):
    """ImageNet weights into the encoder: "imagenet" (downloaded once), a file in torchvision's keys, or
    "none"."""
    if source == "none":
        print("the encoder starts from random weights (--encoder-weights none): on real images this costs "
              "much accuracy")
        return
    path = download.imagenet_weights() if source == "imagenet" else source
    _, state = find(path, "features.0.0.weight", ENCODER)
    try:
        encoder.load_imagenet(state)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {brief(error)}; {ENCODER}") from None


def load_static(model, recipe, classes):
    """Where the file's classes are others, the classifiers stay as they are: new."""
    path = recipe.static
    content, state = find(path, "encoder.features.0.0.weight", STATIC)
    there = content.get("classes") or content.get("recipe", {}).get("dataset", recipe.dataset)
    same, ours = there in (classes, recipe.dataset), model.state_dict()
    if not same and not recipe.static_epochs:
        raise InputError(f"--static-epochs 0: {path} has other classes, so its classifiers must be "
                         "trained; 1 or more")
    for key, value in ours.items():
        if key.startswith("auxiliary.") or key.startswith("classifier.") and not same:
            state[key] = value
    try:
        model.load_state_dict({key: state[key] for key in ours})
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{path}: is another network's ({brief(error)}); {STATIC}") from None
    print(f"static: begins from {path}" + ("" if same else ", of other classes: classifiers anew"))


@functools.cache
def digest(source):
    """The first digits of the SHA-256 of a file of weights; of "imagenet" they are known; "none"; or None
    where it is not there."""
    if source == "imagenet":
        return download.IMAGENET[-12:-4]
    if source == "none":
        return source
    try:
        return hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()[:8]
    except OSError:
        return None
