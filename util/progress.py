"""One line of progress, for everything that takes a long time."""
import shutil
import sys
import time


class Progress:
    """One line of progress, rewritten on a terminal; elsewhere a line at the first step and every 30 seconds.
    total: number of all steps, 0 if unknown; done: steps that were made before."""

    stage = ""                               # "[2/4] " in stage 2 of a command with four stages
    ends = 0                                 # time when this stage is expected to end: it may have more lines
    after = None                             # seconds expected for the later stages, if known

    def __init__(self, title, total, done=0):
        self.title, self.total, self.first = title, total, done
        self.start, self.last = time.time(), None
        self.tty = getattr(sys.stdout, "isatty", lambda: False)()         # stdout may be None

    def update(self, done, total=None, **figures):
        """A step. total: for work whose total is known only after it has begun."""
        now, self.total = time.time(), total or self.total
        pace = (now - self.start) / max(done - self.first, 1)             # seconds a step
        if self.last is None:                # the first step warms up: later estimates leave it out
            self.first, self.start = done, now
        elif now - self.last < (0.2 if self.tty else 30) and done != self.total:
            return
        self.last = now
        text = f"{self.stage}{self.title} {done:,}" + (f"/{self.total:,}" if self.total else "")
        text += "".join(f"  {name} {value:.4g}" for name, value in figures.items())
        if done < self.total:
            left = pace * (self.total - done)
            text += f"  {duration(left)} left"
            if self.after is not None:
                text += f", {duration(max(left, self.ends - now) + self.after)} of all stages"
        self.say(text, end="" if self.tty and done != self.total else "\n")

    def say(self, text, end="\n"):
        """Prints a line in place of the line of progress."""
        if self.tty and not end:             # a line that wraps could not be rewritten
            text = text[:shutil.get_terminal_size().columns - 1]
        print("\r\033[K" * self.tty + text.rstrip(), end=end, flush=hasattr(sys.stdout, "flush"))


def duration(seconds):
    """52 s, 80 min, 7.5 h, 12 days"""
    for unit, length, most in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
