"""data.py: windows, the three datasets, transforms, scores, and what it says about bad files."""
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import CamVid, CityScapes, Confusion, Consistency, Frame, Frames, InputError, Synthetic, sequences

CAMVID = pathlib.Path(__file__).parents[2] / "shared" / "camvid"
needs_camvid = pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in ../shared/camvid")


def clip_of(*numbers, labelled=True):
    return [Frame(pathlib.Path(f"A_{n:05d}.png"), pathlib.Path("label") if labelled else None) for n in numbers]


def numbers(windows):
    return [[data.number(frame) for frame in window] for window in windows]


# ---- windows

def test_windows_stay_in_a_clip_and_between_long_gaps():
    a, b = clip_of(0, 30, 60, 110, 140, 170), clip_of(30, 60, 90)         # the gap of 50 is over 1.5 * 30
    assert numbers(sequences([a, b], 3)) == [[0, 30, 60], [110, 140, 170], [30, 60, 90]]
    assert numbers(sequences([clip_of(0, 30, 75)], 3)) == [[0, 30, 75]]    # the median step is 37.5: 45 is no long gap
    assert numbers(sequences([clip_of(0, 30, 59, 90)], 4)) == [[0, 30, 59, 90]]      # 29 / 31 is no gap
    assert sequences([clip_of(5)], 2) == [] and len(sequences([clip_of(5)], 1)) == 1


def test_windows_of_frames_without_numbers():
    clip = [Frame(name, "label") for name in "abcd"]
    assert sequences([clip], 3) == [clip[:3], clip[1:]]


def test_windows_need_labels_after_their_first_frame():
    before, this = clip_of(18, labelled=False), clip_of(19)
    assert numbers(sequences([before + this], 2)) == [[18, 19]]
    assert sequences([this + clip_of(20, labelled=False)], 2) == []
    assert sequences([before], 1) == []


@needs_camvid
@pytest.mark.parametrize("split, clips, windows", [("train", [62, 101, 204], 357), ("val", [101], 99), ("test", [62, 171], 229)])
def test_camvid_clips_and_windows(split, clips, windows):
    dataset = CamVid(CAMVID, split)
    assert [len(clip) for clip in dataset.clips] == clips
    assert len(sequences(dataset.clips, 3)) == windows
    image, label = dataset.read(dataset.clips[0][0])
    assert image.shape == (360, 480, 3) and image.dtype == label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(11), 255}


# ---- small datasets on disk

