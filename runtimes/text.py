"""Bytes of tokens -> text that is safe to show: whole characters only, and nothing of a stop text.

Knows nothing about tokens, engines or terminals.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the byte pieces of an answer into text as early as can be, and cuts it at the earliest stop text.

    Characters split over tokens are joined; U+FFFD stands only for bytes that are no UTF-8.
    Joined, the outputs of `feed` and `end` are what cutting the whole answer at once would give, after white space at
    its start was dropped (SentencePiece's first token has some): `text[:min(text.find(s) for s in stops that occur)]`.
    within: the answer goes on with a text, so that white space at its start counts.
    """

    def __init__(self, stops: Sequence[str] = (), *, within: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._held = ""
        self._started = within
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Text that can be shown after this piece; sets `stopped` once a stop text is certain."""
        return self._release(self._decoder.decode(piece), final=False)

    def end(self, *, cut: bool = False) -> str:
        """What is still held back. `cut`: the answer was interrupted, so half a character at its end is dropped."""
        return self._release("" if cut else self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        self._held += text
        match = self._earliest_match()
        # Text from the first possible beginning of a stop text on has to wait, even before a complete match:
        # the longer stop text that begins there may still be completed and then is the earliest.
        safe = len(self._held) if final else self._first_beginning()
        self.stopped = match is not None and match <= safe
        shown = self._held[: safe if match is None else min(safe, match)]
        self._held = self._held[len(shown) :]
        return shown

    def _earliest_match(self) -> int | None:
        return min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)

    def _first_beginning(self) -> int:
        """Index of the first tail of the held text that is a proper beginning of a stop text."""
        held = self._held
        longest = max((len(stop) for stop in self._stops), default=1)
        for at in range(max(0, len(held) - longest + 1), len(held)):
            if any(len(stop) > len(held) - at and stop.startswith(held[at:]) for stop in self._stops):
                return at
        return len(held)
