"""A picture in fewer positions: (T, D) of CLIP's features -> (N, D) for the projector and the language model.

    cls     Most of the N are the features that CLIP's class token looks at most; the rest, a sixth of N, are means of
            features that look alike, so that nothing is dropped without a trace. Both ideas are those of VisionZip
            (arXiv 2412.04467), the first also FasterVLM's (2412.01818). Differently from VisionZip, likeness is that
            of the features, a mean counts every member once, and all stand in the order of the picture (the language
            model numbers its positions), a mean where the member stands that it was gathered around.
    pool    The mean of each field of an even grid over the picture; N must be a square. The baseline without a choice.
    random  N of them, by lot. The baseline that a choice has to beat.

Knows nothing about crops, engines or bundles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llava_edge.errors import UsageError
from llava_edge.options import TokenMethod

Array = np.ndarray[Any, Any]

MERGED_SHARE = 6  # one position in so many is a mean; VisionZip's settings for 64, 128 and 192 have 1 in 6.4


def reduce(features: Array, attention: Array, count: int, method: TokenMethod = "cls", seed: int = 0) -> Array:
    """(T, D) and (T,) float32 -> (count, D) float32; 1 <= count <= T. `seed` is of the lot.

    Raises `UsageError` where there is no grid to pool.
    """
    if method == "pool":
        return _pool(features, count)
    if method == "random":
        chosen = np.random.default_rng(seed).choice(len(features), count, replace=False)
        return np.asarray(features[np.sort(chosen)])
    return _merge(features, attention, count)


def _merge(features: Array, attention: Array, count: int) -> Array:
    """The features that are looked at most, and means of the others."""
    means = min(count // MERGED_SHARE, len(features) - count)
    ranked = np.argsort(-attention, kind="stable")
    kept, rest = np.sort(ranked[: count - means]), np.sort(ranked[count - means :])
    centres = rest[np.arange(means) * len(rest) // max(means, 1)]  # evenly spread over what is left of the picture
    chosen = np.concatenate([kept, centres])
    values = np.concatenate([features[kept], _means(features, rest, centres)])
    return np.asarray(values[np.argsort(chosen)])


def _means(features: Array, rest: Array, centres: Array) -> Array:
    """(means, D): each of `rest` counts for the centre whose direction is most like its own, a centre for itself."""
    if not len(centres):
        return features[:0]
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))
    nearest = (directions[rest] @ directions[centres].T).argmax(axis=1)
    nearest[np.searchsorted(rest, centres)] = np.arange(len(centres))
    members = (nearest == np.arange(len(centres))[:, None]).astype(np.float32)
    return np.asarray(members @ features[rest] / members.sum(axis=1, keepdims=True))


def _pool(features: Array, count: int) -> Array:
    """Means over the fields of a coarser grid; a patch on a border counts for both, as much as lies in each."""
    side, fields = math.isqrt(len(features)), math.isqrt(count)
    if side**2 != len(features) or fields**2 != count:
        raise UsageError(f"Pooling makes a square of a square, not {count} positions of {len(features)}; use 'cls'.")
    edges = np.arange(fields + 1) * side / fields
    patches = np.arange(side)
    overlap = np.minimum(edges[1:, None], patches + 1) - np.maximum(edges[:-1, None], patches)
    weights = (np.maximum(overlap, 0) * fields / side).astype(np.float32)  # (fields, side); rows sum to 1
    grid = features.reshape(side, side, -1)
    return np.asarray(np.einsum("ai,bj,ijd->abd", weights, weights, grid, optimize=True).reshape(count, -1))