def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def camvid(tmp_path):
    """Two clips of three frames of 6x8 in each split; labels count 0..11."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for clip in ("0001TP", "Seq05VD"):
            for t in (0, 30, 60):
                name = f"{clip}_f{t:05d}" if clip == "Seq05VD" else f"{clip}_{t:06d}"
                write(tmp_path / split / f"{name}{'.jpg' if t else '.png'}", rng.integers(0, 256, (6, 8, 3), np.uint8))
                write(tmp_path / f"{split}annot" / f"{name}.png", (np.arange(48).reshape(6, 8) % 12).astype(np.uint8))
    return tmp_path


def test_small_camvid_is_read(camvid):
    dataset = CamVid(camvid, "train")
    assert [[f.image.name for f in clip] for clip in dataset.clips] == [
        ["0001TP_000000.png", "0001TP_000030.jpg", "0001TP_000060.jpg"],
        ["Seq05VD_f00000.png", "Seq05VD_f00030.jpg", "Seq05VD_f00060.jpg"]]
    _, label = dataset.read(dataset.clips[0][1])
    assert label.tolist() == [[255 if v % 12 == 11 else v % 12 for v in range(8 * r, 8 * r + 8)] for r in range(6)]
    frames = Frames(dataset)
    images, labels = frames[torch.tensor([[0, 1], [4, 5]])]
    assert images.shape == (2, 2, 6, 8, 3) and labels.shape == (2, 2, 6, 8)
    assert (images[1, 1].numpy() == dataset.read(dataset.clips[1][2])[0]).all()
    assert frames.windows(3).tolist() == [[0, 1, 2], [3, 4, 5]] and frames.clips() == [[0, 1, 2], [3, 4, 5]]
    read = Frames(dataset, in_memory=False)[torch.tensor([[0, 1], [4, 5]])]
    assert all(torch.equal(a, b) for a, b in zip(read, (images, labels)))


def test_cityscapes(tmp_path):
    city = "aachen"
    name = f"{city}_000001_000019"
    raw = np.arange(34, dtype=np.uint8).reshape(2, 17)
    write(tmp_path / "gtFine" / "train" / city / f"{name}_gtFine_labelIds.png", raw)
    folder = tmp_path / "leftImg8bit_sequence" / "train" / city
    write(folder / f"{name}_leftImg8bit.png", np.zeros((2, 17, 3), np.uint8))
    with pytest.raises(InputError, match="000018_leftImg8bit.png: no such file"):
        CityScapes(tmp_path, "train")
    write(folder / f"{city}_000001_000018_leftImg8bit.png", np.full((2, 17, 3), 9, np.uint8))
    dataset = CityScapes(tmp_path, "train")
    (before, this), = dataset.clips
    # The official table, written out: road 7, sidewalk 8, building 11, wall 12, fence 13, pole 17, light 19, sign 20,
    # vegetation 21, terrain 22, sky 23, person 24, rider 25, car 26, truck 27, bus 28, train 31, motorcycle 32, bicycle 33.
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
                28: 15, 31: 16, 32: 17, 33: 18}
    assert dataset.read(this)[1].ravel().tolist() == [expected.get(v, 255) for v in range(34)]
    image, label = dataset.read(before)
    assert image[0, 0, 0] == 9 and (label == 255).all()
    assert len(sequences(dataset.clips, 2)) == 1 and len(dataset.classes) == len(dataset.palette) == 19


def test_synthetic_is_deterministic_and_has_its_classes():
    a, b, other = Synthetic(None, "train"), Synthetic("anything", "train"), Synthetic(None, "train", seed=1)
    frame = a.clips[3][2]
    assert all((x == y).all() for x, y in zip(a.read(frame), b.read(frame)))
    assert (a.read(frame)[0] != other.read(frame)[0]).any()
    seen = np.unique([a.read(clip[0])[1] for clip in a.clips])
    assert seen.tolist() == list(range(len(a.classes))) and len(a.classes) >= 5
    test = Synthetic(None, "test")
    assert (test.read(test.clips[0][0])[0] != a.read(a.clips[0][0])[0]).any()


def test_synthetic_is_ambiguous_in_one_frame():
    """A grey shape looks the same whatever its class; and a class is shown as often as not."""
    dataset = Synthetic(None, "train")
    colour, grey, all_pixels = {}, 0, 0
    for clip in dataset.clips:
        image, label = dataset.read(clip[1])
        saturation = image.max(2).astype(int) - image.min(2)
        for kind in range(1, 6):
            inside = label == kind
            dull = inside & (np.abs(image.astype(int) - 150).max(2) < 30) & (saturation < 70)
            colour.setdefault(kind, []).append(image[dull])
            grey, all_pixels = grey + dull.sum(), all_pixels + inside.sum()
    means = np.array([np.concatenate(c).mean(0) for c in colour.values()])
    assert np.ptp(means, axis=0).max() < 3 and 0.35 < grey / all_pixels < 0.65


# ---- bad input: one line, the file, the remedy

def break_file(path):
    path.write_bytes(path.read_bytes()[:60])


FAULTS = {
    "truncated image": (lambda d: break_file(d / "train/0001TP_000000.png"), "0001TP_000000.png: is not an image"),
    "truncated jpeg": (lambda d: break_file(d / "train/0001TP_000030.jpg"), "0001TP_000030.jpg: is not an image"),
    "sizes differ": (lambda d: write(d / "trainannot/0001TP_000000.png", np.zeros((6, 7), np.uint8)), "7 x 6, but its image"),
    "label out of range": (lambda d: write(d / "trainannot/0001TP_000030.png", np.full((6, 8), 12, np.uint8)), "label value 12"),
    "coloured label": (lambda d: write(d / "trainannot/0001TP_000030.png", np.zeros((6, 8, 3), np.uint8)), "mode RGB"),
    "16-bit image": (lambda d: write(d / "train/0001TP_000000.png", np.zeros((6, 8), np.uint16)), "mode I;16"),
    "another size": (lambda d: [write(d / "train/0001TP_000000.png", np.zeros((9, 8, 3), np.uint8)),
                                write(d / "trainannot/0001TP_000000.png", np.zeros((9, 8), np.uint8))], "must have one size"),
    "missing label": (lambda d: (d / "trainannot/0001TP_000000.png").unlink(), "has no label trainannot/0001TP_000000.png"),
    "missing labels": (lambda d: (d / "trainannot").rename(d / "elsewhere"), "trainannot: no such folder"),
    "a name": (lambda d: (d / "train/0001TP_000000.png").rename(d / "train/picture.png"), "picture.png: the name is not"),
    "empty split": (lambda d: [p.unlink() for p in (d / "train").iterdir()], "no frame in split 'train'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_file_is_named_in_one_line(camvid, fault):
    do, message = FAULTS[fault]
    do(camvid)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        Frames(CamVid(camvid, "train"))
    if fault != "another size":
        assert "\n" not in str(error.value)


def test_all_problems_are_listed(camvid):
    for path in (camvid / "train").iterdir():
        break_file(path)
    with pytest.raises(InputError, match="^6 problems in split 'train':") as error:
        Frames(CamVid(camvid, "train"))
    assert str(error.value).count("is not an image") == 6


def test_grey_palette_and_rgba_images_are_read(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(rgb).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, np.full((4, 5), 7, np.uint8)])).save(tmp_path / "rgba.png")
    assert data.read_image(tmp_path / "grey.png").shape == (4, 5, 3)
    assert (data.read_image(tmp_path / "rgba.png") == rgb).all()


# ---- transforms

def random_batch(B=3, T=2, H=20, W=30):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (B, T, H // 5, W // 5), generator=rng).repeat_interleave(5, 2).repeat_interleave(5, 3)
    images = (labels * 20)[..., None].expand(B, T, H, W, 3)               # so that the image tells the label
    return images.to(torch.uint8), labels.to(torch.uint8)


def test_augment_identity_and_flip():
    images, labels = random_batch()
    out, label = data.augment(images, labels, (20, 30), flip=False)
    assert torch.equal(label, labels) and torch.allclose(out, data.normalise(images), atol=1e-4)
    seen = set()
    for seed in range(8):
        out, label = data.augment(images, labels, (20, 30), generator=torch.Generator().manual_seed(seed))
        for b in range(3):
            flipped = torch.equal(label[b], labels[b].flip(-1)) and torch.allclose(out[b], data.normalise(images[b]).flip(-1), atol=1e-4)
            kept = torch.equal(label[b], labels[b]) and torch.allclose(out[b], data.normalise(images[b]), atol=1e-4)
            assert flipped or kept                                        # both frames of a sequence alike
            seen.add(flipped)
    assert seen == {True, False}


def test_augment_keeps_image_and_label_together():
    """Where the nearest label's neighbourhood is flat, the image says the label; outside, mean and 255."""
    images, labels = random_batch(B=40)
    out, label = data.augment(images, labels, (24, 24), (0.5, 2.0), generator=torch.Generator().manual_seed(1))
    assert out.shape == (40, 2, 3, 24, 24) and label.shape == (40, 2, 24, 24) and label.dtype == torch.uint8
    mean, deviation = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.DEVIATION)[:, None, None]
    said = ((out * deviation + mean) * 255 / 20)
    close = ((said - label[:, :, None].float()).abs() < 0.05).all(2)
    inside, outside = label != 255, label == 255
    assert close[inside].float().mean() > 0.5                             # the rest are borders of 5-pixel squares
    assert outside.any() and (out.abs().amax(2)[outside] < 1e-3).float().mean() > 0.8
    for b in range(40):                                                   # one transform for a whole sequence
        assert torch.equal(label[b, 0] == 255, label[b, 1] == 255)


