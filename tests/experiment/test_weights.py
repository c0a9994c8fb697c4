"""experiment/weights.py: files of weights as people have them are taken, or refused in one line that says
what the file is."""
import pytest
import torch
from whole_run import arguments_of, copy_of, small, smoke

import train
from data import InputError
from dyncell import STATICS, Arch2, MobileNetV2
from experiment import weights
from experiment.runs import flag


def begin(model, classes="abcdef", **changes):
    return weights.begin(model, train.recipe_for("synthetic", "smoke", **changes), list(classes))


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {key: value.half() for key, value in state.items()},
    lambda state: {"state_dict": {**state, "features.18.1.bias": torch.zeros(9), "classifier.1.bias": 1}},
    lambda state: {"optimizer": {"lr": 1.0}, "model": {f"module.backbone.{k}": state[k] for k in state}}])
def test_an_encoder_is_taken_in_every_wrapping(tmp_path, wrap):
    torch.manual_seed(0)
    good, model = MobileNetV2().state_dict(), Arch2(6)
    torch.save(wrap(good), tmp_path / "file.pth")
    assert "file.pth" in begin(model, encoder_weights=str(tmp_path / "file.pth"))
    for key, value in model.encoder.state_dict().items():
        assert value.dtype == good[key].dtype and torch.allclose(value, good[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("content", [
    [1], {"conv1.weight": torch.zeros(1)}, {"encoder.features.0.0.weight": torch.zeros(1)}])
def test_a_file_of_another_network_is_refused_in_one_line(tmp_path, content):
    torch.save(content, path := tmp_path / "file.pth")
    for field in weights.FILES:
        with pytest.raises(InputError, match="another network") as error:
            begin(Arch2(6), **{field: str(path)})
        line = str(error.value)
        assert line.startswith(f"{path}: ") and f"{flag(field)} takes" in line and "\n" not in line


# ---- --static

def test_a_static_network_of_the_same_classes_is_taken_as_it_is(smoke, small, tmp_path):
    copy_of(smoke, tmp_path, "nothing")
    flags = ["--stage", "pretrain", "--static-epochs", "0", "--static", str(smoke / "static.pt")]
    train.main([*arguments_of(tmp_path / "run"), *flags])
    ours, theirs = (torch.load(at / "static.pt", weights_only=True) for at in (tmp_path / "run", smoke))
    assert ours["history"] == [] and ours["static"].keys() == theirs["static"].keys()
    assert all(torch.equal(value, theirs["static"][key]) for key, value in ours["static"].items())


@pytest.mark.parametrize("network, number, facts", [
    ("arch2", 6, {"recipe": {"dataset": "camvid"}}), ("arch2-quarter", 6, {"classes": list("ghijkl")}),
    ("arch2", 11, {})])
def test_where_the_classes_differ_the_classifiers_are_new(tmp_path, network, number, facts):
    """{}: a file that doesn't name its classes; their number shows it."""
    path, there, model = tmp_path / "static.pt", STATICS[network](number), STATICS[network](6, "classifier")
    torch.save({"static": there.state_dict(), "network": network, **facts}, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert "new classifiers" in begin(model, static=str(path))
    for key, value in model.state_dict().items():
        new = key.startswith(("classifier.", "auxiliary."))
        assert torch.equal(value, before[key] if new else there.state_dict()[key]), key
    with pytest.raises(InputError, match="--static-epochs 0: .*static.pt has other classes"):
        begin(model, static=str(path), static_epochs=0)
    torch.save({"static": there.state_dict(), "network": network, "optimizers": []}, path)
    with pytest.raises(InputError, match="static.pt: its training is not finished"):
        begin(model, static=str(path))
