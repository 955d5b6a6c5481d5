"""Keywords of JSON schemas as zod, pydantic and OpenAPI write them -> those that LLGuidance follows. They say the same,
except for numbers that not every program can read.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_schema.formats import FORMATS

COMBINING = {"anyOf", "oneOf", "allOf"}
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "unevaluatedProperties", "propertyNames"}
    | {"patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
SUPPORTED = COMBINING.union({"type", "enum", "const", "$ref"}, *OF_TYPE.values())
COUNTS = {"minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"}
MAX_NUMBER = 2**53 - 1  # up to there every program reads an integer exactly (RFC 8259), LLGuidance included
MAX_OPTIONAL = 2000  # properties of an object; LLGuidance has 4 items for each, and `constraints.MAX_ITEMS` at once
TINY = 1e-9  # by which an exclusive limit becomes inclusive, relative to it
MAX_MULTIPLE = 5000  # in units of its last decimal place. LLGuidance has as many states, and gives up at some 8000

_ROUNDING = {"minimum": ROUND_CEILING, "maximum": ROUND_FLOOR}
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_ANNOTATIONS |= {"$defs", "definitions", "readOnly", "writeOnly", "strict", "discriminator"}
_ANNOTATIONS |= {"example", "externalDocs", "xml", "components"}  # OpenAPI's
_ANNOTATIONS |= {"id", "enumNames", "propertyOrdering"}  # draft 4's, marshmallow's and Google's
_ANNOTATIONS |= {"contentEncoding", "contentMediaType", "contentSchema"}  # JSON Schema has them not followed

# Patterns of zod and pydantic that look ahead, which LLGuidance does not, and equal ones without.
_PATTERNS = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
}
# Classes of characters, and escapes outside of them; in classes, what LLGuidance reads unlike ECMAScript and Python.
_CLASS = re.compile(r"(?s)\\.|\[(?P<negation>\^?)(?P<inside>\]?(\\.|[^\]\\])*)")
_IN_CLASS = re.compile(r"(?s)(?P<nul>\\(x00|u0000)-)|\\.|\[:|(?P<sign>[\[&~])")


def is_annotation(keyword: str, value: object) -> bool:
    """Whether a keyword restricts nothing. Those with an x- are OpenAPI's for everybody's own use."""
    if keyword in ("uniqueItems", "nullable"):
        return value is False
    return keyword in _ANNOTATIONS or keyword.startswith("x-")


def prepare(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """Rewrite `propertyNames` and patterns, before the schemas in a schema are converted. Raises `UsageError`."""
    if "propertyNames" in schema:
        schema = _with_names(schema, path)
    if isinstance(pattern := schema.get("pattern"), str):
        schema = schema | {"pattern": _pattern(pattern)}
    if isinstance(named := schema.get("patternProperties"), dict):
        schema = schema | {"patternProperties": {_pattern(pattern): value for pattern, value in named.items()}}
    return schema


def _pattern(pattern: str) -> str:
    return _CLASS.sub(_class, _PATTERNS.get(pattern, pattern))


def _class(match: re.Match[str]) -> str:
    """A class, with no brackets and operators in it, and no NUL. A class of all characters below the space allows
    quotes and backslashes, too, in LLGuidance 1.9; without the first of them, which no answer needs, it does not."""
    if (inside := match["inside"]) is None:
        return match[0]
    inside = _IN_CLASS.sub(lambda found: r"\x01-" if found["nul"] else "\\" * bool(found["sign"]) + found[0], inside)
    if not match["negation"]:
        return f"[{inside}"
    return r"[^\x00" + "\\" * inside.startswith(("-", "]")) + inside


def rewrite(schema: dict[str, Any], path: str, is_part: bool) -> dict[str, Any]:
    """Rewrite all other keywords, when the schemas in it are converted. is_part: others are combined with it, so that
    its keywords do not tell the type. Raises `UsageError`."""
    schema = dict(schema) if is_part else _with_type(schema)
    if isinstance(schema.get("type"), list):
        schema["type"] = list(dict.fromkeys(map(str, schema["type"])))
    for keyword in COUNTS & schema.keys():
        if isinstance(schema[keyword], float) and schema[keyword].is_integer():  # 2.0 is an integer in JSON Schema
            schema[keyword] = int(schema[keyword])
    _check_object(schema, path)
    _check_constant([schema.get("enum"), schema.get("const")], path)
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    if "format" in schema and (pattern := FORMATS.get(str(schema.pop("format")))):  # others are annotations
        schema["allOf"] = [*schema.get("allOf", []), {"pattern": pattern}]
    return _with_numbers(schema, path, is_part)


def _check_object(schema: dict[str, Any], path: str) -> None:
    low, properties, required = (schema.get(keyword) for keyword in ("minProperties", "properties", "required"))
    properties = properties if isinstance(properties, dict) else {}
    if isinstance(low, int) and low > 1 and not properties:
        raise schema_error(path, "has a minProperties above 1 for names that may repeat, which is not supported")
    named = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    optional = len(properties.keys() - named)
    if optional > MAX_OPTIONAL:
        raise schema_error(path, f"has {optional} optional properties; expected at most {MAX_OPTIONAL}")


def _check_constant(value: object, path: str) -> None:
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _check_constant(each, path)
    elif type(value) is int and (written := int(Decimal(str(float(value))))) != value:  # LLGuidance's, from 2**53 on
        raise schema_error(path, f"has the constant {value}, which would be written {written}; use a string")


def _with_type(schema: dict[str, Any]) -> dict[str, Any]:
    """Its keywords tell it, where they are of certain types alone."""
    types = [kind for kind, keywords in OF_TYPE.items() if keywords & schema.keys()]
    combined = schema.keys() & COMBINING
    if not types or schema.keys() & {"type", "enum", "const", "$ref"} or (combined and types != ["object"]):
        return dict(schema)
    return {"type": types, **schema}


def _with_names(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """`propertyNames` as `properties` or `patternProperties`."""
    schema = dict(schema)
    names = schema.pop("propertyNames")
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        raise schema_error(path, "has propertyNames that are not a schema of strings")
    names = {word: value for word, value in names.items() if word != "type" and not is_annotation(word, value)}
    if pattern := FORMATS.get(str(names.pop("format", ""))):
        names.setdefault("pattern", pattern)  # zod has a pattern with the format, which says the same
    if not names:
        return schema
    if schema.keys() & {"properties", "patternProperties"}:
        raise schema_error(path, "combines 'propertyNames' with properties, which is not supported")
    values = schema.get("additionalProperties", True)
    schema["additionalProperties"] = False
    if names.keys() == {"enum"} and isinstance(names["enum"], list) and all(isinstance(n, str) for n in names["enum"]):
        return schema | {"properties": dict.fromkeys(names["enum"], values)}
    if names.keys() == {"pattern"}:
        return schema | {"patternProperties": {names["pattern"]: values}}
    if names.keys() <= {"minLength", "maxLength"} and all(type(n) is int and n >= 0 for n in names.values()):
        lengths = f"{names.get('minLength', 0)},{names.get('maxLength', '')}"
        return schema | {"patternProperties": {f"^(?s:.){{{lengths}}}$": values}}
    raise schema_error(path, f"has propertyNames of {short(names)}, which are not supported")


def _with_numbers(schema: dict[str, Any], path: str, is_part: bool) -> dict[str, Any]:
    """Limits of numbers, none beyond `MAX_NUMBER`, and inclusive where LLGuidance 1.9 is wrong about exclusive ones: it
    allows an excluded 0 where the other limit is 0.5, and the like."""
    step = schema.get("multipleOf")
    if _is_number(step):
        places = max(0, -int(Decimal(str(step)).normalize().as_tuple().exponent))
        if not 0 < Decimal(str(step)).scaleb(places) <= MAX_MULTIPLE:
            raise schema_error(path, f"has a multipleOf that is not 1 to {MAX_MULTIPLE} of its last decimal place")
    types = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
    low, high = (
        [schema[word] for word in (limit, f"exclusive{limit.capitalize()}") if _is_number(schema.get(word))]
        for limit in ("minimum", "maximum")
    )
    is_alone = not is_part and not schema.keys() & (COMBINING | {"$ref", "multipleOf"})
    is_exact = types == ["integer"] or (is_alone and not (low and high and min(high) - max(low) < 1))
    for limit, sign in (("minimum", -1), ("maximum", 1)):
        exclusive, narrower = f"exclusive{limit.capitalize()}", max if sign < 0 else min
        if schema.get(exclusive) is False:  # as OpenAPI 3.0 has it
            del schema[exclusive]
        elif schema.get(exclusive) is True and limit in schema:
            schema[exclusive] = schema.pop(limit)
        if _is_number(schema.get(exclusive)) and not is_exact:
            end = schema.pop(exclusive)
            inner = end - sign * TINY * max(1, abs(end))
            schema[limit] = narrower(inner, schema.get(limit, inner))
        if {"integer", "number"} & set(map(str, types)) and not schema.keys() & {"enum", "const"}:
            schema.setdefault(limit, sign * MAX_NUMBER)
        if _is_number(schema.get(limit)):
            schema[limit] = narrower(schema[limit], sign * MAX_NUMBER)
    return schema | _limits_on_multiples(schema)


def _limits_on_multiples(schema: dict[str, Any]) -> dict[str, float]:
    """The outermost multiples within the limits, which LLGuidance 1.9 leaves out otherwise: 0.4 below 0.5, of 0.1."""
    numbers = {word: Decimal(str(schema[word])) for word in ("multipleOf", *_ROUNDING) if _is_number(schema.get(word))}
    if (step := numbers.pop("multipleOf", None)) is None:
        return {}
    limits = {word: (end / step).to_integral_value(_ROUNDING[word]) * step for word, end in numbers.items()}
    if len(limits) == 2 and limits["minimum"] > limits["maximum"]:  # none, as LLGuidance will say
        return {}
    return {word: float(end) if end % 1 else int(end) for word, end in limits.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def schema_error(path: str, what: str) -> UsageError:
    """The error for a schema at `path`; `what` completes a sentence that begins with it."""
    return UsageError(f"The JSON schema {'' if path == '#' else f'at {short(path)} '}{what}.")


def short(value: object) -> str:
    """At most 80 ASCII characters for a value that a client sent."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
