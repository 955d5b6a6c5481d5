"""The `pattern` of a JSON schema -> GBNF rules that match exactly the JSON strings whose text it matches.

A pattern is a regular expression of ECMA-262 that may match anywhere in the text. Supported is what regular languages
have (regular_parser.py). The grammar is the pattern's automaton, a rule for each state, so that llama.cpp follows one
state however ambiguous a pattern is, and no answer leads to a dead end. Patterns are untrusted: their size is limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from llava_edge.json_schema.regular import Budget, Ranges, Repeated, TooComplexError, automaton
from llava_edge.json_schema.regular_parser import ANY, LAST, PatternError, complement, parse

# What grammars may say in a string, as in grammar.py: \b\t\n\f\r, no other control characters, no surrogates.
_WRITABLE: Ranges = ((8, 10), (12, 13), (0x20, 0x7E), (0x80, 0xD7FF), (0xE000, LAST))
MAX_CHOICES = 1000
_ESCAPED = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", ord('"'): '\\"', ord("\\"): "\\\\"}


def pattern_rules(patterns: Sequence[str], low: int, high: int | None, prefix: str, budget: Budget) -> dict[str, str]:
    """Return GBNF rules for strings that match all; the first, called `prefix`, is the whole string with its quotes.

    low, high: bounds on the text's length in characters. budget: for the automaton; each of its states becomes a rule.
    Raises `PatternError`.
    """
    choices_of_each = [parse(pattern) for pattern in patterns]
    if prod(map(len, choices_of_each)) > MAX_CHOICES:
        raise PatternError("is too complex beside the others")
    choices = [[part for choice in combined for part in choice] for combined in product(*choices_of_each)]
    if (low, high) != (0, None):
        choices = [[*choice, (Repeated(ANY, low, high), True)] for choice in choices]
    try:
        states = automaton(choices, _WRITABLE, budget)
    except TooComplexError:
        raise PatternError("is too complex") from None
    if not states:
        raise PatternError("no text of the required length matches")
    rules = {prefix: rf'"\"" {prefix}s0'}
    for number, state in enumerate(states):
        options = [f"{_expression(chars)} {prefix}s{to}" for to, chars in state.edges.items()]
        rules[f"{prefix}s{number}"] = " | ".join([*options, r'"\""'] if state.accepts else options)
    return rules


def _expression(ranges: Ranges) -> str:
    """GBNF for one character of a string as JSON writes it."""
    cuts = [code for code in _ESCAPED if any(low <= code <= high for low, high in ranges)]
    plain = complement((*complement(ranges), *((code, code) for code in cuts)))
    options = [rf'"\\{_ESCAPED[code]}"' for code in cuts]
    if plain:
        spans = (_code(low) + (f"-{_code(high)}" if low < high else "") for low, high in plain)
        options.append(f"[{''.join(spans)}]")
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _code(code: int) -> str:
    return chr(code) if 0x20 <= code < 0x7F and chr(code) not in "[]^-" else f"\\U{code:08X}"
