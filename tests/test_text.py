"""Streaming text: whatever way an answer is cut into tokens, what is shown is what cutting the whole answer gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_edge.runtimes.text import TextStream


def naive(data: bytes, stops: list[str]) -> str:
    """The oracle: decode all at once, then cut at the earliest stop sequence."""
    text = data.decode("utf-8", errors="replace").lstrip()
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def streamed(pieces: list[bytes], stops: list[str]) -> list[str]:
    stream = TextStream(stops)
    shown = []
    for piece in pieces:
        shown.append(stream.feed(piece))
        if stream.stopped:
            return shown
    return [*shown, stream.end()]


# A small alphabet makes stop sequences occur, overlap and begin inside one another.
SMALL = st.text(alphabet="ab\n é€😀", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n é€😀", min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(0, 200), max_size=20)


@given(SMALL, STOPS, CUTS)
def test_stops_equal_a_search_in_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    assert "".join(streamed(pieces_of(data, cuts), stops)) == naive(data, stops)


@given(SMALL, STOPS)
def test_nothing_of_a_stop_text_is_shown_too_early(text: str, stops: list[str]) -> None:
    """Whatever was shown at any moment is a beginning of the final answer: a terminal cannot take text back."""
    data = text.encode()
    shown = ""
    for part in streamed([bytes([value]) for value in data], stops):
        shown += part
        assert naive(data, stops).startswith(shown)


@given(st.binary(max_size=60), CUTS)
def test_any_bytes_equal_decoding_at_once(data: bytes, cuts: list[int]) -> None:
    assert "".join(streamed(pieces_of(data, cuts), [])) == naive(data, [])


def test_every_character_survives_byte_by_byte() -> None:
    """All of the Basic Multilingual Plane's ends and a stride through the rest, each byte a token of its own."""
    points = [p for p in [*range(0x20, 0x3000), *range(0x3000, 0x110000, 37)] if not 0xD800 <= p < 0xE000]
    text = "x" + "".join(map(chr, points))
    assert "".join(streamed([bytes([value]) for value in text.encode()], [])) == text


def test_text_is_not_held_back_without_need() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"Hello") == "Hello"
    assert stream.feed(b" E") == " "  # may become END
    assert stream.feed(b"gg") == "Egg"
    stream = TextStream(["END", "ENDING"])
    assert stream.feed(b"The END") == "The "
    assert stream.stopped  # whichever it is


def test_the_earliest_stop_wins_over_the_one_completed_first() -> None:
    stream = TextStream(["bc", "abcd"])
    assert stream.feed(b"xabc") == "x"
    assert not stream.stopped  # "abcd" may still begin before "bc"
    assert stream.feed(b"d...") == ""
    assert stream.stopped
    stream = TextStream(["bc", "abcd"])
    assert stream.feed(b"xabc") + stream.feed(b"e") == "xa"
    assert stream.stopped


@pytest.mark.parametrize(("cut", "tail"), [(False, "\ufffd"), (True, "")])
def test_half_a_character_at_the_end(cut: bool, tail: str) -> None:
    """An answer that was cut off loses the half character; one that ended by itself really had a broken one."""
    stream = TextStream()
    assert stream.feed("a€".encode()[:-1]) == "a"
    assert stream.end(interrupted=cut) == tail


def test_white_space_within_a_text_is_kept() -> None:
    assert [TextStream(continued=continued).feed(b" sky") for continued in (False, True)] == ["sky", " sky"]
