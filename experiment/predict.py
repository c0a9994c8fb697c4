"""--stage predict: label maps, overlays and an animation of a video of yours, by a trained network.

In the order of the file: the frames, the network, the prediction."""
import collections
import contextlib
import json
import math
import pathlib
import shlex

import numpy as np
from PIL import Image

import data
from dyncell import VideoSegmenter, fold_batchnorm
from experiment import weights
from experiment.runs import flag
from util import charts, images
from util.costs import usable_device
from util.device import best_device, float32
from util.errors import InputError, brief, told
from util.files import load, save
from util.progress import Progress

FORMATS = *images.FORMATS, "GIF", "WEBP"   # of one image or an animation
VIDEOS = ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .wmv .flv .ogv .3gp".split()
SHIPPED = pathlib.Path(__file__).parents[1] / "networks"                  # those that come with the project
ANIMATION = 100, 480                         # at most so many frames and so wide: it is made in memory


# ---------------------------------------------------------------------------------------------------------
# The frames

Video = collections.namedtuple("Video", "names durations size read begins")
# names and durations (ms) of the frames; size: (width, height); read(): yields frames (H, W, 3) uint8, one at
# a time in memory; begins: for each frame, whether a clip begins there or a long gap lies before it


def open_video(source):
    """A folder of frames, an animated GIF, WebP or APNG, or one image -> Video.

    Every frame is checked. Raises InputError naming all that can't be used."""
    source = pathlib.Path(source)
    try:
        if source.is_dir():
            return open_folder(source)
        if source.exists() and not source.is_file():              # opening a pipe would wait for ever
            raise InputError(f"{source}: is neither a folder nor a file; --input takes one of them")
        if is_video(source):
            raise InputError(f"{source}: is a video; extract its frames (mkdir frames; ffmpeg -i "
                             f"{shlex.quote(str(source))} frames/%06d.png) and pass --input frames")
        return open_animation(source)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or brief(error)}); check the path and "
                         "the permissions of --input") from None


