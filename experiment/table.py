"""Additions to the paper: control networks, cells by name, seeds, latency, and the table of results.

A control is a network to which the cells are compared, and is never a run's best: the baseline trained as
long, arch2's own decoder used as a cell, the best cell with the past zeroed."""
import collections
import contextlib
import hashlib
import json
import math
import pathlib
import statistics
import time
import zlib

import torch

import data
from dyncell import fold_batchnorm
from experiment import figures, weights
from experiment.networks import SEARCHES, Decoder, Network, networks, strategies
from experiment.runs import fields_of, set_tf32
from util.costs import milliseconds, milliseconds_in_turn, multiply_adds
from util.errors import InputError, told
from util.files import load, read_log, save
from util.progress import Progress, duration


# ---------------------------------------------------------------------------------------------------------
# Which networks?


def logs(run):
    """{strategy: Log} of the run's searches."""
    return {strategy: run.log(SEARCHES[strategy][0]) for strategy in strategies(run.recipe)}


def searched(run):
    """Whether every search has all its candidates, and the controller its last update."""
    r, complete = run.recipe, True
    for strategy in strategies(r):
        entries = read_log(run.path(SEARCHES[strategy][0]))
        complete = complete and set(range(r.search_candidates)) <= entries.keys()
    if complete and "ppo" in strategies(r):
        path = run.path("controller.pt")
        complete = path.exists() and run.checkpoint("controller").get("candidates", 0) >= r.search_candidates
    return complete


def done(run, stage):
    """Whether a stage has nothing left to do."""
    if stage == "pretrain":
        return run.finished("static")
    if stage == "search":
        return run.agree(run.rank == 0 and searched(run))
    if stage == "finetune":
        return all(run.finished(network.name) for network in networks(run))
    table = Table(run)
    missing = table.missing()                                     # rank 0 decides
    return run.agree(not missing and table.finished)


NEEDS = {"search": "static", "finetune": "static", "evaluate": "baseline"}


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
    said = f"done in {duration(time.time() - start)}" if missing else "nothing is missing"
    print(f"{name}: {said}", flush=True)
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
    run.wait()


def print_next(run, name):
    """Prints what can be done after the last stage of a command."""
    after = {"pretrain": "search", "search": "finetune", "finetune": "evaluate"}
    if name in after:
        print(f"next: the same command with --stage {after[name]}")
    else:
        print(f"\nThe figures are in {run.path('figures')}. To segment a video of your own:\n    python "
              f"train.py --stage predict --run {run.folder} --input FRAMES_DIR_OR_GIF --output OUT")


# ---------------------------------------------------------------------------------------------------------
# Latency

@torch.no_grad()
def latency_worth(run, cell, static, stored, entry):
    """The factor (time / target) ** -latency_weight of a cell's reward; 1 if the weight is 0. [ours], after
    the outlook in Sect. 1.

    The time is measured, so such a search is only as reproducible as the machine's times."""
    if not run.recipe.latency_weight:
        return 1.0
    names = "layer4", "dec", "layer2", "layer3", "layer4"
    inputs = [stored.maps[name][:1].float().contiguous(memory_format=torch.channels_last) for name in names]

    def time_of(module):                     # ms per frame of the cell alone: folded, batch 1
        return milliseconds(fold_batchnorm(module).to(memory_format=torch.channels_last), *inputs)

    entry["ms"] = time_of(cell)
    target = run.recipe.latency_target or time_of(Decoder(static))
    return (entry["ms"] / target) ** -run.recipe.latency_weight


@torch.no_grad()
def frame_costs(run, video):
    """ms of the encoder alone, of a key frame and of a later frame, and multiply-adds of a later frame. As
    in the evaluation: padded, batch norms folded, float32, batch 1, prediction at 1/8."""
    image, label = run.frames("val")[0]
    image, _ = data.pad(data.normalise(image[None]), label[None], video.pad)      # (1, 3, H, W)
    image = image.contiguous(memory_format=torch.channels_last)
    video = fold_batchnorm(video).to(memory_format=torch.channels_last)
    _, state = video.step(image)
    calls = {"ms_encoder": lambda: video.static.encode(image), "ms_key_frame": lambda: video.step(image),
             "ms_later_frame": lambda: video.step(image, state)}
    ms = milliseconds_in_turn(calls, repeats=9)
    return {**ms, "multiply_adds": multiply_adds(calls["ms_later_frame"])}


