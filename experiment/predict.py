"""--stage predict: label maps, overlays and an animation of a video of yours, by a trained network."""
import collections
import itertools
import math
import pathlib

import numpy as np
from PIL import Image, ImageSequence

import data
from dyncell import VideoSegmenter, fold_batchnorm
from util import charts
from util.costs import usable_device
from util.device import best_device, tf32
from util.errors import InputError, brief, told
from util.files import load, save
from util.images import other_kind, read_all, read_image, upright
from util.progress import Progress

FORMATS = "PNG", "JPEG", "GIF", "WEBP"       # of one image or an animation
SHIPPED = pathlib.Path(__file__).parents[1] / "networks"                  # those that come with the project
ANIMATION = 100, 480                         # at most so many frames and so wide: it is made in memory


# ---- the frames -------------------------------------------------------------------------------------------

Video = collections.namedtuple("Video", "names durations size read since")
# names and durations (ms) of the frames; size: (H, W); read(): yields (H, W, 3) uint8, one after the other;
# since: how many frames a frame is from the beginning of its clip, or from the last long gap


def open_video(source):
    """A folder of frames, a GIF, WebP or APNG, or an image -> Video. Raises InputError naming what is bad."""
    path = pathlib.Path(source)
    if path.is_dir():
        return open_folder(path)
    size, durations = read_image(path, FORMATS).shape[:2], []
    try:
        for image, milliseconds in frames_of(path):
            if image.shape[:2] != size:      # beyond a GIF's screen
                raise ValueError(f"height and width are {image.shape[:2]}, those of frame 0 {size}")
            durations.append(milliseconds)
    except Exception as error:               # Pillow's decoders raise many kinds
        raise InputError(f"{path}: frame {len(durations)} cannot be read ({brief(error)})") from None
    names = [path.stem] if len(durations) == 1 else [f"{path.stem}_{k:05d}" for k in range(len(durations))]
    return Video(names, durations, size, lambda: (image for image, _ in frames_of(path)), range(len(names)))


def frames_of(path):
    """Yields the frames of an animation or image, (H, W, 3) uint8, each with its duration in ms."""
    animation = Image.open(path, formats=FORMATS)
    start = int(getattr(animation, "default_image", False))       # of an APNG, where it can't be shown
    stop = 1 if animation.format == "MPO" else None               # a phone's photo with a preview
    for frame in map(upright, itertools.islice(ImageSequence.Iterator(animation), start, stop)):
        yield np.array(frame.convert("RGB")), frame.info.get("duration") or 100


def open_folder(folder):
    paths, others, problems = [], [], []
    for path in sorted(folder.glob("[!.]*")):             # not hidden
        (paths if path.suffix.lower() in (".png", ".jpg", ".jpeg") else others).append(path)
    for path in others:                      # a photo would be left out; a video may lie beside its frames
        if (kind := other_kind(path)) and ("photo" in kind or not paths):
            problems.append(f"{path}: is {kind}")
    if not paths:
        raise InputError(*problems or [f"{folder}: holds no .png or .jpg; --input is a folder of frames"])
    if others:
        print(f"predict: {len(others)} other files of {folder} are ignored, such as {others[0].name}")
    parts = data.cut_at_gaps(data.clips_of(paths))        # no sequence of training crosses a long gap, either
    paths, since = sum(parts, []), [k for part in parts for k in range(len(part))]
    last = {path.stem: path for path in paths}
    problems += [f"{path}: has the name of {last[path.stem].name}, and so would its results; remove one"
                 for path in paths if last[path.stem] != path]
    _, size = read_all(lambda path: (read_image(path),), paths, keep=False, problems=problems,
                       show=Progress("checking the frames", 0).update)
    names = [path.stem for path in paths]
    return Video(names, [100] * len(paths), size, lambda: map(read_image, paths), since)


# ---- the network, the prediction --------------------------------------------------------------------------

