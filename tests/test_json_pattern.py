"""Patterns of JSON schemas: exactly the strings may be said that Python's `re` finds the pattern in."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grammars import allowing, allows, sample_json
from hypothesis import example, given
from hypothesis import strategies as st

from llava_edge import Llava
from llava_edge.errors import UsageError
from llava_edge.json_schema.grammar import from_schema

# As zod 4 (email, ipv4, iso.date, uuid), pydantic (Decimal), and many others write them.
EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    ["ann@example.org", "a.b+c@x-y.co.uk", "o'neil@a.io"],
    [".a@b.org", "a..b@c.org", "a@b", "a@b.c", "a b@c.org", "a.@b.org", "a@b.org "],
)
IPV4 = (
    r"^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])$",
    ["0.0.0.0", "255.249.199.99", "127.0.0.1"],
    ["256.0.0.1", "1.2.3", "01.2.3.4", "1.2.3.4.5"],
)
DATE = (
    r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-(?:(?:0[13578]|1[02])-"
    r"(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))$",
    ["2026-11-28", "2024-02-29", "2000-02-29", "1999-12-31"],
    ["2026-02-29", "1900-02-29", "2026-04-31", "2026-13-01", "26-01-01", "2026-1-1"],
)
UUID = (
    r"^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}|"
    r"00000000-0000-0000-0000-000000000000|ffffffff-ffff-ffff-ffff-ffffffffffff)$",
    ["f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "00000000-0000-0000-0000-000000000000"],
    ["f81d4fae-7dec-91d0-a765-00a0c91e6bf6", "f81d4fae7dec11d0a76500a0c91e6bf6", ""],
)
DECIMAL = (
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    ["0", "-3.50", "+.5", "12."],
    ["", "-", ".", "+.", "1.2.3", "1e5", "abc"],
)
PRACTICAL = {
    "email": EMAIL,
    "ipv4": IPV4,
    "date": DATE,
    "uuid": UUID,
    "decimal": DECIMAL,
    "starts with": ("^IMG_.*", ["IMG_", "IMG_1.jpg"], ["img_", "xIMG_"]),
    "ends with": (r".*\.png$", [".png", "a.png"], ["a.png ", "png"]),
    "contains": ("apple", ["apple", "a pineapple tart"], ["appl", "Apple"]),
    "price": (r"^\$?\d{1,3}(,\d{3})*(\.\d{2})?$", ["$1,234.50", "7", "999.00"], ["1234.5", "$", "1,23"]),
    "each alternative by itself": ("^a|b$|c", ["ax", "xb", "xcx"], ["xa", "bx", ""]),
    "any text": ("", ["", "é😀", "\n"], []),
    "the empty text": ("^$", [""], ["a", "\n"]),
    "quotes": (r'^["\\/]+$', ['"', "\\", '/"\\'], ["a", ""]),
    "no quotes": (
        r"""^[^\\/:*?"<>|]+$""",
        ["a b.jpg", "\n'", "é"],
        ['"', "\\", "a/b", ""],
    ),
    "brackets": (r"^[[\]][^[\]&&~~]+[^]]$", ["[a^", "]a["], ["[[a", "aaa", "[&a", "[~a", "[a]"]),
    "no hyphen": (r'^[^-"]\[\^[^^]$', ["\\[^a", "a[^\\"], ["-[^a", '"[^a', "a[^^"]),
    "only ASCII": (r"^[^\x00-\x7f][\x00-\x1f][\u0000-!]$", ["é\n!"], ["a\n!", 'é"!', 'é\n"', "é\n\\"]),
    "line ends": (
        r"^a.b\nc[^x]$",
        ["a-b\ncd", "a\tb\nc\n"],
        ["a\nb\ncd", "a-b\ncx"],
    ),
    "other scripts": (
        r"^[ж-щё]+ \u{1F600}[\u4e00-\u9fff]\xe9\u{10ffff}?$",
        ["ёж 😀字é", "ж 😀字é\U0010ffff"],
        ["ez 😀字é", "ёж 字é", "ж 😀字éx"],
    ),
    "spaces": (r"^\s\f?$", [" ", "\t\f", "\n", "\r", "\xa0", "\u3000"], ["\u200b", "\ta"]),
    "overlapping": (r"^[a-fc-dx-x\dB-D1]+$", ["afcedx", "1B7D"], ["g", "w", "y", "A", "E"]),
    "parts that may be empty": ("^(a?b?){2}$", ["", "a", "b", "ba", "abab"], ["aaa", "abba", "ababa"]),
    "many groups": ("^" + "(a|(b))?" * 20 + "$", ["", "ab" * 10], ["a" * 21]),
    "classes": (r"^\w\W\d\D\s\S[\w.-][^\s\d]$", ["_-0a\u3000b-x", "Zé9 \tz.y"], ["--0a bcx", "_-0a b-1"]),
    "names and lazy": (r"^(?<year>\d{4}?)(?P<rest>-x)*?$", ["2026", "2026-x-x"], ["202", "2026-"]),
    "braces": (r"^\{a\}{1,2}]$", ["{a}]", "{a}}]"], ["{a]", "{a}}}]"]),
    "white space around": (r"^\S(.*\S)?$", ["a", "a b"], ["", " a", "a "]),
}


