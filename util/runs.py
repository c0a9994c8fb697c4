"""A run's folder. A run may be killed anywhere and goes on to the same numbers; torchrun's processes share
it.

Nothing here is in the paper. train.py uses these words of it:

    run.epochs(name, count, parts, optimizers)   the epochs of a training that are still to do
    epoch.batches(items, size)                   shuffled batches of 0..items-1, and the share that is done
    epoch.log(loss)                              the loss of a step
    run.log(name)                                the log of a search, a line a candidate
    log.misses(k)                                whether candidate k is to be trained here
    log.candidate(k, genotype)                   writes its line; NaN and out of memory give reward 0
    run.finished(name), run.load(name)           whether a training is done, and its network

In the order of the file: files, progress, trainings, the search's log, the run itself.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import data
from data import InputError
from dyncell import Arch2, VideoSegmenter
from util import datasets, weights
from util.cells import as_text, make_cell
from util.progress import Progress

SAVE_SECONDS = 60                            # between checkpoints of a training, each made after an epoch


def generator(*key):
    """A random generator for (seed, what it is for, ...): what one stage draws never depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------------------
# Files

def save(path, content):
    """Writes beside, flushes, renames: a file is whole or not there. Tensors and plain values, or JSON by
    name."""
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
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: cannot be read ({reason}); restore it or use another --run") from None


def fill(module, state, path):
    """load_state_dict, strictly. Raises InputError naming the file when it is the state of something else."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: is the checkpoint of another network ({reason}); use another --run"
                         ) from None


def read_log(path, cut=False):
    """The log of a search, JSON lines -> {candidate: entry}, in the file's order; {} where there is no file.

    A torn last line (the machine stopped while it was written) does not count; cut=True removes it from the
    file. Its candidate is trained again, to the same entry."""
    if not path.exists():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn and cut:
        print(f"{path}: the last line is torn, cut off")
        with open(path, "r+b") as file:
            file.truncate(len(whole + newline))
    log = {}
    try:
        for line in whole.splitlines():
            entry = json.loads(line)
            if entry["candidate"] in log or not {"tokens", "reward", "half_reward", "status"} <= entry.keys():
                raise ValueError
            log[entry["candidate"]] = entry
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: a line is no candidate's, or a candidate has two; restore it or use "
                         "another --run") from None
    return log


# ---------------------------------------------------------------------------------------------------------
# Recipes: which fields does a result depend on?

def flag(name):
    return "--" + name.replace("_", "-")


def fields_of(recipe, stage):
    """The names of the fields on which a result of this stage depends: those of its class in train.py,
    inherited ones included."""
    kind = next(kind for kind in type(recipe).__mro__ if kind.__name__ == stage)
    return [field.name for field in dataclasses.fields(kind)]


def check_recipe(path, saved, recipe, stage):
    """Raises InputError unless what `path` holds, made with the recipe `saved`, a dict, can be used here."""
    names = fields_of(recipe, stage)
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))              # tuples become lists, as in a file
    saved = json.loads(json.dumps(saved)) if isinstance(saved, dict) else {}
    if missing := [name for name in names if name not in saved]:
        raise InputError(f"{path}: made by another version, which had no {', '.join(missing[:6])}; use "
                         "another --run")
    names = [name for name in names if name not in weights.FILES]         # by content, in Run.check_source
    if differing := [name for name in names if saved[name] != now[name]]:
        there = "; ".join(f"{name} {saved[name]!r} there, {now[name]!r} now" for name in differing[:6])
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise InputError(f"{path}: was made with another recipe ({there}{more}); give the flags it was made "
                         f"with, {flag(differing[0])} first, or use another --run")


def stage_of(name):
    """The class of the fields on which NAME.pt depends."""
    if name.endswith("-alone"):
        return "ForCell"
    return {"static": "ForPretrain", "controller": "ForSearch"}.get(name, "ForEndToEnd")


# ---------------------------------------------------------------------------------------------------------
# Trainings

class NotFinite(InputError):
    """A loss is NaN or infinite."""


def check_finite(losses, where):
    """A list of losses, scalar tensors or numbers -> floats. Raises NotFinite."""
    values = [float(loss) for loss in losses]
    for value in values:
        if not math.isfinite(value):
            raise NotFinite(f"{where}: the loss is {value}; try a smaller learning rate or another --seed")
    return values


def batches(items, size, rng):
    """Shuffled numbers 0..items-1 in batches. [ours] A smaller last one is dropped: its batch norms are
    noisier."""
    size = min(size, items)
    return torch.randperm(items, generator=rng)[:items // size * size].split(size)


def average_gradients(optimizers):
    """Of torchrun's processes, each of which has the gradient of its share of the batch."""
    gradients = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            gradients += [p.grad for p in group["params"] if p.grad is not None]      # None in all processes
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


