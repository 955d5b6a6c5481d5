"""Grammars from JSON schemas: a random model, drawing at random, can say nothing but JSON that satisfies them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from itertools import combinations
from time import process_time
from typing import Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest
from grammars import allowing, allows, sample_json
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from schemas import FORMATS, satisfies

from llava_edge import Llava, Options
from llava_edge.errors import UsageError
from llava_edge.json_schema import disjoint
from llava_edge.json_schema.disjoint import has_type
from llava_edge.json_schema.formats import FORMAT_LENGTHS
from llava_edge.json_schema.grammar import any_object, from_schema
from llava_edge.runtimes import sampling
from llava_edge.runtimes.sampling import Sampler

SHORT = {"type": "string", "maxLength": 5}
SCHEMAS: dict[str, Any] = {
    "words": {"enum": ["red", 'a "b"\n\\', 3, None, {"x": [1.5]}, "é😀"]},
    "one word": {"const": "yes"},
    "short": {"type": "string", "minLength": 2, "maxLength": 4},
    "from 3 to 5": {"type": "integer", "minimum": 3, "maximum": 5},
    "below zero": {"type": "integer", "minimum": -2, "maximum": 0},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "empty list": {"type": "array", "maxItems": 0},
    "one": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 1},
    "required": {"type": "object", "properties": {"a": SHORT, "b": {"type": "null"}}, "required": ["b"]},
    "optional": {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}, "c": {"enum": [3]}}},
    "none": {"type": "object", "properties": {}, "additionalProperties": False},
    "nested": {
        "type": "object",
        "properties": {
            "item": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}},
            "tags": {"type": "array", "items": SHORT, "maxItems": 2},
        },
        "required": ["item", "tags"],
        "additionalProperties": False,
        "title": "described",
        "description": "all of this is ignored",
    },
    "either": {"anyOf": [{"type": "boolean"}, {"const": "unknown"}]},
    "types": {"type": ["boolean", "null"]},
    "reference": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"enum": ["x", "y"]}}},
    "box": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 640}] * 4,
        "minItems": 4,
        "maxItems": 4,
    },
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, SHORT, {"type": "null"}], "minItems": 1, "items": False},
    "tuple and more": {"prefixItems": [{"const": 1}, {"const": 2}], "items": {"type": "boolean"}, "maxItems": 4},
    "tuple of draft 7": {
        "type": "array",
        "items": [{"type": "integer"}, SHORT],
        "additionalItems": False,
        "minItems": 2,
    },
    "tuple and more of draft 7": {"items": [{"const": 1}], "additionalItems": {"type": "boolean"}, "maxItems": 4},
    "all of one": {
        "allOf": [{"$ref": "#/$defs/a"}],
        "description": "",
        "default": "x",
        "$defs": {"a": {"enum": ["x"]}},
    },
    "count": {"type": "integer", "minimum": 0},
    "more than 98.5": {"type": "integer", "exclusiveMinimum": 98.5, "exclusiveMaximum": 1.2e3},
    "up to -7": {"type": "integer", "maximum": -7},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "positive": {"type": "number", "exclusiveMinimum": 0.0},
    "latitude": {"type": "number", "minimum": -90, "exclusiveMaximum": 90},
    "negative": {"type": ["number", "integer"], "exclusiveMinimum": -3, "exclusiveMaximum": 0},
    "price": {"type": "number", "minimum": 0.5, "multipleOf": 0.05},
    "dozens": {"type": "integer", "exclusiveMinimum": -30, "maximum": 1e4, "multipleOf": 12},
    **{name: {"type": "string", "format": name} for name in FORMATS},
    "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d+$", "minLength": 5, "maxLength": 6, "format": "date"},
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"const": 1}},
    "one or two": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"const": 1}},
    "no name": {"type": "object", "maxProperties": 0},
    "short names": {"propertyNames": {"minLength": 1, "maxLength": 3}, "additionalProperties": {"const": 1}},
    "names of a pattern": {"patternProperties": {"^[a-c]{1,2}$": {"const": 1}}, "additionalProperties": False},
    "names of a reference": {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/a"},
        "additionalProperties": {"const": 1},
        "$defs": {"a": {"type": "string", "enum": ["x", "y"]}},
    },
    "listed names": {  # zod's record of an enum
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["x", "y"]},
        "additionalProperties": {"type": "integer"},
        "required": ["y"],
    },
    "short time": {"type": "string", "format": "time", "maxLength": 4},
    "names": {"type": "object", "properties": {'"quoted"\\': {"const": 1}}, "required": ['"quoted"\\']},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_satisfies_its_schema(name: str, llava: Llava) -> None:
    schema = SCHEMAS[name]
    grammar = from_schema(schema)
    values = [
        value for seed in range(12) if (value := sample_json(llava, grammar, seed)) is not None or name == "words"
    ]
    assert values
    assert [value for value in values if not satisfies(value, schema, schema)] == []


WIDE = st.one_of(st.integers(-120, 120), st.integers(-(10**16) + 1, 10**16 - 1))


@given(WIDE, WIDE, st.lists(WIDE, max_size=4))
@example(0, 9, [10])
@example(99, 101, [98, 102])
@example(-(10**16) + 1, 10**16 - 1, [0])
def test_integers_of_a_range_and_no_others(llava: Llava, one: int, other: int, more: list[int]) -> None:
    low, high = sorted((one, other))
    grammar = from_schema({"type": "integer", "minimum": low, "maximum": high})
    ends = [end + step for end in (low, high) for step in (-10, -1, 0, 1, 9)]
    with allowing(llava, grammar) as allowed:
        for value in (*ends, (low + high) // 2, -low, -high, low * 10, high // 10, *more):
            if abs(value) < 10**16:
                assert allowed(str(value)) == (low <= value <= high), value
        assert not any(map(allowed, ("", "-", "00", "01", "-01", "1.", "+1", f"{high}a")))


LIMIT = st.one_of(
    st.none(), st.integers(-12, 12), *(st.decimals(-(10**e), 10**e, places=3).map(float) for e in (0, 2, 8))
)
STEP = st.sampled_from([None, None, 1, 3, 7, 20, 0.1, 0.25, 0.03, 2.5, 1e-7, 3e-7, 1e-300, 40.0])


@given(LIMIT, LIMIT, st.booleans(), st.booleans(), STEP, st.lists(st.decimals(-1000, 1000, places=3), max_size=4))
@example(0, 1, False, False, None, [Decimal("0.5"), Decimal("1.001")])
@example(0.1 + 0.2, 1e300, True, False, None, [Decimal("0.3"), Decimal("0.300001"), Decimal("99999999999999")])
@example(-2.5, 2.5, False, True, 0.05, [Decimal("2.45"), Decimal("-2.5"), Decimal("0.30"), Decimal("0.31")])
def test_numbers_within_limits_and_no_others(
    llava: Llava,
    low: float | None,
    high: float | None,
    above: bool,
    below: bool,
    step: float | None,
    more: list[Decimal],
) -> None:
    if low is not None and high is not None:
        low, high = sorted((low, high))
    limits = {"exclusiveMinimum" if above else "minimum": low, "exclusiveMaximum" if below else "maximum": high}
    limits |= {"multipleOf": step}
    schema = {"type": "number", **{name: value for name, value in limits.items() if value is not None}}
    assume(len(schema) > 1)
    ends = [Decimal(str(end)) for end in (low, high) if end is not None and abs(end) < 1e9]
    near = [end + Decimal(by) for end in ends for by in ("-1", "-0.00001", "0", "0.00001", "0.5", "1")]
    multiples = [int(end / Decimal(str(step))) * Decimal(str(step)) for end in ends] if step else []
    texts = {plain(round(value, 6)) for value in (Decimal(0), *near, *multiples, *more)}
    right = {text for text in texts if satisfies(json.loads(text), schema, schema)}
    try:
        grammar = from_schema(schema)
    except UsageError:
        assert right == set()
        return
    with allowing(llava, grammar) as allowed:
        assert {text for text in texts if allowed(text)} == right
        assert not any(map(allowed, ("", "-", "00", ".5", "0.", "1.e5", "01.5", "1e1")))


def test_exclusive_limits_as_openapi_3_0_has_them() -> None:
    for limit in ("Minimum", "Maximum"):
        name, exclusive = limit.lower(), f"exclusive{limit}"
        assert from_schema({"type": "number", name: 5, exclusive: True}) == from_schema(
            {"type": "number", exclusive: 5}
        )
        assert from_schema({"type": "number", name: 5, exclusive: False}) == from_schema({"type": "number", name: 5})


def plain(value: Decimal) -> str:
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "date",
            "2024-02-29 2012-02-29 2023-02-28 1999-12-31 2023-11-30 2096-10-09",
            "2023-02-29 2010-02-29 2023-04-31 2023-13-01 23-1-1 0999-01-01",
        ),
        ("time", "23:59:59Z 00:00:00.123+05:30", "24:00:00Z 12:60:00Z 12:00:00 12:00Z 12:00:00Zx 12:00:00.1234567Z"),
        ("date-time", "2024-02-29T08:30:00-03:00", "2024-02-29 2024-02-29T08:30:00 2024-02-30T08:30:00Z"),
        ("uuid", "01234567-89ab-cdef-ABCD-EF0123456789", "0123456789abcdefABCDEF0123456789 x"),
        ("email", "ann.b+c@mail.example.com x_1@a-b.io", "ann ann@ @a.com a@b .a@b.com a..b@c.com a@-b.com a@b..com"),
        ("hostname", "www.example.com a-1.io", "localhost a.b -a.com a-.com a..com a.com. a_b.com"),
        ("ipv4", "0.0.0.0 192.168.10.1 255.255.255.255", "1.2.3 1.2.3.4.5 256.1.1.1 01.2.3.4 1.2.3.1000"),
        (
            "ipv6",
            ":: ::1 fe80::1 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7:: ::2:3:4:5:6:7:8 1::3:4:5:6:7:8 1:2:3:4:5:6::8",
            ": 1::2::3 12345:: 1:2:3 :1:2:3:4:5:6:7:8 1::2:3:4:5:6:7:8 1:2:3:4:5:6:7::8",
        ),
        ("duration", "P3DT4H30M PT15S P2W P1Y2M3D PT0S", "P P1 1D PT P1H P1DT P1W2D P3M1Y PT1S1M"),
        (
            "uri",
            "https://example.com http://a-b.co.uk:8080/x/y.html?q=1&r=a+b",
            "example.com https:// https://a ftp://a.com https://a.com:99999 https://-a.com https://a..com x",
        ),
        ("uuid4", "01234567-89ab-4def-BCDE-EF0123456789", "01234567-89ab-1def-BCDE-EF0123456789 x"),
        ("uuid1", "01234567-89ab-1def-8CDE-EF0123456789", "01234567-89ab-1def-7CDE-EF0123456789"),
        ("uuid8", "01234567-89ab-8def-aCDE-EF0123456789", "01234567-89ab-9def-aCDE-EF0123456789"),
        ("ipvanyaddress", "1.2.3.4 ::1", "1.2.3 ::x"),
    ],
)
def test_formats_that_programs_parse(llava: Llava, name: str, right: str, wrong: str) -> None:
    grammar = from_schema({"type": "string", "format": name})
    assert [text for text in right.split() if not allows(llava, grammar, f'"{text}"')] == []
    assert [text for text in wrong.split() if allows(llava, grammar, f'"{text}"')] == []


@pytest.mark.parametrize("name", FORMAT_LENGTHS)
def test_formats_are_followed_where_lengths_allow_all_their_texts(name: str) -> None:
    low, high = FORMAT_LENGTHS[name]
    schema = {"type": "string", "format": name}
    assert from_schema(schema | {"minLength": low, "maxLength": high}) == from_schema(schema)
    for lengths in ({"minLength": low + 1}, {"maxLength": high - 1}):
        assert from_schema(schema | lengths) != from_schema(schema)
    lengths_of_texts = [length for length, may_end in enumerate(_ends(from_schema(schema))) if may_end]
    assert (lengths_of_texts[0], lengths_of_texts[-1]) == (low, high)


def _ends(grammar: str) -> Iterator[bool]:
    """Whether a text may end after 0, 1, 2, ... characters, by the rules of a pattern without a cycle."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
    states = {"p0s0"}
    while states:
        yield any(rules[state].endswith(r'"\""') for state in states)
        states = {after for state in states for after in re.findall(r"p0s\d+", rules[state])}