def mean_times(run, costs, every):
    """Mean ms per frame, as in Table 5: "the baseline on the first frame and the dynamic cell on the rest".
    Once over a sequence of the training's length, once over the clips of the reported split.

    every: the key-frame distance; 0: only the first frame is a key frame"""
    def mean(lengths):
        total = 0
        for length in lengths:
            keys = math.ceil(length / every) if every else 1
            total += keys * costs["ms_key_frame"] + (length - keys) * costs["ms_later_frame"]
        return total / sum(lengths)

    clips = [len(clip) for clip in run.frames(run.splits[-1]).clips()]
    return {"ms_sequence": mean([run.recipe.sequence_length]), "ms_clip": mean(clips)}


# ---------------------------------------------------------------------------------------------------------
# The table

class Table:
    """The rows of results.json. Each is saved at once, so an interrupted evaluation continues."""

    def __init__(self, run):
        self.run, self.path, self.rows, self.finished = run, run.path("results.json"), [], False
        self.kept = {}                       # (network, key-frame distance) -> Answers of this evaluation
        fields = [name for name in fields_of(run.recipe, "end") if name not in weights.FILES]
        values = json.dumps([[name, getattr(run.recipe, name)] for name in fields])
        self.made_with = hashlib.sha256(values.encode()).hexdigest()[:8]
        if self.path.exists():               # rows of networks from another recipe are scored again
            saved = load(self.path)
            self.rows = [row for row in saved["rows"] if row.get("made_with") == self.made_with]
            self.finished = "best" in saved

    def missing(self):
        """[(network, key-frame distances)] of the rows that have no scores yet. Empty except in rank 0,
        which evaluates alone."""
        made, rows = {(row["name"], row["key_frame_every"]) for row in self.rows}, []
        for network in [Network("static", "per-frame baseline"), *networks(self.run)]:
            distances = dict.fromkeys(self.run.recipe.key_frames) if network.genotype else [1]
            distances = [every for every in distances if (network.name, every) not in made]
            if distances:
                rows.append((network, distances))
        return rows if self.run.rank == 0 else []

    def add(self, network, every, costs, scores):
        genotype = None if network.genotype is None else str(network.genotype)
        self.rows.append({"name": network.name, "title": network.title, "seed": network.seed,
                          "control": network.control, "key_frame_every": every, "genotype": genotype,
                          "made_with": self.made_with,
                          **costs, **mean_times(self.run, costs, every), **without_nan(scores)})
        save(self.path, {"rows": self.rows})
        split = self.run.splits[-1]
        miou = 100 * scores[split]["miou"]
        print(f"evaluate: {network.name}, key frame {distance(every)}: {split} mIoU {miou:.1f} %", flush=True)

    def answers(self, network, every):
        """A new Answers for the label maps of a network on the reported split."""
        self.kept[network.name, every] = Answers(self.run.frames(self.run.splits[-1]))
        return self.kept[network.name, every]

    def finish(self, segment_clips):
        """Saves the name of the best cell on val, and the frames where it and the baseline differ most."""
        if self.run.rank:
            return
        run, split = self.run, self.run.splits[-1]
        first = run.recipe.key_frames[0]
        cells = [row for row in self.rows if row["genotype"] and row["key_frame_every"] == first]
        cells = [row for row in cells if not row["control"]] or cells
        best = max(cells, key=lambda row: row["val"]["miou"])
        answers = []
        for name, every in (("baseline", 1), (best["name"], first)):      # not kept from an earlier call
            kept = self.kept.get((name, every))
            answers.append(kept or segment_clips(run, run.load(name), split, every))
        save(run.path("examples.pt"), differing_frames(run.frames(split), *answers, best["name"]))
        save(self.path, {"rows": self.rows, "reported": split, "best": best["name"],
                         "device": str(run.device), "threads": torch.get_num_threads(),
                         "torch": torch.__version__})


