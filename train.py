"""The whole method: pretrain -> search -> finetune -> evaluate, each loop where the paper describes it.

    python train.py                                                  synthetic videos, minutes on a CPU
    python train.py --dataset camvid --data DIR                      CamVid; on a CPU in about 100 minutes
    python train.py --dataset camvid --data DIR --stage evaluate     one stage

Read it from top to bottom beside the paper. The same command again continues where it stopped, to the same
result. experiment/runs.py does that; these of its words do not explain themselves:

    run.epochs(...)                    the epochs of a training that are still to do; it restores and saves
    epoch.batches(n, size)             shuffled batches of 0..n-1, and the share of the training behind us
    epoch.log(loss)                    for the history; a loss that is not finite stops the run
    log.claim(k), log.candidate(k)     whether candidate k is to be trained; its line in the search's log, in
                                       which a loss that is not finite or too little memory is reward 0
    run.load(name)                     a trained network of the run's folder
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
from controller import PPO, Controller, EarlyStop
from dyncell import STATICS, Genotype, VideoSegmenter, fold_batchnorm, make_cell
from ops import resize
from experiment import networks, options, predict, schedules, table, weights
from experiment.runs import Log, average_gradients, batches, check_finite, generator
from util.costs import parameters
from util.device import tf32
from util.progress import Progress


# ---- the recipe: every hyper-parameter --------------------------------------------------------------------

def field(stage, default, help, least=None, below=math.inf, choices=None):
    """A field of the recipe, and so a flag. stage: pretrain, search, alone, end or amount (see below), the
    first one whose result depends on it. A number is above 0, or at least `least`, and less than `below`."""
    return dataclasses.field(default=default, metadata=dict(
        stage=stage, help=help, least=least, below=below, choices=choices))


@dataclasses.dataclass
class Recipe:
    """The defaults are the paper's for CamVid. [ours]: the paper does not say; [18]: its ancestor's code.
    A result depends on the fields of its own stage and of the stages before it, and on nothing else. The
    fields of "amount" say how much is made: what is missing is added, what is there stays."""

    # Sect. 6: static pre-training
    dataset: str = field("pretrain", "camvid", "the videos", choices=data.DATASETS)
    seed: int = field("pretrain", 0, "every random choice comes from it", least=0)
    encoder_weights: str = field("pretrain", "imagenet", "[ours]: imagenet (downloaded), a file, or none")
    static: str = field("pretrain", "none", "[ours]: a static network's file to begin from")
    static_network: str = field("pretrain", "arch2", "Sect. 3.1: arch2; [ours]: the other", choices=STATICS)
    static_epochs: int = field("pretrain", 2000, "Sect. 6: epochs of pre-training; 0: only with --static", 0)
    static_batch: int = field("pretrain", 32, "Sect. 6: images a batch", 2)
    static_crop: tuple[int, int] = field("pretrain", (600, 600), "Sect. 6: random crop, height and width")
    static_scale: tuple[float, float] = field("pretrain", (0.5, 2.0), "Sect. 6: random scale, from and to")
    static_scale_least: float = field("pretrain", 0.0, "[18]: smaller scales are raised to this", 0)
    static_optimizer: str = field("pretrain", "sgd", "[18]: sgd-adam", choices=("sgd", "sgd-adam", "adamw"))
    static_lr_encoder: float = field("pretrain", 5e-2, "Sect. 6: learning rate of the encoder")
    static_lr_decoder: float = field("pretrain", 1e-2, "Sect. 6: learning rate of the decoder")
    static_weight_decay: float = field("pretrain", 1e-5, "[18]: weight decay of pre-training", 0)
    static_rate: str = field("pretrain", "poly", "Sect. 6: poly; [ours]: cosine", choices=("poly", "cosine"))
    static_average: float = field("pretrain", 0.0, "[18]: decay of the weights' mean that is kept", 0, 1)
    momentum: float = field("pretrain", 0.9, "Sect. 4.2; pre-training: [18]. Momentum of SGD", 0, below=1)
    weight_decay: float = field("search", 1e-5, "[18]: weight decay of every later training", 0)
    poly_power: float = field("pretrain", 0.9, "Sect. 6: rate * (1 - step / steps) ** P; P: [ours]", 0)
    auxiliary_weight: float = field("pretrain", 0.3, "Sect. 6: weight of the auxiliary losses", 0)
    auxiliary_cell: bool = field("pretrain", True, "[18]: a contextual cell before each auxiliary classifier")
    gradient_norm: float = field("pretrain", 3.0, "[18]: pre-training's gradients, clipped; 0: not", 0)
    loss_stride: int = field("pretrain", 4, "[ours]: losses at 1/N of the image", choices=(1, 2, 4, 8))
    class_weights: float = field("pretrain", 0.0, "[ours]: classes weigh 1 / log(N + share); 0: all 1", 0)

    # Sect. 4, 4.1: the search
    sequence_length: int = field("search", 3, "Sect. 4: consecutive frames in a training sequence", 2)
    input_longer_side: int = field("search", 0, "Sect. 4.1: images are resized; 0: no (CityScapes: 1024)", 0)
    input_crop: int = field("search", 600, "Sect. 4.1: sequences are cropped to this square")
    input_pad: int = field("search", 400, "Sect. 4.1: shorter side mean-padded: 480x360 -> 480x400; 0: no", 0)
    cell_layers: int = field("search", 5, "Sect. 4.1: layers of a cell, L")
    meta_val_share: float = field("search", 0.1, "Sect. 4.1: share of sequences that score", below=1)
    search_epochs: int = field("search", 20, "Sect. 4.1: epochs a candidate")
    search_batch: int = field("search", 48, "Sect. 4.1: sequences a batch", 2)
    cell_lr: float = field("search", 8e-3, "Sect. 4.1, 4.2: Adam's rate for the cell (CityScapes: [ours])")
    distillation: float = field("search", 0.0, "[18]: weight of a teacher; [ours]: the static network", 0)
    early_stop: bool = field("search", True, "Sect. 4.1: stop an un-promising candidate half way")
    early_stop_rule: str = field("search", "as-in-18", "Sect. 4.1 or [ours]", choices=("as-in-18", "average"))
    controller_lr: float = field("search", 1e-4, "Sect. 4.1: Adam's learning rate for the controller")
    controller_clip: float = field("search", 0.1, "[18]: PPO's clip", below=1)
    controller_baseline_decay: float = field("search", 0.95, "[18]: decay of the baseline", below=1)
    controller_rollout: int = field("search", 1, "[18]: candidates an update")
    controller_replay: int = field("search", 100, "[18]: samples an update goes through again; 0: no", 0)
    controller_epochs: int = field("search", 1, "[18]: PPO's passes over its samples an update")
    controller_entropy: float = field("search", 0.0, "[18]: weight of the entropy bonus", 0)

    # Sect. 4.2: the cell alone, on the frozen static network
    cell_epochs: int = field("alone", 10, "Sect. 4.2: epochs of the cell alone")
    cell_batch: int = field("alone", 16, "Sect. 4.2: sequences a batch, cell alone and end to end", 2)

    # Sect. 4.2: cell and static network, end to end
    end_epochs: int = field("end", 100, "Sect. 4.2: epochs end to end; 0: the static network stays", 0)
    end_lr_cell: float = field("end", 4e-3, "Sect. 4.2: Adam's learning rate for the cell")
    end_lr_static: float = field("end", 5e-4, "Sect. 4.2: SGD's learning rate for the static network")
    end_crop: tuple[int, int] = field("end", (400, 480), "Sect. 4.2: 600 of 480x360 padded to 480x400")
    end_mirrored: bool = field("end", True, "[18]: half of the sequences are mirror images")

    # how much is made
    validate_every: int = field("amount", 100, "[ours]: pre-training's epochs between validations; 0: no", 0)
    search_candidates: int = field("amount", 1000, "[ours]: number of sampled cells")
    search_strategy: str = field("amount", "ppo", "Sect. 4.1: ppo", choices=("ppo", "random", "both"))
    cells: int = field("amount", 2, "Sect. 4.2: best cells that are fine-tuned; 0: no search, only --cell", 0)
    cell: tuple[str, ...] = field("amount", (), "[ours]: cells to train by name")
    median_cell: bool = field("amount", False, "[ours]: random search's cell of median reward, too")
    without_past: bool = field("amount", True, "[ours]: the best cell also with zeros for the previous frame")
    seeds: int = field("amount", 1, "[ours]: trainings of the baseline and of every cell")
    key_frames: tuple[int, ...] = field("amount", (0, 10, 3), "[ours]: key-frame intervals; 0: first only", 0)

# What differs from Recipe's defaults. Those made for a CPU or for synthetic videos: experiment/schedules.py.
SCHEDULES = {**schedules.SCHEDULES, ("camvid", "paper"): {}, ("cityscapes", "paper"): dict(
    static_epochs=1000, static_batch=28, static_crop=(800, 800), validate_every=50,
    sequence_length=2, input_longer_side=1024, input_crop=512, input_pad=0, cell_layers=4,
    search_epochs=10, cell_epochs=200, end_epochs=200, end_crop=(769, 769), key_frames=(0,))}


def recipe_for(dataset, schedule, **changes):
    """The recipe of a schedule for a dataset, with changes. One's own dataset gets CamVid's."""
    differs = SCHEDULES.get((dataset, schedule), SCHEDULES["camvid", schedule])
    return Recipe(**{"dataset": dataset, **differs, **changes})


# ---- what every training does -----------------------------------------------------------------------------

def cross_entropy(logits, labels, stride, weight=None):
    """Mean over the labelled pixels; zero where there is none. logits (N, C, h, w), labels (N, H, W) uint8,
    weight (C,). [ours] Both are brought to 1/stride of the image, the logits bilinearly; or to the logits'
    size, if that is larger."""
    size = [max(h, math.ceil(side / stride)) for h, side in zip(logits.shape[-2:], labels.shape[-2:])]
    logits = resize(logits.float(), size)                         # (N, C, H/stride, W/stride)
    labels = data.downsample_labels(labels, size)
    total = F.cross_entropy(logits, labels.long(), weight, ignore_index=data.IGNORE, reduction="sum")
    return total / (labels != data.IGNORE).sum().clamp(min=1)


def update(loss, optimizers, rate, world=1, norm=0.0):
    """One step of every optimiser, its learning rates times `rate` (Sect. 6: poly, [ours] also later). world:
    number of processes that share the batch; norm: the highest norm of a group's gradients; 0: any."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])           # the first call keeps it: rate is a factor
            group["lr"] = group["initial_lr"] * rate
        optimizer.zero_grad()
    loss.backward()
    if world > 1:
        average_gradients(optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups if norm else ():
            torch.nn.utils.clip_grad_norm_(group["params"], norm)
        optimizer.step()


# ---- Sect. 6: the static network --------------------------------------------------------------------------

def static_optimizers(model, r):
    """Sect. 6 gives the encoder and the decoder a rate each, and names no optimiser. sgd: for both. sgd-adam:
    [18]'s code. adamw [ours]: reaches in 40 epochs what sgd needs hundreds for (docs/results.md)."""
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    rates = (model.encoder.parameters(), r.static_lr_encoder), (decoder, r.static_lr_decoder)
    groups = [{"params": p, "lr": rate, "weight_decay": r.static_weight_decay} for p, rate in rates]
    if r.static_optimizer == "adamw":
        return [AdamW(groups)]
    if r.static_optimizer == "sgd-adam":
        return [SGD(groups[:1], momentum=r.momentum), Adam(groups[1:])]
    return [SGD(groups, momentum=r.momentum)]


def pretrain(run):
    """Sect. 6: the static network on single labelled images, scaled, cropped or zero-padded, and mirrored at
    random (data.augment). The loss is CE(pred) + 0.3 * the sum over blocks of CE(auxiliary)."""
    r, frames = run.recipe, run.frames("train")
    weight = frames.class_weights(r.class_weights)                # (C,), or None: all 1
    labelled = torch.tensor([k for k, frame in enumerate(frames.list) if frame.label is not None])
    torch.manual_seed(generator(r.seed, "static").initial_seed())
    model = STATICS[r.static_network](run.num_classes, "cell" if r.auxiliary_cell else "classifier")
    if not run.path("static.pt").exists():                        # else it holds the encoder
        print(weights.begin(model, r, data.DATASETS[r.dataset].classes))
    model = run.to_device(model)
    # What is kept is mean = d * mean + (1 - d) * weights; where d is 0, the weights.
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(r.static_average), use_buffers=True)
    parts, optimizers = {"static": model, "average": mean}, static_optimizers(model, r)
    for epoch in run.epochs("static", r.static_epochs, parts, optimizers):
        model.train()
        for batch, done in epoch.batches(len(labelled), r.static_batch):
            images, labels = frames[labelled[batch][:, None]]     # (B, 1, H, W, 3), (B, 1, H, W): T = 1
            images, labels = data.augment(images, labels, r.static_crop, r.static_scale,
                                          generator=epoch.rng, least=r.static_scale_least)
            images = images[:, 0].contiguous(memory_format=torch.channels_last)           # (B, 3, h, w)
            labels = labels[:, 0]                                 # (B, h, w)
            with run.autocast():
                pred, auxiliary = model.forward_auxiliary(images)     # arch2: (B, C, h/8, w/8), three such
            others = sum(cross_entropy(other, labels, r.loss_stride, weight) for other in auxiliary)
            loss = cross_entropy(pred, labels, r.loss_stride, weight) + r.auxiliary_weight * others
            rate = (1 - done) ** r.poly_power
            if r.static_rate == "cosine":                         # [ours], times 50 steps of linear warm-up
                rate = min(1, (epoch.step + 1) / 50) * (1 + math.cos(math.pi * done)) / 2
            update(loss, optimizers, rate, run.world, r.gradient_norm)
            mean.update_parameters(model)
            epoch.log(loss)
        if epoch.last:
            model.load_state_dict(mean.module.state_dict())
        if epoch.due(r.validate_every):
            video = VideoSegmenter(mean.module, None, pad=r.input_pad)
            epoch.note("val_miou", evaluate_video(run, "static", video, "val")["miou"])


