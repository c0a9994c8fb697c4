"""Schedules of our own, in place of the paper's: a GPU's work cut to a CPU's, and the synthetic videos'. Each
says what differs from the defaults in train.py, which are the paper's for CamVid. And how long and how much
memory a recipe takes."""
import math
import shlex
import time

import torch

import data
from dyncell import STATICS
from experiment.networks import SEARCHES, strategies
from util.device import available, has_bf16
from util.errors import REMEDY, InputError
from util.files import load, read_log
from util.progress import duration

NAMES = "paper", "short", "smoke"

# short: two to two and a half hours on two cores, 8 GB. Its pre-training: the trials of docs/results.md. The
# controller's rate is higher, as the paper's needs its 1000 samples (docs/ppo.md).
SHORT = dict(
    auxiliary_cell=False, gradient_norm=0, loss_stride=2,
    static_epochs=40, static_batch=8, static_crop=(384, 480), static_scale_least=1.0,
    static_optimizer="adamw", static_lr_encoder=2e-4, static_lr_decoder=8e-4, static_weight_decay=1e-2,
    static_rate="cosine", static_average=0.99, validate_every=10,
    input_pad=0, search_strategy="both", search_candidates=16, search_epochs=2, search_batch=16,
    early_stop_rule="average", controller_lr=3e-3, controller_rollout=4, controller_replay=0,
    controller_epochs=4, controller_entropy=1e-3,
    cells=1, cell=("attention",), cell_epochs=8, cell_batch=8,
    end_epochs=3, end_lr_cell=1e-3, end_crop=(240, 320), key_frames=(0, 3))

# smoke: only to see that everything runs.
SMOKE = dict(
    auxiliary_cell=False, gradient_norm=0,
    static_epochs=1, static_batch=16, static_crop=(32, 32), validate_every=0,
    input_pad=0, cell_layers=2, search_candidates=4, search_epochs=1, search_batch=32, controller_rollout=2,
    early_stop_rule="average",
    cell_epochs=1, cell_batch=32, end_epochs=1, end_crop=(32, 32), key_frames=(0,))

# The demo, python train.py. Its frames have 96x128 pixels; to be done in four minutes it trains on crops.
# Mirror images would turn its camera the other way.
DEMO = dict(
    encoder_weights="none", auxiliary_cell=False, gradient_norm=0,
    static_epochs=10, static_batch=16, static_crop=(96, 96), static_scale=(0.8, 1.25),
    static_lr_encoder=2e-2, static_lr_decoder=2e-2, validate_every=5,
    input_crop=96, input_pad=0, cell_layers=3,
    search_strategy="both", search_candidates=64, search_epochs=1, search_batch=12,
    early_stop_rule="average", controller_lr=3e-3, controller_rollout=2, controller_replay=0,
    controller_epochs=2, controller_entropy=1e-2,
    cells=1, median_cell=True, cell=("concat",), cell_epochs=6, end_epochs=1, end_crop=(96, 96),
    end_mirrored=False, key_frames=(0,))

SCHEDULES = {
    ("camvid", "short"): SHORT,
    ("camvid", "smoke"): SMOKE,
    ("cityscapes", "short"): dict(
        SHORT, sequence_length=2, input_longer_side=1024, input_crop=512, cell_layers=4, key_frames=(0,)),
    ("cityscapes", "smoke"): dict(SMOKE, sequence_length=2, input_longer_side=1024, input_crop=512),
    ("synthetic", "paper"): dict(
        encoder_weights="none", static_crop=(96, 128), input_pad=0, end_crop=(96, 128)),
    ("synthetic", "short"): DEMO,
    ("synthetic", "smoke"): dict(SMOKE, encoder_weights="none"),
}


# ---------------------------------------------------------------------------------------------------------
# How long does a recipe take?

# Time of a pixel in units of a pixel of a pre-training step (forward and backward, with auxiliary losses).
# Measured on a CPU in bf16; a cell: the mean of twelve random ones.
STORE, CELL, SCORE, END_TO_END, EVALUATE = 0.25, 0.15, 0.05, 0.7, 0.25


def cells_of(recipe):
    """How many cells of a recipe are trained, with each seed."""
    r = recipe
    found = r.cells * len(strategies(r)) + r.without_past + r.median_cell if r.cells else 0
    return found + len(r.cell)


def pixels_of(recipe, run):
    """{stage: pixels}, in units of a pixel of a pre-training step, that the stages of a recipe take."""
    r, frames = recipe, {split: sum(map(len, run.dataset(split).clips)) for split in run.splits}
    length, later, count = r.sequence_length, r.sequence_length - 1, frames["train"]
    frame = math.prod(run.frame_size())
    searches = len(strategies(r)) * r.search_candidates
    cells = cells_of(r)
    labelled = count if length > 2 else count // 2                # CityScapes: every second frame
    alone = r.seeds * cells * r.cell_epochs * labelled * later * CELL
    end = r.seeds * (cells + 1) * r.end_epochs * labelled * length * END_TO_END
    rows = 1 + r.seeds * (1 + cells * len(r.key_frames))
    return {
        "pretrain": r.static_epochs * labelled * r.static_crop[0] * r.static_crop[1],
        "search": (searches > 0) * frame * count * STORE + frame * searches * labelled * later
        * (r.search_epochs * CELL + 2 * r.meta_val_share * SCORE),
        "finetune": frame * (count * STORE + alone) + end * r.end_crop[0] * r.end_crop[1],
        "evaluate": rows * EVALUATE * frame * sum(frames[split] for split in run.splits[1:])}