def test_escapes_are_characters_and_halves_of_a_pair_are_not(llava: Llava) -> None:
    one, more = (from_schema({"type": "string", "minLength": low, "maxLength": low}) for low in (1, 2))
    whole = [r"\u00e9", r"\uD7FF", r"\ue000", r"\uffff", r"\ud83d\uDE00", r"\uDbff\udfff", "é", "😀", r"\n"]
    halves = [r"\ud83d", r"\uDE00", r"\ud83d\n", r"\ud83dx", r"\ude00\ud83d", r"\ud83d\ud83d", r"\ud83d\u00e9"]
    for text in whole:
        assert allows(llava, one, f'"{text}"'), text
        assert allows(llava, more, f'"{text}{text}"'), text
        assert not allows(llava, more, f'"{text}"'), text
    for text in halves:
        assert not any(allows(llava, grammar, f'"{text}"') for grammar in (one, more)), text


def test_json_as_models_write_it(llava: Llava) -> None:
    """With and without a space after commas and colons; numbers only so large that all programs can read them."""
    right = ['{"a": [1, -2.5], "b": null}', '{"a":[],"b":0.1e-09}', r'"\"\\\/\b\f\n\r\t\uDBFF\udc00"', "9" * 16]
    wrong = ["1.", "01", "+1", "9" * 17, "1e100", "[1,]", "[1 ,2]", "{1:2}", r'"\x"', '"\t"', "'a'", "NaN", "True"]
    with allowing(llava, from_schema({})) as allowed:
        assert [text for text in right if not allowed(text)] == []
        assert [text for text in wrong if allowed(text)] == []


