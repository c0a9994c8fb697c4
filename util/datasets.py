"""Checks, before any work, that a dataset class has all that the rest of the program needs."""
import os

import numpy as np

import data
from data import InputError


def dataset_class(name):
    """The class of this name in DATASETS. Raises InputError if it lacks a needed attribute."""
    kind = data.DATASETS[name]
    for attribute in ("classes", "palette", "read"):
        if not hasattr(kind, attribute):
            raise InputError(f"{kind.__name__}.{attribute}: is not there; a dataset is a class with "
                             "classes, palette, clips and read(frame), as data.Files is")
    if isinstance(kind.classes, str):
        raise InputError(f"{kind.__name__}.classes: is a single string; make it a list of names")
    palette = np.asarray(kind.palette)
    if palette.shape != (len(kind.classes), 3) or palette.min() < 0 or palette.max() > 255:
        raise InputError(f"{kind.__name__}.palette: has shape {palette.shape}; it needs a colour of three "
                         f"numbers, 0 to 255, for each of the {len(kind.classes)} classes")
    return kind


def open_split(name, root, split):
    """A split of the dataset of this name, checked. Raises InputError."""
    dataset = dataset_class(name)(root, split)
    said = f"{type(dataset).__name__}.clips"
    for clip in dataset.clips:
        for frame in clip:
            if not isinstance(frame, data.Frame) or not isinstance(frame.image, (str, os.PathLike)):
                raise InputError(f"{said}: holds {data.brief(repr(frame))[:60]}; it must be a list of "
                                 "clips, each a list of data.Frame(image, label) with two paths")
    if not any(frame.label is not None for clip in dataset.clips for frame in clip):
        raise InputError(f"{said}: no frame of {split} has a label; every split needs some")
    return dataset
