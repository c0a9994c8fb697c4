"""The whole method in one command: pretrain, search, finetune, evaluate (Sect. 4, 6).

    python train.py                                                       synthetic videos, minutes on a CPU
    python train.py --dataset camvid --data DIR                           the paper's recipe (a GPU's work)
    python train.py --dataset camvid --data DIR --schedule short          the same steps, about two hours on a CPU
    python train.py --dataset camvid --data DIR --stage evaluate          one stage
    python train.py --help                                                every hyper-parameter and its section

In the order of the work: the recipe, the run folder, training loops, the four stages, the command line.
Everything a run makes lies in one folder (runs/DATASET unless --run says otherwise); the same command again
goes on where it stopped, to the same result.
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import signal
import statistics
import sys
import time
import typing

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data
import figures
from controller import PPO, Controller
from data import Confusion, Consistency, Frames, InputError
from dyncell import CELLS, Arch2, DynamicCell, Genotype, VideoSegmenter, fold_batchnorm
from ops import milliseconds, milliseconds_in_turn, multiply_adds, parameters


# ---------------------------------------------------------------------------------------------------------
# The recipe: every hyper-parameter, where the paper gives it, and three schedules

def field(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Recipe:
    """The defaults are the paper's for CamVid. [ours] marks what it doesn't say. Each field is a flag."""

    dataset: str = field("camvid", "camvid, cityscapes or synthetic")
    seed: int = field(0, "every random choice comes from it")
    encoder_weights: str = field("imagenet", "imagenet (downloaded once), a local file in torchvision's keys, or none (Sect. 3.1)")
    # Static pre-training
    static_epochs: int = field(2000, "Sect. 6: epochs of pre-training")
    static_batch: int = field(32, "Sect. 6: images a batch")
    static_crop: tuple[int, int] = field((600, 600), "Sect. 6: random crop, height and width")
    static_scale: tuple[float, float] = field((0.5, 2.0), "Sect. 6: random scale, from and to")
    static_lr_encoder: float = field(5e-2, "Sect. 6: SGD's learning rate, encoder")
    static_lr_decoder: float = field(1e-2, "Sect. 6: SGD's learning rate, decoder")
    momentum: float = field(0.9, "Sect. 4.2, 6: momentum of SGD")
    weight_decay: float = field(1e-5, "[ours], from [18]: weight decay of SGD")
    poly_power: float = field(0.9, "Sect. 6: rate * (1 - step / steps) ** power; the power, and that every training has it: [ours]")
    auxiliary_weight: float = field(0.3, "Sect. 6: weight of the auxiliary classifiers' losses")
    validate_every: int = field(100, "[ours]: epochs between looks at the val split while pre-training; 0 never")
    # Search
    sequence_length: int = field(3, "Sect. 4.1: consecutive frames in a training sequence")
    input_longer_side: int = field(0, "Sect. 4.1: for the search, images are resized so; 0 leaves them (CityScapes: 1024)")
    input_crop: int = field(600, "Sect. 4.1: for the search, images are cropped to this square; at the centre: [ours]")
    input_pad: int = field(400, "Sect. 4.1: shorter side mean-padded to this: 480x360 -> 480x400; 0 for none")
    cell_layers: int = field(5, "Sect. 3.2: layers of a cell, L")
    meta_val_share: float = field(0.1, "Sect. 4.1: share of the training sequences that score the candidates")
    search_candidates: int = field(1000, "[ours]: number of sampled cells")
    search_epochs: int = field(20, "Sect. 4.1: epochs a candidate")
    search_batch: int = field(48, "Sect. 4.1: sequences a batch")
    cell_lr: float = field(8e-3, "Sect. 4.1, 4.2: Adam's learning rate for a cell on the frozen static network (CityScapes: [ours])")
    early_stop: bool = field(True, "Sect. 3.3: stop a candidate half way that is below the running average")
    early_stop_decay: float = field(0.9, "[ours]: decay of that running average")
    search_strategy: str = field("ppo", "Sect. 3.3: ppo; [ours]: random, every token drawn uniformly; both, one after the other")
    latency_weight: float = field(0.0, "Sect. 1's outlook [ours]: W of reward * (time / target) ** -W; 0 for the paper's reward")
    latency_target: float = field(0.0, "[ours]: that target, ms a frame of the cell alone; 0 for the time of the decoder it replaces")
    controller_lr: float = field(1e-4, "Sect. 4.1: Adam's learning rate for the controller")
    controller_clip: float = field(0.1, "[18]: PPO's clip")
    controller_baseline_decay: float = field(0.95, "[18]: decay of the reward's running mean")
    controller_rollout: int = field(1, "[ours], measured in controller.py: candidates an update")
    controller_epochs: int = field(4, "[ours], measured in controller.py: optimiser steps an update")
    controller_entropy: float = field(1e-3, "[ours]: weight of the entropy bonus")
    # End-to-end training
    cells: int = field(2, "Sect. 4.2: number of best cells trained on the full training split; 0: no search, only --cell")
    cell: tuple[str, ...] = field((), f"[ours]: cells to train by name: {', '.join(CELLS)}; decoder: arch2's own in a cell's place")
    without_past: bool = field(True, "[ours]: train the best cell also with zeros in place of the previous frame")
    seeds: int = field(1, "[ours]: times that the baseline and every cell are trained; the table has mean and deviation")
    cell_epochs: int = field(10, "Sect. 4.2: epochs of the cell alone, static network frozen")
    cell_mirrored: bool = field(False, "[ours]: the cell alone also sees mirror images (twice the memory)")
    cell_dropout: float = field(0.0, "[ours]: share of the stored channels zeroed in each step of the cell alone")
    cell_batch: int = field(16, "Sect. 4.2: sequences a batch, cell alone and end to end")
    end_epochs: int = field(100, "Sect. 4.2: epochs end to end; 0: every network keeps the static one's encoder")
    end_lr_cell: float = field(4e-3, "Sect. 4.2: Adam's learning rate for the cell, end to end")
    end_lr_static: float = field(5e-4, "Sect. 4.2: SGD's learning rate for the static network, end to end")
    end_crop: tuple[int, int] = field((400, 480), "Sect. 4.2: crop (where the image is smaller: mean-padding), height and width")
    end_scale: tuple[float, float] = field((1.0, 1.0), "[ours]: random scale end to end")
    # Evaluation
    key_frames: tuple[int, ...] = field((0, 10, 3), "[ours]: key-frame distances to evaluate; 0: first frame of a clip only")


# What a run compares and where it has key frames, not how a network is made: may change between two starts of a run.
COMPARED = "cell", "without_past", "seeds", "key_frames"

CITYSCAPES = dict(static_epochs=1000, static_batch=28, static_crop=(800, 800), sequence_length=2, input_longer_side=1024,
                  input_crop=512, input_pad=0, cell_layers=4, search_epochs=10, cell_epochs=200, end_epochs=200,
                  end_crop=(769, 769), validate_every=50, key_frames=(0,))
# Cut to a CPU. The controller learns faster so (controller.PPO has the table): the paper's rate needs its 1000 samples.
SHORT = dict(static_epochs=60, static_batch=8, static_crop=(360, 480), static_scale=(0.7, 1.4), static_lr_encoder=2e-2,
             static_lr_decoder=2e-2, validate_every=5, input_pad=0, search_strategy="both", search_candidates=24, search_epochs=2,
             search_batch=16, controller_lr=3e-3, controller_rollout=4, cells=1, cell=("attention", "decoder"), cell_epochs=24,
             cell_mirrored=True, cell_dropout=0.4, cell_batch=8, end_epochs=3, end_lr_cell=1e-3, end_crop=(360, 480))
SYNTHETIC = dict(encoder_weights="none", static_epochs=10, static_batch=16, static_crop=(96, 128), static_scale=(0.8, 1.25),
                 validate_every=5, cell_layers=3, search_strategy="ppo", search_candidates=8, search_epochs=4, controller_rollout=4,
                 cells=2, cell=(), cell_epochs=8, cell_mirrored=False, cell_dropout=0.0, cell_batch=16, end_crop=(96, 128),
                 end_epochs=1, end_lr_cell=4e-3, key_frames=(0, 3))
SMOKE = dict(static_epochs=1, static_batch=16, static_crop=(32, 32), validate_every=0, input_pad=0, cell_layers=2,
             search_candidates=4, search_epochs=1, search_batch=32, controller_rollout=2, cell_epochs=1, cell_dropout=0.1,
             cell_batch=32, end_epochs=1, end_crop=(32, 32), key_frames=(0,))
SCHEDULES = {
    ("camvid", "paper"): {}, ("cityscapes", "paper"): CITYSCAPES,
    ("synthetic", "paper"): dict(encoder_weights="none", static_crop=(96, 128), input_pad=0, end_crop=(96, 128)),
    ("camvid", "short"): SHORT, ("cityscapes", "short"): {**CITYSCAPES, **SHORT}, ("synthetic", "short"): {**SHORT, **SYNTHETIC},
    ("camvid", "smoke"): SMOKE, ("cityscapes", "smoke"): {**CITYSCAPES, **SMOKE},
    ("synthetic", "smoke"): dict(SMOKE, encoder_weights="none"),
}


def recipe_for(dataset, schedule, **changes):
    """The recipe of a schedule (paper, short or smoke) for a dataset, with changes. One's own dataset gets CamVid's."""
    defaults = SCHEDULES.get((dataset, schedule), SCHEDULES["camvid", schedule])
    return Recipe(**{"dataset": dataset, **defaults, **changes})


def generator(*key):
    """A random generator for (seed, what it is for, ...): what one stage draws never depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------------------
