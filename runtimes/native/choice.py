"""Decide from the results of `check` which kernels are used, and why.

A kernel must be correct, and faster than llama.cpp's own in a benchmark on this machine. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_edge.runtimes.native.ggml import TYPES
from llava_edge.runtimes.native.library import FEW

COMMAND = "python -m llava_edge.runtimes.native"
BUSY_WARNING = (
    f"Other programs ran during the benchmark, so the choice may be wrong: run '{COMMAND}' on an idle machine."
)
MIN_SPEEDUP = 1.05  # over llama.cpp, for a kernel to be used
MIN_ONE_ROW_SPEED = 0.9  # of llama.cpp's speed with one row, if a kernel is faster with eight: repeats differ by 7 %
MANY_ROWS, ONE_ROW = (512, 2048, 4096), (1, 16384, 4096)  # shapes: rows, columns, inner; 5 and 37 MB at 4 bits
PROMPT_TOKENS, ANSWER_TOKENS = 576, 128  # of a typical request: one picture, and its answer
MAX_REPACKED_RATIO = 0.95  # repacked over mapped time below which a copy is worth its memory and loading time
OPT_IN = {"amx-int8"}  # less accurate: only if $LLAVA_EDGE_NATIVE names it


@dataclass(frozen=True)
class Status:
    """Which kernels are used, or why none is. `reason` is a sentence; `fix` the command to run, if one would help.

    many_rows: (weight type, kernel, minimum number of rows) of products. few_rows: weight types for which products of
    fewer rows (31 at most) are computed, too. attention, few_attention: with 32 queries or more, and with fewer.
    mapped: weight types that llama.cpp need not repack, because that would save little, or because it cannot.
    """

    reason: str
    fix: str = ""
    many_rows: tuple[tuple[str, str, int], ...] = ()
    few_rows: tuple[str, ...] = ()
    attention: bool = False
    few_attention: bool = False
    mapped: tuple[str, ...] = ()
    library: str = ""  # hash of its file

    @property
    def used(self) -> bool:
        """Whether any kernel is used."""
        return bool(self.many_rows or self.few_rows or self.attention or self.few_attention)

    @property
    def identity(self) -> list[object]:
        """What the results of a model depend on; empty without native kernels."""
        kernels = [self.many_rows, self.few_rows, self.attention, self.few_attention]
        return [self.library, *kernels] if self.used else []


def choose(state: dict[str, Any], kernel: str = "") -> Status:
    """Choose kernels from the results of `check`; `kernel` names the one to use if it is correct.

    Raises `AttributeError`, `KeyError`, `TypeError` or `ValueError` if the state is not what `check` writes.
    """
    if "failed" in state:
        return Status(f"Not used: {state['failed']}.", COMMAND)
    problems, types = state["problems"], {kind: state["types"][kind] for kind in TYPES}
    correct = [name for name in state["kernels"] if name not in problems and (name not in OPT_IN or name == kernel)]
    if kernel and kernel not in state["kernels"]:
        known = ", ".join(["off", *state["kernels"]])
        return Status(f"Not used: LLAVA_EDGE_NATIVE is {kernel!r}; expected one of {known}.")
    if kernel in correct:
        correct = [kernel]
    if not correct:
        return Status(f"Not used: {' '.join(problems.values()) or 'this processor runs no kernel.'}", COMMAND)
    best = {
        kind: min((name for name in times["many"] if name in correct), key=times["many"].__getitem__, default="")
        for kind, times in types.items()
    }
    many_rows = tuple(
        (kind, best[kind], _min_rows(types[kind], best[kind]))
        for kind in types
        if is_faster(types[kind]["many"], best[kind])
    )
    few_rows = tuple(kind for kind in types if _few_rows_faster(types[kind]["one"], types[kind]["eight"], FEW))
    mapped = tuple(kind for kind in types if _mapped_is_fast_enough(types[kind], best[kind]))
    times = state["attention"]
    warnings = [BUSY_WARNING] if state["crowded"] else []
    attention = "attention" not in problems and is_faster(times["many"], "ours")
    few_attention = "few attention" not in problems and _few_rows_faster(times["one"], times["eight"], "ours")
    if not (many_rows or few_rows or attention or few_attention):
        return Status(" ".join(["Not used: llama.cpp's own kernels are as fast here.", *warnings]))
    names = sorted({name for _, name, _ in many_rows})
    parts = [f"{name} for {', '.join(kind for kind, other, _ in many_rows if other == name)}" for name in names]
    parts += [f"few rows of {', '.join(few_rows)}"] if few_rows else []
    parts += ["attention"] if attention else []
    parts += ["attention of few queries"] if few_attention else []
    reason = " ".join([f"{'; '.join(parts)}.", *problems.values(), *warnings])
    return Status(reason, "", many_rows, few_rows, attention, few_attention, mapped, state["sha256"])


def should_repack(status: Status, types: Iterable[str]) -> bool:
    """Whether llama.cpp should repack weights of these types, given the kernels of `status`."""
    return not status.many_rows or any(kind not in status.mapped and kind != "F32" for kind in types)


def is_faster(times: dict[str, float], ours: str) -> bool:
    """Whether our kernel is faster than llama.cpp's (or numpy's) by at least `MIN_SPEEDUP`."""
    return ours in times and times["plain"] >= MIN_SPEEDUP * times[ours]


def _min_rows(times: dict[str, dict[str, float]], ours: str) -> int:
    """Number of rows from which a kernel that unpacks weights first is faster than llama.cpp's, and, below 32, than our
    kernel for few rows, too.

    Draft tokens and answers decoded together are fewer rows, and need the bits of one row (runtimes/speculation.py).
    """
    if not is_faster(times["some"], ours):
        return 128
    sixteen = times["sixteen"]
    return 16 if is_faster(sixteen, ours) and sixteen.get(FEW, float("inf")) >= MIN_SPEEDUP * sixteen[ours] else 32


def _few_rows_faster(one: dict[str, float], eight: dict[str, float], ours: str) -> bool:
    """Whether a kernel is faster with one row, or with eight and hardly slower with one. It serves both."""
    return is_faster(one, ours) or (is_faster(eight, ours) and one["plain"] >= MIN_ONE_ROW_SPEED * one[ours])


def _mapped_is_fast_enough(times: dict[str, dict[str, float]], best: str) -> bool:
    """Whether a picture and an answer take hardly longer with mapped weights of a type than with repacked ones.

    An Intel Xeon with AMX, 8 threads, 8 blocks of a 7B in Q4_0: 0.92 s for 600 positions and 29 ms per token, repacked
    2.0 s and 29 ms, though single rows alone would have favoured repacking (0.66 ms instead of 0.74).
    """
    many, one = times["many"], times["one"]
    if "repacked" not in many or "repacked" not in one:  # llama.cpp does not repack this type
        return True
    ours = many[best] if is_faster(many, best) else many["plain"]
    mapped = _answer_time(ours, min(one["plain"], one.get(FEW, one["plain"])))
    return MAX_REPACKED_RATIO * mapped <= _answer_time(many["repacked"], one["repacked"])


def _answer_time(many: float, one: float) -> float:
    """Time of a prompt and an answer per column of weights, from the times of `MANY_ROWS` and `ONE_ROW`."""
    return many * PROMPT_TOKENS / MANY_ROWS[0] / MANY_ROWS[1] + one * ANSWER_TOKENS / ONE_ROW[1]