def seconds_per_pixel(run):
    """Seconds of a pixel of a pre-training step on this device, measured on two small images."""
    model = run.to_device(STATICS[run.recipe.static_network](run.num_classes))
    images = torch.randn(2, 3, 192, 192, device=run.device).contiguous(memory_format=torch.channels_last)
    for _ in range(2):                       # the first one also sets up
        start = time.time()
        with run.autocast():
            pred = model(images)
        pred.float().sum().backward()
        pred.sum().item()                    # waits for a GPU
    return (time.time() - start) / (2 * 192 * 192)


def left_of(run):
    """{stage: the share of it that is still to do}, roughly, by what the run's folder holds."""
    r, shares = run.recipe, {}
    if run.path("static.pt").exists() and r.static_epochs:
        shares["pretrain"] = len(load(run.path("static.pt"))["history"]) / r.static_epochs
    for strategy in strategies(r):
        logged = len(read_log(run.path(SEARCHES[strategy][0])))
        shares["search"] = shares.get("search", 0) + logged / r.search_candidates / len(strategies(r))
    made = [path for path in run.folder.glob("*.pt") if not path.stem.endswith("-alone")
            and path.stem not in ("static", "controller", "examples")]
    shares["finetune"] = len(made) / (r.seeds * (1 + cells_of(r)))
    if run.path("results.json").exists():
        shares["evaluate"] = "best" in load(run.path("results.json"))
    return {stage: 1 - min(1, share) for stage, share in shares.items()}


def seconds_of(run, stages):
    """Seconds that these stages will take: as expected, at the pace of the stages before. Those count by
    their length: a short one, whose start takes longer than its steps, says little of hours."""
    expected, before = (sum(run.expected[stage] for stage in some) for some in (stages, run.taken))
    pace = (sum(run.taken.values()) + expected) / max(1e-9, before + expected)
    return pace * expected


def announce(run, command, recipe_for):
    """Prints the first line of a run: its schedule and about how long its stages take here; and how to have
    the other schedule. Sets run.expected, {stage: seconds} of this command's stages."""
    r, dataset = run.recipe, run.recipe.dataset
    speed, left = seconds_per_pixel(run) / run.world, left_of(run)
    run.expected = {stage: speed * pixels * left.get(stage, 1)
                    for stage, pixels in pixels_of(r, run).items() if stage in command.stages}
    threads = f"{torch.get_num_threads()} threads"
    if run.world > 1:
        threads += f" in each of {run.world} processes"
    print(f"{run.folder}: {dataset}, schedule {command.schedule}, on {run.device}, {threads}: about "
          f"{duration(sum(run.expected.values()))} for {' '.join(run.expected)}")
    size = run.frame_size()
    if dataset not in ("camvid", "cityscapes", "synthetic") and size != data.CamVid.SIZE:
        print(f"{dataset}: its frames are {size[1]} x {size[0]}, and the recipe is CamVid's, made for 480 x "
              "360; set --static-crop, --end-crop and --input-pad to match")
    if command.schedule in ("paper", "short") and dataset != "synthetic":
        other = "short" if command.schedule == "paper" else "paper"
        pixels = pixels_of(recipe_for(dataset, other), run)
        print(f"the other recipe: --schedule {other} --run {shlex.quote(f'runs/{dataset}-{other}')}, about "
              f"{duration(speed * sum(pixels.values()))} here for all stages")


# ---------------------------------------------------------------------------------------------------------
# How much memory does a training step take?

# Bytes per pixel of a step in float32; bf16 takes 0.6 of them. Measured on a CPU as the peak of the resident
# memory, minus that before the step. STATIC: 2 and 4 images of 320x320. WHOLE: as many sequences of three,
# with `attention`. A_CELL: 8 and 16 sequences of stored outputs of 480x384, with the cell that needs most,
# per frame after the first. STORED: of the feature cache; with layer1, in half precision, 3 bytes more.
STATIC, WHOLE, A_CELL, STORED = 3100, 2600, 600, 5.4 + 3


def check_memory(run, stage):
    """Raises InputError if a stage will need more memory than is available: a step, and the search's stored
    outputs. The estimate errs upwards by a tenth."""
    r, size = run.recipe, run.frame_size()
    longer = r.input_longer_side or max(size)
    sides = [side * longer / max(size) for side in size]          # resized, then cropped or padded
    crop = [max(r.input_pad, min(r.input_crop, side)) for side in sides]
    step, stored = 0, 0
    if stage == "pretrain":
        step = STATIC * r.static_batch * math.prod(r.static_crop)
    elif stage == "search" and strategies(r):                     # meta-val is not resized
        step = A_CELL * r.search_batch * (r.sequence_length - 1) * math.prod(crop)
        frames = sum(map(len, run.dataset("train").clips))
        stored = STORED * frames * (math.prod(sides) + r.meta_val_share * math.prod(size))
    elif stage == "finetune":
        step = WHOLE * r.cell_batch * r.sequence_length * math.prod(r.end_crop)
    if stage != "search":                    # torchrun's processes share a batch, each has a candidate
        step /= run.world
    need = 1.1 * (0.6 if has_bf16(run.device) else 1) * step + stored
    need, has = need * run.sharing, available(run.device)
    if has is not None and need > has:
        raise InputError(f"{stage}: needs {need / 1e9:.1f} GB, and {run.device} has {has / 1e9:.1f} GB; "
                         f"{REMEDY[stage]}")