class Epoch:
    """One epoch of a training. Every random choice in it comes from (seed, name, index): it can be made
    again."""

    def __init__(self, run, name, index, count):
        self.run, self.name, self.index, self.count = run, name, index, count
        self.rng = generator(run.recipe.seed, name, index)
        self.losses, self.entry, self.start = [], {"epoch": index + 1}, time.time()

    def batches(self, items, size):
        """This process's share of each batch of 0..items-1, and the share of the whole training that is
        done."""
        seed, rank, world = self.run.recipe.seed, self.run.rank, self.run.world
        shuffled = batches(items, size, self.rng)
        if rank:                                                  # the same batches, but other augmentation
            self.rng = generator(seed, self.name, self.index, rank)
        torch.manual_seed(generator(seed, self.name, self.index, rank, "dropout").initial_seed())
        total, first = self.count * len(shuffled), self.index * len(shuffled)
        if self.run.progress is None:
            self.run.progress = Progress(self.name, total, done=first)
        for k, batch in enumerate(shuffled):
            yield batch[rank::world], (first + k) / total
            if k % 10 == 9 or first + k + 1 == total:             # a look at the loss makes a GPU wait
                loss = check_finite(self.losses[-1:], self.name)[0] if self.losses else math.nan
                self.run.progress.update(first + k + 1, epoch=self.index + 1, loss=loss)

    def log(self, loss):
        """The loss of a step. It is looked at after the epoch, before anything is saved."""
        self.losses.append(loss.detach())

    def due(self, every):
        """True in the process that reports, in every nth epoch and in the last one; every = 0: never."""
        nth = every and (self.index + 1) % every == 0
        return bool(every) and self.run.rank == 0 and (bool(nth) or self.index + 1 == self.count)

    def note(self, **figures):
        """Figures for the history."""
        self.entry.update(figures)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.run.progress.say(f"{self.name}: epoch {self.index + 1}, {text}")


# ---------------------------------------------------------------------------------------------------------
# The search's log

class Log:
    """The log of a search, which is the truth: a line a candidate, written by the process that trained it."""

    def __init__(self, run, path):
        if run.rank == 0:
            read_log(path, cut=True)
        run.wait()
        self.run, self.path, self.entries = run, path, read_log(path)
        run.wait()                                                # nobody writes before all have read

    def misses(self, k):
        """True if candidate k is to be trained here: it isn't in the log, nor did another process claim
        it."""
        if k in self.entries:
            return False
        return self.run.store is None or self.run.store.add(f"{self.path.name} {k}", 1) == 1

    @contextlib.contextmanager
    def candidate(self, k, genotype):
        """Yields the entry to be filled in; writes it. Any error but NaN and out of memory stops the run."""
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
        entry.update(seconds=round(time.time() - start, 2), tokens=genotype.to_tokens(),
                     genotype=json.loads(genotype.to_json()))
        line = (json.dumps(entry) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:          # one write, so lines don't mix
            if file.write(line) < len(line):
                raise OSError(28, "No space left on device", str(self.path))
            os.fsync(file.fileno())
        self.entries[k] = entry

    def meet(self):
        """Waits until every process's candidates are there."""
        if self.run.world > 1:
            self.run.wait()
            self.entries = read_log(self.path)
            self.run.wait()

    def tokens(self, numbers, sampled):
        """The tokens (n, 5L) of these candidates: the log's where it has them. Another processor may round,
        and so sample, otherwise; the rewards belong to what was trained."""
        tokens = sampled[:len(numbers)].clone()
        for row, k in zip(tokens, numbers):
            if k not in self.entries:
                continue
            logged = self.entries[k]["tokens"]
            if len(logged) != len(row):
                raise InputError(f"{self.path}: candidate {k} has {len(logged)} tokens, not {len(row)}: of "
                                 "another recipe; use another --run")
            if logged != row.tolist():
                print(f"{self.path}: this machine would sample another candidate {k}; the log's is taken")
            row.copy_(torch.tensor(logged))
        return tokens

    def standing(self, k):
        """For the line of progress."""
        best = max(entry["reward"] for entry in self.entries.values())
        return {"reward": self.entries[k]["reward"], "best": best}

    def __getitem__(self, k):
        return self.entries[k]

    def __len__(self):
        return len(self.entries)


def out_of_memory(error):
    """torch says it by a class of its own on a GPU, by its text elsewhere."""
    texts = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
             "CUDNN_STATUS_ALLOC_FAILED")
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


