"""Ranges of numbers -> GBNF expressions that match exactly the numbers in the range. Knows nothing about schemas."""

from __future__ import annotations

MAX_INTEGER = 10**16 - 1  # 16 digits, as in `json_grammar`
MAX_BOUND = 10**9  # of a range of fractions: float64 can still tell such a bound from a value 1e-6 beside it
_FRACTION = '("." [0-9]{1,6})?'


def integer_range(low: int, high: int) -> str:
    """Match the integers from `low` to `high`, digit by digit; low <= high, both of at most 16 digits."""
    if high < 0:
        return f'"-" ({integer_range(-high, -low)})'
    if low < 0:
        return f'"-" ({integer_range(1, -low)}) | {integer_range(0, high)}'
    first, last = str(low), str(high)
    if len(first) == len(last):
        return _same_length_range(first, last)
    between = f"[1-9] [0-9]{{{len(first)},{len(last) - 2}}}" if len(last) - len(first) > 1 else ""
    lengths = (
        _same_length_range(first, "9" * len(first)),
        between,
        _same_length_range("1" + "0" * (len(last) - 1), last),
    )
    return " | ".join(filter(None, lengths))


def number_range(low: int | None, high: int | None, exclusive_low: bool, exclusive_high: bool) -> str:
    """Match the numbers between two integers, None being unbounded; empty if there are none.

    exclusive_low, exclusive_high: whether the bounds themselves are outside the range.
    """
    parts = []
    if low is None or low < 0:
        least, most = max(0, 0 if high is None else -high), None if low is None else -low
        negative = _unsigned_ranges(least, most, exclusive_high and high is not None and high <= 0, exclusive_low)
        parts += [f'"-" ({each})' for each in negative]
    if high is None or high >= 0:
        parts += _unsigned_ranges(
            max(0, low or 0), high, exclusive_low and low is not None and low >= 0, exclusive_high
        )
    return " | ".join(parts)


def _unsigned_ranges(low: int, high: int | None, exclusive_low: bool, exclusive_high: bool) -> list[str]:
    """Alternatives for the non-negative numbers of such a range."""
    first, last = low + exclusive_low, MAX_INTEGER if high is None else high - 1
    parts = []
    if exclusive_low and (high is None or low < high):
        parts.append(f'"{low}." [0-9]{{0,5}} [1-9]')
    if first <= last:
        parts.append(f"({integer_range(first, last)}) {_FRACTION}")
    if high is not None and not exclusive_high and (low < high or (low == high and not exclusive_low)):
        parts.append(f'"{high}" ("." "0"{{1,6}})?')
    return parts


def _same_length_range(low: str, high: str) -> str:
    """Match the integers between two of equally many digits."""
    if low == high:
        return f'"{low}"'
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length_range(low[1:], high[1:])})'
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    parts, end = [], []
    if low[1:] != "0" * rest:
        parts = [f'"{first}" ({_same_length_range(low[1:], "9" * rest)})']
        first += 1
    if high[1:] != "9" * rest:
        end = [f'"{last}" ({_same_length_range("0" * rest, high[1:])})']
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return " | ".join(parts + end)
