"""JSON schemas -> grammars in llama.cpp's GBNF, which make every answer valid JSON of that schema.

A grammar allows only what satisfies the schema, and may allow less: properties come in the schema's order, none is
added, and there is at most one space between tokens. An unsupported keyword is refused, never ignored, except for
annotations. Knows nothing about engines. Schemas are untrusted: size and depth are limited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_disjoint import TYPES, DisjointChecker, has_type
from llava_edge.json_formats import BASE_RULES, FORMAT_LENGTHS, FORMAT_PATTERNS
from llava_edge.json_numbers import MAX_INTEGER_DIGITS, Limits, NumberRules, TooComplexNumbersError
from llava_edge.json_pattern import pattern_rules
from llava_edge.options import MAX_GRAMMAR_CHARACTERS
from llava_edge.regular import Budget
from llava_edge.regular_parser import PatternError

MAX_RULES = 500
MAX_ALTERNATIVES = 500  # of an enum, anyOf or oneOf
MAX_REPETITIONS = 100_000  # what lengths and item counts may require; larger maxima are lowered to it
MAX_UNBLOCKED = 500  # of them; blocks take fewer rules, but llama.cpp follows several ways to read them
MAX_DEPTH = 32
MAX_PATH = 100  # characters of where an error is
MAX_PATTERNS = 50

_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "format", "$schema", "$id", "$comment"}
_ANNOTATIONS |= {"$defs", "definitions", "readOnly", "writeOnly", "strict", "discriminator"}
_ANNOTATIONS |= {"contentEncoding", "contentMediaType", "contentSchema"}  # JSON Schema has them not followed
_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "propertyNames", "patternProperties"}
    | {"minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": _LIMITS,
    "integer": _LIMITS,
}


def any_object() -> str:
    """A grammar for any JSON object."""
    return _grammar_text({"root": "object"})


def from_schema(schema: object) -> str:
    """Convert a JSON schema, parsed by `json.loads`, to a grammar. Raises `UsageError` naming what is unsupported."""
    converter = _Converter(schema)
    root = converter.convert(schema, "#", 0)
    converter.check_references()
    grammar = _grammar_text({"root": root, **converter.rules, **converter.numbers.rules})
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise UsageError(
            f"The JSON schema is too large: its grammar has {len(grammar)} characters; expected at most "
            f"{MAX_GRAMMAR_CHARACTERS}."
        )
    return grammar


def _grammar_text(rules: dict[str, str]) -> str:
    return "".join(f"{name} ::= {rule}\n" for name, rule in (rules | BASE_RULES).items())


class _Converter:
    """Converts schemas to GBNF expressions; `rules` are those that the expressions refer to."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._refs: dict[str, str] = {}
        self._disjoint = DisjointChecker(lambda target: self._resolve(target, "#"))
        self._rule_names: dict[str, str] = {}  # expression -> its rule
        self._patterns: dict[tuple[str, int, int | None], str] = {}  # and bounds on the length -> its rule
        self._budget = Budget()  # of all patterns
        self.numbers = NumberRules()
        self._active_refs: set[str] = set()  # references being resolved with no bracket of the answer between them
        self._leads_to: dict[str, set[str]] = {}  # reference -> those in it with no bracket before them
        self.rules: dict[str, str] = {}

    def convert(self, schema: object, path: str, depth: int) -> str:
        """Convert one schema to an expression. `path` says where it is, for error messages."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise _schema_error(path, f"is {_abbreviate(schema)}, not an object")
        if depth > MAX_DEPTH:
            raise _schema_error(path, f"is nested deeper than {MAX_DEPTH} levels")
        path = path[:MAX_PATH]  # each schema below copies it
        keywords = {keyword for keyword in schema if not _is_annotation(schema, keyword)}
        if not keywords:
            return "value"
        for keyword, method in (("$ref", self._ref), ("const", self._const), ("enum", self._enum)):
            if keyword in keywords:
                _reject_keywords(keywords - {keyword, "type"}, path, keyword)
                return method(self._check_type(schema, keyword, path), path, depth)
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in keywords:
                _reject_keywords(keywords - {keyword}, path, keyword)
                options = _choices(schema[keyword], f"{path}/{keyword}")
                if keyword == "oneOf" and not self._disjoint.pairwise(options):
                    raise _schema_error(path, "uses 'oneOf' with schemas that may overlap; use 'anyOf'")
                if keyword == "allOf" and len(options) > 1:
                    raise _schema_error(path, "uses 'allOf' with several schemas, which is not supported")
                return self._alternatives(
                    self.convert(each, f"{path}/{keyword}/{i}", depth + 1) for i, each in enumerate(options)
                )
        return self._convert_by_type(schema, keywords, path, depth)

    def check_references(self) -> None:
        """Raise `UsageError` if one leads back to itself with no bracket between, as no answer can."""
        try:
            TopologicalSorter(self._leads_to).prepare()
        except CycleError as error:
            raise _schema_error(error.args[1][0], "leads back to itself") from error

    def _convert_by_type(self, schema: dict[str, Any], keywords: set[str], path: str, depth: int) -> str:
        _reject_keywords(keywords - {"type"}.union(*_KEYWORDS.values()), path)
        types = schema.get("type", [kind for kind in TYPES if keywords & _KEYWORDS.get(kind, set())])
        types = types if isinstance(types, list) else [types]
        if not types or not all(kind in TYPES for kind in types):
            raise _schema_error(path, f"has the type {_abbreviate(schema.get('type'))}, which is not a JSON type")
        _reject_keywords(keywords - {"type"}.union(*(_KEYWORDS.get(kind, set()) for kind in types)), path)
        types = [kind for kind in types if kind != "integer" or "number" not in types]
        methods = {"object": self._object, "array": self._array, "string": self._string}
        methods |= {"integer": partial(self._number, integer=True), "number": self._number}
        return self._alternatives(methods[kind](schema, path, depth) if kind in methods else kind for kind in types)

    def _alternatives(self, options: Iterator[str]) -> str:
        """Alternatives without duplicates, which llama.cpp would each follow: twice as many at every level."""
        return self._rule(" | ".join(dict.fromkeys(options)))

    def _convert_nested(self, schema: object, path: str, depth: int) -> str:
        """Convert a schema inside a bracket, where references to enclosing schemas are allowed."""
        outer, self._active_refs = self._active_refs, set()
        try:
            return self.convert(schema, path, depth)
        finally:
            self._active_refs = outer

    def _ref(self, target: object, path: str, depth: int) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise _schema_error(
                path, f"refers to {_abbreviate(target)}; only references inside the schema are supported"
            )
        for active in self._active_refs:
            self._leads_to.setdefault(active, set()).add(target)
        if target not in self._refs:
            self._refs[target] = name = f"ref{len(self._refs)}"
            self.rules[name] = ""  # reserved: the schema may refer to itself
            self._active_refs.add(target)
            self.rules[name] = self.convert(self._resolve(target, path), target, depth + 1)
            self._active_refs.discard(target)
        return self._refs[target]

    def _check_type(self, schema: dict[str, Any], keyword: str, path: str) -> object:
        """The schema's `const`, `enum` or `$ref`. Raises `UsageError` if its `type` contradicts it."""
        if "type" not in schema:
            return schema[keyword]
        if keyword == "$ref":
            target = self._resolve(schema[keyword], path) if isinstance(schema[keyword], str) else None
            if not isinstance(target, dict) or target.get("type") != schema["type"]:
                _reject_keywords({"type"}, path, keyword)
            return schema[keyword]
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        types = set(TYPES).intersection(map(str, names))  # each once, however often it is named
        values = [schema[keyword]] if keyword == "const" else _choices(schema[keyword], path)
        if wrong := [value for value in values if not any(has_type(value, kind) for kind in types)]:
            raise _schema_error(path, f"allows {_abbreviate(wrong[0])}, which is not of its type")
        return schema[keyword]

    def _resolve(self, target: str, path: str) -> object:
        schema: Any = self._root
        for part in target[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(schema, dict) or name not in schema:
                raise _schema_error(path, f"refers to {_abbreviate(target)}, which does not exist")
            schema = schema[name]
        return schema

    def _const(self, value: object, path: str, depth: int) -> str:
        return _literal(value, path)

    def _enum(self, values: object, path: str, depth: int) -> str:
        return self._alternatives(_literal(value, path) for value in _choices(values, path))

    def _string(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = _length_range(schema, "minLength", "maxLength", path)
        if "pattern" in schema:
            return self._pattern(schema["pattern"], low, high, path)
        name = str(schema.get("format"))
        shortest, longest = FORMAT_LENGTHS.get(name, (0, math.inf))
        if name in FORMAT_PATTERNS and low <= shortest and (high is None or longest <= high):
            return self._pattern(FORMAT_PATTERNS[name], 0, None, path)
        return "string" if (low, high) == (0, None) else rf'"\"" {_repeated("char", low, high)} "\""'

    def _pattern(self, pattern: object, low: int, high: int | None, path: str) -> str:
        if not isinstance(pattern, str):
            raise _schema_error(path, "has a pattern that is not a string")
        key = pattern, low, high
        if key not in self._patterns:
            name = f"p{len(self._patterns)}"
            if len(self._patterns) == MAX_PATTERNS:
                raise UsageError(f"The JSON schema is too large: it has more than {MAX_PATTERNS} patterns.")
            try:
                rules = pattern_rules(pattern, low, high, name, self._budget)
            except PatternError as error:
                raise _schema_error(path, f"has a pattern that {error}") from error
            self._patterns[key] = name
            self.rules |= rules
        return self._patterns[key]

    def _number(self, schema: dict[str, Any], path: str, depth: int, integer: bool = False) -> str:
        kind = "integer" if integer else "number"
        if not _LIMITS & set(schema):
            return kind
        low, exclusive_low = _bound(schema, "minimum", path)
        high, exclusive_high = _bound(schema, "maximum", path)
        multiple_of = _decimal(schema, "multipleOf", path)
        if multiple_of is not None and not 0 < multiple_of < 10**MAX_INTEGER_DIGITS:
            raise _schema_error(path, f"has a multipleOf that is not between 0 and 1e{MAX_INTEGER_DIGITS}")
        try:
            limits = Limits(integer, low, high, exclusive_low, exclusive_high, multiple_of)
            expression = self.numbers.add(limits)
        except TooComplexNumbersError:
            raise _schema_error(path, "has too many different limits of numbers, or too large a multipleOf") from None
        if not expression:
            raise _schema_error(path, f"allows no {kind} of up to {MAX_INTEGER_DIGITS} digits")
        return self._rule(expression)

    def _array(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = _length_range(schema, "minItems", "maxItems", path)
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        if isinstance(items, list) and "prefixItems" not in schema:  # draft 7, which the AI SDK writes
            items, first = schema.get("additionalItems", True), items
        if not isinstance(first, list):
            raise _schema_error(path, "has prefixItems that are not a list")
        listed = [self._item(each, f"{path}/prefixItems/{i}", depth) for i, each in enumerate(first[:high])]
        most = len(listed) if items is False else high
        if most is not None and low > most:
            raise _schema_error(path, "requires more items than it allows")
        if most == len(listed):
            return f'"[" {self._sequence(listed, low, "")} "]"'
        item = self._item(items, f"{path}/items", depth)
        listed = listed or [item]
        least, most = max(low - len(listed), 0), None if most is None else most - len(listed)
        return f'"[" {self._sequence(listed, low, _repeated(self._rule(f"comma {item}"), least, most))} "]"'

    def _item(self, schema: object, path: str, depth: int) -> str:
        return self._rule(self._convert_nested(schema, path, depth + 1))

    def _sequence(self, items: list[str], required_count: int, end: str) -> str:
        """Items separated by commas, of which the first `required_count` are required; `end` follows the last only."""
        for number, item in reversed(list(enumerate(items))):
            name = self._rule(f"{'comma ' if number else ''}{item} {end}".strip())
            end = name if number < required_count else f"{name}?"
        return end

    def _object(self, schema: dict[str, Any], path: str, depth: int) -> str:
        schema = _with_property_names(schema, path)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        extra, names = schema.get("additionalProperties", True), schema["propertyNames"]
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _schema_error(path, "has properties that are not an object, or a required that is not a list")
        low, high = _length_range(schema, "minProperties", "maxProperties", path)
        shared = ""  # what all values are
        if "enum" in names:
            _reject_keywords(names.keys() - _ANNOTATIONS - {"enum", "type"}, f"{path}/propertyNames", "enum")
            self._check_type(names, "enum", f"{path}/propertyNames")
            properties = dict.fromkeys(names["enum"], extra)
            shared = self._item(extra, f"{path}/additionalProperties", depth)
        if not all(isinstance(name, str) for name in required):
            raise _schema_error(path, "requires something that is not a name")
        if missing := [name for name in required if name not in properties]:
            raise _schema_error(path, f"requires {_abbreviate(missing[0])}, which is not among its properties")
        if not properties and extra is not False:
            return self._record(schema, (low, high), path, depth)
        required = set(required)
        if low > len(required) or (high is not None and high < len(properties)):
            raise _schema_error(path, "limits how many of its properties there are, which is not supported")
        rest, begin = '""', '""'
        for name, value in reversed(properties.items()):
            value = shared or self._convert_nested(value, f"{path}/properties/{name}", depth + 1)
            member, after = self._rule(f"{_literal(name, path)} colon {value}"), self._rule(rest)
            is_required = name in required
            begin = f"{member} {after}" if is_required else f"{member} {after} | {self._rule(begin)}"
            rest = f"comma {member} {after}" if is_required else f"(comma {member})? {after}"
        return f'"{{" {self._rule(begin)} "}}"'

    def _record(self, schema: dict[str, Any], counts: tuple[int, int | None], path: str, depth: int) -> str:
        """An object without listed properties. An answer may repeat a name, which counts once."""
        low, high = counts
        if low > 1:
            raise _schema_error(path, "has a minProperties above 1 for names that may repeat, which is not supported")
        if high == 0:
            return '"{" "}"'
        name = self._item(schema["propertyNames"], f"{path}/propertyNames", depth)
        value = self._item(schema.get("additionalProperties", True), f"{path}/additionalProperties", depth)
        more = _repeated(self._rule(f"comma {name} colon {value}"), 0, None if high is None else high - 1)
        return f'"{{" ({name} colon {value} {more}){"" if low else "?"} "}}"'

    def _rule(self, expression: str) -> str:
        """Name of the rule for an expression, added if it is new; a single name is returned unchanged."""
        if expression in self._rule_names:
            return self._rule_names[expression]
        if expression == '""' or expression.isidentifier():
            return expression
        if len(self._rule_names) >= MAX_RULES:
            raise UsageError(f"The JSON schema is too large: it needs more than {MAX_RULES} rules.")
        name = self._rule_names[expression] = f"r{len(self.rules)}"
        self.rules[name] = expression
        return name


def _with_property_names(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of an object with the schema of its names, as strings, in `propertyNames` alone."""
    names, patterns = schema.get("propertyNames", {}), schema.get("patternProperties", {})
    if patterns != {}:
        if not isinstance(patterns, dict) or len(patterns) > 1 or schema.keys() & {"properties", "propertyNames"}:
            raise _schema_error(path, "has patternProperties that are not one, alone; others are not supported")
        ((pattern, value),) = patterns.items()
        return schema | {"propertyNames": {"type": "string", "pattern": pattern}, "additionalProperties": value}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        raise _schema_error(path, "has propertyNames that are not a schema of strings")
    if "properties" in schema and names.keys() - {"type"}:
        raise _schema_error(path, "combines 'propertyNames' with 'properties', which is not supported")
    return schema | {"propertyNames": {**names, "type": "string"}}


def _is_annotation(schema: dict[str, Any], keyword: str) -> bool:
    """Whether a keyword restricts nothing. Those with an x- are OpenAPI's for everybody's own use."""
    return keyword in _ANNOTATIONS or keyword.startswith("x-") or (keyword == "uniqueItems" and not schema[keyword])


def _literal(value: object, path: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise _schema_error(path, "has a number that JSON does not have") from error
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise _schema_error(path, "has a text with half a surrogate pair")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _choices(value: object, path: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ALTERNATIVES:
        raise _schema_error(path, f"needs a list of 1 to {MAX_ALTERNATIVES} choices")
    return value


def _length_range(schema: dict[str, Any], least: str, most: str, path: str) -> tuple[int, int | None]:
    for value in (schema[keyword] for keyword in (least, most) if keyword in schema):
        if type(value) is not int or value < 0:
            raise _schema_error(path, f"has a {least} or {most} that is not an integer from 0 on")
    low, high = schema.get(least, 0), schema.get(most)
    if low > MAX_REPETITIONS:
        raise _schema_error(path, f"has a {least} above {MAX_REPETITIONS}")
    if high is not None and high < low:
        raise _schema_error(path, f"has a {most} below its {least}")
    return low, None if high is None else min(high, MAX_REPETITIONS)


def _bound(schema: dict[str, Any], keyword: str, path: str) -> tuple[Decimal | None, bool]:
    """A minimum or maximum, and whether it is exclusive."""
    exclusive = f"exclusive{keyword.capitalize()}"
    if keyword in schema and isinstance(schema.get(exclusive), bool):  # as OpenAPI 3.0 has it
        return _decimal(schema, keyword, path), schema[exclusive]
    if keyword in schema and exclusive in schema:
        raise _schema_error(path, f"has both {keyword} and {exclusive}; expected one of them")
    name = exclusive if exclusive in schema else keyword
    return _decimal(schema, name, path), name == exclusive


def _decimal(schema: dict[str, Any], keyword: str, path: str) -> Decimal | None:
    """A number as it is written: the shortest text that means this float."""
    value = schema.get(keyword)
    if keyword not in schema:
        return None
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        raise _schema_error(path, f"has {_abbreviate(value)} for {keyword}; expected a number")
    return Decimal(value) if type(value) is int else Decimal(repr(value))


def _repeated(item: str, low: int, high: int | None) -> str:
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


def _reject_keywords(keywords: set[str], path: str, other_keyword: str = "") -> None:
    """Raise `UsageError` if there are any. other_keyword: the one that they cannot be combined with."""
    if not keywords:
        return
    if other_keyword:
        raise _schema_error(
            path, f"combines {_abbreviate(min(keywords))} with {other_keyword!r}, which is not supported"
        )
    raise _schema_error(path, f"uses {_abbreviate(min(keywords))}, which is not supported")


def _schema_error(path: str, what: str) -> UsageError:
    where = "The JSON schema" if path == "#" else f"The JSON schema at {_abbreviate(path)}"
    return UsageError(f"{where} {what}.")


def _abbreviate(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
