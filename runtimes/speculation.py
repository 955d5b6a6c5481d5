"""Several tokens of a greedy answer in one pass: guessed from what was said before, or by a draft model, and kept where
the model agrees.

An answer is the same, bit for bit, with and without it. A batch may be computed by other kernels than a single token,
and their last digits can turn a near tie. So batches are used only where they were seen to give the very bits of
single tokens (`SameBits`). Knows nothing about text, stop texts or sampling.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from llava_edge.runtimes.draft import Draft
from llava_edge.runtimes.language import Key, LanguageModel

WIDTH = 8  # tokens in a pass: always as many, because kernels are chosen by it
NGRAM = 4  # tokens that have to agree before what followed them is taken for a guess
PROOF = 16  # rows that have to be equal; of 64 rows that other kernels had computed, no hidden state was
BLOCK = 256  # llama.cpp pads its memory to multiples of this, and chooses kernels by the padded size
FREE_LOSS = 1.0  # in single tokens: what guessing may cost an answer that it does not help,
SHARE_LOSS = 0.02  # and this for each of its tokens


class Lookup:
    """Guesses what comes next: what followed the last `NGRAM` tokens when they last occurred."""

    def __init__(self, keys: list[Key]) -> None:
        self.keys: list[Key] = []  # all of them
        self._after: dict[tuple[Key, ...], int] = {}  # n-gram -> where what followed it begins
        for key in keys:
            self.add(key)

    def add(self, key: Key) -> None:
        """One more position: a token, or a row of an image."""
        if len(self.keys) >= NGRAM:
            self._after[tuple(self.keys[-NGRAM:])] = len(self.keys)
        self.keys.append(key)

    def guess(self, count: int) -> list[int]:
        """`count` tokens, or none. A repetition that has only begun is continued."""
        start = self._after.get(tuple(self.keys[-NGRAM:]))
        if start is None:
            return []
        period = self.keys[start:]
        guess = [period[i % len(period)] for i in range(count)]
        return [key for key in guess if isinstance(key, int)] if all(isinstance(key, int) for key in guess) else []


class SameBits:
    """Where a batch of `WIDTH` tokens was seen to give the bits of single tokens: a verdict for each memory block."""

    def __init__(self) -> None:
        self._equal: dict[int, int] = {}  # block -> rows seen equal, -1 after one that was not

    def possible(self, start: int) -> bool:
        """Whether a batch at position `start` lies in one block, which has not been seen to differ."""
        block = start // BLOCK
        return (start + WIDTH - 1) // BLOCK == block and self._equal.get(block, 0) >= 0

    def proven(self, start: int) -> bool:
        """Whether enough rows were seen equal."""
        return self._equal.get(start // BLOCK, 0) >= PROOF

    def note(self, start: int, equal: bool) -> None:
        """One row of a batch at `start` was compared."""
        block = start // BLOCK
        self._equal[block] = self._equal.get(block, 0) + 1 if equal and self.possible(start) else -1


class Speculation:
    """One for a loaded model: what is known about its batches, and what they cost. `draft` guesses where nothing else
    does.

    ratio, draft_ratio: time of a pass, and of a guess of the draft model, in single tokens, as far as it was measured.
    """

    def __init__(self, language: LanguageModel, draft: Draft | None = None) -> None:
        self.language = language
        self.draft = draft
        self.bits = SameBits()
        self.ratio = 2.0
        self.draft_ratio = 0.0
        self._single = self._pass = self._guess = 0.0  # seconds

    def measure(self, seconds: float, tokens: int) -> None:
        """Time of one evaluation."""
        if tokens == 1:
            self._single = _moving(self._single, seconds)
        else:
            self._pass = _moving(self._pass, seconds)
        self._relate()

    def measure_draft(self, seconds: float) -> None:
        """Time of one guess of the draft model."""
        self._guess = _moving(self._guess, seconds)
        self._relate()

    def _relate(self) -> None:
        if self._single and self._pass:
            self.ratio = self._pass / self._single
        if self._single and self._guess:
            self.draft_ratio = self._guess / self._single


def _moving(mean: float, value: float) -> float:
    """A moving mean, from the first value on: others use the processor too."""
    return mean + (value - mean) * (0.1 if mean else 1)


class Guessing:
    """Speculation in one answer. `drafted` and `accepted` count guessed tokens.

    always: guess even where it does not pay. Otherwise the balance of won and lost time, in single tokens, has to
    allow one more pass that wins nothing.
    """

    def __init__(self, shared: Speculation, *, always: bool) -> None:
        self._shared = shared
        self._language = shared.language
        self._lookup = Lookup(self._language.held)
        self._always = always
        self._balance = FREE_LOSS
        if shared.draft:  # one try, whatever it costs
            self._balance = max(FREE_LOSS, shared.ratio + shared.draft_ratio - 1)
        self.drafted = self.accepted = 0

    def next(self, token: int, cancel: threading.Event) -> list[int]:
        """Evaluate `token`, the last of the answer, and return those that follow: one or more.

        Afterwards memory holds all of them but the last. Raises `CancelledError`.
        """
        self._lookup.add(token)
        guess = self._guess(cancel) if self._possible() else []
        if guess:
            found = self._verify([token, *guess], cancel)
        else:
            self._balance += SHARE_LOSS
            found = [self._single(token, cancel)]
        for key in found[:-1]:
            self._lookup.add(key)
        return found

    def _possible(self) -> bool:
        start = len(self._language.held)
        return start + WIDTH <= self._language.context_size and self._shared.bits.possible(start)

    def _worth(self, cost: float) -> bool:
        return self._always or self._balance >= cost - 1

    def _guess(self, cancel: threading.Event) -> list[int]:
        """`WIDTH` - 1 tokens, or none."""
        shared = self._shared
        if not self._worth(shared.ratio):
            return []
        guess = self._lookup.guess(WIDTH - 1)
        if guess or not shared.draft or not self._worth(shared.ratio + shared.draft_ratio):
            return guess
        start = time.perf_counter()
        guess = shared.draft.guess(self._lookup.keys, WIDTH - 1, cancel)
        shared.measure_draft(time.perf_counter() - start)
        self._balance -= shared.draft_ratio
        return guess if len(guess) == WIDTH - 1 else []

    def _single(self, token: int, cancel: threading.Event) -> int:
        start = time.perf_counter()
        self._language.evaluate_tokens([token], cancel)
        found = self._language.best()
        self._shared.measure(time.perf_counter() - start, 1)
        return found

    def _verify(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        position = len(self._language.held)
        self.drafted += WIDTH - 1
        if not self._shared.bits.proven(position):
            return self._compare(tokens, cancel)
        start = time.perf_counter()
        best = self._language.evaluate_all(tokens, cancel).argmax(1).tolist()
        self._shared.measure(time.perf_counter() - start, WIDTH)
        right = self._right(tokens, best)
        self.accepted += right
        self._language.forget(position + right + 1)
        return list(best[: right + 1])

    def _right(self, tokens: list[int], best: list[int]) -> int:
        """How many guesses hold; the balance gets what that wins, or would win if batches were proven."""
        right = 0
        while right < WIDTH - 1 and best[right] == tokens[right + 1]:
            right += 1
        self._balance = min(self._balance + right + 1 - self._shared.ratio, 2 * WIDTH)
        return right

    def _compare(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        """Single tokens in place of a batch, whose rows are compared with theirs.

        Logits are too coarse for that: they are computed from rounded states, and up to 48 of 64 rows that other
        kernels had computed were equal.
        """
        language, position = self._language, len(self._language.held)
        language.show_states(True)
        try:
            rows = language.evaluate_all(tokens, cancel)
            states = [language.state(i).copy() for i in range(WIDTH)]
            language.forget(position)
            found: list[int] = []
            for i in range(self._right(tokens, rows.argmax(1).tolist()) + 1):
                language.evaluate_tokens([tokens[i]], cancel)
                found.append(language.best())
                equal = np.array_equal(language.state(), states[i]) and np.array_equal(language.logits(), rows[i])
                self._shared.bits.note(position, equal)
                if not equal:
                    break
            return found
        finally:
            language.show_states(False)
