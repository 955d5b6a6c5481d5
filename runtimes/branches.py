"""Several continuations of what a language model holds, evaluated together: its weights are read once for all.

With the native kernels a continuation has the bits that it has alone. llama.cpp's own may compute a row of a batch
otherwise than a single one, so that the last digits differ. Knows nothing about prompts or sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from llava_edge.runtimes.language import LanguageModel


class Branches:
    """Branches 1 to `count`, at most `max_branches`, of the model's memory, which is as before when this is closed.

    Between, memory must not change. All branches' own positions have to fit behind it into the context.
    """

    def __init__(self, language: LanguageModel, count: int) -> None:
        if not 1 <= count <= language.max_branches:
            raise ValueError(f"{count} branches were asked for; 1 to {language.max_branches} are possible.")
        self._language = language
        self._lengths = [len(language.held)] * count
        language.branch(count)

    def extend(self, branch: int, tokens: Sequence[int], cancel: threading.Event) -> None:
        """Append tokens to one branch; the model's last logits are then those of the last. Raises `CancelledError`."""
        for start in range(0, len(tokens), self._language.batch):
            part = tokens[start : start + self._language.batch]
            self._append(part, [branch] * len(part), 1, cancel)

    def step(self, tokens: Sequence[int], branches: Sequence[int], cancel: threading.Event) -> None:
        """Append one token to each of `branches`, in one pass; row i of the logits is then that of the i-th."""
        self._append(tokens, branches, len(tokens), cancel)

    def _append(self, tokens: Sequence[int], branches: Sequence[int], wanted: int, cancel: threading.Event) -> None:
        positions = []
        for branch in branches:
            positions.append(self._lengths[branch - 1])
            self._lengths[branch - 1] += 1
        self._language.evaluate_at(tokens, positions, branches, wanted, cancel)

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *_: object) -> None:
        self._language.branch(0)
