"""util/weights.py: weights as people have them, taken where that is safe, else said what the file is."""
import pickle

import numpy as np
import pytest
import torch
from whole_run import arguments_of, copy_of, small, smoke

import train
from data import InputError
from dyncell import Arch2, MobileNetV2
from experiment import weights


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    return MobileNetV2().state_dict()


def recipe(**changes):
    return train.recipe_for("synthetic", "smoke", **changes)


WRAPPED = {
    "as it is": lambda state: state,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "encoder.": lambda state: {f"encoder.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"epoch": 90, "state_dict": state},
    "twice": lambda state: {"optimizer": {"lr": 1.0},
                            "model": {f"module.backbone.{key}": value for key, value in state.items()}},
    "with a head": lambda state: {**state, "classifier.1.weight": torch.zeros(1000, 1280)},
    "half precision": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_an_encoder_is_taken_in_every_wrapping(tmp_path, good, how):
    torch.save(WRAPPED[how](good), tmp_path / "file.pth")
    model = Arch2(6)
    weights.begin(model, recipe(encoder_weights=str(tmp_path / "file.pth")), [])
    for key, value in model.encoder.state_dict().items():
        assert value.dtype == good[key].dtype and torch.allclose(value, good[key], rtol=1e-3, atol=1e-3)


def save_half(content, path):
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


FILES = {
    "a whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "holds a pickled object"),
    "numpy": (lambda path: path.write_bytes(pickle.dumps({"a": np.zeros(3)})), "holds a pickled object"),
    "a web page": (lambda path: path.write_text("\n<html>403</html>"), "is a web page"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS "
                                                                                              "pointer"),
    "cut": (lambda path: save_half({"a": torch.zeros(9999)}, path), "is cut short"),
    "safetensors": (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{\"a\":{}}"), "is a safetensors file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b123"), "is packed by gzip"),
    "text": (lambda path: path.write_text("weights"), "holds no weights"),
    "another network": (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "to another "
                                                                                         "network"),
    "another width": (lambda path: torch.save({"features.0.0.weight": torch.zeros(1)}, path),
                      "not torchvision"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_a_file_is_that_cannot_be_taken_is_said_in_one_line(tmp_path, kind):
    path, (make, said) = tmp_path / "file.pth", FILES[kind]
    make(path)
    with pytest.raises(InputError, match=said) as error:
        weights.begin(Arch2(6), recipe(encoder_weights=str(path)), [])
    assert str(error.value).startswith(f"{path}: ") and "--encoder-weights takes" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_is_looked_at_before_the_data_is_read_again(tmp_path, small):
    (tmp_path / "file.pth").write_text("<html>")
    with pytest.raises(InputError, match="is a web page"):
        train.main(["--encoder-weights", str(tmp_path / "file.pth"), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ---- --static

def test_a_static_network_of_the_same_classes_is_taken_as_it_is(smoke, small, tmp_path):
    folder = tmp_path / "run"
    copy_of(smoke, tmp_path, "nothing")
    train.main([*arguments_of(folder), "--stage", "pretrain", "--static", str(smoke / "static.pt"),
                "--static-epochs", "0"])
    ours = torch.load(folder / "static.pt", weights_only=True)
    theirs = torch.load(smoke / "static.pt", weights_only=True)
    assert ours["history"] == [] and ours["static"].keys() == theirs["static"].keys()
    assert all(torch.equal(value, theirs["static"][key]) for key, value in ours["static"].items())
    with pytest.raises(InputError, match="static.pt: was trained when --static had another content"):
        torch.save({**theirs, "seed": 1}, tmp_path / "other.pt")
        train.main([*arguments_of(folder), "--stage", "pretrain", "--static", str(tmp_path / "other.pt"),
                    "--static-epochs", "0"])


@pytest.mark.parametrize("said", [{"recipe": {"dataset": "camvid"}}, {"classes": ["a", "b", "c"]}])
def test_where_the_classes_differ_the_classifiers_are_new(tmp_path, said, capsys):
    path, there, model = tmp_path / "static.pt", Arch2(11), Arch2(6, auxiliary="classifier")
    torch.save({"static": there.state_dict(), **said}, path)
    before = model.classifier.weight.clone()
    weights.begin(model, recipe(static=str(path)), list("abcdef"))
    assert torch.equal(model.classifier.weight, before) and ": new classifiers" in capsys.readouterr().out
    assert torch.equal(model.encoder.features[0][0].weight, there.encoder.features[0][0].weight)
    assert torch.equal(model.out[1].weight, there.out[1].weight)
    with pytest.raises(InputError, match="--static-epochs 0: .*static.pt has other classes"):
        weights.begin(model, recipe(static=str(path), static_epochs=0), list("abcdef"))


def test_what_is_no_static_network_is_told(tmp_path, good):
    torch.save(good, tmp_path / "encoder.pth")
    with pytest.raises(InputError, match="encoder.pth: has no encoder.features.0.0.weight.*--static takes"):
        weights.begin(Arch2(6), recipe(static=str(tmp_path / "encoder.pth")), [])
