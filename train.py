"""The whole method: pretrain -> search -> finetune -> evaluate, each loop where the paper describes it.

    python train.py                                                  synthetic videos, minutes on a CPU
    python train.py --dataset camvid --data DIR                      the paper's recipe (a GPU's work)
    python train.py --dataset camvid --data DIR --schedule short     the same steps, about two hours on a CPU
    python train.py --dataset camvid --data DIR --stage evaluate     one stage
    python train.py --help                                           every hyper-parameter and its section

Read it from top to bottom beside the paper: the recipe, what every training does, Sect. 6, 4.1, 3.3, 4.2, and
the evaluation. The same command again continues where it stopped, to the same result. experiment/runs.py does that;
a reader needs only these words of it:

    run.epochs(...)                    the epochs of a training that are still to do; it restores and saves
    epoch.batches(n, size)             shuffled batches of 0..n-1, and the share of the training behind us
    epoch.log(loss)                    for the history; a loss that is not finite stops the run
    log.misses(k), log.candidate(k)    whether candidate k is to be trained; its line in the search's log, in
                                       which a loss that is not finite or too little memory is reward 0
    run.load(name)                     a trained network of the run's folder
"""
import dataclasses
import math

import torch
import torch.nn.functional as F

import data
from controller import PPO, Controller, EarlyStop
from data import Confusion, Consistency
from dyncell import Arch2, Genotype, VideoSegmenter, fold_batchnorm
from ops import resize
from experiment import networks, options, predict, schedules, table, weights
from experiment.networks import make_cell
from experiment.runs import average_gradients, batches, check_finite, float32, generator
from experiment.stored import Stored
from util.costs import parameters
from util.progress import Progress


# ---- the recipe: every hyper-parameter --------------------------------------------------------------------

