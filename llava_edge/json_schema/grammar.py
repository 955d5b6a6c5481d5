"""JSON schemas -> grammars of LLGuidance, which make every answer valid JSON of that schema.

LLGuidance follows the keywords. Done here: an object gets no properties but those that its schema names, `oneOf` is
taken where no value satisfies two, references lead somewhere, and what is not supported is refused, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from llava_edge.errors import UsageError
from llava_edge.json_schema.keywords import COMBINING, SUPPORTED, is_annotation, prepare, rewrite, schema_error, short
from llava_edge.options import LARK_MARK, MAX_GRAMMAR_CHARACTERS

MAX_DEPTH = 64  # of schemas in schemas, references followed
MAX_STEPS = 20_000  # a schema is one, and another each time it is looked at for names of properties; more: `_work`
MAX_PAIRS = 5_000  # of schemas in `oneOf`: of 100, compared in 0.4 s
MAX_UNIQUE = 8  # values of an enum of which an array has each at most once: it is one of 256
MAX_PATTERNS = 12  # for one text; LLGuidance takes 5 ms to see whether there is one, and twice as long for one more
_FORM = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}  # as models write JSON


def from_schema(schema: object) -> str:
    """Convert a JSON schema, parsed by `json.loads`, to a grammar. Raises `UsageError` naming what is unsupported."""
    try:
        _check_size(json.dumps(schema, allow_nan=False))
        return _Converter(schema).grammar()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # NaN, 400 digits, an object of Python
        raise UsageError(f"The JSON schema cannot be used: {error}.") from error


@dataclass(frozen=True)
class _Place:
    """Where a schema is.

    definition: the one whose values are those of this schema, with no bracket around them; or None.
    is_part: others are combined with it, so that an object may have more properties than it names.
    """

    path: str = "#"
    depth: int = 0
    definition: str | None = None
    is_part: bool = False

    def inside(self, name: str) -> _Place:
        """Of a property or an item, whose values are in brackets."""
        return _Place(f"{self.path}/{name}"[:200], self.depth + 1)

    def beside(self, name: str, is_part: bool = False) -> _Place:
        """Of a schema that the same values have to satisfy."""
        return _Place(f"{self.path}/{name}"[:200], self.depth + 1, self.definition, is_part or self.is_part)


class _Converter:
    """Converts one schema to keywords that LLGuidance follows."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._names: dict[tuple[str, bool], str] = {}  # reference, whether as a part -> name of its definition
        self._definitions: dict[str, Any] = {}
        self._counts: dict[tuple[str, str], int] = {}  # where a definition is, keyword -> `_count` of it
        self._leads_to: dict[str | None, set[str]] = {}  # reference -> those whose values are its own
        self._overlaps: list[dict[str, Any]] = []  # of each two schemas in a `oneOf`
        self._tagged: dict[str, Any] = {}  # reference -> schema of a `oneOf` whose discriminator it requires
        self._steps = 0

    def grammar(self) -> str:
        schema = self._convert(self._root, _Place())
        try:
            TopologicalSorter(self._leads_to).prepare()
        except CycleError as error:
            raise schema_error(error.args[1][0], "leads back to itself") from error
        overlaps = _grammar_text({"anyOf": self._overlaps}, self._definitions)
        if self._overlaps and not _problem(overlaps).startswith("Unsatisfiable"):
            raise schema_error("#", "uses 'oneOf' with schemas that may overlap; use 'anyOf'")
        grammar = _grammar_text(schema, self._definitions)
        _check_size(grammar)
        if problem := _problem(grammar):
            raise schema_error("#", f"cannot be followed: {problem}")
        return grammar

    def _convert(self, schema: Any, place: _Place) -> Any:
        self._take_step(place.path)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise schema_error(place.path, f"is {short(schema)}, not an object")
        if place.depth > MAX_DEPTH:
            raise schema_error(place.path, f"is nested deeper than {MAX_DEPTH} levels")
        schema = self._with_required_tag(schema, place.path)
        schema = {keyword: value for keyword, value in schema.items() if not is_annotation(keyword, value)}
        if schema.get("uniqueItems") is True:
            schema = self._with_unique_items(schema, place.path)
        self._take_step(place.path, _work(schema))
        if schema in ({"not": {}}, {"not": True}):  # zod's never
            return False
        if schema.get("nullable") is True:  # OpenAPI 3.0's
            del schema["nullable"]
            return {"anyOf": [self._convert(schema, place.beside("")), {"type": "null"}]}
        if unsupported := schema.keys() - SUPPORTED:
            raise schema_error(place.path, f"uses {short(min(unsupported))}, which is not supported")
        if len(schema) == 1 and len(parts := _items(schema.get("allOf"))) == 1:
            return self._convert(parts[0], place.beside("allOf/0"))
        is_combined = "allOf" in schema or len(schema.keys() - {"type"}) > 1
        if not place.is_part:
            schema = self._close(schema, place.path, is_combined)
        if {"anyOf", "oneOf"} <= schema.keys():
            schema["allOf"] = [*_items(schema.get("allOf")), {"oneOf": schema.pop("oneOf")}]
        if isinstance(names := schema.get("propertyNames"), dict) and "$ref" in names:
            schema["propertyNames"] = self._resolve(names["$ref"], place.path)
        schema = prepare(schema, place.path)
        if "pattern" in schema and (problem := _problem(_grammar_text({"pattern": schema["pattern"]}, {}))):
            raise schema_error(place.path, f"has a pattern that cannot be followed: {problem}")
        converted = {word: self._convert_keyword(word, value, place, is_combined) for word, value in schema.items()}
        converted = rewrite(converted, place.path, place.is_part)
        if self._count(converted, "pattern") > MAX_PATTERNS:
            raise schema_error(place.path, f"has more than {MAX_PATTERNS} patterns for one text")
        if self._count(converted, "multipleOf") > 1:
            # LLGuidance has as many states as their least common multiple, and takes gigabytes for them.
            raise schema_error(place.path, "has more than one multipleOf for one number, which is not supported")
        return converted

    def _convert_keyword(self, keyword: str, value: Any, place: _Place, is_combined: bool) -> Any:
        """Convert the schemas in the value of a keyword."""
        if keyword == "$ref":
            return self._reference(value, place.beside("$ref", is_combined))
        if keyword in COMBINING:
            if keyword == "oneOf":
                self._compare(_items(value), place)
            parts = enumerate(_items(value))
            return [self._convert(each, place.beside(f"{keyword}/{i}", is_combined)) for i, each in parts]
        if keyword in ("properties", "patternProperties") and isinstance(value, dict):
            return {name: self._convert(each, place.inside(f"{keyword}/{name}")) for name, each in value.items()}
        if keyword in ("items", "prefixItems") and isinstance(value, list):
            return [self._convert(each, place.inside(f"{keyword}/{i}")) for i, each in enumerate(value)]
        if keyword in ("items", "additionalItems", "additionalProperties"):
            return self._convert(value, place.inside(keyword))
        return value

    def _with_required_tag(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        """A `discriminator` names a property that tells the schemas of a `oneOf` apart, which pydantic does not have
        `required` where there is a default."""
        discriminator = schema.get("discriminator")
        tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        if not isinstance(tag, str) or "oneOf" not in schema:
            return schema
        options = []
        for option in _items(schema["oneOf"]):
            target = option.get("$ref") if isinstance(option, dict) else None
            named = self._resolve(target, path) if target else option
            if isinstance(named, dict) and tag in named.get("properties", ()) and tag not in named.get("required", ()):
                option = named | {"required": [*_items(named.get("required")), tag]}
                if target:
                    self._tagged[f"{tag} of {target}"] = option
                    option = {"$ref": f"{tag} of {target}"}
            options.append(option)
        return schema | {"oneOf": options}

    def _with_unique_items(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        """Arrays of some values of an enum, in its order, as an enum of arrays."""
        items = schema.get("items")
        if isinstance(items, dict) and "$ref" in items:
            items = self._resolve(items["$ref"], path)
        values = _items(items.get("enum")) if isinstance(items, dict) else []
        if "enum" in schema or schema.get("type", "array") != "array" or not 0 < len(values) <= MAX_UNIQUE:
            return schema
        some = [list(chosen) for count in range(len(values) + 1) for chosen in combinations(values, count)]
        return {keyword: value for keyword, value in schema.items() if keyword != "uniqueItems"} | {"enum": some}

    def _compare(self, schemas: list[Any], place: _Place) -> None:
        """Note what has to be unsatisfiable for `oneOf` to mean `anyOf`: both of any two, with any properties."""
        parts = [self._convert(each, place.beside(f"oneOf/{i}", is_part=True)) for i, each in enumerate(schemas)]
        self._overlaps += [{"allOf": pair} for pair in combinations(parts, 2)]
        if len(self._overlaps) > MAX_PAIRS:
            raise schema_error(place.path, "uses 'oneOf' with too many schemas to compare them; use 'anyOf'")

    def _close(self, schema: dict[str, Any], path: str, is_combined: bool) -> dict[str, Any]:
        """Allow no properties but those that a schema and its parts name, unless they say which others there may be."""
        unevaluated = schema.pop("unevaluatedProperties", None)
        if unevaluated not in (None, False):
            raise schema_error(path, "uses 'unevaluatedProperties' other than false, which is not supported")
        is_choice = bool(schema.keys() & (COMBINING | {"$ref"}))
        if not is_choice and schema.get("additionalProperties") is False:
            return schema
        if (is_choice and not is_combined) or not isinstance(schema.get("properties", {}), dict):
            return schema
        if unevaluated is False and "propertyNames" in schema:
            raise schema_error(path, "combines 'unevaluatedProperties' with 'propertyNames', which is not supported")
        known: dict[str, dict[str, Any]] = {"properties": {}, "patternProperties": {}, "required": {}}
        if not self._add_known(schema, path, set(), known) or (unevaluated is None and not any(known.values())):
            return schema
        required = known.pop("required")
        if unevaluated is None:  # which would forbid those
            known["properties"] |= required
        self._take_step(path, sum(len(name) for names in known.values() for name in names) // 100)  # each is copied
        closing = {keyword: names for keyword, names in known.items() if names} | {"additionalProperties": False}
        if is_choice:
            return schema | {"allOf": [*_items(schema.get("allOf")), closing]}
        return closing | schema | {"properties": known["properties"] | schema.get("properties", {})}

    def _add_known(self, schema: Any, path: str, seen: set[str], known: dict[str, dict[str, Any]]) -> bool:
        """Note which properties a schema names, and those it is combined with; return whether there are no others."""
        self._take_step(path)
        if not isinstance(schema, dict):
            return True
        if any(schema.get(keyword, False) is not False for keyword in ("additionalProperties", "propertyNames")):
            return False
        for keyword, names in known.items():
            named = schema.get(keyword)
            names |= {name: True for name in named if type(name) is str} if isinstance(named, dict | list) else {}
        others = [part for keyword in COMBINING for part in _items(schema.get(keyword))]
        if "$ref" in schema and str(schema["$ref"]) not in seen:
            seen.add(str(schema["$ref"]))
            others.append(self._resolve(schema["$ref"], path))
        return all(self._add_known(other, path, seen, known) for other in others)

    def _take_step(self, path: str, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise schema_error(path, "is too much: too many schemas, patterns, required names or constants to follow")

    def _reference(self, target: Any, place: _Place) -> str:
        """Convert what is referred to, unless it has been; return where it is now."""
        key = str(target), place.is_part
        self._leads_to.setdefault(place.definition, set()).add(key[0])
        if key not in self._names:
            name = self._names[key] = str(len(self._names))
            at = _Place(key[0], place.depth, key[0], place.is_part)
            self._definitions[name] = self._convert(self._resolve(target, place.path), at)
            for keyword in ("pattern", "multipleOf"):
                self._counts[f"#/$defs/{name}", keyword] = self._count(self._definitions[name], keyword)
        return f"#/$defs/{self._names[key]}"

    def _count(self, schema: Any, keyword: str) -> int:
        """How often a keyword applies to one value, at most, in a converted schema."""
        if not isinstance(schema, dict):
            return 0
        choices = (self._count(each, keyword) for each in schema.get("anyOf", ()))
        others = (self._count(each, keyword) for each in schema.get("allOf", ()))
        referred = self._counts.get((schema.get("$ref", ""), keyword), 0)
        return (keyword in schema) + referred + max(choices, default=0) + sum(others)

    def _resolve(self, target: object, path: str) -> object:
        """The schema that "#/..." refers to; the root's `$id` may stand before it. Raises `UsageError`."""
        if isinstance(target, str) and target in self._tagged:
            return self._tagged[target]
        where, own = target, self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(target, str) and isinstance(own, str) and not target.startswith("#"):
            target = target.removeprefix(own) or "#"
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise schema_error(path, f"refers to {short(where)}; only references like #/$defs/name are supported")
        schema: Any = self._root
        for part in target[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and name.isdecimal() and len(name) < 7 and int(name) < len(schema):
                schema = schema[int(name)]
                continue
            if isinstance(schema, dict) and name not in schema:
                name = unquote(name)  # in the fragment of a URI
            if not isinstance(schema, dict) or name not in schema:
                raise schema_error(path, f"refers to {short(where)}, which does not exist")
            schema = schema[name]
        return schema


def _work(schema: dict[str, Any]) -> int:
    """Steps of what LLGuidance takes long for: a second for 500 patterns with classes of Unicode, 60 patterns of names
    (compared in pairs), 10 000 required names, or 10 000 objects and lists in constants."""
    named, required = schema.get("patternProperties"), {str(name) for name in _items(schema.get("required"))}
    constants = [schema.get("const"), *_items(schema.get("enum"))]
    return (
        40 * ("pattern" in schema)
        + 400 * max(0, len(named) - 1 if isinstance(named, dict) else 0)
        + len(required) ** 2 // 5000
        + sum(map(_constant_work, constants))
    )


def _constant_work(value: object) -> int:
    values = value.values() if isinstance(value, dict) else _items(value)
    return 5 * isinstance(value, list | dict) + sum(1 + _constant_work(each) for each in values)


def _items(value: object) -> list[Any]:
    """A list, or an empty one for what is none: LLGuidance says what is wrong with that."""
    return value if isinstance(value, list) else []


def _check_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise UsageError(f"The JSON schema is too large: {len(text)} characters; expected {MAX_GRAMMAR_CHARACTERS}.")


def _grammar_text(schema: Any, definitions: dict[str, Any]) -> str:
    """A grammar in LLGuidance's dialect of Lark. LLaMA's tokens of first words begin with a space."""
    keywords = schema if isinstance(schema, dict) else {"anyOf": [schema]}
    text = json.dumps(keywords | {"$defs": definitions, "x-guidance": _FORM}, allow_nan=False)
    return f'{LARK_MARK} {{}}\nstart: " "? json\njson: %json {text}\n'


def _problem(grammar: str) -> str:
    """Why LLGuidance does not follow a grammar; empty if it does."""
    message = LLMatcher.validate_grammar(grammar).partition("\n   1 | ")[0]
    message = message.rpartition("JSON schema: ")[2]
    return message.rpartition("\nerror: ")[2][:200]  # of a pattern: the last of several lines
