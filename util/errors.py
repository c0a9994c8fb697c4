"""Mistakes of the user, and how a script reports them: one line, exit status 2."""
import contextlib
import signal
import sys

import torch


class InputError(ValueError):
    """A mistake in the user's input. The message is one line that names the file or flag and the remedy.
    A dataset may have many problems: InputError(*lines) gives their number and shows the first ten."""

    def __str__(self):
        if len(self.args) == 1:
            return str(self.args[0])
        first = ", the first ten" if len(self.args) > 10 else ""
        return "\n  ".join([f"{len(self.args)} problems{first}:", *self.args[:10]])


def each(function, splits):
    """{split: function(split)}. Raises one InputError with the problems of all splits."""
    results, problems = {}, []
    for split in splits:
        try:
            results[split] = function(split)
        except InputError as error:
            problems += error.args
    if problems:
        raise InputError(*dict.fromkeys(problems))        # a problem of several splits appears once
    return results


def run_main(main):
    """Runs a script's main(). What the user can remove (InputError, a read-only folder, a full disk) ends it
    with one line and status 2, Ctrl-C and SIGTERM with one line. stdout: anything with write(), or None."""
    def stop(signum, _):
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(sys.stdout, "reconfigure"):   # an ASCII-only terminal shows ? in place of ±; a pipe each line
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = f"{error}; check this path, its permissions and the room on its disk, or take another"
        over_progress = "\r\033[K" if getattr(sys.stderr, "isatty", bool)() else ""
        print(f"{over_progress}error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def brief(error):
    """An exception's text, in one line and at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


REMEDY = {                                   # of a stage that takes too much memory
    "pretrain": "lower --static-batch or --static-crop",
    "search": "lower --search-batch or --input-crop",
    "finetune": "lower --cell-batch, --end-crop or --input-crop",
    **dict.fromkeys(("evaluate", "predict"), "give smaller frames, or pass --device cpu if that has more")}


def out_of_memory(error):
    """Whether an error means out of memory. On a GPU torch has a class for it, elsewhere only a text."""
    texts = "can't allocate memory", "out of memory", "BLAS_STATUS_ALLOC_FAILED", "DNN_STATUS_ALLOC_FAILED"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(x in str(error) for x in texts)


@contextlib.contextmanager
def told(stage, device):
    """A context for a stage: an out-of-memory error becomes an InputError that names the flags that help."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = brief(error).rpartition("Allocator: ")[2][:90]
        raise InputError(f"{stage}: out of memory on {device} ({reason}); {REMEDY[stage]}") from None
