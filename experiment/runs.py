"""A run's folder: a run that was killed at any point continues from it, to the same numbers. torchrun's
processes share the folder.

Nothing here is in the paper. train.py uses these functions:

    run.epochs(name, count, parts, optimizers)   the epochs of a training that are still to do
    epoch.batches(items, size)                   shuffled batches of 0..items-1, and the share that is done
    epoch.log(loss)                              records the loss of a step
    run.log(name)                                the log of a search: one line per candidate
    log.misses(k)                                whether candidate k is to be trained by this process
    log.candidate(k, genotype)                   writes its line; NaN and out of memory give reward 0
    run.finished(name), run.load(name)           whether a training is finished; its network

In the order of the file: files, progress, trainings, the search's log, the run itself.
"""
import contextlib
import ctypes
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
from dyncell import STATICS, VideoSegmenter, make_cell
from experiment import weights
from experiment.networks import as_text
from util.errors import InputError, out_of_memory
from util.files import fill, load, read_log, save
from util.progress import Progress

SAVE_SECONDS = 60                            # least time between checkpoints, which are made after epochs
FAIL_ALIKE = 4                               # a search stops when so many candidates, all of them, fail alike
SAME_FAILURE = {"not finite": "lower --cell-lr", "out of memory": "lower --search-batch or --input-crop"}