# ---------------------------------------------------------------------------------------------------------
# The run

class Run:
    """A run's folder, its recipe, its device, its data, and its place among torchrun's processes.

    Every process does the same work on the same files, but for three things: a batch is shared out, so are
    the candidates of a round, and only rank 0 writes checkpoints and reports."""

    def __init__(self, folder, recipe, root=None, device=None):
        self.folder, self.recipe, self.root = pathlib.Path(folder), recipe, root
        self.rank, self.world, self.store, self.progress = 0, 1, None, None
        try:
            chosen = torch.device(device or best_device())
            if chosen.type == "cuda" and launched():                      # a GPU for each process, if there are
                chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            if chosen.type == "cuda" and chosen.index is not None:        # before cuda:0 is made ready
                torch.cuda.set_device(chosen)
            self.device = torch.zeros(0, device=chosen).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:80]
            raise InputError(f"--device {device}: cannot be used here ({reason})") from None
        if self.device.type == "cpu":
            keep_freed_memory()
        set_tf32(False)
        self.num_classes = len(datasets.dataset_class(recipe.dataset).classes)
        self.splits = ("train", "val", "test")
        if recipe.dataset == "cityscapes":                        # it keeps its test labels back
            self.splits = ("train", "val")
        self._frames = {}

    def path(self, name):
        return self.folder / name

    # -- torchrun

    def join(self):
        """Meets torchrun's other processes, if there are any: nccl where each has its own GPU, else gloo."""
        if not launched() or os.environ["WORLD_SIZE"] == "1":
            return
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # A process that waits for a dead one hears no handler, and torchrun would wait 30 s for it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for name in ("static_batch", "cell_batch"):
            size = getattr(self.recipe, name)
            if size < 2 * self.world:                             # gap's batch norm has one value an image
                raise InputError(f"{flag(name)} {size}: {self.world} processes share it, two images each at "
                                 f"the least: {2 * self.world} or more")
        gpus, forever = torch.cuda.device_count(), datetime.timedelta(days=365)   # a candidate may take hours
        own = self.device.type == "cuda" and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
        self.store, _, _ = next(dist.rendezvous("env://", timeout=forever))
        dist.init_process_group("nccl" if own else "gloo", store=dist.PrefixStore("group", self.store),
                                rank=self.rank, world_size=self.world, timeout=forever)
        if self.rank:
            sys.stdout = open(os.devnull, "w")                    # one process reports

    def wait(self):
        """Until every process is here, so that they see the same files."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """The value of the process that decides, rank 0, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    # -- data and device

    def dataset(self, split):
        return datasets.open_split(self.recipe.dataset, self.root, split)

    def frames(self, split):
        """The frames of a split, read once."""
        if split not in self._frames:
            progress = Progress(f"looking at every frame of {split}", 0)
            self._frames[split] = data.Frames(self.dataset(split), None, self.device, show=progress.show)
        return self._frames[split]

    def autocast(self):
        """bf16 where the device has it. Only with channels_last: else a CPU's depthwise convolution is 20x
        slower."""
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
        """The epochs of a training that are still to do, one after the other.

        network: of util/compare.py, where it has a cell, whose genotype NAME.pt holds.

        parts: what is trained, {"static": module, "cell": module}. NAME.pt holds their states, the history,
        the recipe and the facts, and until the training is finished the optimisers' states."""
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
        self.wait()                                               # nobody writes before all have read
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
            states = {part: module.state_dict() for part, module in parts.items()}
            if "optimizers" not in more and "static" in states:   # the auxiliary heads have done their work
                states["static"] = {key: value for key, value in states["static"].items()
                                    if not key.startswith("auxiliary.")}
            if name == "static":
                more["source"] = self.source()
            if "static" in states:           # what predict needs besides
                kind = datasets.dataset_class(self.recipe.dataset)
                more.update(classes=list(kind.classes), palette=np.asarray(kind.palette).tolist(),
                            size=self._frames["train"].size if "train" in self._frames else None)
            save(self.path(f"{name}.pt"), {**states, **more, "recipe": dataclasses.asdict(self.recipe)})

    def finished(self, name):
        """Whether NAME.pt holds a training that is finished. One process looks, all follow."""
        path = self.path(f"{name}.pt")
        return self.agree(self.rank == 0 and path.exists() and "optimizers" not in self.checkpoint(name))

    def checkpoint(self, name):
        """The content of NAME.pt. Raises InputError naming the fields when it was made with another
        recipe."""
        path = self.path(f"{name}.pt")
        saved = load(path)
        if not isinstance(saved, dict) or "recipe" not in saved:
            raise InputError(f"{path}: holds no training's result; use another --run")
        check_recipe(path, saved["recipe"], self.recipe, stage_of(name))
        if name == "static":
            self.check_source(path, saved.get("source", {}))
        return saved

    def load(self, name):
        """The network of a finished training (static, baseline, cell-K) as a VideoSegmenter in eval mode."""
        path, saved = self.path(f"{name}.pt"), self.checkpoint(name)
        if "optimizers" in saved:
            raise InputError(f"{path}: is not finished; the command that began it continues")
        if "static" not in saved:
            raise InputError(f"{path}: holds no network; use another --run")
        static, cell = Arch2(self.num_classes), None
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

    # -- what a static network was made from, by content: a file or folder that moved is the same

    def source(self):
        if not hasattr(self, "_source"):
            self._source = {name: weights.digest(getattr(self.recipe, name)) for name in weights.FILES}
            if self.root is not None:
                self._source["data"] = data_digest(self.dataset("train"))
        return self._source

    def check_source(self, path, saved):
        """What is not there any more (the weights) or not given (the data, for predict) is not asked for."""
        for key, value in self.source().items():
            if value and saved.get(key) and saved[key] != value:
                given = self.root if key == "data" else getattr(self.recipe, key)
                raise InputError(f"{path}: was trained on another content of {flag(key)} than {given} has; "
                                 "give that, or use another --run")
            self._source[key] = saved.get(key) or value


