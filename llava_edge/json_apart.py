"""Whether nothing can satisfy two of several JSON schemas, which `oneOf` needs. "No" where that is not sure.

Knows nothing about grammars. Schemas come from strangers and may be wrong: what they say is looked at for a while only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

MOST_PAIRS, MOST_LEVELS = 10_000, 32  # looked at: schemas may refer to themselves, or list hundreds of others

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def apart(schemas: Sequence[object], find: Callable[[str], object]) -> bool:
    """find: what "#/..." refers to; it may raise."""
    looking = _Pairs(find)
    return all(looking.apart(a, b) for a, b in combinations(schemas, 2))


def is_of(value: object, kind: object) -> bool:
    """Whether a value is of a JSON type."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float) and kind in ("number", "integer"):
        return kind == "number" or isinstance(value, int) or value.is_integer()
    kinds = {"object": dict, "array": list, "string": str}
    return (kind == "null" and value is None) or isinstance(value, kinds.get(str(kind), ()))


class _Pairs:
    def __init__(self, find: Callable[[str], object]) -> None:
        self._find = find
        self._left = MOST_PAIRS

    def apart(self, a: object, b: object, level: int = 0) -> bool:
        """By types, constants, or a property that both require."""
        self._left -= 1
        a, b = self._meant(a), self._meant(b)
        if self._left < 0 or level > MOST_LEVELS or not isinstance(a, dict) or not isinstance(b, dict):
            return False
        for one, other in ((a, b), (b, a)):
            options = one.get("anyOf", one.get("oneOf"))
            if options is not None:
                return isinstance(options, list) and all(self.apart(each, other, level + 1) for each in options)
        constants = _constants(a), _constants(b)
        if constants[0] is not None and constants[1] is not None:
            return not constants[0] & constants[1]
        return not _kinds(a) & _kinds(b) or any(
            self.apart(value, _needed(b)[name], level + 1) for name, value in _needed(a).items() if name in _needed(b)
        )

    def _meant(self, schema: object) -> object:
        target = schema.get("$ref") if isinstance(schema, dict) else None
        return self._find(target) if isinstance(target, str) else schema


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """What a schema lists; None if it lists nothing."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def _constants(schema: dict[str, Any]) -> set[str] | None:
    """The values that alone satisfy a schema, as text; None if there are others, or objects or lists among them."""
    values = _values(schema)
    if values is None or any(isinstance(value, dict | list) for value in values):
        return None
    return {json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values}


def _kinds(schema: dict[str, Any]) -> set[str]:
    """Types of what may satisfy a schema, integers as numbers; all if it does not say."""
    values, said = _values(schema), schema.get("type", list(TYPES))
    if values is not None:
        kinds = [kind for kind in TYPES for value in values if is_of(value, kind)]
    else:
        kinds = list(map(str, said if isinstance(said, list) else [said]))
    return {"number" if kind == "integer" else kind for kind in kinds}


def _needed(schema: dict[str, Any]) -> dict[str, object]:
    """The schemas of the properties that a schema of objects requires."""
    required, properties = schema.get("required"), schema.get("properties")
    if schema.get("type") != "object" or not isinstance(required, list) or not isinstance(properties, dict):
        return {}
    return {name: properties[name] for name in required if isinstance(name, str) and name in properties}
