"""Attention of the native kernels against float64: on this machine, and compiled for ARM in an emulator."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from emulator import Emulated, emulated
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from native_kernels import HAS_VNNI512, Array, Kernels, here

from llava_edge.errors import BundleError
from llava_edge.gguf import Gguf, Tensor
from llava_edge.runtimes import native
from llava_edge.runtimes.native import build, check, installed
from llava_edge.runtimes.native.choice import Status

Attend = Callable[..., Array]  # of queries, keys, values, mask

FEW = [pytest.param(("here", "few"), marks=here), pytest.param(("aarch64", "few"), marks=emulated)]
MANY = [
    pytest.param(("here", "avx2"), marks=here),
    pytest.param(("here", "avx512vnni"), marks=here),
    pytest.param(("aarch64", "neon"), marks=emulated),
]


def ways(values: Sequence[object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", values, ids=lambda way: "-".join(way))


@pytest.fixture(scope="module")
def kernels(native_build: Path) -> Kernels:
    return Kernels(Path(os.environ.get("LLAVA_EDGE_TEST_NATIVE", native_build / installed.LIBRARY)))


@pytest.fixture(scope="module")
def for_arm(arm_program: Path) -> Iterator[Emulated]:
    with closing(Emulated(arm_program)) as started:
        yield started


@pytest.fixture
def attend(way: tuple[str, str], request: pytest.FixtureRequest) -> Attend:
    machine, name = way
    there: Kernels | Emulated = request.getfixturevalue("kernels" if machine == "here" else "for_arm")
    return partial(there.attend, name)


@ways([*FEW, *MANY])
@pytest.mark.parametrize(
    ("heads", "shared", "queries", "keys", "width"),
    [
        (1, 1, 1, 1, 16),
        (4, 2, 45, 96, 64),
        (6, 1, 7, 300, 80),
        (2, 2, 100, 523, 128),
        (1, 1, 9, 2000, 256),
        (2, 1, 97, 1100, 32),
    ],
)
def test_attention(
    attend: Attend, way: tuple[str, str], heads: int, shared: int, queries: int, keys: int, width: int
) -> None:
    inputs = check.attention_inputs(heads, shared, queries, keys, width)
    if way[1] == "avx512vnni" and width % 32:
        with pytest.raises(AssertionError):
            attend(*inputs)
        return
    found = attend(*inputs, threads=2)
    np.testing.assert_allclose(found, check.exact_attention(*inputs), rtol=0, atol=3e-6)


@ways([*FEW, *MANY])
@pytest.mark.parametrize(
    ("heads", "shared", "queries", "keys", "width"),
    [(4, 2, 45, 96, 64), (6, 1, 7, 300, 96), (2, 2, 100, 523, 128), (1, 1, 9, 2000, 256), (2, 1, 97, 1100, 32)],
)
def test_attention_over_a_cache_in_eight_bits(
    attend: Attend, way: tuple[str, str], heads: int, shared: int, queries: int, keys: int, width: int
) -> None:
    q, k, v, mask = check.attention_inputs(heads, shared, queries, keys, width)
    (k, k_blocks), (v, v_blocks) = map(check.in_eight_bits, (k, v))
    assert (dequantize(k_blocks, GGMLQuantizationType.Q8_0) == k).all()
    found = attend(q, k_blocks, v_blocks, mask, threads=2)
    np.testing.assert_allclose(found, check.exact_attention(q, k, v, mask), rtol=0, atol=3e-6)
    if way[1] == "few":
        assert (attend(q[:, [2]], k_blocks, v_blocks, mask[[2]])[0] == found[2]).all()


@here
@pytest.mark.skipif(not HAS_VNNI512, reason="this processor lacks AVX-512 VNNI")
def test_both_widths_of_registers_give_the_same_bits(kernels: Kernels) -> None:
    for shape in ((4, 2, 45, 96, 64), (2, 2, 100, 523, 128), (1, 1, 9, 2000, 256), (2, 1, 97, 1100, 32)):
        inputs = check.attention_inputs(*shape)
        assert (kernels.attend("avx512vnni", *inputs, threads=2) == kernels.attend("avx2", *inputs)).all()


@ways(FEW)
@pytest.mark.parametrize(("heads", "shared", "keys", "width"), [(9, 3, 257, 64), (4, 4, 70, 128), (2, 1, 9, 80)])
def test_a_query_gets_the_same_bits_alone_and_among_others(
    attend: Attend, heads: int, shared: int, keys: int, width: int
) -> None:
    """Whatever lies behind what it sees, too: room that llama.cpp adds, and draft tokens that were wrong."""
    q, k, v, mask = check.attention_inputs(heads, shared, 8, keys, width)
    together = attend(q, k, v, mask)
    for query in (0, 3, 7):  # of which each sees another number of keys
        seen = keys - 7 + query
        alone = attend(q[:, [query]], k[:, :seen], v[:, :seen], mask[[query], :seen])
        assert (alone[0] == together[query]).all()
        longer_k, longer_v = (
            np.pad(part[:, :seen], ((0, 0), (0, 60), (0, 0)), constant_values=np.nan) for part in (k, v)
        )
        hidden = np.pad(mask[[query], :seen], ((0, 0), (0, 60)), constant_values=-np.inf)
        assert (attend(q[:, [query]], longer_k, longer_v, hidden)[0] == alone[0]).all()


@ways([*FEW, *MANY])
def test_tokens_of_other_answers_between_the_keys_change_no_bit(attend: Attend, way: tuple[str, str]) -> None:
    queries = 5 if way[1] == "few" else 40
    q, k, v, mask = check.attention_inputs(4, 2, queries, 150, 64)
    places = np.arange(150) * 4 // 3
    wide_k, wide_v = (np.full((2, places[-1] + 1, 64), value, np.float16) for value in (np.nan, 50))
    wide_k[:, places], wide_v[:, places] = k, v
    hidden = np.full((queries, places[-1] + 1), -np.inf, np.float16)
    hidden[:, places] = mask
    assert (attend(q, wide_k, wide_v, hidden) == attend(q, k, v, mask)).all()


@ways([*FEW, *MANY])
@pytest.mark.parametrize("start", [0, 37])
def test_other_prompts_between_the_keys_are_not_looked_at(attend: Attend, way: tuple[str, str], start: int) -> None:
    """`start` keys, a hole that begins and ends within a panel, and the rest."""
    queries = 5 if way[1] == "few" else 140
    q, k, v, mask = check.attention_inputs(4, 2, queries, 250, 64)
    places = np.concatenate([np.arange(start), np.arange(start, 250) + 600])
    wide_k, wide_v = (np.full((2, places[-1] + 1, 64), 50, np.float16) for _ in range(2))
    wide_k[:, 64:576], wide_v[:, 64:576] = np.nan, np.nan
    wide_k[:, places], wide_v[:, places] = k, v
    hidden = np.full((queries, places[-1] + 1), -np.inf, np.float16)
    hidden[:, places] = mask
    assert (attend(q, wide_k, wide_v, hidden) == attend(q, k, v, mask)).all()


@ways(FEW)
def test_later_queries_do_not_look_at_what_only_earlier_ones_see(attend: Attend) -> None:
    """They are computed after those, in the same memory: with as many keys as a conversation has, a few at a time."""
    q, k, v, mask = check.attention_inputs(1, 1, 40, 128, 16)
    mask[:] = 0
    mask[31:, 32:64] = -np.inf
    k[:, 32:64], v[:, 32:64] = np.nan, np.nan
    others = np.r_[0:32, 64:128]
    expected = attend(q[:, 31:], k[:, others], v[:, others], mask[31:, others])
    assert (attend(q, k, v, mask)[31:] == expected).all()


@ways(FEW)
def test_queries_of_different_prompts_get_the_same_bits_as_alone(attend: Attend) -> None:
    """The first 40 keys are seen by all, as the text before pictures is."""
    lengths = (40, 33, 100, 1, 260)
    ends = np.cumsum(lengths)
    q, k, v, _ = check.attention_inputs(6, 3, 4, int(ends[-1]), 64)
    hidden = np.full((4, ends[-1]), -np.inf, np.float16)
    hidden[:, :40] = 0
    for query, (start, end) in enumerate(pairwise(ends)):
        hidden[query, start:end] = 0
    together = attend(q, k, v, hidden)
    for query in range(4):
        seen = np.flatnonzero(hidden[query] == 0)
        alone = attend(q[:, [query]], k[:, seen], v[:, seen], hidden[[query]][:, seen])
        assert (alone[0] == together[query]).all()


@ways([*FEW, *MANY])
@pytest.mark.parametrize("behind", [70, 80])
def test_what_lies_behind_what_all_see_is_not_looked_at(attend: Attend, behind: int) -> None:
    q, k, v, mask = check.attention_inputs(2, 2, 20, 128, 64)
    mask[:, 70:] = -np.inf
    k[:, behind:], v[:, behind:] = np.nan, np.nan
    assert (attend(q, k, v, mask) == attend(q, k[:, :70], v[:, :70], mask[:, :70])).all()


@ways(MANY)
def test_queries_that_see_less_than_those_before_them(attend: Attend) -> None:
    q, k, v, mask = check.attention_inputs(2, 1, 193, 300, 32)
    backwards = np.ascontiguousarray(mask[::-1])
    expected = check.exact_attention(q, k, v, backwards)
    np.testing.assert_allclose(attend(q, k, v, backwards), expected, rtol=0, atol=3e-6)


@ways([*FEW, *MANY])
def test_attention_with_large_scores_and_hidden_rows(attend: Attend) -> None:
    q, k, v, mask = check.attention_inputs(2, 1, 20, 64, 64)
    q *= 40  # scores of more than a hundred: nearly one key for each query
    mask[3] = -np.inf  # a padded query sees nothing
    seen = np.delete(np.arange(20), 3)
    found = attend(q, k, v, mask)
    assert (found[3] == 0).all()
    expected = check.exact_attention(q[:, seen], k, v, mask[seen])
    np.testing.assert_allclose(found[seen], expected, rtol=0, atol=1e-4)
    q[0, 5, 7] = np.nan
    found = attend(q, k, v, mask)
    assert np.isnan(found[5, 0]).all()
    assert np.isfinite(np.delete(found[:, 0], 5, 0)).all()


@ways([*FEW, *MANY])
@pytest.mark.parametrize("place", range(8))
def test_a_query_whose_only_key_is_not_a_number_gets_none(attend: Attend, place: int) -> None:
    """Not the zero of one that sees nothing."""
    q, k, v, mask = check.attention_inputs(1, 1, 6, 16, 32)
    mask[2] = -np.inf
    mask[2, place] = 0
    k[0, place] = np.nan
    assert np.isnan(attend(q, k, v, mask)[2]).all()


def test_a_width_of_heads_that_is_no_number_is_refused_in_a_sentence() -> None:
    sizes = {"llama.attention.head_count": 4, "llama.embedding_length": 256}
    found = [
        native.supports_attention(Gguf(Path(), {**sizes, **own}, {}), eight_bits=eight_bits)
        for eight_bits in (False, True)
        for own in ({}, {"llama.attention.key_length": 72}, {"llama.attention.key_length": 80})
    ]
    assert found == [True, False, True, True, False, False]
    with pytest.raises(BundleError, match=r"key_length = '64'; expected an integer"):
        native.supports_attention(Gguf(Path(), {**sizes, "llama.attention.key_length": "64"}, {}), eight_bits=False)


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((128, 4096), "F16", True),
        ((128, 11008), "F16", False),  # left to llama.cpp, which may compute eight rows otherwise than one
        ((16, 4100), "F16", False),
        ((16, 64), "F32", False),
    ],
)
def test_an_adapter_is_computed_like_its_model_if_it_is_small(
    shape: tuple[int, int], kind: str, expected: bool
) -> None:
    status = Status("", few_rows=("F16", "Q4_0"), attention=True, few_attention=True)
    sizes = {"llama.embedding_length": 4096, "llama.attention.head_count": 32}

    def header(kind: str, shape: tuple[int, int]) -> Gguf:
        return Gguf(Path(), sizes, {"a": Tensor("a", shape, kind, 0, 0)})

    language = header("Q4_0", (4096, 4096))
    for eight_bits in (False, True):
        assert native.computes_all(status, language, None, eight_bits=eight_bits)
        assert native.computes_all(status, language, header(kind, shape), eight_bits=eight_bits) == expected


def test_an_adapter_is_small_where_the_kernel_says_so() -> None:
    """Python and C++ both state the limit. With different ones a larger adapter would pass for computed by us."""
    source = (build.SOURCES / "few.cpp").read_text("utf-8")
    ((base, shift),) = re.findall(r"MAX_F16_VALUES = (\d+) << (\d+);", source)
    assert int(base) << int(shift) == native.MAX_F16_VALUES
