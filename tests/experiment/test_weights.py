"""experiment/weights.py: files of weights as people have them are taken, or refused in one line that says
what the file is."""
import pickle

import numpy as np
import pytest
import torch
from whole_run import arguments_of, copy_of, small, smoke

import train
from data import InputError
from dyncell import STATICS, Arch2, MobileNetV2
from experiment import weights


def recipe(**changes):
    return train.recipe_for("synthetic", "smoke", **changes)


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    return MobileNetV2().state_dict()


WRAPPED = {
    "as it is": lambda state: state,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "twice": lambda state: {"optimizer": {"lr": 1.0},
                            "model": {f"module.backbone.{key}": value for key, value in state.items()}},
    "with a head": lambda state: {"state_dict": {**state, "features.18.1.bias": torch.zeros(1280),
                                                 "classifier.1.bias": torch.zeros(1000)}},
    "half precision": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_an_encoder_is_taken_in_every_wrapping(tmp_path, good, how):
    torch.save(WRAPPED[how](good), tmp_path / "file.pth")
    model = Arch2(6)
    said = weights.begin(model, recipe(encoder_weights=str(tmp_path / "file.pth")), [])
    assert said == f"the encoder starts from {tmp_path / 'file.pth'}"
    for key, value in model.encoder.state_dict().items():
        assert value.dtype == good[key].dtype and torch.allclose(value, good[key], rtol=1e-3, atol=1e-3)


def torch_bytes(content, path, length=None):
    torch.save(content, path)
    return path.read_bytes()[:length]


@pytest.mark.parametrize("make, said", [
    (lambda path: torch_bytes(torch.nn.Linear(2, 2), path), "holds a pickled object"),
    (lambda path: pickle.dumps({"a": np.zeros(3)}), "holds a pickled object"),
    (lambda path: b"\n<html>403</html>", "is a web page"),
    (lambda path: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (lambda path: b"\x08\0\0\0\0\0\0\0{\"a\":{}}", "is a safetensors file"),
    (lambda path: torch_bytes({"a": torch.zeros(9999)}, path, 20000), "is cut short"),
    (lambda path: b"", "is empty"), (lambda path: b"weights", "is not what torch.save writes"),
    (lambda path: torch_bytes({"conv1.weight": torch.zeros(1)}, path), "belongs to another network"),
    (lambda path: torch_bytes({"features.0.0.weight": torch.zeros(1)}, path), "not torchvision")])
def test_what_a_file_is_that_cannot_be_taken_is_said_in_one_line(tmp_path, make, said):
    path = tmp_path / "file.pth"
    path.write_bytes(make(path))
    for flag, name in (("encoder_weights", "--encoder-weights"), ("static", "--static")):
        with pytest.raises(InputError) as error:
            weights.begin(Arch2(6), recipe(**{flag: str(path)}), [])
        line = str(error.value)
        assert line.startswith(f"{path}: ") and f"{name} takes" in line and "\n" not in line
        assert said in line or flag == "static" and "belongs to another network" in line


def test_mistakes_are_noticed_before_the_data_is_read(tmp_path, small):
    torch.save({"static": Arch2(3).state_dict()}, tmp_path / "static.pt")
    for flags, said in ((["--encoder-weights", str(tmp_path / "nowhere")], "nowhere: no such file"),
                        (["--encoder-weights", str(tmp_path)], "is a directory"),
                        (["--static", str(tmp_path / "static.pt"), "--static-epochs", "0"], "other classes")):
        with pytest.raises(InputError, match=said):
            train.main([*flags, "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------
# --static

def test_a_static_network_of_the_same_classes_is_taken_as_it_is(smoke, small, tmp_path):
    folder = tmp_path / "run"
    copy_of(smoke, tmp_path, "nothing")
    train.main([*arguments_of(folder), "--stage", "pretrain", "--static", str(smoke / "static.pt"),
                "--static-epochs", "0"])
    ours = torch.load(folder / "static.pt", weights_only=True)
    theirs = torch.load(smoke / "static.pt", weights_only=True)
    assert ours["history"] == [] and ours["static"].keys() == theirs["static"].keys()
    assert all(torch.equal(value, theirs["static"][key]) for key, value in ours["static"].items())
    with pytest.raises(InputError, match="static.pt: .*--static .* there"):
        torch.save({**theirs, "seed": 1}, tmp_path / "other.pt")
        train.main([*arguments_of(folder), "--stage", "pretrain", "--static", str(tmp_path / "other.pt"),
                    "--static-epochs", "0"])


@pytest.mark.parametrize("network, classes", [
    ("arch2", {"recipe": {"dataset": "camvid"}}), ("arch2-quarter", {"classes": ["a", "b", "c"]}),
    ("arch2", {})])
def test_where_the_classes_differ_the_classifiers_are_new(tmp_path, network, classes):
    """{}: a file that doesn't name its classes; their number shows it."""
    path, there, model = tmp_path / "static.pt", STATICS[network](11), STATICS[network](6, "classifier")
    torch.save({"static": there.state_dict(), "network": network, **classes}, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = weights.begin(model, recipe(static=str(path)), list("abcdef"))
    assert said == f"static: starts from {path}; its classes differ: new classifiers"
    for key, value in model.state_dict().items():
        new = key.startswith(("classifier.", "auxiliary."))
        assert torch.equal(value, before[key] if new else there.state_dict()[key]), key
    with pytest.raises(InputError, match="--static-epochs 0: .*static.pt has other classes"):
        weights.begin(model, recipe(static=str(path), static_epochs=0), list("abcdef"))


def test_another_static_network_is_refused(tmp_path):
    first, second = list(STATICS)[:2]
    for file, model, said in ((first, second, f"--static-network {first}"), (second, first, second)):
        path = tmp_path / "static.pt"
        torch.save({"static": STATICS[file](6).state_dict(), "network": file}, path)
        with pytest.raises(InputError, match=f"static.pt: holds the static network '{file}'.*{said}"):
            weights.begin(STATICS[model](6), recipe(static=str(path)), [])
