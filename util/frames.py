"""Reads all frames of a dataset at once, and lists what is wrong with them."""
import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from util.errors import InputError
from util.label_maps import IGNORE


def read_all(dataset, frames, keep=True, problems=(), show=None):
    """Reads frames with threads -> (images (N, H, W, 3), labels (N, H, W)), uint8, and their size (H, W).
    keep=False only checks the frames and returns None in place of the pixels.

    Raises InputError with `problems`, the files that can't be read, and those whose size differs from most.
    show(done, total) is called after each frame."""
    problems, sizes, images, labels = [*problems], {}, [], []

    def read(frame):
        try:
            image, label = dataset.read(frame)
            check_pixels(frame, image, label, len(dataset.classes))
        except InputError as error:
            return error
        sizes[frame] = label.shape
        return (image, label) if keep else None

    with ThreadPoolExecutor(8) as pool:      # Pillow decodes without holding the GIL
        for done, result in enumerate(pool.map(read, frames), start=1):
            if isinstance(result, InputError):
                problems += result.args
            elif keep:
                images.append(result[0])
                labels.append(result[1])
            if show:
                show(done, len(frames))
    usual = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    for frame in frames:
        size = sizes.get(frame, usual)
        if size != usual:
            problems.append(f"{frame.image}: {size[1]} x {size[0]}, most others {usual[1]} x {usual[0]}; all "
                            "frames of a split must have the same size")
    if problems:
        raise InputError(*problems)
    return ((np.stack(images), np.stack(labels)) if keep else None), usual


def check_pixels(frame, image, label, num_classes):
    """Raises InputError unless a dataset's read() returned what it must."""
    if not (image.dtype == label.dtype == np.uint8 and image.shape == label.shape + (3,) and label.ndim == 2):
        raise InputError(f"{frame.image}: read() returned an image {image.dtype} {image.shape} and a label "
                         f"{label.dtype} {label.shape}; they must be (H, W, 3) and (H, W), uint8")
    unknown = label[(label >= num_classes) & (label != IGNORE)]
    if len(unknown):
        raise InputError(f"{frame.label}: label {unknown[0]} is neither a class, 0 to {num_classes - 1}, nor "
                         f"{IGNORE}")
