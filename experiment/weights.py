"""Files of weights that the user gives: for the encoder, and for the static network."""
import pathlib

import torch

from util.download import download
from util.errors import InputError, brief
from util.files import load

# torchvision's mobilenet_v2; the file's name ends with the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"
FILES = "encoder_weights", "static"          # fields of the recipe that name such a file
TAKES = {"--static": "--static takes a static.pt of this program",
         "--encoder-weights": "--encoder-weights takes torchvision's mobilenet_v2 (its state_dict)"}


def begin(model, recipe, classes):
    """Loads what pretraining starts from: a static network (--static), or else the encoder's weights -> a
    line that says which. check_run calls it first, so that one process downloads. Raises InputError."""
    flag, path, more = "--static", recipe.static, ""
    if path == "none":
        flag, path = "--encoder-weights", recipe.encoder_weights
    if path == "none":
        return "pretrain: the encoder starts from random weights, which costs accuracy on real images"
    if path == "imagenet":                   # in torch.hub's folder, which torchvision uses, too
        path = pathlib.Path(torch.hub.get_dir(), "checkpoints", pathlib.Path(IMAGENET).name)
        download(IMAGENET, path, "pass --encoder-weights FILE (or none)", IMAGENET[-12:-4])
    content = load(path, TAKES[flag])
    try:
        if flag == "--static":
            more = load_static(model, recipe, list(classes), content)
        else:
            model.encoder.load_imagenet(state_of(content, "features.0.0.weight"))
    except (RuntimeError, AttributeError, TypeError, LookupError) as error:
        raise InputError(f"{path}: belongs to another network ({brief(error)}); {TAKES[flag]}") from None
    return f"pretrain: starts from {flag} {path}{more}"


def load_static(model, recipe, classes, content):
    """Loads recipe.static. The model keeps its own, untrained classifiers if the file has none for these
    classes (-> a remark), and its auxiliary heads, which checkpoints don't hold."""
    path, ours, state = recipe.static, model.state_dict(), state_of(content, "encoder.features.0.0.weight")
    if "optimizers" in content:
        raise InputError(f"{path}: its training is not finished; the command that made it continues")
    network = content.get("network", "arch2" if "static" in content else model.name)
    if network != model.name:
        raise InputError(f"{path}: holds the static network {network!r}; give --static-network {network}")
    there = content.get("classes") or (content.get("recipe") or {}).get("dataset", recipe.dataset)
    classifier = [key for key in ours if key.startswith("classifier.")]
    same = there in (classes, recipe.dataset) and all(
        key in state and state[key].shape == ours[key].shape for key in classifier)
    if not same and not recipe.static_epochs:
        raise InputError(f"--static-epochs 0: {path} has other classes and must learn; give 1 or more")
    kept = [key for key in ours if key.startswith("auxiliary.") or key in classifier and not same]
    model.load_state_dict({key: ours[key] if key in kept else state[key] for key in ours})
    return "" if same else "; its classes differ: new classifiers"


def state_of(content, key):
    """The state dict in `content` that has `key`. It may be nested in other dicts, and its keys may have a
    prefix ("module.", "backbone."), which is removed. Raises LookupError if there is no such state dict."""
    nested = [content]
    for values in nested:                    # to which those inside are added
        for name in values if isinstance(values, dict) else ():
            if f".{name}".endswith(f".{key}"):
                prefix = name[:-len(key)]
                return {k[len(prefix):]: v for k, v in values.items() if k.startswith(prefix)}
            nested.append(values[name])
    raise LookupError(f"it has no {key}")
