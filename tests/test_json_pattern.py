"""Patterns of JSON schemas: llama.cpp lets through exactly the strings that Python's `re` finds the pattern in."""

from __future__ import annotations

import json
import re
from time import process_time
from typing import Any

import pytest
from grammars import allowing, allows, sample_json
from hypothesis import example, given
from hypothesis import strategies as st

from llava_edge import Llava
from llava_edge.errors import UsageError
from llava_edge.json_schema.grammar import from_schema
from llava_edge.json_schema.regular import Budget, Chars, Joined, Repeated, State, automaton
from llava_edge.json_schema.regular_parser import MAX_LENGTH

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
PASSWORD = (
    r"^(?=.*[A-Z])(?=.*\d)(?!.*\s)\S{6,12}$",
    ["Secret1", "9aaaaA"],
    ["secret1", "SECRET", "Sec 1et", "Se1", "Secret1Secret1"],
)
# ECMA-262, 12.2 and 12.3: white space and line terminators, without what JSON escapes by number.
SPACES = "\t\n\f\r \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028"
SPACES += "\u2029\u202f\u205f\u3000\ufeff"
PRACTICAL = {
    "email": EMAIL,
    "ipv4": IPV4,
    "date": DATE,
    "uuid": UUID,
    "decimal": DECIMAL,
    "password": PASSWORD,
    "starts with": ("^IMG_.*", ["IMG_", "IMG_1.jpg"], ["img_", "xIMG_"]),
    "ends with": (r".*\.png$", [".png", "a.png"], ["a.png ", "png"]),
    "contains": ("apple", ["apple", "a pineapple tart"], ["appl", "Apple"]),
    "price": (r"^\$?\d{1,3}(,\d{3})*(\.\d{2})?$", ["$1,234.50", "7", "999.00"], ["1234.5", "$", "1,23"]),
    "each alternative by itself": ("^a|b$|c", ["ax", "xb", "xcx"], ["xa", "bx", ""]),
    "any text": ("", ["", "é😀", "\n"], []),
    "the empty text": ("^$", [""], ["a", "\n"]),
    "quotes": (r'^["\\/]+$', ['"', "\\", '/"\\'], ["a", ""]),
    "line ends": (
        r"^a.b\nc[^x]$",
        ["a-b\ncd", "a\tb\nc\n"],
        ["a\nb\ncd", "a\rb\ncd", "a\u2028b\ncd", "a\u2029b\ncd", "a-b\ncx"],
    ),
    "other scripts": (
        r"^[ж-щё]+ \u{1F600}[\u4e00-\u9fff]\xe9\u{10ffff}?$",
        ["ёж 😀字é", "ж 😀字é\U0010ffff"],
        ["ez 😀字é", "ёж 字é", "ж 😀字éx"],
    ),
    "spaces": (r"^\s[\b]?\f?$", [*SPACES, "\t\b\f"], ["\u200b", "\x85", "\u180e", "\ta"]),
    "overlapping": (r"^[a-fc-dx-x\dB-D1]+$", ["afcedx", "1B7D"], ["g", "w", "y", "A", "E"]),
    "parts that may be empty": ("^(a?b?){2}$", ["", "a", "b", "ba", "abab"], ["aaa", "abba", "ababa"]),
    "many groups": ("^" + "(a|(b))?" * 20 + "$", ["", "ab" * 10], ["a" * 21]),
    "classes": (r"^\w\W\d\D\s\S[\w.-][^\s\d]$", ["_-0a\u3000b-x", "Zé9 \tz.y"], ["--0a bcx", "_-0a b-1"]),
    "names and lazy": (r"^(?<year>\d{4}?)(?P<rest>-x)*?$", ["2026", "2026-x-x"], ["202", "2026-"]),
    "braces": (r"^{a}{1,2}]$", ["{a}]", "{a}}]"], ["{a]", "{a}}}]"]),
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
    with allowing(llava, from_schema({"type": "string", "pattern": pattern, "maxLength": 255})) as allowed:
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
LOOKAHEAD = st.builds("(?{}{}{})".format, st.sampled_from("=!"), INSIDE, END)
ALTERNATIVE = st.one_of(
    st.builds("{}{}{}".format, st.sampled_from(["", "^"]), INSIDE, END),
    st.builds("^{}{}{}".format, LOOKAHEAD, INSIDE, END),
)
PATTERN = st.lists(ALTERNATIVE, min_size=1, max_size=3).map("|".join)


@given(PATTERN, st.lists(st.text('abc0é"\\', max_size=6), max_size=6), st.sampled_from([(0, None), (1, 2), (3, 4)]))
@example("(?:(?:a)*)*$", ["", "aa", "ab"], (0, None))
@example("^(?!(?:a)+$)(?:.)*$|(?:b){2}", ["a", "aab", "bb"], (0, None))
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
    with allowing(llava, from_schema(schema)) as allowed:
        for text, right in zip(texts, found, strict=True):
            assert allowed(json.dumps(text, ensure_ascii=False)) == right, text


@pytest.mark.parametrize("name", ["email", "price", "password", "each alternative by itself"])
def test_a_random_model_says_nothing_else(name: str, llava: Llava) -> None:
    pattern = PRACTICAL[name][0]
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": pattern, "maxLength": 12}}}
    values = [sample_json(llava, from_schema(schema | {"required": ["text"]}), seed) for seed in range(12)]
    # A random model also writes bytes that are no UTF-8, which the grammar counts otherwise than Python.
    texts = [value["text"] for value in values if value is not None and "\ufffd" not in value["text"]]
    assert texts
    assert [text for text in texts if not re.search(pattern, text) or len(text) > 12] == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a)\1", "a backslash before '1'"),
        (r"\bword\b", "a backslash before 'b'"),
        (r"\p{L}+", "a backslash before 'p'"),
        (r"\ud83d\ude00", "half a surrogate pair"),
        (r"^[^\ud83d\ude00]$", "half a surrogate pair"),
        (r"\u{110000}", "a backslash before 'u'"),
        ("a^b", "a '\\^' that is not at its start"),
        ("(^a)", "a '\\^' that is not at its start"),
        ("a$b", "a '\\$' that is not at its end"),
        ("(a$)b", "a '\\$' inside a group"),
        ("a(?=b)", "kind of group"),
        ("(?=b)a", "a lookahead that does not follow '\\^'"),
        ("(?<=b)a", "kind of group"),
        ("(?i)a", "kind of group"),
        ("(a", "a '\\(' without its '\\)' \\(before character 3\\)"),
        ("a)", "a '\\)' without its '\\('"),
        ("[a", "ends too early"),
        ("a\\", "ends too early"),
        ("[]a]", "an empty \\[\\]"),
        ("[^]", "an empty \\[\\]"),
        ("[z-a]", "a range"),
        (r"[\d-z]", "a range"),
        ("[[:alpha:]]", "by name"),
        ("[[.a.]]", "by name"),
        ("[a&&b]", "by operator"),
        (r"\01", "a backslash before '0'"),
        ("*a", "repeats nothing"),
        ("a**", "repeats a repetition"),
        ("a{2}{3}", "repeats a repetition"),
        ("a{3,2}", "not in order"),
        ("a{501}", "above 500"),
        ("a{501,}", "above 500"),
        ("(" * 40 + ")" * 40, "deeper than 32"),
        ("a" * (MAX_LENGTH + 1), f"longer than {MAX_LENGTH}"),
        ("^(?!.*a)a", "no text of the required length matches"),
        ("^\ud800$", "half a surrogate pair"),
        ("^\\x00$", "no text of the required length matches"),
        (5, "not a string"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_cannot_be_followed_is_refused(pattern: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"The JSON schema has a pattern that .*{says}"):
        from_schema({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|b)*a(a|b){20}",
        "(a{1,500}){1,500}",
        "(.{0,500}x){0,500}",
        "^" + "".join(f"(?=.*{letter})" for letter in "abcdefghijkl"),
        ".*[" + "".join(chr(0x4E00 + 2 * i) for i in range(400)) + "].{20}",
        "(((((){500}){500}){500}){500}a?){500}x{500}",
    ],
    ids=lambda value: value[:20],
)
def test_automata_that_would_be_enormous_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="a pattern that is too complex"):
        from_schema({"type": "string", "pattern": pattern})


