"""JSON schemas that are to hold at once -> one schema: `allOf`, and keywords beside `$ref`, `anyOf` or `oneOf`.

The result allows the same values, or there is an error. Properties and items are not looked into: what two schemas say
of one becomes an `allOf`. Schemas are untrusted and may refer to themselves: the work is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from llava_edge.json_schema.disjoint import has_type
from llava_edge.json_schema.keywords import KEYWORDS, abbreviate, allows_all, choices, is_annotation, schema_error

MAX_STEPS = 100_000  # of all merges: a merge is ten, and each property, value and 50 characters of a "$ref" another
MAX_DEPTH = 32

_REFERRING = ("$ref", "allOf", "anyOf", "oneOf")
_NARROWER: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
_ITEMS = {"items", "prefixItems", "additionalItems"}
_NAMES = {"properties", "additionalProperties", "patternProperties", "propertyNames"}


class Merger:
    """Simplifies the parts of one schema, `root`."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._remaining_steps = MAX_STEPS
        self._flat: dict[int, tuple[object, object]] = {}  # id of a schema -> itself, lest the id be another's; result
        self._inlined: dict[int, tuple[object, object]] = {}
        self._active: set[int] = set()

    def resolve(self, target: object, path: str) -> object:
        """The schema that "#/..." refers to; the root's `$id` may stand before it. Raises `UsageError`."""
        where, own = target, self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(target, str) and isinstance(own, str) and not target.startswith("#"):
            target = target.removeprefix(own) or "#"
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise schema_error(path, f"refers to {abbreviate(where)}; only references inside the schema are supported")
        self._take_steps(1 + len(target) // 50, path)
        schema: Any = self._root
        for part in target[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and name.isdecimal() and len(name) < 7 and int(name) < len(schema):
                schema = schema[int(name)]
                continue
            if isinstance(schema, dict) and name not in schema:
                name = unquote(name)  # in the fragment of a URI
            if not isinstance(schema, dict) or name not in schema:
                raise schema_error(path, f"refers to {abbreviate(where)}, which does not exist")
            schema = schema[name]
        return schema

    def flatten(self, schema: object, path: str) -> object:
        """A schema for the same values without `allOf`, and with `$ref`, `anyOf` or `oneOf` only alone.

        False if nothing satisfies it, as far as can be seen without looking into properties and items. What is no
        schema is returned as it is. Raises `UsageError`.
        """
        if not isinstance(schema, dict):
            return schema
        if id(schema) not in self._flat:
            if id(schema) in self._active:
                raise schema_error(path, "leads back to itself")
            if len(self._active) > MAX_DEPTH:
                raise schema_error(path, f"combines schemas nested deeper than {MAX_DEPTH} levels")
            self._active.add(id(schema))
            try:
                self._flat[id(schema)] = schema, self._flattened(schema, path)
            finally:
                self._active.discard(id(schema))
        return self._flat[id(schema)][1]

    def or_false(self, schema: object, path: str) -> object:
        """The schema itself, or False if nothing satisfies it."""
        return self.flatten(schema, path) is not False and schema

    def inline(self, schema: object, path: str) -> object:
        """The same, with the schema that it refers to in place of a `$ref`."""
        if id(schema) in self._inlined:
            return self._inlined[id(schema)][1]
        flat, targets = self.flatten(schema, path), set[str]()
        while isinstance(flat, dict) and "$ref" in flat:
            target = flat["$ref"]
            found = self.resolve(target, path)
            if target in targets:
                raise schema_error(path, "leads back to itself")
            targets.add(target)
            flat = self.flatten(found, path)
        self._inlined[id(schema)] = schema, flat
        return flat

    def _flattened(self, schema: dict[str, Any], path: str) -> object:
        keywords = {keyword for keyword in schema if not is_annotation(schema, keyword)}
        if "not" in keywords and allows_all(schema["not"]):  # zod's `never`
            return False
        if "nullable" in keywords and schema["nullable"] is True:
            return self.flatten(_with_null(schema), path)
        if "unevaluatedProperties" in keywords:
            rest = {keyword: value for keyword, value in schema.items() if keyword != "unevaluatedProperties"}
            return self._closed(self.inline(rest, path), schema["unevaluatedProperties"], path, 0)
        referring = keywords.intersection(_REFERRING)
        if not referring or (len(keywords) == 1 and "allOf" not in keywords):
            return schema
        members = [{"$ref": schema["$ref"]}] if "$ref" in referring else []
        members += choices(schema["allOf"], f"{path}/allOf") if "allOf" in referring else []
        members.append({keyword: value for keyword, value in schema.items() if keyword not in _REFERRING})
        members += [{keyword: schema[keyword]} for keyword in ("anyOf", "oneOf") if keyword in referring]
        members = _distinct(members)
        self._take_steps(len(members), path)
        if len(members) < 2:
            return self.flatten(members[0], path) if members else True
        return self._all_of(members, path)

    def _all_of(self, members: list[Any], path: str) -> object:
        merged: dict[str, Any] = {}
        for number, member in enumerate(members):
            flat = self.inline(member, path)
            if flat is False:
                return False
            if flat is True:
                continue
            if not isinstance(flat, dict):
                raise schema_error(path, f"has {abbreviate(flat)} in what it combines, not an object")
            for keyword in flat.keys() & {"anyOf", "oneOf"}:  # one of both, alone
                before, after = members[:number], members[number + 1 :]
                options = [
                    self.flatten({"allOf": [*before, option, *after]}, f"{path}/{keyword}/{i}")
                    for i, option in enumerate(choices(flat[keyword], f"{path}/{keyword}"))
                ]
                options = [option for option in options if option is not False]
                return {keyword: options} if options else False
            self._take_steps(10 + _size(merged) + _size(flat), path)
            result = _merged(merged, _plain(flat), path)
            if result is None:
                return False
            merged = result
        return merged

    def _closed(self, schema: object, extra: object, path: str, depth: int) -> object:
        """`unevaluatedProperties`: those of which no keyword, of all that were merged, says anything."""
        if not isinstance(schema, dict):
            return schema
        if depth > MAX_DEPTH:
            raise schema_error(path, f"combines schemas nested deeper than {MAX_DEPTH} levels")
        for keyword in schema.keys() & {"anyOf", "oneOf"}:
            options = choices(schema[keyword], f"{path}/{keyword}")
            self._take_steps(len(options), path)
            return {keyword: [self._closed(self.inline(each, path), extra, path, depth + 1) for each in options]}
        return (
            {"additionalProperties": extra} | schema if "object" in _names(schema.get("type", ["object"])) else schema
        )

    def _take_steps(self, count: int, path: str) -> None:
        self._remaining_steps -= count
        if self._remaining_steps < 0:
            raise schema_error(path, "combines too many schemas, or too large ones, by 'allOf' and references")


def _distinct(members: list[Any]) -> list[Any]:
    """Without those that say nothing or the same as another: merged with itself, a recursive schema would not end."""
    result: dict[object, Any] = {}
    for member in members:
        if isinstance(member, dict):
            keywords = [keyword for keyword in member if keyword == "format" or not is_annotation(member, keyword)]
            if keywords:
                result[str(member["$ref"]) if keywords == ["$ref"] else id(member)] = member
        elif member is not True:
            result[id(member)] = member
    return list(result.values())


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with `nullable`, of OpenAPI 3.0, without it.

    Null is allowed whatever stands beside it: so those mean it who write it, also beside a `$ref` or an `enum` without
    null, where OpenAPI 3.0.3 has it without effect.
    """
    rest: dict[str, Any] = {
        keyword: value
        for keyword, value in schema.items()
        if keyword == "format" or (keyword != "nullable" and not is_annotation(schema, keyword))
    }
    if not rest.keys() - {"format"}:
        return {}
    if rest.keys() & {*_REFERRING, "const"} or not rest.keys() & {"type", "enum"}:
        return {"anyOf": [rest, {"type": "null"}]}
    if "type" in rest:
        rest["type"] = list(dict.fromkeys([*_names(rest["type"]), "null"]))
    if isinstance(rest.get("enum"), list) and None not in rest["enum"]:
        rest["enum"] = [*rest["enum"], None]
    return rest


def _names(types: object) -> dict[str, None]:
    """The names in a `type`, each once."""
    return dict.fromkeys(map(str, types if isinstance(types, list) else [types]))


def _size(schema: dict[str, Any]) -> int:
    return sum(len(value) if isinstance(value, dict | list | str) else 1 for value in schema.values())


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Without annotations, `const`, and the true and false of OpenAPI 3.0's exclusive limits."""
    result = {
        keyword: value for keyword, value in schema.items() if keyword == "format" or not is_annotation(schema, keyword)
    }
    if "const" in result and "enum" not in result:
        result["enum"] = [result.pop("const")]
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if limit in result and isinstance(result.get(exclusive), bool) and result.pop(exclusive):
            result[exclusive] = result.pop(limit)
    return result


def _merged(a: dict[str, Any], b: dict[str, Any], path: str) -> dict[str, Any] | None:
    """What satisfies both; None if nothing does. Neither has a `$ref`, `allOf`, `anyOf` or `oneOf`."""
    result = a | b
    is_tuple = any(isinstance(side.get("items"), list) for side in (a, b))
    for group, simple in ((_ITEMS, set() if is_tuple else {"items"}), (_NAMES, {"properties", "additionalProperties"})):
        if a.keys() & group and b.keys() & group and (combined := result.keys() & group - simple):
            raise schema_error(path, f"combines {min(combined)!r} with another schema's, which is not supported")
    for keyword in a.keys() & b.keys() - {"properties", "additionalProperties"}:
        result[keyword] = _both(keyword, a[keyword], b[keyword], path)
    if a.keys() & _NAMES and b.keys() & _NAMES:
        result |= _merged_properties(a, b, path)
    if "type" in result:
        types = list(_names(result["type"]))
        if not types:
            return None
        result["type"] = types[0] if len(types) == 1 else types
        applying = set[str]().union(*(KEYWORDS.get(kind, set()) for kind in types))
        for keyword in set[str]().union(*KEYWORDS.values()) - applying:  # limits of a string say nothing about null
            result.pop(keyword, None)
        if isinstance(result.get("enum"), list):
            result["enum"] = [value for value in result["enum"] if any(has_type(value, kind) for kind in types)]
    return result if result.get("enum") != [] else None


def _both(keyword: str, a: Any, b: Any, path: str) -> Any:
    """What a keyword says for both of its values."""
    if a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b):
        return a
    if keyword == "type":
        return _common_types(_names(a), _names(b))
    if keyword in _NARROWER:
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b)):
            raise schema_error(path, f"has {abbreviate(a)} and {abbreviate(b)} for {keyword}; expected numbers")
        return _NARROWER[keyword](a, b)
    if keyword == "required" and isinstance(a, list) and isinstance(b, list):
        return [*a, *b]
    if keyword == "items":
        return _all_of_two(a, b)
    if keyword == "pattern":
        return tuple(each for side in (a, b) for each in (side if isinstance(side, tuple) else (side,)))
    lists = isinstance(a, list) and isinstance(b, list)
    if keyword == "enum" and lists and not any(isinstance(value, dict | list) for value in (*a, *b)):
        allowed = {(isinstance(value, bool), value) for value in b}
        return [value for value in a if (isinstance(value, bool), value) in allowed]
    raise schema_error(path, f"combines schemas with different {abbreviate(keyword)}, which is not supported")


