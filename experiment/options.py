"""The command line: a flag for each field of the recipe. What a call omits is what the run's folder has."""
import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import sys
import typing

import torch
import torch.distributed as dist

import data
from dyncell import CELLS, STATICS
from experiment import schedules, weights
from experiment.networks import SEARCHES, cell_texts, named
from experiment.runs import STAGES, Run, check_recipe, flag, locked, stage_of
from util.device import best_device, limit_memory
from util.errors import InputError
from util.files import load, save


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see python train.py --help")


def parser_for(Recipe, stages, description):
    marks = ("[ours]: the paper does not say, so this project decided. [18]: the code of its ancestor\n"
             f"(github.com/DrSleep/nas-segm-pytorch) decides. Cells by name: {', '.join(CELLS)}, decoder.")
    parser = Parser(description=description.split("Read it")[0], epilog=marks, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    path = {"type": os.path.expanduser}      # the shell leaves the ~ of --data=~/x
    number = {"type": int, "default": 0, "metavar": "N"}
    parser.add_argument("--schedule", choices=("paper", "short", "smoke"),
                        help="the recipe. short: made for a CPU; smoke: only shows that everything runs "
                             "(default: the folder's; a new run: paper for real videos on a GPU, else short)")
    parser.add_argument("--data", **path, help="the dataset's folder (default: the run's, else data/DATASET)")
    parser.add_argument("--run", **path, help="the run's folder (default: runs/DATASET)")
    parser.add_argument("--stage", choices=[*stages, "predict"], help="run only this stage")
    parser.add_argument("--device", help="cuda, mps, cpu, ... (default: the best that is available)")
    parser.add_argument("--show-recipe", action="store_true", help="print what this call would do, and stop")
    own = parser.add_argument_group("--stage predict; --network also with --stage evaluate")
    own.add_argument("--input", **path, help="a folder of frames, a GIF, WebP or APNG, or one image")
    own.add_argument("--output", **path, help="folder for label maps, overlays and the animation")
    own.add_argument("--network", **path, help="camvid: comes with this program; static, cell-0, ...: one of "
                                               "--run (default: its best cell on val); or a checkpoint")
    own.add_argument("--key-frame-every", **number, help="a key frame is every Nth frame; 0: the first only")
    own.add_argument("--enlarge", **number, help="enlarge frames whose longer side is below N pixels; 0: not")
    own.add_argument("--save-confidence", action="store_true", help="also write each pixel's probability")
    fields = parser.add_argument_group("recipe (in brackets the paper's value for CamVid; see --show-recipe)")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        options = {"type": kind, "choices": field.metadata["choices"]}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            of, *more = typing.get_args(field.type)
            many = "+" if field.default else "*"
            options.update(type=of, nargs=many if ... in more else len(field.default))
        elif field.name in weights.FILES:
            options = path
        fields.add_argument(flag(field.name), default=argparse.SUPPRESS, **options,
                            help=f"{field.metadata['help']} ({field.default})".replace("%", "%%"))
    return parser


def parse(arguments, Recipe, recipe_for, stages, description):
    """The command line -> a namespace of its flags, the run's folder, recipe, schedule, data and stages.
    What is not given is the folder's; a new run's schedule is paper for real videos on a GPU, else short.
    Raises InputError naming a flag that can't work."""
    command = parser_for(Recipe, stages, description).parse_args(arguments)
    command.given = given = {field.name: getattr(command, field.name) for field in dataclasses.fields(Recipe)
                             if hasattr(command, field.name)}
    for name, value in given.items():
        if name in weights.FILES and os.path.exists(value):       # the folder remembers it from anywhere
            given[name] = os.path.abspath(value)
        elif isinstance(value, list):
            given[name] = cell_texts(value) if name == "cell" else tuple(value)
    if command.stage == "predict" and not (command.network or command.run or "dataset" in given):
        raise InputError("--run, --network: give one of them, such as --network camvid for streets")
    command.run = pathlib.Path(command.run or f"runs/{given.get('dataset', 'synthetic')}")
    command.stages = [command.stage] if command.stage else list(stages)
    folder = None if command.stage == "predict" else folder_of(command.run, Recipe)
    dataset = given.get("dataset", folder["recipe"].dataset if folder else "synthetic")
    if folder and dataset != (made := folder["recipe"].dataset):
        raise InputError(f"--dataset {dataset}: {command.run} is a run on {made}; use another --run")
    if folder and command.schedule in (None, folder["schedule"]):
        command.schedule, command.recipe = folder["schedule"], dataclasses.replace(folder["recipe"], **given)
    else:
        short = dataset == "synthetic" or (command.device or best_device()) == "cpu"
        command.schedule = command.schedule or ("short" if short else "paper")
        files = {name: getattr(folder["recipe"], name) for name in weights.FILES} if folder else {}
        command.recipe = recipe_for(schedule=command.schedule, **{**files, **given, "dataset": dataset})
    check(command.recipe)
    check_flags(command)
    default, typed = os.path.abspath(f"data/{dataset}"), command.data is not None
    made = folder["data"] if folder else default
    command.data = os.path.abspath(command.data or made)
    command.data_given = typed or command.data != default         # then it must exist
    if (folder and not command.network and os.path.exists(made)   # else it may have been moved
            and os.path.realpath(made) != os.path.realpath(command.data)):
        raise InputError(f"--data {command.data}: {command.run} is a run on {made}; use another --run")
    return command


def folder_of(run, Recipe):
    """What the run's folder knows: {"schedule", "data", "recipe": a Recipe}; None for a new run. Raises
    InputError if another version of this program wrote it."""
    path = run / "recipe.json"
    if not path.exists():
        return None
    saved = load(path)
    fields = saved.get("recipe", {})
    if differing := fields.keys() ^ {field.name for field in dataclasses.fields(Recipe)}:
        raise InputError(f"{path}: another version's ({', '.join(sorted(differing)[:6])}); use another --run")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return {**saved, "recipe": Recipe(**values)}                  # JSON has no tuples


def check_flags(command):
    """Raises InputError for a flag that is missing, or that has no effect in this call."""
    predict, files = command.stage == "predict", command.recipe.dataset != "synthetic"
    network = predict or command.stage == "evaluate"
    needs = [                                # flags, what they need to have an effect, whether that is there
        ("input output key_frame_every save_confidence", "--stage predict", predict),
        ("network", "--stage predict or evaluate", network),
        ("enlarge", "--stage predict, or evaluate with --network", predict or network and command.network),
        ("data", "a --dataset of files, and another stage than predict", files and not predict),
        ("cell input_pad", "a call without --network, which has its own", not command.network)]
    for name, what, works in ((name, *more) for names, *more in needs for name in names.split()):
        value = getattr(command, name, None)
        if value and not works:
            raise InputError(f"{flag(name)}: does nothing here, as it needs {what}; leave it out")
    if min(command.key_frame_every, command.enlarge) < 0:
        raise InputError("--key-frame-every, --enlarge: must be 0 or more")
    if predict and (useless := [*command.given.keys() - {"dataset"}]):
        raise InputError(f"{flag(useless[0])}: does nothing with --stage predict; leave it out")
    if predict and not (command.input and command.output and os.path.exists(command.input)):
        raise InputError(f"--input and --output: --stage predict needs both; {command.input} must exist")


def check(recipe):
    """Raises InputError naming the flag whose value can't work. The ranges stand on the recipe's fields."""
    for field in dataclasses.fields(recipe):
        value, least, below = getattr(recipe, field.name), field.metadata["least"], field.metadata["below"]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (bool, str)):
                continue
            if not ((number > 0 if least is None else number >= least) and number < below):       # or NaN
                wanted = "above 0" if least is None else f"{least} or more"
                raise InputError(f"{flag(field.name)} {number}: must be {wanted}"
                                 + f", and below {below}" * (below < math.inf))
    if 0 < recipe.class_weights <= 1:                             # 1 / log(K + p) may be negative
        raise InputError(f"--class-weights {recipe.class_weights}: must be 0 or above 1, as ENet's 1.02")
    if not recipe.static_epochs and recipe.static == "none":
        raise InputError("--static-epochs 0: only with --static FILE; give 1 or more")
    if not recipe.cells and not recipe.cell:
        raise InputError("--cells 0: there is no cell to train; name one by --cell")


