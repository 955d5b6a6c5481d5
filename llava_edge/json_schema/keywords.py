"""What JSON schemas say of one value: their keywords, checked when they are read, and the errors that name where."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_schema.disjoint import TYPES, has_type

MAX_ALTERNATIVES = 500  # of an enum, anyOf or oneOf
MAX_REPETITIONS = 100_000  # what lengths and item counts may require; larger maxima are lowered to it

ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "format", "$schema", "$id", "$comment"}
ANNOTATIONS |= {"$defs", "definitions", "readOnly", "writeOnly", "strict", "discriminator"}
ANNOTATIONS |= {"example", "externalDocs", "xml", "components"}  # OpenAPI's
ANNOTATIONS |= {"id", "enumNames", "propertyOrdering"}  # draft 4's, marshmallow's and Google's
ANNOTATIONS |= {"contentEncoding", "contentMediaType", "contentSchema"}  # JSON Schema has them not followed
LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "propertyNames", "patternProperties"}
    | {"minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": LIMITS,
    "integer": LIMITS,
}


def is_annotation(schema: dict[str, Any], keyword: str) -> bool:
    """Whether a keyword restricts nothing. Those with an x- are OpenAPI's for everybody's own use."""
    if keyword in ("uniqueItems", "nullable"):
        return not schema[keyword]
    return keyword in ANNOTATIONS or keyword.startswith("x-")


def allows_all(schema: object) -> bool:
    """Whether a schema is one of the two without keywords that all values satisfy."""
    return schema is True or schema == {}


def choices(value: object, path: str) -> list[Any]:
    """`value`, if it is a list of 1 to `MAX_ALTERNATIVES`. Raises `UsageError`."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ALTERNATIVES:
        raise schema_error(path, f"needs a list of 1 to {MAX_ALTERNATIVES} choices")
    return value


def check_type(schema: dict[str, Any], keyword: str, path: str) -> None:
    """Raise `UsageError` if the `type` of a schema contradicts its `const` or `enum`."""
    if "type" not in schema:
        return
    names = schema["type"]
    types = set(TYPES).intersection(map(str, names if isinstance(names, list) else [names]))  # each once
    values = [schema[keyword]] if keyword == "const" else choices(schema[keyword], path)
    if wrong := [value for value in values if not any(has_type(value, kind) for kind in types)]:
        raise schema_error(path, f"allows {abbreviate(wrong[0])}, which is not of its type")


def length_range(schema: dict[str, Any], least: str, most: str, path: str) -> tuple[int, int | None]:
    """The lengths, or counts, that two keywords allow; None if there is no upper limit. Raises `UsageError`."""
    for value in (schema[keyword] for keyword in (least, most) if keyword in schema):
        if type(value) is not int or value < 0:
            raise schema_error(path, f"has a {least} or {most} that is not an integer from 0 on")
    low, high = schema.get(least, 0), schema.get(most)
    if low > MAX_REPETITIONS:
        raise schema_error(path, f"has a {least} above {MAX_REPETITIONS}")
    if high is not None and high < low:
        raise schema_error(path, f"has a {most} below its {least}")
    return low, None if high is None else min(high, MAX_REPETITIONS)


def bound(schema: dict[str, Any], keyword: str, path: str) -> tuple[Decimal | None, bool]:
    """A minimum or maximum, and whether it is exclusive. Raises `UsageError`."""
    exclusive = f"exclusive{keyword.capitalize()}"
    if keyword in schema and isinstance(schema.get(exclusive), bool):  # as OpenAPI 3.0 has it
        return decimal(schema, keyword, path), schema[exclusive]
    inner, outer = decimal(schema, keyword, path), decimal(schema, exclusive, path)
    if inner is None or outer is None:
        return (inner, False) if outer is None else (outer, True)
    exclusive_is_narrower = outer >= inner if keyword == "minimum" else outer <= inner
    return (outer, True) if exclusive_is_narrower else (inner, False)


def decimal(schema: dict[str, Any], keyword: str, path: str) -> Decimal | None:
    """A number as it is written: the shortest text that means this float. Raises `UsageError`."""
    value = schema.get(keyword)
    if keyword not in schema:
        return None
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        raise schema_error(path, f"has {abbreviate(value)} for {keyword}; expected a number")
    return Decimal(value) if type(value) is int else Decimal(repr(value))


def reject_keywords(keywords: set[str], path: str, other_keyword: str = "") -> None:
    """Raise `UsageError` if there are any. other_keyword: the one that they cannot be combined with."""
    if not keywords:
        return
    if other_keyword:
        raise schema_error(path, f"combines {abbreviate(min(keywords))} with {other_keyword!r}, which is not supported")
    raise schema_error(path, f"uses {abbreviate(min(keywords))}, which is not supported")


def schema_error(path: str, what: str) -> UsageError:
    """The error for a schema at `path`; `what` completes a sentence that begins with it."""
    where = "The JSON schema" if path == "#" else f"The JSON schema at {abbreviate(path)}"
    return UsageError(f"{where} {what}.")


def abbreviate(value: object) -> str:
    """At most 80 ASCII characters for a value that a client sent."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
