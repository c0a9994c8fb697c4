"""data.py: its conventions by example (windows, transforms, scores, datasets), then bad files."""
import math
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from data import CamVid, CityScapes, Confusion, Consistency, Frame, Frames, InputError, Synthetic, sequences

CAMVID = os.environ.get("CAMVID")            # the folder of the public CamVid


# ---- Sequences

def clip_of(*numbers):
    return [Frame(pathlib.Path(f"A_{n:05d}.png"), "label") for n in numbers]


def numbers(windows):
    return [[int(frame.image.stem[-5:]) for frame in window] for window in windows]


def test_windows_stay_in_a_clip_and_between_long_gaps_and_end_with_a_label():
    a, b = clip_of(0, 30, 60, 110, 140, 170), clip_of(30, 60, 90)         # the gap of 50 is over 1.5 * 30
    assert numbers(sequences([a, b], 3)) == [[0, 30, 60], [110, 140, 170], [30, 60, 90]]
    hashes = [Frame(f"{name}.png", "label") for name in ("a_8_1234", "a_9_5678", "a_10_5679", "b_8_e4f1")]
    assert data.cut_at_gaps([hashes[:3], hashes[3:]]) == [hashes[:3], hashes[3:]]         # of 8, 9, 10; 8
    assert numbers(sequences([clip_of(0, 30, 75)], 3)) == [[0, 30, 75]]    # usual: 37.5, so 45 is no long gap
    assert sequences([clip_of(5)], 2) == [] and len(sequences([clip_of(5)], 1)) == 1
    nameless = [Frame(name, "label") for name in "abcd"]                  # without numbers
    assert sequences([nameless], 3) == [nameless[:3], nameless[1:]]
    sparse = [Frame(image, label if k in (1, 4, 8) else None) for k, (image, label) in
              enumerate(clip_of(*range(9)))]
    assert numbers(sequences([sparse], 3)) == [[2, 3, 4], [6, 7, 8]]


@pytest.mark.parametrize("clips", [
    [["0001TP_006690", "0001TP_006720"], ["0006R0_f00930", "0006R0_f00960"], ["0016E5_07959"]],     # CamVid
    [["ulm_000000_000018_leftImg8bit", "ulm_000000_000019_leftImg8bit"], ["ulm_000001_000019_leftImg8bit"]],
    [["c0_0000"], ["c1_0000"]], [["frame1", "frame2", "frame10"]], [["v1f2", "v1f10"], ["v2f1", "v2f2"]],
    [["a_0008_1280x720", "a_0009_1280x720", "a_0010_1280x720"], ["b_0001_1280x720"]],
    [["a_1_v2", "a_2_v2", "a_10_v2"], ["b_1_v3", "b_2_v3"]],
    [["a_8_e4f1", "a_9_77ab", "a_10_3c00", "a_11_abcd", "a_12_1234"]],                   # a hash
    [["0f77c-62b8_01", "0f77c-62b8_02"], ["2d91a-11ff_01", "2d91a-11ff_02"]],            # a clip's own
    [["1.0", "1.25", "1.5", "2.0"]], [["7_left", "8_left"], ["7_right", "8_right"]]])
def test_clips_and_the_order_in_them_come_from_the_names(clips):
    paths = [pathlib.Path("folder_7") / f"{name}.png" for clip in clips for name in clip]
    np.random.default_rng(0).shuffle(paths)
    assert [[path.stem for path in clip] for clip in data.clips_of(paths)] == clips


@pytest.mark.camvid
@pytest.mark.parametrize("split, clips, windows",
                         [("train", [62, 101, 204], 357), ("val", [101], 99), ("test", [62, 171], 229)])
def test_camvid_clips_and_windows(split, clips, windows):
    dataset = CamVid(CAMVID, split)
    assert [len(clip) for clip in dataset.clips] == clips
    assert len(sequences(dataset.clips, 3)) == windows
    image, label = dataset.read(dataset.clips[0][0])
    assert image.shape == (360, 480, 3) and image.dtype == label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(11), 255}


# ---- Transforms

def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("crop, scale, columns, rows", [
    ((20, 12), (1, 1), range(6, 25), [10]), ((28, 33), (1, 1), range(13, 17), range(6, 15)),
    ((24, 24), (0.5, 2.0), None, None)])
