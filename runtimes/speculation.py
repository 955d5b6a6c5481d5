"""Several tokens of a greedy answer in one pass: guessed from what was said before, or by a draft model, and kept where
the model agrees.

An answer is the same, bit for bit, with and without it (on a GPU that is not known). A batch may be computed by other
kernels than a single token, and their last digits can turn a near tie. So batches are used only where they were seen to
give the very bits of single tokens (`SameBits`), and as wide as pays on this machine (`Costs`). Knows nothing about
text, stop texts or sampling.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from math import inf
from statistics import median

import numpy as np

from llava_edge.runtimes.draft import Draft
from llava_edge.runtimes.language import Array, Key, LanguageModel

WIDTHS = (4, 8)  # tokens in a pass: always as many, because kernels are chosen by it
EXPECTED = {4: 3.44, 8: 5.70}  # tokens that a pass gives if nine of ten guesses hold: 1 + 0.9 + 0.81...
NGRAM = 3  # tokens that have to agree before what followed them is taken for a guess
PROOF = 8  # rows that have to be equal; of 64 rows that other kernels had computed, no hidden state was
BLOCK = 256  # llama.cpp pads its memory to multiples of this, and chooses kernels by the padded size
FREE_LOSS = 1.5  # in single tokens: what guessing may cost an answer that it does not help,
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
    """Where batches were seen to give the bits of single tokens: a verdict for each width and memory block."""

    def __init__(self) -> None:
        self._equal: dict[tuple[int, int], int] = {}  # width, block -> rows seen equal, -1 after one that was not

    def possible(self, start: int, width: int) -> bool:
        """Whether a batch at position `start` lies in one block, which has not been seen to differ."""
        block = start // BLOCK
        return (start + width - 1) // BLOCK == block and self._equal.get((width, block), 0) >= 0

    def proven(self, start: int, width: int) -> bool:
        """Whether enough rows were seen equal."""
        return self._equal.get((width, start // BLOCK), 0) >= PROOF

    def note(self, start: int, width: int, equal: bool) -> None:
        """One row of a batch at `start` was compared."""
        at = width, start // BLOCK
        self._equal[at] = self._equal.get(at, 0) + 1 if equal and self.possible(start, width) else -1


class Costs:
    """What passes cost, in single tokens, as far as it was measured.

    Each is compared with the last single tokens before it, because others use the processor too, for a while.
    """

    def __init__(self) -> None:
        self._singles: deque[float] = deque(maxlen=5)  # seconds
        self._relative: dict[int | str, deque[float]] = defaultdict(lambda: deque(maxlen=9))

    def note(self, what: int | str, seconds: float) -> None:
        """Time of one pass of so many tokens, or of one guess of the "draft" model."""
        if what == 1:
            self._singles.append(seconds)
        elif self._singles:
            self._relative[what].append(seconds / median(self._singles))

    def renew(self) -> None:
        """Keep the least of each: one high by others' work would stop guessing, and with it measuring, for good."""
        for measured in filter(None, self._relative.values()):
            least = min(measured)
            measured.clear()
            measured.append(least)

    def of(self, width: int) -> float:
        """Of a pass. As long as it was not measured, the others say what a token more costs."""
        known = {w: median(self._relative[w]) for w in WIDTHS if self._relative[w]}
        other, cost = next(iter(known.items()), (4, 2.0))
        return known.get(width, 1 + (cost - 1) * (width - 1) / (other - 1))

    @property
    def draft(self) -> float:
        """Of a guess of the draft model."""
        return median(self._relative["draft"] or [0.0])


