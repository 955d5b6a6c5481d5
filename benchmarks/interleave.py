"""Measures several programs in interleaved rounds, each in its own process, so that background load affects all alike.

A peer is a command. With `run_persistent` it stays alive: it prints "ready" when it is set up, and for each line on
stdin does its work and prints one JSON object with `ms`. With `run_fresh` it is started for each sample, and prints an
object with its own times or with `at`, the instant (time.monotonic, one clock for all processes) at which it finished;
`ms` then counts from its start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import IO, Any

Command = Sequence[str]
Samples = dict[str, list[dict[str, Any]]]


def run_persistent(peers: Mapping[str, Command], repeats: int) -> Samples:
    """Return samples of each peer after one warm-up round. Peers that fail are named on stderr and left out."""
    with ExitStack() as stack:
        running = {}
        for name, command in peers.items():
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            stack.callback(_kill, process)
            if _read(process, log, name) == "ready":
                running[name] = (process, log)
        return _run_rounds({name: partial(_request, name, *item) for name, item in running.items()}, repeats, warmup=1)


def run_fresh(peers: Mapping[str, Command], repeats: int, warmup: int) -> Samples:
    """Do the same with a new process for each sample and `warmup` warm-up rounds."""
    return _run_rounds({name: partial(_start, name, command) for name, command in peers.items()}, repeats, warmup)


def report(samples: Samples, ours: str, key: str = "ms", *, more_is_better: bool = False) -> dict[str, Any]:
    """Print a table on stderr and one JSON line on stdout; return the rows by peer.

    times: ratio of the medians, how many times better `ours` is; times_low and times_high compare opposite extremes.
    """
    if ours not in samples:
        sys.exit(f"{ours} failed, so there is nothing to compare.")
    rows: dict[str, Any] = {}
    our_values = [sample[key] for sample in samples[ours]]
    for name, peer_samples in samples.items():
        values = [sample[key] for sample in peer_samples]
        pairs = [(median(values), median(our_values)), (min(values), max(our_values)), (max(values), min(our_values))]
        times, low, high = (1.0,) * 3 if name == ours else ratios(pairs, more_is_better)
        rows[name] = {"median": median(values), "low": min(values), "high": max(values), "times": times,
                      "times_low": low, "times_high": high, "samples": values, "last": peer_samples[-1]}  # fmt: skip
        sys.stderr.write(
            f"{name:24} {median(values):10.1f} ({min(values):.1f} to {max(values):.1f}) {key}   "
            f"{ours} is {times:.2f} times better ({low:.2f} to {high:.2f})\n"
        )
    sys.stdout.write(json.dumps({"key": key, "ours": ours, "peers": rows}) + "\n")
    return rows


def ratios(pairs: Sequence[tuple[float, float]], more_is_better: bool) -> tuple[float, float, float]:
    """(theirs, ours) of the medians and of opposite extremes -> how many times better ours is: median, low, high."""
    times = [(ours / theirs if more_is_better else theirs / ours) for theirs, ours in pairs]
    return times[0], min(times[1:]), max(times[1:])


def serve(work: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.perf_counter) -> None:
    """Be the peer of `run_persistent`: run `work` for each line, timed here unless it returns its own `ms`."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        start = clock()
        sample = work()
        sample.setdefault("ms", (clock() - start) * 1000)
        sys.stdout.write(json.dumps(sample) + "\n")
        sys.stdout.flush()


def _run_rounds(peers: dict[str, Callable[[], dict[str, Any] | None]], repeats: int, warmup: int) -> Samples:
    samples: Samples = {name: [] for name in peers}
    for number in range(-warmup, repeats):
        for name, take_sample in list(peers.items()):
            sample = take_sample()
            if sample is None:
                del peers[name], samples[name]
            elif number >= 0:
                samples[name].append(sample)
    return samples


def _request(name: str, process: subprocess.Popen[str], log: IO[str]) -> dict[str, Any] | None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()
    answer = _read(process, log, name)
    return json.loads(answer) if answer else None


def _start(name: str, command: Command) -> dict[str, Any] | None:
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        sample: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        sys.stderr.write(f"{name} failed: {_last_line(done.stderr)}\n")
        return None
    if "at" in sample:
        sample["ms"] = (sample["at"] - start) * 1000
    return sample


def _read(process: subprocess.Popen[str], log: IO[str], name: str) -> str:
    """Return the next line that is an answer; empty, with the reason on stderr, if the process ended instead."""
    assert process.stdout
    while line := process.stdout.readline():
        if line == "ready\n" or line.startswith("{"):
            return line.strip()
    log.seek(0)
    sys.stderr.write(f"{name} failed: {_last_line(log.read())}\n")
    return ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes the pipes