def data_digest(dataset):
    """Of a split: its frames' names and the sizes of their files."""
    digest = hashlib.sha256()
    for clip in dataset.clips:
        for frame in clip:
            for path in map(pathlib.Path, filter(None, frame)):
                digest.update(f"{path.name} {path.stat().st_size if path.exists() else 0}\n".encode())
    return digest.hexdigest()[:8]


def best_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def keep_freed_memory():
    """glibc gives a large tensor's memory back to the system when it is freed, and the next one costs page
    faults again. Kept, a step of pretraining takes 0.83 of the time on a CPU, for some memory: end to end,
    3 x 8 frames of 480 x 360 take 6.2 GB where they took 5.0. Other C libraries stay as they are."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                       # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, -1)                      # M_TRIM_THRESHOLD: never


def launched():
    """Whether torchrun started this process. (RANK alone may have been left in the environment.)"""
    return dist.is_available() and dist.is_torchelastic_launched()


def set_tf32(allowed):
    """Whether a GPU may round float32 factors to 10 bits, in convolutions and products: in training, not in
    evaluation."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def float32():
    """Evaluation's precision, in the middle of a training."""
    before = torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(before)


def cpu_has_bf16():
    """Whether this CPU computes in bf16. torch 2.11 has a function for it, those before have two private
    ones."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def locked(run):
    """One command at a time works on a run's folder. Where the system or its file system can't lock, it
    says so."""
    if run.rank:
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.path("lock"), "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run.folder}: another process works on this run; wait for it or use another "
                             "--run") from None
        except (ImportError, OSError) as error:
            print(f"{run.folder}: can't be locked here ({error}); start one command at a time on it")
        yield
