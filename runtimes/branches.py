"""Parallel continuations of a shared prefix, evaluated in one batch, so that weights are read once for all.

With the native kernels each continuation is bit-identical to one evaluated alone. llama.cpp's own kernels may compute a
row of a batch differently from a single row, in the last digits. Knows nothing about prompts or sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from llava_edge.runtimes.language import LanguageModel


class Branches:
    """Branches 1 to `count`, at most `max_branches`, of the model's KV cache, which is as before when this is closed.

    Until then nothing else may change it. The prefix and all branches' own positions have to fit into the context.
    """

    def __init__(self, language: LanguageModel, count: int) -> None:
        if not 1 <= count <= language.max_branches:
            raise ValueError(f"{count} branches were asked for; 1 to {language.max_branches} are possible.")
        self._language = language
        self._lengths = [len(language.cached_keys)] * count
        language.copy_to_branches(count)

    def extend(self, branch: int, tokens: Sequence[int], cancel: threading.Event) -> None:
        """Append tokens to one branch; compute the logits of the last one. Raises `CancelledError`."""
        for start in range(0, len(tokens), self._language.batch):
            chunk = tokens[start : start + self._language.batch]
            self._append(chunk, [branch] * len(chunk), 1, cancel)

    def step(self, tokens: Sequence[int], branches: Sequence[int], cancel: threading.Event) -> None:
        """Append one token to each of `branches` in one batch; row i of the logits then belongs to `branches[i]`."""
        self._append(tokens, branches, len(tokens), cancel)

    def _append(self, tokens: Sequence[int], branches: Sequence[int], outputs: int, cancel: threading.Event) -> None:
        positions = []
        for branch in branches:
            positions.append(self._lengths[branch - 1])
            self._lengths[branch - 1] += 1
        self._language.evaluate_branches(tokens, positions, branches, outputs, cancel)

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *_: object) -> None:
        self._language.copy_to_branches(0)
