"""The stages of a run, and the table of results: its rows, times, and what is printed. Additions to the
paper: control networks, seeds, key-frame intervals, val beside test."""
import contextlib
import json
import math
import pathlib
import re
import shlex
import statistics
import time

import torch

import data
from dyncell import DECODER, VideoSegmenter, fold_batchnorm
from experiment import figures, schedules
from experiment.networks import SEARCHES, Network, networks, strategies
from experiment.predict import find_network
from experiment.runs import fields_of
from util.costs import milliseconds_in_turn, multiply_adds, parameters
from util.device import tf32
from util.errors import InputError, told
from util.files import load, read_log, save
from util.progress import Progress, duration

NEEDS = {"search": "static", "finetune": "static", "evaluate": "baseline"}


def searched(run):
    """Whether every search has all its candidates, and the controller its last update."""
    count, searches = run.recipe.search_candidates, strategies(run.recipe)
    whole = [set(range(count)) <= read_log(run.path(SEARCHES[name][0])).keys() for name in searches]
    if all(whole) and "ppo" in searches:
        return run.path("controller.pt").exists() and run.checkpoint("controller")["candidates"] >= count
    return all(whole)


def done(run, stage):
    """Whether a stage has nothing left to do. Rank 0 decides for all processes."""
    if stage == "pretrain":
        return run.finished("static")
    if stage == "search":
        return run.first(lambda: searched(run))
    if stage == "finetune":
        return all(run.finished(network.name) for network in networks(run))
    table = Table(run)
    missing = table.missing()
    return run.first(lambda: not missing and table.finished)


@contextlib.contextmanager
def stage(run, name, stages):
    """A context for a stage. Yields whether anything is to be done; prints the stage's number and its time,
    draws its figures, and says what can be done next. Raises InputError if an earlier stage is missing."""
    if name in NEEDS and not run.finished(NEEDS[name]):
        raise InputError(f"{run.path(NEEDS[name])}.pt: is not finished; run the stages before {name} first")
    start, missing, number = time.time(), not done(run, name), stages.index(name) + 1
    if missing:
        Progress.stage = f"[{number}/{len(stages)}] " if len(stages) > 1 else ""
        print(f"{name}: stage {number} of {len(stages)}", flush=True)
        if run.expected and number < len(stages):
            Progress.ends = start + schedules.seconds_of(run, [name])
            Progress.after = schedules.seconds_of(run, stages[number:])
    try:
        with told(name, run.device), tf32(name != "evaluate"):
            if missing:
                data.each(run.frames, run.splits)                 # finds a broken file now
            yield missing
    finally:
        Progress.stage, Progress.ends, Progress.after = "", 0, None
    if missing:
        run.taken[name] = time.time() - start
    print(f"{name}:", f"done in {duration(run.taken[name])}" if missing else "nothing is missing", flush=True)
    if run.rank == 0:
        for path in figures.draw(run.folder, name, again=missing):
            print(f"{name}: drew {path}")
        if name == "evaluate":
            print_end(run)
    run.barrier()


@torch.no_grad()
def frame_costs(run, video):
    """Parameters, multiply-adds of a later frame, and ms of the encoder alone, of a key frame and of a later
    frame (medians of 9), and on what. As in the evaluation: padded, batch norms folded, float32, batch 1."""
    count, video = parameters(video), fold_batchnorm(video).to(memory_format=torch.channels_last)
    image, _ = video.prepare(run.frames("val")[0][0])             # (1, 3, H, W)
    _, state = video.step(image)
    calls = {"ms_encoder": lambda: video.static.encode(image), "ms_key_frame": lambda: video.step(image),
             "ms_later_frame": lambda: video.step(image, state)}
    info = pathlib.Path("/proc/cpuinfo")     # Linux has it
    model = re.search("model name\\s*: (.*)", info.read_text() if info.exists() else "")
    machine = f"{run.device} ({model[1] if model else 'unknown'}), {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    return {"parameters": count, "multiply_adds": multiply_adds(calls["ms_later_frame"]),
            **milliseconds_in_turn(calls, repeats=9), "machine": f"{machine}, torch {torch.__version__}"}


def mean_ms(costs, every, lengths):
    """Mean ms per frame over clips of these lengths, as in Table 5: "the baseline on the first frame and the
    dynamic cell on the rest". every: the key-frame interval; 0: only the first frame is a key frame."""
    keys = sum(math.ceil(length / every) if every else 1 for length in lengths)
    return (keys * costs["ms_key_frame"] + (sum(lengths) - keys) * costs["ms_later_frame"]) / sum(lengths)