def check_run(run, command):
    """Downloads what nobody has named, and checks data, weights, folder and memory, before anything is
    written. Raises InputError; one with all problems of the data."""
    r, dataset = run.recipe, data.dataset_class(run.recipe.dataset)
    if command.data_given:                   # nothing is downloaded: is it there?
        data.fetch(dataset, run.root, True)
    if "pretrain" in command.stages and not run.path("static.pt").exists():
        weights.begin(STATICS[r.static_network](run.num_classes), r, dataset.classes)     # or it raises
    data.fetch(dataset, run.root, command.data_given)
    names = run.splits[1 if command.network else 0:]              # --network: train is not read
    try:
        splits = data.each(run.dataset, names)
    except InputError:                       # check the files, too, so that one message names all problems
        data.each(run.frames, names)
        raise
    if command.network:                      # which is scored on the data alone: the folder is not touched
        return
    sequences = f"--sequence-length {r.sequence_length}: such sequences of train that end with a label"
    sizes = {sequences: len(data.sequences(splits["train"].clips, r.sequence_length)),
             "--static-batch": r.static_batch, "--cell-batch": r.cell_batch}
    for what, count in sizes.items():
        if count < 2 * run.world:            # the batch norm of gap has one value per image
            raise InputError(f"{what}: {count}; each of {run.world} process(es) needs two")
    check_folder(run)
    begun = {"pretrain"} if run.path("static.pt").exists() else set()
    if lack := schedules.lacking(run, r, {*command.stages} - begun):
        raise InputError(lack + ", or --schedule short and another --run" * (command.schedule == "paper"))


