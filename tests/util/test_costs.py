"""What a module costs, by hand; the tables of ops.py; the scripts' --help and --device."""
import time

import pytest
import torch
from whole_run import as_script

import ops
from util import costs


def test_multiply_adds_and_parameters_of_a_convolution():
    conv = ops.OPERATIONS["conv3x3"](8).eval()
    assert costs.multiply_adds(conv, torch.zeros(1, 8, 5, 6)) == 9 * 8 * 8 * 5 * 6
    assert costs.parameters(conv) == 9 * 8 * 8 + 2 * 8


def test_milliseconds_take_turns_and_an_accelerator_is_waited_for(monkeypatch):
    """A first round doesn't count; then the median of each second call: what is slow at first is not seen."""
    order, pauses = [], iter((0.05, 0.05, 0.05, 0.03, 0.05, 0.001, 0.05, 0.001))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: order.append("wait"))
    ms = costs.milliseconds_in_turn({"a": lambda: order.append("a") or time.sleep(next(pauses)),
                                     "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "wait", "a", "wait", "b", "wait", "b", "wait"] * 4
    assert 1 <= ms["a"] < 12 and ms["b"] < ms["a"]


def test_tables_1_and_2(monkeypatch, capsys):
    """Every call is made once, and said to take 1.5 ms."""
    monkeypatch.setattr(ops, "milliseconds_in_turn", lambda calls: {
        name: call() is None or 1.5 for name, call in calls.items()})
    ops.main([])
    rows = {line[4:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    for name, make in (ops.OPERATIONS | ops.AGGREGATIONS).items():
        count, _, ms = rows[name]
        assert (count, ms) == (f"{costs.parameters(make(64)):,}", "1.50")


@pytest.mark.parametrize("script, device", [("ops.py", "fpga"), ("dyncell.py", "meta")])
def test_help_and_a_bad_device(script, device, monkeypatch, capsys):
    assert as_script(monkeypatch, script, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")
    assert as_script(monkeypatch, script, "--device", device) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: --device {device}: ") and err.count("\n") == 1