@pytest.mark.parametrize("name", PRACTICAL)
def test_patterns_as_schemas_have_them(name: str, llava: Llava) -> None:
    pattern, right, wrong = PRACTICAL[name]
    grammar = from_schema({"type": "string", "pattern": pattern})
    for text in right + wrong:
        assert allows(llava, grammar, json.dumps(text, ensure_ascii=False)) == (text in right), text


def test_an_address_of_a_limited_length(llava: Llava) -> None:
    """As zod 4.6 writes `z.email().max(255)`."""
    local = r"(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]"
    pattern = rf"^{local}@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{{2,}}$"
    allowed = allowing(llava, from_schema({"type": "string", "pattern": pattern, "maxLength": 255}))
    for text in EMAIL[1] + EMAIL[2]:
        assert allowed(f'"{text}"') == (text in EMAIL[1]), text
    assert [allowed(f'"{"a" * length}@example.org"') for length in (242, 243, 244)] == [True, True, False]


CHARACTER = st.sampled_from(["a", "b", "ab", "[ab]", "[^a]", r"\d", ".", "0", "[a-c0]", r'["\\]', "é"])
SIGNS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{0,2}", "{1,}"])
INSIDE = st.recursive(
    st.builds("{}{}".format, st.builds("(?:{})".format, CHARACTER), SIGNS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.builds("({}|{}){}".format, inner, inner, SIGNS),
    ),
    max_leaves=5,
)
END = st.sampled_from(["", "$"])
ALTERNATIVE = st.builds("{}{}{}".format, st.sampled_from(["", "^"]), INSIDE, END)
PATTERN = st.lists(ALTERNATIVE, min_size=1, max_size=3, unique=True).map("|".join)  # `a$|a$` is refused


@given(PATTERN, st.lists(st.text('abc0é"\\', max_size=6), max_size=6), st.sampled_from([(0, None), (1, 2), (3, 4)]))
@example("(?:(?:a)*)*$", ["", "aa", "ab"], (0, None))
def test_all_texts_that_match_and_no_others(
    llava: Llava, pattern: str, texts: list[str], lengths: tuple[int, int | None]
) -> None:
    low, high = lengths
    bounds = {} if high is None else {"minLength": low, "maxLength": high}
    found = [bool(re.search(pattern, text)) and low <= len(text) <= (high or 99) for text in texts]
    schema = {"type": "string", "pattern": pattern, **bounds}
    if not any(found):
        try:
            from_schema(schema)
        except UsageError:  # no text at all matches
            return
    allowed = allowing(llava, from_schema(schema))
    for text, right in zip(texts, found, strict=True):
        assert allowed(json.dumps(text, ensure_ascii=False)) == right, text


@pytest.mark.parametrize("name", ["email", "price", "each alternative by itself"])
def test_a_random_model_says_nothing_else(name: str, llava: Llava) -> None:
    pattern = PRACTICAL[name][0]
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": pattern, "maxLength": 12}}}
    values = [sample_json(llava, from_schema(schema | {"required": ["text"]}), seed) for seed in range(12)]
    texts = [value["text"] for value in values if value is not None]
    assert texts
    assert [text for text in texts if not re.search(pattern, text) or len(text) > 12] == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a)\1", "backreferences are not supported"),
        (r"\bword\b", "lookarounds not supported"),
        ("^(?!a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("a^b", "lookarounds not supported"),
        ("(a$)b", "lookarounds not supported"),
        ("(a", "unclosed group"),
        ("[a", "unclosed character class"),
        ("*a", "repetition operator missing expression"),
        ("a{3,2}", "invalid repetition count range"),
        (5, "Expected string"),
        (["a"], "Expected string"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_cannot_be_followed_is_refused(pattern: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"The JSON schema has a pattern that cannot be followed: {re.escape(says)}"):
        from_schema({"type": "string", "pattern": pattern})
