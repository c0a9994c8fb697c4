"""The static network's outputs for many frames, in memory, and batches of sequences of them. Filled by
train.static_outputs."""
import math

import torch
import torch.nn.functional as F

from util.progress import Progress

STRIDE = {"layer2": 8, "layer3": 16, "layer4": 32, "dec": 8, "labels": 1}         # image pixels per pixel


class Stored:
    """The maps of the frames in `windows` (N, T). With mirrored=True also those of their mirror images:
    frame number `count` + k is the mirror image of frame k. crop: the side of the square, at a random
    place, to which sequences are cropped; None: they are not cropped."""

    def __init__(self, windows, count, mirrored, crop):
        self.count, self.crop, self.maps = count, crop, {}
        self.numbers = windows.unique()                           # (n,)
        if mirrored:
            self.numbers = torch.cat([self.numbers, self.numbers + count])
        self.row = torch.full((2 * count,), -1)                   # frame number -> row of the maps
        self.row[self.numbers] = torch.arange(len(self.numbers))

    def parts(self, size=8):
        """Yields the frame numbers, `size` at a time, and shows a line of progress."""
        progress = Progress("static outputs", len(self.numbers))
        for first in range(0, len(self.numbers), size):
            yield self.numbers[first:first + size]
            progress.update(min(first + size, len(self.numbers)))

    def mirror(self, images, labels, numbers):
        """Flips those images (N, 3, H, W) and labels (N, H, W) whose frame number is that of a mirror
        image. Images are returned channels_last."""
        flipped = (numbers >= self.count).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        labels = torch.where(flipped[:, None, None], labels.flip(-1), labels)
        return images.contiguous(memory_format=torch.channels_last), labels

    def put(self, numbers, **maps):
        """Stores the maps of some frames: features (N, C, h, w) in half precision, labels (N, H, W) uint8.
        All memory is allocated at the first call, so nothing is ever there twice."""
        rows = self.row[numbers]
        for name, x in maps.items():
            if name not in self.maps:
                room, kind = (len(self.numbers), *x.shape[1:]), x.dtype if name == "labels" else torch.half
                layout = torch.contiguous_format if name == "labels" else torch.channels_last
                self.maps[name] = torch.empty(room, dtype=kind, device=x.device, memory_format=layout)
            self.maps[name][rows[0]:rows[-1] + 1] = x             # their rows are consecutive

    def pick(self, window, rng=None, dropout=0.0):
        """(B, T) frame numbers -> their Sequences. dropout [ours]: share of the channels that is zeroed."""
        return Sequences(self, window, rng, dropout)

    def megabytes(self):
        return sum(x.nbytes for x in self.maps.values()) / 1e6


class Sequences:
    """A batch of sequences. sequences("dec", t) is the `dec` of frame t, (B, C, h, w); "labels" gives
    (B, H, W). If frames are larger than the crop (CityScapes), each sequence has its own random crop."""

    def __init__(self, stored, window, rng, dropout):
        self.maps, self.crop, self.dropout = stored.maps, stored.crop, dropout
        rows, self.length = stored.row[window], window.shape[1]   # (B, T)
        if rows.min() < 0:
            raise ValueError("a frame of these sequences is not stored")
        self.rows = rows.to(self.maps["labels"].device)
        self.places = []                                          # crop offsets in steps of 32 pixels
        for side in self.maps["labels"].shape[-2:]:
            if self.crop and side > self.crop:
                steps = (side - self.crop) // 32
                self.places.append(torch.randint(steps + 1, (len(window),), generator=rng).tolist())
            else:
                self.places.append(None)

    def __call__(self, name, t):
        x = self.maps[name][self.rows[:, t]]
        if name != "labels":
            x = x.float()                                         # bf16's autocast can't stack half precision
        for axis, places in zip((-2, -1), self.places):
            if places:
                step, size = 32 // STRIDE[name], math.ceil(self.crop / STRIDE[name])
                x = torch.stack([one.narrow(axis, step * place, size) for one, place in zip(x, places)])
        if name == "labels":
            return x
        return F.dropout2d(x.contiguous(memory_format=torch.channels_last), self.dropout)