def check_folder(run):
    """Raises InputError naming a file of the folder that was made with another recipe, and the fields."""
    for path in sorted(run.folder.glob("*.pt"), key=lambda path: (STAGES.index(stage_of(path)), path)):
        if path.name != "examples.pt":
            run.checkpoint(path.stem)
    for name, _, _ in SEARCHES.values():     # a log has no recipe of its own
        if run.path(name).exists() and run.path("recipe.json").exists():
            check_recipe(run.path(name), load(run.path("recipe.json"))["recipe"], run.recipe)
    list(named(run))                         # does --cell give a name that another cell has?


@contextlib.contextmanager
def open_run(command, recipe_for):
    """A context with the run of a command: its data and folder are checked, and the folder is locked."""
    run = Run(command.run, command.recipe, command.data, command.device)
    if not command.network:
        print(f"{run.folder}: {run.recipe.dataset}, schedule {command.schedule}, on {run.device}, "
              f"{run.world} process(es) of {torch.get_num_threads()} threads", flush=True)
    run.first(lambda: check_run(run, command))
    if run.device.type == "cpu":
        limit_memory()
    if command.network:                      # the folder stays as it is
        yield run
        return
    with locked(run):
        if run.rank == 0:
            save(run.path("recipe.json"), {"schedule": command.schedule, "data": command.data,
                                           "recipe": dataclasses.asdict(run.recipe)})
            schedules.announce(run, command, recipe_for)
        try:
            yield run
        except SystemExit as ended:
            if ended.code > 128:             # of run_main, at Ctrl-C and SIGTERM; 2: a mistake in rank 0
                print("the same command continues", file=sys.stderr)
            raise
    if run.store:
        dist.destroy_process_group()


def show_recipe(command):
    """--show-recipe: every field of the recipe as a flag that could be typed, with its section."""
    print(f"schedule {command.schedule}, data {command.data}, run {command.run}, "
          f"stages {' '.join(command.stages)}")
    for field in dataclasses.fields(command.recipe):
        value, text = getattr(command.recipe, field.name), flag(field.name)
        if isinstance(value, bool):
            text = text if value else f"--no-{text[2:]}"
        else:
            text = shlex.join([text, *map(str, value if isinstance(value, tuple) else [value])])
        print(f"  {text:36} {field.metadata['help']}")
