"""Logits -> a token, by llama.cpp's sampler chain. Knows nothing about prompts or text."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import Options, TokenChance
from llava_edge.runtimes.constraints import NO_TOKEN, Constraint, constraint
from llava_edge.runtimes.kv_cache import Array
from llava_edge.runtimes.language import LanguageModel

CANDIDATES = 256  # likeliest tokens that a grammar is asked about before all others
PENALTY_WINDOW = 64  # last tokens of an answer that penalties consider, llama.cpp's default


class Sampler:
    """The sampler chain of one answer, in the order of Hugging Face's `generate`, which LLaVA's reference uses:
    penalties, temperature, top-k, top-p, min-p, then a random draw. Temperature 0 is greedy, after penalties alone. A
    grammar comes first and masks the tokens that do not continue it.

    Raises `UsageError` if the grammar cannot be parsed.
    """

    def __init__(self, language: LanguageModel, options: Options) -> None:
        self._library = library = language.library
        self._language = language
        self._constraint = constraint(library, language.vocabulary, options.grammar) if options.grammar else None
        self._takes_likeliest = takes_likeliest(options)
        self._chain: Any = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        for sampler in self._samplers(options):
            library.llama_sampler_chain_add(self._chain, sampler)  # the chain owns and frees it

    def sample(self, row: int = -1) -> int:
        """Sample a token from a row of logits, by default of the last evaluated position, and record it for penalties.

        Raises `UsageError` if the vocabulary has no token that the grammar allows next, or if it takes too long to
        follow it, `BundleError` if the logits are not finite.
        """
        logits = self._language.logits(row)
        if self._takes_likeliest:
            return self.likeliest(logits)
        if not self._constraint:
            return int(self._library.llama_sampler_sample(self._chain, self._language.context, row))
        token = self._sample_among(self._all_allowed(self._constraint), logits)
        self._constraint.accept(token)
        self._library.llama_sampler_accept(self._chain, token)
        return token

    def likeliest(self, logits: Array) -> int:
        """Take the likeliest token that the grammar allows, the first one of a tie.

        logits: (vocab_size,) float32. Raises `UsageError` as `sample`.
        """
        if not self._constraint:
            return int(logits.argmax())
        allowed = self._allowed(self._constraint, _top_indices(logits, CANDIDATES))
        if not allowed.size:
            allowed = self._all_allowed(self._constraint)
        token = int(allowed[logits[allowed].argmax()])
        self._constraint.accept(token)
        return token

    def close(self) -> None:
        """Free the samplers."""
        if self._constraint:
            self._constraint.close()
        if self._chain is not None:
            self._library.llama_sampler_free(self._chain)
        self._chain = self._constraint = None

    def _allowed(self, constraint: Constraint, ids: Array) -> Array:
        """Those of some tokens that may come next."""
        allowed: Array = ids[constraint.allowed(ids)]
        return allowed

    def _all_allowed(self, constraint: Constraint) -> Array:
        """Ids of all tokens that may come next, at least one."""
        allowed = self._allowed(constraint, np.arange(self._language.vocabulary.size))
        if not allowed.size:
            raise UsageError(NO_TOKEN)
        return allowed

    def _sample_among(self, ids: Array, logits: Array) -> int:
        """Sample from a row of logits among some tokens."""
        tokens = np.zeros(len(ids), [("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data
        tokens["id"], tokens["logit"] = ids, logits[ids]
        pointer = tokens.ctypes.data_as(ctypes.POINTER(self._library.llama_token_data))
        array = self._library.llama_token_data_array(pointer, len(tokens), -1, False)
        self._library.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _samplers(self, options: Options) -> list[Any]:
        library = self._library
        samplers = []
        if _has_penalties(options):
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


def takes_likeliest(options: Options) -> bool:
    """Whether each token is the likeliest one that the grammar allows."""
    return options.greedy and not _has_penalties(options)


def _has_penalties(options: Options) -> bool:
    return (options.repeat_penalty, options.frequency_penalty, options.presence_penalty) != (1, 0, 0)


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
