"""JSON and TOML, as Python reads them -> dataclasses by their type hints, strict in every type.

Hints are of `int`, `float` (without NaN and infinity), `str`, `bool`, `Literal`, dataclasses, `X | None`, lists, tuples
and dicts of these, and `Annotated` with a `Range` or `Printable`; `Any` is not looked at.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that a value may be. `above` leaves the least one out."""

    least: float
    most: float
    above: bool = False

    def allows(self, number: float) -> bool:
        """Whether a number is one of them."""
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        return f"above {self.least} and up to {self.most}" if self.above else f"from {self.least} to {self.most}"


class Printable:
    """Texts that may reach a terminal."""

    def allows(self, text: str) -> bool:
        """Whether all of it can be printed."""
        return text.isprintable()

    def __str__(self) -> str:
        return "that can be printed"


def build(kind: type[T], raw: object, place: str = "it") -> T:
    """A dataclass from a dict, or a list of them from a list.

    Raises `ValueError` with what is wrong; `place` begins that clause.
    """
    made: T = _build(kind, raw, place, "")
    return made


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))  # they cost more than parsing a file


def _build(kind: Any, raw: Any, place: str, name: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(raw, dict) and is_dataclass(kind):
        return _record(kind, raw, place, name)
    if isinstance(raw, dict) and origin is dict:
        for key in raw:
            if not _fits(args[0], key):
                raise ValueError(f"{place} has {key!r:.60} in {name}; {_expected(args[0])} was expected")
        return {key: _build(args[1], value, place, f"{name}.{key}") for key, value in raw.items()}
    if isinstance(raw, list) and origin in (list, tuple) and (origin is list or ... in args or len(raw) == len(args)):
        return origin(_build(args[0], item, place, f"{name}[{i}]") for i, item in enumerate(raw))
    if origin is UnionType and raw is not None:
        return _build(args[0], raw, place, name)
    if not _fits(kind, raw):
        found = f"has {name} =" if name else "is"
        raise ValueError(f"{place} {found} {raw!r:.60}; {_expected(kind)} was expected")
    return raw


def _record(kind: Any, raw: dict[str, Any], place: str, name: str) -> Any:
    hints, within = _hints(kind), f"{name}." if name else ""
    if unknown := sorted(set(raw) - set(hints)):
        raise ValueError(f"{place} has unknown fields {[within + field for field in unknown]}")
    needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
    if missing := [field for field in needed if field not in raw]:
        raise ValueError(f"{place} has no {within}{missing[0]}")
    return kind(**{field: _build(hints[field], value, place, within + field) for field, value in raw.items()})


def _fits(kind: Any, raw: Any) -> bool:
    """Of what has no parts."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(args[0], raw) and bool(args[1].allows(raw))
    if origin is Literal:
        return raw in args
    if kind is float:
        return type(raw) in (int, float) and abs(raw) <= sys.float_info.max
    return kind is Any or type(raw) is kind or (origin is UnionType and raw is None)


def _expected(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_expected(args[0])} {args[1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (list, tuple):
        return f"a list of {len(args)} values" if origin is tuple and ... not in args else "a list"
    words = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
    return words.get(kind, "a table of named values")
