"""Logits -> a token, by llama.cpp's sampler chain. Knows nothing about prompts or text."""

from __future__ import annotations

import ctypes
import re
import time
from itertools import accumulate
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import Options, TokenChance
from llava_edge.runtimes.kv_cache import Array
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.stderr_capture import capture_stderr, write_stderr

MAX_GRAMMAR_DEPTH = 200  # of nested parentheses; llama.cpp's stack overflows at some ten thousand
GRAMMAR_CANDIDATES = 256  # most likely tokens, checked before all others: llama.cpp takes 0.1 us per token
# Processor time, which other programs do not take, of following a token through the grammar. It is milliseconds where
# 500 choices begin alike; but lists in lists that two alternatives allow take about four times as long at each level.
MAX_ACCEPT_SECONDS = 1.0
PENALTY_WINDOW = 64  # last tokens of an answer that penalties consider, llama.cpp's default


class Sampler:
    """The sampler chain of one answer, in the order of Hugging Face's `generate`, which LLaVA's reference uses:
    penalties, temperature, top-k, top-p, min-p, then a random draw. Temperature 0 is greedy, after penalties alone. A
    grammar comes first and masks the tokens that do not continue it.

    Raises `UsageError` if llama.cpp cannot parse the grammar.
    """

    def __init__(self, language: LanguageModel, options: Options) -> None:
        self._library = library = language.library
        self._language = language
        self._greedy = options.greedy
        self._chain: Any = None
        self._grammar = self._parse_grammar(options.grammar) if options.grammar else None
        self._chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        for sampler in self._samplers(options):
            library.llama_sampler_chain_add(self._chain, sampler)  # the chain owns and frees it

    def sample(self, row: int = -1) -> int:
        """Sample a token from a row of logits, by default of the last evaluated position, and record it for penalties.

        Raises `UsageError` if the vocabulary has no token that the grammar allows next, or if llama.cpp takes too long
        to follow it, `BundleError` if the logits are not finite.
        """
        logits = self._language.logits(row)
        if not self._grammar:
            return int(self._library.llama_sampler_sample(self._chain, self._language.context, row))
        token = self._sample_with_grammar(logits)
        start = time.thread_time()
        self._library.llama_sampler_accept(self._grammar, token)
        if time.thread_time() - start > MAX_ACCEPT_SECONDS:
            raise UsageError(
                "The grammar, or JSON schema, can be read in too many ways; let its alternatives begin differently."
            )
        self._library.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the samplers."""
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                self._library.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _sample_with_grammar(self, logits: Array) -> int:
        """Apply the grammar, check that it allows a token (without one, llama.cpp aborts), then apply the chain."""
        tokens = np.zeros(len(logits), [("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data
        tokens["id"], tokens["logit"] = np.arange(len(logits)), logits
        # llama.cpp would match the names of these tokens, which do not appear in answers.
        tokens["logit"][self._language.vocabulary.textless_tokens] = -np.inf
        if self._greedy:
            candidates = tokens.copy()
            self._apply(self._chain, candidates)  # the penalties
            candidates = candidates[_top_indices(candidates["logit"], GRAMMAR_CANDIDATES)]
            if self._apply_grammar(candidates):
                return int(candidates["id"][candidates["logit"].argmax()])
        if not self._apply_grammar(tokens):
            raise UsageError("The model has no token that the grammar, or JSON schema, allows next.")
        result = self._apply(self._chain, tokens)
        return int(result.data[result.selected].id)

    def _apply_grammar(self, tokens: Array) -> bool:
        """Set the logits of tokens that the grammar forbids to -inf; return whether it allows any."""
        self._apply(self._grammar, tokens)
        return bool(np.isfinite(tokens["logit"]).any())

    def _apply(self, sampler: Any, tokens: Array) -> Any:
        """Apply a sampler, which changes the tokens in place; return the llama_token_data_array."""
        pointer = tokens.ctypes.data_as(ctypes.POINTER(self._library.llama_token_data))
        array = self._library.llama_token_data_array(pointer, len(tokens), -1, False)
        self._library.llama_sampler_apply(sampler, ctypes.byref(array))
        return array

    def _parse_grammar(self, text: str) -> Any:
        if _grammar_depth(text) > MAX_GRAMMAR_DEPTH:
            raise UsageError(f"The grammar has parentheses nested deeper than {MAX_GRAMMAR_DEPTH} levels.")
        source = text.encode("utf-8", "replace")
        sampler, log = capture_stderr(
            lambda: self._library.llama_sampler_init_grammar(self._language.vocabulary.pointer, source, b"root")
        )
        if sampler:
            write_stderr(log)
        else:
            reason = log.partition("grammar: ")[2].partition("\n")[0].strip().removesuffix(" at")
            raise UsageError(
                f"llama.cpp cannot parse the grammar{f' ({reason:.80})' if reason else ''}; "
                "expected GBNF with a rule 'root'."
            )
        return sampler

    def _samplers(self, options: Options) -> list[Any]:
        library = self._library
        samplers = []
        if has_penalties(options):
            penalties = options.repeat_penalty, options.frequency_penalty, options.presence_penalty
            samplers.append(
                library.llama_sampler_init_penalties(self._language.vocabulary.size, PENALTY_WINDOW, *penalties)
            )
        if options.greedy:
            return [*samplers, library.llama_sampler_init_greedy()]
        samplers.append(library.llama_sampler_init_temp(options.temperature))
        if options.top_k:
            samplers.append(library.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            samplers.append(library.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            samplers.append(library.llama_sampler_init_min_p(options.min_p, 1))
        random_seed = library.LLAMA_DEFAULT_SEED  # the largest 32-bit number; llama.cpp replaces it by a random seed
        seed = random_seed if options.seed is None else options.seed % random_seed
        return [*samplers, library.llama_sampler_init_dist(seed)]


def has_penalties(options: Options) -> bool:
    """Whether the choice of a token depends on the tokens before it in the answer."""
    return (options.repeat_penalty, options.frequency_penalty, options.presence_penalty) != (1, 0, 0)


def _grammar_depth(grammar: str) -> int:
    """Return how deep parentheses are nested outside of strings, character classes and comments: llama.cpp's parser
    recurses."""
    plain = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]|#[^\r\n]*', "", grammar)
    steps = [(mark == "(") - (mark == ")") for mark in plain]
    return max(accumulate(steps), default=0)


def token_chance(language: LanguageModel, token: int, top: int, row: int) -> TokenChance:
    """Return the log-probability of `token` in a row of logits, and those of the `top` most likely tokens."""
    logits = language.logits(row).astype(np.float64)
    highest = logits.max()
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    piece = language.vocabulary.piece
    best = tuple((piece(int(i)), float(logprobs[i])) for i in _top_indices(logprobs, top))
    return TokenChance(piece(token), float(logprobs[token]), best)


def _top_indices(values: Array, count: int) -> Array:
    """Return the indices of the `count` highest values, in descending order and stable.

    Sorting all values would take as long as a small model takes for a token.
    """
    count = min(count, len(values))
    threshold = np.partition(values, -count)[-count] if count else np.inf
    indices = np.flatnonzero(values >= threshold)
    return indices[np.argsort(-values[indices], kind="stable")][:count]
