"""--stage predict: label maps, overlays and an animation of a video of yours, by a trained network.

In the order of the file: the frames, the network, the prediction."""
import collections
import contextlib
import hashlib
import json
import math
import pathlib
import re
import time

import numpy as np
from PIL import Image, ImageSequence

import data
from dyncell import Arch2, VideoSegmenter, fold_batchnorm
from experiment import weights
from experiment.networks import make_cell
from experiment.runs import best_device, flag
from experiment.table import interval
from util import charts, images
from util.costs import usable_device
from util.errors import InputError, brief, told
from util.files import fill, load, save
from util.progress import Progress

ANIMATION = 100, 480                         # at most so many frames and so wide: it is made in memory
VIDEOS = ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .wmv .flv .ogv .3gp".split()


# ---------------------------------------------------------------------------------------------------------
# The frames

Video = collections.namedtuple("Video", "names durations size read digest")
# names and durations (ms) of the frames; size: (width, height); read(start): yields frames (H, W, 3) uint8
# from number `start` on, one at a time in memory; digest: a hash of the files' names and sizes


def open_video(source):
    """A folder of frames in numeric order, an animated GIF, WebP or APNG, or one image -> Video.

    Every frame is checked. Raises InputError naming all that can't be used."""
    source = pathlib.Path(source)
    if source.is_dir():
        return open_folder(source)
    if is_video(source):
        raise InputError(f"{source}: is a video; extract its frames (mkdir frames; ffmpeg -i {source} "
                         "frames/%06d.png) and pass --input frames")
    formats = (*images.FORMATS, "GIF", "WEBP")
    images.read_image(source, formats)                              # raises InputError if it is broken
    animation, durations = Image.open(source, formats=formats), []

    def read(start=0):
        several = getattr(animation, "n_frames", 1) > 1
        if not several or animation.format == "MPO":              # a phone's photo with a preview
            yield images.read_image(source, formats)
            return
        for k, frame in enumerate(ImageSequence.Iterator(animation)):
            pixels = np.array(frame.convert("RGB"))
            durations[k:] = [frame.info.get("duration") or 100]   # WebP knows it after decoding
            if k >= start:
                yield pixels
    count = 0
    try:
        for image in read():
            count += 1
    except Exception as error:               # Pillow's decoders raise many kinds
        reason = brief(error)
        raise InputError(f"{source}: frame {count} cannot be decoded ({reason}); create it again") from None
    names = [source.stem] if count == 1 else [f"{source.stem}_{k:05d}" for k in range(count)]
    return Video(names, durations or [100], image.shape[1::-1], read, digest_of([source]))


def open_folder(folder):
    paths, others = [], []
    for path in sorted(folder.iterdir(), key=numeric):
        if path.name[0] != ".":              # hidden
            (paths if path.suffix.lower() in (".png", ".jpg", ".jpeg") else others).append(path)
    if not paths:
        for path in filter(is_video, others):
            return open_video(path)                               # raises InputError with the remedy
        raise InputError(f"{folder}: holds no .png or .jpg; --input is a folder of frames, an animation or "
                         "one image")
    sizes, problems, names, progress = {}, [], {}, Progress("checking the frames", len(paths))
    for k, path in enumerate(paths):
        other = names.setdefault(path.stem, path)
        if other != path:
            problems.append(f"{path}: would be written to the same file as {other.name}; rename or remove "
                            "one")
        try:
            sizes[path] = images.look_at_image(path)
        except InputError as error:
            problems += error.args
        progress.update(k + 1)
    usual = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    for path, size in sizes.items():
        if size != usual:
            problems.append(f"{path}: {size[0]} x {size[1]}, most others {usual[0]} x {usual[1]}; the "
                            "frames of a video must have the same size")
    if problems:
        raise InputError(*problems)
    if others:
        print(f"predict: {len(others)} other files of {folder} are ignored, such as {others[0].name}")

    def read(start=0):
        return map(images.read_image, paths[start:])
    return Video(list(names), [100] * len(paths), usual, read, digest_of(paths))