@pytest.mark.parametrize(("low", "high"), [(0, 501), (1, 2083), (600, 601), (640, 1000), (700, None), (0, 10**9)])
def test_lengths_that_take_blocks(llava: Llava, low: int, high: int | None) -> None:
    limits = {"minLength": low, "maxLength": high} if high else {"minLength": low}
    with allowing(llava, from_schema({"type": "string", **limits})) as allowed:
        for length in (0, low - 1, low, low + 1, low + 22, (high or 2100) - 1, high or 2100, (high or 2100) + 1):
            if 0 <= length < 3000:
                assert allowed(f'"{"ab" * (length // 2)}{"c" * (length % 2)}"') == (low <= length <= (high or length))


def test_fields_of_pydantic_are_followed(llava: Llava) -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")
    field = pydantic.Field
    box = pydantic.create_model(
        "Box",
        corners=(tuple[int, int, int, int], ...),
        score=(float, field(ge=0, le=1)),
        label=(Literal["cat", "dog"], ...),
    )
    found = pydantic.create_model(
        "Found",
        count=(int, field(ge=0, description="how many")),
        stars=(int, field(gt=0, lt=6, default=3)),
        price=(float | None, field(ge=0.5, multiple_of=0.01, default=None)),
        boxes=(list[box], field(max_length=2)),  # type: ignore[valid-type]
        took=(timedelta | None, None),
    )
    grammar = from_schema(found.model_json_schema())
    made = [sample_json(llava, grammar, seed, 400) for seed in range(12)]
    assert any(value and value["boxes"] for value in made)
    for value in filter(None, made):
        found.model_validate(value)
    box_said = {"corners": [0, 17, 640, 480], "score": 0.93, "label": "cat"}
    right = {"count": 12, "stars": 5, "price": 9.99, "boxes": [box_said]}
    assert allows(llava, grammar, json.dumps(right))
    for wrong in (
        {"count": -1},
        {"stars": 6},
        {"price": 0.49},
        {"price": 1.005},
        {"boxes": [box_said | {"corners": [0, 17, 640]}]},
    ):
        assert not allows(llava, grammar, json.dumps(right | wrong)), wrong


