"""The objects that a JSON schema allows, as GBNF expressions: listed properties in their order, or any names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_edge.json_schema.keywords import (
    ANNOTATIONS,
    abbreviate,
    check_type,
    length_range,
    reject_keywords,
    schema_error,
)
from llava_edge.json_schema.rules import Rules, literal, repeated

Convert = Callable[[object, str], str]  # a schema of names or values, and where it is -> its expression


def object_expression(schema: dict[str, Any], path: str, rules: Rules, convert: Convert) -> str:
    """An expression for the objects that a schema allows. Raises `UsageError`."""
    schema = _with_property_names(schema, path)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    extra, names = schema.get("additionalProperties", True), schema["propertyNames"]
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise schema_error(path, "has properties that are not an object, or a required that is not a list")
    low, high = length_range(schema, "minProperties", "maxProperties", path)
    shared = ""  # what all values are
    if "enum" in names:
        reject_keywords(names.keys() - ANNOTATIONS - {"enum", "type"}, f"{path}/propertyNames", "enum")
        check_type(names, "enum", f"{path}/propertyNames")
        properties = dict.fromkeys(names["enum"], extra)
        shared = rules.add(convert(extra, f"{path}/additionalProperties"))
    if not all(isinstance(name, str) for name in required):
        raise schema_error(path, "requires something that is not a name")
    if forbidden := [name for name in required if properties.get(name) is False]:
        name = abbreviate(forbidden[0])
        raise schema_error(path, f"requires {name} and forbids it, as 'additionalProperties': false in 'allOf' does")
    if missing := [name for name in required if name not in properties]:
        raise schema_error(path, f"requires {abbreviate(missing[0])}, which is not among its properties")
    if not properties and extra is not False:
        return _record(schema, (low, high), path, rules, convert)
    properties = {name: value for name, value in properties.items() if value is not False}
    required = set(required)
    if low > len(required) or (high is not None and high < len(properties)):
        raise schema_error(path, "limits how many of its properties there are, which is not supported")
    rest, begin = '""', '""'
    for name, value in reversed(properties.items()):
        value = shared or convert(value, f"{path}/properties/{name}")
        member, after = rules.add(f"{literal(name, path)} colon {value}"), rules.add(rest)
        is_required = name in required
        begin = f"{member} {after}" if is_required else f"{member} {after} | {rules.add(begin)}"
        rest = f"comma {member} {after}" if is_required else f"(comma {member})? {after}"
    return f'"{{" {rules.add(begin)} "}}"'


def _record(schema: dict[str, Any], counts: tuple[int, int | None], path: str, rules: Rules, convert: Convert) -> str:
    """An object without listed properties. An answer may repeat a name, which counts once."""
    low, high = counts
    if low > 1:
        raise schema_error(path, "has a minProperties above 1 for names that may repeat, which is not supported")
    if high == 0:
        return '"{" "}"'
    name = rules.add(convert(schema["propertyNames"], f"{path}/propertyNames"))
    value = rules.add(convert(schema.get("additionalProperties", True), f"{path}/additionalProperties"))
    more = repeated(rules.add(f"comma {name} colon {value}"), 0, None if high is None else high - 1)
    return f'"{{" ({name} colon {value} {more}){"" if low else "?"} "}}"'


def _with_property_names(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of an object with the schema of its names, as strings, in `propertyNames` alone."""
    names, patterns = schema.get("propertyNames", {}), schema.get("patternProperties", {})
    if patterns != {}:
        if not isinstance(patterns, dict) or len(patterns) > 1 or schema.keys() & {"properties", "propertyNames"}:
            raise schema_error(path, "has patternProperties that are not one, alone; others are not supported")
        ((pattern, value),) = patterns.items()
        return schema | {"propertyNames": {"type": "string", "pattern": pattern}, "additionalProperties": value}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        raise schema_error(path, "has propertyNames that are not a schema of strings")
    if "properties" in schema and names.keys() - {"type"}:
        raise schema_error(path, "combines 'propertyNames' with 'properties', which is not supported")
    return schema | {"propertyNames": {**names, "type": "string"}}
