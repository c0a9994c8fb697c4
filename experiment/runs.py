"""A run's folder: a run that was killed at any point continues from it, to the same numbers. torchrun's
processes share the folder. Nothing here is in the paper; the head of train.py lists what it uses of it.

In the order of the file: which fields a result depends on, trainings, the search's log, the run, the device.
"""
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                          # Windows
    fcntl = None

import data
from dyncell import VideoSegmenter, make_cell
from experiment import weights
from experiment.networks import as_text
from util.costs import usable_device
from util.device import best_device, has_bf16, keep_freed_memory, set_tf32
from util.errors import InputError, out_of_memory
from util.files import fill, load, read_log, save
from util.progress import Progress

SAVE_SECONDS = 60                            # least time between checkpoints, which are made after epochs
FAIL_ALIKE = 4                               # a search stops when so many candidates, all of them, fail alike
SAME_FAILURE = {"not finite": "lower --cell-lr", "out of memory": "lower --search-batch or --input-crop"}


# ---------------------------------------------------------------------------------------------------------
# Recipes: which fields does a result depend on?

STAGES = "pretrain", "search", "alone", "end", "amount"   # of the recipe's fields, in order


def flag(name):
    return "--" + name.replace("_", "-")


def fields_of(recipe, stage):
    """The names of the fields on which a result of this stage depends: its own and those of the stages
    before. Files of weights are left out: Run.checkpoint compares their content."""
    before = STAGES[:STAGES.index(stage) + 1]
    return [field.name for field in dataclasses.fields(recipe)
            if field.metadata["stage"] in before and field.name not in weights.FILES]


def check_recipe(path, saved, recipe, stage):
    """Raises InputError unless the file `path`, made with the recipe `saved` (a dict), can be used with the
    present recipe in this stage. It names the fields, both values, and how to keep what can be kept."""
    now, saved = (json.loads(json.dumps(one)) for one in (dataclasses.asdict(recipe), saved))     # no tuples
    if differing := [name for name in fields_of(recipe, stage) if saved.get(name) != now[name]]:
        there = "; ".join(f"{flag(name)} {saved.get(name)!r} there, {now[name]!r} now"
                          for name in differing[:6])
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        first = min(STAGES.index(field.metadata["stage"]) for field in dataclasses.fields(recipe)
                    if field.name in differing)
        raise InputError(f"{path}: was made with another recipe ({there}{more}); leave that out, or use "
                         f"another --run{copy_command(path.parent, STAGES[first])}")


def copy_command(folder, stage):
    """The command that copies what does not depend on the fields of this stage; "" if there is nothing."""
    kept = [path for path in sorted(folder.glob("*.pt")) if path.name != "examples.pt"
            and STAGES.index(stage_of(path.stem)) < STAGES.index(stage)]
    if not kept:
        return ""
    kept += [path for path in sorted(folder.glob("*.jsonl")) if stage != "search"]
    kept, new = [folder / "recipe.json", *kept], shlex.quote(f"{folder}-2")
    return f" that keeps what it can: mkdir {new} && cp {shlex.join(map(str, kept))} {new}"


def stage_of(name):
    """The stage of the last fields that NAME.pt depends on."""
    if name.endswith("-alone"):
        return "alone"
    return {"static": "pretrain", "controller": "search"}.get(name, "end")


# ---------------------------------------------------------------------------------------------------------
# Trainings

def generator(*key):
    """A random generator for a key (seed, purpose, ...). Different keys give independent random numbers, so
    no stage's draws depend on another stage."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class NotFinite(InputError):
    """A loss is NaN or infinite."""


def check_finite(losses, where):
    """A list of losses, scalar tensors or numbers -> floats. Raises NotFinite if one is NaN or infinite."""
    values = [float(loss) for loss in losses]
    for value in values:
        if not math.isfinite(value):
            raise NotFinite(f"{where}: the loss is {value}; try a smaller learning rate or another --seed")
    return values


def batches(items, size, rng):
    """The numbers 0..items-1, shuffled, in batches. [ours] A smaller last batch is dropped, as its batch
    norms would be noisier."""
    size = min(size, items)
    return torch.randperm(items, generator=rng)[:items // size * size].split(size)


def average_gradients(optimizers):
    """Averages the gradients of torchrun's processes, each of which has its own share of the batch."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])      # one message, not hundreds
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


