"""The command line: one flag per field of the recipe, and checks of all values before any work."""
import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import typing

import torch
import torch.distributed as dist

import data
from experiment import memory, weights
from experiment.networks import SEARCHES, cell_text
from experiment.runs import Run, check_recipe, flag, locked
from util.errors import InputError
from util.files import load, save

CHOICES = {"early_stop_rule": ("as-in-18", "average"), "search_strategy": ("ppo", "random", "both")}
MAY_BE_ZERO = ("seed", "validate_every", "input_longer_side", "input_pad", "key_frames", "weight_decay",
               "gradient_norm", "momentum", "controller_entropy", "controller_replay",
               "auxiliary_weight", "poly_power", "cells", "cell_dropout", "latency_weight", "latency_target",
               "end_epochs")
BELOW_ONE = ("meta_val_share", "controller_clip", "controller_baseline_decay", "early_stop_decay", "momentum",
             "cell_dropout")
FOR_PREDICT = {"input": None, "output": None, "network": None, "key_frame_every": 0}      # flag: default


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see python train.py --help")


def parse(arguments, Recipe, recipe_for, stages, description):
    """The command line -> a namespace with its flags, the run's folder, its recipe and the stages to do.

    Raises InputError naming a flag that can't work."""
    parser = Parser(description=description.split("Read it")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=("paper", "short", "smoke"),
                        help="defaults of the recipe. paper: the paper's (default for camvid, cityscapes); "
                             "short: made smaller for a CPU (default for synthetic); smoke: only shows "
                             "that everything runs")
    parser.add_argument("--data", help="the dataset's folder (default: data/DATASET)")
    parser.add_argument("--run", help="the run's folder (default: runs/DATASET)")
    parser.add_argument("--stage", choices=[*stages, "predict"], help="run only this stage")
    parser.add_argument("--device", help="cuda, mps, cpu, ... (default: the best that is available)")
    own = parser.add_argument_group("--stage predict")
    own.add_argument("--input", help="a folder of frames (.png, .jpg, in numeric order), an animated GIF, "
                                     "WebP or APNG, or one image")
    own.add_argument("--output", help="folder for label maps, overlays and the animation")
    own.add_argument("--network", help="static, baseline, cell-0, ..., or a checkpoint's path (default: "
                                       "the cell with the best mIoU on val)")
    own.add_argument("--key-frame-every", type=int, default=0, metavar="N",
                     help="static network on every Nth frame; 0 (default): on the first only")
    fields = parser.add_argument_group("recipe (defaults: paper, CamVid)")
    for field in dataclasses.fields(Recipe):
        kind, options = type(field.default), {"default": argparse.SUPPRESS}
        options["help"] = f"{field.metadata['help']} ({field.default})".replace("%", "%%")
        choices = data.DATASETS if field.name == "dataset" else CHOICES.get(field.name)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            of, *more = typing.get_args(field.type)
            options.update(type=of, nargs="*" if ... in more else len(field.default), choices=choices)
        else:
            options.update(type=kind, choices=choices)
        fields.add_argument(flag(field.name), **options)
    command = parser.parse_args(arguments)

    given = {}
    for field in dataclasses.fields(Recipe):
        if hasattr(command, field.name):
            value = getattr(command, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if "cell" in given:
        given["cell"] = tuple(dict.fromkeys(map(cell_text, given["cell"])))
    dataset = given.get("dataset", "synthetic")
    command.given, command.run = given, pathlib.Path(command.run or f"runs/{dataset}")
    command.stages = [command.stage] if command.stage else list(stages)
    path = command.run / "recipe.json"
    if command.stage == "predict":           # the rest comes from the checkpoint
        command.recipe = recipe_for(**{"dataset": dataset, "schedule": command.schedule or "paper", **given})
    elif command.stage and not command.schedule and path.exists():        # one stage: the folder's recipe
        command.recipe = dataclasses.replace(as_recipe(load(path), path, Recipe), **given)
    else:
        schedule = command.schedule or ("short" if dataset == "synthetic" else "paper")
        command.recipe = recipe_for(**{"dataset": dataset, "schedule": schedule, **given})
    check(command.recipe)
    check_flags(command)
    return command


def check_flags(command):
    """Raises InputError for a flag that is missing, or that has no effect in this call."""
    if command.stage == "predict":
        if not command.input or not command.output:
            raise InputError("--input and --output: needed for --stage predict")
        if command.key_frame_every < 0:
            raise InputError(f"--key-frame-every {command.key_frame_every}: must be 0 or more")
        if command.data:
            raise InputError("--data: does nothing with --stage predict, which reads --input; leave it out")
        return
    for name, default in FOR_PREDICT.items():
        if getattr(command, name) != default:
            raise InputError(f"{flag(name)}: does nothing without --stage predict; add that or leave it out")
    if command.data and command.recipe.dataset == "synthetic":
        raise InputError("--data: does nothing with the synthetic videos, which are drawn; name its "
                         "--dataset, camvid or cityscapes, or leave it out")
    if command.recipe.latency_target and not command.recipe.latency_weight:
        raise InputError("--latency-target: does nothing without --latency-weight; add that or leave it "
                         "out")


def as_recipe(saved, path, Recipe):
    """A Recipe from a saved dict. Raises InputError naming the fields if another version of this program
    wrote it."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(saved, dict) or saved.keys() != known:
        names = ", ".join(sorted(known ^ set(saved)))
        raise InputError(f"{path}: made by another version ({names}); use another --run")
    values = {}
    for name, value in saved.items():
        values[name] = tuple(value) if isinstance(value, list) else value         # JSON has no tuples
    return Recipe(**values)


def check(recipe):
    """Raises InputError naming the flag whose value can't work."""
    for name, value in dataclasses.asdict(recipe).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (bool, str)):
                continue
            may_be_zero = name in MAY_BE_ZERO or name == "static_epochs" and recipe.static != "none"
            if not math.isfinite(number) or number < 0 or number == 0 and not may_be_zero:
                least = "0 or more" if may_be_zero else "more than 0"
                raise InputError(f"{flag(name)} {number}: must be {least}")
        if name in BELOW_ONE and value >= 1:
            raise InputError(f"{flag(name)} {value}: must be below 1")
        if name in ("static_batch", "search_batch", "cell_batch") and value < 2:
            raise InputError(f"{flag(name)} {value}: must be 2 or more, as the batch norm of gap has only "
                             "one value per image")
        if name in ("static_scale", "end_scale") and value[0] > value[1]:
            raise InputError(f"{flag(name)} {value}: the first number must not be above the second")
    if not recipe.key_frames:
        raise InputError("--key-frames: must have one value or more")
    if not recipe.cells and not recipe.cell:
        raise InputError("--cells 0: there is no cell to train; name one by --cell")
    if recipe.sequence_length < 2:
        raise InputError(f"--sequence-length {recipe.sequence_length}: must be 2 or more, as a cell needs "
                         "a previous frame")