def test_augment_crop_without_scaling_is_a_window_of_the_image():
    images, labels = random_batch(B=1, T=1)
    images = torch.arange(20 * 30).reshape(1, 1, 20, 30, 1).remainder(251).expand(-1, -1, -1, -1, 3).to(torch.uint8)
    out, label = data.augment(images, labels, (20, 12), flip=False, generator=torch.Generator().manual_seed(3))
    start = 18 * torch.rand(4, 1, generator=torch.Generator().manual_seed(3))[1].item()         # a fractional column
    left, part = int(start), start - int(start)
    source = data.normalise(images)
    expected = (1 - part) * source[..., left:left + 12] + part * source[..., left + 1:left + 13]
    assert torch.allclose(out, expected, atol=1e-3)


def test_pad_as_the_paper_does():
    images, labels = data.pad(torch.ones(2, 3, 360, 480), torch.zeros(2, 360, 480, dtype=torch.uint8), 400)
    assert images.shape == (2, 3, 400, 480) and labels.shape == (2, 400, 480)
    assert (labels[:, :20] == 255).all() and (labels[:, -20:] == 255).all() and (labels[:, 20:-20] == 0).all()
    assert (images[:, :, :20] == 0).all() and (images[:, :, 20:-20] == 1).all()
    assert data.pad(torch.ones(1, 3, 50, 20), torch.zeros(1, 50, 20), 31)[0].shape == (1, 3, 50, 31)
    assert data.pad(torch.ones(1, 3, 50, 20), torch.zeros(1, 50, 20), 0)[0].shape == (1, 3, 50, 20)