def numeric(path):
    """A sort key that puts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.stem)                         # every second one is a number
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], path.name


def is_video(path):
    """Whether a file is a video, by its name or its content (MP4, MOV, Matroska, WebM, AVI)."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
        return (path.suffix.lower() in VIDEOS or head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3"
                or head[:4] + head[8:] == b"RIFFAVI ")
    return False


def digest_of(paths):
    text = [f"{path.name} {path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# The network

def find_network(run, network):
    """The path of a checkpoint. network: a name in the run's folder, the path of any file, or None for the
    run's best network. Raises InputError if there is no such file."""
    there = []
    for path in sorted(run.glob("*.pt")):
        if path.stem not in ("controller", "examples") and not path.stem.endswith("-alone"):
            there.append(path.stem)
    if network is None:
        results = run / "results.json"
        best = load(results).get("best") if results.exists() else None
        wanted = [name for name in (best, "cell-0", "baseline", "static") if name in there]
        network = wanted[0] if wanted else "static"
    if network in there:
        return run / f"{network}.pt"
    if pathlib.Path(network).is_file():
        return pathlib.Path(network)
    listed = f"there are {', '.join(there)}" if there else "it has no network, so train one or pass --run"
    raise InputError(f"{run / network}.pt: no such file; {listed}; --network takes a checkpoint's path, too")


def open_network(path, command):
    """A checkpoint -> the network, its classes, palette, recipe (a dict) and the size (H, W) of the frames
    that it was trained on, or None if unknown. Raises InputError.

    No other file is needed: the checkpoint holds its recipe, the classes and their colours."""
    saved = weights.read(path, "--network takes a network trained by this program")
    if not isinstance(saved, dict) or "static" not in saved:
        raise InputError(f"{path}: holds no network; --network takes static, baseline, a cell, or a "
                         "checkpoint's path")
    if "optimizers" in saved:
        raise InputError(f"{path}: is not finished; run the command that started it again")
    recipe = saved.get("recipe") or {}
    name = recipe.get("dataset", command.given.get("dataset"))
    kind = data.DATASETS.get(name)
    if "classes" not in saved and kind is None:
        raise InputError(f"{path}: doesn't name its classes; give its dataset by --dataset "
                         f"{'|'.join(data.DATASETS)}")
    check_flags(path, recipe, command)
    classes, palette = saved.get("classes") or kind.classes, saved.get("palette")
    if not palette:
        palette = kind.palette
    static, cell = Arch2(len(classes)), None
    fill(static, saved["static"], path)
    if "cell" in saved:
        cell = make_cell(saved["genotype"], static, saved.get("past", True))
        fill(cell, saved["cell"], path)
    device = usable_device(command.device or best_device())
    video = fold_batchnorm(VideoSegmenter(static, cell, pad=recipe.get("input_pad", 0)).to(device))
    return video, classes, palette, recipe, saved.get("size") or getattr(kind, "SIZE", None)


def check_flags(path, recipe, command):
    """Raises InputError for a recipe's flag that differs from the checkpoint's: it would do nothing."""
    asked = vars(command.recipe) if command.schedule else command.given
    for name, value in json.loads(json.dumps(asked)).items():
        there = json.loads(json.dumps(recipe)).get(name, value)
        if there != value and name != "encoder_weights":
            raise InputError(f"{flag(name)} {value}: does nothing with --stage predict; {path} was made "
                             f"with {there}")


# ---------------------------------------------------------------------------------------------------------
# The prediction

def predict(command):
    """Writes label maps, overlays and one animation of a video. Memory doesn't grow with its length. If it
    was interrupted, the same command writes what is missing."""
    path, every = find_network(command.run, command.network), command.key_frame_every
    network, classes, palette, recipe, size = open_network(path, command)
    video, output = open_video(command.input), pathlib.Path(command.output)
    work = {"frames": video.digest, "network": weights.digest(path), "key_frame_every": every}
    done = begin(output, work, video.names, path)
    width, height = video.size
    there = f"; {done} are there already" if done else ""
    frames = f"{len(video.names)} frames" if len(video.names) > 1 else "1 frame"
    print(f"predict: {frames} by {path.stem}, key frame {interval(every)}, {width} x {height}{there}")
    if size and not 1 / 2 <= min(video.size) / min(size) <= 2:
        print(f"predict: {path.stem} was trained on frames of {size[1]} x {size[0]}; it is "
              "unreliable on such different ones, so resize them to about that")
    write_classes(output, classes, palette)
    ids = None
    if list(classes) == data.CityScapes.classes:                  # for its evaluation server
        ids = np.array(data.CityScapes.EVALUATED, np.uint8)
        (output / "labelIds").mkdir(exist_ok=True)
    # A cell needs the previous frame's state. It is computed again from the last key frame on, without
    # writing those frames again.
    start = done if network.cell is None else done - done % every if every else 0
    progress, since, state = Progress("predict", len(video.names), done=start), time.time(), None
    images = video.read(start) if done < len(video.names) else ()
    for k, image in enumerate(images, start):
        if every and k % every == 0:
            state = None
        with told("predict", command.device or best_device()):
            labels, state = network.segment(image, state)
        if k >= done:
            labels, name = labels.cpu().numpy(), f"{video.names[k]}.png"
            if ids is not None:
                charts.save_png(output / "labelIds" / name, Image.fromarray(ids[labels]))
            overlaid = Image.fromarray(charts.overlay(image, labels, palette))
            charts.save_png(output / "overlay" / name, overlaid, "an overlay")
            charts.save_indexed(output / "labels" / name, labels, palette)       # last: the frame is done
        progress.update(k + 1, frames_per_second=(k + 1 - start) / (time.time() - since))
    rare = animate(output, video)
    folders = "labels/ (indexed PNG, class numbers), " + ("labelIds/, " if ids is not None else "")
    print(f"predict: wrote {output}: {folders}overlay/, overlay.webp{rare}, classes.json, legend.png")


def begin(output, work, names, path):
    """Makes the output folder -> the number of frames that an earlier call of the same work has finished.
    Raises InputError if the folder holds anything else, so nothing is overwritten."""
    record = output / "predict.json"
    if record.exists() and load(record) != work:
        raise InputError(f"{output}: holds a prediction of other frames or by another network than {path}; "
                         "choose another --output")
    if output.exists() and not record.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: holds files already; nothing is overwritten, so choose another --output")
    for folder in ("labels", "overlay"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    save(record, work)
    done = 0
    while done < len(names) and (output / "labels" / f"{names[done]}.png").exists():
        done += 1
    return done


def write_classes(output, classes, palette):
    """Writes classes.json and legend.png, which explain the numbers and colours of the label maps."""
    colours = [[int(part) for part in colour] for colour in palette]
    rows = [{"value": k, "name": name, "colour": colours[k]} for k, name in enumerate(classes)]
    save(output / "classes.json", rows)
    canvas = charts.Canvas(480, 40 + 26 * len(classes))
    canvas.height = 20 + canvas.legend(16, 20, 448, charts.class_legend(classes, colours)[:-1])
    charts.save_png(output / "legend.png", canvas.finished(), "a legend")


def animate(output, video):
    """Writes overlay.webp from the overlays, in the input's timing -> a remark if frames are left out."""
    skip, frames, durations = math.ceil(len(video.names) / ANIMATION[0]), [], []
    for k in range(0, len(video.names), skip):
        frame = Image.open(output / "overlay" / f"{video.names[k]}.png")
        frame.thumbnail((ANIMATION[1], 10000))
        frames.append(frame)
        durations.append(sum(video.durations[k:k + skip]))
    frames[0].save(output / "overlay.webp", save_all=True, append_images=frames[1:], duration=durations,
                   loop=0, quality=70)
    return f" (one frame in {skip})" if skip > 1 else ""
