"""Fewer tokens per image: (T, D) of CLIP's features -> (N, D) for the projector and the language model.

    cls     Most of the N are the features with the highest attention of CLIP's class token; a sixth are means of
            similar features among the others, so that none is dropped entirely. Both ideas are from VisionZip
            (arXiv 2412.04467), the first also from FasterVLM (2412.01818). Unlike in VisionZip, similarity is measured
            on the features, every member counts once in its mean, and all keep the order of the picture (the language
            model numbers its positions), a mean at the position of its centre.
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

MERGE_RATIO = 6  # one position in 6 is a mean; VisionZip's settings for 64, 128 and 192 tokens have 1 in 6.4


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
    """The features with the highest attention, and means of the others."""
    mean_count = min(count // MERGE_RATIO, len(features) - count)
    ranked = np.argsort(-attention, kind="stable")
    kept, others = np.sort(ranked[: count - mean_count]), np.sort(ranked[count - mean_count :])
    centres = others[np.arange(mean_count) * len(others) // max(mean_count, 1)]  # evenly spread over the others
    chosen = np.concatenate([kept, centres])
    values = np.concatenate([features[kept], _cluster_means(features, others, centres)])
    return np.asarray(values[np.argsort(chosen)])


def _cluster_means(features: Array, others: Array, centres: Array) -> Array:
    """Means (centres, D) of `others`, each assigned to the centre of highest cosine similarity, a centre to itself."""
    if not len(centres):
        return features[:0]
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))
    nearest = (directions[others] @ directions[centres].T).argmax(axis=1)
    nearest[np.searchsorted(others, centres)] = np.arange(len(centres))
    membership = (nearest == np.arange(len(centres))[:, None]).astype(np.float32)
    return np.asarray(membership @ features[others] / membership.sum(axis=1, keepdims=True))


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