# ---- Sect. 4.1: "we pre-compute all required outputs from the pre-trained static network" -----------------

@torch.no_grad()
def static_outputs(run, static, windows, transformed=True):
    """The frozen static network's outputs for the frames of `windows`, (N, T) frame numbers, and the frames'
    labels, in a FeatureCache: so a cell's training never runs the encoder. transformed=False: the frames as
    they are, for meta-val ("No transformations are applied to the validation sequences")."""
    r, frames, numbers, maps = run.recipe, run.frames("train"), windows.unique(), {}      # (n,)
    progress = Progress("static outputs", len(numbers))
    for first in range(0, len(numbers), 8):                       # 8 at once, for the memory
        images, labels = frames[numbers[first:first + 8]]         # (B, H, W, 3), (B, H, W)
        images, last = data.normalise(images), first + len(images)        # (B, 3, H, W)
        if transformed:                                           # CityScapes is resized, CamVid is padded
            images, labels = data.resize_longer_side(images, labels, r.input_longer_side)
            images, labels = data.pad(images, labels, r.input_pad)
        with run.autocast():
            layers = static.encode(images.contiguous(memory_format=torch.channels_last))
            dec, _ = static.decode(layers)
        for name, x in zip(FeatureCache.STRIDE, (*layers, dec, labels)):
            if name != "layer1" or static.classifier.needs_layer1:
                if not first:                                     # torch.cat would hold each map twice
                    maps[name] = (x if name == "labels" else x.half()).new_empty(len(numbers), *x.shape[1:])
                maps[name][first:last] = x
        progress.update(last)
    return FeatureCache(numbers, maps, crop=r.input_crop if transformed else None)


