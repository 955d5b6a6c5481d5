"""Parsed JSON and TOML -> dataclasses, with every value checked against its type hint.

Hints may be `int`, `float` (without NaN and infinity), `str`, `bool`, `Literal`, dataclasses, `X | None`, lists, tuples
and dicts of these, and `Annotated` with a `Range` or `Printable`; `Any` is not checked.
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
    """Bounds of a number, both inclusive unless `exclusive_low` is set."""

    low: float
    high: float
    exclusive_low: bool = False

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return self.low <= number <= self.high and not (self.exclusive_low and number == self.low)

    def __str__(self) -> str:
        return f"above {self.low} and up to {self.high}" if self.exclusive_low else f"from {self.low} to {self.high}"


class Printable:
    """Texts that are safe to print on a terminal."""

    def allows(self, text: str) -> bool:
        """Whether all characters are printable."""
        return text.isprintable()

    def __str__(self) -> str:
        return "that can be printed"


def build(kind: type[T], raw: object, place: str = "it") -> T:
    """Build a dataclass from a dict, or a list of them from a list.

    Raises `ValueError` with a clause that says what is wrong and begins with `place`.
    """
    result: T = _build(kind, raw, place, "")
    return result


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))  # slower than parsing a file


def _build(kind: Any, raw: Any, place: str, name: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(raw, dict) and is_dataclass(kind):
        return _build_dataclass(kind, raw, place, name)
    if isinstance(raw, dict) and origin is dict:
        for key in raw:
            if not _is_valid(args[0], key):
                raise ValueError(f"{place} has {key!r:.60} in {name}; expected {_describe(args[0])}")
        return {key: _build(args[1], value, place, f"{name}.{key}") for key, value in raw.items()}
    if isinstance(raw, list) and origin in (list, tuple) and (origin is list or ... in args or len(raw) == len(args)):
        return origin(_build(args[0], item, place, f"{name}[{i}]") for i, item in enumerate(raw))
    if origin is UnionType and raw is not None:
        return _build(args[0], raw, place, name)
    if not _is_valid(kind, raw):
        subject = f"has {name} =" if name else "is"
        raise ValueError(f"{place} {subject} {raw!r:.60}; expected {_describe(kind)}")
    return raw


def _build_dataclass(kind: Any, raw: dict[str, Any], place: str, name: str) -> Any:
    hints, prefix = _hints(kind), f"{name}." if name else ""
    if unknown := sorted(set(raw) - set(hints)):
        raise ValueError(f"{place} has unknown fields {[prefix + field for field in unknown]}")
    required = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
    if missing := [field for field in required if field not in raw]:
        raise ValueError(f"{place} has no {prefix}{missing[0]}")
    return kind(**{field: _build(hints[field], value, place, prefix + field) for field, value in raw.items()})


def _is_valid(kind: Any, raw: Any) -> bool:
    """Whether a value that is not a container matches its hint."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_valid(args[0], raw) and bool(args[1].allows(raw))
    if origin is Literal:
        return raw in args
    if kind is float:
        return type(raw) in (int, float) and abs(raw) <= sys.float_info.max
    return kind is Any or type(raw) is kind or (origin is UnionType and raw is None)


def _describe(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_describe(args[0])} {args[1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (list, tuple):
        return f"a list of {len(args)} values" if origin is tuple and ... not in args else "a list"
    words = {int: "an integer", float: "a number", str: "a string in quotes", bool: "true or false"}
    return words.get(kind, "a table of named values")
