"""Reads files of weights that the user gives: for the encoder, for the static network, for predict."""
import functools
import hashlib
import pathlib
import warnings

import torch

from util.errors import InputError, brief
from util import download

# torchvision's mobilenet_v2; the file's name ends with the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"

FILES = "encoder_weights", "static"          # fields of the recipe that name such a file
ENCODER = "--encoder-weights takes torchvision's mobilenet_v2 (its state_dict)"
STATIC = "--static takes a static.pt of this program"
# What a file is that torch can't read, by its first bytes.
HEADS = {
    b"": "is empty",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself (git lfs pull)",
    b"<": "is a web page, not the file itself",
    b"\x89HDF": "is an HDF5 file (Keras)",
    b"\x1f\x8b": "is packed by gzip",
    b"{": "is a JSON text",
}


def read(path, wanted):
    """The content of a file of weights. Only tensors and plain values are loaded; no code is run. Raises
    InputError that says what the file is and what is wanted."""
    try:
        with warnings.catch_warnings():      # torch warns about a TorchScript archive, then refuses it
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {wanted}") from None
    except Exception as error:               # torch.load raises many kinds
        raise InputError(f"{path}: {what_is(path, error)}; {wanted}") from None


def what_is(path, error):
    """What the file at path is, if it is not a file of weights."""
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
        return "is cut short or not an archive of torch's, so get it again"
    if "GLOBAL" in reason or "TorchScript" in reason or head[:1] == b"\x80":
        return "holds a pickled object, which could run code and is not loaded; save its state_dict()"
    return f"holds no weights ({reason[:100]})"


def state_of(content, key):
    """The state dict in `content` that has `key`. It may be nested in other dicts, and its keys may have a
    prefix ("module.", "backbone."), which is removed. None if there is no such state dict."""
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
    """A file's content, and the state dict in it that has `key`. Raises InputError if there is none."""
    content = read(path, wanted)
    state = state_of(content, key)
    if state is None:
        raise InputError(f"{path}: has no {key}, so it belongs to another network; {wanted}")
    return content, state


def look(recipe):
    """Raises InputError if pretraining can't start from the files in the recipe. Called before the data is
    read."""
    if recipe.static != "none":
        find(recipe.static, "encoder.features.0.0.weight", STATIC)
    elif recipe.encoder_weights not in ("none", "imagenet"):
        find(recipe.encoder_weights, "features.0.0.weight", ENCODER)


def begin(model, recipe, classes):
    """Loads what pretraining starts from: a static network that was trained before (--static), on this
    dataset or another, or else the encoder's weights."""
    if recipe.static == "none":
        load_encoder(model.encoder, recipe.encoder_weights)
    else:
        load_static(model, recipe, list(classes))


def load_encoder(encoder, source):
    """Loads weights into the encoder. source: "imagenet" (downloaded once), a file with torchvision's keys,
    or "none"."""
    if source == "none":
        print("the encoder starts from random weights (--encoder-weights none): on real images this costs "
              "much accuracy")
        return
    path = imagenet_weights() if source == "imagenet" else source
    _, state = find(path, "features.0.0.weight", ENCODER)
    try:
        encoder.load_imagenet(state)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {brief(error)}; {ENCODER}") from None


def load_static(model, recipe, classes):
    """Loads recipe.static. If its classes differ, the model keeps its own, untrained classifiers."""
    path = recipe.static
    content, state = find(path, "encoder.features.0.0.weight", STATIC)
    there = content.get("classes") or content.get("recipe", {}).get("dataset", recipe.dataset)
    same, ours = there in (classes, recipe.dataset), model.state_dict()
    if not same and not recipe.static_epochs:
        raise InputError(f"--static-epochs 0: {path} has other classes, so its classifiers must be "
                         "trained; give 1 or more")
    for key, value in ours.items():
        if key.startswith("auxiliary.") or key.startswith("classifier.") and not same:
            state[key] = value
    try:
        model.load_state_dict({key: state[key] for key in ours})
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{path}: belongs to another network ({brief(error)}); {STATIC}") from None
    print(f"static: starts from {path}" + ("" if same else "; its classes differ: new classifiers"))


def imagenet_weights():
    """The path of torchvision's mobilenet_v2 in torch.hub's folder, downloaded if it is missing. Raises
    InputError."""
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", pathlib.Path(IMAGENET).name)
    digits = path.stem.rpartition("-")[2]
    return download.download(IMAGENET, path, "pass --encoder-weights FILE (or none)", sha256=digits)


@functools.cache
def digest(source):
    """The first digits of the SHA-256 of a file of weights. "imagenet" has known ones, "none" stays "none".
    None if the file can't be read."""
    if source == "imagenet":
        return IMAGENET[-12:-4]
    if source == "none":
        return source
    try:
        return hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()[:8]
    except OSError:
        return None