class Answers:
    """Label maps of a split's frames, compressed to a hundredth of their size. Iterating yields (frame
    number, label map, label), as segment_clips does."""

    def __init__(self, frames):
        self.frames, self.packed = frames, {}

    def __setitem__(self, k, pred):
        self.packed[k] = pred.shape, zlib.compress(pred.cpu().numpy().tobytes(), 1)

    def __iter__(self):
        for k, (shape, packed) in self.packed.items():
            pred = torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.uint8).reshape(shape)
            _, label = self.frames[k]
            yield k, pred.to(label.device), label


def without_nan(value):
    """Replaces NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if value != value else value


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


def distance(every):
    return {0: "first only", 1: "every"}.get(every, f"every {every}")


def percent(rows, split, name):
    """The mean in %, and for several seeds their standard deviation."""
    values = [row[split][name] for row in rows]
    if None in values:                                            # no three labelled frames in a row
        return "-"
    values = [100 * value for value in values]
    return f"{statistics.mean(values):.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")


def print_table(results):
    """Prints the paper's Table 5 from results.json, and the IoU of each class."""
    split, groups = results["reported"], collections.defaultdict(list)
    for row in results["rows"]:                                   # the seeds of a row are reported as one
        groups[row["title"], row["key_frame_every"]].append(row)
    seeds = "; mean ± standard deviation over seeds" if len(groups) < len(results["rows"]) else ""
    print(f"\n{split} split; mIoU and consistency in %; multiply-adds (G) and ms of a later frame; mean ms "
          f"per frame of a\nsequence (as in Table 5) and of a clip, on {results['device']} "
          f"({results['threads']} threads){seeds}")
    print(f"{'':38} {'key frame':>10} {'mIoU':>10} {'consistency':>11} {'parameters':>11} {'mult-adds':>9} "
          f"{'ms later':>9} {'sequence':>8} {'clip':>6} {'/ encoder':>9} {'val mIoU':>10}")
    for (title, every), rows in groups.items():
        of_encoder = statistics.median(row["ms_later_frame"] / row["ms_encoder"] for row in rows)
        print(f"{title:38} {distance(every):>10} {percent(rows, split, 'miou'):>10} "
              f"{percent(rows, split, 'consistency'):>11} {rows[0]['parameters']:11,} "
              f"{rows[0]['multiply_adds'] / 1e9:9.2f} {rows[0]['ms_later_frame']:9.1f} "
              f"{rows[0]['ms_sequence']:8.1f} {rows[0]['ms_clip']:6.1f} {of_encoder:9.2f} "
              f"{percent(rows, 'val', 'miou'):>10}")
    classes = results["rows"][0][split]["iou"]
    names = "".join(f" {name[:10]:>10}" for name in classes)
    print(f"\n{'IoU of each class (the first key frame)':38}{names}")
    first = {}                                                    # title: rows of its first distance
    for (title, _), rows in groups.items():
        first.setdefault(title, rows)
    for title, rows in first.items():
        line = f"{title:38}"
        for name in classes:
            values = [row[split]["iou"][name] for row in rows]
            line += f"{'-' if None in values else f'{100 * statistics.mean(values):.1f}':>11}"
        print(line)
    for title, rows in first.items():
        if rows[0]["genotype"]:
            print(f"{title}: {rows[0]['genotype']}")


def print_rise(run, parts=4):
    """Prints a line for each search that shows whether later candidates have higher rewards (Fig. 3)."""
    for strategy in strategies(run.recipe):
        file, _, said = SEARCHES[strategy]
        rewards = [entry["reward"] for _, entry in sorted(read_log(run.path(file)).items())]
        size = len(rewards) // parts
        if size:
            means = [statistics.mean(rewards[k * size:(k + 1) * size]) for k in range(parts)]
            print(f"mean reward of {said}'s candidates, {size} at a time: "
                  + " ".join(f"{mean:.2f}" for mean in means))
