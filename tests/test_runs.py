"""Whole runs: killed, on a full disk, twice, by several processes. All end with the numbers of a run left alone."""
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import train

ROOT = pathlib.Path(train.__file__).parent
KILLS = int(os.environ.get("KILLS", 24))     # KILLS=50 python -m pytest tests/test_runs.py -k killed: the long form

# A smoke run on few, short videos. Forked off a process that has imported torch but never used it: that saves the
# import's seconds at each of many starts. Reads "FOLDER LIMIT" and says the process's number, then its exit status.
SERVER = """
import os, resource, sys
import data, train
data.Synthetic.SPLITS = {"train": (5, 6), "val": (1, 4), "test": (2, 4)}
train.SAVE_SECONDS = 0
for line in sys.stdin:
    folder, limit = line.split()
    pid = os.fork()
    if not pid:
        out = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        if int(limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        try:
            data.run_main(lambda: train.main(
                ["--schedule", "smoke", "--search-strategy", "both", "--static-epochs", "3", "--search-batch", "4", "--meta-val-share", "0.2",
                 "--cell-batch", "4", "--cells", "1", "--key-frames", "0", "3", "--run", folder]))
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    def run(self, folder, kill=None, limit=0):
        """One start of the command; kill: (seconds, signal). Its exit status (negative: the signal that ended it)."""
        self.process.stdin.write(f"{folder} {limit}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill:
            time.sleep(kill[0])
            with contextlib.suppress(ProcessLookupError):                 # it may be done
                os.kill(pid, kill[1])
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


def outcome(folder):
    """What must not depend on how often a run was stopped: all but the measured times."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        del row["ms_encoder"], row["ms_key_frame"], row["ms_later_frame"]
    logs = {}
    for name in ("search.jsonl", "random.jsonl"):
        logs[name] = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for entry in logs[name]:
            del entry["seconds"]
    weights = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    for saved in weights.values():
        for epoch in saved.get("history", ()):
            del epoch["seconds"]
    return results, logs, sorted(path.name for path in folder.glob("figures/*")), weights


def same(a, b):
    """Equality, tensors included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("whole") / "run", time.time()
    assert server.run(folder) == 0, pathlib.Path(f"{folder}.out").read_text()
    return outcome(folder), time.time() - start


def test_the_same_command_gives_the_same_numbers(server, whole, tmp_path):
    assert server.run(tmp_path / "run") == 0
    assert same(outcome(tmp_path / "run"), whole[0])


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_numbers(server, whole, tmp_path):
    rng, kills, folder, starts = random.Random(0), {}, tmp_path / "0", 0
    while True:
        starts += 1
        wanted = sum(kills.values()) < KILLS
        kill = (rng.uniform(0.1, whole[1] / 6), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])) if wanted else None
        status = server.run(folder, kill)
        assert status in (0, -9, -15, 130, 143), pathlib.Path(f"{folder}.out").read_text()[-3000:]
        assert starts < 10 * KILLS
        if status:
            kills[status] = kills.get(status, 0) + 1
            continue
        assert same(outcome(folder), whole[0])
        assert not list(folder.glob("*.partial*"))
        if not wanted:
            break
        folder = tmp_path / str(starts)      # done before the kill came: the rest of the kills in another folder
    print(f"{kills} in {starts} starts")


def test_a_full_disk_is_told_and_the_run_goes_on(server, whole, tmp_path):
    folder = tmp_path / "run"
    for limit in (100, 100_000, 10_000_000):                              # recipe.json, static.partial.pt or .pt don't fit
        assert server.run(folder, limit=limit) == 2
        assert pathlib.Path(f"{folder}.out").read_text().splitlines()[-1].startswith("error: [Errno 27] File too large")
        assert not list(folder.glob("*.writing"))
    assert server.run(folder) == 0
    assert same(outcome(folder), whole[0])


# ---- several processes

WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, train
data.Synthetic.SPLITS = {{"train": (5, 6), "val": (1, 4), "test": (2, 4)}}
train.SAVE_SECONDS, calls, train_step = 0, 0, train.train_step

def counted(*arguments):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*arguments)

train.train_step = counted
data.run_main(train.main)
"""


def torchrun(folder, arguments, die_at=0):
    script = folder.parent / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", script, *arguments, "--run", folder],
                          env={**os.environ, "OMP_NUM_THREADS": "1", "DIE_AT": str(die_at)}, capture_output=True, text=True)


SMOKE = ("--schedule smoke --search-strategy both --static-epochs 3 --search-batch 4 --meta-val-share 0.2 --cell-batch 4 --cells 1 "
         "--key-frames 0 3").split()         # the server's


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_search_the_same_candidates_as_one(server, whole, tmp_path):
    """On the same static network; in a round the faster process takes more, so the log's lines may come in another order."""
    alone, folder = tmp_path / "alone", tmp_path / "two"
    assert server.run(alone) == 0
    folder.mkdir()
    for name in ("static.pt", "recipe.json"):
        (folder / name).write_bytes((alone / name).read_bytes())
    done = torchrun(folder, ["--stage", "search"])
    assert done.returncode == 0, done.stderr
    for name, log in whole[0][1].items():
        entries = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert [{key: entry[key] for key in entry if key != "seconds"} for entry in sorted(entries, key=lambda entry: entry["candidate"])] == log
    a, b = (torch.load(path / "controller.pt", weights_only=True)["controller"] for path in (alone, folder))
    assert same(a, b)


def test_a_worker_that_dies_stops_the_run_and_the_run_goes_on(tmp_path):
    done = torchrun(tmp_path / "whole", SMOKE)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "died"
    for die_at in (5, 12, 20):               # of a process's steps: pretrain has 3, then come search and finetune
        died = torchrun(folder, SMOKE, die_at)
        assert died.returncode != 0 and not (folder / "results.json").exists()
    done = torchrun(folder, SMOKE)
    assert done.returncode == 0, done.stderr
    a, b = outcome(tmp_path / "whole"), outcome(folder)
    for logs in (a[1], b[1]):
        for log in logs.values():
            log.sort(key=lambda entry: entry["candidate"])
    assert same(a, b)