class FeatureCache:
    """The maps of some frames. numbers (n,): the frames, ascending; maps: features (n, C, h, w) in half
    precision and labels (n, H, W) uint8; crop: side of the square to which a sequence is cropped at random,
    [ours] in steps of 32 pixels (layer4's stride) and out of whole frames' maps: they saw what is around."""

    STRIDE = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32, "dec": 8, "labels": 1}

    def __init__(self, numbers, maps, crop=None):
        self.numbers, self.maps, self.crop = numbers, maps, crop

    def pick(self, window, rng=None):
        """window (B, T) -> yields T frames, each {name: map (B, C, h, w), "labels": (B, H, W)}. Larger frames
        are cropped, each sequence at a place of its own."""
        labels, corner = self.maps["labels"], {}                  # axis -> (B,) offsets in units of 32 pixels
        for axis, side in zip((-2, -1), labels.shape[-2:]):
            if self.crop and side > self.crop:
                places = (side - self.crop) // 32 + 1
                corner[axis] = torch.randint(places, (len(window),), generator=rng).tolist()
        for at in torch.searchsorted(self.numbers, window).T.to(labels.device):           # (B,)
            frame = {}
            for name, x in self.maps.items():
                x = x[at] if name == "labels" else x[at].float()          # autocast can't stack half floats
                for axis, offsets in corner.items():
                    unit, size = 32 // self.STRIDE[name], math.ceil(self.crop / self.STRIDE[name])
                    x = torch.stack([one.narrow(axis, unit * k, size) for one, k in zip(x, offsets)])
                frame[name] = x if name == "labels" else x.contiguous(memory_format=torch.channels_last)
            yield frame