def test_many_patterns_are_refused() -> None:
    many = {str(i): {"type": "string", "pattern": f"^{i}"} for i in range(60)}
    with pytest.raises(UsageError, match="more than 50 patterns"):
        from_schema({"type": "object", "properties": many})
    long = {str(i): {"type": "string", "pattern": f"^{i}.{{400}}$"} for i in range(9)}
    with pytest.raises(UsageError, match="too complex"):
        from_schema({"type": "object", "properties": long})
    same = {str(i): {"type": "string", "pattern": "^.{400}$"} for i in range(60)}
    assert from_schema({"type": "object", "properties": same}).count("p0s0 ::=") == 1


def test_patterns_together_take_little_time() -> None:
    """The server makes automata while it does nothing else."""
    patterns = ["^(?:a*){500}(?:a*){500}(?:a*){500}(?:a*){470}" + f"{i}$" for i in range(50)]
    start = process_time()
    with pytest.raises(UsageError, match="too complex"):
        from_schema({"anyOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})
    assert process_time() - start < 3


def test_lengths_and_patterns_together_stay_small() -> None:
    assert from_schema({"type": "string", "pattern": DECIMAL[0], "maxLength": 200})
    fields = {str(i): {"type": "string", "pattern": f"^{i}-[0-9a-f]{{8}}$", "maxLength": 200} for i in range(20)}
    assert from_schema({"type": "object", "properties": fields})


def test_a_grammar_that_no_engine_would_take_is_called_too_large() -> None:
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 480)))
    pattern = f"^(?:[{characters[::2]}][{characters[1::2]}]){{100}}$"
    with pytest.raises(UsageError, match=r"The JSON schema is too large: its grammar has .* at most 262144"):
        from_schema({"type": "string", "pattern": pattern})


def test_every_state_can_reach_the_end() -> None:
    letter, other = Chars(((97, 97),)), Chars(((98, 98),))
    dead = Joined((other, Chars(())))
    states = automaton([[(Repeated(letter, 1, 2), True)], [(dead, True)]], ((97, 98),), Budget())
    a: tuple[tuple[int, int], ...] = ((97, 97),)
    assert states == [State(False, {1: a}), State(True, {2: a}), State(True, {})]
    assert automaton([[(dead, True)]], ((97, 98),), Budget()) == []