def _common_types(a: dict[str, None], b: dict[str, None]) -> list[str]:
    """An integer is a number too."""
    common = [kind for kind in a if kind in b]
    numbers = {"number", "integer"}
    return [*common, "integer"] if a.keys() & numbers and b.keys() & numbers and not numbers & set(common) else common


def _merged_properties(a: dict[str, Any], b: dict[str, Any], path: str) -> dict[str, Any]:
    """`additionalProperties` of one schema speak of the properties that only the other one lists."""
    sides = [(side.get("properties", {}), side.get("additionalProperties", True)) for side in (a, b)]
    (a_named, a_extra), (b_named, b_extra) = sides
    if not isinstance(a_named, dict) or not isinstance(b_named, dict):
        raise schema_error(path, "has properties that are not an object")
    named = {name: _all_of_two(a_named.get(name, a_extra), b_named.get(name, b_extra)) for name in a_named | b_named}
    result = {"properties": named} if "properties" in (a | b) else {}
    extra = _all_of_two(a_extra, b_extra)
    return result if allows_all(extra) else result | {"additionalProperties": extra}


def _all_of_two(a: object, b: object) -> object:
    if a is b or allows_all(b):
        return a
    if allows_all(a):
        return b
    return False if a is False or b is False else {"allOf": [a, b]}