def test_augment_shows_image_and_labels_of_one_place(crop, scale, columns, rows):
    """A pixel's red is 8 times its column, its green 8 times its row; its label is the column in the first
    frame and the row in the second. So each pixel of the crop says where it was taken from. columns, rows:
    all places of the crop's middle, where nothing is scaled."""
    where = torch.stack(torch.meshgrid(torch.arange(30), torch.arange(20), indexing="xy")).to(torch.uint8)
    images = torch.stack((*8 * where, 0 * where[0]), dim=-1)              # (20, 30, 3)
    out, label = data.augment(images.expand(300, 2, -1, -1, -1), where.expand(300, -1, -1, -1), crop, scale,
                              generator=seeded(1))
    assert out.shape == (300, 2, 3, *crop) and label.shape == (300, 2, *crop) and label.dtype == torch.uint8
    outside = label[:, 0] == 255                          # (300, h, w): mean colour, but for mixed borders
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(outside, label[:, 1] == 255)
    assert (out[:, 0].abs().amax(1)[outside] > 1e-3).sum() <= 0.2 * outside.sum()
    assert outside.any() == (crop != (20, 12))

    mean, deviation = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
    at = (out[:, 0] * deviation + mean)[:, :2] * 255 / 8  # (300, 2, h, w): column and row
    inner = ((label > 0) & (label < torch.tensor([29, 19])[:, None, None])).all(dim=1, keepdim=True)
    assert ((at - label).abs() * inner).max() < (0.02 if columns else 0.51)     # copied, or the nearest label
    to_right = at[:, 0].diff(dim=2) * (inner[:, 0, :, 1:] & inner[:, 0, :, :-1])
    down = at[:, 1].diff(dim=1) * (inner[:, 0, 1:] & inner[:, 0, :-1])
    step, mirrored = down.amax((1, 2)), to_right.amin((1, 2)) < 0         # 1 / scale of each sequence
    torch.testing.assert_close(to_right.abs().amax((1, 2)), step, rtol=0, atol=2e-3)
    assert step.min() * scale[1] == pytest.approx(1, abs=0.1) == step.max() * scale[0]
    assert 0.4 < mirrored.double().mean() < 0.6
    if columns:
        middles = label[~mirrored, :, crop[0] // 2, crop[1] // 2].tolist()
        assert [set(found) for found in zip(*middles)] == [set(columns), set(rows)]
        assert len(set(map(tuple, middles))) > len(columns) * len(rows) / 2       # one draw for each axis


def test_normalise():
    """ImageNet's mean colour is 0 in each channel, one standard deviation above it 1."""
    mean, above = [[124, 116, 104]], [[182, 174, 161]]
    pixels = data.normalise(torch.tensor([mean, above], dtype=torch.uint8))       # (3, 2, 1)
    torch.testing.assert_close(pixels[:, :, 0], torch.tensor([[0., 1]] * 3), rtol=0, atol=0.02)


def test_the_longer_side_is_resized():
    squares = torch.randint(0, 11, (2, 6, 12), generator=seeded(0), dtype=torch.uint8)
    images, labels = torch.rand(2, 3, 30, 60), squares.repeat_interleave(5, 1).repeat_interleave(5, 2)
    small, small_labels = data.resize_longer_side(images, labels, 24)     # 5 pixels become 2
    assert torch.equal(small_labels, squares.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert small.shape == (2, 3, 12, 24) and data.resize_longer_side(images, labels, 0)[0] is images


def test_pad_as_the_paper_does():
    images, labels = torch.ones(2, 3, 360, 480), torch.zeros(2, 360, 480, dtype=torch.uint8)
    images, labels = data.pad(images, labels, 400)
    assert (labels[:, :20] == 255).all() and (labels[:, -20:] == 255).all() and (labels[:, 20:-20] == 0).all()
    assert (images[:, :, :20] == 0).all() and (images[:, :, 20:-20] == 1).all()


# ---- Scores

def test_scores_by_hand():
    """In two parts. Class 2 is only predicted, class 3 is nowhere. 77 stands where there is no label."""
    confusion = Confusion(4)
    confusion.update(torch.tensor([0, 0, 1, 77]), torch.tensor([0, 0, 0, 255]))
    confusion.update(torch.tensor([1, 1, 1, 2]), torch.tensor([1, 1, 1, 1]))
    scores = confusion.scores()
    assert scores.iou == pytest.approx([2 / 3, 3 / 5, 0, math.nan], nan_ok=True)
    three = scores.miou, scores.fwiou, scores.macc
    weighted = 3 / 7 * 2 / 3 + 4 / 7 * 3 / 5              # by the share of the labels
    assert three == pytest.approx(((2 / 3 + 3 / 5 + 0) / 3, weighted, (2 / 3 + 3 / 4) / 2))
    assert scores["reward"] == scores[4] == pytest.approx(np.prod(three) ** (1 / 3))
    assert Confusion(3).scores().reward == 0


@pytest.mark.parametrize("pred, label", [([2], [0]), ([0], [2]), ([-1], [0]), ([0], [-1]), ([0, 1], [0])])
def test_scores_refuse_what_is_no_class(pred, label):
    with pytest.raises(ValueError):
        Confusion(2).update(torch.tensor(pred), torch.tensor(label))


def test_consistency_by_hand():
    steady = Consistency(3)
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 1, 255]], [[0, 1, 1, 255]]])     # pixel 2 changes
    preds = torch.tensor([[[0, 1, 2, 0]], [[0, 0, 1, 0]], [[0, 1, 1, 0]]])            # pixel 1 is wrong once
    steady.update(preds, labels)                                          # pixel 3 is ignored
    assert steady.score() == 0.5


