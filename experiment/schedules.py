"""Schedules of our own: a GPU's work cut to a CPU's, and the synthetic videos'. Each says what differs from
the defaults in train.py, the paper's for CamVid. And how long a recipe takes, and how much memory."""
import math
import shlex

import torch

import data
from dyncell import STATICS
from experiment.networks import SEARCHES, strategies
from util.costs import milliseconds_in_turn
from util.device import available, has_bf16
from util.errors import REMEDY
from util.files import load, read_log
from util.progress import duration

# All of them do without what costs much of a step, and stop candidates by a rule for short searches.
CPU = dict(auxiliary_cell=False, gradient_norm=0, input_pad=0, early_stop_rule="average")

# short: 100 minutes on two cores of a Xeon, 4 GB. Its pre-training: the trials of docs/results.md. The
# controller's rate is higher, as the paper's needs some 1000 samples (docs/ppo.md).
SHORT = dict(
    CPU, loss_stride=2, class_weights=1.1,
    static_epochs=40, static_batch=8, static_crop=(384, 480), static_scale_least=1.0,
    static_optimizer="adamw", static_lr_encoder=2e-4, static_lr_decoder=8e-4, static_weight_decay=1e-2,
    static_rate="cosine", static_average=0.99, validate_every=10,
    search_strategy="both", search_candidates=16, search_epochs=2, search_batch=16, controller_lr=3e-3,
    controller_rollout=4, controller_replay=0, controller_epochs=4, controller_entropy=1e-3,
    cells=1, cell=("attention",), cell_epochs=8, cell_batch=8,
    end_epochs=3, end_lr_cell=1e-3, end_crop=(240, 320), key_frames=(0, 3))

# smoke: only to see that everything runs.
SMOKE = dict(
    CPU, static_epochs=1, static_batch=16, static_crop=(32, 32), validate_every=0,
    cell_layers=2, search_candidates=4, search_epochs=1, search_batch=32, controller_rollout=2,
    cell_epochs=1, cell_batch=32, end_epochs=1, end_crop=(32, 32), key_frames=(0,))

# The demo, python train.py. Its frames have 96x128 pixels; to be done in four minutes it trains on crops.
# Mirror images would turn its camera the other way.
DEMO = dict(
    CPU, encoder_weights="none", static_epochs=10, static_batch=16, static_crop=(96, 96),
    static_scale=(0.8, 1.25), static_lr_encoder=2e-2, static_lr_decoder=2e-2, validate_every=5,
    input_crop=96, cell_layers=3,
    search_strategy="both", search_candidates=64, search_epochs=1, search_batch=12, controller_lr=3e-3,
    controller_rollout=2, controller_replay=0, controller_epochs=2, controller_entropy=1e-2,
    cells=1, median_cell=True, cell=("concat",), cell_epochs=6, end_epochs=1, end_crop=(96, 96),
    end_mirrored=False, key_frames=(0,))

SCHEDULES = {
    ("camvid", "short"): SHORT,
    ("camvid", "smoke"): SMOKE,
    ("cityscapes", "short"): dict(SHORT, class_weights=0, sequence_length=2, input_longer_side=1024,
                                  input_crop=512, cell_layers=4, key_frames=(0,)),
    ("cityscapes", "smoke"): dict(SMOKE, sequence_length=2, input_longer_side=1024, input_crop=512),
    ("synthetic", "paper"): dict(
        encoder_weights="none", static_crop=(96, 128), input_pad=0, end_crop=(96, 128)),
    ("synthetic", "short"): DEMO,
    ("synthetic", "smoke"): dict(SMOKE, encoder_weights="none"),
}


# ---- how long does a recipe take? -------------------------------------------------------------------------

# Time of a pixel in units of a pixel of a pre-training step (forward and backward, with auxiliary losses).
# Measured on a CPU in bf16; LAYER of a cell: the mean of twelve random cells. START: seconds of any stage.
STORE, LAYER, END_TO_END, EVALUATE, START = 0.25, 0.03, 0.7, 0.25, 5


