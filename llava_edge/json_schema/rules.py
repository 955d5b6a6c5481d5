"""The rules of one grammar, and GBNF expressions for values and repetitions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from llava_edge.errors import UsageError
from llava_edge.json_schema.keywords import schema_error

MAX_RULES = 500
MAX_UNBLOCKED = 500  # repetitions; blocks take fewer rules, but llama.cpp follows several ways to read them


class Rules:
    """Rules by their names. Most are named r0, r1, ... and found again by their expressions."""

    def __init__(self) -> None:
        self.named: dict[str, str] = {}
        self._names: dict[str, str] = {}  # expression -> its rule

    def add(self, expression: str) -> str:
        """Name of the rule for an expression, added if it is new; a single name is returned unchanged."""
        if expression in self._names:
            return self._names[expression]
        if expression == '""' or expression.isidentifier():
            return expression
        if len(self._names) >= MAX_RULES:
            raise UsageError(f"The JSON schema is too large: it needs more than {MAX_RULES} rules.")
        name = self._names[expression] = f"r{len(self.named)}"
        self.named[name] = expression
        return name

    def alternatives(self, options: Iterable[str]) -> str:
        """Alternatives without duplicates, which llama.cpp would each follow: twice as many at every level."""
        return self.add(" | ".join(dict.fromkeys(options)))


def literal(value: object, path: str) -> str:
    """GBNF for one value. Raises `UsageError`."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise schema_error(path, "has a number that JSON does not have") from error
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise schema_error(path, "has a text with half a surrogate pair")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def repeated(item: str, low: int, high: int | None) -> str:
    """`item` from `low` to `high` times; many times as blocks, because llama.cpp makes a rule for each."""
    if max(low, high or 0) <= MAX_UNBLOCKED:
        return f"{item}{{{low},{'' if high is None else high}}}"
    size = math.isqrt(low) or 1
    required = f"({item}{{{size}}}){{{low // size}}} {item}{{{low % size}}} " if low else ""
    if high is None:
        return f"{required}{item}*"
    size = math.isqrt(high - low) + 1
    blocks = (high - low - size + 1) // size
    return f"{required}({item}{{{size}}}){{0,{blocks}}} {item}{{0,{high - low - blocks * size}}}"
