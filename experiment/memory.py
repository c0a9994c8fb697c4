"""Estimates the memory that a recipe needs, and says what to do if there is too little."""
import contextlib
import os
import pathlib

import torch

import data
from util.errors import REMEDY


# Bytes per pixel of a training step in float32; bf16 takes 0.6 of them. Measured on a CPU, as the peak of
# the resident memory minus that before the step. STATIC: 2 and 4 images of 320x320. END_TO_END: as many
# sequences of three, with `attention`. CELL: 8 and 16 sequences of stored outputs of 480x384, with the cell
# that needs most, per frame after the first.
STATIC, END_TO_END, CELL = 3100, 2600, 600


def needed(recipe, half):
    """{stage: bytes} that a training step needs. half: whether it runs in bf16."""
    r, share = recipe, 0.6 if half else 1.0
    size = getattr(data.DATASETS[r.dataset], "SIZE", (r.input_crop, r.input_crop))
    height, width = (max(r.input_pad, min(r.input_crop, side)) for side in size)
    later = r.sequence_length - 1            # frames of a sequence on which the cell runs
    return {"pretrain": share * STATIC * r.static_batch * r.static_crop[0] * r.static_crop[1],
            "search": share * CELL * r.search_batch * later * height * width,
            "finetune": share * END_TO_END * r.cell_batch * r.sequence_length * r.end_crop[0] * r.end_crop[1]}


def there(device):
    """Bytes of memory that the device has, on a GPU those that are free. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):                # a container's limit; "max": no limit
        sizes.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=None)


def warn(run, stages):
    """Prints a line for each stage that needs more memory than there is. An estimate: it stops nothing."""
    half, has = not isinstance(run.autocast(), contextlib.nullcontext), there(run.device)
    for stage, need in needed(run.recipe, half).items():
        if stage in stages and has and need / run.world > has:
            print(f"{stage}: will need about {need / 1e9:.0f} GB, but {run.device} has {has / 1e9:.0f} GB; "
                  f"{REMEDY[stage]}, or take --schedule short")
