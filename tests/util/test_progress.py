"""The line of progress, on a terminal and elsewhere; the clock is a list of times."""
import io
import sys

from util import progress
from util.progress import Progress


def printed(monkeypatch, stdout, times, *done, total=10, **more):
    clock = iter(times)
    with monkeypatch.context() as patch:
        patch.setattr(progress.time, "time", lambda: next(clock))
        patch.setattr(sys, "stdout", stdout)
        line = Progress("search", total, **more)
        for k in done:
            line.update(k, loss=0.25)
    return stdout.getvalue()


def test_the_first_step_is_shown_and_the_time_left(monkeypatch):
    text = printed(monkeypatch, io.StringIO(), (0, 2, 7, 42, 50), 1, 2, 5, 10)
    assert text.splitlines() == [                         # the second comes 5 seconds after the first
        "search 1/10  loss 0.25  18 s left",              # 9 steps of 2 s
        "search 5/10  loss 0.25  50 s left",              # 5 steps of 40 s / 4: the first step is left out
        "search 10/10  loss 0.25"]
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(Progress, "stage", "[2/4] ")
    monkeypatch.setattr(Progress, "after", 36000.0)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    text = printed(monkeypatch, terminal, (0, 5), 7, total=1_000, done=2)
    assert text == "\r\033[K[2/4] search 7/1,000  loss 0.25  17 min left, 10.3 h of all"         # 60 columns
    assert printed(monkeypatch, io.StringIO(), (0, 1), 3, total=0) == "[2/4] search 3  loss 0.25\n"
