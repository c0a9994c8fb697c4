"""A run's folder: a run that was killed at any point continues from it, to the same numbers. torchrun's
processes share the folder. Nothing here is in the paper; the head of train.py lists what it uses of it."""
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist

with contextlib.suppress(ImportError):       # Windows has none
    import fcntl

import data
from dyncell import DECODER, VideoSegmenter, make_cell
from util.costs import usable_device
from util.device import best_device, has_bf16, keep_freed_memory
from util.errors import InputError, brief, out_of_memory
from util.files import load, read_log, save
from util.progress import Progress

SAVE_SECONDS = 60                            # least time between checkpoints, which are made after epochs
FAIL_ALIKE = 4                               # a search stops when so many candidates, all of them, fail alike


# ---- which fields of the recipe does a result depend on? --------------------------------------------------

STAGES = "pretrain", "search", "alone", "end", "amount"           # of the recipe's fields, in their order


def flag(name):
    return "--" + name.replace("_", "-")


def fields_of(recipe, stage):
    """The names of the fields on which a result of this stage depends: its own, and those before."""
    before = STAGES[:STAGES.index(stage) + 1]
    return [field.name for field in dataclasses.fields(recipe) if field.metadata["stage"] in before]


def stage_of(path):
    """The stage of the last fields that a file of a run's folder depends on."""
    stages = {"static": "pretrain", "controller": "search", "search": "search", "random": "search"}
    return "alone" if path.stem.endswith("-alone") else stages.get(path.stem, "end")


def check_recipe(path, saved, recipe):
    """Raises InputError unless the file `path`, made with the recipe `saved` (a dict), can be used with this
    recipe. It names the fields, both values, and the command that copies what stays valid."""
    there, now = ({name: json.dumps(value) for name, value in fields.items()}        # a tuple equals a list
                  for fields in (saved, dataclasses.asdict(recipe)))
    differing = [name for name in fields_of(recipe, stage_of(path)) if there.get(name) != now[name]]
    if not differing:
        return
    values = [f"{flag(name)} {there.get(name)} there, {now[name]} now" for name in differing]
    valid = [stage for stage in STAGES if differing[0] not in fields_of(recipe, stage)]
    kept = [file for file in sorted(path.parent.iterdir()) if file.suffix in (".pt", ".jsonl")
            and stage_of(file) in valid]
    new, files = shlex.quote(f"{path.parent}-2"), map(str, [path.parent / "recipe.json", *kept])
    copy = f" that keeps what it can: mkdir {new} && cp {shlex.join(files)} {new}" if kept else ""
    raise InputError(f"{path}: was made with another recipe ({'; '.join(values[:6])}); leave that out, or "
                     f"use another --run{copy}")


# ---- trainings --------------------------------------------------------------------------------------------

def generator(*key):
    """A random generator for a key (seed, purpose, ...). Different keys give independent random numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class NotFinite(InputError):
    """A loss is NaN or infinite."""


def check_finite(losses, where):
    """A list of losses, scalar tensors or numbers -> floats. Raises NotFinite if one is NaN or infinite."""
    values = [float(loss) for loss in losses]
    if not math.isfinite(total := sum(values)):
        raise NotFinite(f"{where}: the loss is {total}; try a smaller learning rate or another --seed")
    return values


def batches(items, size, rng):
    """0..items-1, shuffled, in batches. [ours] A smaller last one has noisier batch norms, and is dropped."""
    size = min(size, items)
    return torch.randperm(items, generator=rng)[:items // size * size].split(size)


def average_gradients(optimizers):
    """Averages the gradients of torchrun's processes, each of which has its own share of the batch."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])      # one message, not hundreds
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient) / dist.get_world_size())


class Epoch:
    """One epoch of a training. Its random choices come from (seed, name, index), so it can be repeated."""

    def __init__(self, run, name, index, count):
        self.run, self.name, self.index, self.count = run, name, index, count
        self.rng = generator(run.recipe.seed, name, index)
        self.losses, self.entry, self.start = [], {"epoch": index + 1}, time.time()
        self.last, self.step = index + 1 == count, 0              # step: of the whole training

    def batches(self, items, size):
        """Yields this process's part of each batch of 0..items-1, and the share of the training behind it."""
        run, key = self.run, (self.run.recipe.seed, self.name, self.index)
        shuffled = batches(items, size, self.rng)
        if run.rank:                                              # the same batches, different augmentation
            self.rng = generator(*key, run.rank)
        torch.manual_seed(generator(*key, run.rank, "dropout").initial_seed())     # if yours has any
        total, first = self.count * len(shuffled), self.index * len(shuffled)
        run.progress = run.progress or Progress(self.name, total, done=first)
        for self.step, batch in enumerate(shuffled, start=first):
            yield batch[run.rank::run.world], self.step / total
            # A GPU waits where a loss is read, so not every one is; the first is a sign of life.
            if run.device.type == "cpu" or (self.step - first) % 10 == 0 or self.step + 1 == total:
                loss, = check_finite(self.losses[-1:], self.name)
                run.progress.update(self.step + 1, epoch=self.index + 1, loss=loss)

    def log(self, loss):
        """Records the loss of a step. It is checked after the epoch, before anything is saved."""
        self.losses.append(loss.detach())

    def due(self, every):
        """True in rank 0, in every nth epoch (n = every) and in the last one; every = 0: never."""
        return self.run.rank == 0 and every > 0 and ((self.index + 1) % every == 0 or self.last)

    def note(self, name, value):
        """Adds a figure to the history and prints it."""
        self.entry[name] = value
        self.run.progress.say(f"{self.name}: epoch {self.index + 1}, {name} {value:.4f}")


