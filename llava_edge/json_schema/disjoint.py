"""Check that no two of several JSON schemas can be satisfied by one value, which `oneOf` requires.

Knows nothing about grammars. Schemas are untrusted and may be malformed, so the search is bounded; where it cannot
tell, schemas count as overlapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

MAX_STEPS, MAX_DEPTH = 100_000, 32  # schemas may refer to themselves, or list hundreds of others

Constants = set[tuple[bool, Any]]
Facts = tuple[Constants | None, set[str]]  # of a schema: its constants and types

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def has_type(value: object, kind: object) -> bool:
    """Whether a value is of a JSON type."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float) and kind in ("number", "integer"):
        return kind == "number" or isinstance(value, int) or value.is_integer()
    classes = {"object": dict, "array": list, "string": str}
    return (kind == "null" and value is None) or isinstance(value, classes.get(str(kind), ()))


class DisjointChecker:
    """Compares schemas that are parts of one, in `MAX_STEPS` in all: a pair, or 20 values.

    inline: returns a schema for the same values, always the same one, whose own keywords are not `$ref`, `allOf` or,
    unless alone, `anyOf` or `oneOf`; it may raise.
    """

    def __init__(self, inline: Callable[[object], object]) -> None:
        self._inline = inline
        self._remaining_steps = MAX_STEPS
        self._facts: dict[int, Facts] = {}  # by id of a schema

    def pairwise(self, schemas: Sequence[object]) -> bool:
        """Whether no two of them overlap."""
        return all(self._pair(a, b) for a, b in combinations(schemas, 2))

    def _pair(self, a: object, b: object, depth: int = 0) -> bool:
        """Whether types, constants or a property that both require, or one forbids, tell them apart."""
        self._remaining_steps -= 1
        if self._remaining_steps < 0 or depth > MAX_DEPTH:
            return False
        a, b = self._inline(a), self._inline(b)
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict):
            return False
        for one, other in ((a, b), (b, a)):
            options = one.get("anyOf", one.get("oneOf"))
            if options is not None:
                return isinstance(options, list) and all(self._pair(each, other, depth + 1) for each in options)
        (a_constants, a_types), (b_constants, b_types) = self._facts_of(a), self._facts_of(b)
        if a_constants is not None and b_constants is not None:
            self._remaining_steps -= min(len(a_constants), len(b_constants)) // 20
            return a_constants.isdisjoint(b_constants)
        if not a_types & b_types:
            return True
        a_required, b_required = _required_properties(a), _required_properties(b)
        self._remaining_steps -= (len(a_required) + len(b_required)) // 20
        if _forbids_any(a, b_required) or _forbids_any(b, a_required):
            return True
        return any(
            self._pair(schema, b_required[name], depth + 1) for name, schema in a_required.items() if name in b_required
        )

    def _facts_of(self, schema: dict[str, Any]) -> Facts:
        """Found once for each schema: it may list thousands of values."""
        if id(schema) not in self._facts:
            self._facts[id(schema)] = _constants(schema), _types(schema)
        return self._facts[id(schema)]


def _listed_values(schema: dict[str, Any]) -> list[Any] | None:
    """The values of `enum` or `const`; None without them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def _constants(schema: dict[str, Any]) -> Constants | None:
    """The only values that satisfy a schema, as (is a boolean, value): in Python 1 is True, in JSON it is 1.0 alone.

    None if it lists none, or objects or arrays among them.
    """
    values = _listed_values(schema)
    if values is None or any(isinstance(value, dict | list) for value in values):
        return None
    return {(isinstance(value, bool), value) for value in values}


def _types(schema: dict[str, Any]) -> set[str]:
    """Types of the values that may satisfy a schema, integers as numbers; all types if it names none."""
    values, declared = _listed_values(schema), schema.get("type", list(TYPES))
    if values is not None:
        types = [kind for kind in TYPES for value in values if has_type(value, kind)]
    else:
        types = list(map(str, declared if isinstance(declared, list) else [declared]))
    return {"number" if kind == "integer" else kind for kind in types}


def _required_properties(schema: dict[str, Any]) -> dict[str, object]:
    """The schemas of the properties that an object schema requires."""
    required, properties = schema.get("required"), schema.get("properties")
    if schema.get("type") != "object" or not isinstance(required, list) or not isinstance(properties, dict):
        return {}
    return {name: properties[name] for name in required if isinstance(name, str) and name in properties}


def _forbids_any(schema: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether an object schema allows only the properties that it lists, and not one of `names`."""
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return False
    properties = schema.get("properties", {})
    return isinstance(properties, dict) and any(name not in properties for name in names)
