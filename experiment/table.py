"""The stages of a run, and the table of results: its rows, latency, and what is printed.

Additions to the paper: control networks, seeds, key-frame intervals, val beside test."""
import collections
import contextlib
import hashlib
import json
import math
import pathlib
import platform
import re
import shlex
import statistics
import time

import torch

import data
from dyncell import DECODER, VideoSegmenter, fold_batchnorm, make_cell
from experiment import figures
from experiment.networks import SEARCHES, Network, networks, strategies
from experiment.runs import fields_of
from util.costs import milliseconds_in_turn, multiply_adds, parameters
from util.device import set_tf32
from util.errors import InputError, told
from util.files import load, read_log, save
from util.progress import Progress, duration

# ---------------------------------------------------------------------------------------------------------
# The stages of a command

NEEDS = {"search": "static", "finetune": "static", "evaluate": "baseline"}


def logs(run):
    """{strategy: Log} of the run's searches."""
    return {strategy: run.log(SEARCHES[strategy][0]) for strategy in strategies(run.recipe)}


def searched(run):
    """Whether every search has all its candidates, and the controller its last update."""
    count = run.recipe.search_candidates
    for strategy in strategies(run.recipe):
        if not set(range(count)) <= read_log(run.path(SEARCHES[strategy][0])).keys():
            return False
        if strategy == "ppo" and not (run.path("controller.pt").exists()
                                      and run.checkpoint("controller").get("candidates", 0) >= count):
            return False
    return True


def done(run, stage):
    """Whether a stage has nothing left to do."""
    if stage == "pretrain":
        return run.finished("static")
    if stage == "search":
        return run.broadcast(run.rank == 0 and searched(run))
    if stage == "finetune":
        return all(run.finished(network.name) for network in networks(run))
    table = Table(run)
    missing = table.missing()                                     # rank 0 decides
    return run.broadcast(not missing and table.finished)


@contextlib.contextmanager
def stage(run, name, stages):
    """A context for a stage. Yields whether anything is to be done; prints the stage's number and its time,
    and draws its figures. Raises InputError if an earlier stage is missing."""
    if name in NEEDS and not run.finished(NEEDS[name]):
        raise InputError(f"{run.path(NEEDS[name])}.pt: is not there or not finished, and --stage {name} "
                         "needs it; run the earlier stages first")
    start, missing = time.time(), not done(run, name)
    set_tf32(name != "evaluate")
    if missing:
        Progress.stage = f"[{stages.index(name) + 1}/{len(stages)}] " if len(stages) > 1 else ""
        print(f"{name}: stage {stages.index(name) + 1} of {len(stages)}", flush=True)
    try:
        with told(name, run.device):
            if missing:
                data.each(run.frames, run.splits)                 # finds a broken file now
            yield missing
    finally:
        Progress.stage = ""
    took = f"done in {duration(time.time() - start)}" if missing else "nothing is missing"
    print(f"{name}: {took}", flush=True)
    if run.rank == 0:
        for path in figures.draw(run.folder, name, again=missing):
            print(f"{name}: drew {path}")
        if name == "evaluate":
            print_table(load(run.path("results.json")))
            print_rise(run)
            if run.recipe.static == "none" and run.recipe.static_epochs < 5:
                print("\nThese numbers mean nothing: the run only shows that everything works "
                      f"(--static-epochs {run.recipe.static_epochs}).")
        if name == stages[-1]:
            print_next(run, name)
    run.barrier()


def print_next(run, name):
    """Prints what can be done after the last stage of a command."""
    after = {"pretrain": "search", "search": "finetune", "finetune": "evaluate"}
    if name in after:
        print(f"next: the same command with --stage {after[name]}")
    else:
        print(f"\nThe figures are in {run.path('figures')}. To segment a video of your own:\n    python "
              f"train.py --stage predict --run {shlex.quote(str(run.folder))} --input FRAMES_DIR_OR_GIF "
              "--output OUT")


# ---------------------------------------------------------------------------------------------------------
# Latency

