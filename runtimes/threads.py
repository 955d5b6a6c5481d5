"""How many threads compute the next token, or a short text: fewer while other programs keep processors busy.

Threads wait for each other hundreds of times for each token, so that one which shares its processor with another
program holds up all. Linux says how long threads that could compute had to wait for a processor, and how long
processors had nothing to do; elsewhere the number stays what it is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from llava_edge.runtimes.devices import Others

WINDOW = 0.1  # seconds between two looks, over which times are added up
CROWDED = 0.15  # of that time: threads that waited so long for processors are too many
BUSY = 0.75  # of a processor, that others took while a model was loaded: one thread less to begin with
IDLE = 0.8  # of that time: a processor with nothing to do for so long can take one thread more
LONGEST = 64  # windows until a thread more is tried again, after several that had to be taken back


class Threads:
    """A number from 1 to `most`. It begins with what others leave, as far as that is known."""

    def __init__(self, most: int) -> None:
        self.most = self.count = most
        self._others: Others | None = Others()
        self._seen: tuple[float, float, float] | None = None  # at the beginning of a window
        self._told = most > 1 and self._look() is not None  # whether this system says what is needed
        self._patience, self._calm = 1, 0  # windows without crowding that a thread more takes, and that there were

    def next(self) -> int:
        """The number for the next pass of a token, or few."""
        if self._others and self._others.passed() >= WINDOW:
            self.count = max(1, self.most - int(self._others.processors() + 1 - BUSY))
        self._others = None
        if not self._told or (self._seen and time.monotonic() - self._seen[0] < WINDOW):
            return self.count
        before, self._seen = self._seen, self._look()
        if before and self._seen:
            passed, waited, idle = (b - a for a, b in zip(before, self._seen, strict=True))
            self._decide(waited / passed, idle / passed)
        return self.count

    def pause(self) -> None:
        """Something else is computed next, in which threads of ours wait for each other: CLIP's beside llama.cpp's."""
        self._seen = None

    def _decide(self, waited: float, idle: float) -> None:
        """Both in processors: 1.0 is one for the whole time."""
        if waited > CROWDED:
            if self.count > 1:
                self.count -= 1
                self._patience = min(2 * self._patience, LONGEST)
            self._calm = 0
            return
        self._calm += 1
        if self.count < self.most and idle > IDLE and self._calm >= self._patience:
            self.count += 1
            self._calm = 0
        elif self.count == self.most and self._calm >= self._patience:
            self._patience, self._calm = max(1, self._patience // 2), 0

    def _look(self) -> tuple[float, float, float] | None:
        """Seconds: now, that this process's threads have waited for processors, that its processors were idle."""
        try:
            waited = sum(_waited(folder) for folder in Path("/proc/self/task").iterdir())
            return time.monotonic(), waited, _idle(os.sched_getaffinity(0))
        except (OSError, ValueError, IndexError, AttributeError):  # another system, or a kernel that does not count
            return None


def _waited(thread: Path) -> float:
    """Seconds: the second of Linux's numbers for a thread, in nanoseconds. A thread that has just ended has none."""
    try:
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def _idle(processors: set[int]) -> float:
    """Seconds that these had nothing to do, all together: the fourth and fifth number of each, in ticks."""
    rows = (line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
    ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0][3:].isdigit() and int(row[0][3:]) in processors)
    return ticks / os.sysconf("SC_CLK_TCK")