class Epoch:
    """One epoch of a training. All its random choices come from (seed, name, index), so an interrupted
    epoch can be repeated exactly."""

    def __init__(self, run, name, index, count):
        self.run, self.name, self.index, self.count = run, name, index, count
        self.rng = generator(run.recipe.seed, name, index)
        self.losses, self.entry, self.start = [], {"epoch": index + 1}, time.time()
        self.last, self.step = index + 1 == count, 0              # step: of the whole training

    def batches(self, items, size):
        """Yields this process's part of each batch of 0..items-1, and the share of the whole training that
        is done before it."""
        key, rank, world = (self.run.recipe.seed, self.name, self.index), self.run.rank, self.run.world
        shuffled = batches(items, size, self.rng)
        if rank:                                                  # the same batches, different augmentation
            self.rng = generator(*key, rank)
        torch.manual_seed(generator(*key, rank, "dropout").initial_seed())
        total, first = self.count * len(shuffled), self.index * len(shuffled)
        if self.run.progress is None:
            self.run.progress = Progress(self.name, total, done=first)
        for self.step, batch in enumerate(shuffled, start=first):
            yield batch[rank::world], self.step / total
            done, waits = self.step + 1, self.run.device.type != "cpu"    # a GPU, where the loss is read
            if not waits or done == total or (done - first) % 10 == 1:    # a sign of life at the first step
                loss = check_finite(self.losses[-1:], self.name)[0] if self.losses else math.nan
                self.run.progress.update(done, epoch=self.index + 1, loss=loss)

    def log(self, loss):
        """Records the loss of a step. It is checked after the epoch, before anything is saved."""
        self.losses.append(loss.detach())

    def due(self, every):
        """True in rank 0, in every nth epoch (n = every) and in the last one; every = 0: never."""
        return self.run.rank == 0 and every > 0 and ((self.index + 1) % every == 0 or self.last)

    def note(self, **figures):
        """Adds figures to the history and prints them."""
        self.entry.update(figures)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.run.progress.say(f"{self.name}: epoch {self.index + 1}, {text}")


# ---------------------------------------------------------------------------------------------------------
# The search's log

class Log(dict):
    """The log of a search, {candidate: entry}: one line each, written by the process that trained it. A
    search that continues takes the logged candidates from here."""

    def __init__(self, run, path):
        if run.rank == 0:
            read_log(path, cut=True)
        run.barrier()
        super().__init__(read_log(path))
        self.run, self.path = run, path
        run.barrier()                                             # nobody writes before all have read

    def claim(self, k):
        """Whether candidate k is to be trained by this process: it is not in the log, and no other process
        has claimed it."""
        store = self.run.store
        return k not in self and (store is None or store.add(f"{self.path.name} {k}", 1) == 1)

    @contextlib.contextmanager
    def candidate(self, k, genotype):
        """A context: yields the entry of candidate k to be filled in, and then writes it. NaN and out of
        memory are logged with reward 0; any other error stops the run, and so do first candidates that all
        fail alike."""
        start = time.time()
        entry = {"candidate": k, "status": "ok", "stopped": False, "reward": 0.0, "half_reward": None}
        try:
            yield entry
        except NotFinite as error:
            entry.update(status="not finite", reason=str(error))
        except Exception as error:
            if not out_of_memory(error):
                raise RuntimeError(f"candidate {k} failed: {genotype}") from error
            entry.update(status="out of memory", reason=str(error)[:200])
        before = {self[j]["status"] if j in self else None for j in range(k)}
        if entry["status"] != "ok" and k + 1 >= FAIL_ALIKE and before == {entry["status"]}:
            raise InputError(f"{self.path}: each of the first {k + 1} candidates failed ({entry['reason']}); "
                             f"{SAME_FAILURE[entry['status']]}")
        entry.update(seconds=round(time.time() - start, 2), tokens=genotype.to_tokens(),
                     genotype=json.loads(genotype.to_json()))
        with open(self.path, "a") as file:                        # written at once, so lines don't mix
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self[k] = entry

    def sync(self):
        """Waits for all processes, then reads the candidates that they logged."""
        if self.run.world > 1:
            self.run.barrier()
            self.update(read_log(self.path))
            self.run.barrier()

    def tokens(self, numbers, sampled):
        """The tokens (n, 5L) of these candidates: from the log if it has them, else as sampled. On another
        processor rounding may differ, and so may the samples; the logged reward belongs to the logged
        tokens."""
        tokens = sampled[:len(numbers)].clone()
        for row, k in zip(tokens, numbers):
            if k in self and self[k]["tokens"] != row.tolist():
                print(f"{self.path}: this machine samples another candidate {k}; the logged one is used")
                row.copy_(torch.tensor(self[k]["tokens"]))
        return tokens

    def figures(self, k):
        """For the line of progress: the reward of candidate k, and the best one so far."""
        return {"reward": self[k]["reward"], "best": max(entry["reward"] for entry in self.values())}