@torch.no_grad()
def weigh_latency(run, genotype, static, stored, entry):
    """A candidate's reward times (time / target) ** -latency_weight, and its time in the log. [ours], after
    the outlook in Sect. 1. The early stop compares half-way rewards without it.

    The time is the cell's, in ms per frame: batch norms folded, batch 1. It is measured, so such a search is
    only as reproducible as the machine's times."""
    if not run.recipe.latency_weight:
        return

    def timed(genotype):
        cell = make_cell(genotype, static).to(run.device).eval()
        cell = fold_batchnorm(cell).to(memory_format=torch.channels_last)
        return lambda: cell(*inputs)

    inputs = []                                                   # as DynamicCell takes them
    for name in ("layer4", "dec", "layer2", "layer3", "layer4", "layer1"):
        if name in stored.maps:                                   # layer1 is stored only if it is needed
            inputs.append(stored.maps[name][:1].float().contiguous(memory_format=torch.channels_last))
    ms = milliseconds_in_turn({"cell": timed(genotype), "decoder": timed(DECODER)})
    entry["ms"], target = ms["cell"], run.recipe.latency_target or ms["decoder"]
    entry["reward"] *= (entry["ms"] / target) ** -run.recipe.latency_weight


@torch.no_grad()
def frame_costs(run, video):
    """Parameters, multiply-adds of a later frame, and ms of the encoder alone, of a key frame and of a later
    frame (medians of 9). As in the evaluation: padded, batch norms folded, float32, batch 1."""
    image, label = run.frames("val")[0]
    image, _ = data.pad(data.normalise(image[None]), label[None], video.pad)      # (1, 3, H, W)
    image, count = image.contiguous(memory_format=torch.channels_last), parameters(video)
    video = fold_batchnorm(video).to(memory_format=torch.channels_last)
    _, state = video.step(image)
    calls = {"ms_encoder": lambda: video.static.encode(image), "ms_key_frame": lambda: video.step(image),
             "ms_later_frame": lambda: video.step(image, state)}
    ms = milliseconds_in_turn(calls, repeats=9)
    return {"parameters": count, "multiply_adds": multiply_adds(calls["ms_later_frame"]), **ms,
            "machine": machine(run.device)}


def machine(device):
    """What times were measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = pathlib.Path("/proc/cpuinfo")                          # Linux has it
    model = re.search("model name\\s*: (.*)", info.read_text() if info.exists() else "")
    model = model[1] if model else platform.processor() or platform.machine()
    return f"{device} ({model}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def mean_times(run, costs, every):
    """Mean ms per frame, as in Table 5: "the baseline on the first frame and the dynamic cell on the rest".
    Once over a sequence of the training's length, once over the clips of the reported split.

    every: the key-frame interval; 0: only the first frame is a key frame"""
    def mean(lengths):
        total = 0
        for length in lengths:
            keys = math.ceil(length / every) if every else 1
            total += keys * costs["ms_key_frame"] + (length - keys) * costs["ms_later_frame"]
        return total / sum(lengths)

    clips = [len(clip) for clip in run.frames(run.splits[-1]).clips()]
    return {"ms_sequence": mean([run.recipe.sequence_length]), "ms_clip": mean(clips)}


# ---------------------------------------------------------------------------------------------------------
# The rows

class Table:
    """The rows of results.json. Each is saved at once, so an interrupted evaluation continues."""

    def __init__(self, run):
        self.run, self.path, self.rows, self.finished = run, run.path("results.json"), [], False
        fields = fields_of(run.recipe, "end")
        values = json.dumps([2, *([name, getattr(run.recipe, name)] for name in fields)])     # 2: format
        self.made_with = hashlib.sha256(values.encode()).hexdigest()[:8]
        if self.path.exists():               # rows of networks from another recipe are scored again
            saved = load(self.path)
            self.rows = [row for row in saved["rows"] if row.get("made_with") == self.made_with]
            self.finished = "best" in saved

    def missing(self):
        """[(network, key-frame intervals)] of the rows that have no scores yet. Empty except in rank 0,
        which evaluates alone."""
        made, rows = {(row["name"], row["key_frame_every"]) for row in self.rows}, []
        for network in [Network("static", "per-frame baseline"), *networks(self.run)]:
            intervals = dict.fromkeys(self.run.recipe.key_frames) if network.genotype else [1]
            intervals = [every for every in intervals if (network.name, every) not in made]
            if intervals:
                rows.append((network, intervals))
        return rows if self.run.rank == 0 else []

    def add(self, network, every, costs, scores):
        row = new_row(self.run, network, every, costs, scores)
        self.rows.append({**row, "made_with": self.made_with})
        save(self.path, {"rows": self.rows})
        split = self.run.splits[-1]
        print(f"evaluate: {network.name}, key frame {interval(every)}: {split} mIoU "
              f"{percent([row], split, 'miou')} %", flush=True)

    def finish(self, segment_clips):
        """Saves the name of the best cell on val, and the frames where it and the baseline differ most."""
        run, split, first = self.run, self.run.splits[-1], self.run.recipe.key_frames[0]
        if run.rank:
            return
        cells = [row for row in self.rows if row["genotype"] and row["key_frame_every"] == first]
        cells = [row for row in cells if not row["control"]] or cells
        best = max(cells, key=lambda row: row["val"]["miou"] or 0)["name"]
        both = [segment_clips(run, run.load(name), split, every)
                for name, every in (("baseline", 1), (best, first))]
        save(run.path("examples.pt"), differing_frames(run.frames(split), *both, best))
        save(self.path, {"rows": self.rows, "best": best, **reported(run)})


def new_row(run, network, every, costs, scores):
    """A row of the table. scores: {split: what evaluate_video returns}; JSON lacks NaN, so None stands for
    what was not measured."""
    row = {"name": network.name, "title": network.title, "seed": network.seed, "control": network.control,
           "key_frame_every": every, "genotype": network.genotype and str(network.genotype),
           **costs, **mean_times(run, costs, every)}
    for split, values in scores.items():
        iou = {name: None if math.isnan(value) else value for name, value in values["iou"].items()}
        row[split] = {name: None if value != value else value for name, value in values.items()}
        if not any(value is not None for value in iou.values()):  # not one labelled pixel
            row[split].update(miou=None, fwiou=None, macc=None)
        row[split]["iou"] = iou
    return row


def reported(run):
    """What print_table needs beside the rows. A class without a labelled pixel counts as 0 in mIoU where a
    network predicts it. Frames that are not in memory are CityScapes', which has every class."""
    frames = run.frames(run.splits[-1])
    classes = frames.dataset.classes
    pixels = [1] * len(classes)
    if frames.labels is not None:
        pixels = torch.bincount(frames.labels.flatten(), minlength=256).tolist()
    absent = [name for name, count in zip(classes, pixels) if not count]
    return {"reported": run.splits[-1], "never_labelled": absent, "dataset": run.recipe.dataset}


