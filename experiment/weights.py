"""Files of weights that the user gives: for the encoder, for the static network, for predict."""
import pathlib
import warnings

import torch

from util.download import download
from util.errors import InputError, brief

# torchvision's mobilenet_v2; the file's name ends with the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"

FILES = "encoder_weights", "static"          # fields of the recipe that name such a file
ENCODER = "--encoder-weights takes torchvision's mobilenet_v2 (its state_dict)"
STATIC = "--static takes a static.pt of this program"
# What a file is that torch can't read, by its first bytes.
PICKLED = "holds a pickled object, which could run code and is not loaded; save its state_dict()"
HEADS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself (git lfs pull)",
    b"<": "is a web page, not the file itself",
    b"\x80": PICKLED,
    b"PK": "is cut short or not an archive of torch's, so get it again",
}


# ---- what pretraining starts from -------------------------------------------------------------------------

def begin(model, recipe, classes):
    """Loads what pretraining starts from: a static network that was trained before (--static), on this
    dataset or another, or else the encoder's weights. -> a line that says which.

    options.open_run calls it before the data is read, in one process and with a model of its own: there
    ImageNet's weights are downloaded, and a file that can't be used is an InputError within seconds."""
    if recipe.static != "none":
        return load_static(model, recipe, list(classes))
    path = recipe.encoder_weights
    if path == "none":
        return ("the encoder starts from random weights (--encoder-weights none): on real images this costs "
                "much accuracy")
    if path == "imagenet":                   # in torch.hub's folder, which torchvision uses, too
        path = pathlib.Path(torch.hub.get_dir(), "checkpoints", pathlib.Path(IMAGENET).name)
        download(IMAGENET, path, "pass --encoder-weights FILE (or none)", IMAGENET[-12:-4])
    _, state = find(path, "features.0.0.weight", ENCODER)
    head = "features.18.", "classifier."     # for which the encoder has no place
    try:
        model.encoder.load_state_dict({key: x for key, x in state.items() if not key.startswith(head)})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not torchvision's ({brief(error)}); {ENCODER}") from None
    return f"the encoder starts from {path}"


def load_static(model, recipe, classes):
    """Loads recipe.static. The model keeps its own, untrained classifiers if the file has none for these
    classes, and its auxiliary heads, which checkpoints don't hold."""
    path, ours = recipe.static, model.state_dict()
    content, state = find(path, "encoder.features.0.0.weight", STATIC)
    network = content.get("network", "arch2" if "static" in content else model.name)
    if network != model.name:
        raise InputError(f"{path}: holds the static network {network!r}, not {model.name!r}; give "
                         f"--static-network {network}, or another file")
    there = content.get("classes") or (content.get("recipe") or {}).get("dataset", recipe.dataset)
    classifier = {key: value.shape for key, value in ours.items() if key.startswith("classifier.")}
    fits = {key: getattr(state.get(key), "shape", None) for key in classifier} == classifier
    same = fits and there in (classes, recipe.dataset)
    if not same and not recipe.static_epochs:
        raise InputError(f"--static-epochs 0: {path} has other classes, so its classifiers must be "
                         "trained; give 1 or more")
    for key, value in ours.items():
        if key.startswith("auxiliary.") or key in classifier and not same:
            state[key] = value
    try:
        model.load_state_dict({key: state[key] for key in ours})
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{path}: belongs to another network ({brief(error)}); {STATIC}") from None
    return f"static: starts from {path}" + ("" if same else "; its classes differ: new classifiers")


# ---- reading a file ---------------------------------------------------------------------------------------

def find(path, key, wanted):
    """A file's content, and the state dict in it that has `key`. Raises InputError if there is none."""
    content = read(path, wanted)
    if state := state_of(content, key):
        return content, state
    raise InputError(f"{path}: has no {key}, so it belongs to another network; {wanted}")


def state_of(content, key):
    """The state dict in `content` that has `key`. It may be nested in other dicts, and its keys may have a
    prefix ("module.", "backbone."), which is removed. None if there is no such state dict."""
    for name, inner in content.items() if isinstance(content, dict) else ():
        if f".{name}".endswith(f".{key}"):
            prefix = name[:-len(key)]
            return {k[len(prefix):]: v for k, v in content.items() if k.startswith(prefix)}
        if state := state_of(inner, key):
            return state
    return None


def read(path, wanted):
    """The content of a file of weights. Only tensors and plain values are loaded; no code is run. Raises
    InputError that says what the file is and what is wanted."""
    try:
        with warnings.catch_warnings():      # torch warns of an old pickle before it refuses it
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror.lower()}; {wanted}") from None
    except Exception as error:               # torch.load raises many kinds
        head = pathlib.Path(path).read_bytes()[:200].lstrip()
        said = [said for start, said in HEADS.items() if head.startswith(start)]
        said.append("is not what torch.save writes" if head else "is empty")
        if "GLOBAL" in str(error) or "TorchScript" in str(error):
            said = [PICKLED]
        elif head[8:9] == b"{":
            said = ["is a safetensors file; load it by safetensors.torch.load_file, and torch.save that"]
        raise InputError(f"{path}: {said[0]}; {wanted}") from None