def test_every_choice_of_optional_properties_may_be_said(llava: Llava) -> None:
    grammar = from_schema(SCHEMAS["optional"])
    for count in range(4):
        for chosen in combinations({"a": 1, "b": 2, "c": 3}.items(), count):
            assert allows(llava, grammar, json.dumps(dict(chosen))), chosen


def test_objects_and_recursion_are_json(llava: Llava) -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    for grammar in (any_object(), from_schema(tree), from_schema({"type": "object", "additionalProperties": SHORT})):
        values = [value for seed in range(12) if (value := sample_json(llava, grammar, seed)) is not None]
        assert all(isinstance(value, dict) for value in values)
    assert values


def test_no_control_token_stands_for_its_name(llava: Llava) -> None:
    for seed in range(12):
        options = Options(grammar='root ::= "<|im_start|>"', temperature=3.0, seed=seed, max_tokens=20)
        assert llava.ask("?", options=options).text == "<|im_start|>"


def test_the_grammar_counts(llava: Llava) -> None:
    """Without it the same draw is no JSON."""
    answer = llava.ask("?", options=Options(temperature=3.0, seed=0, max_tokens=20))
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(answer.text)


@pytest.mark.parametrize(
    ("name", "pointer"), [("a/b", "a~1b"), ("m~n", "m~0n"), ("~1", "~01"), ("A<é>", "A%3C%C3%A9%3E")]
)
def test_pointers_are_read_as_rfc_6901_has_it(name: str, pointer: str) -> None:
    """The last of the names as a URI has it."""
    grammar = from_schema({"$ref": f"#/$defs/{pointer}", "$defs": {"/": {"const": "wrong"}, name: {"const": "right"}}})
    assert "right" in grammar
    assert "wrong" not in grammar


