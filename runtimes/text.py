"""Token bytes -> text that is safe to output: whole characters only, and nothing of a stop sequence.

Knows nothing about tokens, engines or terminals.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes the bytes of an answer as early as possible, and cuts the text at the earliest stop sequence.

    Characters that are split over tokens are joined; only invalid UTF-8 becomes U+FFFD.
    Together, the outputs of `feed` and `end` equal the whole answer, stripped of leading white space (SentencePiece's
    first token has some) and cut: `text[:min(text.find(s) for s in stops that occur)]`.
    continued: the answer continues a text, so that leading white space is kept.
    """

    def __init__(self, stops: Sequence[str] = (), *, continued: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._pending = ""
        self._started = continued
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Return the text that can be output after this piece; set `stopped` once a stop sequence is complete."""
        return self._release(self._decoder.decode(piece), final=False)

    def end(self, *, interrupted: bool = False) -> str:
        """Return the pending text. `interrupted`: the answer is incomplete, so drop a partial character at its end."""
        return self._release("" if interrupted else self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        self._pending += text
        match = self._earliest_match()
        # Text from the first partial match on has to wait, even before a complete match: the stop sequence that begins
        # there may still be completed, and is then the earliest.
        safe = len(self._pending) if final else self._first_partial_match()
        self.stopped = match is not None and match <= safe
        released = self._pending[: safe if match is None else min(safe, match)]
        self._pending = self._pending[len(released) :]
        return released

    def _earliest_match(self) -> int | None:
        return min((at for stop in self._stops if (at := self._pending.find(stop)) >= 0), default=None)

    def _first_partial_match(self) -> int:
        """Return the index of the first suffix of the pending text that is a proper prefix of a stop sequence."""
        text = self._pending
        longest = max((len(stop) for stop in self._stops), default=1)
        for at in range(max(0, len(text) - longest + 1), len(text)):
            if any(len(stop) > len(text) - at and stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