def unroll(run, cell, frames):
    """The recurrence of Sect. 3.1; dec_0 is the static network's (Sect. 4). Then, frame by frame,
    dec_t, pred_t = cell(layer4_{t-1}, dec_{t-1}, layer2_t, layer3_t, layer4_t).
    frames: FeatureCache.pick's -> [(pred (B, C, h, w), labels (B, H, W))] of every frame after the first."""
    before, results = next(frames), []
    dec = before["dec"]                                           # (B, 64, H/8, W/8)
    with run.autocast():
        for frame in frames:
            dec, pred = cell(before["layer4"], dec, frame["layer2"], frame["layer3"], frame["layer4"],
                             frame.get("layer1"))                 # None unless the classifier takes it
            results.append((pred, frame["labels"]))
            before = frame
    return results


def cell_loss(run, cell, frames, static=None):
    """Sect. 4: "we sum up cross-entropy loss terms at each frame after the first one". [18]'s code adds a
    teacher, on stored outputs; [ours] it is the static network: 2**2 * CE(pred / 2, softmax(teacher / 2))."""
    r, frames, loss = run.recipe, list(frames), 0
    weight = run.frames("train").class_weights(r.class_weights)
    for (pred, labels), frame in zip(unroll(run, cell, iter(frames)), frames[1:]):
        loss = loss + cross_entropy(pred, labels, r.loss_stride, weight)
        if r.distillation:
            with torch.no_grad(), run.autocast():
                teacher = static.classifier(frame["dec"], frame.get("layer1")).float()    # (B, C, h, w)
            loss = loss + r.distillation * 4 * F.cross_entropy(pred.float() / 2, (teacher / 2).softmax(1))
    return loss