def pixels_of(run):
    """{stage: pixels that are still to do}, in units of a pixel of a pre-training step. Of finetune and
    evaluate all is counted, also what the folder has."""
    r, frames = run.recipe, {split: sum(run.dataset(split).clips, []) for split in run.splits}
    frame, count, length = math.prod(run.frame_size()), len(frames["train"]), r.sequence_length
    labelled = sum(label is not None for _, label in frames["train"])
    alone = frame * labelled * (length - 1) * LAYER * r.cell_layers       # an epoch of a cell
    end = math.prod(r.end_crop) * labelled * length * END_TO_END * r.end_epochs
    static, store = run.path("static.pt"), frame * count * STORE
    trained = len(load(static)["history"]) if static.exists() else 0
    logged = sum(len(read_log(run.path(name))) for name, _, _ in SEARCHES.values())
    searches = max(0, len(strategies(r)) * r.search_candidates - logged)
    cells = (r.cells > 0) * (r.cells * len(strategies(r)) + r.without_past + r.median_cell) + len(r.cell)
    rows = 1 + r.seeds * (1 + cells * len(r.key_frames))
    return {
        "pretrain": math.prod(r.static_crop) * labelled * (r.static_epochs - trained),
        "search": (searches > 0) * store + searches * r.search_epochs * alone,
        "finetune": store + r.seeds * (cells * r.cell_epochs * alone + (cells + 1) * end),
        "evaluate": frame * sum(len(frames[split]) for split in run.splits[1:]) * EVALUATE * rows}


def seconds_per_pixel(run):
    """Seconds of a pixel of a pre-training step (no auxiliary losses) here, measured on two small images."""
    model = run.to_device(STATICS[run.recipe.static_network](run.num_classes))
    images = torch.randn(2, 3, 192, 192, device=run.device).contiguous(memory_format=torch.channels_last)

    def step():
        with run.autocast():
            model(images).float().sum().backward()
    return milliseconds_in_turn({"step": step}, 1)["step"] / 1000 / (2 * 192 * 192)


def seconds_of(run, stages):
    """Seconds that these stages will take: as expected, at the pace of the stages before. Those count by
    their length: a short one, whose start takes longer than its steps, says little of hours."""
    expected, before = (sum(run.expected[stage] for stage in some) for some in (stages, run.taken))
    return expected * (sum(run.taken.values()) + expected) / max(1e-9, before + expected)


def announce(run, command, recipe_for):
    """Prints how long this command's stages take (run.expected), and the flag of the other schedule."""
    speed, size = seconds_per_pixel(run) / run.world, run.frame_size()
    run.expected = {stage: START + speed * pixels
                    for stage, pixels in pixels_of(run).items() if stage in command.stages}
    print(f"about {duration(sum(run.expected.values()))} for {' '.join(run.expected)}, a first estimate")
    if (run.recipe.dataset, "short") not in SCHEDULES and size != data.CamVid.SIZE:
        print(f"its frames are {size[1]} x {size[0]}, and the recipe is CamVid's, made for 480 x 360; set "
              "--static-crop, --end-crop and --input-pad to match")
    if command.schedule != "smoke" and run.recipe.dataset != "synthetic":
        other = "short" if command.schedule == "paper" else "paper"
        lack = lacking(run, recipe_for(run.recipe.dataset, other))
        print(f"the other recipe: --schedule {other} --run {shlex.quote(f'{run.folder}-{other}')}"
              + f"; but here {lack}" * bool(lack))


# ---- how much memory does it take? ------------------------------------------------------------------------

# Bytes per pixel of a step in float32; bf16 takes 0.6 of them. Measured on a CPU as the peak of the resident
# memory. STATIC: an image. WHOLE: a frame of a sequence, end to end with `attention`. A_CELL: a later frame
# of stored outputs, with the cell that needs most. STORED: of the feature cache; layer1 takes 3 of them.
STATIC, WHOLE, A_CELL, STORED = 3100, 2600, 600, 5.4 + 3


def lacking(run, r, stages=("pretrain", "search", "finetune")):
    """Which of these stages need more memory than is available with the recipe r: for a step, and for the
    search's stored outputs. "" if none does. The estimate errs upwards by a tenth."""
    size, frames = run.frame_size(), sum(map(len, run.dataset("train").clips))
    sides = [side * (r.input_longer_side or max(size)) / max(size) for side in size]      # those of meta-val
    crop = [max(r.input_pad, min(r.input_crop, side)) for side in sides]                  # are not resized
    stored = STORED * frames * (math.prod(sides) + r.meta_val_share * math.prod(size))
    step = 1.1 * (0.6 if has_bf16(run.device) else 1)
    searching = step * A_CELL * r.search_batch * (r.sequence_length - 1) * math.prod(crop) + stored
    need = {"pretrain": step * STATIC * r.static_batch * math.prod(r.static_crop) / run.world,
            "search": searching if strategies(r) else 0,          # each process has its own candidate
            "finetune": step * WHOLE * r.cell_batch * r.sequence_length * math.prod(r.end_crop) / run.world}
    here, has = run.sharing, available(run.device) or math.inf
    return "; ".join(f"{stage}: needs {here * need[stage] / 1e9:.1f} GB, and {run.device} has "
                     f"{has / 1e9:.1f} GB, so {REMEDY[stage]}"
                     for stage in need if stage in stages and here * need[stage] > has)
