"""A second reading of the keywords of JSON schemas that are supported."""

from __future__ import annotations

import re
from datetime import date, datetime, time
from email.headerregistry import Address
from fractions import Fraction
from functools import reduce
from ipaddress import IPv4Address, IPv6Address, ip_address
from operator import getitem
from typing import Any
from uuid import UUID

FORMATS: dict[str, Any] = {
    "date": date.fromisoformat,
    "time": lambda text: time.fromisoformat(text).tzinfo,
    "date-time": lambda text: datetime.fromisoformat(text).tzinfo,
    "uuid": UUID,
    "email": lambda text: Address(addr_spec=text),
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "ipvanyaddress": ip_address,
    "uuid7": lambda text: UUID(text).version == 7,
    "hostname": lambda text: Address(addr_spec=f"me@{text}"),
    "duration": lambda text: re.search(r"^P(\d|T\d).*[YMDWHS]$", text),
}


def satisfies(value: Any, schema: Any, root: Any) -> bool:
    """By JSON Schema 2020-12, with draft 7's tuples and what OpenAPI 3.0's `nullable` is meant to say."""
    if isinstance(schema, bool) or schema == {}:
        return schema is not False
    if schema.get("nullable") and value is None:
        return True
    if isinstance(schema.get("items"), list):
        schema = schema | {"prefixItems": schema["items"], "items": schema.get("additionalItems", True)}
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    tests: dict[str, Any] = {
        "$ref": lambda target: satisfies(value, reduce(getitem, target.split("/")[1:], root), root),
        "not": lambda other: not satisfies(value, other, root),
        "const": lambda wanted: same(value, wanted),
        "enum": lambda wanted: any(same(value, each) for each in wanted),
        "anyOf": lambda options: any(satisfies(value, option, root) for option in options),
        "oneOf": lambda options: sum(satisfies(value, option, root) for option in options) == 1,
        "type": lambda names: any(
            (type(value) in (int, float) and (name == "number" or value == int(value)))
            if name in ("number", "integer")
            else type(value) is kinds[name]
            for name in (names if isinstance(names, list) else [names])
        ),
        "properties": lambda named: (
            not isinstance(value, dict)
            or all(name not in value or satisfies(value[name], each, root) for name, each in named.items())
        ),
        "propertyNames": lambda names: (
            not isinstance(value, dict) or all(satisfies(name, names, root) for name in value)
        ),
        "patternProperties": lambda patterns: (
            not isinstance(value, dict)
            or all(
                satisfies(each, want, root)
                for p, want in patterns.items()
                for n, each in value.items()
                if re.search(p, n)
            )
        ),
        "minProperties": lambda low: not isinstance(value, dict) or len(value) >= low,
        "maxProperties": lambda high: not isinstance(value, dict) or len(value) <= high,
        "required": lambda names: not isinstance(value, dict) or all(name in value for name in names),
        "additionalProperties": lambda extra: (
            not isinstance(value, dict)
            or all(
                name in schema.get("properties", {})
                or any(re.search(pattern, name) for pattern in schema.get("patternProperties", {}))
                or (extra is not False and satisfies(each, extra, root))
                for name, each in value.items()
            )
        ),
        "allOf": lambda options: all(satisfies(value, option, root) for option in options),
        # Of `properties` alone: tests that have other keywords for names say what is right and wrong.
        "unevaluatedProperties": lambda extra: (
            not isinstance(value, dict)
            or all(
                name in known_properties(schema, root) or satisfies(each, extra, root) for name, each in value.items()
            )
        ),
        "items": lambda each: (
            not isinstance(value, list)
            or all(each is not False and satisfies(v, each, root) for v in value[len(schema.get("prefixItems", ())) :])
        ),
        "prefixItems": lambda listed: (
            not isinstance(value, list) or all(satisfies(v, each, root) for v, each in zip(value, listed, strict=False))
        ),
        "minItems": lambda low: not isinstance(value, list) or len(value) >= low,
        "maxItems": lambda high: not isinstance(value, list) or len(value) <= high,
        "minLength": lambda low: not isinstance(value, str) or len(value) >= low,
        "maxLength": lambda high: not isinstance(value, str) or len(value) <= high,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value),
        "minimum": lambda low: not isinstance(value, int | float) or value >= low,
        "maximum": lambda high: not isinstance(value, int | float) or value <= high,
        "exclusiveMinimum": lambda low: (
            not isinstance(value, int | float) or value > (schema["minimum"] if low is True else low)
        ),
        "exclusiveMaximum": lambda high: not isinstance(value, int | float) or value < high,
        "multipleOf": lambda step: (
            not isinstance(value, int | float) or Fraction(str(value)) % Fraction(str(step)) == 0
        ),
        "format": lambda name: "maxLength" in schema or not isinstance(value, str) or FORMATS[name](value),
    }
    return all(test(schema[word]) for word, test in tests.items() if word in schema)


def same(one: Any, other: Any) -> bool:
    """In Python 1 is True, in JSON it is not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def known_properties(schema: Any, root: Any) -> set[str]:
    """Names in the `properties` of a schema and of those that it combines."""
    parts = [part for keyword in ("allOf", "anyOf", "oneOf") for part in schema.get(keyword, [])]
    parts += [reduce(getitem, schema["$ref"].split("/")[1:], root)] if "$ref" in schema else []
    return set(schema.get("properties", {})).union(*(known_properties(part, root) for part in parts))
