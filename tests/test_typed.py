"""Dataclasses from JSON and TOML: bundles, recipes, saved conversations and measurements test the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from llava_edge.typed import Printable, Range, build


@dataclass(frozen=True)
class Inner:
    name: Annotated[str, Printable()]
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 9)]
    inner: Inner
    pair: tuple[int, int] = (0, 0)
    many: tuple[float, ...] = ()
    named: dict[Literal["a", "b"], Inner] = field(default_factory=dict)
    other: Any = None


def test_what_fits_is_built_with_its_defaults() -> None:
    raw = {"count": 9, "inner": {"name": "x", "share": 0.5}, "named": {"a": {"name": "y", "share": None}}}
    assert build(Outer, raw) == Outer(9, Inner("x", 0.5), named={"a": Inner("y")})
    raw = {"count": 1, "inner": {"name": "x", "share": 1}, "pair": [1, 2], "many": [], "other": {"any": [None]}}
    assert build(Outer, raw) == Outer(1, Inner("x", 1.0), (1, 2), (), other={"any": [None]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "it has count = 0; a whole number from 1 to 9 was expected"),
        ({"count": True}, "it has count = True; a whole number"),
        ({"inner": []}, "it has inner = []; a table of named values was expected"),
        ({"inner": {}}, "it has no inner.name"),
        ({"inner": {"name": "\x1b"}}, r"it has inner.name = '\x1b'; a text in quotes that can be printed was"),
        ({"inner": {"name": "x", "share": "1"}}, "it has inner.share = '1'; a number was expected"),
        ({"inner": {"name": "x", "share": float("nan")}}, "it has inner.share = nan; a number was expected"),
        ({"inner": {"name": "x", "size": 1}}, "it has unknown fields ['inner.size']"),
        ({"pair": [1]}, "it has pair = [1]; a list of 2 values was expected"),
        ({"pair": [1, 2, 3]}, "it has pair = [1, 2, 3]; a list of 2 values was expected"),
        ({"pair": [1, 2.0]}, "it has pair[1] = 2.0; a whole number was expected"),
        ({"many": "12"}, "it has many = '12'; a list was expected"),
        ({"named": {"c": {}}}, "it has 'c' in named; one of 'a', 'b' was expected"),
        ({"named": {"a": 1}}, "it has named.a = 1; a table of named values was expected"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"^it is 5; a table of named values was expected"):
        build(Outer, 5)
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        build(Outer, {"count": 1, "inner": {"name": "x"}} | change)