# ---- the search's log -------------------------------------------------------------------------------------

class Log(dict):
    """The log of a search, {candidate: entry}: one line each, written by the process that trained it. A
    search that continues takes the logged candidates from here."""

    def __init__(self, run, name):
        self.run, self.path = run, run.path(name)
        super().__init__(run.first(lambda: read_log(self.path, cut=True)))

    def claim(self, k):
        """Whether this process is to train candidate k: it is not logged, and nobody has claimed it."""
        store = self.run.store
        return k not in self and (store is None or store.add(f"{self.path.name} {k}", 1) == 1)

    @contextlib.contextmanager
    def candidate(self, k, genotype):
        """A context: yields the entry of candidate k, and then writes it. NaN and out of memory are reward 0;
        any other error stops the run, and so do first candidates that all fail alike."""
        start = time.time()
        entry = {"candidate": k, "status": "ok", "stopped": False, "reward": 0.0, "half_reward": None}
        try:
            yield entry
        except Exception as error:
            if not (isinstance(error, NotFinite) or out_of_memory(error)):
                raise RuntimeError(f"candidate {k} failed: {genotype}") from error
            status = "not finite" if isinstance(error, NotFinite) else "out of memory"
            entry.update(status=status, reason=brief(error))
            before = {self[j]["status"] if j in self else None for j in range(k)}
            if k + 1 >= FAIL_ALIKE and before == {status}:
                raise InputError(f"{self.path}: each of the first {k + 1} candidates failed "
                                 f"({brief(error)}); lower --cell-lr if the loss is not finite, else "
                                 "--search-batch or --input-crop") from None
        entry.update(seconds=round(time.time() - start, 2), tokens=genotype.to_tokens(),
                     genotype=json.loads(genotype.to_json()))
        with open(self.path, "a") as file:                        # written at once, so lines don't mix
            file.write(json.dumps(entry) + "\n")
        self[k] = entry

    def sync(self):
        """Waits for all processes, then reads the candidates that they logged."""
        if self.run.world > 1:
            self.run.barrier()
            self.update(read_log(self.path))

    def tokens(self, numbers, sampled):
        """The tokens (n, 5L) of these candidates: from the log if it has them, else as sampled. Another
        processor may round, and then sample, differently; a logged reward belongs to the logged tokens."""
        return torch.tensor([self[k]["tokens"] if k in self else row.tolist()
                             for k, row in zip(numbers, sampled)])


# ---- the run ----------------------------------------------------------------------------------------------

