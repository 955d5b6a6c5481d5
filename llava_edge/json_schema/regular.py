"""Automata of regular expressions, some of which a text must match and others must not.

An expression becomes positions (V. M. Glushkov, 1961), one for each character of it, repeated parts once for each time;
all positions that a text may be at together are one state (subset construction). Knows nothing about syntax.
Positions, states and steps are limited, and with them time and memory.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, in order, apart from each other


class TooComplexError(Exception):
    """An automaton would exceed the budget."""


@dataclass
class Budget:
    """What automata may still have, all that share it together. Counts states that are found to be useless, too.

    steps: positions of all states, positions that others follow, classes of characters for each state, ranges of edges.
    """

    positions: int = 5000
    states: int = 3000
    steps: int = 100_000

    def take_steps(self, count: int) -> None:
        """Raise `TooComplexError` if there are not as many."""
        self.steps -= count
        if self.steps < 0:
            raise TooComplexError


@dataclass(frozen=True)
class Chars:
    """One character out of some ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Joined:
    """One after another; without parts the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """One of at least one."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeated:
    """`low` to `high` texts, one after another; None: any number from `low` on."""

    part: Node
    low: int
    high: int | None


Node = Chars | Joined | Either | Repeated
Choice = Sequence[tuple[Node, bool]]  # what a text must match (True), and what it must not


@dataclass(frozen=True)
class State:
    """accepts: whether a text may end here. edges: number of the next state -> the characters that lead there."""

    accepts: bool
    edges: dict[int, Ranges]


def automaton(choices: Sequence[Choice], alphabet: Ranges, budget: Budget) -> list[State]:
    """Return the states of the texts that satisfy one of `choices`; there are none if no text of the alphabet does.

    The first state is the start; from each, a text can end. Raises `TooComplexError`.
    """
    positions = _Positions(budget)
    wanted = [[(*positions.add(node), match) for node, match in choice] for choice in choices]
    classes = positions.classes(alphabet)
    numbers, sets, states = {positions.start: 0}, [positions.start], []
    for current in sets:  # grows
        budget.states -= 1
        budget.take_steps(current.bit_count() + len(classes) * len(wanted))
        following, edges = positions.following(current), dict[int, list[tuple[int, int]]]()
        for allowing, ranges in classes.items():
            after = following & allowing
            if any(all(after & own for own, _, match in choice if match) for choice in wanted):
                if after not in numbers:
                    numbers[after] = len(sets)
                    sets.append(after)
                edges.setdefault(numbers[after], []).extend(ranges)
                budget.steps -= len(ranges)
        accepts = any(all(bool(current & ends) == match for _, ends, match in choice) for choice in wanted)
        states.append(State(accepts, {number: _merged(ranges) for number, ranges in edges.items()}))
        if budget.states < 0 or budget.steps < 0:
            raise TooComplexError
    return _live(states)


class _Positions:
    """Positions of expressions; a set of them is an integer with a bit for each."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._having: dict[Ranges, int] = {}  # the positions that allow a character out of them
        self._following: list[int] = []  # the positions that a text may go to from each
        self.start = 0

    def add(self, node: Node) -> tuple[int, int]:
        """Add an expression. Returns its positions, and those of them in which a text that matches it ends."""
        before = self._new(())
        can_be_empty, first, last = self._part(node)
        self._following[before.bit_length() - 1] = first
        self.start |= before
        return (1 << len(self._following)) - before, last | before if can_be_empty else last

    def classes(self, alphabet: Ranges) -> dict[int, list[tuple[int, int]]]:
        """The characters that the same positions allow, by these positions."""
        changes = dict[int, int]()  # code point -> the positions that begin or cease to allow characters there
        for ranges, positions in self._having.items():
            for code in (code for low, high in ranges for code in (low, high + 1)):
                changes[code] = changes.get(code, 0) ^ positions
        codes = sorted(changes)
        allowing = [*accumulate((changes[code] for code in codes), operator.xor, initial=0)]
        found = dict[int, list[tuple[int, int]]]()
        for low, high in _split(alphabet, codes):
            found.setdefault(allowing[bisect_right(codes, low)], []).append((low, high))
        return found

    def following(self, positions: int) -> int:
        """All positions that a text may go to from those."""
        found = 0
        for number in _bits(positions):
            found |= self._following[number]
        return found

    def _new(self, ranges: Ranges) -> int:
        self._budget.positions -= 1
        if self._budget.positions < 0:
            raise TooComplexError
        position = 1 << len(self._following)
        self._following.append(0)
        self._having[ranges] = self._having.get(ranges, 0) | position
        return position

    def _part(self, node: Node) -> tuple[bool, int, int]:
        """Add the positions of a part. Returns whether it can be empty, and its first and last positions."""
        if isinstance(node, Chars):
            position = self._new(node.ranges)
            return False, position, position
        if isinstance(node, Either):
            empties, firsts, lasts = zip(*map(self._part, node.options), strict=True)
            return any(empties), _union(firsts), _union(lasts)
        if isinstance(node, Repeated):
            return self._repeated(node)
        return self._joined(map(self._part, node.parts))

    def _repeated(self, node: Repeated) -> tuple[bool, int, int]:
        """Each time follows the one before, never an earlier one, so that a text is at few positions at once."""
        start, last, ends, can_be_empty = 0, 0, 0, node.low == 0
        for time in range(max(node.low, 1) if node.high is None else node.high):
            empty, first, next_last = self._part(node.part)
            if not first:  # however often: the empty text
                return True, 0, 0
            self._connect(last, first)
            start, last, can_be_empty = start or first, next_last, can_be_empty or empty
            if empty or time >= node.low - 1:
                ends |= last
        if node.high is None:
            self._connect(last, first)
        return can_be_empty, start, ends

    def _joined(self, parts: Iterator[tuple[bool, int, int]]) -> tuple[bool, int, int]:
        can_be_empty, first, last = True, 0, 0
        for empty, next_first, next_last in parts:
            self._connect(last, next_first)
            first = first | next_first if can_be_empty else first
            last = last | next_last if empty else next_last
            can_be_empty = can_be_empty and empty
        return can_be_empty, first, last

    def _connect(self, last: int, first: int) -> None:
        self._budget.take_steps(last.bit_count())
        for number in _bits(last):
            self._following[number] |= first


def _bits(positions: int) -> Iterator[int]:
    while positions:
        lowest = positions & -positions
        yield lowest.bit_length() - 1
        positions ^= lowest


def _union(sets: Sequence[int]) -> int:
    return functools.reduce(operator.or_, sets)


def _split(ranges: Ranges, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    for low, high in ranges:
        starts = [low, *(cut for cut in cuts if low < cut <= high)]
        yield from zip(starts, [*(start - 1 for start in starts[1:]), high], strict=True)


def _merged(ranges: list[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and merged[-1][1] == low - 1:
            low = merged.pop()[0]
        merged.append((low, high))
    return tuple(merged)


def _live(states: list[State]) -> list[State]:
    """Without the states from which no text can end, numbered anew; none if the first is one."""
    sources: list[list[int]] = [[] for _ in states]
    for number, state in enumerate(states):
        for to in state.edges:
            sources[to].append(number)
    found = [number for number, state in enumerate(states) if state.accepts]
    live = set(found)
    while found:
        new = set(sources[found.pop()]) - live
        live |= new
        found += new
    if 0 not in live:
        return []
    numbers = {old: new for new, old in enumerate(sorted(live))}
    return [
        State(states[old].accepts, {numbers[to]: chars for to, chars in states[old].edges.items() if to in live})
        for old in numbers
    ]