# ---- Datasets

def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_small_camvid_is_read(camvid, monkeypatch):
    """What a file manager leaves is passed over."""
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0001TP_000000.png"):
        (camvid / "train" / name).write_bytes(b"?")
    dataset = CamVid(camvid, "train")
    assert [[f.image.name for f in clip] for clip in dataset.clips] == [
        ["0001TP_000000.png", "0001TP_000030.jpg", "0001TP_000060.jpg"],
        ["Seq05VD_f00000.png", "Seq05VD_f00030.jpg", "Seq05VD_f00060.jpg"]]
    _, label = dataset.read(dataset.clips[0][1])
    assert label.ravel().tolist() == 4 * [*range(11), 255]                # 11 is void
    frames = Frames(dataset)
    images, labels = frames[torch.tensor([[0, 1], [4, 5]])]
    assert images.shape == (*labels.shape, 3) == (2, 2, 6, 8, 3)
    assert (images[1, 1].numpy() == dataset.read(dataset.clips[1][2])[0]).all()
    assert frames.windows(3).tolist() == [[0, 1, 2], [3, 4, 5]] and frames.clips() == [[0, 1, 2], [3, 4, 5]]
    monkeypatch.setattr(Frames, "IN_MEMORY", 6 * 6 * 8 * 4)
    large = Frames(dataset, None)
    assert frames.images is not None and large.images is None and large.size == (6, 8)
    assert all(torch.equal(a, b) for a, b in zip(large[torch.tensor([[0, 1], [4, 5]])], (images, labels)))


def test_cityscapes(tmp_path):
    labels, pictures = tmp_path / "gtFine/train/ulm", tmp_path / "leftImg8bit_sequence/train/ulm"
    for k in range(3):
        values = np.arange(34, dtype=np.uint8).reshape(2, 17)
        write(labels / f"ulm_{k:06d}_000019_gtFine_labelIds.png", values)
        for t in (18, 19):
            picture = np.full((2, 17, 3), 10 * k + t, np.uint8)
            write(pictures / f"ulm_{k:06d}_{t:06d}_leftImg8bit.png", picture)
    (labels / "ulm_000000_000019_gtFine_polygons.json").touch()           # theirs; no frame
    frames = Frames(CityScapes(tmp_path, "train"), in_memory=False)
    images, label = frames[1]
    # The official table, written out: road 7, sidewalk 8, building 11, wall 12, fence 13, pole 17, ...
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
                26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert label.flatten().tolist() == [expected.get(v, 255) for v in range(34)]
    assert frames.images is None and (images == 19).all()
    assert (frames[0][0] == 18).all() and (frames[0][1] == 255).all()
    assert frames.windows(2).tolist() == [[0, 1], [2, 3], [4, 5]]

    (pictures / "ulm_000001_000018_leftImg8bit.png").unlink()
    (labels / "ulm_000002_000019_gtFine_labelIds.png").rename(labels / "mine_gtFine_labelIds.png")
    with pytest.raises(InputError, match=r"name is not CITY(.|\n)*18_leftImg8bit.png: no such file"):
        CityScapes(tmp_path, "train")