class Table:
    """The rows of results.json. Each is saved at once, so an interrupted evaluation continues."""

    def __init__(self, run):
        self.run, self.path = run, run.path("results.json")
        fields = {name: getattr(run.recipe, name) for name in fields_of(run.recipe, "end")}
        self.recipe = json.loads(json.dumps(fields))              # tuples become lists, as in a file
        saved = load(self.path, absent={})
        same = saved.get("recipe") == self.recipe                 # else the networks are scored again
        self.rows, self.finished = saved["rows"] if same else [], "best" in saved

    def missing(self):
        """[(network, key-frame intervals)] without scores. Empty except in rank 0, which evaluates alone."""
        made, rows = {(row["name"], row["key_frame_every"]) for row in self.rows}, []
        for network in [Network("static", "baseline"), *networks(self.run)]:
            intervals = dict.fromkeys(self.run.recipe.key_frames) if network.genotype else [1]
            rows.append((network, [every for every in intervals if (network.name, every) not in made]))
        return [row for row in rows if row[1] and self.run.rank == 0]

    def add(self, row):
        self.rows.append(row)
        save(self.path, {"recipe": self.recipe, "rows": self.rows})

    def finish(self, segment_clips):
        """Saves the name of the best cell on val, and the frames where it and the baseline differ most."""
        run, split, first = self.run, self.run.splits[-1], self.run.recipe.key_frames[0]
        if run.rank:
            return
        cells = [row for row in self.rows if row["genotype"] and row["key_frame_every"] == first]
        best = max(cells, key=lambda row: (not row["control"], row["val"]["miou"] or 0))["name"]
        both = [segment_clips(run, name, run.load(name), split, every)
                for name, every in (("baseline", 1), (best, first))]
        save(run.path("examples.pt"), differing_frames(run.frames(split), *both, best))
        save(self.path, {"recipe": self.recipe, "rows": self.rows, "best": best, "reported": split})


def rows_of(run, network, video, intervals, evaluate_video):
    """Yields a row for each key-frame interval. evaluate_video: train's. None is what was not measured."""
    def known(values):
        return {name: None if value != value else value for name, value in values.items()}
    costs, lengths = frame_costs(run, video), list(map(len, run.frames(run.splits[-1]).clips()))
    for every in intervals:
        row = {"name": network.name, "title": network.title, "seed": network.seed,
               "control": network.control, "key_frame_every": every,
               "genotype": network.genotype and str(network.genotype), **costs,
               "ms_sequence": mean_ms(costs, every, [run.recipe.sequence_length]),
               "ms_clip": mean_ms(costs, every, lengths)}
        for split in run.splits[1:]:
            scores = known(evaluate_video(run, network.name, video, split, every))
            row[split] = {**scores, "iou": known(scores["iou"])}
            if set(row[split]["iou"].values()) == {None}:         # not one labelled pixel: 0 is no score
                row[split].update(miou=None, fwiou=None, macc=None)
        yield row


def evaluate_network(run, command, evaluate_video):
    """Scores the network of --network on the run's data, and prints its rows; nothing is saved."""
    path, classes = find_network(run.folder, command.network), run.dataset("val").classes
    video = VideoSegmenter.load(path)
    if video.classes != classes:
        raise InputError(f"--network {path}: its classes ({', '.join(video.classes[:4])}, ...) are not those "
                         f"of {run.recipe.dataset} ({', '.join(classes[:4])}, ...)")
    genotype, video.enlarge = video.cell and getattr(video.cell, "genotype", DECODER), command.enlarge
    network, intervals = Network(path.stem, path.stem, genotype), dict.fromkeys(run.recipe.key_frames)
    with told("evaluate", run.device), tf32(False):
        rows = [*rows_of(run, network, run.to_device(video), intervals if genotype else [1], evaluate_video)]
    print_table({"rows": rows, "reported": run.splits[-1]})