def test_references_into_lists_and_to_the_root_by_its_name() -> None:
    """As zod-to-json-schema writes a schema that it has seen, and TypeBox one that refers to itself."""
    choice, right = {"anyOf": [{"const": "right"}, {"type": "null"}]}, {"$defs": {"b": {"const": "right"}}}
    seen = [
        from_schema(right | {"properties": {"a": choice, "b": {"$ref": target}}})
        for target in ("#/properties/a/anyOf/0", "#/$defs/b")
    ]
    assert seen[0] == seen[1]
    for name, target in (("Node", "Node"), ("https://a.com/x", "https://a.com/x#/$defs/b")):
        node = {"$id": name, "type": "object"} | right
        made = [
            from_schema(node | {"properties": {"n": {"type": "array", "items": {"$ref": each}}}})
            for each in (target, target.removeprefix(name) or "#")
        ]
        assert made[0] == made[1]
    for wrong in ("2", "-1", "00000000000", "x", ""):
        with pytest.raises(UsageError, match="does not exist"):
            from_schema({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": f"#/anyOf/{wrong}"}}]})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "allows no number"),
        ({"type": "number", "minimum": 1, "maximum": 0}, "allows no number"),
        ({"type": "number", "multipleOf": 2, "minimum": 0.5, "maximum": 1.5}, "allows no number"),
        ({"type": "number", "multipleOf": 0}, "multipleOf that is not between 0"),
        ({"type": "integer", "multipleOf": -5}, "multipleOf that is not between 0"),
        ({"type": "integer", "multipleOf": True}, "expected a number"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "too large a multipleOf"),
        (
            {"prefixItems": [{"type": "number", "minimum": i, "maximum": i + 0.123} for i in range(999)]},
            "many different limits",
        ),
        ({"type": "string", "multipleOf": 2}, "'multipleOf'"),
        ({"type": "string", "minimum": 1}, "'minimum'"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "allows no integer"),
        ({"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}, "allows no integer"),
        ({"type": "integer", "minimum": 10**400}, "allows no integer"),
        ({"type": "integer", "minimum": float("inf")}, "expected a number"),
        ({"type": "integer", "exclusiveMinimum": True}, "expected a number"),
        ({"type": "integer", "maximum": None}, "expected a number"),
        ({"type": "array", "prefixItems": {}}, "not a list"),
        ({"type": "array", "prefixItems": [], "items": []}, "not an object"),
        ({"type": "array", "prefixItems": [{}, {"pattern": "("}]}, "#/prefixItems/1"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "more items than it allows"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"not": {"type": "null"}}, "'not'"),
        ({"type": "any"}, "type"),
        ({"type": 5}, "type"),
        ({"type": []}, "type"),
        ({"enum": []}, "1 to 500"),
        ({"enum": "abc"}, "1 to 500"),
        ({"enum": ["\ud800"]}, "surrogate"),
        ({"$ref": "http://127.0.0.1/x"}, "inside the schema"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"type": "string", "maxLength": -1}, "maxLength"),
        ({"type": "string", "minLength": 10**9}, "minLength above 100000"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "below"),
        ({"type": "array", "minItems": -1}, "minItems"),
        ({"type": "array", "minItems": None}, "minItems"),
        ({"type": "object", "required": ["a"]}, "requires"),
        ({"type": "object", "properties": []}, "properties"),
        ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "'propertyNames'"),
        ({"type": "object", "propertyNames": {"type": "integer"}}, "propertyNames"),
        ({"type": "object", "propertyNames": {"enum": ["a", 1]}}, "not of its type"),
        ({"type": "object", "propertyNames": {"enum": ["a"]}, "required": ["b"]}, "requires 'b'"),
        ({"type": "object", "propertyNames": {"enum": [["a"]]}}, "not of its type"),
        ({"type": "object", "propertyNames": {"enum": ["ab"], "maxLength": 1}}, "'maxLength' with 'enum'"),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "patternProperties"),
        ({"type": "object", "patternProperties": {"^a": {}}, "properties": {}}, "patternProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, "how many"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, "how many"),
        ({"properties": {"a": {"type": "string", "format": "x", "pattern": r"\b"}}}, "#/properties/a"),
        (None, "not an object"),
        ("x", "not an object"),
        ({"anyOf": [{"const": i} for i in range(501)]}, "1 to 500"),
        ({"type": "object", "properties": {str(i): {"type": "string"} for i in range(400)}}, "too large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_kept_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("$", r"\$")):
        from_schema(schema)


def test_depth_is_limited() -> None:
    schema: Any = {"type": "null"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UsageError, match="nested deeper"):
        from_schema(schema)


LOOP = {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}
IN_AND_OUT_OF_A_LIST = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/b"}}, {"$ref": "#/$defs/b"}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/b", "$defs": {"b": LOOP}},
        {"type": "array", "items": {"$ref": "#/$defs/b"}, "$defs": {"b": LOOP}},
        {"$ref": "#/$defs/a", "$defs": {"a": IN_AND_OUT_OF_A_LIST, "b": {"$ref": "#/$defs/a"}}},
    ],
)
def test_a_schema_that_is_only_itself_is_refused(schema: Any) -> None:
    with pytest.raises(UsageError, match="leads back to itself"):
        from_schema(schema)