# The run folder: one place that saves, one that loads, one that reports

def save(path, content):
    """Writes beside, flushes, renames: a file is whole or not there. Tensors and plain values, or JSON by name."""
    path = pathlib.Path(path)
    beside, whole = path.with_name(path.name + ".writing"), io.BytesIO()
    if path.suffix == ".json":
        whole.write(json.dumps(content, indent=1).encode())
    else:
        torch.save(content, whole)
    try:
        with open(beside, "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:                          # a full disk: what was there before stays
        beside.unlink(missing_ok=True)
        raise


def load(path):
    """What save() wrote. Raises InputError naming the file."""
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}); restore it or use another "
                         "--run") from None


def fill(module, state, path):
    """load_state_dict, strictly. Raises InputError naming the file when it is the state of something else."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is the checkpoint of another network ({' '.join(str(error).split())[:120]}); "
                         "use another --run") from None


def as_recipe(saved, path):
    """A saved recipe. Raises InputError naming the fields when another version of this file wrote it."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    if not isinstance(saved, dict) or saved.keys() != known:
        raise InputError(f"{path}: made by another version ({', '.join(sorted(known ^ set(saved)))}); use another --run")
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})


def differing(saved, recipe, until=None):
    """The fields in which two recipes differ, as one text, or "". Those after `until` don't count, nor does COMPARED."""
    saved, now = dataclasses.asdict(saved), dataclasses.asdict(recipe)
    names = list(now)[:list(now).index(until) + 1 if until else None]
    names = [name for name in names if saved[name] != now[name] and name not in COMPARED]
    more = f"; and {len(names) - 6} more" if len(names) > 6 else ""
    return "; ".join(f"{name} {saved[name]!r} there, {now[name]!r} now" for name in names[:6]) + more


def load_checkpoint(run, path):
    """load() for what a training saved with its recipe. Raises InputError naming the fields when it was another."""
    saved = load(path)
    if not isinstance(saved, dict) or "recipe" not in saved:
        raise InputError(f"{path}: holds no training's result; use another --run")
    until = "validate_every" if path.name.startswith("static.") else None                 # it knows nothing of the search
    if other := differing(as_recipe(saved["recipe"], path), run.recipe, until):
        raise InputError(f"{path}: is the checkpoint of another recipe ({other}); remove it or use another --run")
    return saved


def read_log(path):
    """A JSON-lines log of candidates -> {candidate: entry}. A torn last line (the machine stopped while it was
    written) is cut off. Candidates that are missing are trained again, to the same entry."""
    if not path.exists():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        print(f"{path}: the last line is torn, cut off")
        with open(path, "r+b") as file:
            file.truncate(len(whole + newline))
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        log = {entry["candidate"]: entry for entry in entries}
        if len(log) < len(entries) or not all({"tokens", "reward", "half_reward", "status"} <= entry.keys() for entry in entries):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: a line is no candidate's, or a candidate has two; restore it or use another --run") from None
    return log


