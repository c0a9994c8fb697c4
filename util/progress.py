"""One line of progress, for everything that takes a long time."""
import sys
import time


class Progress:
    """One line of progress. On a terminal it is rewritten; otherwise a new line appears every 30 seconds.

    total: number of all steps, 0 if unknown; done: steps made before. After 20 seconds one line estimates
    how long the rest will take on this device."""

    stage = ""                               # "[2/4] " in stage 2 of a command with four stages

    def __init__(self, title, total, done=0, unit=""):
        self.title, self.total, self.first, self.unit = title, total, done, unit
        self.start = self.last = time.time()
        self.tty, self.estimated = sys.stdout.isatty(), False

    def update(self, done, **figures):
        now, made = time.time(), done - self.first
        left = (now - self.start) / max(made, 1) * (self.total - done)
        if self.total and not self.estimated and made > 1 and now - self.start > 20:
            self.estimated = True
            each = (now - self.start) / made
            self.say(f"{self.stage}{self.title}: {self.total} steps, {each:.2f} s each: about "
                     f"{duration(left)} left")
        if now - self.last > (0.2 if self.tty else 30) or done == self.total:
            self.last = now
            text = f"{self.stage}{self.title} {done:,}{f'/{self.total:,}' if self.total else ''}{self.unit}  "
            text += "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            text += f"  {duration(left)} left" if self.total and done < self.total else ""
            self.say(text, end="" if self.tty and done != self.total else "\n")

    def show(self, done, total):
        """update() for work whose total is known only after it has begun."""
        self.total = total
        self.update(done)

    def say(self, text, end="\n"):
        """Prints a line in place of the line of progress."""
        print(("\r\033[K" if self.tty else "") + text.rstrip(), end=end, flush=True)


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
