"""One's own video: label maps, overlays and an animation, by a network that was trained before."""
import math
import pathlib
import time

import numpy as np
from PIL import Image

import data
from data import InputError
from dyncell import fold_batchnorm
from util import figures
from util.compare import distance
from util.progress import Progress
from util.runs import Run, load

ANIMATION = 100, 480                         # frames and width, at most, of the animated picture: it is made in memory


def read_frames(source):
    """A folder of frames in name order, an animated GIF, WebP or APNG, or one image -> their number, and a
    generator of (name, (H, W, 3) uint8), which holds one frame at a time."""
    source = pathlib.Path(source)
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise InputError(f"{source}: holds no .png or .jpg; --input is a folder of frames, an animation or one image")
        return len(paths), ((path.stem, data.read_image(path)) for path in paths)
    formats = (*data.FORMATS, "GIF", "WEBP")
    data.read_image(source, formats)                                      # says what is wrong with it
    animation = Image.open(source, formats=formats)
    try:
        count = getattr(animation, "n_frames", 1)
    except Exception as error:               # Pillow's decoders raise many kinds
        raise InputError(f"{source}: its frames cannot be counted ({error})") from None

    def frames():
        for k in range(count):
            try:
                animation.seek(k)
                pixels = np.array(animation.convert("RGB"))
            except Exception as error:
                raise InputError(f"{source}: frame {k} cannot be decoded ({error}); the frames before it are done") from None
            yield f"{source.stem}_{k:05d}" if count > 1 else source.stem, pixels
    return count, frames()


def predict(command):
    """Label maps, overlays and one animation of a video. Memory doesn't grow with its length."""
    output, source, every = pathlib.Path(command.output), command.input, command.key_frame_every
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: holds files already; nothing is overwritten, so choose another --output")
    run = Run(command.run, command.recipe, device=command.device)
    results = run.path("results.json")
    network = command.network or (load(results)["best"] if results.exists() else "cell-0")
    video = fold_batchnorm(run.load(network))
    palette = data.DATASETS[run.recipe.dataset].palette
    count, frames = read_frames(source)
    for folder in ("labels", "overlay"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    print(f"predict: {count} frames by {network}, key frame {distance(every)}")
    progress, start, animation, skip = Progress("predict", count), time.time(), [], math.ceil(count / ANIMATION[0])
    state, size = None, None
    for k, (name, image) in enumerate(frames):
        size = size or image.shape
        if image.shape != size:
            raise InputError(f"{source}: frame {name} is {image.shape[1]} x {image.shape[0]}, the first {size[1]} x {size[0]}; "
                             "the frames of a video must have one size (those before it are done)")
        if every and k % every == 0:
            state = None
        labels, state = video.segment(image, state)
        labels = labels.cpu().numpy()
        overlaid = Image.fromarray(figures.overlay(image, labels, palette))
        figures.save_indexed(output / "labels" / f"{name}.png", labels, palette)
        overlaid.save(output / "overlay" / f"{name}.png")
        if k % skip == 0:
            overlaid.thumbnail((ANIMATION[1], 10000))
            animation.append(overlaid)
        progress.update(k + 1, frames_per_second=(k + 1) / (time.time() - start))
    animation[0].save(output / "overlay.webp", save_all=True, append_images=animation[1:], duration=100, loop=0, quality=70)
    rare = f" (one frame in {skip})" if skip > 1 else ""
    print(f"predict: wrote {output}: labels/ (indexed PNG, class numbers), overlay/, overlay.webp{rare}")
