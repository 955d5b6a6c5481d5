"""Fewer tokens per image: (T, D) of CLIP's features -> (N, D) for the projector and the language model.

    cls     N features that CLIP's class token attends to and that differ from each other; each becomes the mean of
            itself and the others that resemble it most, so that none is dropped entirely. The choice is CDPruner's
            (arXiv 2506.10967) with that attention as relevance, because a question is not known yet: the most likely
            set of a determinantal point process, found greedily. Attention alone (FasterVLM, 2412.01818) chooses
            neighbours that show the same. Merging is ToMe's idea (2210.09461). All keep the order of the picture,
            because the language model numbers its positions.
    pool    The mean of each cell of an even grid over the picture; N must be a square. A baseline without selection.
    random  N features chosen at random. The baseline that a selection has to beat.

Knows nothing about crops, engines or bundles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import TokenMethod

Array = np.ndarray[Any, Any]

SPANNED = 1e-3  # squared length below which the rest of a direction counts as spanned: attention alone decides


def reduce_features(features: Array, attention: Array, count: int, method: TokenMethod = "cls", seed: int = 0) -> Array:
    """Reduce features (T, D) with attention (T,), float32, to (count, D) float32; 1 <= count <= T. seed: for "random".

    Raises `UsageError` where there is no grid to pool.
    """
    if method == "pool":
        return _pool(features, count)
    if method == "random":
        chosen = np.random.default_rng(seed).choice(len(features), count, replace=False)
        return np.asarray(features[np.sort(chosen)])
    return _select_and_merge(features, attention, count)


def _select_and_merge(features: Array, attention: Array, count: int) -> Array:
    """Means (count, D) of the chosen features and those most similar to each."""
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))
    similarity = directions @ directions.T
    chosen = np.sort(_choose(similarity, attention, count))
    nearest = similarity[:, chosen].argmax(axis=1)
    nearest[chosen] = np.arange(count)
    membership = (nearest == np.arange(count)[:, None]).astype(np.float32)
    return np.asarray(membership @ features / membership.sum(axis=1, keepdims=True))


def _choose(similarity: Array, attention: Array, count: int) -> list[int]:
    """Choose `count` places, each time the one with the most attention times the squared length of the part of its
    direction that those chosen before do not span. This is greedy maximization of the determinant of
    sqrt(attention_i attention_j) * similarity_ij over the chosen places (Chen et al., arXiv 1709.05135).

    similarity: cosines (T, T) float32; attention: (T,) float32.
    """
    unspanned = np.diagonal(similarity).copy()
    basis = np.zeros((count, len(similarity)), np.float32)  # of the span: its components in each direction
    rank = 0
    chosen: list[int] = []
    for _ in range(count):
        scores = attention * np.maximum(unspanned, SPANNED)
        scores[chosen] = -1
        place = int(scores.argmax())
        chosen.append(place)
        if unspanned[place] > SPANNED:  # else it would be rounding errors that are scaled up
            rest = similarity[place] - basis[:rank, place] @ basis[:rank]
            basis[rank] = rest / np.sqrt(unspanned[place])
            unspanned -= basis[rank] ** 2
            rank += 1
    return chosen


def _pool(features: Array, count: int) -> Array:
    """Means over the cells of a coarser grid; a patch on a border counts for both, by its overlap."""
    side, pooled_side = math.isqrt(len(features)), math.isqrt(count)
    if side**2 != len(features) or pooled_side**2 != count:
        raise UsageError(f"Pooling needs square grids, not {len(features)} to {count} tokens; use 'cls'.")
    edges = np.arange(pooled_side + 1) * side / pooled_side
    patches = np.arange(side)
    overlap = np.minimum(edges[1:, None], patches + 1) - np.maximum(edges[:-1, None], patches)
    weights = (np.maximum(overlap, 0) * pooled_side / side).astype(np.float32)  # (pooled_side, side); rows sum to 1
    grid = features.reshape(side, side, -1)
    return np.asarray(np.einsum("ai,bj,ijd->abd", weights, weights, grid, optimize=True).reshape(count, -1))
