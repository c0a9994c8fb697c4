"""What the names of a video's images say: their clip, and their number in it.

A name consists of words of letters and digits. The frame's number is the last group of digits that is a word
of its own, or that changes while all before it stays the same; 1.25 is one, too. Names of as many words have
it in the same one. All before it is the clip's name:

    0016E5_07959      0006R0_f00930      ulm_000001_000019_leftImg8bit      12_1280x720      frame12_v2
           -----              -----                 ------                  --                    --
    c0_0000, c1_0000: 0 in two clips      a_8_e4f1, a_9_1234: 8 and 9, as only one last word is digits alone

What follows the number may differ, as such a hash does. But where two frames of a clip have the same number,
as 7_left and 7_right, it tells two clips apart."""
import collections
import pathlib
import re

Name = collections.namedtuple("Name", "clip number rest")        # the text before the number and after it
NUMBER = r"\d+\.\d+|\d+"
WORD, LAST = re.compile(rf"(?:{NUMBER}|[^\W\d_])+"), re.compile(rf"(.*?)({NUMBER})\D*")


def clips_of(paths):
    """Paths of images -> clips, each a list of paths in time order. Names without a number are one clip."""
    paths = list(paths)                      # also an iterator, such as Path.iterdir()
    clips, names = collections.defaultdict(list), read_names(paths)
    count = collections.Counter(name[:2] for name in names)
    doubled = {name.clip for name in names if name.number is not None and count[name[:2]] > 1}
    for name, path in zip(names, paths):
        key = name.clip, name.number is None, name.rest if name.clip in doubled else ""
        clips[key].append((name.number or 0, name.rest, path))
    return [[path for *_, path in sorted(clips[key])] for key in sorted(clips)]


def read_names(paths):
    """Paths of images -> a Name for each. A name in which no number is found has number None and clip ""."""
    stems = [pathlib.Path(path).stem for path in paths]
    alike, read = collections.defaultdict(list), {}
    for stem in stems:                       # number of words -> for each name the last digits of its words
        words = [LAST.fullmatch(stem, *found.span()) for found in WORD.finditer(stem)]
        if any(words):
            alike[len(words)].append(words)
    for names in alike.values():
        columns = [column for column in zip(*names) if None not in column]
        for group in ([column for column in columns if is_number(column)] or columns or [()])[-1]:
            stem, (start, end) = group.string, group.span(2)
            read[stem] = Name(stem[:start], float(group[2]) if "." in group[2] else int(group[2]), stem[end:])
    return [read.get(stem, Name("", None, stem)) for stem in stems]


def is_number(column):
    """Whether the digits in one word of some names are alone, or change after the same text."""
    texts = {(group.string[:group.start(2)], group[2]) for group in column}
    alone = all(group[0] == group[2] for group in column)
    return alone or len(texts) > len({before for before, _ in texts})
