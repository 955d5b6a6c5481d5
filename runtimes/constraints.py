"""Which tokens may come next in an answer that has to follow a grammar.

Grammars in GBNF are llama.cpp's. Those that begin with `%llguidance`, which JSON schemas become, are LLGuidance's.
"""

from __future__ import annotations

import ctypes
import re
import time
from itertools import accumulate
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import LARK_MARK
from llava_edge.runtimes.kv_cache import Array
from llava_edge.runtimes.stderr_capture import capture_stderr, write_stderr
from llava_edge.runtimes.vocabulary import Vocabulary

# Ways to go on at one place in an answer. LLGuidance itself gives up at 2000: ten objects of 50 optional properties.
MAX_ITEMS = 10_000
# LLGuidance's work on patterns for a token. With its own limit, a tenth, a text of ".{1,500}" can end in the middle.
MAX_FUEL = 2_000_000
MAX_NESTING = 200  # of nested parentheses; llama.cpp's stack overflows at some ten thousand
# Processor time, which other programs do not take, of following a token through a GBNF grammar. It is milliseconds
# where 500 choices begin alike; but lists in lists that two alternatives allow take about four times as long at each
# level.
MAX_ACCEPT_SECONDS = 1.0
NO_TOKEN = "The model has no token that the grammar, or JSON schema, allows next."
# What LLGuidance says where the vocabulary lacks a byte that has to come next. It takes 0xFF for its own mark.
_LACKS_BYTE = re.compile("NoExtensionBias|doesn't satisfy the grammar|has_pending_lexeme_bytes")


class LarkConstraint:
    """A grammar of LLGuidance, which limits its own work per token, and how far an answer has followed it."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._vocabulary = vocabulary
        limits = LLParserLimits(max_items_in_row=MAX_ITEMS, step_lexer_fuel=MAX_FUEL)
        self._matcher = LLMatcher(vocabulary.for_llguidance, grammar, log_level=0, limits=limits)
        self._raise_error()

    def allowed(self, ids: Array) -> Array:
        """Return which of some tokens may come next: ids (n,) -> (n,) bool. Raises `UsageError` for too much work."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._raise_error()
        allowed = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_)
        allowed[self._vocabulary.textless_tokens] = False  # which a grammar may name
        return allowed[ids]

    def accept(self, token: int) -> None:
        """Go on by an allowed token. Raises `UsageError` if that takes too much work."""
        self._matcher.consume_token(token)
        self._raise_error()

    def close(self) -> None:
        """Nothing: the matcher is Python's."""

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0]
            if _LACKS_BYTE.search(reason):
                raise UsageError(NO_TOKEN)
            raise UsageError(f"LLGuidance cannot follow the grammar, or JSON schema: {reason[:200]}.")


class GbnfConstraint:
    """The same for a grammar of llama.cpp, which takes 0.1 us to look at a token."""

    def __init__(self, library: Any, vocabulary: Vocabulary, grammar: str) -> None:
        self._library = library
        self._vocabulary = vocabulary
        self._sampler = _parse_gbnf(library, vocabulary, grammar)

    def allowed(self, ids: Array) -> Array:
        """(n,) bool."""
        tokens = np.zeros(len(ids), [("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data
        tokens["id"] = ids
        pointer = tokens.ctypes.data_as(ctypes.POINTER(self._library.llama_token_data))
        array = self._library.llama_token_data_array(pointer, len(tokens), -1, False)
        self._library.llama_sampler_apply(self._sampler, ctypes.byref(array))
        # llama.cpp matches the names of some tokens, which do not appear in answers.
        allowed: Array = np.isfinite(tokens["logit"]) & ~np.isin(ids, self._vocabulary.textless_tokens)
        return allowed

    def accept(self, token: int) -> None:
        """Go on by an allowed token. Raises `UsageError` if that takes too long."""
        start = time.thread_time()
        self._library.llama_sampler_accept(self._sampler, token)
        if time.thread_time() - start > MAX_ACCEPT_SECONDS:
            raise UsageError("The grammar can be read in too many ways; let its alternatives begin differently.")

    def close(self) -> None:
        """Free llama.cpp's grammar."""
        self._library.llama_sampler_free(self._sampler)


Constraint = LarkConstraint | GbnfConstraint


def constraint(library: Any, vocabulary: Vocabulary, grammar: str) -> Constraint:
    """Parse a grammar. Raises `UsageError`."""
    if grammar.startswith(LARK_MARK):
        return LarkConstraint(vocabulary, grammar)
    return GbnfConstraint(library, vocabulary, grammar)


def _parse_gbnf(library: Any, vocabulary: Vocabulary, grammar: str) -> Any:
    if "\0" in grammar:  # llama.cpp would end there
        raise UsageError("The grammar contains a NUL character.")
    if _nesting(grammar) > MAX_NESTING:
        raise UsageError(f"The grammar has parentheses nested deeper than {MAX_NESTING} levels.")
    source = grammar.encode("utf-8", "replace")
    sampler, log = capture_stderr(lambda: library.llama_sampler_init_grammar(vocabulary.pointer, source, b"root"))
    if not sampler:
        reason = log.partition("grammar: ")[2].partition("\n")[0].strip().removesuffix(" at")
        raise UsageError(
            f"llama.cpp cannot parse the grammar{f' ({reason:.100})' if reason else ''}; "
            f"expected GBNF with a rule 'root', or Lark that begins with {LARK_MARK}."
        )
    write_stderr(log)
    return sampler


def _nesting(grammar: str) -> int:
    """Return how deep parentheses are nested outside of strings, character classes and comments: llama.cpp's parser
    recurses."""
    plain = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]|#[^\r\n]*', "", grammar)
    steps = [(mark == "(") - (mark == ")") for mark in plain]
    return max(accumulate(steps), default=0)