def evaluate_network(run, path, evaluate_video):
    """Scores the network in one checkpoint on the run's data, and prints its rows; nothing is saved. It needs
    none of the run's trainings. evaluate_video: train.evaluate_video. Raises InputError."""
    path, classes = pathlib.Path(path), list(run.frames("val").dataset.classes)
    video = VideoSegmenter.load(path)
    if list(video.classes) != classes:
        raise InputError(f"--network {path}: its classes ({', '.join(video.classes[:4])}, ...) are not those "
                         f"of {run.recipe.dataset} ({', '.join(classes[:4])}, ...)")
    genotype, rows = video.cell and getattr(video.cell, "genotype", DECODER), []
    network, costs = Network(path.stem, path.stem, genotype), frame_costs(run, run.to_device(video))
    for every in dict.fromkeys(run.recipe.key_frames) if genotype else [1]:
        scores = {split: evaluate_video(run, video, split, every) for split in run.splits[1:]}
        rows.append(new_row(run, network, every, costs, scores))
    print_table({"rows": rows, **reported(run)})


def differing_frames(frames, baseline, cell, cell_name, count=4, apart=20):
    """The rows of Figs. 5 and 6: the frames in which the two networks' label maps differ in the largest
    share of labelled pixels; at most one out of every `apart` frames. [ours]

    baseline, cell: iterators over (frame number, label map, label)."""
    def labelled(results):
        return (result for result in results if frames.list[result[0]].label is not None)

    best = {}                                                     # one for every `apart` frames
    for (k, a, label), (_, b, _) in zip(labelled(baseline), labelled(cell)):
        counted = label != data.IGNORE
        share = ((a != b) & counted).sum().item() / max(1, counted.sum().item())
        if k // apart not in best or share > best[k // apart][0]:
            best[k // apart] = share, k, a.cpu(), b.cpu()
    chosen = sorted(best.values(), key=lambda one: -one[0])[:count]
    images, labels = frames[torch.tensor([k for _, k, _, _ in chosen])]
    palette = [[int(part) for part in colour] for colour in frames.dataset.palette]
    return {"images": images.cpu(), "labels": labels.cpu(),
            "baseline": torch.stack([a for _, _, a, _ in chosen]),
            "cell": torch.stack([b for _, _, _, b in chosen]), "cell_name": cell_name,
            "names": [pathlib.Path(frames.list[k].image).name for _, k, _, _ in chosen],
            "classes": list(frames.dataset.classes), "palette": palette,
            "differ": [share for share, _, _, _ in chosen]}


# ---------------------------------------------------------------------------------------------------------
# What is printed

def interval(every):
    """A key-frame interval in words."""
    return {0: "first only", 1: "every"}.get(every, f"every {every}")


def percent(rows, split, name):
    """The mean over seeds in %, and for several seeds their standard deviation; "-" if not measured."""
    values = [row[split][name] for row in rows]
    if None in values:
        return "-"
    values = [100 * value for value in values]
    return f"{statistics.mean(values):.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")