# ---- Sect. 3.3, 4.1: the search ---------------------------------------------------------------------------

@torch.no_grad()
def score(run, cell, stored, windows):
    """Sect. 3.3: the reward, the geometric mean (mIoU * frequency-weighted IoU * mean accuracy) ** (1/3), and
    the three, of all frames of windows (N, T) after the first, at the labels' resolution (data.Confusion)."""
    cell.eval()
    confusion, (H, W) = data.Confusion(run.num_classes), stored.maps["labels"].shape[-2:]
    at_once = max(1, min(run.recipe.search_batch, 2 ** 23 // (H * W)))    # CityScapes: 4, for the memory
    for window in windows.split(at_once):
        for pred, labels in unroll(run, cell, stored.pick(window)):
            confusion.update(resize(pred.float(), labels.shape[-2:]).argmax(1), labels)       # (B, H, W)
    cell.train()
    _, miou, fwiou, macc, reward = confusion.scores()
    return {"reward": reward, "miou": miou, "fwiou": fwiou, "macc": macc}


def train_candidate(run, static, meta_train, meta_val, k, genotype, early_stop, entry):
    """Candidate k: Adam on meta-train, scored on meta-val, into its entry of the log. Both are stored outputs
    and windows (N, T). Sect. 4.1: if it is stopped half way, its half-way score is its reward."""
    r, (stored, windows) = run.recipe, meta_train
    torch.manual_seed(generator(r.seed, "cell", k).initial_seed())
    cell = run.to_device(make_cell(genotype, static))
    entry["parameters"] = parameters(cell)
    optimizer = Adam(cell.parameters(), r.cell_lr, weight_decay=r.weight_decay, fused=True)
    rng, steps, losses = generator(r.seed, "crop", k), [], []
    for epoch in range(r.search_epochs):
        steps += batches(len(windows), r.search_batch, generator(r.seed, "candidate", k, epoch))
    for step, batch in enumerate(steps):
        if r.early_stop and 0 < step == len(steps) // 2:          # half way, not before a step
            check_finite(losses, "half way")
            scores = score(run, cell, *meta_val)
            entry["half_reward"] = scores["reward"]
            draw = torch.rand(1, generator=generator(r.seed, "stop", k)).item()
            if not early_stop.promising(scores["reward"], draw):
                entry.update(scores, stopped=True)
                return
        loss = cell_loss(run, cell, stored.pick(windows[batch], rng), static)
        update(loss, [optimizer], (1 - step / len(steps)) ** r.poly_power)
        losses.append(loss.detach())
    check_finite(losses, "at the end")
    entry.update(score(run, cell, *meta_val))


def search(run):
    """Sect. 3.3, 4.1; and [ours] random search as a control. Meta-val is scored on the frames as they are."""
    r = run.recipe
    windows = run.frames("train").windows(r.sequence_length)      # (N, T) frame numbers
    train, val = data.meta_split(windows, r.meta_val_share, generator(r.seed, "meta"))
    print(f"search: {len(train)} sequences to train on, {len(val)} to score on")
    static = run.load("static").static
    meta_train = static_outputs(run, static, train), train
    meta_val = static_outputs(run, static, val, transformed=False), val
    for strategy in networks.strategies(r):
        explore(run, strategy, Log(run, networks.SEARCHES[strategy][0]), static, meta_train, meta_val)


def explore(run, strategy, log, static, meta_train, meta_val):
    """The controller samples cells, each is trained and scored, the scores train the controller; and again.
    The log decides: a search that was killed makes the same draws and, with the logged rewards, the same
    updates again, and trains what the log lacks. torchrun's processes share the candidates of a round."""
    r, n = run.recipe, run.recipe.controller_rollout
    torch.manual_seed(generator(r.seed, "controller").initial_seed())
    controller = Controller(r.cell_layers)
    ppo = PPO(controller, r.controller_lr, r.controller_clip, r.controller_baseline_decay,
              r.controller_epochs, r.controller_entropy, replay=r.controller_replay, seed=r.seed)
    early_stop = EarlyStop(r.early_stop_rule, decay=0.9)          # decay: [ours], of "average"
    progress = Progress(f"search ({strategy})", r.search_candidates, done=len(log))
    for first in range(0, r.search_candidates, n):
        rng = generator(r.seed, "sample" if strategy == "ppo" else strategy, first)
        tokens = controller.sample(n, rng)[0] if strategy == "ppo" else controller.random(n, rng)    # (n, 5L)
        numbers = range(first, min(first + n, r.search_candidates))
        tokens = log.tokens(numbers, tokens)                      # the log's, where it has them
        for k, row in zip(numbers, tokens):
            if log.claim(k):                                      # not logged, nor claimed by another process
                genotype = Genotype.from_tokens(row)
                with log.candidate(k, genotype) as entry:
                    train_candidate(run, static, meta_train, meta_val, k, genotype, early_stop, entry)
                progress.update(len(log), reward=log[k]["reward"], best=max(log[j]["reward"] for j in log))
        log.sync()                                                # now every process has all of this round
        for k in numbers:                                         # [ours]: the early stop moves once a round
            if log[k]["half_reward"] is not None:
                early_stop.move(log[k]["half_reward"])
        if strategy == "ppo" and len(numbers) == n:                # else it waits for more
            log_prob = controller.log_prob(tokens)[0].detach()    # (n,) of the controller that sampled them
            reward = torch.tensor([log[k]["reward"] for k in numbers])
            failed = torch.tensor([log[k]["status"] != "ok" for k in numbers])
            ppo.update(tokens, log_prob, reward, failed)          # controller.PPO has the objective
    if strategy == "ppo":
        run.save("controller", {}, controller=controller.state_dict(), candidates=r.search_candidates)


# ---- Sect. 4.2: the best cells on the full training split -------------------------------------------------

def finetune(run):
    """Sect. 4.2: the best cells and the controls (experiment/networks.py), first alone, then end to end."""
    missing = [network for network in networks.networks(run) if not run.finished(network.name)]
    cells = [some for some in missing if some.genotype and not run.finished(f"{some.name}-alone")]
    if cells:
        finetune_cells(run, cells)
    for network in missing:                                       # no stored output is in memory any more
        finetune_end_to_end(run, network)


def finetune_cells(run, chosen):
    """Sect. 4.2: first the cell alone, by Adam, on the frozen static network's stored outputs: [ours] so
    the only augmentation is pick's random crop, and on CityScapes the images are the search's."""
    r, static = run.recipe, run.load("static").static
    windows = run.frames("train").windows(r.sequence_length)      # (N, T)
    stored = static_outputs(run, static, windows)
    for network in chosen:
        print(f"{network.name}: {network.genotype}")
        torch.manual_seed(generator(r.seed, network.name).initial_seed())
        cell = run.to_device(make_cell(network.genotype, static, network.past))
        optimizer = Adam(cell.parameters(), r.cell_lr, weight_decay=r.weight_decay, fused=True)
        for epoch in run.epochs(f"{network.name}-alone", r.cell_epochs, {"cell": cell}, [optimizer]):
            cell.train()
            for batch, done in epoch.batches(len(windows), r.cell_batch):
                loss = cell_loss(run, cell, stored.pick(windows[batch], epoch.rng), static)
                update(loss, [optimizer], (1 - done) ** r.poly_power, run.world)
                epoch.log(loss)


def finetune_end_to_end(run, network):
    """Sect. 4.2: then both, the cell by Adam at half its rate, the static network by SGD. [ours] Its batch
    norms keep their statistics, and the sum of CE is over all frames, t >= 0: without the key frame's term
    nothing would hold the static classifier to a decoder that changes. CityScapes' key frames have no
    label; there the static network's own prediction of the last frame counts instead."""
    r, frames = run.recipe, run.frames("train")
    windows, weight = frames.windows(r.sequence_length), frames.class_weights(r.class_weights)
    video = VideoSegmenter(run.load("static").static, run.load_cell(network))
    optimizers = [SGD(video.static.parameters(), r.end_lr_static, r.momentum, weight_decay=r.weight_decay)]
    if video.cell is not None:
        optimizers += [Adam(video.cell.parameters(), r.end_lr_cell, weight_decay=r.weight_decay, fused=True)]
    for epoch in run.epochs(network.name, r.end_epochs, dict(video.named_children()), optimizers):
        video.train()
        video.static.eval()
        for batch, done in epoch.batches(len(windows), r.cell_batch):
            images, labels = frames[windows[batch]]               # (B, T, H, W, 3), (B, T, H, W)
            images, labels = data.augment(images, labels, r.end_crop, (1, 1), r.end_mirrored, epoch.rng)
            with run.autocast():
                logits = list(video(images).unbind(dim=1))        # (B, T, 3, h, w) -> T of (B, C, h/8, w/8)
                if video.cell is not None and (labels[:, 0] == data.IGNORE).all():
                    logits[0], labels[:, 0] = video.static(images[:, -1]), labels[:, -1]
            loss = sum(cross_entropy(pred, label, r.loss_stride, weight)
                       for pred, label in zip(logits, labels.unbind(dim=1)))
            update(loss, optimizers, (1 - done) ** r.poly_power, run.world)
            epoch.log(loss)


# ---- evaluation: every frame of every clip, in time order -------------------------------------------------

def segment_clips(run, name, video, split, key_frame_every=0):
    """Yields (frame number, label map (H, W), label (H, W)) of every frame of a split, in float32. The static
    network on key frames: the first of a clip and, [ours], the first after a long gap, and every
    key_frame_every-th (0: no other). The cell on the rest; without one unlabelled frames are left out."""
    video, frames = fold_batchnorm(video).to(memory_format=torch.channels_last), run.frames(split)
    progress = Progress(f"{name} on {split}", len(frames.list))
    for clip in frames.clips():                                   # which end at a long gap
        for since, k in enumerate(clip):
            if since == 0 or (key_frame_every and since % key_frame_every == 0):
                state = None
            if video.cell is None and frames.list[k].label is None:
                continue                                          # no label, and no state to hand on
            image, label = frames[k]                              # (H, W, 3), (H, W)
            with tf32(False):
                pred, state = video.segment(image, state)
            yield k, pred, label
            progress.update(k + 1)


def evaluate_video(run, name, video, split, key_frame_every=0):
    """Scores of a network on a split: miou, fwiou, macc, consistency over three frames, iou by class."""
    confusion, consistency, recent = data.Confusion(run.num_classes), data.Consistency(3), []
    windows = run.frames(split).windows(3).tolist()
    for k, pred, label in segment_clips(run, name, video, split, key_frame_every):
        confusion.update(pred, label)
        recent = [*recent, (k, pred, label)][-3:]
        numbers, preds, labels = zip(*recent)
        if list(numbers) in windows:
            consistency.update(preds, labels)
    iou, miou, fwiou, macc, _ = confusion.scores()
    iou = dict(zip(run.frames(split).dataset.classes, iou))
    return {"miou": miou, "fwiou": fwiou, "macc": macc, "consistency": consistency.score(), "iou": iou}


def evaluate(run):
    """Sect. 4.2, 4.3, Tables 3 to 5: every network on val and the reported split (CityScapes: val only)."""
    rows = table.Table(run)
    for network, intervals in rows.missing():                     # what no evaluation has scored before
        for row in table.rows_of(run, network, run.load(network.name), intervals, evaluate_video):
            rows.add(row)
    rows.finish(segment_clips)


# ---- the command ------------------------------------------------------------------------------------------

STAGES = {"pretrain": pretrain, "search": search, "finetune": finetune, "evaluate": evaluate}


def main(arguments=None):
    command = options.parse(arguments, Recipe, recipe_for, STAGES, __doc__)
    if command.show_recipe:
        return options.show_recipe(command)
    if command.stage == "predict":
        return predict.predict(command)
    with options.open_run(command, recipe_for) as run:
        if command.network:                                       # --stage evaluate --network
            return table.evaluate_network(run, command, evaluate_video)
        for name in command.stages:
            with table.stage(run, name, command.stages) as missing:
                if missing:
                    STAGES[name](run)


if __name__ == "__main__":
    data.run_main(main)
