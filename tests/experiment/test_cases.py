"""What people do with a run: a test of each kind of use."""
import json

import pytest
from whole_run import arguments_of, small, smoke

import data
import train
from data import InputError
from dyncell import CELLS, Arch2
from experiment import networks, runs
from util import files
from util.progress import Progress


def test_too_little_memory_is_told_with_the_flags_that_help(small, tmp_path, monkeypatch):
    def forward(*_):
        raise MemoryError
    monkeypatch.setattr(Arch2, "forward_auxiliary", forward)
    with pytest.raises(InputError, match="pretrain: out of memory on cpu .*--static-batch") as told:
        train.main(["--schedule", "smoke", "--run", str(tmp_path / "run")])
    assert "\n" not in str(told.value) and Progress.stage == ""


def test_what_the_machine_lacks_is_said_and_stops_nothing(small, tmp_path, monkeypatch, capsys):
    """No fcntl to lock with (Windows), and ranks in the environment that are not torchrun's."""
    monkeypatch.setattr(runs, "fcntl", None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    train.main(["--schedule", "smoke", "--run", str(tmp_path / "run"), "--stage", "pretrain"])
    assert (tmp_path / "run" / "static.pt").exists()
    assert "can't be locked here" in capsys.readouterr().out


def test_a_cell_is_a_name_a_file_a_checkpoint_or_a_text(smoke, tmp_path):
    own = files.load(smoke / "cell-0.pt")["genotype"]
    (tmp_path / "own.json").write_text(own)
    name, genotype = networks.cell_of(own)
    assert name.startswith("custom-") and len(name) == len("custom-") + 6
    for text in (str(tmp_path / "own.json"), str(smoke / "cell-0.pt"), str(genotype),
                 *networks.cell_texts([own]), json.dumps(genotype.to_tokens())):
        assert networks.cell_of(text) == (name, genotype)
    assert networks.cell_of("decoder") == ("decoder", "decoder")
    for text in ("warp", CELLS["warp"].to_json(), str(CELLS["warp"])):
        assert networks.cell_of(text) == ("warp", CELLS["warp"]) and networks.cell_texts([text]) == ("warp",)


def test_sparse_labels_and_splits_of_different_sizes_train(small, tmp_path, monkeypatch):
    class Mine(data.Synthetic):
        def __init__(self, root, split):
            super().__init__(root, split)
            self.SIZE = {"train": (48, 64), "val": (32, 64), "test": (64, 96)}[split]
            for clip in self.clips:
                clip[::2] = [frame._replace(label=None) for frame in clip[::2]]

        def read(self, frame):
            image, label = super().read(frame)
            return image, label if frame.label else label * 0 + data.IGNORE

    monkeypatch.setattr(data.Synthetic, "SPLITS", {"train": (2, 6), "val": (1, 6), "test": (1, 6)})
    monkeypatch.setitem(data.DATASETS, "mine", Mine)
    (tmp_path / "root").mkdir()
    flags = ("--dataset mine --schedule smoke --encoder-weights none --static-lr-encoder 0.001 "
             "--static-batch 4 --search-batch 2 --cell-batch 2 --cells 0 --cell concat")
    train.main([*flags.split(), "--data", str(tmp_path / "root"), "--run", str(tmp_path / "run")])
    text = (tmp_path / "run" / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)                # no NaN
    assert results["rows"][0]["test"]["consistency"] is None
    assert files.load(tmp_path / "run" / "static.pt")["size"] == (48, 64)


def test_it_says_the_stage_and_at_the_end_what_to_do_next(smoke, small, capsys):
    said = (smoke.parent / "run.out").read_text()
    assert "evaluate: stage 4 of 4" in said and "[4/4] cell-0 on test 8/8" in said
    assert "These numbers mean nothing" in said and f"--stage predict --run {smoke} --input" in said
    train.main([*arguments_of(smoke), "--stage", "search"])
    assert "next: the same command with --stage finetune" in capsys.readouterr().out
