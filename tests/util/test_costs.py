"""What a module costs, by hand; the tables of ops.py; the scripts' --help and --device."""
import time

import pytest
import torch
from torch import nn
from whole_run import as_script

import ops
from data import InputError
from util import costs


def test_multiply_adds():
    """3x3 convolution, 8 -> 8 channels, on 5 x 6."""
    conv = ops.OPERATIONS["conv3x3"](8).eval()
    assert costs.multiply_adds(conv, torch.zeros(1, 8, 5, 6)) == 9 * 8 * 8 * 5 * 6
    assert costs.parameters(conv) == 9 * 8 * 8 + 2 * 8


def test_megabytes_kept():
    """A ReLU keeps its result, a convolution what it was given (not counted); each storage counts once."""
    x, mb = torch.randn(1, 4, 50, 50, requires_grad=True), 4 * 4 * 50 * 50 / 1e6
    conv = nn.Conv2d(4, 4, 3, padding=1)
    two = nn.Sequential(conv, nn.Sigmoid(), nn.Conv2d(4, 4, 1))   # the sigmoid's result, and the last
    for module, kept in ((nn.Identity(), 0), (nn.ReLU(), mb), (conv, mb), (two, 2 * mb)):
        assert costs.megabytes_kept(module, x) == pytest.approx(kept)


def test_milliseconds_take_turns():
    """A first round doesn't count; then the median of each second call: what is slow at first is not seen."""
    order, pauses = [], iter((0.05, 0.05, 0.05, 0.03, 0.05, 0.001, 0.05, 0.001))

    def call():
        order.append("a")
        time.sleep(next(pauses))

    ms = costs.milliseconds_in_turn({"a": call, "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "a", "b", "b"] * 4
    assert 1 <= ms["a"] < 30 and ms["b"] < ms["a"]


def test_a_device_is_waited_for(monkeypatch):
    """Before and after a timed call: an accelerator works on after the call returned."""
    order = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: order.append(str(device)))
    costs.milliseconds_in_turn({"": lambda: order.append("call")}, repeats=1, device="cuda:1")
    assert order == ["call", "cuda:1", "call", "cuda:1"] * 2
    order.clear()
    costs.milliseconds_in_turn({"": lambda: None}, repeats=1, device=torch.device("cpu"))
    assert order == []


@pytest.mark.parametrize("name", ["fpga", "", "meta", "cuda:99", "cpu:x"])
def test_unusable_devices(name):
    with pytest.raises(InputError) as caught:
        costs.usable_device(name)
    assert str(caught.value).startswith(f"--device {name}: ") and "\n" not in str(caught.value)
    assert costs.usable_device("cpu") == torch.device("cpu")


def test_tables_1_and_2(monkeypatch, capsys):
    """Every call is made once, and said to take 1.5 ms."""
    def untimed(calls, **_):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 1.5)

    monkeypatch.setattr(ops, "milliseconds_in_turn", untimed)
    ops.main([])
    rows = {line[4:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    for name, make in (ops.OPERATIONS | ops.AGGREGATIONS).items():
        count, _, ms, _ = rows[name]
        assert (count, ms) == (f"{costs.parameters(make(64)):,}", "1.50")


@pytest.mark.parametrize("script", ["ops.py", "dyncell.py", "controller.py"])
def test_help_and_a_bad_device(script, monkeypatch, capsys):
    assert as_script(monkeypatch, script, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")
    if script != "controller.py":
        assert as_script(monkeypatch, script, "--device", "fpga") == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: --device fpga: ") and err.count("\n") == 1
