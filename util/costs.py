"""The cost of a module: parameters, multiply-adds, time."""
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from util.errors import InputError, brief


def parameters(module):
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def multiply_adds(function, *inputs):
    """Multiply-adds of one call of function(*inputs), as torch counts them: of convolutions and matrix
    products, but not of bilinear sampling (4 a sample), sums and norms (1 or 2 an element)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() // 2


def milliseconds_in_turn(calls, repeats=5):
    """Median wall time of several calls: {name: function} -> {name: ms}. The calls take turns, so other load
    slows all of them alike. The first round is not counted, and of the two calls in a round only the second:
    the first brings its weights back into the cache."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def usable_device(name):
    """torch.device(name), after a test that it works. Raises InputError when it doesn't."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:    # else cuda:0 is initialised, too
            torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except Exception as error:               # each kind of device fails in its own way
        raise InputError(f"--device {name}: {brief(error)}") from None
    return device
