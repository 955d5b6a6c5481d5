"""JSON schemas -> grammars in llama.cpp's GBNF, which make every answer valid JSON of that schema.

A grammar allows only what satisfies the schema, and may allow less: properties come in the schema's order, none is
added, and there is at most one space between tokens. An unsupported keyword is refused, never ignored, except for
annotations. Knows nothing about engines. Schemas are untrusted: size and depth are limited.
"""

from __future__ import annotations

import math
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_schema.disjoint import TYPES, DisjointChecker
from llava_edge.json_schema.formats import BASE_RULES, FORMAT_LENGTHS, FORMAT_PATTERNS
from llava_edge.json_schema.keywords import (
    KEYWORDS,
    LIMITS,
    abbreviate,
    allows_all,
    bound,
    check_type,
    choices,
    decimal,
    is_annotation,
    length_range,
    reject_keywords,
    schema_error,
)
from llava_edge.json_schema.merge import Merger
from llava_edge.json_schema.numbers import MAX_INTEGER_DIGITS, Limits, NumberRules, TooComplexNumbersError
from llava_edge.json_schema.objects import object_expression
from llava_edge.json_schema.pattern import pattern_rules
from llava_edge.json_schema.regular import Budget
from llava_edge.json_schema.regular_parser import PatternError
from llava_edge.json_schema.rules import Rules, literal, repeated
from llava_edge.options import MAX_GRAMMAR_CHARACTERS

MAX_DEPTH = 32
MAX_PATH = 100  # characters of where an error is
MAX_PATTERNS = 50


def any_object() -> str:
    """A grammar for any JSON object."""
    return _grammar_text({"root": "object"})


