"""How many threads compute the next token, or a text: fewer while other programs are busy, all for large products.

Threads synchronize hundreds of times per token, so one that shares its processor with another program holds up all.
Linux reports how long runnable threads waited for a processor and how long processors were idle; elsewhere the number
stays as it is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llava_edge.runtimes.machine import ExternalLoad

WINDOW = 0.1  # seconds between two samples of the counters
CONTENDED = 0.15  # processors: one thread less if runnable threads waited for more
BUSY = 0.75  # of a processor: one thread less at first if other programs used as much while the model was loaded
IDLE = 0.8  # processors: room for one more thread if as much was idle
MAX_BACKOFF = 64  # windows until one more thread is tried again, after several attempts that failed
# Multiplications of a product with a square matrix, about 3 ms of one thread. In a larger product the free threads take
# over work from one that shares its processor, so all threads pay off; in a smaller one all wait for it.
SMALL_PRODUCT = 1 << 28
# Values of all positions up to which one thread computes what our kernels leave to llama.cpp, such as norms: starting
# others, several times in each block, takes longer.
SMALL_ROWS = 8192


class PassThreads:
    """How many threads compute a pass of a language model.

    vary: whether the number may follow the load. all_ours: whether our kernels compute all products and all attention.
    """

    def __init__(self, maximum: int, *, vary: bool, all_ours: bool) -> None:
        self.maximum = maximum
        self._vary = vary
        self._all_ours = all_ours
        self._adaptive = AdaptiveThreads(maximum)

    def choose(self, positions: int, width: int) -> tuple[int, int]:
        """Return the numbers for llama.cpp's operations and for our kernels (0: the same), for rows of `width`."""
        if not self._vary:
            return self.maximum, 0
        small = positions * width**2 < SMALL_PRODUCT
        if not small:
            self._adaptive.reset()
        ours = self._adaptive.next() if small else self.maximum
        return 1 if self._all_ours and positions * width <= SMALL_ROWS else ours, ours

    def reset(self) -> None:
        """Say that other work came between: until now our threads waited for processors that CLIP's threads used."""
        self._adaptive.reset()


class AdaptiveThreads:
    """A number of threads from 1 to `maximum`. It starts with what other programs leave, as far as that is known."""

    def __init__(self, maximum: int) -> None:
        self.maximum = self.count = maximum
        self._load: ExternalLoad | None = ExternalLoad()  # while the model is loaded
        self._sample: tuple[float, float, float] | None = None  # at the start of a window
        self._supported = maximum > 1 and self._read_counters() is not None
        self._backoff, self._calm = 1, 0  # windows without contention: required for one more thread, and counted so far

    def next(self) -> int:
        """Return the number for the next pass of one or a few tokens."""
        if self._load and self._load.elapsed() >= WINDOW:
            self.count = max(1, self.maximum - int(self._load.processors() + 1 - BUSY))
        self._load = None
        if not self._supported or (self._sample and time.monotonic() - self._sample[0] < WINDOW):
            return self.count
        before, self._sample = self._sample, self._read_counters()
        if before and self._sample:
            elapsed, waited, idle = (b - a for a, b in zip(before, self._sample, strict=True))
            self._adjust(waited / elapsed, idle / elapsed)
        return self.count

    def reset(self) -> None:
        """Discard the current window: other work comes between, in which CLIP's and llama.cpp's threads compete."""
        self._sample = None

    def _adjust(self, waited: float, idle: float) -> None:
        """Both in processors: 1.0 is one for the whole window."""
        if waited > CONTENDED:
            if self.count > 1:
                self.count -= 1
                self._backoff = min(2 * self._backoff, MAX_BACKOFF)
            self._calm = 0
            return
        self._calm += 1
        if self.count < self.maximum and idle > IDLE and self._calm >= self._backoff:
            self.count += 1
            self._calm = 0
        elif self.count == self.maximum and self._calm >= self._backoff:
            self._backoff, self._calm = max(1, self._backoff // 2), 0

    def _read_counters(self) -> tuple[float, float, float] | None:
        """Seconds: now; that this process's threads have waited for processors; that its processors were idle."""
        if sys.platform != "linux":
            return None
        try:
            waited = sum(_wait_seconds(folder) for folder in Path("/proc/self/task").iterdir())
            return time.monotonic(), waited, _idle_seconds(os.sched_getaffinity(0))
        except (OSError, ValueError, IndexError):  # a kernel that does not count
            return None


def _wait_seconds(thread: Path) -> float:
    """Time a thread was runnable but not running: schedstat's second field, in nanoseconds. 0 if it has just ended."""
    try:
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def _idle_seconds(processors: set[int]) -> float:
    """Total idle time of some processors: /proc/stat's idle and iowait, in ticks."""
    rows = (line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
    ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0][3:].isdigit() and int(row[0][3:]) in processors)
    return ticks / os.sysconf("SC_CLK_TCK")