def test_an_unreadable_grammar_costs_no_picture(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava._engine.model.scheduler, "_prefill", None)
    with pytest.raises(UsageError, match=r"llama\.cpp cannot parse the grammar"):
        llava.ask("?", Image.new("RGB", (8, 8)), Options(grammar='root ::= "x', max_tokens=4))


def test_a_grammar_that_is_only_itself_is_refused_by_the_engine(llava: Llava) -> None:
    with pytest.raises(UsageError, match="grammar"):
        llava.ask("?", options=Options(grammar='root ::= root | "x"', max_tokens=4))
    assert llava.ask("?", options=Options(max_tokens=2)).text


@pytest.mark.parametrize("change", [{}, {"repeat_penalty": 2.0, "presence_penalty": 1.5}], ids=["plain", "penalties"])
@pytest.mark.parametrize("grammar", ["root ::= [a-h ]{20}", "root ::= [^\\x00]{20}", any_object(), from_schema(SHORT)])
def test_a_grammar_looks_at_the_likeliest_tokens_first(
    grammar: str, change: dict[str, float], llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at all of them takes as long as a small model takes for a token. The answer is the same."""
    shown, real = list[int](), Sampler._apply_grammar

    def noticed(self: Sampler, tokens: Any) -> bool:
        shown.append(len(tokens))
        return real(self, tokens)

    monkeypatch.setattr(Sampler, "_apply_grammar", noticed)
    options = Options(grammar=grammar, max_tokens=24, **change)  # type: ignore[arg-type]
    answers, looks = [], []
    for most in (0, 1, 64):  # at 0 the whole vocabulary is looked at for each token
        monkeypatch.setattr(sampling, "GRAMMAR_CANDIDATES", most)
        answers.append(llava.ask("?", options=options).text)
        looks.append(sum(shown))
        shown.clear()
    assert answers[0] == answers[1] == answers[2]
    assert looks[2] < looks[0] / 2 or not grammar.startswith("root ::= [^")


@pytest.mark.parametrize("grammar", ['root ::= "\\x04"', from_schema({"enum": ["\U00050000"]})], ids=["byte", "schema"])
def test_a_grammar_that_no_token_continues_is_refused(grammar: str, llava: Llava, monkeypatch: Any) -> None:
    """llama.cpp would end the process. The vocabulary here can say all; so its words are taken away."""
    real = Sampler._sample_with_grammar

    def no_token_left(self: Sampler, logits: Any) -> int:
        return real(self, np.full_like(logits, -np.inf))

    monkeypatch.setattr(Sampler, "_sample_with_grammar", no_token_left)
    with pytest.raises(UsageError, match="no token that the grammar, or JSON schema, allows"):
        llava.ask("?", options=Options(grammar=grammar, max_tokens=4))
    monkeypatch.undo()
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"


def test_deep_parentheses_are_refused_before_llama_cpp_reads_them(llava: Llava) -> None:
    with pytest.raises(UsageError, match="nested deeper than 200 levels"):
        llava.ask("?", options=Options(grammar=f'root ::= {"(" * 30_000}"x"{")" * 30_000}'))
    for mark in '"[':  # in a comment, it begins no string and no character class
        with pytest.raises(UsageError, match="nested deeper than 200 levels"):
            llava.ask("?", options=Options(grammar=f'# {mark}\nroot ::= {"(" * 30_000}"x"{")" * 30_000} # "]'))
    quoted = f'root ::= "{"(" * 300}" | [({"(" * 300}] # {"(" * 300}'
    assert llava.ask("?", options=Options(grammar=quoted, max_tokens=400)).text.strip("(") == ""


def test_what_can_be_read_in_too_many_ways_ends(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bracket doubles them, and llama.cpp follows all: minutes for the fifteenth."""
    inner = {"type": "array", "minItems": 1, "items": {"$ref": "#"}}
    grammar = from_schema({"anyOf": [inner, {**inner, "minItems": 2}]})
    monkeypatch.setattr(sampling, "MAX_ACCEPT_SECONDS", 0.05)
    with pytest.raises(UsageError, match="too many ways"):
        llava.ask("?", options=Options(grammar=grammar, max_tokens=13))
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"


def test_equal_choices_are_one() -> None:
    """Each would be followed by itself: with thirty brackets, a thousand million ways."""
    inner = {"type": "array", "minItems": 1, "items": {"$ref": "#"}}
    assert " | " not in from_schema({"anyOf": [inner, inner]}).partition("comma ::=")[0]
    assert " | " in from_schema({"anyOf": [inner, {**inner, "minItems": 2}]}).partition("comma ::=")[0]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$defs": {"x": {"$anchor": "item", "type": "integer"}}, "$ref": "#item"}, "inside the schema"),
        ({"type": "string", "enum": [17]}, "not of its type"),
        ({"type": "string", "const": None}, "not of its type"),
        ({"type": "integer", "enum": [1, 2.5]}, "not of its type"),
        ({"const": float("inf")}, "number that JSON does not have"),
        ({"type": "integer", "const": float("inf")}, "not of its type"),
        ({"type": "number", "const": float("inf")}, "number that JSON does not have"),
        ({"type": "object", "properties": {}, "required": [["a"]]}, "not a name"),
        ({"enum": ["x"], "maxLength": 0}, "'maxLength' with 'enum'"),
    ],
    ids=str,
)
def test_what_would_break_the_schema_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        from_schema(schema)


