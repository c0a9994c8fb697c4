"""The command line: one flag per field of the recipe; what a call does not say is what the run's folder has.
All values are checked before any work."""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shlex
import typing

import torch.distributed as dist

import data
from dyncell import CELLS, STATICS
from experiment import schedules, weights
from experiment.networks import SEARCHES, cell_texts, named
from experiment.runs import Run, check_recipe, flag, locked
from util.errors import InputError
from util.files import load, save
from util.device import best_device, limit_memory

# The flags that only predict takes, and their defaults.
FOR_PREDICT = {"input": None, "output": None, "key_frame_every": 0, "save_confidence": False}
EPILOG = f"""[ours]: the paper does not say, so this project decided. [18]: the code of the paper's ancestor
(github.com/DrSleep/nas-segm-pytorch) decides. Cells by name: {", ".join(CELLS)}, decoder."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see python train.py --help")


def parser_for(Recipe, stages, description):
    parser = Parser(description=description.split("Read it")[0], epilog=EPILOG, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=schedules.NAMES,
                        help="the recipe. paper: the paper's; short: made smaller for a CPU; smoke: only "
                             "shows that everything runs (default: the folder's; for a new run paper where "
                             "there is a GPU, else short)")
    path = {"type": os.path.expanduser}      # the shell leaves the ~ of --data=~/x
    parser.add_argument("--data", **path, help="the dataset's folder (default: the run's, else data/DATASET)")
    parser.add_argument("--run", **path, help="the run's folder (default: runs/DATASET)")
    parser.add_argument("--stage", choices=[*stages, "predict"], help="run only this stage")
    parser.add_argument("--device", help="cuda, mps, cpu, ... (default: the best that is available)")
    parser.add_argument("--show-recipe", action="store_true", help="print what this call would do, and stop")
    own = parser.add_argument_group("--stage predict; --network also with --stage evaluate")
    own.add_argument("--input", **path, help="a folder of frames (.png, .jpg, in numeric order), an animated "
                                             "GIF, WebP or APNG, or one image")
    own.add_argument("--output", **path, help="folder for label maps, overlays and the animation")
    own.add_argument("--network", **path,
                     help="camvid: the trained one that comes with this program; static, baseline, cell-0, "
                          "...: one of --run; or a checkpoint's path (default: the cell of --run with the "
                          "best mIoU on val)")
    own.add_argument("--key-frame-every", type=int, default=0, metavar="N",
                     help="static network on every Nth frame; 0 (default): on the first of a clip only")
    own.add_argument("--enlarge", type=int, default=0, metavar="N",
                     help="enlarge frames whose longer side is less than N pixels: more accurate, slower; "
                          "0 (default): not")
    own.add_argument("--save-confidence", action="store_true",
                     help="also write the largest probability of each pixel as a grey PNG")
    fields = parser.add_argument_group("recipe (in brackets the paper's value for CamVid; --show-recipe "
                                       "prints what a call would use)")
    for field in dataclasses.fields(Recipe):
        kind, options = type(field.default), {"default": argparse.SUPPRESS}
        options["help"] = f"{field.metadata['help']} ({field.default})".replace("%", "%%")
        choices = {"dataset": data.DATASETS, "static_network": STATICS}.get(
            field.name, field.metadata["choices"])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            of, *more = typing.get_args(field.type)
            options.update(type=of, nargs="*" if ... in more else len(field.default), choices=choices)
        else:
            options.update(path if field.name in weights.FILES else {"type": kind}, choices=choices)
        fields.add_argument(flag(field.name), **options)
    return parser


def parse(arguments, Recipe, recipe_for, stages, description):
    """The command line -> a namespace with its flags, the run's folder, its recipe, schedule and data folder,
    and the stages to do. Raises InputError naming a flag that can't work.

    What is not given is taken from the folder's recipe.json. A first call decides: the paper's schedule where
    there is a GPU, else short."""
    command = parser_for(Recipe, stages, description).parse_args(arguments)
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(Recipe)
             if hasattr(command, field.name)}
    for name, value in given.items():
        if name in weights.FILES and os.path.exists(value):       # the folder remembers it from anywhere
            given[name] = os.path.abspath(value)
        elif isinstance(value, list):
            given[name] = tuple(value)
    if "cell" in given:
        given["cell"] = cell_texts(given["cell"])
    command.given, command.named_run = given, command.run is not None
    command.run = pathlib.Path(command.run or f"runs/{given.get('dataset', 'synthetic')}")
    command.stages = [command.stage] if command.stage else list(stages)
    folder = None if command.stage == "predict" else folder_of(command.run, Recipe)
    dataset = given.get("dataset") or (folder["recipe"].dataset if folder else "synthetic")
    if folder and dataset != folder["recipe"].dataset:
        raise InputError(f"--dataset {dataset}: {command.run} is a run on {folder['recipe'].dataset}; use "
                         "another --run")
    if folder and command.schedule in (None, folder["schedule"]):
        command.schedule, command.recipe = folder["schedule"], dataclasses.replace(folder["recipe"], **given)
    else:
        for name in weights.FILES if folder else ():              # another schedule, the same files
            given.setdefault(name, getattr(folder["recipe"], name))
        short = dataset == "synthetic" or best_device() == "cpu"
        command.schedule = command.schedule or ("short" if short else "paper")
        command.recipe = recipe_for(dataset=dataset, schedule=command.schedule, **{
            name: value for name, value in given.items() if name != "dataset"})
    command.data_given = command.data is not None
    if command.data is None and folder:
        command.data = folder["data"]
    command.data = os.path.abspath(command.data or f"data/{dataset}")
    check(command.recipe)
    check_flags(command)
    return command


def folder_of(run, Recipe):
    """What the run's folder knows: {"schedule", "data", "recipe": a Recipe}; None for a new run. Raises
    InputError if another version of this program wrote it."""
    path = run / "recipe.json"
    if not path.exists():
        return None
    saved, known = load(path), {field.name for field in dataclasses.fields(Recipe)}
    fields = saved.get("recipe") if isinstance(saved, dict) else None
    if not isinstance(fields, dict) or fields.keys() != known:
        names = ", ".join(sorted(known ^ set(fields or saved))[:6])
        raise InputError(f"{path}: made by another version ({names}); use another --run")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return {**saved, "recipe": Recipe(**values)}                  # JSON has no tuples


def check_flags(command):
    """Raises InputError for a flag that is missing, or that has no effect in this call."""
    if command.network and "cell" in command.given:
        raise InputError("--cell: does nothing with --network, which holds its own cell; leave one out")
    if command.enlarge < 0:
        raise InputError(f"--enlarge {command.enlarge}: must be 0 or more")
    if command.stage == "predict":
        if not command.input or not command.output:
            raise InputError("--input and --output: needed for --stage predict")
        if command.key_frame_every < 0:
            raise InputError(f"--key-frame-every {command.key_frame_every}: must be 0 or more")
        if command.data_given:
            raise InputError("--data: does nothing with --stage predict, which reads --input; leave it out")
        return
    for name, default in FOR_PREDICT.items():
        if getattr(command, name) != default:
            raise InputError(f"{flag(name)}: does nothing without --stage predict; add that or leave it out")
    if command.enlarge and not command.network:
        raise InputError("--enlarge: only with --stage predict, or --stage evaluate and --network")
    if command.network and command.stage != "evaluate":
        raise InputError("--network: only with --stage predict or evaluate; add one of them or leave it out")
    if command.data_given and command.recipe.dataset == "synthetic":
        raise InputError("--data: does nothing with the synthetic videos, which are drawn; name its "
                         "--dataset, camvid or cityscapes, or leave it out")
    if command.recipe.latency_target and not command.recipe.latency_weight:
        raise InputError("--latency-target: does nothing without --latency-weight; add that or leave it out")


def check(recipe):
    """Raises InputError naming the flag whose value can't work. The ranges stand on the recipe's fields."""
    for field in dataclasses.fields(recipe):
        value, least, below = getattr(recipe, field.name), field.metadata["least"], field.metadata["below"]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (bool, str)):
                continue
            low = number > 0 if least is None else number >= least
            if not (math.isfinite(number) and low and number < below):
                wanted = "above 0" if least is None else f"{least} or more"
                raise InputError(f"{flag(field.name)} {number}: must be {wanted}"
                                 + (f", and below {below}" if below < math.inf else ""))
    for name in ("static_scale", "end_scale"):
        if getattr(recipe, name)[0] > getattr(recipe, name)[1]:
            raise InputError(f"{flag(name)}: the first number must not be above the second")
    if not recipe.static_epochs and recipe.static == "none":
        raise InputError("--static-epochs 0: only with --static FILE; give 1 or more")
    if not recipe.key_frames:
        raise InputError("--key-frames: must have one value or more")
    if not recipe.cells and not recipe.cell:
        raise InputError("--cells 0: there is no cell to train; name one by --cell")


def check_run(run, command):
    """Downloads what nobody has named, and checks data, weights, folder and memory, before anything is
    written. Raises InputError; one with all problems of the data."""
    r, dataset = run.recipe, data.dataset_class(run.recipe.dataset)
    for name in ("static_batch", "cell_batch"):
        size = getattr(r, name)
        if 1 < run.world and size < 2 * run.world:               # the batch norm of gap needs two images
            raise InputError(f"{flag(name)} {size}: {run.world} processes share it and need two images each, "
                             f"so give {2 * run.world} or more")
    # A folder that the run remembers was given, too. Then fetch() only looks whether it exists.
    given = command.data_given or command.data != os.path.abspath(f"data/{r.dataset}")
    if given:
        data.fetch(dataset, run.root, given)
    if "pretrain" in command.stages and not run.path("static.pt").exists():
        weights.begin(STATICS[r.static_network](run.num_classes), r, dataset.classes)     # or it raises
    data.fetch(dataset, run.root, given)
    try:
        splits = data.each(run.dataset, run.splits)
    except InputError:                       # check the files, too, so that one message names all problems
        data.each(run.frames, run.splits)
        raise
    count = len(data.sequences(splits["train"].clips, r.sequence_length))
    if not count:
        raise InputError(f"--sequence-length {r.sequence_length}: no clip of {r.dataset} has so many "
                         "consecutive frames, the last one labelled")
    if count < 2 * run.world:
        raise InputError(f"{run.root}: its train split has {count} sequences of {r.sequence_length} frames; "
                         "each process needs two, as the batch norm of gap has only one value per image")
    if command.network:                      # is scored on the data alone: the folder is not touched
        return
    check_folder(run)
    for stage in command.stages:
        if not (stage == "pretrain" and run.path("static.pt").exists()):
            schedules.check_memory(run, stage)


def check_folder(run):
    """Raises InputError if a file in the run's folder was made with another recipe, naming the file and the
    fields."""
    for path in sorted(run.folder.glob("*.pt")):
        if path.name != "examples.pt":
            run.checkpoint(path.stem)
    for name, _, _ in SEARCHES.values():     # a log has no recipe of its own
        if run.path(name).exists() and run.path("recipe.json").exists():
            check_recipe(run.path(name), load(run.path("recipe.json"))["recipe"], run.recipe)
    named(run)                               # does --cell give a name that another cell has?


@contextlib.contextmanager
def open_run(command, recipe_for):
    """A context with the run of a command: its data and folder are checked, and the folder is locked."""
    run = Run(command.run, command.recipe, command.data, command.device)
    run.first(lambda: check_run(run, command))
    if command.network:
        yield run
        return
    if run.device.type == "cpu":
        limit_memory()
    with locked(run):
        path, recipe = run.path("recipe.json"), json.loads(json.dumps(dataclasses.asdict(run.recipe)))
        saved = {"schedule": command.schedule, "data": command.data, "recipe": recipe}
        if run.rank == 0 and not (path.exists() and load(path) == saved):
            save(path, saved)
        if run.rank == 0:
            schedules.announce(run, command, recipe_for)
        if run.world > run.recipe.controller_rollout and "search" in command.stages:
            print(f"search: a round has {run.recipe.controller_rollout} candidates for {run.world} "
                  f"processes, so some wait; --controller-rollout {run.world} gives one to each")
        yield run
    if run.store:
        dist.destroy_process_group()


def show_recipe(command):
    """--show-recipe: every field of the recipe as a flag that could be typed, with its section."""
    print(f"schedule {command.schedule}, data {command.data}, run {command.run}, "
          f"stages {' '.join(command.stages)}")
    for field in dataclasses.fields(command.recipe):
        value = getattr(command.recipe, field.name)
        values = value if isinstance(value, tuple) else [value]
        text = f"{flag(field.name)} " + " ".join(shlex.quote(str(one)) for one in values)
        if isinstance(value, bool):
            text = flag(field.name) if value else f"--no-{flag(field.name)[2:]}"
        print(f"  {text:36} {field.metadata['help']}")
