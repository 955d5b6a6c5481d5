"""Ranges of numbers -> expressions in llama.cpp's GBNF, by which nothing but numbers of the range can be written.

Knows nothing about schemas.
"""

from __future__ import annotations

MOST = 10**16 - 1  # of an integer: 16 digits, as in `json_grammar`
MOST_BOUND = 10**9  # of a number that is no integer: with six digits behind the point, float64 still tells it from it
_FRACTION = '("." [0-9]{1,6})?'


def integers(low: int, high: int) -> str:
    """Of those from `low` to `high`, by their digits; `low` is not above `high`, and both have up to 16."""
    if high < 0:
        return f'"-" ({integers(-high, -low)})'
    if low < 0:
        return f'"-" ({integers(1, -low)}) | {integers(0, high)}'
    first, last = str(low), str(high)
    if len(first) == len(last):
        return _alike(first, last)
    between = f"[1-9] [0-9]{{{len(first)},{len(last) - 2}}}" if len(last) - len(first) > 1 else ""
    lengths = (_alike(first, "9" * len(first)), between, _alike("1" + "0" * (len(last) - 1), last))
    return " | ".join(filter(None, lengths))


def numbers(low: int | None, high: int | None, above: bool, below: bool) -> str:
    """Of those between two whole numbers, None being no limit. above, below: these themselves are not in the range.

    Empty if there are none.
    """
    parts = []
    if low is None or low < 0:
        least, most = max(0, 0 if high is None else -high), None if low is None else -low
        negative = _magnitudes(least, most, below and high is not None and high <= 0, above)
        parts += [f'"-" ({each})' for each in negative]
    if high is None or high >= 0:
        parts += _magnitudes(max(0, low or 0), high, above and low is not None and low >= 0, below)
    return " | ".join(parts)


def _magnitudes(low: int, high: int | None, above: bool, below: bool) -> list[str]:
    """The same for numbers without a sign."""
    first, last = low + above, MOST if high is None else high - 1
    parts = []
    if above and (high is None or low < high):
        parts.append(f'"{low}." [0-9]{{0,5}} [1-9]')
    if first <= last:
        parts.append(f"({integers(first, last)}) {_FRACTION}")
    if high is not None and not below and (low < high or (low == high and not above)):
        parts.append(f'"{high}" ("." "0"{{1,6}})?')
    return parts


def _alike(low: str, high: str) -> str:
    """Integers with equally many digits."""
    if low == high:
        return f'"{low}"'
    if low[0] == high[0]:
        return f'"{low[0]}" ({_alike(low[1:], high[1:])})'
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    parts, end = [], []
    if low[1:] != "0" * rest:
        parts = [f'"{first}" ({_alike(low[1:], "9" * rest)})']
        first += 1
    if high[1:] != "9" * rest:
        end = [f'"{last}" ({_alike("0" * rest, high[1:])})']
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return " | ".join(parts + end)
