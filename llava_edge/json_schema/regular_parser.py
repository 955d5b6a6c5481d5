"""Regular expressions of ECMA-262 -> the expressions whose automata are in regular.py.

Supported is what regular languages have, without references back and boundaries of words; anchors and lookaheads only
outside groups, where they say something about the whole text. Expressions are untrusted: length and depth are limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llava_edge.json_schema.regular import Chars, Choice, Either, Joined, Node, Ranges, Repeated

T = TypeVar("T")

MAX_LENGTH = 1000  # in characters
MAX_DEPTH = 32
MAX_COUNT = 500  # in {}

LAST = 0x10FFFF  # code point
ANY = Chars(((0, LAST),))
_REST = Repeated(ANY, 0, None)
_SPACES = "\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))


class PatternError(Exception):
    """A regular expression cannot be followed. The message completes "has a pattern that ..."."""


def parse(pattern: str) -> list[Choice]:
    """Return what texts must satisfy one of, so that the pattern matches anywhere in them. Raises `PatternError`."""
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"is longer than {MAX_LENGTH} characters")
    return _Parser(pattern).parse()


def complement(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """All other characters; ranges may be in any order and overlap."""
    result, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            result.append((start, low - 1))
        start = max(start, high + 1)
    return (*result, (start, LAST)) if start <= LAST else tuple(result)


def _chars(characters: str) -> Ranges:
    """Raises `PatternError` for half of a surrogate pair, of which two would be one character."""
    if any("\ud800" <= character <= "\udfff" for character in characters):
        raise PatternError("has half a surrogate pair; expected the character itself")
    return tuple((ord(character), ord(character)) for character in characters)


_DIGITS: Ranges = ((ord("0"), ord("9")),)
_WORD: Ranges = (*_DIGITS, (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z")))
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _chars(_SPACES)}
_CLASSES |= {name.upper(): complement(ranges) for name, ranges in _CLASSES.items()}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_COUNTS = re.compile(r"\{([0-9]{1,6})(,([0-9]{1,6})?)?\}")
_GROUP = re.compile(r"\?(:|P?<[A-Za-z_][A-Za-z0-9_]*>)")
_HEXADECIMAL = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ")
_NO_LINE_END = complement(_chars("\n\r\u2028\u2029"))


@dataclass(frozen=True)
class _Anchored:
    """One alternative of a pattern. conditions: its lookaheads, which stand at the start."""

    texts: Node
    at_start: bool
    at_end: bool
    conditions: Choice


def _joined_choices(alternatives: list[_Anchored]) -> list[Choice]:
    """Choices for whole texts. Alternatives that differ in nothing else share what may precede and follow them."""
    choices, plain = list[Choice](), dict[tuple[bool, bool], list[Node]]()
    for each in alternatives:
        if each.conditions:
            choices.append([(_whole([each.texts], each.at_start, each.at_end), True), *each.conditions])
        else:
            plain.setdefault((each.at_start, each.at_end), []).append(each.texts)
    return choices + [[(_whole(options, *anchors), True)] for anchors, options in plain.items()]


def _whole(options: list[Node], at_start: bool, at_end: bool) -> Node:
    return Joined((*(() if at_start else (_REST,)), Either(tuple(options)), *(() if at_end else (_REST,))))


class _Parser:
    """Recursive descent; `_at` is the position of the next character."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> list[Choice]:
        choices = self._alternatives(self._anchored)
        if self._next() == ")":
            raise self._error("has a ')' without its '('")
        if self._next():
            raise self._error("has a '$' that is not at its end")
        return _joined_choices(choices)

    def _anchored(self) -> _Anchored:
        """One alternative outside groups."""
        conditions = []
        at_start = bool(self._take("^"))
        while sign := self._take("(?=", "(?!"):
            if not at_start:
                raise self._error("has a lookahead that does not follow '^'")
            conditions.append((self._nested(self._condition), sign == "(?="))
        texts = self._sequence()
        return _Anchored(texts, at_start, bool(self._take("$")), conditions)

    def _condition(self) -> Node:
        """One alternative of a lookahead, as all that may follow."""
        self._take("^")  # it is there
        texts = self._sequence()
        return texts if self._take("$") else Joined((texts, _REST))

    def _alternatives(self, parse: Callable[[], T]) -> list[T]:
        options = [parse()]
        while self._take("|"):
            options.append(parse())
        return options

    def _sequence(self) -> Node:
        parts = []
        while self._at < len(self._pattern) and self._next() not in "|)$":
            parts.append(self._repeated_atom())
        return Joined(tuple(parts))

    def _nested(self, parse: Callable[[], Node]) -> Node:
        """Alternatives in parentheses, the first of which has been read."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"is nested deeper than {MAX_DEPTH} levels")
        options = self._alternatives(parse)
        self._depth -= 1
        if self._next() == "$":
            raise self._error("has a '$' inside a group")
        if not self._take(")"):
            raise self._error("has a '(' without its ')'")
        return Either(tuple(options))

    def _repeated_atom(self) -> Node:
        atom = self._atom()
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        sign = self._take(*counts)
        low, high = counts[sign] if sign else self._counts()
        if (low, high) != (1, 1):
            self._take("?")  # lazy: the same texts
            if self._next() in ("*", "+", "?") or _COUNTS.match(self._pattern, self._at):
                raise self._error("repeats a repetition")
        return Repeated(atom, low, high)

    def _counts(self) -> tuple[int, int | None]:
        found = _COUNTS.match(self._pattern, self._at)
        if not found:
            return 1, 1
        self._at = found.end()
        low = int(found[1])
        high = low if found[2] is None else int(found[3]) if found[3] else None
        if max(low, high or 0) > MAX_COUNT or (high is not None and high < low):
            raise self._error(f"has counts that are not in order or above {MAX_COUNT}")
        return low, high

    def _atom(self) -> Node:
        if self._take("("):
            if self._next() == "?":
                if not (group := _GROUP.match(self._pattern, self._at)):
                    raise self._error("has a kind of group that is not supported there")
                self._at = group.end()
            return self._nested(self._sequence)
        if self._take("["):
            return Chars(self._bracket())
        if self._take("\\"):
            return Chars(self._escape())
        if self._take("."):
            return Chars(_NO_LINE_END)
        if self._next() == "^":
            raise self._error("has a '^' that is not at its start")
        if self._next() in ("*", "+", "?") or _COUNTS.match(self._pattern, self._at):
            raise self._error("repeats nothing")
        return Chars(_chars(self._character()))

    def _bracket(self) -> Ranges:
        negative = bool(self._take("^"))
        if self._next() == "]":
            raise self._error("has an empty [], which regular expressions disagree about")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            if self._take("[:", "[.", "[=", "&&"):
                raise self._error("has a set of characters by name or by operator")
            low = self._set_item()
            if self._next() != "-" or self._pattern[self._at + 1 : self._at + 2] == "]":
                ranges += low
                continue
            self._at += 1
            high = self._set_item()
            if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or low[0][0] > high[0][1]:
                raise self._error("has a range that is not from one character to a later one")
            ranges.append((low[0][0], high[0][1]))
        return complement(ranges) if negative else complement(complement(ranges))

    def _set_item(self) -> Ranges:
        if not self._take("\\"):
            return _chars(self._character())
        return _chars("\b") if self._take("b") else self._escape()

    def _escape(self) -> Ranges:
        """What follows a backslash."""
        found = _HEXADECIMAL.match(self._pattern, self._at)
        if found and (code := int(found[1] or found[2] or found[3], 16)) <= LAST:
            self._at = found.end()
            return _chars(chr(code))
        name = self._character()
        if name in _CLASSES:
            return _CLASSES[name]
        if name in _CONTROLS and not (name == "0" and self._next().isdigit()):
            return ((_CONTROLS[name], _CONTROLS[name]),)
        if name not in _PUNCTUATION:
            raise self._error(f"has a backslash before {name!a}, which is not supported")
        return _chars(name)

    def _take(self, *options: str) -> str:
        """Go past the first of `options` that is next, and return it; empty if none is."""
        found = next((option for option in options if self._pattern.startswith(option, self._at)), "")
        self._at += len(found)
        return found

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _character(self) -> str:
        if self._at == len(self._pattern):
            raise self._error("ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _error(self, what: str) -> PatternError:
        return PatternError(f"{what} (before character {self._at + 1})")