class Run:
    """A run: its folder, recipe, device and data, and this process's rank among torchrun's processes. All do
    the same work on the same files, with three exceptions: they share each batch, they share the candidates
    of a round, and only rank 0 writes checkpoints and reports."""

    def __init__(self, folder, recipe, root=None, device=None):
        self.folder, self.recipe, self.root = folder, recipe, root
        self.expected, self.taken = {}, {}   # {stage: seconds}: by schedules.announce, by table.stage
        self.rank, self.world, self.sharing, self.store = 0, 1, 1, None   # sharing: processes on this device
        self._frames, self.progress, device = {}, None, device or best_device()
        if "TORCHELASTIC_RUN_ID" in os.environ:                   # torchrun; others leave a RANK behind
            device = self.join(device)
        self.device = usable_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.classes = data.dataset_class(recipe.dataset).classes
        self.num_classes = len(self.classes)
        self.splits = ("train", "val", "test")[:2 if recipe.dataset == "cityscapes" else 3]   # no test labels

    def join(self, device):
        """Connects torchrun's processes: by nccl if each has a GPU, else by gloo. -> this one's device"""
        local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
        self.sharing = 1 if gpus >= local_world else local_world
        # A process that waits for another runs no handler of Python's: so torchrun can end it at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        forever = datetime.timedelta(days=365)                    # a candidate may take hours
        self.store, self.rank, self.world = next(dist.rendezvous("env://", timeout=forever))
        dist.init_process_group("nccl" if gpus >= local_world else "gloo", rank=self.rank, timeout=forever,
                                world_size=self.world, store=dist.PrefixStore("group", self.store))
        if self.rank:
            sys.stdout = open(os.devnull, "w")                    # one process reports
        return f"cuda:{local_rank % gpus}" if gpus else device

    def barrier(self):
        """Waits until every process is here, so that all see the same files."""
        if self.world > 1:
            dist.barrier()

    def first(self, work):
        """What work() returns in rank 0, in every process. A user's mistake ends all; rank 0 reports it."""
        try:
            box = [work() if self.rank == 0 else None]
        except (InputError, OSError) as error:
            box = [error]
        if self.world > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], Exception):
            raise SystemExit(2) if self.rank else box[0]
        return box[0]

    # -- the folder, data and device
    def path(self, name):
        return self.folder / name

    def dataset(self, split):
        return data.open_split(self.recipe.dataset, self.root, split)

    def frames(self, split):
        """The frames of a split. They are read at the first call."""
        if split not in self._frames:
            progress = Progress(f"checking every frame of {split}", 0)
            self._frames[split] = data.Frames(self.dataset(split), None, self.device, show=progress.update)
        return self._frames[split]

    def frame_size(self):
        """(H, W) of the dataset's frames, from its first one."""
        dataset = self.dataset("train")
        return dataset.read(dataset.clips[0][0])[1].shape

    def autocast(self):
        """To bf16, if the device has it. Without channels_last a depthwise convolution is 20 times slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device))

    def to_device(self, module):
        return module.to(self.device, memory_format=torch.channels_last)

    # -- trainings and their checkpoints
    def epochs(self, name, count, parts, optimizers):
        """Yields the epochs of a training that are still to do; restores the others from NAME.pt. parts: the
        modules that are trained, {"static": module, "cell": module}."""
        path, history, since = self.path(f"{name}.pt"), [], time.time()
        if path.exists():
            saved = self.checkpoint(name)
            history = saved["history"]
            for part, module in parts.items():
                module.load_state_dict(saved[part])
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            print(f"{name}: continues after epoch {len(history)}")
        self.barrier()                                            # no one writes before all have read
        self.progress = None
        for index in range(len(history), count):
            epoch = Epoch(self, name, index, count)
            yield epoch                                           # the loop's body runs here
            losses = check_finite(epoch.losses, f"{name}, epoch {index + 1}")
            history.append({**epoch.entry, "loss": sum(losses) / len(losses),
                            "seconds": time.time() - epoch.start})
            if not epoch.last and time.time() - since > SAVE_SECONDS:
                since, states = time.time(), [optimizer.state_dict() for optimizer in optimizers]
                self.save(name, parts, history=history, optimizers=states)
        self.save(name, parts, history=history)
        self.barrier()

    def save(self, name, parts, **more):
        """Writes NAME.pt, a dict whose keys stand in docs/running.md, question 8: the states of the networks
        in `parts`, what tells a reader how to use them, the recipe, and `more`."""
        if self.rank:
            return
        # On the CPU: torch.load opens it anywhere. A finished one needs no auxiliary heads, nor the mean.
        finished = "optimizers" not in more
        states = {part: {key: value.cpu() for key, value in module.state_dict().items()
                         if not (finished and key.startswith("auxiliary."))}
                  for part, module in parts.items() if not (finished and part == "average")}
        if "static" in parts:
            more.update(network=parts["static"].name, size=self.frame_size(), classes=self.classes,
                        palette=data.dataset_class(self.recipe.dataset).palette.tolist())
        if "cell" in parts:
            genotype = getattr(parts["cell"], "genotype", None)   # the decoder has none
            more.update(genotype=genotype.to_json() if genotype else DECODER,
                        past=getattr(parts["cell"], "past", True))
        save(self.path(f"{name}.pt"), {**states, **more, "recipe": dataclasses.asdict(self.recipe)})

    def finished(self, name):
        """Whether NAME.pt holds a finished training. Rank 0 decides for all processes."""
        path = self.path(f"{name}.pt")
        return self.first(lambda: path.exists() and "optimizers" not in self.checkpoint(name))

    def checkpoint(self, name):
        """The content of NAME.pt. Raises InputError if another recipe or other classes made it."""
        path = self.path(f"{name}.pt")
        saved, ours = load(path), self.classes
        if not isinstance(saved, dict) or "recipe" not in saved or saved.get("classes", ours) != ours:
            raise InputError(f"{path}: holds no result of a training on these classes; use another --run")
        check_recipe(path, saved["recipe"], self.recipe)
        return saved

    def load(self, name):
        """The network of a finished training (static, baseline, cell-K) as a VideoSegmenter in eval mode."""
        video = VideoSegmenter.load(self.path(f"{name}.pt"))
        video.pad = self.recipe.input_pad
        return self.to_device(video)

    def load_cell(self, network):
        """The cell of a network that was trained alone; None for the baseline."""
        if network.genotype is None:
            return None
        cell = make_cell(network.genotype, self.load("static").static, network.past)
        cell.load_state_dict(self.checkpoint(f"{network.name}-alone")["cell"])
        return self.to_device(cell)


@contextlib.contextmanager
def locked(run):
    """A context in which no other command can work on the run's folder. Raises InputError if one does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.path("lock"), "w") as lock:
        try:
            if run.rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run.folder}: another process uses it; wait, or use another --run") from None
        except (NameError, OSError) as error:                    # no fcntl, or no locks
            print(f"{run.folder}: can't be locked here ({error}); start one command at a time on it")
        yield
