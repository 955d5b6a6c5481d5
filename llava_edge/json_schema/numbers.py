"""Numbers within limits -> GBNF rules that match exactly them, without exponents. Knows nothing about schemas.

A number is read digit by digit: what may follow depends on how the digits compare with those of the limits, and on
their remainder. Texts after which the same may follow share a rule. Limits are untrusted: time and memory are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

MAX_INTEGER_DIGITS = 16  # as in grammar.py
# With a point. No two numbers of up to 15 digits are one float64, so none leaves the limits when it is rounded to one.
MAX_DIGITS, MAX_PLACES = 15, 6
MAX_STEPS = 20_000  # of all numbers of a schema; in each, something else may follow
_UNLIMITED = Decimal(10**MAX_INTEGER_DIGITS)


class TooComplexNumbersError(Exception):
    """The numbers of a schema would take too long."""


@dataclass(frozen=True)
class Limits:
    """What numbers must satisfy. low, high: None if there is none. multiple_of: above zero. integer: have no point."""

    integer: bool
    low: Decimal | None = None
    high: Decimal | None = None
    exclusive_low: bool = False
    exclusive_high: bool = False
    multiple_of: Decimal | None = None

    def negated(self) -> Limits:
        """Limits of the numbers with the opposite sign. Exact: Decimal's minus would round to 28 digits."""
        low, high = (None if limit is None else limit.copy_negate() for limit in (self.high, self.low))
        return Limits(self.integer, low, high, self.exclusive_high, self.exclusive_low, self.multiple_of)


class NumberRules:
    """The rules for all numbers of a schema, named n0, n1, ..."""

    def __init__(self) -> None:
        self.rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # expression -> its rule
        self._known: dict[Limits, str | None] = {}
        self._remaining_steps = MAX_STEPS

    def add(self, limits: Limits) -> str | None:
        """Return an expression for numbers within `limits`; None if there are none. Raises `TooComplexNumbersError`."""
        options = []
        if limits.high is None or limits.high >= 0:
            options.append(self._digits(limits))
        if limits.low is None or limits.low < 0:
            digits = self._digits(limits.negated())
            options.append(digits and f'"-" {digits}')
        return " | ".join(filter(None, options)) or None

    def _digits(self, limits: Limits) -> str | None:
        if limits not in self._known:
            self._known[limits] = self._following(_START, _Digits(limits), {})
        return self._known[limits]

    def _following(self, read: _Read, numbers: _Digits, known: dict[_Read, str | None]) -> str | None:
        """Name of the rule for what may follow, or '""'; None if no number begins so."""
        if read not in known:
            self._remaining_steps -= 1
            if self._remaining_steps < 0:
                raise TooComplexNumbersError
            characters: dict[str, str] = {}  # what may follow them -> characters
            for character, after in numbers.continuations(read):
                if (rest := self._following(after, numbers, known)) is not None:
                    characters[rest] = characters.get(rest, "") + character
            known[read] = self._rule(characters, numbers.may_end(read))
        return known[read]

    def _rule(self, characters: dict[str, str], may_end: bool) -> str | None:
        options = [f"{_one_of(first)} {rest}".removesuffix(' ""') for rest, first in characters.items()]
        if not options:
            return '""' if may_end else None
        expression = " | ".join([*options, '""'] if may_end else options)
        if expression not in self._names:
            self._names[expression] = f"n{len(self.rules)}"
            self.rules[self._names[expression]] = expression
        return self._names[expression]


def _one_of(characters: str) -> str:
    is_range = len(characters) > 2 and characters in "0123456789"
    return f"[{characters[0]}-{characters[-1]}]" if is_range else f"[{characters}]"


class _Read(NamedTuple):
    """What was read. low, high: its order beside as many digits of that limit: -1 if it is below, 0 or 1.

    whole: digits before the point, none if that is a zero; -1 at the start. places: digits after it; -1 before it.
    """

    whole: int
    places: int
    low: int
    high: int
    remainder: int


_START = _Read(-1, -1, 0, 0, 0)
_ZERO = _Read(0, -1, 0, 0, 0)


class _Digits:
    """Numbers without their sign: which characters may follow each other."""

    def __init__(self, limits: Limits) -> None:
        self._exclusive_low = limits.exclusive_low and limits.low is not None and limits.low >= 0
        self._exclusive_high = limits.exclusive_high
        self._low = _Limit(max(limits.low or Decimal(0), Decimal(0)))
        self._high = _Limit(_UNLIMITED if limits.high is None else limits.high)
        self._max_whole = min(len(self._high.whole), MAX_INTEGER_DIGITS)
        step = None if limits.multiple_of is None else _Limit(limits.multiple_of)
        self._step_places = MAX_PLACES if step is None else len(step.fraction)
        self._step = 1 if step is None else int(step.whole + step.fraction)
        self._max_places = 0 if limits.integer else min(self._step_places, MAX_PLACES)

    def continuations(self, read: _Read) -> Iterator[tuple[str, _Read]]:
        """The characters that may come next, and what is read then."""
        if read == _START:
            yield "0", _ZERO
            yield from ((digit, self._with_digit(_ZERO, digit)) for digit in "123456789")
        elif read.places >= 0:
            if read.places < self._max_places and read.whole + read.places < MAX_DIGITS:
                yield from ((digit, self._with_digit(read, digit)) for digit in "0123456789")
        else:
            if 0 < read.whole < self._max_whole:
                yield from ((digit, self._with_digit(read, digit)) for digit in "0123456789")
            if self._max_places and read.whole < MAX_DIGITS:
                yield ".", self._with_point(read)

    def may_end(self, read: _Read) -> bool:
        """Whether what was read is one of the numbers."""
        if read == _START or read.places == 0:
            return False
        read = read if read.places > 0 else self._with_point(read)
        low, high = self._low.at_end(read.low, read.places), self._high.at_end(read.high, read.places)
        remainder = read.remainder * 10 ** (self._step_places - read.places) % self._step
        return (
            (low > 0 or (low == 0 and not self._exclusive_low))
            and (high < 0 or (high == 0 and not self._exclusive_high))
            and not remainder
        )

    def _with_digit(self, read: _Read, digit: str) -> _Read:
        low, high = self._low.with_digit(read.low, read, digit), self._high.with_digit(read.high, read, digit)
        remainder = (read.remainder * 10 + int(digit)) % self._step
        if read.places < 0:
            return _Read(read.whole + 1, -1, low, high, remainder)
        return _Read(read.whole, read.places + 1, low, high, remainder)

    def _with_point(self, read: _Read) -> _Read:
        low, high = self._low.at_point(read.low, read.whole), self._high.at_point(read.high, read.whole)
        return read._replace(places=0, low=low, high=high)


class _Limit:
    """A number to compare with, digit by digit: `order` is that of what was read so far, -1 if it is below."""

    def __init__(self, value: Decimal) -> None:
        whole, _, fraction = f"{value:f}".partition(".")
        self.whole, self.fraction = whole.lstrip("0"), fraction.rstrip("0")

    def with_digit(self, order: int, read: _Read, digit: str) -> int:
        own = self.whole[read.whole :] if read.places < 0 else self.fraction[read.places :]
        return order or _order(int(digit), int(own[:1] or "0"))

    def at_point(self, order: int, whole: int) -> int:
        """Only now the number of digits before the point is known."""
        return _order(whole, len(self.whole)) or order

    def at_end(self, order: int, places: int) -> int:
        return order or -(places < len(self.fraction))


def _order(one: int, other: int) -> int:
    return (one > other) - (one < other)
