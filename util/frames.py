"""Reads many frames at once, and lists what is wrong with them."""
import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from util.errors import InputError


def read_all(read, frames, keep=True, problems=(), show=lambda done, total: None):
    """read(frame), a tuple of arrays (H, W, ...), for all frames, with threads -> the arrays of all frames
    stacked, (N, H, W, ...) each, and the frames' size (H, W). keep=False: checks them only, () for arrays.

    Raises InputError with `problems`, the files that can't be read, and those whose size differs from most.
    show(done, total) is called after each frame."""
    problems, sizes, kept = [*problems], {}, []

    def attempt(frame):
        try:
            arrays = read(frame)
        except InputError as error:
            return error
        sizes[frame] = arrays[0].shape[:2]
        return arrays if keep else None

    with ThreadPoolExecutor(8) as pool:      # Pillow decodes without holding the GIL
        for done, result in enumerate(pool.map(attempt, frames), start=1):
            if isinstance(result, InputError):
                problems += result.args
            elif keep:
                kept.append(result)
            show(done, len(frames))
    usual = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    for frame in frames:                     # Frames of data.py, or paths
        if (size := sizes.get(frame, usual)) != usual:
            problems.append(f"{getattr(frame, 'image', frame)}: {size[1]} x {size[0]}, most others "
                            f"{usual[1]} x {usual[0]}; all must have the same size")
    if problems:
        raise InputError(*problems)
    return tuple(map(np.stack, zip(*kept))), usual
