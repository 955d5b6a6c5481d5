"""Schemas that combine others, as programs write them: what satisfies them may be said, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grammars import allowing
from hypothesis import example, given
from hypothesis import strategies as st
from schemas import satisfies

from llava_edge import Llava
from llava_edge.errors import UsageError
from llava_edge.json_schema.grammar import from_schema


def obj(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": [*required]} if required else {})


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    return obj(*required, **properties) | {"additionalProperties": False}


def pet(name: str) -> dict[str, Any]:
    """As OpenAPI inherits: the type of the base, narrowed to a constant."""
    return {"allOf": [{"$ref": "#/$defs/pet"}, obj("kind", kind={"type": "string", "enum": [name]})]}


TEXT, COUNT, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
NEVER: dict[str, Any] = {"not": {}}
NAMED, AGED = obj("name", name=TEXT), obj("age", age=COUNT)
ANN = {"name": "Ann", "age": 3}
DEFS = {
    "named": NAMED,
    "aged": {"type": "object", "properties": {"age": COUNT}, "required": ["age"], "title": "Aged"},
    "pair": {"type": "array", "prefixItems": [COUNT, TEXT]},
    "color": {"type": "string", "enum": ["red", "blue"]},
    "pet": obj("kind", kind=TEXT, age=COUNT),
    "cat": pet("cat"),
    "dog": pet("dog"),
    "node": {
        "allOf": [{"$ref": "#/$defs/named"}, obj(next={"allOf": [{"$ref": "#/$defs/node"}], "nullable": True})],
    },
}
REF = {name: {"$ref": f"#/$defs/{name}"} for name in DEFS}
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "intersection": ({"allOf": [NAMED, AGED]}, [ANN], [{"name": "Ann"}, {"age": 3}, {}, None]),
    "intersection in an intersection": ({"allOf": [{"allOf": [NAMED]}, AGED]}, [ANN], [{"name": "Ann"}, {"age": 3}]),
    "a definition alone and with more": (
        obj(p=REF["named"], q={"allOf": [REF["named"], AGED]}),
        [{"p": {"name": ""}, "q": ANN}],
        [{"p": {}}, {"q": {"name": ""}}],
    ),
    "others where a part allows them": (
        {"allOf": [obj(a=COUNT), {"type": "object", "additionalProperties": True}]},
        [{"a": 1, "x": ""}],
        [{"a": ""}],
    ),
    "composition": ({"allOf": [REF["named"]], **AGED}, [ANN], [{"name": "Ann"}, {"age": 3}]),
    "keywords beside a reference": ({**REF["named"], **AGED, "description": ""}, [ANN], [{"name": "Ann"}, {"age": 3}]),
    "inheritance": (REF["cat"], [{"kind": "cat"}, {"kind": "cat", "age": 1}], [{"kind": "dog"}, {"age": 1}]),
    "one of those that inherit": (
        {"oneOf": [REF["cat"], REF["dog"]], "discriminator": {"propertyName": "kind"}},
        [{"kind": "cat"}, {"kind": "dog", "age": 1}],
        [{"kind": "cow"}, {}],
    ),
    "any of required names": (
        {**obj(a=COUNT, b=COUNT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{}, []],
    ),
    "one of, beside what they share": (
        {**NAMED, "oneOf": [obj("kind", kind={"const": kind}) for kind in "ab"]},
        [{"name": "", "kind": "a"}, {"name": "", "kind": "b"}],
        [{"name": ""}, {"kind": "a"}, {"name": "", "kind": "c"}],
    ),
    "closed, of optional properties": (
        {"allOf": [closed(a=COUNT, b=COUNT), closed(b={"minimum": 3}, c=COUNT)]},
        [{}, {"b": 3}],
        [{"a": 1}, {"c": 1}, {"b": 2}],
    ),
    "closed beside a record": (
        {"allOf": [closed("a", a={"maximum": 5}), {"type": "object", "additionalProperties": COUNT}]},
        [{"a": 5}],
        [{"a": 6}, {"a": 1.5}, {}],
    ),
    "records": (
        {"allOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"additionalProperties": COUNT}]},
        [{}, {"a": 1, "b": 2}],
        [{"a": 1.5}],
    ),
    "TypeBox's closed intersection": (
        {"type": "object", "allOf": [NAMED, AGED], "unevaluatedProperties": False},
        [ANN],
        [ANN | {"x": 1}, {"name": "Ann"}],
    ),
    "unevaluated properties of a choice": (
        {"anyOf": [NAMED, {"type": "object"}, NULL], "unevaluatedProperties": False},
        [{"name": "Ann"}, {}, None],
        [{"x": 1}],
    ),
    "unevaluated properties of nothing": ({"type": "object", "unevaluatedProperties": False}, [{}], [{"x": 1}]),
    "a choice of objects, and their type": (
        {"type": "object", "anyOf": [obj("name", name=TEXT, age=COUNT), obj("x", x=COUNT)]},
        [ANN, {"x": 1}],
        [ANN | {"x": 1}, {}],
    ),
    "any other property": (obj(a=COUNT) | {"additionalProperties": {}}, [{"a": 1, "x": [1]}], [{"a": "1"}]),
    "others of a pattern": (obj(a=COUNT) | {"patternProperties": {"^x": TEXT}}, [{"a": 1, "xy": ""}], [{"xy": 1}]),
    "a required name that is no property": (obj("b", a=COUNT), [{"a": 1, "b": []}, {"b": 1}], [{"a": 1}]),
    "any and one of": (
        {"anyOf": [TEXT, COUNT], "oneOf": [{"const": "a"}, {"const": None}]},
        ["a"],
        [None, "b", 1],
    ),
    "zod's patterns": (
        {"type": "string", "maxLength": 4, "allOf": [{"pattern": "^a|^b"}, {"pattern": "z$"}, {"pattern": "x"}]},
        ["axz", "bxyz"],
        ["az", "cxz", "ax", "axyyz"],
    ),
    "limits": (
        {"allOf": [{"type": "integer", "minimum": 2, "maximum": 8}, {"minimum": 3}, {"exclusiveMaximum": 8}]},
        [3, 7],
        [2, 8, 3.5],
    ),
    "exclusive limits of OpenAPI 3.0": (
        {"allOf": [{"type": "integer", "minimum": 2, "exclusiveMinimum": True}, {"minimum": 1}]},
        [3, 20],
        [1, 2],
    ),
    "large exclusive limits": (COUNT | {"exclusiveMinimum": 10**12, "maximum": 10**12 + 1}, [10**12 + 1], [10**12]),
    "both limits": ({"type": "number", "minimum": 1, "exclusiveMinimum": 1}, [1.5], [1, 0]),
    "lengths of lists": (
        {"allOf": [{"type": "array", "items": {"type": "number"}, "minItems": 1}, {"items": COUNT, "maxItems": 2}]},
        [[1], [1, 2]],
        [[], [1.5], [1, 2, 3]],
    ),
    "the same tuple twice": ({"allOf": [REF["pair"], {**REF["pair"]}]}, [[1, "a"]], [[1, 2]]),
    "common values": (
        {"allOf": [{"enum": ["red", "blue", 1, None]}, {"enum": ["blue", True, None]}, {"type": ["string", "null"]}]},
        ["blue", None],
        ["red", 1, True],
    ),
    "a type beside a choice": ({"type": "string", "anyOf": [{"const": "x"}, {"const": 1}]}, ["x"], [1, "y"]),
    "optional texts twice": (
        {"allOf": [{"anyOf": [TEXT, NULL]}, {"anyOf": [{"type": "string", "maxLength": 2}, NULL]}]},
        ["ab", None],
        ["abc", 1],
    ),
    "a length beside an optional text": ({"anyOf": [TEXT, NULL], "maxLength": 2}, ["ab", None], ["abc"]),
    "a format beside a pattern": (
        {"type": "string", "format": "date", "allOf": [{"pattern": "^2"}]},
        ["2024-02-29"],
        ["1999-01-01"],
    ),
    "limits of numbers that are none": (
        {"anyOf": [{"enum": ["a"], "minimum": 1}, {"const": "b", "minimum": 1}, {**REF["color"], "minimum": 1}]},
        ["a", "b", "red"],
        [1, "c"],
    ),
    "names of a length": (
        {"propertyNames": {"maxLength": 1}, "additionalProperties": COUNT},
        [{"": 1}, {"\n": 1}],
        [{"ab": 1}, {"a": ""}],
    ),
    "nullable": ({"type": "string", "nullable": True, "maxLength": 2}, ["ab", None], ["abc", 1]),
    "not nullable": ({"type": "string", "nullable": False}, ["ab"], [None]),
    "a nullable enum": ({"type": "string", "enum": ["a"], "nullable": True}, ["a", None], ["b"]),
    "a nullable enum with null": ({"type": "string", "enum": ["a", None], "nullable": True}, ["a", None], ["b"]),
    "a nullable constant": ({"const": "a", "nullable": True}, ["a", None], ["b"]),
    "a nullable reference": ({"allOf": [REF["color"]], "nullable": True}, ["red", None], ["x"]),
    "a nullable choice": ({"anyOf": [COUNT, {"const": "x"}], "nullable": True}, [1, "x", None], ["y"]),
    "nullable, of any type": ({"nullable": True}, [1, None, {}], []),
    "all of nullable and not": ({"allOf": [{"type": "string", "nullable": True}, TEXT]}, ["a"], [None]),
    "a recursive schema": (
        REF["node"],
        [{"name": "", "next": {"name": "", "next": None}}, {"name": ""}],
        [{"name": "", "next": {}}],
    ),
    "zod's never": (obj("a", a=COUNT, b=NEVER), [{"a": 1}], [{"a": 1, "b": 1}]),
    "nothing but zod's never": (obj(b=NEVER, c={"not": True}), [{}], [{"b": 1}, {"c": 1}]),
    "zod's optional": ({"anyOf": [{"anyOf": [NEVER, TEXT]}, NULL]}, ["a", None], [1]),
    "an empty list": ({"type": "array", "items": NEVER}, [[]], [[1]]),
}


@pytest.mark.parametrize("name", CASES)
def test_combined_schemas_allow_what_satisfies_them(name: str, llava: Llava) -> None:
    schema, right, wrong = CASES[name]
    schema = {"$defs": DEFS} | schema
    allowed = allowing(llava, from_schema(schema))
    for value in right:
        assert satisfies(value, schema, schema), value
        assert allowed(json.dumps(value)), value
    for value in wrong:
        assert not allowed(json.dumps(value)), value
        assert value == ANN | {"x": 1} or not satisfies(value, schema, schema), value


def test_only_properties_that_a_name_or_a_pattern_allows(llava: Llava) -> None:
    """As pydantic writes a `dict` whose keys have a pattern."""
    dated = {"type": "object", "patternProperties": {"^d": COUNT}}
    for schema in (
        {**dated, "properties": {"a": TEXT}},
        {"allOf": [dated, obj(a=TEXT)]},
        {**dated, "anyOf": [obj(a=TEXT)]},
    ):
        for more in ({}, {"unevaluatedProperties": False}):
            allowed = allowing(llava, from_schema(schema | more))
            said = ('{"a": "x"}', '{"d1": 1}', '{"a": "x", "d1": 1}', '{"d1": "x"}', '{"b": 1}', '{"\\u0064": "x"}')
            assert [allowed(text) for text in said] == [True, True, True, False, False, False]


def test_a_discriminator_is_required(llava: Llava) -> None:
    """As pydantic writes a tagged union whose tags have defaults."""
    pets = {"oneOf": [{"$ref": "#/$defs/cat"}, obj(kind={"const": "dog"})], "discriminator": {"propertyName": "kind"}}
    schema = {"$defs": {"cat": obj("a", kind={"const": "cat", "default": "cat"}, a=COUNT, friend=pets)}, **pets}
    allowed = allowing(llava, from_schema(schema))
    right = ['{"kind": "dog"}', '{"kind": "cat", "a": 1}', '{"kind": "cat", "a": 1, "friend": {"kind": "cat", "a": 2}}']
    assert [text for text in right if not allowed(text)] == []
    wrong = [
        "{}",
        '{"a": 1}',
        '{"kind": "cat"}',
        '{"kind": "dog", "a": 1}',
        '{"kind": "cat", "a": 1, "friend": {"a": 2}}',
    ]
    assert [text for text in wrong if allowed(text)] == []


LIMITS: dict[Any, Any] = {
    "minimum": st.integers(-2, 2),
    "exclusiveMinimum": st.sampled_from([-1, 0.5, 1]),
    "maximum": st.integers(2, 12),
    "nullable": st.booleans(),
}
LENGTHS: dict[Any, Any] = {
    "minLength": st.integers(0, 2),
    "maxLength": st.integers(2, 3),
    "pattern": st.sampled_from(["^a", "b$", "^[ab]*$"]),
    "nullable": st.booleans(),
}
NUMERIC, TEXTUAL = ["number", "integer", ["integer", "null"]], ["string", ["string", "null"]]
SCALAR: Any = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(NUMERIC)}, optional=LIMITS),
    st.fixed_dictionaries({"type": st.sampled_from(TEXTUAL)}, optional=LENGTHS),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from([0, 1, True, "a", "ab", None]), min_size=1)}),
    st.fixed_dictionaries({"type": st.sampled_from(["null", "boolean", ["integer", "string"]])}),
)
VALUES = [*range(-3, 14), 0.75, 1.5, True, False, None, "", "a", "b", "ab", "aab", "abab", "cab", [], {}]


@given(
    st.lists(st.one_of(SCALAR, st.fixed_dictionaries({"anyOf": st.lists(SCALAR, min_size=1, max_size=3)})), max_size=3)
)
@example([{"type": "number", "nullable": True}, {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": [None, True]}]}])
def test_all_of_scalars_allows_what_satisfies_each(llava: Llava, parts: list[dict[str, Any]]) -> None:
    schema = {"allOf": [{}, *parts]}
    right = [value for value in VALUES if satisfies(value, schema, schema)]
    try:
        grammar = from_schema(schema)
    except UsageError:
        assert right == []
        return
    allowed = allowing(llava, grammar)
    assert [value for value in VALUES if allowed(json.dumps(value))] == right


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"allOf": [TEXT, COUNT]}, "Unsatisfiable schema: incompatible types"),
        (obj("a", a=NEVER), "required property 'a' is unsatisfiable"),
        ({"allOf": [closed("a", a=COUNT), closed("b", b=COUNT)]}, "required property 'a' is unsatisfiable"),
        ({"anyOf": [NEVER, {"allOf": [TEXT, NULL]}]}, "Unsatisfiable"),
        ({"type": "array", "items": {"allOf": [TEXT, {"not": TEXT}]}}, "at '#/items/allOf/1' uses 'not'"),
        ({"oneOf": [obj(a=COUNT), obj(b=COUNT)], "type": "object"}, "use 'anyOf'"),
        ({"$ref": 5, "type": "string"}, "refers to 5"),
        ({"allOf": [TEXT, 5]}, "at '#/allOf/1' is 5, not an object"),
        ({"allOf": [COUNT, {"multipleOf": 4973}, {"multipleOf": 4967}]}, "more than one multipleOf for one number"),
        (COUNT | {"multipleOf": 4973, "anyOf": [{"multipleOf": 4967}, {"minimum": 5}]}, "more than one multipleOf"),
        (REF["cat"] | {"multipleOf": 4973, "$defs": {"cat": {"multipleOf": 4967}}}, "more than one multipleOf"),
        ({"allOf": [TEXT, {"maxLength": 2}, {"maxLength": "3"}]}, "'maxLength', got \"3\""),
        ({"allOf": [obj(), {"properties": 5}]}, "properties must be an object"),
        ({"allOf": [obj("a"), {"required": 5}]}, "'required', got 5"),
        ({"$defs": {"a": obj(a={"$ref": "#/$defs/a", "type": "object"})}, "$ref": "#/$defs/a"}, "circular references"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_combined_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        from_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}, TEXT]},
        {"$ref": "#", "type": "object"},
        {"$ref": "", "$id": "https://a.com/x"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
        {"type": "object", "anyOf": [{"$ref": "#"}, {"required": ["a"]}]},
        {"anyOf": [NULL, {"$ref": "#"}], "nullable": True},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, TEXT]}, "b": {"$ref": "#/$defs/b"}}},
        {"unevaluatedProperties": False, "anyOf": [{"$ref": "#"}]},
    ],
    ids=str,
)
def test_a_combination_that_leads_back_to_itself_is_refused(schema: Any) -> None:
    with pytest.raises(UsageError, match="leads back to itself"):
        from_schema(schema)


def test_properties_tell_the_type_beside_a_choice(llava: Llava) -> None:
    allowed = allowing(llava, from_schema({"properties": {"a": COUNT}, "anyOf": [{"required": ["a"]}]}))
    assert (allowed('{"a": 1}'), allowed("{}"), allowed("[]")) == (True, False, False)


def test_as_many_patterns_as_there_are_choices() -> None:
    assert from_schema({"anyOf": [{"type": "string", "pattern": f"^{i}"} for i in range(40)]})
