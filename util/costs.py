"""The cost of a module (parameters, multiply-adds, time, memory), and the tables of ops.py and dyncell.py.

Multiply-adds are those of convolutions and matrix products. Times are medians in ms; the calls to be
compared take turns.
"""
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import InputError
from dyncell import CELLS, Arch2, DynamicCell, VideoSegmenter, fold_batchnorm
from ops import AGGREGATIONS, OPERATIONS


def parameters(module):
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def multiply_adds(function, *inputs):
    """Multiply-adds of one call of function(*inputs), as torch counts them: convolutions and matrix products.

    Bilinear sampling (4 a sample), sums and norms (1 or 2 an element) are not counted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() // 2


def synchronise(device=None):
    """Waits until the device has finished its work. None: the current accelerator, if there is one."""
    if device is None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    elif torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def milliseconds_in_turn(calls, repeats=5, device=None):
    """Median wall time in ms of each of several calls: {name: function} -> {name: ms}.

    The calls take turns, so other load on the machine slows all of them alike, and their ratios stay right.
    The first round is not counted. In each round a call is made twice, and only the second is timed: the
    first brings its weights back into the cache. `device` is the device to wait for, as in
    `synchronise`."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            call()
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def milliseconds(function, *inputs, repeats=5, device=None):
    """Median wall time in ms of function(*inputs), after one round that is not counted."""
    return milliseconds_in_turn({"": lambda: function(*inputs)}, repeats, device)[""]


def megabytes_kept(module, *inputs):
    """Memory in MB that a call allocates and keeps for its backward pass, including its result."""
    kept = {}                                # address: storage, kept alive so that no address is reused

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        note(module(*inputs))
    for x in (*inputs, *module.parameters(), *module.buffers()):  # these were there before the call
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values()) / 1e6