def test_synthetic_is_deterministic_has_its_classes_and_stays_what_results_were_measured_on():
    a, val = Synthetic("anything", "train"), Synthetic(None, "val")
    frame, others = a.clips[3][2], (Synthetic(None, "train", seed=1), Synthetic(None, "test"))
    assert all((x.read(frame)[0] != a.read(frame)[0]).any() for x in others)
    assert np.unique([a.read(clip[0])[1] for clip in a.clips]).tolist() == list(range(6))
    image, label = val.read(val.clips[2][5])
    assert zlib.crc32(label.tobytes()) == 502161809 and abs(image.astype(float).mean() - 91.2202) < 0.01


def test_synthetic_is_ambiguous_in_one_frame():
    """A grey shape looks the same whatever its class; and a class is shown as often as not."""
    dataset = Synthetic(None, "train")
    images, labels = map(np.stack, zip(*(dataset.read(clip[1]) for clip in dataset.clips)))   # (N, H, W, 3)
    values = images.astype(int)
    dull = (abs(values - 150).max(3) < 30) & (np.ptp(values, axis=3) < 70)
    grey = [images[(labels == kind) & dull] for kind in range(1, 6)]      # (pixels, 3) each
    assert np.ptp([pixels.mean(0) for pixels in grey], axis=0).max() < 3
    assert 0.35 < sum(map(len, grey)) / (labels > 0).sum() < 0.65


def test_ones_own_dataset_is_a_few_lines(camvid):
    """docs/running.md, question 5: the classes, and that labels may be missing and how names end."""
    class Mine(CamVid):
        classes, palette = {0: "sky", 1: "rest"}, [(0.5, 0.5, 0.5), (0, 0, 1)]
        IDS = {0: 0, **{k: 1 for k in range(1, 11)}, 11: 255}
        UNLABELLED, ENDINGS = True, ("_leftImg8bit", "_gtFine_labelIds")

    for name in ("0001TP_000000", "0001TP_000060", "Seq05VD_f00000"):
        (camvid / f"trainannot/{name}.png").unlink()
    with pytest.raises(InputError, match="3 problems(.|\n)*UNLABELLED or ENDINGS"):
        CamVid(camvid, "train")
    for folder, ending in zip(("train", "trainannot"), Mine.ENDINGS):
        for path in (camvid / folder).iterdir():
            path.rename(path.with_stem(path.stem + ending))
    (camvid / "trainannot/0001TP_000030_gtFine_polygons.json").touch()
    frames = Frames(Mine(camvid, "train"))
    assert frames.dataset.classes == ["sky", "rest"] and frames.dataset.palette.tolist()[1] == [0, 0, 255]
    assert frames.clips() == [[0, 1, 2], [3, 4, 5]] and frames.windows(3).tolist() == [[3, 4, 5]]
    assert frames.windows(2).tolist() == [[0, 1], [3, 4], [4, 5]]
    assert (frames.labels[[0, 2, 3]] == 255).all()
    assert frames.labels[[1, 4, 5]].unique().tolist() == [0, 1, 255]
    (camvid / "train/0001TP_000030_leftImg8bit.jpg").unlink()             # a label needs its image still
    with pytest.raises(InputError, match="000030_gtFine_labelIds.png: has no image"):
        Mine(camvid, "train")


def test_a_split_without_any_label_and_a_read_that_gives_something_else_are_refused(camvid, monkeypatch):
    class Mine(CamVid):
        UNLABELLED = True

        def read(self, frame):
            return image, label

    good, label = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.uint8)
    for image, label in ((good, label + 11), (good * 1.0, label), (good, label.T), (label, label)):
        with pytest.raises(InputError, match=f"{image.dtype} .* labels 0 to 10 or 255"):
            Frames(Mine(camvid, "train"))
    monkeypatch.setitem(data.DATASETS, "mine", Mine)
    for path in (camvid / "valannot").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="Mine: no frame of val has a label"):
        data.open_split("mine", camvid, "val")