# ---------------------------------------------------------------------------------------------------------
# The run

def launched():
    """Whether torchrun started this process. (RANK alone may be left in the environment.)"""
    return dist.is_available() and dist.is_torchelastic_launched()


class Run:
    """A run: its folder, recipe, device and data, and this process's rank among torchrun's processes.

    All processes do the same work on the same files, with three exceptions: they share each batch, they
    share the candidates of a round, and only rank 0 writes checkpoints and reports."""

    def __init__(self, folder, recipe, root=None, device=None):
        self.folder, self.recipe, self.root = pathlib.Path(folder), recipe, root
        self.rank, self.world, self.local_world, self.store, self.progress = 0, 1, 1, None, None
        self.expected, self.taken = {}, {}   # {stage: seconds}: by schedules.announce, by table.stage
        self._frames, self._source = {}, None
        device = device or best_device()
        if launched() and device.startswith("cuda"):              # one GPU per process if possible
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
        self.device = usable_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        set_tf32(False)
        self.num_classes = len(data.dataset_class(recipe.dataset).classes)
        self.splits = ("train", "val", "test")
        if recipe.dataset == "cityscapes":                        # its test labels are not public
            self.splits = ("train", "val")

    def path(self, name):
        return self.folder / name

    # -- torchrun

    def join(self):
        """Connects to torchrun's other processes, if there are any: by nccl if each has its own GPU, else
        by gloo."""
        if not launched() or os.environ["WORLD_SIZE"] == "1":
            return
        self.rank, self.world, self.local_world = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        # Python runs no handler while a process waits for another. With the default action torchrun can end
        # it at once, not after 30 s.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        forever = datetime.timedelta(days=365)                    # a candidate may take hours
        self.store, _, _ = next(dist.rendezvous("env://", timeout=forever))
        dist.init_process_group("nccl" if self.own_gpu() else "gloo", rank=self.rank, world_size=self.world,
                                store=dist.PrefixStore("group", self.store), timeout=forever)
        if self.rank:
            sys.stdout = open(os.devnull, "w")                    # one process reports

    def own_gpu(self):
        return self.device.type == "cuda" and torch.cuda.device_count() >= self.local_world

    def barrier(self):
        """Waits until every process is here, so that all see the same files."""
        if self.world > 1:
            dist.barrier()

    def broadcast(self, value):
        """Rank 0's value, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def first(self, work):
        """work() in rank 0; the others wait. A mistake of the user that it finds ends all of them, and only
        rank 0 reports it."""
        problem = None
        if self.rank == 0:
            try:
                work()
            except (InputError, OSError) as error:
                problem = error
        if self.broadcast(problem is not None):
            raise problem or SystemExit(2)

    # -- data and device

    def dataset(self, split):
        return data.open_split(self.recipe.dataset, self.root, split)

    def frames(self, split):
        """The frames of a split. They are read at the first call."""
        if split not in self._frames:
            progress = Progress(f"checking every frame of {split}", 0)
            self._frames[split] = data.Frames(self.dataset(split), None, self.device, show=progress.show)
        return self._frames[split]

    def frame_size(self):
        """(H, W) of the dataset's frames, from its first one."""
        dataset = self.dataset("train")
        return dataset.read(dataset.clips[0][0])[1].shape

    def autocast(self):
        """Autocast to bf16 if the device supports it. It needs channels_last: otherwise a depthwise
        convolution on a CPU is 20 times slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device))

    def to_device(self, module):
        return module.to(self.device, memory_format=torch.channels_last)

    # -- trainings and their checkpoints

    def epochs(self, name, count, parts, optimizers, network=None):
        """Yields the epochs of a training that are still to do; restores the others from NAME.pt.

        parts: the modules that are trained, {"static": module, "cell": module}. network: the networks.Network
        that is trained; needed if there is a cell."""
        path, history, since, facts = self.path(f"{name}.pt"), [], time.time(), {}
        if "cell" in parts:
            facts = {"genotype": as_text(network.genotype), "past": network.past}
        if path.exists():
            saved = self.checkpoint(name)
            history = saved["history"]
            for part, module in parts.items():
                fill(module, saved[part], path)
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            print(f"{name}: continues after epoch {len(history)}")
        self.barrier()                                            # no one writes before all have read
        self.progress = None
        for index in range(len(history), count):
            epoch = Epoch(self, name, index, count)
            yield epoch                                           # the loop's body runs here
            losses = check_finite(epoch.losses, f"{name}, epoch {index + 1}")
            loss, seconds = sum(losses) / len(losses), time.time() - epoch.start
            history.append({**epoch.entry, "loss": loss, "seconds": seconds})
            if not epoch.last and time.time() - since > SAVE_SECONDS:
                since = time.time()
                states = [optimizer.state_dict() for optimizer in optimizers]
                self.save(name, parts, history=history, optimizers=states, **facts)
        self.save(name, parts, history=history, **facts)
        self.barrier()

    def save(self, name, parts, **more):
        """Writes NAME.pt. Its keys, most of which dyncell.VideoSegmenter.load reads:

        static, cell     the networks' states, on the CPU: torch.load opens a GPU's file anywhere
        network          where there is a static network: its key in dyncell.STATICS
        classes, palette, size      and the data's classes, (C, 3) colours, and frames' (H, W)
        genotype, past   where there is a cell: its genotype in JSON or "decoder"; whether it sees the past
        history          an entry an epoch: epoch, loss, seconds; in some val_miou
        recipe           every field
        source           in static.pt: digests of the files of weights
        optimizers       their states, until the training is finished
        average          in static.pt, until then: the running mean of the weights, which is kept as static

        controller.pt has controller, last_update and candidates in place of networks and history."""
        if self.rank:
            return
        states = {part: {key: value.cpu() for key, value in module.state_dict().items()}
                  for part, module in parts.items()}
        if "static" in states:
            kind = data.dataset_class(self.recipe.dataset)
            more.update(network=parts["static"].name, classes=list(kind.classes),
                        palette=np.asarray(kind.palette).tolist(), size=tuple(self.frame_size()))
            if "optimizers" not in more:                          # finished: no auxiliary heads
                states.pop("average", None)
                states["static"] = {key: value for key, value in states["static"].items()
                                    if not key.startswith("auxiliary.")}
        if name == "static":
            more["source"] = self._source or weights.digests(self.recipe)
        save(self.path(f"{name}.pt"), {**states, **more, "recipe": dataclasses.asdict(self.recipe)})

    def finished(self, name):
        """Whether NAME.pt holds a finished training. Rank 0 decides for all processes."""
        return self.broadcast(self.rank == 0 and self.made(name))

    def made(self, name):
        """As finished(), for this process alone."""
        return self.path(f"{name}.pt").exists() and "optimizers" not in self.checkpoint(name)

    def checkpoint(self, name):
        """The content of NAME.pt. Raises InputError if it was made with another recipe, or from weights of
        another content; the files may have moved, and one that is gone is not compared."""
        path = self.path(f"{name}.pt")
        saved = load(path)
        if not isinstance(saved, dict) or "recipe" not in saved:
            raise InputError(f"{path}: holds no result of a training; use another --run")
        check_recipe(path, saved["recipe"], self.recipe, stage_of(name))
        if name == "static":
            for field, digest in weights.digests(self.recipe).items():
                if digest not in (None, saved["source"][field]):
                    raise InputError(f"{path}: was trained when {flag(field)} had another content than "
                                     f"{getattr(self.recipe, field)} has now; give the original, or use "
                                     "another --run")
            self._source = saved["source"]
        return saved

    def load(self, name):
        """The network of a finished training (static, baseline, cell-K) as a VideoSegmenter in eval mode."""
        self.checkpoint(name)                                     # is it this recipe's?
        video = VideoSegmenter.load(self.path(f"{name}.pt"))
        video.pad = self.recipe.input_pad
        return self.to_device(video)

    def load_cell(self, network):
        """The cell of a network that was trained alone; None for the baseline."""
        if network.genotype is None:
            return None
        name = f"{network.name}-alone"
        cell = make_cell(network.genotype, self.load("static").static, network.past)
        fill(cell, self.checkpoint(name)["cell"], self.path(f"{name}.pt"))
        return self.to_device(cell)

    def log(self, name):
        return Log(self, self.path(name))


@contextlib.contextmanager
def locked(run):
    """A context in which no other command can work on the run's folder. Prints a line if the folder can't
    be locked. Raises InputError if another command has locked it."""
    if run.rank:
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.path("lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run.folder}: another process is working on this run; wait for it or use "
                             "another --run") from None
        except (AttributeError, OSError) as error:
            print(f"{run.folder}: can't be locked here ({error}); start one command at a time on it")
        yield