def differing_frames(frames, baseline, cell, cell_name):
    """The rows of Figs. 5 and 6: of each quarter of the split the frame in which the two networks' label maps
    differ in the largest share of labelled pixels [ours]. Both yield (frame number, label map, label)."""
    best, quarter = {}, math.ceil(len(frames.list) / 4)           # {quarter: (share, frame, its two maps)}
    for k, b, label in cell:
        if frames.list[k].label is not None:                      # the baseline leaves out the others
            (_, a, _), counted = next(baseline), label != data.IGNORE
            share = ((a != b) & counted).sum().item() / max(1, counted.sum().item())
            if k // quarter not in best or share > best[k // quarter][0]:
                best[k // quarter] = share, k, a.cpu(), b.cpu()
    shares, numbers, *maps = zip(*best.values())
    (images, labels), dataset = frames[torch.tensor(numbers)], frames.dataset
    return {"images": images.cpu(), "labels": labels.cpu(), "baseline": torch.stack(maps[0]),
            "cell": torch.stack(maps[1]), "cell_name": cell_name, "differ": list(shares),
            "names": [pathlib.Path(frames.list[k].image).name for k in numbers],
            "classes": dataset.classes, "palette": dataset.palette.tolist()}


# The columns of the table and their widths; docs/glossary.md explains them.
COLUMNS = {"key frame": 10, "mIoU": 10, "consistency": 11, "parameters": 11, "mult-adds": 9, "ms later": 9,
           "sequence": 8, "clip": 6, "/ encoder": 9, "val mIoU": 10}


def percent(values):
    """The mean over seeds in %, and for several seeds the standard deviation; "-" if not measured."""
    if None in values:
        return "-"
    std = f" ±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{std}"


def print_line(title, cells, widths):
    print(f"{title:38}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths)))


def print_table(results):
    """Prints the rows of results.json: mIoU as in Table 3 (CityScapes: Table 4), parameters and times as in
    Table 5; then the IoU of each class at a network's first key-frame interval, and the genotypes."""
    split, groups, first = results["reported"], {}, {}
    for row in results["rows"]:                                   # the seeds of a row are reported as one
        groups.setdefault((row["title"], row["key_frame_every"]), []).append(row)
    print(f"\n{split} split; scores in %, ±: standard deviation over seeds; multiply-adds in G; times in ms")
    print_line("", COLUMNS, COLUMNS.values())
    for (title, every), rows in groups.items():
        row, ratios = rows[0], [row["ms_later_frame"] / row["ms_encoder"] for row in rows]
        print_line(title, [
            {0: "first only", 1: "every"}.get(every, f"every {every}"),
            *(percent([row[split][name] for row in rows]) for name in ("miou", "consistency")),
            f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e9:.2f}", f"{row['ms_later_frame']:.1f}",
            f"{row['ms_sequence']:.1f}", f"{row['ms_clip']:.1f}", f"{statistics.median(ratios):.2f}",
            percent([row["val"]["miou"] for row in rows])], COLUMNS.values())
        first.setdefault(title, rows)
    print("times on", "; ".join(dict.fromkeys(row["machine"] for row in results["rows"])), end="\n\n")
    widths = dict.fromkeys(row[split]["iou"], 10)                 # {class: width}
    print_line("IoU by class, first key-frame interval", [name[:10] for name in widths], widths.values())
    for title, rows in first.items():        # the means alone
        ious = [percent([row[split]["iou"][name] for row in rows]).split()[0] for name in widths]
        print_line(title, ious, widths.values())
    for title, rows in first.items():
        if rows[0]["genotype"]:
            print(f"{title}: {rows[0]['genotype']}")


def print_end(run):
    """Prints the table, whether later candidates have higher rewards (Fig. 3), and how to go on."""
    print_table(load(run.path("results.json")))
    for file, _, title in (SEARCHES[strategy] for strategy in strategies(run.recipe)):
        rewards = [entry["reward"] for entry in read_log(run.path(file)).values()]
        if size := len(rewards) // 4:
            means = [f"{statistics.mean(rewards[k * size:(k + 1) * size]):.2f}" for k in range(4)]
            print(f"mean reward of {title}'s candidates, {size} at a time: {' '.join(means)}")
    if run.recipe.static == "none" and run.recipe.static_epochs < 5:
        print(f"\nThese numbers mean nothing, but all works (--static-epochs {run.recipe.static_epochs}).")
    print(f"\nThe figures are in {run.path('figures')}. To segment a video of your own:\n    python train.py "
          f"--stage predict --run {shlex.quote(str(run.folder))} --input FRAMES_DIR_OR_GIF --output OUT")