class Speculation:
    """One for a loaded model: what is known about its batches, and what they cost. `draft` guesses where nothing else
    does."""

    def __init__(self, language: LanguageModel, draft: Draft | None = None) -> None:
        self.language = language
        self.draft = draft
        self.bits = SameBits()
        self.costs = Costs()
        # Whether "auto" guesses. llama.cpp's kernels for GPUs may change with more than the width and the block that
        # verdicts are about, which nobody has looked into: there guesses have to be asked for.
        self.unasked = not language.on_gpu or draft is not None

    def width(self, start: int, most: float) -> int:
        """Tokens in the pass at position `start` that promises most, and costs up to `most`; 0 if there is none."""
        room = self.language.context_size - start
        widths = [width for width in WIDTHS if width <= room and self.bits.possible(start, width)]
        widths = [width for width in widths if self.costs.of(width) <= most]
        return max(widths, key=lambda width: EXPECTED[width] / self.costs.of(width), default=0)


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
        shared.costs.renew()
        if shared.draft:  # one try, whatever it costs
            self._balance = max(FREE_LOSS, shared.costs.of(WIDTHS[0]) + shared.costs.draft - 1)
        self.drafted = self.accepted = 0

    def next(self, token: int, cancel: threading.Event) -> list[int]:
        """Evaluate `token`, the last of the answer, and return those that follow: one or more.

        Afterwards memory holds all of them but the last. Raises `CancelledError`.
        """
        self._lookup.add(token)
        guess = self._guess(cancel)
        if guess:
            found = self._verify([token, *guess], cancel)
        else:
            self._balance += SHARE_LOSS
            found = [self._single(token, cancel)]
        for key in found[:-1]:
            self._lookup.add(key)
        return found

    def _guess(self, cancel: threading.Event) -> list[int]:
        """Tokens that fill a pass with the one before them, or none."""
        shared, costs = self._shared, self._shared.costs
        most = inf if self._always else self._balance + 1
        width = shared.width(len(self._language.held), most)
        guess = self._lookup.guess(width - 1) if width else []
        if guess or not width or not shared.draft or costs.of(width) + costs.draft > most:
            return guess
        start = time.perf_counter()
        guess = shared.draft.guess(self._lookup.keys, width - 1, cancel)
        costs.note("draft", time.perf_counter() - start)
        self._balance -= costs.draft
        return guess if len(guess) == width - 1 else []

    def _single(self, token: int, cancel: threading.Event) -> int:
        start = time.perf_counter()
        self._language.evaluate_tokens([token], cancel)
        found = self._language.best()
        self._shared.costs.note(1, time.perf_counter() - start)
        return found

    def _batch(self, tokens: list[int], cancel: threading.Event) -> Array:
        """Logits after each."""
        start = time.perf_counter()
        rows = self._language.evaluate_all(tokens, cancel)
        self._shared.costs.note(len(tokens), time.perf_counter() - start)
        return rows

    def _verify(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        position = len(self._language.held)
        self.drafted += len(tokens) - 1
        if not self._shared.bits.proven(position, len(tokens)):
            return self._compare(tokens, cancel)
        best = self._batch(tokens, cancel).argmax(1).tolist()
        right = self._right(tokens, best)
        self.accepted += right
        self._language.forget(position + right + 1)
        return list(best[: right + 1])

    def _right(self, tokens: list[int], best: list[int]) -> int:
        """How many guesses hold; the balance gets what that wins, or would win if batches were proven."""
        right = 0
        while right < len(tokens) - 1 and best[right] == tokens[right + 1]:
            right += 1
        self._balance = min(self._balance + right + 1 - self._shared.costs.of(len(tokens)), 2 * WIDTHS[-1])
        return right

    def _compare(self, tokens: list[int], cancel: threading.Event) -> list[int]:
        """Single tokens in place of a batch, whose rows are compared with theirs.

        Logits are too coarse for that: they are computed from rounded states, and up to 48 of 64 rows that other
        kernels had computed were equal.
        """
        language, position = self._language, len(self._language.held)
        language.show_states(True)
        try:
            rows = language.evaluate_all(tokens, cancel)  # slower with states shown: no measure of what a pass costs
            states = [language.state(i).copy() for i in range(len(tokens))]
            language.forget(position)
            found: list[int] = []
            for i in range(self._right(tokens, rows.argmax(1).tolist()) + 1):
                language.evaluate_tokens([tokens[i]], cancel)
                found.append(language.best())
                equal = np.array_equal(language.state(), states[i]) and np.array_equal(language.logits(), rows[i])
                self._shared.bits.note(position, len(tokens), equal)
                if not equal:
                    break
            return found
        finally:
            language.show_states(False)