def usable_device(name):
    """torch.device(name), after a test that it works. Raises InputError when it doesn't."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        synchronise(device)
    except Exception as error:               # each kind of device fails in its own way
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"--device {name}: {reason}") from None
    return device


# ---------------------------------------------------------------------------------------------------------
# Tables 1 and 2: operations and aggregations (`python ops.py`)

def print_costs(title, modules, inputs):
    """Prints a row per module of {name: module}. Each is called with the same inputs, which must require a
    gradient."""
    def forward(module):
        with torch.no_grad():
            module(*inputs)

    def forward_backward(module):
        out = module(*inputs)
        if out.requires_grad:                # the result of `zero` doesn't
            out.sum().backward()

    calls = {}
    for name, module in modules.items():
        calls[name, "forward"] = lambda module=module: forward(module)
        calls[name, "both"] = lambda module=module: forward_backward(module)
    ms = milliseconds_in_turn(calls, device=inputs[0].device)
    print(f"\n{title:24} {'parameters':>10} {'M mult-adds':>12} {'ms forward':>11} {'ms fwd+bwd':>11} "
          f"{'MB kept':>8}")
    for token, (name, module) in enumerate(modules.items()):
        millions = multiply_adds(module, *inputs) / 1e6
        print(f"{token:3} {name:20} {parameters(module):10,} {millions:12.1f} {ms[name, 'forward']:11.2f} "
              f"{ms[name, 'both']:11.2f} {megabytes_kept(module, *inputs):8.1f}")


def print_tables_1_and_2(device):
    """Every operation and aggregation; then a plain and a deformable convolution on a whole batch."""
    channels, size = 64, (45, 60)

    def maps(count, batch, size):
        return [torch.randn(batch, channels, *size).to(device).requires_grad_() for _ in range(count)]

    torch.manual_seed(0)
    operations = {name: make(channels).to(device).eval() for name, make in OPERATIONS.items()}
    aggregations = {name: make(channels).to(device).eval() for name, make in AGGREGATIONS.items()}
    print(f"At {channels} channels, {size[0]} x {size[1]} (1/8 of a CamVid frame), batch 1, float32, device "
          f"{device},\n{torch.get_num_threads()} threads. MB kept: memory that a forward pass keeps for "
          "the backward pass,\nincluding its result.")
    print_costs("Table 1: operations", operations, maps(1, 1, size))
    print_costs("Table 2: aggregations", aggregations, maps(2, 1, size))
    two = {name: operations[name] for name in ("conv3x3", "deform3x3")}
    print_costs("batch 16, 50 x 60", two, maps(1, 16, (50, 60)))  # 1/8 of a padded frame (Sect. 4.1)


# ---------------------------------------------------------------------------------------------------------
# Table 5: the cost of a frame (`python dyncell.py`)

def frame_calls(width, height, arch2, cells, device="cpu"):
    """The ways to process a frame, {name: function}: the encoder alone, arch2, and for each cell the
    encoder and the cell, as on a later frame. For inference: batch norms folded, channels_last, batch 1,
    float32."""
    def prepared(module):
        return fold_batchnorm(module).to(device, memory_format=torch.channels_last)

    image = torch.randn(1, 3, height, width).to(device, memory_format=torch.channels_last)
    arch2 = prepared(arch2)
    _, state = VideoSegmenter(arch2, None).step(image)
    calls = {"encoder alone": lambda: arch2.encode(image), "arch2": lambda: arch2(image)}
    for name, cell in cells.items():
        video = VideoSegmenter(arch2, prepared(cell))
        calls[f"arch2 + {name}"] = lambda video=video: video.step(image, state)
    return calls


def print_frames(title, calls, counts, repeats, device=None):
    """Prints a row per call of `frame_calls`. counts: {name: parameters}."""
    ms = milliseconds_in_turn(calls, repeats, device)
    print(f"\n{title:24} {'parameters':>11} {'G mult-adds':>12} {'ms':>8} {'/ encoder':>10} {'/ arch2':>8}")
    for name, call in calls.items():
        print(f"{name:24} {counts[name]:11,} {multiply_adds(call) / 1e9:12.2f} {ms[name]:8.1f} "
              f"{ms[name] / ms['encoder alone']:10.2f} {ms[name] / ms['arch2']:8.2f}")


def print_pixels(title, sizes, arch2, cell, device=None):
    """Prints the time at each of some sizes (width, height), and the time per megapixel."""
    print(f"\n{'time against pixels':24} {'arch2 ms':>10} {'ms / Mpixel':>12} {title + ' ms':>12} "
          f"{'ms / Mpixel':>12}")
    for width, height in sizes:
        ms = milliseconds_in_turn(frame_calls(width, height, arch2, {"cell": cell}, device), 5, device)
        key, later = ms["arch2"], ms["arch2 + cell"]
        size, megapixels = f"{width} x {height}", width * height / 1e6
        print(f"{size:24} {key:10.1f} {key / megapixels:12.0f} {later:12.1f} {later / megapixels:12.0f}")


@torch.no_grad()
def print_table_5(device):
    """arch2 and every cell of CELLS at the sizes of both datasets, then time against pixels."""
    torch.manual_seed(0)
    camvid, cityscapes = Arch2(11).eval().to(device), Arch2(19).eval().to(device)
    cells, counts = {}, {"encoder alone": parameters(camvid.encoder)}
    for name, genotype in CELLS.items():
        static = cityscapes if name in ("cell2", "cell3") else camvid
        cells[name] = DynamicCell(genotype, static.num_classes).eval()
        counts[f"arch2 + {name}"] = parameters(static) + parameters(cells[name])
    print(f"Table 5: one frame, float32, device {device}, {torch.get_num_threads()} threads, batch norms\n"
          "folded and channels_last, except for 'arch2, as it is'. 'arch2 + ...': a later frame.\n"
          "cell0 to cell3 are reconstructions. Times are medians of calls made in turn.")

    calls = frame_calls(480, 360, camvid, cells, device)
    image = torch.randn(1, 3, 360, 480).to(device)
    calls["arch2, as it is"] = lambda: camvid(image)
    counts["arch2"] = counts["arch2, as it is"] = parameters(camvid)
    print_frames("480 x 360 (CamVid)", calls, counts, 9, device)

    some = {name: cells[name] for name in ("propagate", "cell2", "cell3")}
    counts["arch2"] = parameters(cityscapes)
    calls = frame_calls(2048, 1024, cityscapes, some, device)
    print_frames("2048 x 1024 (CityScapes)", calls, counts, 3, device)
    print("Paper, on a 1080Ti: 50.5 to 52.6 ms / 92.4 ms = 0.55 to 0.57. The encoder alone is the floor of a "
          "later frame.")
    print_pixels("+ cell1", [(240, 180), (480, 360), (960, 720)], camvid, cells["cell1"], device)
