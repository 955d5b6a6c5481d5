"""JSON schemas -> grammars in llama.cpp's GBNF, so that an answer cannot be anything but JSON of that schema.

What a grammar allows always satisfies the schema; it may allow less (properties come in the schema's order, none is
added, at most one space between tokens). A keyword that cannot be kept is refused, never ignored, except for those
that only describe. Knows nothing about engines. Schemas come from strangers: size and depth are limited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_disjoint import TYPES, has_type, pairwise_disjoint
from llava_edge.json_numbers import MOST, MOST_BOUND, integers, numbers

MAX_RULES = 500
MAX_CHOICES = 500  # of an enum
MAX_REPEATS = 500  # of a character or item with a stated number: llama.cpp writes each out
MAX_DEPTH = 32

_DESCRIBING = {"title", "description", "default", "examples", "deprecated", "format", "$schema", "$id", "$comment"}
_DESCRIBING |= {"$defs", "definitions", "readOnly", "writeOnly", "strict", "discriminator"}
_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "number": _LIMITS,
    "integer": _LIMITS,
}

_BASE = {
    "comma": '"," " "?',
    "colon": '":" " "?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" (bmp | pair))',
    "bmp": "[0-9a-cA-Ce-fE-F] hex{3} | [dD] [0-7] hex{2}",
    "pair": r'[dD] [89abAB] hex{2} "\\u" [dD] [c-fC-F] hex{2}',  # of surrogates: one character
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "array": '"[" (value (comma value)*)? "]"',
    "object": '"{" (string colon value (comma string colon value)*)? "}"',
    "value": "object | array | string | number | boolean | null",
}


def any_object() -> str:
    """The grammar of every JSON object."""
    return _text({"root": "object"})


def from_schema(schema: object) -> str:
    """The grammar of a JSON schema, as `json.loads` gives it. Raises `UsageError` naming what it cannot express."""
    converter = _Converter(schema)
    root = converter.convert(schema, "#", 0)
    return _text({"root": root, **converter.rules})


def _text(rules: dict[str, str]) -> str:
    return "".join(f"{name} ::= {rule}\n" for name, rule in (rules | _BASE).items())


class _Converter:
    """Turns schemas into expressions; `rules` are what they name."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._refs: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of expressions that have a rule already
        self._open: set[str] = set()  # references that are being followed, with nothing of an answer between them
        self.rules: dict[str, str] = {}

    def convert(self, schema: object, path: str, depth: int) -> str:
        """An expression for a schema. `path` tells a person where it stands."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise _refused(path, f"is {_short(schema)}, not an object")
        if depth > MAX_DEPTH:
            raise _refused(path, f"is nested deeper than {MAX_DEPTH} levels")
        words = set(schema) - _DESCRIBING
        if not words:
            return "value"
        for word, method in (("$ref", self._ref), ("const", self._const), ("enum", self._enum)):
            if word in words:
                _only(words - {word, "type"}, path, word)
                return method(self._of_type(schema, word, path), path, depth)
        for word in ("anyOf", "oneOf", "allOf"):
            if word in words:
                _only(words - {word}, path, word)
                options = _list(schema[word], f"{path}/{word}")
                if word == "oneOf" and not pairwise_disjoint(options, lambda target: self._find(target, path)):
                    raise _refused(path, "uses 'oneOf' of schemas that one answer may satisfy two of; use 'anyOf'")
                if word == "allOf" and len(options) > 1:
                    raise _refused(path, "uses 'allOf' of several schemas, which answers cannot be held to")
                return self._either(
                    self.convert(each, f"{path}/{word}/{i}", depth + 1) for i, each in enumerate(options)
                )
        return self._typed(schema, words, path, depth)

    def _typed(self, schema: dict[str, Any], words: set[str], path: str, depth: int) -> str:
        _only(words - {"type"}.union(*_KEYWORDS.values()), path)
        kinds = schema.get("type", [kind for kind in TYPES if words & _KEYWORDS.get(kind, set())])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or not all(kind in TYPES for kind in kinds):
            raise _refused(path, f"has the type {_short(schema.get('type'))}, which JSON does not have")
        _only(words - {"type"}.union(*(_KEYWORDS.get(kind, set()) for kind in kinds)), path)
        kinds = [kind for kind in kinds if kind != "integer" or "number" not in kinds]
        methods = {"object": self._object, "array": self._array, "string": self._string}
        methods |= {"integer": self._integer, "number": self._number}
        return self._either(methods[kind](schema, path, depth) if kind in methods else kind for kind in kinds)

    def _either(self, options: Iterator[str]) -> str:
        """One of several. Equal ones are one: each would be followed for itself, twice as many with every level."""
        return self._rule(" | ".join(dict.fromkeys(options)))

    def _inner(self, schema: object, path: str, depth: int) -> str:
        """An expression for a part, before which there is a bracket."""
        outer, self._open = self._open, set()
        try:
            return self.convert(schema, path, depth)
        finally:
            self._open = outer

    def _ref(self, target: object, path: str, depth: int) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise _refused(path, f"refers to {_short(target)}; only places inside the schema can be referred to")
        if target in self._open or target == "#" == path:
            raise _refused(path, f"refers to {_short(target)}, which is itself, with nothing between")
        if target not in self._refs:
            self._refs[target] = name = f"ref{len(self._refs)}"
            self.rules[name] = ""  # it may refer to itself
            self._open.add(target)
            self.rules[name] = self.convert(self._find(target, path), target, depth + 1)
            self._open.discard(target)
        return self._refs[target]

    def _of_type(self, schema: dict[str, Any], word: str, path: str) -> object:
        """The schema's `const`, `enum` or `$ref`. Raises `UsageError` if its `type` says something else beside."""
        if "type" not in schema:
            return schema[word]
        if word == "$ref":
            target = self._find(schema[word], path) if isinstance(schema[word], str) else None
            if not isinstance(target, dict) or target.get("type") != schema["type"]:
                _only({"type"}, path, word)
            return schema[word]
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        values = [schema[word]] if word == "const" else _list(schema[word], path)
        if wrong := [value for value in values if not any(has_type(value, kind) for kind in kinds)]:
            raise _refused(path, f"allows {_short(wrong[0])}, which is not of its type")
        return schema[word]

    def _find(self, target: str, path: str) -> object:
        found: Any = self._root
        for part in target[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                raise _refused(path, f"refers to {_short(target)}, which is not there")
            found = found[name]
        return found

    def _const(self, value: object, path: str, depth: int) -> str:
        return _literal(value, path)

    def _enum(self, values: object, path: str, depth: int) -> str:
        return self._either(_literal(value, path) for value in _list(values, path))

    def _string(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = _range(schema, "minLength", "maxLength", path)
        return "string" if (low, high) == (0, None) else rf'"\"" char{_times(low, high)} "\""'

    def _integer(self, schema: dict[str, Any], path: str, depth: int) -> str:
        if not _LIMITS & set(schema):
            return "integer"
        low, above = _limit(schema, "minimum", path)
        high, below = _limit(schema, "maximum", path)
        least = -MOST if low is None else max(-MOST, math.floor(low) + 1 if above else math.ceil(low))
        most = MOST if high is None else min(MOST, math.ceil(high) - 1 if below else math.floor(high))
        if least > most:
            raise _refused(path, f"leaves no integer of up to {len(str(MOST))} digits")
        return self._rule(integers(least, most))

    def _number(self, schema: dict[str, Any], path: str, depth: int) -> str:
        if not _LIMITS & set(schema):
            return "number"
        low, above = _limit(schema, "minimum", path)
        high, below = _limit(schema, "maximum", path)
        expression = numbers(_whole(low, path), _whole(high, path), above, below)
        if not expression:
            raise _refused(path, "leaves no number")
        return self._rule(expression)

    def _array(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = _range(schema, "minItems", "maxItems", path)
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise _refused(path, "has prefixItems that are no list")
        listed = [self._item(each, f"{path}/prefixItems/{i}", depth) for i, each in enumerate(first[:high])]
        most = len(listed) if items is False else high
        if most is not None and low > most:
            raise _refused(path, "needs more items than it allows")
        if most == len(listed):
            return f'"[" {self._sequence(listed, low, "")} "]"'
        item = self._item(items, f"{path}/items", depth)
        listed = listed or [item]
        more = _times(max(low - len(listed), 0), None if most is None else most - len(listed))
        return f'"[" {self._sequence(listed, low, f"(comma {item}){more}")} "]"'

    def _item(self, schema: object, path: str, depth: int) -> str:
        return self._rule(self._inner(schema, path, depth + 1))

    def _sequence(self, items: list[str], needed: int, end: str) -> str:
        """Items with commas, of which the first ones are needed; `end` may only follow all of them."""
        for number, item in reversed(list(enumerate(items))):
            name = self._rule(f"{'comma ' if number else ''}{item} {end}".strip())
            end = name if number < needed else f"{name}?"
        return end

    def _object(self, schema: dict[str, Any], path: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        extra = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _refused(path, "has properties that are no object, or a list of required ones that is none")
        if not all(isinstance(name, str) for name in required):
            raise _refused(path, "requires something that is no name")
        if missing := [name for name in required if name not in properties]:
            raise _refused(path, f"requires {_short(missing[0])}, which is not among its properties")
        if not properties and extra is not False:
            value = self._rule(self._inner(extra, f"{path}/additionalProperties", depth + 1))
            return f'"{{" (string colon {value} (comma string colon {value})*)? "}}"'
        rest, begin = '""', '""'
        for name, value in reversed(properties.items()):
            member = f"{_literal(name, path)} colon " + self._inner(value, f"{path}/properties/{name}", depth + 1)
            member, after = self._rule(member), self._rule(rest)
            needed = name in required
            begin = f"{member} {after}" if needed else f"{member} {after} | {self._rule(begin)}"
            rest = f"comma {member} {after}" if needed else f"(comma {member})? {after}"
        return f'"{{" {self._rule(begin)} "}}"'

    def _rule(self, expression: str) -> str:
        """The name of the rule with this expression; a single name stays what it is."""
        if expression in self._names:
            return self._names[expression]
        if expression == '""' or expression.isidentifier():
            return expression
        if len(self.rules) >= MAX_RULES:
            raise UsageError(f"The JSON schema is too large: it needs more than {MAX_RULES} rules.")
        name = self._names[expression] = f"r{len(self.rules)}"
        self.rules[name] = expression
        return name


def _literal(value: object, path: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise _refused(path, "names a number that JSON does not have") from error
    if any(0xD800 <= ord(mark) < 0xE000 for mark in text):
        raise _refused(path, "names a text with half a surrogate pair")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
        raise _refused(path, f"needs a list of 1 to {MAX_CHOICES} choices")
    return value


def _range(schema: dict[str, Any], least: str, most: str, path: str) -> tuple[int, int | None]:
    for value in (schema[word] for word in (least, most) if word in schema):
        if type(value) is not int or not 0 <= value <= MAX_REPEATS:
            raise _refused(path, f"has a {least} or {most} that is no whole number up to {MAX_REPEATS}")
    low, high = schema.get(least, 0), schema.get(most)
    if high is not None and high < low:
        raise _refused(path, f"has a {most} below its {least}")
    return low, high


def _limit(schema: dict[str, Any], word: str, path: str) -> tuple[int | float | None, bool]:
    """A minimum or maximum, and whether it is itself outside."""
    exclusive = f"exclusive{word.capitalize()}"
    if word in schema and exclusive in schema:
        raise _refused(path, f"has a {word} and an {exclusive}; one of them was expected")
    name = exclusive if exclusive in schema else word
    if name not in schema:
        return None, False
    value = schema[name]
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        raise _refused(path, f"has {_short(value)} for {name}, where a number was expected")
    return value, name == exclusive


def _whole(bound: int | float | None, path: str) -> int | None:
    if bound is not None and (bound != int(bound) or abs(bound) > MOST_BOUND):
        raise _refused(path, f"limits a number by {_short(bound)}; only whole limits up to {MOST_BOUND} can be kept")
    return None if bound is None else int(bound)


def _times(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _only(left: set[str], path: str, beside: str = "") -> None:
    if not left:
        return
    if beside:
        raise _refused(path, f"uses {_short(min(left))} beside {beside!r}, and answers cannot be held to both at once")
    raise _refused(path, f"uses {_short(min(left))}, which answers cannot be held to")


def _refused(path: str, what: str) -> UsageError:
    where = "The JSON schema" if path == "#" else f"The JSON schema at {_short(path)}"
    return UsageError(f"{where} {what}.")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
