"""Parallel continuations of prompts in one KV cache, evaluated in one batch, so that weights are read once for all.

With the native kernels each continuation is bit-identical to one evaluated alone, for which the positions of a prompt
have to be in order in the KV cache: so what was evaluated stays there until the end, also after its branch ended.
llama.cpp's own kernels may compute a row of a batch differently from a single row, in the last digits. Knows nothing
about prompts or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_edge.runtimes.language import LanguageModel


class Branches:
    """Up to the model's `max_branches` at a time. Until this is closed, nothing else may empty its KV cache."""

    def __init__(self, language: LanguageModel) -> None:
        self._language = language
        self._lengths: dict[int, int] = {}  # number of a branch -> its positions
        self._shared: dict[int, int] = {}  # of these, the first ones, which another branch will keep

    def start(self, shared: int) -> int:
        """Begin a branch that continues what the KV cache holds now; return its number.

        shared: how many of its first positions were there when the last branch began. Raises `ValueError` if
        `max_branches` have not ended.
        """
        free = [number for number in range(1, 1 + self._language.max_branches) if number not in self._lengths]
        if not free:
            raise ValueError(f"No more than {self._language.max_branches} branches are possible.")
        self._language.start_branch(free[0])
        self._lengths[free[0]], self._shared[free[0]] = len(self._language.cached_keys), shared
        return free[0]

    def step(self, tokens: Sequence[int], branches: Sequence[int]) -> None:
        """Append one token to each of `branches`; row i of the logits is then that of `branches[i]`."""
        positions = [self._lengths[branch] for branch in branches]
        for branch in branches:
            self._lengths[branch] += 1
        self._language.evaluate_branches(tokens, positions, branches)

    def end(self, branch: int) -> None:
        """End a branch, so that its number can be used again."""
        self._language.end_branch(branch, self._shared.pop(branch))
        del self._lengths[branch]

    def keep_prompt(self) -> None:
        """Let what the KV cache holds now stay in its place, like an ended branch."""
        self.end(self.start(0))

    def close(self) -> None:
        """Leave the KV cache to its own prompt."""
        self._language.clear_branches()