def generator(*key):
    """A random generator for a key (seed, purpose, ...). Different keys give independent random numbers, so
    no stage's draws depend on another stage."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------------------
# Files


# ---------------------------------------------------------------------------------------------------------
# Recipes: which fields does a result depend on?

def flag(name):
    return "--" + name.replace("_", "-")


STAGES = "pretrain", "search", "alone", "end", "amount"   # of the recipe's fields, in order


def fields_of(recipe, stage):
    """The names of the fields on which a result of this stage depends: its own and those of the stages
    before."""
    before = STAGES[:STAGES.index(stage) + 1]
    return [field.name for field in dataclasses.fields(recipe) if field.metadata["stage"] in before]


def check_recipe(path, saved, recipe, stage):
    """Raises InputError unless the file `path`, made with the recipe `saved` (a dict), can be used with the
    present recipe in this stage. It names the fields, both values, and how to keep what can be kept."""
    names = fields_of(recipe, stage)
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))              # tuples become lists, as in a file
    saved = json.loads(json.dumps(saved)) if isinstance(saved, dict) else {}
    if missing := [name for name in names if name not in saved]:
        raise InputError(f"{path}: made by another version, which had no {', '.join(missing[:6])}; use "
                         "another --run")
    names = [name for name in names if name not in weights.FILES]         # Run.check_source compares these
    if differing := [name for name in names if saved[name] != now[name]]:
        there = "; ".join(f"{flag(name)} {saved[name]!r} there, {now[name]!r} now" for name in differing[:6])
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        first = min(STAGES.index(field.metadata["stage"]) for field in dataclasses.fields(recipe)
                    if field.name in differing)
        raise InputError(f"{path}: was made with another recipe ({there}{more}); leave that out, or use "
                         f"another --run{kept_by(path.parent, STAGES[first])}")


def kept_by(folder, stage):
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
    gradients = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            gradients += [p.grad for p in group["params"] if p.grad is not None]      # or in no process
    flat = torch.cat([gradient.flatten() for gradient in gradients])
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
        seed, rank, world = self.run.recipe.seed, self.run.rank, self.run.world
        shuffled = batches(items, size, self.rng)
        if rank:                                                  # the same batches, different augmentation
            self.rng = generator(seed, self.name, self.index, rank)
        torch.manual_seed(generator(seed, self.name, self.index, rank, "dropout").initial_seed())
        total, first = self.count * len(shuffled), self.index * len(shuffled)
        if self.run.progress is None:
            self.run.progress = Progress(self.name, total, done=first)
        for k, batch in enumerate(shuffled):
            self.step = first + k
            yield batch[rank::world], (first + k) / total
            # Reading the loss makes a GPU wait, so it is read at the first of ten steps; the first sign of
            # life comes with the first step.
            if k % 10 == 0 or self.run.device.type == "cpu" or first + k + 1 == total:
                loss = check_finite(self.losses[-1:], self.name)[0] if self.losses else math.nan
                self.run.progress.update(first + k + 1, epoch=self.index + 1, loss=loss)

    def log(self, loss):
        """Records the loss of a step. It is checked after the epoch, before anything is saved."""
        self.losses.append(loss.detach())

    def due(self, every):
        """True in rank 0, in every nth epoch (n = every) and in the last one; every = 0: never."""
        nth = every and (self.index + 1) % every == 0
        return bool(every) and self.run.rank == 0 and (bool(nth) or self.index + 1 == self.count)

    def note(self, **figures):
        """Adds figures to the history and prints them."""
        self.entry.update(figures)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.run.progress.say(f"{self.name}: epoch {self.index + 1}, {text}")


# ---------------------------------------------------------------------------------------------------------
# The search's log

class Log:
    """The log of a search: one line per candidate, written by the process that trained it. A search that
    continues takes the logged candidates from here."""

    def __init__(self, run, path):
        if run.rank == 0:
            read_log(path, cut=True)
        run.wait()
        self.run, self.path, self.entries = run, path, read_log(path)
        run.wait()                                                # nobody writes before all have read

    def misses(self, k):
        """Whether candidate k is to be trained by this process: it is not in the log, and no other process
        has claimed it."""
        if k in self.entries:
            return False
        return self.run.store is None or self.run.store.add(f"{self.path.name} {k}", 1) == 1

    @contextlib.contextmanager
    def candidate(self, k, genotype):
        """A context: yields the entry of candidate k to be filled in, and then writes it. NaN and out of
        memory are logged with reward 0; any other error stops the run."""
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
        before = [self.entries[j]["status"] if j in self.entries else None for j in range(k)]
        if entry["status"] != "ok" and k + 1 >= FAIL_ALIKE and set(before) == {entry["status"]}:
            raise InputError(f"{self.path}: each of the first {k + 1} candidates failed ({entry['reason']}); "
                             f"{SAME_FAILURE[entry['status']]}")
        entry.update(seconds=round(time.time() - start, 2), tokens=genotype.to_tokens(),
                     genotype=json.loads(genotype.to_json()))
        line = (json.dumps(entry) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:          # one write, so lines don't mix
            if file.write(line) < len(line):
                raise OSError(28, "No space left on device", str(self.path))
            os.fsync(file.fileno())
        self.entries[k] = entry

    def meet(self):
        """Waits for all processes, then reads the candidates that they logged."""
        if self.run.world > 1:
            self.run.wait()
            self.entries = read_log(self.path)
            self.run.wait()

    def tokens(self, numbers, sampled):
        """The tokens (n, 5L) of these candidates: from the log if it has them, else as sampled. On another
        processor rounding may differ, and so may the samples; the logged reward belongs to the logged
        tokens. Raises InputError if the number of tokens differs."""
        tokens = sampled[:len(numbers)].clone()
        for row, k in zip(tokens, numbers):
            if k not in self.entries:
                continue
            logged = self.entries[k]["tokens"]
            if len(logged) != len(row):
                raise InputError(f"{self.path}: candidate {k} has {len(logged)} tokens, not {len(row)}, so "
                                 "it was made with another recipe; use another --run")
            if logged != row.tolist():
                print(f"{self.path}: this machine samples a different candidate {k}; the logged one is "
                      "used")
            row.copy_(torch.tensor(logged))
        return tokens

    def standing(self, k):
        """Figures for the line of progress: the reward of candidate k, and the best one so far."""
        best = max(entry["reward"] for entry in self.entries.values())
        return {"reward": self.entries[k]["reward"], "best": best}

    def __getitem__(self, k):
        return self.entries[k]

    def __len__(self):
        return len(self.entries)


# ---------------------------------------------------------------------------------------------------------
# The run

class Run:
    """A run: its folder, recipe, device and data, and this process's rank among torchrun's processes.

    All processes do the same work on the same files, with three exceptions: they share each batch, they
    share the candidates of a round, and only rank 0 writes checkpoints and reports."""

    def __init__(self, folder, recipe, root=None, device=None):
        self.folder, self.recipe, self.root = pathlib.Path(folder), recipe, root
        self.rank, self.world, self.local_world, self.store, self.progress = 0, 1, 1, None, None
        self.expected = {}                   # {stage: seconds}, by schedules.announce
        try:
            chosen = torch.device(device or best_device())
            if chosen.type == "cuda" and launched():                      # one GPU per process if possible
                chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            if chosen.type == "cuda" and chosen.index is not None:        # else cuda:0 is initialised, too
                torch.cuda.set_device(chosen)
            self.device = torch.zeros(0, device=chosen).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:80]
            raise InputError(f"--device {device}: cannot be used here ({reason})") from None
        if self.device.type == "cpu":
            keep_freed_memory()
        set_tf32(False)
        self.num_classes = len(data.dataset_class(recipe.dataset).classes)
        self.splits = ("train", "val", "test")
        if recipe.dataset == "cityscapes":                        # its test labels are not public
            self.splits = ("train", "val")
        self._frames = {}

    def path(self, name):
        return self.folder / name

    # -- torchrun

    def join(self):
        """Connects to torchrun's other processes, if there are any: by nccl if each has its own GPU, else
        by gloo. Raises InputError if a batch is too small for them."""
        if not launched() or os.environ["WORLD_SIZE"] == "1":
            return
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        # Python runs no handler while a process waits for another. With the default action torchrun can end
        # it at once, not after 30 s.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for name in ("static_batch", "cell_batch"):
            size = getattr(self.recipe, name)
            if size < 2 * self.world:                             # the batch norm of gap needs two images
                raise InputError(f"{flag(name)} {size}: {self.world} processes share it and need two "
                                 f"images each, so give {2 * self.world} or more")
        gpus, forever = torch.cuda.device_count(), datetime.timedelta(days=365)   # a candidate may take hours
        own = self.device.type == "cuda" and gpus >= self.local_world
        self.store, _, _ = next(dist.rendezvous("env://", timeout=forever))
        dist.init_process_group("nccl" if own else "gloo", store=dist.PrefixStore("group", self.store),
                                rank=self.rank, world_size=self.world, timeout=forever)
        if self.rank:
            sys.stdout = open(os.devnull, "w")                    # one process reports

    def wait(self):
        """Waits until every process is here, so that all see the same files."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """Rank 0's value, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

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
        capable = False
        if self.device.type == "cuda":
            capable = torch.cuda.is_bf16_supported(including_emulation=False)
        elif self.device.type == "cpu":
            capable = cpu_has_bf16()
        return torch.autocast(self.device.type, torch.bfloat16) if capable else contextlib.nullcontext()

    def to_device(self, module):
        return module.to(self.device, memory_format=torch.channels_last)

    # -- trainings

    def epochs(self, name, count, parts, optimizers, network=None):
        """Yields the epochs of a training that are still to do; restores the others from NAME.pt.

        parts: the modules that are trained, {"static": module, "cell": module}. network: the networks.Network
        that is trained; needed if there is a cell. NAME.pt holds the states of the parts, the history, the
        recipe and the cell's genotype, and, until the training is finished, the optimisers' states."""
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
        self.wait()                                               # no one writes before all have read
        self.progress = None
        for index in range(len(history), count):
            epoch = Epoch(self, name, index, count)
            yield epoch                                           # the loop's body runs here
            losses = check_finite(epoch.losses, f"{name}, epoch {index + 1}")
            loss, seconds = sum(losses) / len(losses), time.time() - epoch.start
            history.append({**epoch.entry, "loss": loss, "seconds": seconds})
            if index + 1 < count and time.time() - since > SAVE_SECONDS:
                since = time.time()
                states = [optimizer.state_dict() for optimizer in optimizers]
                self.save(name, parts, history=history, optimizers=states, **facts)
        self.save(name, parts, history=history, **facts)
        self.wait()

    def save(self, name, parts, **more):
        if self.rank == 0:
            states = {part: {key: value.cpu() for key, value in module.state_dict().items()}
                      for part, module in parts.items()}          # so torch.load opens a GPU's file anywhere
            if "optimizers" not in more and "static" in states:   # auxiliary heads are not needed now
                states["static"] = {key: value for key, value in states["static"].items()
                                    if not key.startswith("auxiliary.")}
                states.pop("average", None)                       # it is what "static" holds now
            if name == "static":
                more["source"] = self.source()
            if "static" in states:           # more that VideoSegmenter.load needs
                more["network"] = parts["static"].name
                kind = data.dataset_class(self.recipe.dataset)
                more.update(classes=list(kind.classes), palette=np.asarray(kind.palette).tolist(),
                            size=self._frames["train"].size if "train" in self._frames else None)
            save(self.path(f"{name}.pt"), {**states, **more, "recipe": dataclasses.asdict(self.recipe)})

    def finished(self, name):
        """Whether NAME.pt holds a finished training. Rank 0 decides for all processes."""
        path = self.path(f"{name}.pt")
        return self.agree(self.rank == 0 and path.exists() and "optimizers" not in self.checkpoint(name))

    def checkpoint(self, name):
        """The content of NAME.pt. Raises InputError naming the fields that differ if it was made with
        another recipe."""
        path = self.path(f"{name}.pt")
        saved = load(path)
        if not isinstance(saved, dict) or "recipe" not in saved:
            raise InputError(f"{path}: holds no result of a training; use another --run")
        check_recipe(path, saved["recipe"], self.recipe, stage_of(name))
        if name == "static":
            self.check_source(path, saved.get("source", {}))
        return saved

    def load(self, name):
        """The network of a finished training (static, baseline, cell-K) as a VideoSegmenter in eval mode."""
        path, saved = self.path(f"{name}.pt"), self.checkpoint(name)
        if "optimizers" in saved:
            raise InputError(f"{path}: is not finished; run the command that started it again")
        if "static" not in saved:
            raise InputError(f"{path}: holds no network; use another --run")
        static, cell = STATICS[saved.get("network", "arch2")](self.num_classes), None
        fill(static, saved["static"], path)
        if "cell" in saved:
            cell = make_cell(saved["genotype"], static, saved["past"])
            fill(cell, saved["cell"], path)
        return self.to_device(VideoSegmenter(static, cell, pad=self.recipe.input_pad)).eval()

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

    # -- the inputs of a static network, compared by content: they may have moved

    def source(self):
        if not hasattr(self, "_source"):
            self._source = {name: weights.digest(getattr(self.recipe, name)) for name in weights.FILES}
            if self.root is not None:
                self._source["data"] = data_digest(self.dataset("train"))
        return self._source

    def check_source(self, path, saved):
        """Raises InputError if the weights or data have another content than when the static network at
        path was trained. Weights that are gone and data that is not given are not compared."""
        for key, value in self.source().items():
            if value and saved.get(key) and saved[key] != value:
                given = self.root if key == "data" else getattr(self.recipe, key)
                raise InputError(f"{path}: was trained when {flag(key)} had another content than {given} "
                                 "has now; give the original, or use another --run")
            self._source[key] = saved.get(key) or value