def from_schema(schema: object) -> str:
    """Convert a JSON schema, parsed by `json.loads`, to a grammar. Raises `UsageError` naming what is unsupported."""
    converter = _Converter(schema)
    root = converter.convert(schema, "#", 0)
    converter.check_references()
    grammar = _grammar_text({"root": root, **converter.rules.named, **converter.numbers.rules})
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
        self._merger = Merger(root)
        self._refs: dict[str | int, str] = {}  # reference, or id of a merged schema -> its rule
        self._disjoint = DisjointChecker(lambda schema: self._merger.inline(schema, "#"))
        self._patterns: dict[tuple[tuple[str, ...], int, int | None], str] = {}  # and bounds on the length -> its rule
        self._budget = Budget()  # of all patterns
        self.numbers = NumberRules()
        self._paths: dict[str, str] = {}  # such a rule -> where its schema is
        self._active_refs: set[str] = set()  # those being resolved with no bracket of the answer between them
        self._leads_to: dict[str, set[str]] = {}  # each -> those in it with no bracket before them
        self.rules = Rules()

    def convert(self, schema: object, path: str, depth: int) -> str:
        """Convert one schema to an expression. `path` says where it is, for error messages."""
        given, schema = schema, self._merger.flatten(schema, path)
        if allows_all(schema):
            return "value"
        if schema is False:
            raise schema_error(path, "allows nothing: no value satisfies all of its keywords")
        if not isinstance(schema, dict):
            raise schema_error(path, f"is {abbreviate(schema)}, not an object")
        if depth > MAX_DEPTH:
            raise schema_error(path, f"is nested deeper than {MAX_DEPTH} levels")
        path = path[:MAX_PATH]  # each schema below copies it
        keywords = {keyword for keyword in schema if not is_annotation(schema, keyword)}
        if not keywords:
            return "value"
        if schema is not given and "$ref" not in keywords:  # merged; it may refer to itself
            return self._named(id(schema), schema, path, depth)
        for keyword, method in (("$ref", self._ref), ("const", self._const), ("enum", self._enum)):
            if keyword in keywords:
                reject_keywords(keywords - {keyword, "type"}, path, keyword)
                return method(schema, path, depth)
        for keyword in keywords & {"anyOf", "oneOf"}:  # one of both, alone
            options = {
                f"{path}/{keyword}/{i}": each for i, each in enumerate(choices(schema[keyword], f"{path}/{keyword}"))
            }
            if keyword == "oneOf" and not self._disjoint.pairwise(list(options.values())):
                raise schema_error(path, "uses 'oneOf' with schemas that may overlap; use 'anyOf'")
            options = {at: each for at, each in options.items() if self._merger.or_false(each, at) is not False}
            if not options:
                raise schema_error(path, "allows nothing: no value satisfies any of its choices")
            return self.rules.alternatives(self.convert(each, at, depth + 1) for at, each in options.items())
        return self._convert_by_type(schema, keywords, path, depth)

    def check_references(self) -> None:
        """Raise `UsageError` if one leads back to itself with no bracket between, as no answer can."""
        try:
            TopologicalSorter(self._leads_to).prepare()
        except CycleError as error:
            raise schema_error(self._paths[error.args[1][0]], "leads back to itself") from error

    def _convert_by_type(self, schema: dict[str, Any], keywords: set[str], path: str, depth: int) -> str:
        reject_keywords(keywords - {"type"}.union(*KEYWORDS.values()), path)
        types = schema.get("type", [kind for kind in TYPES if keywords & KEYWORDS.get(kind, set())])
        types = types if isinstance(types, list) else [types]
        if not types or not all(kind in TYPES for kind in types):
            raise schema_error(path, f"has the type {abbreviate(schema.get('type'))}, which is not a JSON type")
        reject_keywords(keywords - {"type"}.union(*(KEYWORDS.get(kind, set()) for kind in types)), path)
        types = [kind for kind in types if kind != "integer" or "number" not in types]
        methods = {"object": self._object, "array": self._array, "string": self._string}
        methods |= {"integer": partial(self._number, integer=True), "number": self._number}
        return self.rules.alternatives(
            methods[kind](schema, path, depth) if kind in methods else kind for kind in types
        )

    def _convert_nested(self, schema: object, path: str, depth: int) -> str:
        """Convert a schema inside a bracket, where references to enclosing schemas are allowed."""
        outer, self._active_refs = self._active_refs, set()
        try:
            return self.convert(schema, path, depth)
        finally:
            self._active_refs = outer

    def _ref(self, schema: dict[str, Any], path: str, depth: int) -> str:
        found = self._merger.resolve(schema["$ref"], path)
        return self._named(schema["$ref"], found, schema["$ref"], depth)

    def _named(self, key: str | int, schema: object, path: str, depth: int) -> str:
        """Name of the rule for a schema that may refer to itself. key: its reference, or id."""
        is_new = key not in self._refs
        name = self._refs.setdefault(key, f"ref{len(self._refs)}")
        for active in self._active_refs:
            self._leads_to.setdefault(active, set()).add(name)
        if is_new:
            self._paths[name], self.rules.named[name] = path, ""  # reserved
            self._active_refs.add(name)
            self.rules.named[name] = self.convert(schema, path, depth + 1)
            self._active_refs.discard(name)
        return name

    def _const(self, schema: dict[str, Any], path: str, depth: int) -> str:
        check_type(schema, "const", path)
        return literal(schema["const"], path)

    def _enum(self, schema: dict[str, Any], path: str, depth: int) -> str:
        check_type(schema, "enum", path)
        return self.rules.alternatives(literal(value, path) for value in choices(schema["enum"], path))

    def _object(self, schema: dict[str, Any], path: str, depth: int) -> str:
        schema = dict(schema)
        if "additionalProperties" in schema:
            schema["additionalProperties"] = self._merger.or_false(schema["additionalProperties"], path)
        if isinstance(properties := schema.get("properties"), dict):
            schema["properties"] = {name: self._merger.or_false(each, path) for name, each in properties.items()}
        return object_expression(schema, path, self.rules, partial(self._convert_nested, depth=depth + 1))

    def _string(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = length_range(schema, "minLength", "maxLength", path)
        if "pattern" in schema:
            return self._pattern(schema["pattern"], low, high, path)
        name = str(schema.get("format"))
        shortest, longest = FORMAT_LENGTHS.get(name, (0, math.inf))
        if name in FORMAT_PATTERNS and low <= shortest and (high is None or longest <= high):
            return self._pattern(FORMAT_PATTERNS[name], 0, None, path)
        return "string" if (low, high) == (0, None) else rf'"\"" {repeated("char", low, high)} "\""'

    def _pattern(self, pattern: object, low: int, high: int | None, path: str) -> str:
        """An expression for texts that match a pattern, or all of a tuple of them, which only `Merger` makes."""
        patterns = pattern if isinstance(pattern, tuple) else (pattern,)
        if not all(isinstance(each, str) for each in patterns):
            raise schema_error(path, "has a pattern that is not a string")
        key = patterns, low, high
        if key not in self._patterns:
            name = f"p{len(self._patterns)}"
            if len(self._patterns) == MAX_PATTERNS:
                raise UsageError(f"The JSON schema is too large: it has more than {MAX_PATTERNS} patterns.")
            try:
                rules = pattern_rules(patterns, low, high, name, self._budget)
            except PatternError as error:
                raise schema_error(path, f"has a pattern that {error}") from error
            self._patterns[key] = name
            self.rules.named |= rules
        return self._patterns[key]

    def _number(self, schema: dict[str, Any], path: str, depth: int, integer: bool = False) -> str:
        kind = "integer" if integer else "number"
        if not LIMITS & set(schema):
            return kind
        low, exclusive_low = bound(schema, "minimum", path)
        high, exclusive_high = bound(schema, "maximum", path)
        multiple_of = decimal(schema, "multipleOf", path)
        if multiple_of is not None and not 0 < multiple_of < 10**MAX_INTEGER_DIGITS:
            raise schema_error(path, f"has a multipleOf that is not between 0 and 1e{MAX_INTEGER_DIGITS}")
        try:
            limits = Limits(integer, low, high, exclusive_low, exclusive_high, multiple_of)
            expression = self.numbers.add(limits)
        except TooComplexNumbersError:
            raise schema_error(path, "has too many different limits of numbers, or too large a multipleOf") from None
        if not expression:
            raise schema_error(path, f"allows no {kind} of up to {MAX_INTEGER_DIGITS} digits")
        return self.rules.add(expression)

    def _array(self, schema: dict[str, Any], path: str, depth: int) -> str:
        low, high = length_range(schema, "minItems", "maxItems", path)
        items, first = self._merger.or_false(schema.get("items", True), f"{path}/items"), schema.get("prefixItems", [])
        if isinstance(items, list) and "prefixItems" not in schema:  # draft 7, which the AI SDK writes
            items, first = self._merger.or_false(schema.get("additionalItems", True), f"{path}/additionalItems"), items
        if not isinstance(first, list):
            raise schema_error(path, "has prefixItems that are not a list")
        listed = [self._item(each, f"{path}/prefixItems/{i}", depth) for i, each in enumerate(first[:high])]
        most = len(listed) if items is False else high
        if most is not None and low > most:
            raise schema_error(path, "requires more items than it allows")
        if most == len(listed):
            return f'"[" {self._sequence(listed, low, "")} "]"'
        item = self._item(items, f"{path}/items", depth)
        listed = listed or [item]
        least, most = max(low - len(listed), 0), None if most is None else most - len(listed)
        return f'"[" {self._sequence(listed, low, repeated(self.rules.add(f"comma {item}"), least, most))} "]"'

    def _item(self, schema: object, path: str, depth: int) -> str:
        return self.rules.add(self._convert_nested(schema, path, depth + 1))

    def _sequence(self, items: list[str], required_count: int, end: str) -> str:
        """Items separated by commas, of which the first `required_count` are required; `end` follows the last only."""
        for number, item in reversed(list(enumerate(items))):
            name = self.rules.add(f"{'comma ' if number else ''}{item} {end}".strip())
            end = name if number < required_count else f"{name}?"
        return end