def _kind(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"type": "string", "const": name}, **more}, "required": ["kind"]}


def _only(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    return schema | {"additionalProperties": False} | more


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": ["string", "null"]}, {"type": "object"}],
        [{"const": "a"}, {"enum": ["b", 1]}, {"const": True}],
        [_kind("a", x={"type": "integer"}), _kind("b"), {"anyOf": [_kind("c"), {"type": "null"}]}],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        [{"enum": ["C"]}, _only("A"), _only("B")],
    ],
    ids=str,
)
def test_one_of_schemas_that_share_nothing(options: list[Any]) -> None:
    """The third and fourth are pydantic's unions with a discriminator, the last is an enum of Rust's serde."""
    either = {"$defs": {"a": _kind("a"), "b": _kind("b")}}
    assert from_schema(either | {"oneOf": options}) == from_schema(either | {"anyOf": options})


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"const": [1]}, {"const": [1.0]}],
        [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 3}],
        [{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "object", "properties": {"a": {"const": 2}}}],
        [_kind("a"), {"properties": {"kind": {"const": "b"}}, "required": ["kind"]}],
        [{}, {"type": "string"}],
        [_only("a"), _only("b", required=[], properties={"a": {"type": "integer"}})],
        [_only("a", additionalProperties=True), _only("b", additionalProperties={})],
        [_only("a"), _only("b", patternProperties={"a": {}}, required=[])],
        [{"type": "null"}, {"$ref": "#/$defs/self"}],
        [{"const": i} for i in range(480)],
        [{"type": "object", "required": 5, "properties": {}}, {"type": "object", "required": [[]], "properties": []}],
    ],
    ids=lambda value: str(value)[:60],
)
def test_one_of_schemas_that_may_share_something_is_refused(options: list[Any]) -> None:
    itself = {"anyOf": [{"$ref": "#/$defs/self"}, {"$ref": "#/$defs/self"}]}
    with pytest.raises(UsageError, match="use 'anyOf'"):
        from_schema({"$defs": {"self": itself}, "oneOf": options})