# ---- python data.py

def test_what_the_labels_of_the_frame_before_are_worth_and_the_contact_sheet(camvid, capsys):
    """In one of four pairs of frames class 0 becomes 1; and void, which counts in no pair, does so, too."""
    path = camvid / "trainannot/0001TP_000060.png"
    label = np.array(Image.open(path))                    # four pixels of each class
    write(path, np.where((label == 0) | (label == 11), 1, label).astype(np.uint8))
    for path in camvid.glob("valannot/*"):
        write(path, label.clip(max=9))
    data.main(f"--dataset camvid --data {camvid} --output {camvid / 'a.png'}".split())
    said = capsys.readouterr().out
    # Of class 0 the frames before have 16 pixels, 12 of them right; class 1 has 20, of which 16 were there.
    assert said.count(f"as the prediction: mIoU {100 * (12 / 16 + 16 / 20 + 9) / 11:.1f} %") == 1
    assert said.count("never occurs") == 1 and "nan" not in said
    assert "train: 6 frames in 2 clips; windows of three 2, of two 4" in said
    colours = {colour for _, colour in Image.open(camvid / "a.png").getcolors(1 << 24)}
    assert {tuple(colour) for colour in CamVid.palette.tolist()} <= colours


# ---- Bad input: one line, the file, the remedy

FIRST, LABEL = "train/0001TP_000000.png", "trainannot/0001TP_000000.png"


def break_file(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


FAULTS = {
    "16-bit image": (lambda d: write(d / FIRST, np.zeros((6, 8), np.uint16)), f"{FIRST}: pixels of mode I"),
    "another size": (lambda d: [write(d / name, np.zeros((9, 8, 3)[:2 + (name == FIRST)], np.uint8))
                                for name in (FIRST, LABEL)], f"{FIRST}: 8 x 9, most others 8 x 6"),
    "names": (lambda d: [path.rename(path.with_stem("picture")) for path in (d / FIRST, d / LABEL)],
              "train/picture.png: the name is not CLIP_FRAME"),
    "one name": (lambda d: shutil.copy(d / LABEL, (d / FIRST).with_suffix(".jpg")), "has the name of 0001TP"),
    "empty split": (lambda d: [path.unlink() for path in d.glob("val*/*")], "no frame in split 'val'"),
    "no such folder": (lambda d: shutil.rmtree(d / "val"), "val: no such folder")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named(camvid, capsys, fault):
    """The whole script: one line on stderr, exit status 2, nothing was written."""
    (do, message), sheet = FAULTS[fault], camvid / "sheet.png"
    do(camvid)
    with pytest.raises(SystemExit) as stop:
        data.run_main(lambda: data.main(f"--dataset camvid --data {camvid} --output {sheet}".split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not sheet.exists()
    assert line.startswith("error: ") and message in line


def test_all_problems_of_all_splits_and_kinds_are_listed(camvid, tmp_path):
    (camvid / LABEL).unlink()
    break_file(camvid / "train/0001TP_000030.jpg")        # its split has other problems already
    write(camvid / "train/0001TP_000060.jpg", np.zeros((7, 8, 3), np.uint8))
    for path in [*(camvid / "val").iterdir()]:
        break_file(path)
    for name in (LABEL, LABEL.replace("00.png", "30.png")):
        write(camvid / name.replace("train", "test"), np.eye(6, 8).astype(np.uint8) * 77)
    expected = ["000.png: has no label", "000030.jpg: cannot be read", "000060.png: 8 x 6, but its image"]
    expected += 6 * ["cannot be read"] + 2 * ["label value 77"]
    with pytest.raises(InputError) as error:
        train.main(f"--dataset camvid --data {camvid} --run {tmp_path}/run --encoder-weights none".split())
    assert len(error.value.args) == 11 and not (tmp_path / "run").exists()
    assert all(said in line for said, line in zip(expected, error.value.args))