def print_table(results):
    """Prints the rows of results.json: mIoU as in Table 3 (CityScapes: Table 4), parameters and times as in
    Table 5; then the IoU of each class, and the genotypes."""
    split, groups, machines = results["reported"], collections.defaultdict(list), {}
    for row in results["rows"]:                                   # the seeds of a row are reported as one
        groups[row["title"], row["key_frame_every"]].append(row)
        machines.setdefault(row["machine"], f"[{len(machines) + 1}]")
    seeds = "; mean ± standard deviation over seeds" if len(groups) < len(results["rows"]) else ""
    several = len(machines) > 1                                   # times don't compare: a number says whose
    number = 4 if results["dataset"] == "cityscapes" else 3
    print(f"\n{split} split; mIoU (Table {number}) and consistency in %{seeds}. Parameters, times (Table 5): "
          "multiply-adds (G)\nand ms of a later frame; mean ms per frame of a sequence and of a clip, on "
          + "; ".join(f"{mark} {name}" if several else name for name, mark in machines.items()))
    print(f"{'':38} {'key frame':>10} {'mIoU':>10} {'consistency':>11} {'parameters':>11} {'mult-adds':>9} "
          f"{'ms later':>9} {'sequence':>8} {'clip':>6} {'/ encoder':>9} {'val mIoU':>10}")
    for (title, every), rows in groups.items():
        of_encoder = statistics.median(row["ms_later_frame"] / row["ms_encoder"] for row in rows)
        print(f"{title:38} {interval(every):>10} {percent(rows, split, 'miou'):>10} "
              f"{percent(rows, split, 'consistency'):>11} {rows[0]['parameters']:11,} "
              f"{rows[0]['multiply_adds'] / 1e9:9.2f} {rows[0]['ms_later_frame']:9.1f} "
              f"{rows[0]['ms_sequence']:8.1f} {rows[0]['ms_clip']:6.1f} {of_encoder:9.2f} "
              f"{percent(rows, 'val', 'miou'):>10}" + f" {machines[rows[0]['machine']]}" * several)
    print_classes(split, groups, results["never_labelled"])


def print_classes(split, groups, never_labelled):
    """Prints the IoU of each class at a network's first key-frame interval, and the cells' genotypes."""
    first = {}                                                    # title: rows of its first interval
    for (title, _), rows in groups.items():
        first.setdefault(title, rows)
    classes = next(iter(first.values()))[0][split]["iou"]
    names = "".join(f" {name[:10]:>10}" for name in classes)
    print(f"\n{'IoU of each class (the first key frame)':38}{names}")
    for title, rows in first.items():
        line = f"{title:38}"
        for name in classes:
            values = [row[split]["iou"][name] for row in rows]
            line += f"{'-' if None in values else f'{100 * statistics.mean(values):.1f}':>11}"
        print(line)
    if never_labelled:
        print(f"no pixel of the {split} split is labelled {', '.join(never_labelled)}; such a class counts "
              "in mIoU, as 0, where it is predicted")
    for title, rows in first.items():
        if rows[0]["genotype"]:
            print(f"{title}: {rows[0]['genotype']}")


def print_rise(run, parts=4):
    """Prints a line for each search that shows whether later candidates have higher rewards (Fig. 3)."""
    for strategy in strategies(run.recipe):
        file, _, title = SEARCHES[strategy]
        rewards = [entry["reward"] for _, entry in sorted(read_log(run.path(file)).items())]
        size = len(rewards) // parts
        if size:
            means = [statistics.mean(rewards[k * size:(k + 1) * size]) for k in range(parts)]
            print(f"mean reward of {title}'s candidates, {size} at a time: "
                  + " ".join(f"{mean:.2f}" for mean in means))
