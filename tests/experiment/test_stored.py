"""util/stored.py: what is put in comes out, cropped at one place a sequence."""
import pytest
import torch

from experiment.stored import STRIDE, Stored

CHANNELS = {"layer2": 3, "layer3": 3, "layer4": 3, "dec": 4}


def maps_of(numbers, height, width):
    """Maps whose pixels tell their frame, row and column, in image pixels; labels: of all three."""
    maps = {}
    for name, channels in CHANNELS.items():
        stride = STRIDE[name]
        rows, cols = torch.arange(0, height, stride), torch.arange(0, width, stride)
        x = torch.zeros(len(numbers), channels, len(rows), len(cols))
        x[:, 0], x[:, 1], x[:, 2] = numbers[:, None, None], rows[:, None], cols
        maps[name] = x
    rows, cols = torch.arange(height)[:, None], torch.arange(width)
    maps["labels"] = ((numbers[:, None, None] + rows // 4 + cols) % 256).to(torch.uint8)
    return maps


def stored_of(windows, height, width, crop, mirrored=False, count=20):
    stored = Stored(windows, count, mirrored, crop)
    for numbers in stored.parts(3):
        stored.put(numbers, **maps_of(numbers, height, width))
    return stored


WINDOWS = torch.tensor([[2, 3], [3, 4], [9, 10], [12, 13], [18, 19]])


def test_frames_that_are_no_larger_than_the_crop_are_not_cropped_and_nothing_is_drawn():
    """CamVid's: 480 x 400, crop 600."""
    stored, rng = stored_of(WINDOWS, 40, 48, 60), torch.Generator().manual_seed(0)
    before, sequences = rng.get_state(), stored.pick(WINDOWS[[3, 0]], rng)
    for t, numbers in enumerate(WINDOWS[[3, 0]].T):
        for name, expected in maps_of(numbers, 40, 48).items():
            assert torch.equal(sequences(name, t), expected)
            assert sequences(name, t).dtype == expected.dtype
    assert sequences.length == 2 and torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("height, width, crop", [(64, 160, 64), (160, 96, 64), (112, 136, 64)])
def test_a_sequence_of_large_frames_is_cropped_at_a_random_place_its_own(height, width, crop):
    """All of its maps and frames at the same place; every multiple of 32 pixels is one."""
    stored, rng, places = stored_of(WINDOWS, height, width, crop), torch.Generator().manual_seed(0), []
    for autocast in [False, True] * 20:                                  # a cell is trained under autocast
        sequences = stored.pick(WINDOWS, rng)
        top, left = (sequences("layer2", 0)[:, channel, 0, 0].int().tolist() for channel in (1, 2))
        places += zip(top, left)
        for t, numbers in enumerate(WINDOWS.T):
            for name, whole in maps_of(numbers, height, width).items():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found, step, size = sequences(name, t), STRIDE[name], crop // STRIDE[name]
                for b in range(len(WINDOWS)):
                    row, col = top[b] // step, left[b] // step
                    assert torch.equal(found[b], whole[b, ..., row:row + size, col:col + size])
    assert len(set(places[:5])) > 1                                       # within a batch, too
    for side, found in zip((height, width), zip(*places)):
        assert set(found) == set(range(0, side - crop + 1, 32))


def test_the_same_seed_crops_at_the_same_places():
    stored = stored_of(WINDOWS, 64, 160, 64)
    a, b, other = (stored.pick(WINDOWS, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a("dec", 1), b("dec", 1)) and not torch.equal(a("dec", 1), other("dec", 1))
    longer = stored_of(WINDOWS, 64, 72, 64)                               # by less than a step of 32
    assert longer.pick(WINDOWS)("labels", 0).shape == (5, 64, 64)


def test_only_the_frames_of_the_windows_are_stored_in_place_and_once():
    """Else a search's memory would be twice as large while it is filled."""
    stored, places = Stored(WINDOWS, 20, True, 64), set()
    for numbers in stored.parts(4):
        stored.put(numbers, **maps_of(numbers, 40, 48))
        places.add(tuple(x.data_ptr() for x in stored.maps.values()))
    frames = [2, 3, 4, 9, 10, 12, 13, 18, 19]
    assert stored.numbers.tolist() == frames + [20 + k for k in frames] and len(places) == 1
    assert [stored.maps[name].dtype for name in ("dec", "labels")] == [torch.half, torch.uint8]
    for name, x in stored.maps.items():
        assert len(x) == 18
        assert name == "labels" or x.is_contiguous(memory_format=torch.channels_last)
    assert stored.megabytes() == sum(x.numel() * x.element_size() for x in stored.maps.values()) / 1e6
    mirrored = stored.pick(WINDOWS + 20)
    assert mirrored("dec", 0)[:, 0, 0, 0].tolist() == (WINDOWS[:, 0] + 20).tolist()


def test_dropout_zeroes_whole_channels_of_features_and_never_labels():
    torch.manual_seed(0)
    stored = Stored(WINDOWS, 20, False, None)
    ones = {"dec": torch.ones(9, 64, 2, 3), "labels": torch.ones(9, 16, 24, dtype=torch.uint8)}
    for numbers in stored.parts(100):
        stored.put(numbers, **ones)
    x = stored.pick(WINDOWS, dropout=0.25)("dec", 1)
    gone = (x == 0).all((2, 3))
    assert ((x == 1 / 0.75).all((2, 3)) | gone).all() and 0.15 < gone.float().mean() < 0.35
    assert (stored.pick(WINDOWS, dropout=0.25)("labels", 1) == 1).all()


class Transfers(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what goes from the CPU to another device."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and args[0].device.type == "cpu" and result.device.type != "cpu":
            self.count += 1
        return result


def test_the_frame_numbers_of_a_batch_move_to_the_device_once():
    """A transfer waits for the device. Here it is "meta", which has shapes but no content."""
    stored = stored_of(WINDOWS, 40, 48, 60)
    stored.maps = {name: x.to("meta") for name, x in stored.maps.items()}
    with Transfers() as transfers:
        sequences = stored.pick(WINDOWS[[3, 0]])
        shapes = {sequences(name, t).shape for name in (*CHANNELS, "labels") for t in range(2)}
    assert transfers.count == 1 and (2, 4, 5, 6) in shapes
