"""What the names of a video's images say: their clip, and their number in it.

Nothing else in the project knows what a clip is."""
import collections
import pathlib
import re

Name = collections.namedtuple("Name", "clip number rest")        # the text before the number and after it


def clips_of(paths):
    """Paths of images -> clips, each a list of paths in time order. read_names finds a frame's number.

    The names of a clip agree in what stands before the number. What follows it may differ, as a hash does.
    But where two frames have the same number, as in 7_left and 7_right, it tells two clips apart."""
    clips = collections.defaultdict(list)
    for name, path in zip(read_names(paths), paths):
        clips[name.clip, "" if name.number is not None else "no number"].append((name, path))
    for (clip, rest), frames in list(clips.items()):
        if not rest and len({name.number for name, _ in frames}) < len(frames):
            for name, path in clips.pop((clip, "")):
                clips[clip, name.rest].append((name, path))
    ordered = []
    for key in sorted(clips, key=lambda key: [in_order(text) for text in key]):
        frames = sorted(clips[key], key=lambda frame: (frame[0].number or 0, frame[0].rest))
        ordered.append([path for _, path in frames])
    return ordered


def read_names(paths):
    """Paths of images -> a Name for each. A name without digits has number None and belongs to clip "".

    A frame's number is the last group of digits that changes while all before it stays the same: 19 in
    ulm_000001_000019_leftImg8bit, 12 in clip_0012_1280x720 and in clip_0012_a1b2c3. Names that differ in
    digits only have it in the same place. Where no group changes, it is the last one."""
    stems = [pathlib.Path(path).stem for path in paths]
    digits = number_pattern(stems)
    groups = [list(re.finditer(digits, stem)) for stem in stems]
    values = collections.defaultdict(set)    # of a group of digits, by what stands around it
    for name in groups:
        for group in name:
            values[surroundings(group)].add(group[0])
    place = {}                               # name with # in place of digits -> index of the number's group
    for stem, name in zip(stems, groups):
        changing = [k for k, group in enumerate(name) if len(values[surroundings(group)]) > 1]
        if re.fullmatch(r".+_\d+_\d+_leftImg8bit", stem):        # CityScapes: a clip may have a single frame
            changing = [len(name) - 2]
        pattern = re.sub(digits, "#", stem)
        place[pattern] = max(place.get(pattern, -1), *changing, -1)       # -1: the last one
    names = []
    for stem, name in zip(stems, groups):
        if not name:
            names.append(Name("", None, stem))
            continue
        group = name[place[re.sub(digits, "#", stem)]]
        number = float(group[0]) if "." in group[0] else int(group[0])
        names.append(Name(stem[:group.start()], number, stem[group.end():]))
    return names


def surroundings(group):
    """All that stands before a group of digits, and the letters attached to its end. What comes after them
    may be a hash, which differs from frame to frame."""
    return group.string[:group.start()], re.match(r"[^\W\d_]*", group.string[group.end():])[0]


def number_pattern(stems):
    """The regular expression of a number. 1.0, 1.25, 1.5 are decimal numbers; 1.8, 1.9, 1.10 are two
    numbers each, as a decimal number is written without a 0 at its end, or all have the same length."""
    fractions = [text for stem in stems for text in re.findall(r"[0-9]\.([0-9]+)", stem)]
    lengths = {len(text) for text in fractions}
    decimal = len(lengths) == 1 or not any(re.search(".0$", text) for text in fractions)
    return r"[0-9]+\.[0-9]+|[0-9]+" if decimal else "[0-9]+"


def in_order(text):
    """A sort key that puts clip2 before clip10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split("([0-9]+)", text))]