def field(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


# The defaults are the paper's for CamVid; [ours] marks what it does not say. Each field is a flag. What a
# stage makes depends on the fields of its class, its own and those of the stages before, and on nothing else.

@dataclasses.dataclass
class ForPretrain:
    """Sect. 6: static pre-training."""
    dataset: str = field("camvid", "camvid, cityscapes or synthetic")
    seed: int = field(0, "every random choice comes from it")
    encoder_weights: str = field("imagenet", "[ours]: imagenet (downloaded once), a file, or none")
    static: str = field("none", "[ours]: a static network's file to begin from, classifiers anew where the "
                        "classes differ; with --static-epochs 0 it is taken as it is")
    static_epochs: int = field(2000, "Sect. 6: epochs of pre-training")
    static_batch: int = field(32, "Sect. 6: images a batch")
    static_crop: tuple[int, int] = field((600, 600), "Sect. 6: random crop, height and width")
    static_scale: tuple[float, float] = field((0.5, 2.0), "Sect. 6: random scale, from and to")
    static_lr_encoder: float = field(5e-2, "Sect. 6: learning rate of the encoder; SGD: [18]")
    static_lr_decoder: float = field(1e-2, "Sect. 6: learning rate of the decoder")
    momentum: float = field(0.9, "Sect. 4.2; pre-training: [18]. Momentum of SGD")
    weight_decay: float = field(1e-5, "[18]: weight decay, in SGD and in Adam")
    poly_power: float = field(0.9, "Sect. 6: rate * (1 - step / steps) ** power; the power: [ours]")
    auxiliary_weight: float = field(0.3, "Sect. 6: weight of the auxiliary classifiers' losses")
    auxiliary_cell: bool = field(True, "[18]: a contextual cell before each auxiliary classifier")
    gradient_norm: float = field(3.0, "[18]: pre-training's gradients, clipped to this norm; 0: not")
    loss_stride: int = field(4, "[ours]: every loss is taken at 1/4 of the image; 8: at the output's size")


@dataclasses.dataclass
class ForSearch(ForPretrain):
    """Sect. 3.2, 3.3, 4.1: the search."""
    sequence_length: int = field(3, "Sect. 4.1: consecutive frames in a training sequence")
    input_longer_side: int = field(0, "Sect. 4.1: images are resized so; 0 leaves them (CityScapes: 1024)")
    input_crop: int = field(600, "Sect. 4.1: and cropped to this square, each sequence at a random place")
    input_pad: int = field(400, "Sect. 4.1: shorter side mean-padded to this: 480x360 -> 480x400; 0: no")
    cell_layers: int = field(5, "Sect. 3.2: layers of a cell, L")
    meta_val_share: float = field(0.1, "Sect. 4.1: share of the sequences that score the candidates")
    search_epochs: int = field(20, "Sect. 4.1: epochs a candidate")
    search_batch: int = field(48, "Sect. 4.1: sequences a batch")
    cell_lr: float = field(8e-3, "Sect. 4.1, 4.2: Adam's rate, static network frozen (CityScapes: [ours])")
    early_stop: bool = field(True, "Sect. 3.3: stop an un-promising candidate half way")
    early_stop_rule: str = field("as-in-18", "Sect. 3.3: as done in [18]; [ours]: average, if below it")
    early_stop_decay: float = field(0.9, "[ours]: decay of that average")
    latency_weight: float = field(0.0, "[ours], Sect. 1's outlook: W of reward * (time / target) ** -W")
    latency_target: float = field(0.0, "[ours]: that target, ms a frame of the cell; 0: the decoder's time")
    controller_lr: float = field(1e-4, "Sect. 4.1: Adam's learning rate for the controller")
    controller_clip: float = field(0.1, "[18]: PPO's clip")
    controller_baseline_decay: float = field(0.95, "[18]: decay of the reward's running mean")
    controller_rollout: int = field(1, "[18]: candidates an update")
    controller_replay: int = field(100, "[18]: samples that each update goes through again; 0: its own only")
    controller_epochs: int = field(1, "[18]: passes over them an update")
    controller_entropy: float = field(0.0, "[18]: weight of the entropy bonus")


@dataclasses.dataclass
class ForCell(ForSearch):
    """Sect. 4.2: the cell alone, on the frozen static network."""
    cell_epochs: int = field(10, "Sect. 4.2: epochs of the cell alone")
    cell_batch: int = field(16, "Sect. 4.2: sequences a batch, cell alone and end to end")
    cell_mirrored: bool = field(False, "[ours]: the cell alone also sees mirror images (twice the memory)")
    cell_dropout: float = field(0.0, "[ours]: share of the stored channels zeroed in each of its steps")


@dataclasses.dataclass
class ForEndToEnd(ForCell):
    """Sect. 4.2: cell and static network."""
    end_epochs: int = field(100, "Sect. 4.2: epochs end to end; 0: the static network stays as it is")
    end_lr_cell: float = field(4e-3, "Sect. 4.2: Adam's learning rate for the cell")
    end_lr_static: float = field(5e-4, "Sect. 4.2: SGD's learning rate for the static network")
    end_crop: tuple[int, int] = field((400, 480), "Sect. 4.2: crop, height, width; smaller images are padded")
    end_scale: tuple[float, float] = field((1.0, 1.0), "[ours]: random scale")
    end_mirrored: bool = field(True, "[18]: half of the sequences are mirror images")


@dataclasses.dataclass
class Recipe(ForEndToEnd):
    """And how much is made: may change at any time. What is missing is added, what is there stays."""
    validate_every: int = field(100, "[ours]: epochs between looks at val while pre-training; 0: never")
    search_candidates: int = field(1000, "[ours]: number of sampled cells")
    search_strategy: str = field("ppo", "Sect. 3.3: ppo; [ours]: random, every token uniform; both")
    cells: int = field(2, "Sect. 4.2: number of best cells trained on; 0: no search, only --cell")
    cell: tuple[str, ...] = field((), "[ours]: cells to train by name")
    median_cell: bool = field(False, "[ours]: random search's cell of median reward, too")
    without_past: bool = field(True, "[ours]: the best cell also with zeros in place of the previous frame")
    seeds: int = field(1, "[ours]: trainings of the baseline and of every cell")
    key_frames: tuple[int, ...] = field((0, 10, 3), "[ours]: key-frame distances; 0: first of a clip only")


# What differs from these defaults. The schedules short and smoke, made for a CPU, are in experiment/schedules.py.
SCHEDULES = {
    ("camvid", "paper"): {},
    ("cityscapes", "paper"): dict(
        static_epochs=1000, static_batch=28, static_crop=(800, 800), validate_every=50,
        sequence_length=2, input_longer_side=1024, input_crop=512, input_pad=0,
        cell_layers=4, search_epochs=10,
        cell_epochs=200, end_epochs=200, end_crop=(769, 769), key_frames=(0,)),
    **schedules.SCHEDULES,
}


def recipe_for(dataset, schedule, **changes):
    """The recipe of a schedule for a dataset, with changes. One's own dataset gets CamVid's."""
    differs = SCHEDULES.get((dataset, schedule), SCHEDULES["camvid", schedule])
    return Recipe(**{"dataset": dataset, **differs, **changes})


# ---- what every training does -----------------------------------------------------------------------------

def cross_entropy(logits, labels, stride):
    """Mean over the labelled pixels; zero where there is none. logits (N, C, h, w), labels (N, H, W) uint8.
    [ours] Both are brought to 1/stride of the image, the logits bilinearly."""
    size = [math.ceil(side / stride) for side in labels.shape[-2:]]
    logits = resize(logits.float(), size)                         # (N, C, H/stride, W/stride)
    labels = data.shrink(labels, size)
    total = F.cross_entropy(logits, labels.long(), ignore_index=data.IGNORE, reduction="sum")
    return total / (labels != data.IGNORE).sum().clamp(min=1)


def update(loss, optimizers, done, power, world=1, norm=0.0):
    """One step of every optimiser.

    done: share of the training that is behind us, for the poly rate (Sect. 6): lr * (1 - done) ** power
    world: number of processes that share the batch; norm: the gradients' highest one, a group each; 0: any"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done) ** power
        optimizer.zero_grad()
    loss.backward()
    if world > 1:
        average_gradients(optimizers)
    for optimizer in optimizers:
        if norm:
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], norm)
        optimizer.step()


def adam(cell, lr, weight_decay):
    """The optimiser of a cell (Sect. 4.1, 4.2). fused: all of its parameters in one call."""
    return torch.optim.Adam(cell.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


# ---- Sect. 6: the static network --------------------------------------------------------------------------

def pretrain(run):
    """arch2 on single labelled images: SGD, poly rate, random scale and crop, auxiliary losses."""
    r, frames = run.recipe, run.frames("train")
    labelled = torch.tensor([k for k, frame in enumerate(frames.list) if frame.label is not None])
    torch.manual_seed(generator(r.seed, "static").initial_seed())
    model = Arch2(run.num_classes, auxiliary="cell" if r.auxiliary_cell else "classifier")
    if not run.path("static.pt").exists():                        # else it holds the encoder
        weights.begin(model, r, data.DATASETS[r.dataset].classes)
    model = run.to_device(model)
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.SGD([{"params": model.encoder.parameters(), "lr": r.static_lr_encoder},
                                 {"params": decoder, "lr": r.static_lr_decoder}],
                                momentum=r.momentum, weight_decay=r.weight_decay)

    for epoch in run.epochs("static", r.static_epochs, {"static": model}, [optimizer]):
        model.train()
        for batch, done in epoch.batches(len(labelled), r.static_batch):
            images, labels = frames[labelled[batch][:, None]]     # (B, 1, H, W, 3), (B, 1, H, W): T = 1
            images, labels = data.augment(images, labels, r.static_crop, r.static_scale, generator=epoch.rng)
            images = images[:, 0].contiguous(memory_format=torch.channels_last)           # (B, 3, h, w)
            labels = labels[:, 0]                                 # (B, h, w)
            with run.autocast():
                pred, auxiliary = model.forward_auxiliary(images)         # (B, C, h/8, w/8), three such
            others = sum(cross_entropy(other, labels, r.loss_stride) for other in auxiliary)
            loss = cross_entropy(pred, labels, r.loss_stride) + r.auxiliary_weight * others
            update(loss, [optimizer], done, r.poly_power, run.world, r.gradient_norm)
            epoch.log(loss)
        if epoch.due(r.validate_every):
            video = VideoSegmenter(model, None, pad=r.input_pad)
            epoch.note(val_miou=evaluate_video(run, video, "val")["miou"])


# ---- Sect. 4.1: "we pre-compute all required outputs from the pre-trained static network" -----------------

@torch.no_grad()
def static_outputs(run, static, windows, transformed=True, mirrored=False):
    """What the frozen static network says of the frames of `windows`, in half precision, and their labels:
    so a cell's training never runs the encoder.

    transformed=False: the frames as they are, for meta-val ("No transformations are applied to the validation
    sequences"). mirrored [ours]: their mirror images, too."""
    r, frames = run.recipe, run.frames("train")
    stored = Stored(windows, len(frames.list), mirrored, crop=r.input_crop if transformed else None)
    for numbers in stored.parts():
        images, labels = frames[numbers % stored.count]           # (N, H, W, 3), (N, H, W)
        images = data.normalise(images)                           # (N, 3, H, W)
        if transformed:                                           # CityScapes is resized, CamVid is padded
            images, labels = data.resize_longer_side(images, labels, r.input_longer_side)
            images, labels = data.pad(images, labels, r.input_pad)
        images, labels = stored.mirror(images, labels, numbers)
        with run.autocast():
            _, layer2, layer3, layer4 = features = static.encode(images)
            dec, _ = static.decode(features)
        stored.put(numbers, layer2=layer2, layer3=layer3, layer4=layer4, dec=dec, labels=labels)
    return stored


def roll(cell, sequences):
    """The static network's layer4 and dec of the first frame, then the cell on each later one.
    -> T - 1 logits (B, C, H/8, W/8)"""
    layer4, dec = sequences("layer4", 0), sequences("dec", 0)
    logits = []
    for t in range(1, sequences.length):
        layer4_prev, layer4 = layer4, sequences("layer4", t)
        dec, pred = cell(layer4_prev, dec, sequences("layer2", t), sequences("layer3", t), layer4)
        logits.append(pred)
    return logits


def cell_loss(run, cell, sequences):
    """Sect. 4.1: "we sum up cross-entropy loss terms at each frame after the first one"."""
    with run.autocast():
        logits = roll(cell, sequences)
    loss = 0
    for t, pred in enumerate(logits, start=1):
        loss = loss + cross_entropy(pred, sequences("labels", t), run.recipe.loss_stride)
    return loss


def new_cell(run, static, genotype, rng, past=True):
    """[ours] Its classifier starts as a copy of the static network's."""
    torch.manual_seed(rng.initial_seed())
    cell = make_cell(genotype, static, past)
    cell.classifier.load_state_dict(static.classifier.state_dict())
    return run.to_device(cell)


# ---- Sect. 3.3, 4.1: the search ---------------------------------------------------------------------------

@torch.no_grad()
def score(run, cell, stored, windows, worth=1.0):
    """Sect. 3.3: the reward is the geometric mean of mIoU, frequency-weighted IoU and mean class accuracy,
    of every frame after the first, at the labels' resolution. worth: a factor of it, 1 but for
    --latency-weight."""
    cell.eval()
    confusion = Confusion(run.num_classes)
    for window in windows.split(run.recipe.search_batch):
        sequences = stored.pick(window)
        with run.autocast():
            logits = roll(cell, sequences)
        for t, pred in enumerate(logits, start=1):
            labels = sequences("labels", t)                       # (B, H, W)
            pred = F.interpolate(pred.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
            confusion.update(pred.argmax(1), labels)
    cell.train()
    _, miou, fwiou, macc, reward = confusion.scores()
    return {"reward": reward * worth, "miou": miou, "fwiou": fwiou, "macc": macc}


def train_candidate(run, static, meta_train, meta_val, k, genotype, early_stop, entry):
    """Candidate k: Adam on meta-train, scored on meta-val. Fills in its entry of the log.

    meta_train, meta_val: stored outputs and windows (N, T). A candidate that is stopped half way (Sect.
    3.3) has its half-way score as its reward."""
    r, (stored, windows) = run.recipe, meta_train
    cell = new_cell(run, static, genotype, generator(r.seed, "cell", k))
    entry["parameters"] = parameters(cell)
    worth = table.latency_worth(run, cell, static, stored, entry)
    optimizer = adam(cell, r.cell_lr, r.weight_decay)
    rng, steps, losses = generator(r.seed, "crop", k), [], []
    for epoch in range(r.search_epochs):
        steps += batches(len(windows), r.search_batch, generator(r.seed, "candidate", k, epoch))
    for step, batch in enumerate(steps):
        if r.early_stop and 0 < step == len(steps) // 2:          # half way: is it promising?
            check_finite(losses, "half way")
            scores = score(run, cell, *meta_val, worth)
            entry["half_reward"] = scores["reward"]
            draw = torch.rand(1, generator=generator(r.seed, "stop", k)).item()
            if not early_stop.promising(scores["reward"], draw):
                entry.update(scores, stopped=True)
                return
        loss = cell_loss(run, cell, stored.pick(windows[batch], rng))
        update(loss, [optimizer], step / len(steps), r.poly_power)
        losses.append(loss.detach())
    check_finite(losses, "at the end")
    entry.update(score(run, cell, *meta_val, worth))


def search(run):
    """Sect. 3.3, 4.1; and [ours] random search as a control. Meta-val is scored on the frames as they are."""
    r = run.recipe
    windows = run.frames("train").windows(r.sequence_length)      # (N, T) frame numbers
    train, val = data.meta_split(windows, r.meta_val_share, generator(r.seed, "meta"))
    print(f"search: {len(train)} sequences to train on, {len(val)} to score on")
    static = run.load("static").static
    meta_train = static_outputs(run, static, train), train
    meta_val = static_outputs(run, static, val, transformed=False), val
    for strategy, log in table.logs(run).items():
        explore(run, strategy, log, static, meta_train, meta_val)


def explore(run, strategy, log, static, meta_train, meta_val):
    """The controller samples cells, each is trained and scored, the scores train the controller; and again.

    The log is the truth. A search that was killed goes through this loop from candidate 0 again: the same
    draws, the logged rewards, so the same updates. Only what the log lacks is trained. torchrun's processes
    share the candidates of a round, and all make the same update."""
    r = run.recipe
    torch.manual_seed(generator(r.seed, "controller").initial_seed())
    controller = Controller(r.cell_layers)
    ppo = PPO(controller, r.controller_lr, r.controller_clip, r.controller_baseline_decay,
              r.controller_epochs, r.controller_entropy, replay=r.controller_replay)
    early_stop, figures = EarlyStop(r.early_stop_rule, r.early_stop_decay), {}
    progress = Progress(f"search ({strategy})", r.search_candidates, done=len(log))
    for first in range(0, r.search_candidates, r.controller_rollout):
        rng = generator(r.seed, "sample" if strategy == "ppo" else strategy, first)
        if strategy == "ppo":
            tokens, _ = controller.sample(r.controller_rollout, rng)      # (n, 5L)
        else:
            tokens = controller.random(r.controller_rollout, rng)
        numbers = range(first, min(first + r.controller_rollout, r.search_candidates))
        tokens = log.tokens(numbers, tokens)                      # the log's, where it has them
        for k, row in zip(numbers, tokens):
            if log.misses(k):                                     # nor does another process work on it
                genotype = Genotype.from_tokens(row)
                with log.candidate(k, genotype) as entry:
                    train_candidate(run, static, meta_train, meta_val, k, genotype, early_stop, entry)
                progress.update(len(log), **log.standing(k))
        log.meet()                                                # now every process has all of this round
        for k in numbers:                                         # [ours]: the early stop moves once a round
            if log[k]["half_reward"] is not None:
                early_stop.move(log[k]["half_reward"])
        if strategy == "ppo" and len(numbers) == r.controller_rollout:    # else it waits for more
            log_prob = controller.log_prob(tokens)[0].detach()    # (n,) of the controller that sampled them
            reward = torch.tensor([log[k]["reward"] for k in numbers])
            failed = torch.tensor([log[k]["status"] != "ok" for k in numbers])
            figures = ppo.update(tokens, log_prob, reward, failed)
    if strategy == "ppo":
        run.save("controller", {}, controller=controller.state_dict(), last_update=figures,
                 candidates=r.search_candidates)


# ---- Sect. 4.2: the best cells on the full training split -------------------------------------------------

def finetune(run):
    """Every network of the table: first its cell alone, then all end to end. The baseline has no cell."""
    missing = [network for network in networks.networks(run) if not run.finished(network.name)]
    alone = [network for network in missing if network.genotype and not run.finished(f"{network.name}-alone")]
    if alone:
        static = run.load("static").static
        windows = run.frames("train").windows(run.recipe.sequence_length)         # (N, T)
        stored = static_outputs(run, static, windows, mirrored=run.recipe.cell_mirrored)
        for network in alone:
            finetune_cell(run, network, static, stored, windows)
        del stored                                                # end to end needs the memory
    for network in missing:
        finetune_end_to_end(run, network)


def finetune_cell(run, network, static, stored, windows):
    """First the cell alone, by Adam, on the frozen static network's stored outputs, like a candidate.

    [ours] So there is no augmentation but the mirror images, if they are stored, and on CityScapes the images
    are the search's. The encoder has fitted the training images' features to their labels; with dropout on
    them the cell trusts them less."""
    r = run.recipe
    print(f"{network.name}: {network.genotype}")
    cell = new_cell(run, static, network.genotype, generator(r.seed, network.name), network.past)
    optimizer = adam(cell, r.cell_lr, r.weight_decay)
    for epoch in run.epochs(f"{network.name}-alone", r.cell_epochs, {"cell": cell}, [optimizer], network):
        cell.train()
        for batch, done in epoch.batches(len(windows), r.cell_batch):
            window = windows[batch]                               # (B, T)
            if r.cell_mirrored:                                   # half of the sequences, at random
                window = window + stored.count * torch.randint(2, (len(window), 1), generator=epoch.rng)
            loss = cell_loss(run, cell, stored.pick(window, epoch.rng, r.cell_dropout))
            update(loss, [optimizer], done, r.poly_power, run.world)
            epoch.log(loss)


def finetune_end_to_end(run, network):
    """Then both: the cell by Adam at half its rate, the static network by SGD.

    [ours] Every frame's loss counts, the key frame's too: else nothing would hold the static classifier to a
    decoder that changes. The static network's batch norms keep their statistics."""
    r, frames = run.recipe, run.frames("train")
    windows = frames.windows(r.sequence_length)                   # (N, T)
    video = VideoSegmenter(run.load("static").static, run.load_cell(network))
    parts = {"static": video.static}
    optimizers = [torch.optim.SGD(video.static.parameters(), lr=r.end_lr_static, momentum=r.momentum,
                                  weight_decay=r.weight_decay)]
    if video.cell is not None:
        parts["cell"] = video.cell
        optimizers.append(adam(video.cell, r.end_lr_cell, r.weight_decay))
    for epoch in run.epochs(network.name, r.end_epochs, parts, optimizers, network):
        video.train()
        video.static.eval()
        for batch, done in epoch.batches(len(windows), r.cell_batch):
            images, labels = frames[windows[batch]]               # (B, T, H, W, 3), (B, T, H, W)
            images, labels = data.augment(images, labels, r.end_crop, r.end_scale, r.end_mirrored, epoch.rng)
            with run.autocast():
                logits = video(images)                            # (B, T, 3, h, w) -> (B, T, C, h/8, w/8)
            loss = 0
            for t in range(r.sequence_length):
                loss = loss + cross_entropy(logits[:, t], labels[:, t], r.loss_stride)
            update(loss, optimizers, done, r.poly_power, run.world)
            epoch.log(loss)


# ---- evaluation: every frame of every clip, in time order -------------------------------------------------

def segment_clips(run, video, split, key_frame_every=0):
    """Yields (frame number, label map (H, W), label (H, W)) of every frame of a split, in float32. The static
    network on the first frame of a clip and on every key frame, the cell on all others."""
    video, frames = fold_batchnorm(video).to(memory_format=torch.channels_last), run.frames(split)
    progress = Progress(f"frames of {split}", len(frames.list))
    for clip in frames.clips():
        state = None
        for t, k in enumerate(clip):
            if key_frame_every and t % key_frame_every == 0:
                state = None
            if video.cell is None and frames.list[k].label is None:
                continue                                          # nothing depends on it
            image, label = frames[k]                              # (H, W, 3), (H, W)
            with float32():
                pred, state = video.segment(image, state)
            yield k, pred, label
            progress.update(k + 1)


def evaluate_video(run, video, split, key_frame_every=0, answers=None):
    """Scores of a network on a split: miou, fwiou, macc, consistency over three frames, iou by class.
    answers: where the label maps go, too, by frame number."""
    confusion, steady, recent = Confusion(run.num_classes), Consistency(3), []
    windows = run.frames(split).windows(3).tolist()
    for k, pred, label in segment_clips(run, video, split, key_frame_every):
        confusion.update(pred, label)
        if answers is not None:
            answers[k] = pred
        recent = [*recent, (k, pred, label)][-3:]
        numbers, preds, labels = zip(*recent)
        if list(numbers) in windows:
            steady.update(preds, labels)
    iou, miou, fwiou, macc, _ = confusion.scores()
    iou = dict(zip(run.frames(split).dataset.classes, iou))
    return {"miou": miou, "fwiou": fwiou, "macc": macc, "consistency": steady.score(), "iou": iou}


def evaluate(run):
    """Table 5: every network on val and on the split that is reported (test; CityScapes: val)."""
    rows = table.Table(run)
    for network, distances in rows.missing():                    # what no evaluation has scored before
        video = run.load(network.name)
        costs = {"parameters": parameters(video), **table.frame_costs(run, video)}
        for every in distances:
            answers, scores = rows.answers(network, every), {}           # answers: for Figs. 5 and 6
            for split in run.splits[1:]:
                reported = split == run.splits[-1]
                scores[split] = evaluate_video(run, video, split, every, answers if reported else None)
            rows.add(network, every, costs, scores)
    rows.finish(segment_clips)


# ---- the command ------------------------------------------------------------------------------------------

STAGES = {"pretrain": pretrain, "search": search, "finetune": finetune, "evaluate": evaluate}


def main(arguments=None):
    command = options.parse(arguments, Recipe, recipe_for, STAGES, __doc__)
    if command.stage == "predict":
        return predict.predict(command)
    with options.open_run(command) as run:
        for name in command.stages:
            with table.stage(run, name, command.stages) as missing:
                if missing:
                    STAGES[name](run)


if __name__ == "__main__":
    data.run_main(main)
