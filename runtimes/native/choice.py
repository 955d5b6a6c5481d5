"""What `check` found out -> what is used here, and why.

A kernel has to be right, and faster than llama.cpp's own in a race on this machine. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_edge.runtimes.native.ggml import TYPES
from llava_edge.runtimes.native.library import FEW

COMMAND = "python -m llava_edge.runtimes.native"
CROWDED = f"Tried beside other programs, so that the choice may be wrong: run '{COMMAND}' when the machine is quiet."
GAIN = 1.05  # a kernel is used from here on
ONE_KEPT = 0.9  # of llama.cpp's speed with one row, where a kernel wins with eight: repeats differ by 7 %
MANY, ONE = (512, 2048, 4096), (1, 16384, 4096)  # rows, columns, inner of two races; 5 and 37 MB at 4 bits
PROMPT, ANSWER = 576, 128  # positions of a picture and tokens of an answer, for which all weights are read
COPY = 0.95  # of the time that both take with mapped weights: what a copy, which takes memory and time, has to save
OPT_IN = {"amx-int8"}  # less exact: only if $LLAVA_EDGE_NATIVE names it


@dataclass(frozen=True)
class Status:
    """What is used, or why nothing is. `reason` is a sentence; `fix` the command to run, if one would help.

    many: types of weights, each with the kernel that takes its products and from how many rows on; few: types whose
    products of fewer rows, 31 at most, are taken. attention, few_attention: of 32 queries or more, and of fewer.
    mapped: types that llama.cpp need not re-order, because a picture and an answer take hardly longer without, or
    because it cannot.
    """

    reason: str
    fix: str = ""
    many: tuple[tuple[str, str, int], ...] = ()
    few: tuple[str, ...] = ()
    attention: bool = False
    few_attention: bool = False
    mapped: tuple[str, ...] = ()
    library: str = ""  # hash of its file

    @property
    def used(self) -> bool:
        """Whether anything is."""
        return bool(self.many or self.few or self.attention or self.few_attention)

    @property
    def identity(self) -> list[object]:
        """What results depend on: empty if llama.cpp computes alone."""
        taken = [self.many, self.few, self.attention, self.few_attention]
        return [self.library, *taken] if self.used else []


def choose(state: dict[str, Any], kernel: str = "") -> Status:
    """From what `check` found out to what is used; `kernel` names the one to take, if it may be taken.

    Raises `AttributeError`, `KeyError`, `TypeError` or `ValueError` if the state is not what `check` writes.
    """
    if "failed" in state:
        return Status(f"Not used: {state['failed']}.", COMMAND)
    problems, types = state["problems"], {kind: state["types"][kind] for kind in TYPES}
    right = [name for name in state["kernels"] if name not in problems and (name not in OPT_IN or name == kernel)]
    if kernel and kernel not in state["kernels"]:
        known = ", ".join(["off", *state["kernels"]])
        return Status(f"Not used: LLAVA_EDGE_NATIVE is {kernel!r}; one of {known} was expected.")
    if kernel in right:
        right = [kernel]
    if not right:
        return Status(f"Not used: {' '.join(problems.values()) or 'this processor runs no kernel.'}", COMMAND)
    best = {
        kind: min((name for name in race["many"] if name in right), key=race["many"].__getitem__, default="")
        for kind, race in types.items()
    }
    many = tuple(
        (kind, best[kind], _least_rows(types[kind], best[kind]))
        for kind in types
        if pays(types[kind]["many"], best[kind])
    )
    few = tuple(kind for kind in types if _few_pay(types[kind]["one"], types[kind]["eight"], FEW))
    mapped = tuple(kind for kind in types if _mapped_suffices(types[kind], best[kind]))
    races = state["attention"]
    crowded = [CROWDED] if state["crowded"] else []
    attention = "attention" not in problems and pays(races["many"], "ours")
    few_attention = "few attention" not in problems and _few_pay(races["one"], races["eight"], "ours")
    if not (many or few or attention or few_attention):
        return Status(" ".join(["Not used: llama.cpp's own kernels are as fast here.", *crowded]))
    used = sorted({name for _, name, _ in many})
    parts = [f"{name} for {', '.join(kind for kind, its, _ in many if its == name)}" for name in used]
    parts += [f"few rows of {', '.join(few)}"] if few else []
    parts += ["attention"] if attention else []
    parts += ["attention of few queries"] if few_attention else []
    reason = " ".join([f"{'; '.join(parts)}.", *problems.values(), *crowded])
    return Status(reason, "", many, few, attention, few_attention, mapped, state["sha256"])


def reordering_pays(found: Status, types: Iterable[str]) -> bool:
    """Whether llama.cpp should copy weights of these types into an order of its own, when `found` is used."""
    return not found.many or any(kind not in found.mapped and kind != "F32" for kind in types)


def pays(race: dict[str, float], ours: str) -> bool:
    """Whether ours won a race against llama.cpp's own, or numpy's, by enough."""
    return ours in race and race["plain"] >= GAIN * race[ours]


def _least_rows(races: dict[str, dict[str, float]], ours: str) -> int:
    """From how many rows on unpacking pays: beside llama.cpp, and from 16 on beside our own kernel for few rows, too.

    Guesses and answers given together are fewer, and have to get the bits of a single row (runtimes/speculation.py).
    """
    if not pays(races["some"], ours):
        return 128
    sixteen = races["sixteen"]
    return 16 if pays(sixteen, ours) and sixteen.get(FEW, float("inf")) >= GAIN * sixteen[ours] else 32


def _few_pay(one: dict[str, float], eight: dict[str, float], ours: str) -> bool:
    """One kernel is for both: it has to win with one row, or with eight and lose nothing to speak of with one."""
    return pays(one, ours) or (pays(eight, ours) and one["plain"] >= ONE_KEPT * one[ours])


def _mapped_suffices(race: dict[str, dict[str, float]], best: str) -> bool:
    """Whether a picture and an answer take hardly longer with weights of a type as they are mapped than re-ordered by
    llama.cpp, if it does that.

    An Intel Xeon with AMX, 8 threads, 8 blocks of a 7B in Q4_0: 0.92 s for 600 positions and 29 ms a token, re-ordered
    2.0 s and 29 ms, though a race of single rows alone would have chosen the copy (0.66 ms beside 0.74).
    """
    many, one = race["many"], race["one"]
    if "repacked" not in many or "repacked" not in one:
        return True
    ours = many[best] if pays(many, best) else many["plain"]
    mapped = _whole(ours, min(one["plain"], one.get(FEW, one["plain"])))
    return COPY * mapped <= _whole(many["repacked"], one["repacked"])


def _whole(many: float, one: float) -> float:
    """Of what two races took, the time of a prompt and an answer for a column of weights."""
    return many * PROMPT / MANY[0] / MANY[1] + one * ANSWER / ONE[1]