# ---- scores

def test_scores_against_naive_counts():
    rng = np.random.default_rng(0)
    label, pred = rng.integers(0, 7, (4, 9, 11)), rng.integers(0, 7, (4, 9, 11))
    label[label == 5] = 255                                               # class 5: predicted only
    label[label == 6], pred[pred == 6] = 0, 1                             # class 6: nowhere
    confusion = Confusion(7)
    for p, l in zip(pred, label):                                         # in parts
        confusion.update(torch.from_numpy(p), torch.from_numpy(l))
    iou, accuracy, weighted, valid = [], [], 0, label != 255
    for c in range(7):
        both = sum(p == c and l == c for p, l in zip(pred[valid], label[valid]))
        either = sum(p == c or l == c for p, l in zip(pred[valid], label[valid]))
        labelled = sum(l == c for l in label[valid])
        if either:
            iou.append(both / either)
            weighted += labelled / valid.sum() * both / either
        if labelled:
            accuracy.append(both / labelled)
    scores = confusion.scores()
    assert len(iou) == 6 and len(accuracy) == 5 and np.isnan(scores.iou[6])
    assert np.allclose(scores.iou[:6], iou) and np.isclose(scores.miou, np.mean(iou)) and np.isclose(scores["fwiou"], weighted)
    assert np.isclose(scores.macc, np.mean(accuracy))
    assert np.isclose(scores.reward, np.prod([np.mean(iou), weighted, np.mean(accuracy)]) ** (1 / 3))


def test_scores_by_hand():
    confusion = Confusion(2)
    confusion.update(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 255]))
    scores = confusion.scores()
    assert scores.iou == pytest.approx([1 / 2, 2 / 3])
    assert (scores.miou, scores.fwiou, scores.macc) == pytest.approx((7 / 12, 1 / 4 * 1 / 2 + 3 / 4 * 2 / 3, 5 / 6))
    assert Confusion(3).scores().reward == 0


@pytest.mark.parametrize("pred, label", [([2], [0]), ([0], [2]), ([-1], [0]), ([5], [1]), ([0, 1], [0])])
def test_scores_refuse_what_is_no_class(pred, label):
    with pytest.raises(ValueError):
        Confusion(2).update(torch.tensor(pred), torch.tensor(label))


def test_consistency_by_hand():
    steady = Consistency(3)
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 1, 255]], [[0, 1, 1, 255]]])     # pixel 2 changes, pixel 3 is ignored
    preds = torch.tensor([[[0, 1, 2, 0]], [[0, 0, 1, 0]], [[0, 1, 1, 0]]])            # pixel 1 is wrong once
    steady.update(preds, labels)
    assert steady.score() == 0.5