def find_network(run, network):
    """The path of a checkpoint. network: a name in the run's folder, camvid (comes with the project), the
    path of any file, or None for the run's best cell on val. Raises InputError if there is no such file."""
    there = [path.stem for path in sorted(run.glob("*.pt")) if not path.stem.endswith("-alone")
             and path.stem not in ("controller", "examples")]
    if network is None:
        best = load(run / "results.json", absent={}).get("best")
        network = next((name for name in (best, "cell-0", "baseline", "static") if name in there), "static")
    for path in run / f"{network}.pt", SHIPPED / f"{network}.pt", pathlib.Path(network):
        if path.is_file():
            return path
    raise InputError(f"{run / network}.pt: no such file; {run} has {', '.join(there) or 'no network'}; "
                     "--network takes a checkpoint's path, too")


def predict(command):
    """Writes label maps, overlays and one animation of a video. Memory doesn't grow with its length."""
    path, output = find_network(command.run, command.network), pathlib.Path(command.output)
    network, size = VideoSegmenter.load(path), load(path).get("size")      # (H, W) of its training, if known
    device, network.enlarge = usable_device(command.device or best_device()), command.enlarge
    network = fold_batchnorm(network.to(device))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: holds files already; nothing is overwritten, so give another --output")
    video, every = open_video(command.input), command.key_frame_every or math.inf         # 0: on no others
    announce(path, network, video, size)
    (output / "labels").mkdir(parents=True, exist_ok=True)
    write_classes(output, network.classes, np.array(network.palette).tolist())
    progress = Progress("predict", len(video.names))
    for k, (name, image) in enumerate(zip(video.names, video.read())):    # (H, W, 3)
        if video.since[k] % every == 0:
            state = None                     # a key frame
        with told("predict", device), tf32(False):
            if command.save_confidence:
                probabilities, state = network.probabilities(image, state)            # (C, H, W)
                largest, labels = probabilities.max(dim=0)        # (H, W)
            else:
                labels, state = network.segment(image, state)     # (H, W)
        labels = labels.cpu().numpy().astype(np.uint8)
        pictures = {"overlay": charts.overlay(image, labels, network.palette)}
        if network.classes == data.CityScapes.classes:            # for its evaluation server
            pictures["labelIds"] = np.array(data.CityScapes.EVALUATED, np.uint8)[labels]
        if command.save_confidence:
            pictures["confidence"] = (255 * largest).round().byte().cpu().numpy()
        for folder, pixels in pictures.items():
            (output / folder).mkdir(exist_ok=True)
            charts.save_png(output / folder / f"{name}.png", Image.fromarray(pixels))
        charts.save_indexed(output / "labels" / f"{name}.png", labels, network.palette)
        progress.update(k + 1)
    rare = animate(output, video)
    print(f"predict: wrote {output}: labels/, {'/, '.join(pictures)}/, overlay.webp{rare}, legend.png ...")


def announce(path, network, video, size):
    """Prints which network works on which frames, and warns if they are unlike those of its training."""
    print(f"predict: {path.stem} of {path.absolute().parent}, {len(network.classes)} classes: "
          f"{', '.join(network.classes)}")
    (H, W), parts = video.size, [*video.since].count(0)
    print(f"predict: {len(video.names)} frame(s) of {W} x {H}; clips, or parts between long gaps: {parts}")
    if size and not 1 / 2 <= max(1, network.enlarge / max(H, W)) * min(H, W) / min(size) <= 2:
        print(f"predict: {path.stem} was trained on frames of {size[1]} x {size[0]}; resize these to that")


def write_classes(output, classes, colours):
    """Writes classes.json and legend.png, which explain the numbers and colours of the label maps."""
    save(output / "classes.json", [{"value": k, "name": classes[k], "colour": colours[k]}
                                   for k in range(len(classes))])
    canvas = charts.Canvas(480, 40 + 26 * len(classes))
    canvas.height = 20 + canvas.class_legend(20, classes, colours)
    charts.save_png(output / "legend.png", canvas.finished())


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
