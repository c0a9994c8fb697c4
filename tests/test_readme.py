"""The README's Python runs as it stands, and its files and flags are there."""
import pathlib
import re

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_a_snippet_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames").mkdir()
    (tmp_path / "networks").symlink_to(ROOT / "networks")
    for name in "12":                                     # two small frames for the first one
        Image.effect_noise((80, 60), 99).convert("RGB").save(tmp_path / "frames" / f"{name}.png")
    names = {}
    exec(SNIPPETS[number], names)
    if number == 0:
        assert names["labels"].shape == (60, 80)
    else:
        assert names["y"].shape == (1, 8, 32, 32)
        assert (names["tokens"] == 3).double().mean() > 0.5   # at random: 1/6


def test_every_file_it_names_is_there():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    named = re.findall(r"`((?:util|docs|experiment|networks)/\w+\.\w+)`", README)
    for path in links + named:
        assert (ROOT / path).exists(), path
