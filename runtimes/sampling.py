"""Logits -> one token, by llama.cpp's sampler chain. Knows nothing about prompts or text."""

from __future__ import annotations

import ctypes
import re
from itertools import accumulate
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import Options, TokenChance
from llava_edge.runtimes.language import Array, LanguageModel
from llava_edge.runtimes.stderr_capture import capture_stderr, write_stderr

MOST_NESTED = 200  # parentheses of a grammar; llama.cpp's stack ends at some ten thousand
LOOK = 256  # likeliest tokens shown to a grammar first: llama.cpp takes 0.1 us for each that there is
WINDOW = 64  # last tokens of an answer that penalties look at, llama.cpp's default


class Sampler:
    """A chain for one answer, in the order of Hugging Face's `generate`, which LLaVA's reference uses: penalties,
    temperature, top-k, top-p, min-p, then a draw. Temperature 0 is greedy and uses penalties alone. A grammar comes
    before all: it leaves only tokens that continue it.

    Raises `UsageError` if llama.cpp does not understand the grammar.
    """

    def __init__(self, language: LanguageModel, options: Options) -> None:
        self._library = library = language.library
        self._language = language
        self._greedy = options.greedy
        self._chain: Any = None
        self._grammar = self._read_grammar(options.grammar) if options.grammar else None
        self._chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        for part in self._parts(options):
            library.llama_sampler_chain_add(self._chain, part)  # the chain owns and frees it

    def sample(self, row: int = -1) -> int:
        """Draw a token from a row of logits, of the last evaluated position if not told, and note it for the next.

        Raises `UsageError` if the vocabulary has no token that the grammar allows next, `BundleError` if the logits are
        not finite.
        """
        logits = self._language.logits(row)
        if not self._grammar:
            return int(self._library.llama_sampler_sample(self._chain, self._language.context, row))
        token = self._allowed(logits)
        for part in (self._grammar, self._chain):
            self._library.llama_sampler_accept(part, token)
        return token

    def close(self) -> None:
        """Free the chain."""
        for part in (self._chain, self._grammar):
            if part is not None:
                self._library.llama_sampler_free(part)
        self._chain = self._grammar = None

    def _allowed(self, logits: Array) -> int:
        """The grammar before the chain, and a look at what it left: with nothing left, llama.cpp ends the process."""
        tokens = np.zeros(len(logits), [("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data
        tokens["id"], tokens["logit"] = np.arange(len(logits)), logits
        tokens["logit"][self._language.unseen] = -np.inf  # llama.cpp takes them for their names, which answers lack
        if self._greedy:
            likely = tokens.copy()
            self._apply(self._chain, likely)  # the penalties
            likely = likely[_highest(likely["logit"], LOOK)]
            if self._leaves_any(likely):
                return int(likely["id"][likely["logit"].argmax()])
        if not self._leaves_any(tokens):
            raise UsageError("The model has no token that continues what the grammar, or JSON schema, allows here.")
        choice = self._apply(self._chain, tokens)
        return int(choice.data[choice.selected].id)

    def _leaves_any(self, tokens: Array) -> bool:
        """Let the grammar set the logits of tokens that it does not allow to -inf; whether it allows one."""
        self._apply(self._grammar, tokens)
        return bool(np.isfinite(tokens["logit"]).any())

    def _apply(self, part: Any, tokens: Array) -> Any:
        """Let a sampler change the tokens, and select one if it is the last of a chain."""
        pointer = tokens.ctypes.data_as(ctypes.POINTER(self._library.llama_token_data))
        choice = self._library.llama_token_data_array(pointer, len(tokens), -1, False)
        self._library.llama_sampler_apply(part, ctypes.byref(choice))
        return choice

    def _read_grammar(self, text: str) -> Any:
        if _depth(text) > MOST_NESTED:
            raise UsageError(f"The grammar has more than {MOST_NESTED} parentheses in each other.")
        source = text.encode("utf-8", "replace")
        part, said = capture_stderr(
            lambda: self._library.llama_sampler_init_grammar(self._language.vocabulary, source, b"root")
        )
        if part:
            write_stderr(said)
        else:
            reason = said.partition("grammar: ")[2].partition("\n")[0].strip().removesuffix(" at")
            raise UsageError(
                f"The grammar is not one that llama.cpp understands{f' ({reason:.80})' if reason else ''}; "
                "its GBNF with a rule 'root' was expected."
            )
        return part

    def _parts(self, options: Options) -> list[Any]:
        library = self._library
        parts = []
        if penalizes(options):
            penalties = options.repeat_penalty, options.frequency_penalty, options.presence_penalty
            parts.append(library.llama_sampler_init_penalties(self._language.vocab_size, WINDOW, *penalties))
        if options.greedy:
            return [*parts, library.llama_sampler_init_greedy()]
        parts.append(library.llama_sampler_init_temp(options.temperature))
        if options.top_k:
            parts.append(library.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            parts.append(library.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            parts.append(library.llama_sampler_init_min_p(options.min_p, 1))
        anew = library.LLAMA_DEFAULT_SEED  # the largest 32-bit number is no seed there, but a new one each time
        seed = anew if options.seed is None else options.seed % anew
        return [*parts, library.llama_sampler_init_dist(seed)]


def penalizes(options: Options) -> bool:
    """Whether tokens depend on those that the answer has already."""
    return (options.repeat_penalty, options.frequency_penalty, options.presence_penalty) != (1, 0, 0)


def _depth(grammar: str) -> int:
    """Of its parentheses, but for those in quotes and between brackets: llama.cpp reads them one in another."""
    plain = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]', "", grammar)
    steps = [(mark == "(") - (mark == ")") for mark in plain]
    return max(accumulate(steps), default=0)


def chance(language: LanguageModel, token: int, top: int, row: int) -> TokenChance:
    """How likely `token` was by a row of logits, and the `top` likeliest tokens."""
    logits = language.logits(row).astype(np.float64)
    highest = logits.max()
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    piece = language.piece
    best = tuple((piece(int(i)), float(logprobs[i])) for i in _highest(logprobs, top))
    return TokenChance(piece(token), float(logprobs[token]), best)


def _highest(values: Array, count: int) -> Array:
    """Where they are, the highest first, the first of equals before the others. Sorting all would take as long as a
    small model takes for a token.
    """
    count = min(count, len(values))
    least = np.partition(values, -count)[-count] if count else np.inf
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:count]