def test_comparing_schemas_is_limited_for_all_of_a_schema() -> None:
    """Here each `oneOf` takes a tenth of a second: together they held up everybody's requests for a minute."""
    one, other = ({"anyOf": [{"const": sign * i} for i in range(1, 70)]} for sign in (1, -1))
    either = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    schema = {"$defs": {"a": one, "b": other}, "anyOf": [either] * 500}
    assert from_schema(schema | {"anyOf": [either]})
    with pytest.raises(UsageError, match="use 'anyOf'"):
        from_schema(schema)


def test_a_type_is_compared_once_however_often_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every value, 90 kB of names held up everybody's requests for half a minute."""
    counted = Mock(side_effect=has_type)
    monkeypatch.setattr("llava_edge.json_schema.keywords.has_type", counted)
    with pytest.raises(UsageError, match="not of its type"):
        from_schema({"type": ["null"] * 1000, "enum": [1, 2, 3]})
    assert counted.call_count <= 3


def test_values_are_read_once_however_many_schemas_they_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each, 20 000 values held up everybody's requests for 0.1 s."""
    counted = Mock(side_effect=disjoint._constants)
    monkeypatch.setattr(disjoint, "_constants", counted)
    assert from_schema({"oneOf": [{"enum": list(range(100))}, *({"const": str(i)} for i in range(50))]})
    assert counted.call_count == 51


_TYPES = {str(i): _kind(str(i)) for i in range(99)}
_UNION = {"oneOf": [{"$ref": f"#/$defs/{i}"} for i in range(99)]}
_EVERY_OTHER = "".join(map(chr, range(0x4E00, 0x5500, 2)))
_LISTS = {str(i): {"enum": list(range(4000 * i, 4000 * i + 4000))} for i in range(40)}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": _TYPES, "type": "array", "prefixItems": [_UNION] * 400},
        {"$defs": _LISTS, "oneOf": [{"$ref": f"#/$defs/{i}"} for i in range(40)]},
        {"type": "object", "properties": {"a" * 2_000_000: {"type": "array", "prefixItems": [{}] * 100_000}}},
        {
            "type": "object",
            "properties": {"last": {}} | {str(i): {"type": "null"} for i in range(150)},
            "required": ["last"] * 3_000_000,
        },
        {
            "$defs": _TYPES | {"far" * 500_000: _TYPES["1"]},
            "type": "array",
            "prefixItems": [
                {"oneOf": [{"$ref": "#/$defs/" + "far" * 500_000}, *({"$ref": f"#/$defs/{i}"} for i in range(2, 90))]}
            ]
            * 400,
        },
        {
            "type": "array",
            "prefixItems": [
                {"type": "string", "pattern": f"^(?=a)[{_EVERY_OTHER}{chr(97 + i) * 2}a]$"} for i in range(30)
            ],
        },
        {"type": "string", "pattern": "^" + "(a?){500}" * 9 + "a?" * 440 + "$"},
    ],
    ids=[
        "many oneOf",
        "long enums",
        "a long name",
        "a long list of names",
        "a long reference",
        "sets of many characters",
        "a part that all parts before may precede",
    ],
)
def test_no_schema_takes_long(schema: Any) -> None:
    """The server converts them while it does nothing else."""
    start = process_time()
    with suppress(UsageError):
        from_schema(schema)
    assert process_time() - start < 2


def test_a_schema_that_only_describes_allows_everything() -> None:
    """As pydantic writes `Any`."""
    assert from_schema({"title": "Extra", "default": None}) == from_schema({})
    assert from_schema({"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "null"}})
    assert from_schema({"type": "array", "uniqueItems": False, "x-order": 1}) == from_schema({"type": "array"})
    assert from_schema({"type": ["integer", "null"], "enum": [1, None]})
    openapi = {"example": "x", "externalDocs": {"url": "x"}, "xml": {"name": "x"}, "components": {"schemas": {"x": {}}}}
    assert from_schema({"type": "string", "id": "x", **openapi}) == from_schema({"type": "string"})
    assert from_schema({"enum": [1], "enumNames": ["one"], "propertyOrdering": ["x"]}) == from_schema({"enum": [1]})
