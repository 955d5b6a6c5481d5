"""Speculative decoding of a greedy answer: tokens proposed by n-gram lookup or a draft model are verified in one batch.

Answers are bit-identical with and without it (unverified on GPUs). A batch may be computed by other kernels than a
single token, and a difference in the last digits can decide a near tie. So batches are used only where our own kernels
compute all of it, or where they were observed to give the same bits as single tokens (`BitChecks`), and only as wide
as pays off on this machine (`Costs`). Knows nothing about text, stop sequences or grammars.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from math import inf
from statistics import median

import numpy as np

from llava_edge.runtimes.draft import DraftModel
from llava_edge.runtimes.kv_cache import Array, Key
from llava_edge.runtimes.language import LanguageModel

WIDTHS = (4, 8)  # batch sizes in tokens: fixed, because kernels are chosen by them
EXPECTED = {4: 3.44, 8: 5.70}  # tokens gained per batch if nine of ten draft tokens are accepted: 1 + 0.9 + 0.81...
NGRAM = 3  # tokens that must match an earlier occurrence before its continuation is proposed
MIN_EQUAL_ROWS = 8  # that prove equal bits; of 64 rows computed by other kernels, no hidden state was equal
BLOCK = 256  # llama.cpp pads the KV cache to multiples of this, and chooses kernels by the padded size
FIXED_LOSS = 1.5  # time, in single tokens, that speculation may cost an answer that it does not speed up,
LOSS_PER_TOKEN = 0.02  # plus this for each of its tokens


class NgramLookup:
    """Proposes what followed the most recent occurrence of the last `NGRAM` tokens."""

    def __init__(self, keys: list[Key]) -> None:
        self.keys: list[Key] = []  # of all positions so far
        self._continuations: dict[tuple[Key, ...], int] = {}  # n-gram -> index of the key that followed it last
        for key in keys:
            self.add(key)

    def add(self, key: Key) -> None:
        """Append a position: a token, or a row of an image."""
        if len(self.keys) >= NGRAM:
            self._continuations[tuple(self.keys[-NGRAM:])] = len(self.keys)
        self.keys.append(key)

    def propose(self, count: int) -> list[int]:
        """Return `count` tokens, or none. A continuation shorter than that is repeated."""
        start = self._continuations.get(tuple(self.keys[-NGRAM:]))
        if start is None:
            return []
        period = self.keys[start:]
        keys = [period[i % len(period)] for i in range(count)]
        tokens = [key for key in keys if isinstance(key, int)]
        return tokens if len(tokens) == count else []


class BitChecks:
    """Where batches were observed to give the same bits as single tokens, by batch size and KV cache block.

    known: they do everywhere (`LanguageModel.batch_invariant`).
    """

    def __init__(self, *, known: bool = False) -> None:
        self._known = known
        self._equal: dict[tuple[int, int], int] = {}  # width, block -> equal rows, -1 after a different one

    def may_be_equal(self, start: int, width: int) -> bool:
        """Whether a batch at position `start` lies within one block in which no difference was observed."""
        block = start // BLOCK
        return self._known or ((start + width - 1) // BLOCK == block and self._equal.get((width, block), 0) >= 0)

    def proven(self, start: int, width: int) -> bool:
        """Whether enough rows were equal."""
        return self._known or self._equal.get((width, start // BLOCK), 0) >= MIN_EQUAL_ROWS

    def record(self, start: int, width: int, equal: bool) -> None:
        """Record the comparison of one row of a batch at position `start`."""
        key = width, start // BLOCK
        self._equal[key] = self._equal.get(key, 0) + 1 if equal and self.may_be_equal(start, width) else -1


class Costs:
    """Measured times of batches and drafts, relative to single tokens.

    Each is divided by the times of the last single tokens before it, because the load of the machine varies.
    """

    def __init__(self) -> None:
        self._singles: deque[float] = deque(maxlen=5)  # seconds
        self._relative: dict[int | str, deque[float]] = defaultdict(lambda: deque(maxlen=9))

    def record(self, kind: int | str, seconds: float) -> None:
        """Record the time of one batch of `kind` tokens, or of one proposal of the "draft" model."""
        if kind == 1:
            self._singles.append(seconds)
        elif self._singles:
            self._relative[kind].append(seconds / median(self._singles))

    def keep_lowest(self) -> None:
        """Keep only the lowest of each: one raised by other programs would end speculation, and measuring, for good."""
        for costs in filter(None, self._relative.values()):
            lowest = min(costs)
            costs.clear()
            costs.append(lowest)

    def batch(self, width: int) -> float:
        """Cost of a batch in single tokens; if not measured, extrapolated from another width (at first 2.0 for 4)."""
        measured = {w: median(self._relative[w]) for w in WIDTHS if self._relative[w]}
        other, cost = next(iter(measured.items()), (4, 2.0))
        return measured.get(width, 1 + (cost - 1) * (width - 1) / (other - 1))

    @property
    def draft(self) -> float:
        """Cost of one proposal of the draft model in single tokens."""
        return median(self._relative["draft"] or [0.0])


class Speculation:
    """What all answers of a loaded model share: its bit checks, its costs, and its draft model if it has one.

    The draft model is used where the n-gram lookup finds nothing.
    """

    def __init__(self, language: LanguageModel, draft: DraftModel | None = None) -> None:
        self.language = language
        self.draft = draft
        self.bits = BitChecks(known=language.batch_invariant)
        self.costs = Costs()
        # Whether "auto" speculates. On GPUs, llama.cpp's choice of kernels may depend on more than the batch size and
        # block that bit checks distinguish, which has not been investigated: there it has to be requested.
        self.auto = not language.on_gpu or draft is not None

    def best_width(self, start: int, max_cost: float) -> int:
        """Return the most promising batch size at position `start` that costs at most `max_cost`; 0 if none does."""
        room = self.language.context_size - start
        widths = [width for width in WIDTHS if width <= room and self.bits.may_be_equal(start, width)]
        widths = [width for width in widths if self.costs.batch(width) <= max_cost]
        return max(widths, key=lambda width: EXPECTED[width] / self.costs.batch(width), default=0)


class SpeculativeDecoder:
    """Speculative decoding of one answer. `drafted` and `accepted` count draft tokens.

    take: takes the next token of the answer from its logits (vocab_size,); also returns whether it is the last one.
    always: speculate even where it does not pay off. Otherwise the balance of gained and lost time, in single tokens,
    has to cover one more batch without gain.
    """

    def __init__(self, shared: Speculation, take: Callable[[Array], tuple[int, bool]], *, always: bool) -> None:
        self._shared = shared
        self._take = take
        self._language = shared.language
        self._lookup = NgramLookup(self._language.cached_keys)
        self._always = always
        self._balance = FIXED_LOSS
        shared.costs.keep_lowest()
        if shared.draft:  # one attempt, whatever it costs
            self._balance = max(FIXED_LOSS, shared.costs.batch(WIDTHS[0]) + shared.costs.draft - 1)
        self.drafted = self.accepted = 0

    def advance(self, token: int, cancel: threading.Event) -> int:
        """Evaluate `token`, the last one of the answer; take one or more that follow it, and return the last of them.

        Afterwards the KV cache holds all tokens before that one. Raises `CancelledError`.
        """
        self._lookup.add(token)
        draft = self._propose(cancel)
        if draft:
            following = self._verify([token, *draft], cancel)
        else:
            self._balance += LOSS_PER_TOKEN
            following = [self._evaluate_single(token, cancel)]
        for key in following[:-1]:
            self._lookup.add(key)
        return following[-1]

    def _propose(self, cancel: threading.Event) -> list[int]:
        """Return draft tokens that, with the token before them, fill a batch; or none."""
        shared, costs = self._shared, self._shared.costs
        max_cost = inf if self._always else self._balance + 1
        width = shared.best_width(len(self._language.cached_keys), max_cost)
        tokens = self._lookup.propose(width - 1) if width else []
        if tokens or not width or not shared.draft or costs.batch(width) + costs.draft > max_cost:
            return tokens
        start = time.perf_counter()
        tokens = shared.draft.propose(self._lookup.keys, width - 1, cancel)
        costs.record("draft", time.perf_counter() - start)
        self._balance -= costs.draft
        return tokens if len(tokens) == width - 1 else []

    def _evaluate_single(self, token: int, cancel: threading.Event) -> int:
        """Return the token that follows."""
        start = time.perf_counter()
        self._language.evaluate_tokens([token], cancel)
        following, _ = self._take(self._language.logits())
        self._shared.costs.record(1, time.perf_counter() - start)
        return following

    def _verify(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        """Evaluate the last token and the draft tokens after it; return the tokens that the answer takes."""
        position = len(self._language.cached_keys)
        self.drafted += len(tokens) - 1
        if not self._shared.bits.proven(position, len(tokens)):
            return self._check_bits(tokens, cancel)
        start = time.perf_counter()
        rows = self._language.evaluate_all_logits(tokens, cancel)
        self._shared.costs.record(len(tokens), time.perf_counter() - start)
        choices = self._follow(tokens, iter(rows))
        self.accepted += len(choices) - 1
        self._language.truncate(position + len(choices))
        return choices

    def _follow(self, tokens: list[int], rows: Iterator[Array]) -> list[int]:
        """Take tokens from the logits after each of `tokens`, as long as those are what was taken and the answer goes
        on; add to the balance what that gains, or would gain if the bits were proven."""
        choices: list[int] = []
        for draft, row in zip([*tokens[1:], None], rows, strict=False):
            token, is_last = self._take(row)
            choices.append(token)
            if is_last or token != draft:
                break
        gain = len(choices) - self._shared.costs.batch(len(tokens))
        self._balance = min(self._balance + gain, 2 * WIDTHS[-1])
        return choices

    def _check_bits(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        """Evaluate a batch and then single tokens, compare their bits, and return the tokens of the latter.

        Comparing logits alone would be too coarse: they are computed from rounded hidden states, and up to 48 of 64
        rows computed by other kernels were equal.
        """
        language, position = self._language, len(self._language.cached_keys)
        language.output_hidden_states(True)
        try:
            rows = language.evaluate_all_logits(tokens, cancel)  # not timed: slower with hidden states
            states = [language.hidden_state(i).copy() for i in range(len(tokens))]
            language.truncate(position)

            def singles() -> Iterator[Array]:
                equal = True
                for token, state, row in zip(tokens, states, rows, strict=True):
                    if not equal:
                        return
                    language.evaluate_tokens([token], cancel)
                    same_state = np.array_equal(language.hidden_state(), state)
                    equal = same_state and np.array_equal(language.logits(), row)
                    self._shared.bits.record(position, len(tokens), equal)
                    yield language.logits()

            return self._follow(tokens, singles())
        finally:
            language.output_hidden_states(False)