def data_digest(dataset):
    """A hash of a split's file names and file sizes."""
    digest = hashlib.sha256()
    for clip in dataset.clips:
        for frame in clip:
            for path in map(pathlib.Path, filter(None, frame)):
                digest.update(f"{path.name} {path.stat().st_size if path.exists() else 0}\n".encode())
    return digest.hexdigest()[:8]


def best_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors. By default it returns large blocks to the system, and
    the next tensor causes page faults again. Keeping them, a step of pretraining takes 0.83 of the time on
    a CPU. It costs some memory: training 3 x 8 frames of 480 x 360 end to end takes 6.2 GB instead of 5.0.
    Does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                       # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, -1)                      # M_TRIM_THRESHOLD: never


def launched():
    """Whether torchrun started this process. (RANK alone may be left in the environment.)"""
    return dist.is_available() and dist.is_torchelastic_launched()


def set_tf32(allowed):
    """Allows or forbids TF32, in which a GPU rounds the factors of float32 convolutions and matrix products
    to 10 bits. Allowed in training, not in evaluation."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def float32():
    """A context for an evaluation during training: TF32 is off."""
    before = torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(before)


def cpu_has_bf16():
    """Whether this CPU has bf16 instructions. torch 2.11 has a function for it, earlier versions two
    private ones."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