def append_log(path, entry):
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Progress:
    """One line of progress: rewritten on a terminal, else a plain line now and then. On the way it says how long the
    stage will take on this device, once it has been measured."""

    def __init__(self, stage, steps, done=0):
        self.stage, self.steps, self.first = stage, steps, done
        self.start = self.last = time.time()
        self.tty, self.estimated = sys.stdout.isatty(), False

    def update(self, step, **figures):
        now, made = time.time(), step - self.first
        left = (now - self.start) / max(made, 1) * (self.steps - step)
        if not self.estimated and made > 1 and now - self.start > 20:                # the first steps warm up
            self.estimated = True
            self._print(f"{self.stage}: {self.steps} steps, {(now - self.start) / made:.2f} s each: about {duration(left)}", "\n")
        if now - self.last > (0.2 if self.tty else 30) or step == self.steps:
            self.last = now
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._print(f"{self.stage} {step}/{self.steps}  {text}  {duration(left)} left",
                        "" if self.tty and step < self.steps else "\n")

    def _print(self, text, end):
        print(("\r\033[K" if self.tty else "") + text, end=end, flush=True)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Run:
    """A run's folder, its recipe, its device, its data, and its place among torchrun's processes.

    Every process does the same work on the same files, but for three things: a batch is shared out (fit), and so are
    the candidates of a round (explore); and only rank 0 writes."""

    def __init__(self, folder, recipe, root=None, device=None):
        self.folder, self.recipe, self.root = pathlib.Path(folder), recipe, root
        self.rank, self.world, self.store = 0, 1, dist.HashStore()
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.zeros(0, device=device or best).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {device}: cannot be used here ({str(error).splitlines()[0][:80]})") from None
        self.num_classes = len(data.DATASETS[recipe.dataset].classes)
        self.splits = ("train", "val") if recipe.dataset == "cityscapes" else ("train", "val", "test")   # it keeps its test labels
        self._frames = {}

    def join(self):
        """Meets torchrun's other processes, if there are any: nccl where each has a GPU of its own, else gloo."""
        self.rank, self.world = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
        if self.world > 1:
            # Who waits for a process that died hears no handler, and torchrun would wait 30 s for him. A run may end anywhere.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for name in ("static_batch", "cell_batch"):                   # gap's batch norm has one value an image
                if getattr(self.recipe, name) < 2 * self.world:
                    raise InputError(f"{flag(name)} {getattr(self.recipe, name)}: {self.world} processes share it, two images "
                                     f"each at the least: {2 * self.world} or more")
            gpus, forever = torch.cuda.device_count(), datetime.timedelta(days=365)       # a candidate may take hours
            if self.device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
                self.device = torch.device("cuda", torch.cuda.current_device())
            own = self.device.type == "cuda" and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
            self.store, _, _ = next(dist.rendezvous("env://", timeout=forever))
            dist.init_process_group("nccl" if own else "gloo", store=dist.PrefixStore("group", self.store), rank=self.rank,
                                    world_size=self.world, timeout=forever)
        if self.rank:
            sys.stdout = open(os.devnull, "w")                            # one process reports

    def wait(self):
        """Until every process is here, so that they see the same files."""
        if self.world > 1:
            dist.barrier()

    def path(self, name):
        return self.folder / name

    def frames(self, split):
        """Frames of a split, read once."""
        if split not in self._frames:
            dataset = data.DATASETS[self.recipe.dataset](self.root, split)
            self._frames[split] = Frames(dataset, in_memory=self.recipe.dataset != "cityscapes", device=self.device)
        return self._frames[split]

    def prepared(self, split, index):
        """Frames as the search and the cell alone see them (Sect. 4.1): images (N, 3, H, W), labels (N, H, W)."""
        r, (images, labels) = self.recipe, self.frames(split)[index]
        images = data.normalise(images)
        if r.input_longer_side:
            scale = r.input_longer_side / max(labels.shape[-2:])
            size = [round(scale * side) for side in labels.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            labels = shrink(labels, size)
        top, left = (max(0, side - r.input_crop) // 2 for side in labels.shape[-2:])
        images, labels = (x[..., top:top + r.input_crop, left:left + r.input_crop] for x in (images, labels))
        images, labels = data.pad(images, labels, r.input_pad)
        return images.contiguous(memory_format=torch.channels_last), labels

    def autocast(self):
        """bf16 where the device has it. Only with channels_last: without, a depthwise convolution is 20x slower on a CPU."""
        if self.device.type == "cuda":
            capable = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capable = self.device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & {
                name for name, there in torch.cpu.get_capabilities().items() if there is True}
        return torch.autocast(self.device.type, torch.bfloat16) if capable else contextlib.nullcontext()

    def to_device(self, module):
        return module.to(self.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# Training loops

SAVE_SECONDS = 60                            # between checkpoints of a training, which are made after an epoch


def shrink(labels, size):
    """Labels (N, H, W) at another size, each the pixel nearest the centre. [ours] The loss is taken at 1/8 of the image."""
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].to(torch.uint8)


def cross_entropy(logits, labels):
    """Mean over the labelled pixels; logits (N, C, h, w), labels (N, H, W) uint8. Zero where all is ignored."""
    labels = shrink(labels, logits.shape[-2:]).long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=data.IGNORE, reduction="sum")
    return total / (labels != data.IGNORE).sum().clamp(min=1)


class NotFinite(ArithmeticError):
    """The loss is NaN or infinite."""


def epoch_batches(count, batch, rng):
    """Shuffled indices 0..count-1 in batches; a smaller last one is dropped, as its batch norm would be noisier."""
    order = torch.randperm(count, generator=rng)
    batch = min(batch, count)
    return [order[k:k + batch] for k in range(0, count - batch + 1, batch)]


def poly(optimizers, step, steps, power):
    """Sect. 6: every group's rate is its first one times (1 - step / steps) ** power."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / steps) ** power


def train_step(loss, optimizers, step, steps, power):
    """One update of all optimisers; the loss as a number. Raises NotFinite."""
    value = loss.item()
    if not math.isfinite(value):
        raise NotFinite(f"the loss is {value} at step {step} of {steps}")
    poly(optimizers, step, steps, power)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return value


def fit(run, name, model, optimizers, epochs, count, batch, loss_of, validate=None, validate_every=0):
    """Trains the model and returns its history, a dict an epoch. Saves every minute; goes on from there.

    loss_of(indices, rng) gives the loss of a batch of indices below `count`. Every random choice of epoch e
    comes from (seed, name, e): a run that was stopped goes on exactly as if it had not been. Several processes
    share each batch out and average their gradients; a batch norm sees its own process' share."""
    partial, history, since = run.path(f"{name}.partial.pt"), [], time.time()
    if partial.exists():
        saved = load_checkpoint(run, partial)
        history = saved["history"]
        fill(model, saved["model"], partial)
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        print(f"{name}: going on after epoch {len(history)}")
    a_epoch = len(epoch_batches(count, batch, generator(0)))
    steps = epochs * a_epoch
    progress, objective = Progress(name, steps, done=len(history) * a_epoch), loss_of
    if run.world > 1:
        objective = torch.nn.parallel.DistributedDataParallel(Objective(model, loss_of))
    for epoch in range(len(history), epochs):
        rng, losses, start = generator(run.recipe.seed, name, epoch), [], time.time()
        batches = epoch_batches(count, batch, rng)                        # the same in every process,
        rng = generator(run.recipe.seed, name, epoch, run.rank) if run.rank else rng      # but not their augmentation
        torch.manual_seed(rng.initial_seed())                             # dropout draws from torch's own generator
        for indices in batches:
            step = epoch * a_epoch + len(losses)
            try:
                loss = objective(indices[run.rank::run.world], rng)
                losses.append(train_step(loss, optimizers, step, steps, run.recipe.poly_power))
            except NotFinite as error:
                raise InputError(f"{name}: {error}; try a smaller learning rate or another --seed, in another --run") from None
            progress.update(step + 1, epoch=epoch + 1, loss=losses[-1], rate=optimizers[0].param_groups[0]["lr"])
        entry = {"epoch": epoch + 1, "loss": sum(losses) / len(losses), "seconds": time.time() - start}
        if validate_every and run.rank == 0 and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs):
            entry["val_miou"] = validate()
            progress._print(f"{name}: epoch {epoch + 1}, loss {entry['loss']:.4f}, val mIoU {100 * entry['val_miou']:.1f} %", "\n")
        history.append(entry)
        if run.rank == 0 and time.time() - since > SAVE_SECONDS and epoch + 1 < epochs:
            since = time.time()
            save(partial, {"model": model.state_dict(), "history": history, "recipe": dataclasses.asdict(run.recipe),
                           "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    return history


class Objective(torch.nn.Module):
    """A loss as a module that holds its model: what DistributedDataParallel takes."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, indices, rng):
        # Every parameter takes part, as it waits for all gradients: arch2 adapts a layer1 that no block uses.
        return self.loss_of(indices, rng) + 0 * sum(parameter.sum() for parameter in self.model.parameters())


def finish(run, name, content):
    """The result of a training takes the place of its partial checkpoint."""
    if run.rank == 0:
        save(run.path(f"{name}.pt"), {**content, "recipe": dataclasses.asdict(run.recipe)})
        run.path(f"{name}.partial.pt").unlink(missing_ok=True)
    run.wait()


# ---------------------------------------------------------------------------------------------------------
# Stage 1, pretrain: the static network (Sect. 6)

# torchvision's file, where torch.hub keeps it; the name ends in the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"


def load_encoder(encoder, source):
    """ImageNet weights into the encoder: "imagenet" (downloaded once), a file, or "none"."""
    if source == "none":
        print("the encoder starts from random weights (--encoder-weights none): on real images this costs much accuracy")
        return
    if source == "imagenet":
        source = data.download(IMAGENET, pathlib.Path(torch.hub.get_dir(), "checkpoints", pathlib.Path(IMAGENET).name),
                               "pass --encoder-weights FILE (or none)", sha256=IMAGENET[-12:-4])
    state = load(source)
    try:
        encoder.load_imagenet(state)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{source}: {error}; --encoder-weights takes torchvision's mobilenet_v2") from None


def pretrain(run):
    r, frames = run.recipe, run.frames("train")
    torch.manual_seed(generator(r.seed, "static").initial_seed())
    model = Arch2(run.num_classes, auxiliary=True)
    if run.rank == 0:                        # the others get rank 0's weights before the first step
        load_encoder(model.encoder, r.encoder_weights)
    model = run.to_device(model)
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.SGD([{"params": model.encoder.parameters(), "lr": r.static_lr_encoder},
                                 {"params": decoder, "lr": r.static_lr_decoder}],
                                momentum=r.momentum, weight_decay=r.weight_decay)

    def loss_of(indices, rng):
        model.train()
        images, labels = data.augment(*frames[indices[:, None]], r.static_crop, r.static_scale, generator=rng)
        images, labels = images[:, 0].contiguous(memory_format=torch.channels_last), labels[:, 0]
        with run.autocast():
            pred, auxiliary = model.forward_auxiliary(images)
        return cross_entropy(pred, labels) + r.auxiliary_weight * sum(cross_entropy(a, labels) for a in auxiliary)

    def validate():
        return evaluate_video(run, VideoSegmenter(model, None), "val")[0]["miou"]

    labelled = torch.tensor([k for k, frame in enumerate(frames.list) if frame.label is not None])
    history = fit(run, "static", model, [optimizer], r.static_epochs, len(labelled), r.static_batch,
                  lambda indices, rng: loss_of(labelled[indices], rng), validate, r.validate_every)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("auxiliary.")}
    finish(run, "static", {"static": state, "history": history})


def load_video(run, name):
    """The network of a checkpoint (static, baseline or cell-K) as a VideoSegmenter, on the device, in eval mode."""
    path, static, cell = run.path(f"{name}.pt"), Arch2(run.num_classes), None
    saved = load_checkpoint(run, path)
    if "static" not in saved:
        raise InputError(f"{path}: holds no network; use another --run")
    fill(static, saved["static"], path)
    if "cell" in saved:
        cell = Decoder(static) if saved["genotype"] == DECODER else \
            DynamicCell(Genotype.from_json(saved["genotype"]), run.num_classes, past=saved["past"])
        fill(cell, saved["cell"], path)
    return run.to_device(VideoSegmenter(static, cell)).eval()


# ---------------------------------------------------------------------------------------------------------
# Stage 2, search: candidates on the frozen static network's outputs (Sect. 3.3, 4.1)

class Cache:
    """What the frozen static network says of every frame, in memory, in half precision: a candidate's training
    never runs the encoder. One tensor a layer; a batch is an indexing by frame number."""

    LAYERS = "layer2", "layer3", "layer4", "dec"

    @torch.no_grad()
    def __init__(self, run, static, mirrored=False, split="train", batch=8):
        self.count = len(run.frames(split).list)
        starts = [(flip, k) for flip in (False, True)[:1 + mirrored] for k in range(0, self.count, batch)]
        progress, parts = Progress(f"static outputs of {split}", len(starts)), []
        for step, (flip, k) in enumerate(starts):
            images, labels = run.prepared(split, torch.arange(k, min(k + batch, self.count)))
            if flip:                         # frame k's mirror image is frame count + k
                images, labels = images.flip(-1), labels.flip(-1)
            with run.autocast():
                features = static.encode(images)
                dec, _ = static.decode(features)
            parts.append([x.half() for x in (*features[1:], dec)] + [labels, shrink(labels, dec.shape[-2:])])
            progress.update(step + 1)
        *layers, self.labels, self.small_labels = (torch.cat(part) for part in zip(*parts))
        self.layers = dict(zip(self.LAYERS, layers))

    def __call__(self, name, index):
        """(B, C, h, w) float32, channels_last."""
        return self.layers[name][index].float().contiguous(memory_format=torch.channels_last)

    def roll(self, cell, window, dropout=0.0):
        """Runs a cell over sequences (B, T) of frame numbers: the static network's outputs of the first frame, then
        the cell. Yields pred and the frame numbers (B,), for every frame after the first."""
        def look(name, index):
            return F.dropout2d(self(name, index), dropout)

        layer4, dec = look("layer4", window[:, 0]), look("dec", window[:, 0])
        for index in window[:, 1:].T:
            current = look("layer4", index)
            dec, pred = cell(layer4, dec, look("layer2", index), look("layer3", index), current)
            layer4 = current
            yield pred, index


def meta_split(windows, share, rng):
    """Sect. 4.1: meta-train and meta-val, at random, disjoint: (N, T) sequences of frame numbers each.

    [ours] Neighbouring sequences share frames. So runs of about 12 neighbours are drawn into meta-val, not single
    sequences, and a sequence that shares a frame with one of those is in neither."""
    runs = windows.split(max(1, min(12, round(share * len(windows)))))
    order, val = torch.randperm(len(runs), generator=rng).tolist(), []
    while order and sum(map(len, val)) < share * len(windows):
        val.append(runs[order.pop()])
    train, val = torch.cat([runs[k] for k in sorted(order)]) if order else windows[:0], torch.cat(val)
    train = train[~torch.isin(train, val).any(dim=1)]
    if len(train) < 2:                       # gap's batch norm has one value a sequence
        raise InputError(f"{len(windows)} sequences are too few for a search; --meta-val-share {share} leaves {len(train)} to train on")
    return train, val


def new_cell(run, static, genotype, rng, past=True):
    """A cell whose classifier starts as a copy of the static one (Sect. 3.2); for DECODER a copy of all its decoder."""
    if genotype == DECODER:
        return run.to_device(Decoder(static))
    torch.manual_seed(rng.initial_seed())
    cell = DynamicCell(genotype, run.num_classes, past)
    cell.classifier.load_state_dict(static.classifier.state_dict())
    return run.to_device(cell)


def cell_loss(run, cell, cache, window, dropout=0.0):
    """Cross-entropy summed over every frame after the first (Sect. 4.1), at 1/8 resolution."""
    with run.autocast():
        return sum(cross_entropy(pred, cache.small_labels[index]) for pred, index in cache.roll(cell, window, dropout))


@torch.no_grad()
def score(run, cell, cache, windows, batch):
    """Sect. 3.3: scores on meta-val, at the labels' resolution, over every frame after the first."""
    cell.eval()
    confusion = Confusion(run.num_classes)
    for window in windows.split(batch):
        with run.autocast():
            for pred, index in cache.roll(cell, window):
                labels = cache.labels[index]
                pred = F.interpolate(pred.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
                confusion.update(pred.argmax(1), labels)
    return confusion.scores()


def try_candidate(run, static, genotype, k, cache, meta_train, meta_val, average):
    """Sect. 3.3, 4.1: trains candidate k and scores it; its entry of the log, whose reward is the score.

    average: running average of the half-way rewards so far, or None. A candidate below it is stopped there, and its
    half-way score is its reward."""
    r, start, worth = run.recipe, time.time(), 1.0
    entry = {"candidate": k, "status": "ok", "stopped": False, "reward": 0.0, "half_reward": None}
    try:
        cell = new_cell(run, static, genotype, generator(r.seed, "cell", k))
        entry["parameters"] = parameters(cell)
        if r.latency_weight:
            entry["ms"] = cell_milliseconds(cell, cache)
            target = r.latency_target or cell_milliseconds(Decoder(static), cache)
            worth = (entry["ms"] / target) ** -r.latency_weight           # Sect. 1's outlook; [ours]
        optimizer = torch.optim.Adam(cell.parameters(), lr=r.cell_lr)
        batches = [batch for epoch in range(r.search_epochs) for batch in
                   epoch_batches(len(meta_train), r.search_batch, generator(r.seed, "candidate", k, epoch))]
        for step, indices in enumerate(batches):
            if step and step == len(batches) // 2 and r.early_stop:       # Sect. 3.3: half way, is it promising?
                scores = score(run, cell, cache, meta_val, r.search_batch)
                entry["half_reward"] = scores.reward * worth
                if average is not None and entry["half_reward"] < average:
                    entry["stopped"] = True
                    break
            cell.train()
            train_step(cell_loss(run, cell, cache, meta_train[indices]), [optimizer], step, len(batches), r.poly_power)
        else:
            scores = score(run, cell, cache, meta_val, r.search_batch)
        entry.update(reward=scores.reward * worth, miou=scores.miou, fwiou=scores.fwiou, macc=scores.macc)
    except NotFinite as error:
        entry.update(status="not finite", reason=str(error))
    except Exception as error:               # torch says it by a class of its own on a GPU, by its text elsewhere
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and \
                not any(text in str(error) for text in ("can't allocate memory", "out of memory")):
            raise RuntimeError(f"candidate {k} failed: {genotype}") from error
        entry.update(status="out of memory", reason=str(error)[:200])
    tokens = genotype.to_tokens()
    return {**entry, "seconds": round(time.time() - start, 2), "tokens": tokens, "genotype": json.loads(genotype.to_json())}


@torch.no_grad()
def cell_milliseconds(cell, cache):
    """Of a frame, for a cell alone: folded, batch 1. A measurement: with a latency in the reward a search is reproducible
    only in so far as the machine's times are."""
    inputs = [cache(name, torch.tensor([0])) for name in ("layer4", "dec", "layer2", "layer3", "layer4")]
    cell = fold_batchnorm(cell).to(memory_format=torch.channels_last)
    return milliseconds(cell, *inputs)


DECODER = "decoder"                          # stands where a genotype does


class Decoder(torch.nn.Module):
    """A copy of arch2's decoder as a cell that doesn't look at the past. [ours] The strictest control of what a cell's
    structure is worth: trained alone and end to end by the same steps as the cells. (No block of arch2 uses layer1.)"""

    def __init__(self, static):
        super().__init__()
        self.static = copy.deepcopy(static)
        self.static.encoder = None

    def forward(self, layer4_prev, dec_prev, layer2, layer3, layer4):
        return self.static.decode((None, layer2, layer3, layer4))


def logs(recipe):
    """The searches of a run: strategy -> the log's name."""
    return {"both": {"ppo": "search.jsonl", "random": "random.jsonl"}}.get(recipe.search_strategy,
                                                                           {recipe.search_strategy: "search.jsonl"})


def search(run):
    r = run.recipe

    @functools.cache
    def context():                           # only when a candidate is missing
        static = load_video(run, "static").static
        cache = Cache(run, static)
        meta_train, meta_val = meta_split(run.frames("train").windows(r.sequence_length), r.meta_val_share,
                                          generator(r.seed, "meta"))
        print(f"search: {len(meta_train)} sequences to train on, {len(meta_val)} to score on")
        return static, cache, meta_train, meta_val

    if r.cells:
        made = {strategy: explore(run, strategy, run.path(name), context) for strategy, name in logs(r).items()}
        finish(run, "controller", made.get("ppo", {}))
    else:
        print("search: none, as --cells is 0")
        finish(run, "controller", {})


def explore(run, strategy, path, context):
    """The log is the truth: a search that goes on replays it. The controller draws the same tokens, takes the logged
    rewards, makes the same updates, and trains only the candidates that the log does not have.

    A round is the candidates between two updates, of which each process takes the next one that nobody has. Every
    process makes every update, so all have the same controller; rank 0 writes the log."""
    r, log = run.recipe, read_log(path)
    run.wait()                                                            # nobody writes before all have read
    if log:
        print(f"search: {len(log)} candidates stand in {path}")
    torch.manual_seed(generator(r.seed, "controller").initial_seed())
    controller = Controller(r.cell_layers)
    ppo = PPO(controller, learning_rate=r.controller_lr, clip=r.controller_clip, baseline_decay=r.controller_baseline_decay,
              epochs=r.controller_epochs, entropy_weight=r.controller_entropy)
    average, last, progress = None, {}, Progress(f"search ({strategy})", r.search_candidates, done=len(log))
    a_round = math.ceil(r.controller_rollout / run.world) * run.world
    for first in range(0, r.search_candidates, a_round):
        numbers = range(first, min(first + a_round, r.search_candidates))
        draw = generator(r.seed, "sample" if strategy == "ppo" else strategy, first)
        tokens = controller.sample(len(numbers), draw)[0] if strategy == "ppo" else controller.random(len(numbers), draw)
        for k, row in zip(numbers, tokens):
            if k in log and len(log[k]["tokens"]) != len(row):
                raise InputError(f"{path}: candidate {k} has {len(log[k]['tokens'])} tokens, not {len(row)}: of another recipe")
            if k in log and log[k]["tokens"] != row.tolist():             # another processor may round another way
                print(f"search: the log's candidate {k} is not the one this machine would sample; the log's is taken")
                row.copy_(torch.tensor(log[k]["tokens"]))
        genotypes = {k: Genotype.from_tokens(row) for k, row in zip(numbers, tokens)}
        missing, store = [k for k in numbers if k not in log], dist.PrefixStore(f"{path.name} {first}", run.store)

        def collect(k):                                                   # waits for the process that has it
            log[k] = json.loads(store.get(str(k)))
            if run.rank == 0:
                append_log(path, log[k])
            progress.update(len(log), reward=log[k]["reward"], best=max(entry["reward"] for entry in log.values()),
                            half_way_average=average or 0)

        while (turn := store.add("turn", 1)) <= len(missing):             # counts over all processes
            k, (static, *data_of_search) = missing[turn - 1], context()
            store.set(str(k), json.dumps(try_candidate(run, static, genotypes[k], k, *data_of_search, average)))
            for k in missing:
                if k not in log and store.check([str(k)]):
                    collect(k)
        for k in missing:
            if k not in log:
                collect(k)
        for k in numbers:                    # Sect. 3.3: the running average; its decay, and that it moves a round: [ours]
            if (half := log[k]["half_reward"]) is not None:
                average = half if average is None else r.early_stop_decay * average + (1 - r.early_stop_decay) * half
        if strategy == "ppo":
            last = ppo.update(tokens, controller.log_prob(tokens)[0].detach(), torch.tensor([log[k]["reward"] for k in numbers]))
    return {"controller": controller.state_dict(), "last_update": last}


# ---------------------------------------------------------------------------------------------------------
# Stage 3, finetune: the best cells on the full training split (Sect. 4.2)

def best_genotypes(run, log="search.jsonl"):
    """The `cells` best different genotypes of a search's log."""
    ranked = sorted((entry for entry in read_log(run.path(log)).values() if entry["status"] == "ok"),
                    key=lambda entry: (-entry["reward"], entry["candidate"]))
    if not ranked:
        raise InputError(f"{run.path(log)}: no candidate came through, so there is no cell to train; use another --run")
    return list(dict.fromkeys(Genotype.from_tokens(entry["tokens"]) for entry in ranked))[:run.recipe.cells]


class Network(typing.NamedTuple):
    """A row of the table; seeds have one each. A control says what a cell is worth and is never the run's best."""
    name: str
    title: str
    genotype: Genotype | str | None = None
    past: bool = True
    seed: int = 0

    @property
    def control(self):
        return self.genotype in (None, DECODER) or not self.past


def networks(run):
    """What finetune trains and evaluate scores, in the table's order."""
    r = run.recipe
    chosen = [Network("baseline", "per-frame baseline, trained as long")]
    for strategy, log in logs(r).items() if r.cells else ():
        kind, said = ("random", "random search") if log == "random.jsonl" else ("cell", strategy.replace("ppo", "PPO"))
        chosen += [Network(f"{kind}-{k}", f"{kind}-{k}, {said}", genotype) for k, genotype in enumerate(best_genotypes(run, log))]
    if r.without_past and len(chosen) > 1 and set(chosen[1].genotype.inputs()) & {0, 1}:
        chosen.insert(2, Network("cell-0-without-past", "cell-0, the past zeroed", chosen[1].genotype, past=False))
    titles = {DECODER: "arch2's decoder as the cell", **{f"cell{k}": f"cell{k} (reconstructed)" for k in range(4)}}
    chosen += [Network(f"cell-{name}", titles.get(name, name), CELLS.get(name, DECODER)) for name in r.cell]
    return [one._replace(name=one.name + f"-seed{seed}" * (seed > 0), seed=seed) for one in chosen for seed in range(r.seeds)]


def finetune(run):
    """The baseline trained as long, then each cell: alone, then end to end."""
    cache = None

    def written(cell, genotype, past):
        return {"cell": cell.state_dict(), "genotype": DECODER if genotype == DECODER else genotype.to_json(), "past": past}
    for name, _, genotype, past, _ in networks(run):
        if run.path(f"{name}.pt").exists():
            continue
        static, cell = load_video(run, "static").static, None
        if genotype is not None:
            print(f"{name}: {genotype}")
            cell = new_cell(run, static, genotype, generator(run.recipe.seed, name), past)
            alone = run.path(f"{name}-alone.pt")
            if alone.exists():
                fill(cell, load_checkpoint(run, alone)["cell"], alone)
            else:
                cache = cache or Cache(run, static, run.recipe.cell_mirrored)
                history = fit_cell_alone(run, f"{name}-alone", cell, cache)
                finish(run, f"{name}-alone", {"history": history, **written(cell, genotype, past)})
        video, history = fit_end_to_end(run, name, VideoSegmenter(static, cell))
        finish(run, name, {"static": video.static.state_dict(), "history": history,
                           **(written(cell, genotype, past) if cell else {})})


def fit_cell_alone(run, name, cell, cache):
    """Sect. 4.2: static network frozen, so on its stored outputs, like a candidate, but on the full training split.

    [ours] So there is no augmentation but the stored mirror images, if any, and on CityScapes the images are the
    search's (1024 wide, crop 512). The encoder has fitted the training images' features to their labels; with dropout on
    them the cell trusts them less (attention on CamVid's test split: 59.8 after all training, 58.6 without)."""
    r, windows = run.recipe, run.frames("train").windows(run.recipe.sequence_length)
    cell.train()

    def loss_of(indices, rng):
        window = windows[indices]
        if r.cell_mirrored:
            window = window + cache.count * torch.randint(2, (len(window), 1), generator=rng)
        return cell_loss(run, cell, cache, window, r.cell_dropout)
    return fit(run, name, cell, [torch.optim.Adam(cell.parameters(), lr=r.cell_lr)], r.cell_epochs, len(windows), r.cell_batch,
               loss_of)


def fit_end_to_end(run, name, video):
    """Sect. 4.2: the cell by Adam, the static network by SGD. The same for the baseline, which has no cell.

    [ours] Every frame's loss counts, the key frame's too: else nothing would hold the static classifier to a decoder
    that changes. The static network's batch norms keep their statistics."""
    r, frames = run.recipe, run.frames("train")
    windows = frames.windows(r.sequence_length)
    optimizers = [torch.optim.SGD(video.static.parameters(), lr=r.end_lr_static, momentum=r.momentum, weight_decay=r.weight_decay)]
    if video.cell is not None:
        optimizers.append(torch.optim.Adam(video.cell.parameters(), lr=r.end_lr_cell))

    def loss_of(indices, rng):
        video.train()
        video.static.eval()
        images, labels = data.augment(*frames[windows[indices]], r.end_crop, r.end_scale, generator=rng)
        with run.autocast():
            logits = video(images)                                        # (B, T, C, h, w)
        return sum(cross_entropy(logits[:, t], labels[:, t]) for t in range(labels.shape[1]))

    history = fit(run, name, video, optimizers, r.end_epochs, len(windows), r.cell_batch, loss_of)
    return video, history


# ---------------------------------------------------------------------------------------------------------
# Stage 4, evaluate: every frame of every clip, in time order

@torch.no_grad()
def stream(run, video, images, key_frame_every=0):
    """(H, W, 3) uint8 images of one clip, in time order -> (H, W) uint8 label maps, one at a time.

    The static network on the first image and on every key frame, the cell on all others. float32; nothing is
    kept but the state, so a stream may be endless. The images are padded as in training (Sect. 4.1)."""
    state = None
    for t, image in enumerate(images):
        size = image.shape[:2]
        x, where = data.pad(data.normalise(image[None].to(run.device)), torch.zeros(1, *size), run.recipe.input_pad)
        top, left = ((a - b) // 2 for a, b in zip(where.shape[-2:], size))
        if key_frame_every and t % key_frame_every == 0:
            state = None
        logits, state = video.step(x.contiguous(memory_format=torch.channels_last), state)
        logits = F.interpolate(logits, size=where.shape[-2:], mode="bilinear", align_corners=False)
        yield logits.argmax(1)[0, top:top + size[0], left:left + size[1]].to(torch.uint8)


def for_inference(video):
    return fold_batchnorm(video).to(memory_format=torch.channels_last)


def evaluate_video(run, video, split, key_frame_every=0, consistency=3):
    """Every frame of every clip of a split, at the labels' resolution.

    Returns miou, fwiou, macc, consistency over that many frames, iou by class; and the label maps, uint8."""
    video, frames, preds = for_inference(video), run.frames(split), []
    confusion, steady = Confusion(run.num_classes), Consistency(consistency)
    for clip in frames.clips():
        for index, pred in zip(clip, stream(run, video, (frames[k][0] for k in clip), key_frame_every)):
            confusion.update(pred, frames[index][1])
            preds.append(pred.cpu())
    for window in frames.windows(consistency).tolist():
        steady.update([preds[k] for k in window], [frames[k][1].cpu() for k in window])
    scores = confusion.scores()
    return {"miou": scores.miou, "fwiou": scores.fwiou, "macc": scores.macc, "consistency": steady.score(),
            "iou": dict(zip(frames.dataset.classes, [None if math.isnan(v) else v for v in scores.iou]))}, preds


@torch.no_grad()
def frame_costs(run, video):
    """The encoder alone, a key frame, a later frame: batch norms folded, float32, batch 1, prediction at 1/8."""
    image, _ = run.frames("val")[0]
    image, video = data.normalise(image[None]).contiguous(memory_format=torch.channels_last), for_inference(video)
    _, state = video.step(image)
    calls = {"ms_encoder": lambda: video.static.encode(image), "ms_key_frame": lambda: video.step(image),
             "ms_later_frame": lambda: video.step(image, state)}
    return {**milliseconds_in_turn(calls, repeats=15), "multiply_adds": multiply_adds(calls["ms_later_frame"])}


def made_rows(run):
    """The table's rows that were scored before: by an evaluate that was cut, or one that had fewer to score."""
    done, partial = run.path("results.json"), run.path("results.partial.json")
    return load(partial) if partial.exists() else load(done)["rows"] if done.exists() else []


def missing_rows(run):
    """(network, key-frame distance) of the rows that no evaluate has scored yet."""
    made = {(row["name"], row["key_frame_every"]) for row in made_rows(run)}
    return [(network, every) for network in [Network("static", "per-frame baseline"), *networks(run)]
            for every in (dict.fromkeys(run.recipe.key_frames) if network.genotype else (1,)) if (network.name, every) not in made]


def evaluate(run):
    """Every network on val and test; the table's rows, and for Figs. 5 and 6 the frames on which two of them differ most."""
    splits, partial = run.splits[1:], run.path("results.partial.json")    # the last split is reported
    rows, missing = made_rows(run), missing_rows(run)
    for network in dict.fromkeys(network for network, _ in missing):
        name, video = network.name, load_video(run, network.name)
        costs = frame_costs(run, video)
        for every in (every for other, every in missing if other == network):
            row = {"name": name, "title": network.title, "seed": network.seed, "control": network.control, "key_frame_every": every,
                   "parameters": parameters(video), **costs, "genotype": network.genotype and str(network.genotype)}
            for split in splits:
                row[split], _ = evaluate_video(run, video, split, every)
            rows.append(row)
            print(f"evaluate: {name}, key frame {distance(every)}: {split} mIoU {100 * row[split]['miou']:.1f} %", flush=True)
        save(partial, rows)
    cells = [row for row in rows if row["genotype"] and row["key_frame_every"] == run.recipe.key_frames[0]]
    best = max([row for row in cells if not row["control"]] or cells, key=lambda row: row["val"]["miou"])
    baseline, cell = (evaluate_video(run, load_video(run, row["name"]), splits[-1], row["key_frame_every"])[1]
                      for row in (next(row for row in rows if row["name"] == "baseline"), best))
    save(run.path("examples.pt"), differing_frames(run, splits[-1], baseline, cell, best["name"]))
    save(run.path("results.json"), {"rows": rows, "reported": splits[-1], "device": str(run.device), "best": best["name"],
                                    "threads": torch.get_num_threads(), "torch": torch.__version__})
    partial.unlink()


def differing_frames(run, split, baseline, cell, cell_name, count=4, apart=20):
    """Rows of Figs. 5 and 6: the frames where the largest share of labelled pixels differs between the two networks'
    answers, at least `apart` frames from each other. [ours]"""
    frames, chosen = run.frames(split), []
    labelled = [frames[k][1].cpu() != data.IGNORE for k in range(len(baseline))]
    share = [((a != b) & where).sum().item() / max(1, where.sum().item()) for a, b, where in zip(baseline, cell, labelled)]
    for k in sorted(range(len(share)), key=lambda k: -share[k]):
        if len(chosen) < count and all(abs(k - other) >= apart for other in chosen):
            chosen.append(k)
    images, labels = frames[torch.tensor(chosen)]
    return {"images": images.cpu(), "labels": labels.cpu(), "baseline": torch.stack([baseline[k] for k in chosen]),
            "cell": torch.stack([cell[k] for k in chosen]), "names": [frames.list[k].image.name for k in chosen],
            "classes": list(frames.dataset.classes), "palette": frames.dataset.palette.tolist(),
            "differ": [share[k] for k in chosen], "cell_name": cell_name}


def distance(every):
    return {0: "first only", 1: "every"}.get(every, f"every {every}")


def print_table(results):
    """The paper's Table 5 from results.json, and the IoU of each class."""
    split, groups = results["reported"], collections.defaultdict(list)
    for row in results["rows"]:                                           # the seeds of a row are reported as one
        groups[row["title"], row["key_frame_every"]].append(row)

    def percent(rows, split, name):
        values = [100 * row[split][name] for row in rows]
        return f"{statistics.mean(values):.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")

    print(f"\n{split} split; mIoU and consistency in %, a later frame's multiply-adds (G) and ms on {results['device']} "
          f"({results['threads']} threads)" + "; mean ± deviation over seeds" * (len(groups) < len(results["rows"])))
    print(f"{'':38} {'key frame':>10} {'mIoU':>10} {'consistency':>11} {'parameters':>11} {'mult-adds':>9} "
          f"{'ms a frame':>10} {'/ encoder':>9} {'val mIoU':>10}")
    for (title, every), rows in groups.items():
        print(f"{title:38} {distance(every):>10} {percent(rows, split, 'miou'):>10} {percent(rows, split, 'consistency'):>11} "
              f"{rows[0]['parameters']:11,} {rows[0]['multiply_adds'] / 1e9:9.2f} {rows[0]['ms_later_frame']:10.1f} "
              f"{statistics.median(row['ms_later_frame'] / row['ms_encoder'] for row in rows):9.2f} "
              f"{percent(rows, 'val', 'miou'):>10}")
    classes = results["rows"][0][split]["iou"]
    print(f"\n{'IoU of each class (the first key frame)':38}" + "".join(f" {name[:10]:>10}" for name in classes))
    for title, rows in reversed({title: rows for (title, _), rows in reversed(groups.items())}.items()):
        values = ([row[split]["iou"][name] for row in rows] for name in classes)
        print(f"{title:38}" + "".join(f"{'-' if None in v else f'{100 * statistics.mean(v):.1f}':>11}" for v in values))
    for title, genotype in dict((row["title"], row["genotype"]) for row in results["rows"] if row["genotype"]).items():
        print(f"{title}: {genotype}")


# ---------------------------------------------------------------------------------------------------------
# Stage 5, predict: one's own video

ANIMATION = 100, 480                         # frames and width, at most, of the animated picture: it is made in memory


def read_frames(source):
    """A folder of frames in name order, an animated GIF, WebP or APNG, or one image -> their number, and a generator of
    (name, (H, W, 3) uint8), which holds one frame at a time."""
    source = pathlib.Path(source)
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise InputError(f"{source}: holds no .png or .jpg; --input is a folder of frames, an animation or one image")
        return len(paths), ((path.stem, data.read_image(path)) for path in paths)
    formats = (*data.FORMATS, "GIF", "WEBP")
    data.read_image(source, formats)                                      # says what is wrong with it
    animation = Image.open(source, formats=formats)
    try:
        count = getattr(animation, "n_frames", 1)
    except Exception as error:               # Pillow's decoders raise many kinds
        raise InputError(f"{source}: its frames cannot be counted ({error})") from None

    def frames():
        for k in range(count):
            try:
                animation.seek(k)
                yield (f"{source.stem}_{k:05d}" if count > 1 else source.stem), np.array(animation.convert("RGB"))
            except Exception as error:
                raise InputError(f"{source}: frame {k} cannot be decoded ({error}); the frames before it are done") from None
    return count, frames()


def predict(run, source, output, network=None, key_frame_every=0):
    """Label maps, overlays and one animation of a video. Memory doesn't grow with its length."""
    output, dataset = pathlib.Path(output), data.DATASETS[run.recipe.dataset]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: holds files already; nothing is overwritten, so choose another --output")
    results = run.path("results.json")
    network = network or (load(results)["best"] if results.exists() else "cell-0")
    video = for_inference(load_video(run, network))
    count, frames = read_frames(source)
    for folder in ("labels", "overlay"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    print(f"predict: {count} frames by {network}, key frame {distance(key_frame_every)}")
    seen, size = collections.deque(), None

    def images():
        nonlocal size
        for name, image in frames:
            size = size or image.shape
            if image.shape != size:
                raise InputError(f"{source}: frame {name} is {image.shape[1]} x {image.shape[0]}, the first {size[1]} x {size[0]}; "
                                 "the frames of a video must have one size (those before it are done)")
            seen.append((name, image))
            yield torch.from_numpy(image)

    progress, start, animation, skip = Progress("predict", count), time.time(), [], math.ceil(count / ANIMATION[0])
    for k, pred in enumerate(stream(run, video, images(), key_frame_every)):
        (name, image), labels = seen.popleft(), pred.cpu().numpy()
        overlaid = Image.fromarray(figures.overlay(image, labels, dataset.palette))
        figures.save_indexed(output / "labels" / f"{name}.png", labels, dataset.palette)
        overlaid.save(output / "overlay" / f"{name}.png")
        if k % skip == 0:
            overlaid.thumbnail((ANIMATION[1], 10000))
            animation.append(overlaid)
        progress.update(k + 1, frames_per_second=(k + 1) / (time.time() - start))
    animation[0].save(output / "overlay.webp", save_all=True, append_images=animation[1:], duration=100, loop=0, quality=70)
    print(f"predict: wrote {output}: labels/ (indexed PNG, class numbers), overlay/, overlay.webp" +
          (f" (one frame in {skip})" if skip > 1 else ""))


# ---------------------------------------------------------------------------------------------------------
# The command line

# A stage, what it makes last (what tells that it is done; evaluate may lack rows yet), and what it needs.
STAGES = {"pretrain": (pretrain, lambda run: ["static.pt"], None),
          "search": (search, lambda run: ["controller.pt"], "static.pt"),
          "finetune": (finetune, lambda run: [f"{network.name}.pt" for network in networks(run)], "controller.pt"),
          "evaluate": (evaluate, lambda run: ["results.json"], "baseline.pt")}


CHOICES = {"dataset": data.DATASETS, "search_strategy": ("ppo", "random", "both"), "cell": (*CELLS, "decoder")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see python train.py --help")


def parse(arguments):
    """Command line -> namespace, recipe fields that were given. A flag a field."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--schedule", choices=("paper", "short", "smoke"),
                        help="defaults of the recipe: the paper's (default for camvid, cityscapes), cut to a CPU (default for "
                             "synthetic), or only to see that it runs")
    parser.add_argument("--data", help="the dataset's folder (default: data/DATASET)")
    parser.add_argument("--run", help="the run's folder (default: runs/DATASET)")
    parser.add_argument("--stage", choices=[*STAGES, "predict"], help="this stage only")
    parser.add_argument("--device", help="cuda, mps, cpu, ... (default: the best there is)")
    own = parser.add_argument_group("--stage predict")
    own.add_argument("--input", help="a folder of frames (.png, .jpg, in name order), an animated GIF, WebP or APNG, or one image")
    own.add_argument("--output", help="folder for label maps, overlays and the animation")
    own.add_argument("--network", help="static, baseline, cell-0, ... (default: the cell that is best on val)")
    own.add_argument("--key-frame-every", type=int, default=0, metavar="N",
                     help="static network on every Nth frame; 0 (default): on the first only")
    fields = parser.add_argument_group("recipe (defaults: paper, CamVid)")
    for f in dataclasses.fields(Recipe):
        kind, options = type(f.default), {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} ({f.default})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            of, *more = typing.get_args(f.type)
            options.update(type=of, nargs="*" if ... in more else len(f.default), choices=CHOICES.get(f.name))
        else:
            options.update(type=kind, choices=CHOICES.get(f.name))
        fields.add_argument(flag(f.name), **options)
    args = parser.parse_args(arguments)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    return args, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def flag(name):
    return "--" + name.replace("_", "-")


MAY_BE_ZERO = ("seed validate_every input_longer_side input_pad key_frames weight_decay momentum controller_entropy "
               "auxiliary_weight poly_power cells cell_dropout latency_weight latency_target end_epochs").split()


def check(recipe):
    """Raises InputError for a value that can't work, naming the flag."""
    for name, value in dataclasses.asdict(recipe).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (bool, str)):
                continue
            if not math.isfinite(number) or number < 0 or number == 0 and name not in MAY_BE_ZERO:
                raise InputError(f"{flag(name)} {number}: must be {'0 or more' if name in MAY_BE_ZERO else 'more than 0'}")
        if name in ("meta_val_share", "controller_clip", "controller_baseline_decay", "early_stop_decay", "momentum",
                    "cell_dropout") and value >= 1:
            raise InputError(f"{flag(name)} {value}: must be below 1")
        if name in ("static_batch", "search_batch", "cell_batch") and value < 2:
            raise InputError(f"{flag(name)} {value}: must be 2 or more, gap's batch norm has one value an image")
        if name in ("static_scale", "end_scale") and value[0] > value[1]:
            raise InputError(f"{flag(name)} {value}: the first must not be above the second")
    if not recipe.key_frames:
        raise InputError("--key-frames: must have one distance or more")
    if not recipe.cells and not recipe.cell:
        raise InputError("--cells 0: then --cell must name a cell, or there is none to train")
    if recipe.sequence_length < 2:
        raise InputError(f"--sequence-length {recipe.sequence_length}: a cell needs a frame before, so 2 or more")


def settle_recipe(folder, schedule, given, stage=None):
    """The recipe of this run. A folder in which something was made keeps its own: the command line must agree with it.

    Without --schedule a whole run means the dataset's default schedule; one --stage takes what the folder says. What the run
    compares (COMPARED) may be given anew: what is missing is trained and scored, what is there stays."""
    path, dataset = folder / "recipe.json", given.get("dataset", "synthetic")
    default = "short" if dataset == "synthetic" else "paper"
    if not path.exists() or not (any(folder.glob("*.pt")) or (folder / "search.jsonl").exists()):
        return recipe_for(**{"dataset": dataset, "schedule": schedule or default, **given})
    saved = as_recipe(load(path), path)
    if schedule or not stage:
        wanted = recipe_for(**{"dataset": dataset, "schedule": schedule or default, **given})
    else:
        wanted = dataclasses.replace(saved, **given)
    if other := differing(saved, wanted):
        raise InputError(f"{path}: is the recipe of another run ({other}); give the flags it was made with, or use another --run")
    return dataclasses.replace(saved, **{name: given[name] for name in COMPARED if name in given})


def find_data(run):
    """Fetches the data if it can be and looks at what is there, before anything is written: InputError with all problems."""
    dataset, length = data.DATASETS[run.recipe.dataset], run.recipe.sequence_length
    if run.rank == 0:
        dataset.fetch(run.root)
    run.wait()
    try:
        splits = data.each(lambda split: dataset(run.root, split), run.splits)
    except InputError:                       # files are missing: the rest is looked at as well, so that all is said at once
        data.each(run.frames, run.splits)
        raise
    if not (count := len(data.sequences(splits["train"].clips, length))):
        raise InputError(f"--sequence-length {length}: no {run.recipe.dataset} clip has so many frames in a row")
    if count < 2 * run.world:
        raise InputError(f"{run.root}: its train split has {count} sequences of {length} frames; each process needs two, gap's batch norm "
                         "has one value an image")


def keep_freed_memory():
    """glibc gives a large tensor's memory back to the system when it is freed, and the next one costs page faults again.
    Kept, a step of pretraining takes 0.83 of the time on a CPU, for some memory: end to end, 3 x 8 frames of 480 x 360
    take 6.2 GB where they took 5.0. Other C libraries stay as they are."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                       # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, -1)                      # M_TRIM_THRESHOLD: never


def main(arguments=None):
    keep_freed_memory()
    args, given = parse(arguments)
    folder = pathlib.Path(args.run or f"runs/{given.get('dataset', 'synthetic')}")
    recipe = settle_recipe(folder, args.schedule, given, args.stage)
    check(recipe)
    if args.stage == "predict":
        if not args.input or not args.output:
            raise InputError("--input and --output: needed for --stage predict")
        if args.key_frame_every < 0:
            raise InputError(f"--key-frame-every {args.key_frame_every}: must be 0 or more")
        return predict(Run(folder, recipe, device=args.device), args.input, args.output, args.network, args.key_frame_every)
    run = Run(folder, recipe, args.data or f"data/{recipe.dataset}", args.device)
    run.join()
    find_data(run)
    with contextlib.ExitStack() as locked:
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = locked.enter_context(open(folder / "lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{folder}: another process works on this run; wait for it or use another --run") from None
            if not (folder / "recipe.json").exists() or load(folder / "recipe.json") != json.loads(json.dumps(dataclasses.asdict(recipe))):
                save(folder / "recipe.json", dataclasses.asdict(recipe))
        print(f"{folder}: {recipe.dataset} on {run.device}, {torch.get_num_threads()} threads" +
              f" in each of {run.world} processes" * (run.world > 1))
        for name in [args.stage] if args.stage else STAGES:
            stage, results, needed = STAGES[name]
            run.wait()
            if needed and not run.path(needed).exists():
                raise InputError(f"{run.path(needed)}: no such file, --stage {name} needs it; run the stages before it first")
            if all(run.path(result).exists() for result in results(run)) and not (name == "evaluate" and missing_rows(run)):
                print(f"{name}: {', '.join(results(run))} there, skipped (to do it again use another --run)")
                done = True
            elif name == "evaluate" and run.rank:                         # nothing left to share
                break
            else:
                data.each(run.frames, run.splits)                         # a broken file shows now, not after an hour
                start, done = time.time(), False
                stage(run)
                print(f"{name}: done in {duration(time.time() - start)}", flush=True)
            for path in figures.draw(folder, name, again=not done) if run.rank == 0 else ():
                print(f"{name}: drew {path}")
        if run.path("results.json").exists():
            print_table(load(run.path("results.json")))
    if run.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
