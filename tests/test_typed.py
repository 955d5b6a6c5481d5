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
    rate: Annotated[float, Range(0, 1, exclusive_low=True)] = 1.0
    other: Any = None


def test_what_fits_is_built_with_its_defaults() -> None:
    raw = {"count": 9, "inner": {"name": "x", "share": 0.5}, "named": {"a": {"name": "y", "share": None}}}
    assert build(Outer, raw) == Outer(9, Inner("x", 0.5), named={"a": Inner("y")})
    raw = {"count": 1, "inner": {"name": "x", "share": 1}, "pair": [1, 2], "many": [], "other": {"any": [None]}}
    assert build(Outer, raw) == Outer(1, Inner("x", 1.0), (1, 2), (), other={"any": [None]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "it has count = 0; expected an integer from 1 to 9"),
        ({"count": True}, "it has count = True; expected an integer from 1 to 9"),
        ({"inner": []}, "it has inner = []; expected a table of named values"),
        ({"inner": {}}, "it has no inner.name"),
        ({"inner": {"name": "\x1b"}}, r"it has inner.name = '\x1b'; expected a string in quotes that can be printed"),
        ({"inner": {"name": "x", "share": "1"}}, "it has inner.share = '1'; expected a number"),
        ({"inner": {"name": "x", "share": True}}, "it has inner.share = True; expected a number"),
        ({"inner": {"name": "x", "share": float("nan")}}, "it has inner.share = nan; expected a number"),
        ({"inner": {"name": "x", "share": float("-inf")}}, "it has inner.share = -inf; expected a number"),
        ({"inner": {"name": "x", "size": 1}}, "it has unknown fields ['inner.size']"),
        ({"pair": [1]}, "it has pair = [1]; expected a list of 2 values"),
        ({"pair": [1, 2, 3]}, "it has pair = [1, 2, 3]; expected a list of 2 values"),
        ({"pair": [1, 2.0]}, "it has pair[1] = 2.0; expected an integer"),
        ({"many": "12"}, "it has many = '12'; expected a list"),
        ({"named": {"c": {}}}, "it has 'c' in named; expected one of 'a', 'b'"),
        ({"rate": 0}, "it has rate = 0; expected a number above 0 and up to 1"),
        ({"named": {"a": 1}}, "it has named.a = 1; expected a table of named values"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"^it is 5; expected a table of named values$"):
        build(Outer, 5)
    with pytest.raises(ValueError, match=r"^it has no inner$"):
        build(Outer, {"count": 1})
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        build(Outer, {"count": 1, "inner": {"name": "x"}} | change)