def find_data(run):
    """Downloads the data if needed and possible, and checks it before anything is written. Raises one
    InputError with all problems."""
    dataset, length = data.dataset_class(run.recipe.dataset), run.recipe.sequence_length
    if run.rank == 0:
        data.fetch(dataset, run.root)
    run.wait()
    try:
        splits = data.each(run.dataset, run.splits)
    except InputError:                       # check the files, too, so that one message names all problems
        data.each(run.frames, run.splits)
        raise
    count = len(data.sequences(splits["train"].clips, length))
    if not count:
        raise InputError(f"--sequence-length {length}: no clip of {run.recipe.dataset} has so many "
                         "consecutive frames, the last one labelled")
    if count < 2 * run.world:
        raise InputError(f"{run.root}: its train split has {count} sequences of {length} frames; each "
                         "process needs two, as the batch norm of gap has only one value per image")


def check_folder(run):
    """Raises InputError if a file in the run's folder was made with another recipe, naming the file and the
    fields."""
    for path in sorted(run.folder.glob("*.pt")):
        if path.name.endswith(".partial.pt"):
            raise InputError(f"{path}: made by an earlier version, which this one can't continue; use "
                             "another --run")
        if path.name != "examples.pt":
            run.checkpoint(path.stem)
    for name, _, _ in SEARCHES.values():
        if run.path(name).exists() and run.path("recipe.json").exists():
            check_recipe(run.path(name), load(run.path("recipe.json")), run.recipe, "search")


@contextlib.contextmanager
def open_run(command):
    """A context with the run of a command: its data and folder are checked, and the folder is locked."""
    run = Run(command.run, command.recipe, command.data or f"data/{command.recipe.dataset}", command.device)
    run.join()
    find_data(run)
    check_folder(run)
    if "pretrain" in command.stages and not run.path("static.pt").exists():
        weights.look(run.recipe)
    with locked(run):
        path, recipe = run.path("recipe.json"), json.loads(json.dumps(dataclasses.asdict(run.recipe)))
        if run.rank == 0 and not (path.exists() and load(path) == recipe):
            save(path, recipe)
        threads = f"{torch.get_num_threads()} threads"
        if run.world > 1:
            threads += f" in each of {run.world} processes"
        print(f"{run.folder}: {run.recipe.dataset} on {run.device}, {threads}")
        if run.world > run.recipe.controller_rollout and "search" in command.stages:
            print(f"search: a round has {run.recipe.controller_rollout} candidates for {run.world} "
                  f"processes, so some wait; --controller-rollout {run.world} gives one to each")
        memory.warn(run, command.stages)
        yield run
    if run.world > 1:
        dist.destroy_process_group()
