"""Several programs measured in turns, each in a process of its own: whatever else the machine does falls on all.

A peer is a command. With `steady` it stays alive: it prints "ready" once it is set up, and for each line on stdin does
its work and prints one JSON object with `ms`. With `fresh` it is started anew each time, and prints that object with
`at`, the instant (time.monotonic, one clock for all processes) at which it was done; `ms` counts from its start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import IO, Any

Command = Sequence[str]
Samples = dict[str, list[dict[str, Any]]]


def steady(peers: Mapping[str, Command], repeats: int) -> Samples:
    """Samples of each peer, in rounds behind one that warms up. Peers that fail are named on stderr and left out."""
    with ExitStack() as stack:
        running = {}
        for name, command in peers.items():
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            stack.callback(_end, process)
            if _read(process, log, name) == "ready":
                running[name] = (process, log)
        return _rounds({name: _asker(name, *item) for name, item in running.items()}, repeats, warmup=1)


def fresh(peers: Mapping[str, Command], repeats: int, warmup: int) -> Samples:
    """The same with a new process for each sample, and so many rounds before."""
    return _rounds({name: _starter(name, command) for name, command in peers.items()}, repeats, warmup)


def report(samples: Samples, ours: str, key: str = "ms", *, more_is_better: bool = False) -> dict[str, Any]:
    """Print a table on stderr and one JSON line on stdout; return what is in it.

    times: how many times better `ours` is, of the medians; low and high of the extremes, against each other.
    """
    if ours not in samples:
        sys.exit(f"{ours} failed, so there is nothing to compare.")
    rows: dict[str, Any] = {}
    mine = [sample[key] for sample in samples[ours]]
    for name, found in samples.items():
        values = [sample[key] for sample in found]
        pairs = [(median(values), median(mine)), (min(values), max(mine)), (max(values), min(mine))]
        times, low, high = (1.0,) * 3 if name == ours else ratios(pairs, more_is_better)
        rows[name] = {"median": median(values), "low": min(values), "high": max(values), "times": times,
                      "times_low": low, "times_high": high, "samples": values, "last": found[-1]}  # fmt: skip
        sys.stderr.write(
            f"{name:24} {median(values):10.1f} ({min(values):.1f} to {max(values):.1f}) {key}   "
            f"{ours} is {times:.2f} times better ({low:.2f} to {high:.2f})\n"
        )
    sys.stdout.write(json.dumps({"key": key, "ours": ours, "peers": rows}) + "\n")
    return rows


def ratios(pairs: Sequence[tuple[float, float]], more_is_better: bool) -> tuple[float, float, float]:
    """(theirs, ours) of medians and of the two extremes -> how many times better ours is: median, low, high."""
    times = [(ours / theirs if more_is_better else theirs / ours) for theirs, ours in pairs]
    return times[0], min(times[1:]), max(times[1:])


def serve(work: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.perf_counter) -> None:
    """The other side of `steady`: work on each line, timed here unless `work` gives its own `ms`."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        start = clock()
        found = work()
        found.setdefault("ms", (clock() - start) * 1000)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def _rounds(askers: dict[str, Callable[[], dict[str, Any] | None]], repeats: int, warmup: int) -> Samples:
    samples: Samples = {name: [] for name in askers}
    for number in range(-warmup, repeats):
        for name, ask in list(askers.items()):
            found = ask()
            if found is None:
                del askers[name], samples[name]
            elif number >= 0:
                samples[name].append(found)
    return samples


def _asker(name: str, process: subprocess.Popen[str], log: IO[str]) -> Callable[[], dict[str, Any] | None]:
    def ask() -> dict[str, Any] | None:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
        answer = _read(process, log, name)
        return json.loads(answer) if answer else None

    return ask


def _starter(name: str, command: Command) -> Callable[[], dict[str, Any] | None]:
    def ask() -> dict[str, Any] | None:
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            sys.stderr.write(f"{name} failed: {_last_line(done.stderr)}\n")
            return None
        found.setdefault("ms", (found.get("at", 0.0) - start) * 1000)
        return found

    return ask


def _read(process: subprocess.Popen[str], log: IO[str], name: str) -> str:
    """The next line that is an answer; empty, with the reason on stderr, if the process ended instead."""
    assert process.stdout
    while line := process.stdout.readline():
        if line == "ready\n" or line.startswith("{"):
            return line.strip()
    log.seek(0)
    sys.stderr.write(f"{name} failed: {_last_line(log.read())}\n")
    return ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes the pipes