def is_video(path):
    """Whether a file is a video, by its name or its first bytes (MP4, MOV, Matroska, WebM, AVI)."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
        box = head[4:8] == b"ftyp" and not images.photo_format(path)
        return (path.suffix.lower() in VIDEOS or box or head[:4] == b"\x1aE\xdf\xa3"
                or head[:4] + head[8:] == b"RIFFAVI ")
    return False


def open_animation(path):
    images.read_image(path, FORMATS)                              # raises InputError if it is broken
    animation, durations = Image.open(path, formats=FORMATS), []

    def read():
        if getattr(animation, "n_frames", 1) == 1 or animation.format == "MPO":
            yield images.read_image(path, FORMATS)                # MPO: a phone's photo with a preview
            return
        for k, frame in enumerate(images.animation_frames(animation)):
            pixels = np.array(frame.convert("RGB"))
            durations[k:] = [frame.info.get("duration") or 100]   # WebP knows it after decoding
            yield pixels
    count = 0
    try:
        for image in read():
            count += 1
    except Exception as error:               # Pillow's decoders raise many kinds
        reason = brief(error)
        raise InputError(f"{path}: frame {count} cannot be decoded ({reason}); create it again") from None
    names = [path.stem] if count == 1 else [f"{path.stem}_{k:05d}" for k in range(count)]
    return Video(names, durations or [100], image.shape[1::-1], read, [k == 0 for k in range(count)])


def open_folder(folder):
    paths, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name[0] != ".":              # hidden
            (paths if path.suffix.lower() in (".png", ".jpg", ".jpeg") else others).append(path)
    if not paths:
        for path in filter(pathlib.Path.is_file, others):
            if is_video(path) or images.photo_format(path):
                return open_video(path)                           # raises InputError with the remedy
        raise InputError(f"{folder}: holds no .png or .jpg; --input is a folder of frames, an animation or "
                         "one image")
    if photos := [path for path in others if path.is_file() and images.photo_format(path)]:
        raise InputError(*(f"{path}: is {images.photo_format(path)}, a frame that would be left out; convert "
                           "it to PNG or JPEG" for path in photos))
    if others:
        print(f"predict: {len(others)} other files of {folder} are ignored, such as {others[0].name}")
    clips, begins = data.clips_of(paths), []
    paths = [path for clip in clips for path in clip]
    for clip in clips:                       # no sequence of training crosses a long gap, either
        begins += [True, *data.long_gaps(clip)]
    sizes, problems, names, progress = {}, [], {}, Progress("checking the frames", len(paths))
    for k, path in enumerate(paths):
        other = names.setdefault(path.stem, path)
        if other != path:
            problems.append(f"{path}: would be written to the same file as {other.name}; rename or remove "
                            "one")
        try:
            sizes[path] = images.read_image(path).shape[1::-1]
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
    return Video(list(names), [100] * len(paths), usual, lambda: map(images.read_image, paths), begins)


# ---------------------------------------------------------------------------------------------------------
# The network

def find_network(run, network):
    """The path of a checkpoint. network: a name in the run's folder, the name of a network that comes with
    the project (camvid), the path of any file, or None for the run's best network. Raises InputError if there
    is no such file."""
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
    for path in (SHIPPED / f"{network}.pt", pathlib.Path(network)):
        if path.is_file():
            return path
    if network == "camvid":
        raise InputError(f"{SHIPPED}/camvid.pt: no such file; it comes with this program, so get it again, "
                         "or take a network of yours by --run or --network")
    listed = f"there are {', '.join(there)}" if there else "it has no network, so train one or pass --run"
    raise InputError(f"{run / network}.pt: no such file; {listed}; --network takes a checkpoint's path, too")


def open_network(path, command):
    """A checkpoint -> the network for inference, and the size (H, W) of the frames that it was trained on, or
    None if unknown. Raises InputError, also for a flag of the recipe that would do nothing."""
    saved = weights.read(path, "--network takes a network trained by this program")
    video = VideoSegmenter.load(path)
    video.enlarge = command.enlarge
    there = json.loads(json.dumps(saved.get("recipe") or {}))     # tuples become lists
    for name, value in json.loads(json.dumps(command.given)).items():
        if there.get(name, value) != value and name not in weights.FILES:
            raise InputError(f"{flag(name)} {value}: does nothing with --stage predict; {path} was made "
                             f"with {there[name]}")
    device = usable_device(command.device or best_device())
    return fold_batchnorm(video.to(device)), saved.get("size")


# ---------------------------------------------------------------------------------------------------------
# The prediction

def predict(command):
    """Writes label maps, overlays and one animation of a video. Memory doesn't grow with its length."""
    if not (command.network or command.named_run or "dataset" in command.given):
        raise InputError("--run, --network: give one of them; --run RUN takes a run's best network, "
                         "--network a checkpoint, --network camvid the one for streets that comes with this "
                         "program")
    path, output = find_network(command.run, command.network), pathlib.Path(command.output)
    network, size = open_network(path, command)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: holds files already, perhaps of a stopped prediction; nothing is "
                         "overwritten, so remove them or choose another --output")
    video, every = open_video(command.input), command.key_frame_every
    announce(path, network, video, size)

    folders, ids = ["labels", "overlay"], None
    if network.classes == data.CityScapes.classes:                # for its evaluation server
        folders, ids = [*folders, "labelIds"], np.array(data.CityScapes.EVALUATED, np.uint8)
    if command.save_confidence:
        folders.append("confidence")
    for folder in folders:
        (output / folder).mkdir(parents=True, exist_ok=True)
    write_classes(output, network.classes, network.palette)
    progress = Progress("predict", len(video.names))
    for k, (name, image) in enumerate(zip(video.names, video.read())):    # (H, W, 3)
        if video.begins[k]:
            first = k
        if k == first or every and (k - first) % every == 0:
            state = None                     # a key frame
        with told("predict", command.device or best_device()), float32():          # no TF32
            if command.save_confidence:
                probabilities, state = network.probabilities(image, state)            # (C, H, W)
                largest, labels = probabilities.max(dim=0)        # (H, W)
            else:
                labels, state = network.segment(image, state)     # (H, W)
        labels, pictures = labels.cpu().numpy().astype(np.uint8), {}
        pictures["overlay"] = charts.overlay(image, labels, network.palette)
        if ids is not None:
            pictures["labelIds"] = ids[labels]
        if command.save_confidence:
            pictures["confidence"] = (255 * largest).round().byte().cpu().numpy()
        for folder, pixels in pictures.items():
            charts.save_png(output / folder / f"{name}.png", Image.fromarray(pixels))
        charts.save_indexed(output / "labels" / f"{name}.png", labels, network.palette)
        progress.update(k + 1)
    rare = animate(output, video)
    print(f"predict: wrote {output}: labels/ (indexed PNG, class numbers), {'/, '.join(folders[1:])}/, "
          f"overlay.webp{rare}, classes.json, legend.png")


def announce(path, network, video, size):
    """Prints which network works on which frames, and warns if they are unlike those of its training."""
    print(f"predict: {path.stem} of {path.absolute().parent}, {len(network.classes)} classes: "
          f"{', '.join(network.classes)}")
    print(f"predict: {len(video.names)} frame(s) of {video.size[0]} x {video.size[1]}")
    first = [name for name, begins in zip(video.names, video.begins) if begins]
    if network.cell is not None and len(first) > 1:
        print(f"predict: {len(first)} clips, or parts of one between long gaps; each begins with a key "
              f"frame: {', '.join(first[:6])}{', ...' if len(first) > 6 else ''}")
    if size and not 1 / 2 <= min(video.size) / min(size) <= 2:
        print(f"predict: {path.stem} was trained on frames of {size[1]} x {size[0]}; it is "
              "unreliable on such different ones, so resize them to about that")


def write_classes(output, classes, palette):
    """Writes classes.json and legend.png, which explain the numbers and colours of the label maps."""
    colours = [[int(part) for part in colour] for colour in palette]
    rows = [{"value": k, "name": name, "colour": colours[k]} for k, name in enumerate(classes)]
    save(output / "classes.json", rows)
    canvas = charts.Canvas(480, 40 + 26 * len(classes))
    canvas.height = 20 + canvas.legend(16, 20, 448, charts.class_legend(classes, colours)[:-1])
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
