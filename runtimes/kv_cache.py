"""The KV cache of a llama.cpp context, with what each of its positions holds.

So a prompt that begins like the last one is not computed again. Sequence 0 is that of prompts; others share its first
positions: one for each branch, one for what ended branches leave behind, and one that `save_state` copies to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.errors import BundleError

Array = np.ndarray[Any, Any]
Key = int | tuple[str, int]  # what a position holds: a token id, or (hash of an image, row of its embeddings)

MAX_BRANCHES = 8  # as many rows as `speculation.WIDTHS` allows: more gain little, and answers wait for each other
PROMPT = 0  # the sequence of prompts


def branch_limit(context: int, batch: int) -> int:
    """Return how many branches fit beside the other three sequences. llama.cpp aborts if they do not."""
    return max(0, min(MAX_BRANCHES, context - 3, batch - 3))


def sequence_limit(context: int, batch: int) -> int:
    """Return for how many sequences to create a context, so that all of them fit."""
    return min(3 + branch_limit(context, batch), context)


class KvCache:
    """The KV cache of `context`, which belongs to the model in `path`.

    cached_keys: what its positions hold. max_branches: how many continuations may share them at a time.
    """

    def __init__(self, library: Any, context: Any, max_branches: int, path: Path) -> None:
        self.library = library
        self.context = context
        self.cached_keys: list[Key] = []
        self.max_branches = max_branches
        self._path = path
        self._memory = library.llama_get_memory(context)
        self._copy, self._ended = 1 + max_branches, 2 + max_branches
        self._has_branches = False

    def common_prefix(self, keys: Sequence[Key]) -> int:
        """Return the length of the common prefix of the KV cache and `keys`, always below `len(keys)`."""
        length = 0
        while length < min(len(self.cached_keys), len(keys) - 1) and self.cached_keys[length] == keys[length]:
            length += 1
        return length

    def keep_common_prefix(self, keys: Sequence[Key]) -> int:
        """Remove everything else from the KV cache; return the length of that prefix."""
        length = self.common_prefix(keys)
        self.truncate(length)
        return length

    def truncate(self, length: int) -> None:
        """Remove every position from `length` on, including what llama.cpp left there after an abort.

        If llama.cpp cannot, the KV cache is emptied: `BundleError` if that ends branches or loses the first positions.
        """
        del self.cached_keys[length:]
        if not self.library.llama_memory_seq_rm(self._memory, PROMPT, length, -1):
            self._clear()
            if length or self._has_branches:
                raise BundleError(f"llama.cpp cannot remove the last positions from the KV cache of {self._path}.")

    def save_state(self, count: int, max_bytes: float = inf) -> memoryview | None:
        """Return the first `count` positions of the KV cache in llama.cpp's format; None if larger than `max_bytes`.

        Raises `MemoryError`.
        """
        api, copy = self.library, self._copy
        api.llama_memory_seq_cp(self._memory, PROMPT, copy, 0, count)
        try:
            size = api.llama_state_seq_get_size(self.context, copy)
            if size > max_bytes:
                return None
            state = np.empty(size, np.uint8)
            written = api.llama_state_seq_get_data(self.context, _byte_pointer(state), size, copy)
            return state[:written].data
        finally:
            api.llama_memory_seq_rm(self._memory, copy, -1, -1)

    def restore_state(self, state: bytes | memoryview, keys: Sequence[Key]) -> bool:
        """Load what `save_state` returned when the KV cache held `keys`; return whether that succeeded.

        llama.cpp trusts these bytes: only what this program wrote may be passed. A failure leaves an empty KV cache,
        because llama.cpp leaves parts of the state behind: `BundleError` if that ends branches.
        """
        self.truncate(0)
        source = _byte_pointer(np.frombuffer(state, np.uint8))
        read = self.library.llama_state_seq_set_data(self.context, source, len(state), PROMPT)
        first = self.library.llama_memory_seq_pos_min(self._memory, PROMPT)
        last = self.library.llama_memory_seq_pos_max(self._memory, PROMPT)
        if (read, first, last) == (len(state), 0, len(keys) - 1):
            self.cached_keys = list(keys)
            return True
        self._clear()
        if self._has_branches:
            raise BundleError(f"llama.cpp refused a saved state of {self._path}; run 'llava-edge cache clear'.")
        return False

    def start_branch(self, branch: int) -> None:
        """Let a sequence share all positions of the KV cache. For `Branches`, as are the next two."""
        self._has_branches = True
        self.library.llama_memory_seq_cp(self._memory, PROMPT, branch, -1, -1)

    def end_branch(self, branch: int, shared: int) -> None:
        """Empty a sequence. From `shared` on its positions stay in their places, unseen, until `clear_branches`."""
        self.library.llama_memory_seq_cp(self._memory, branch, self._ended, shared, -1)
        self.library.llama_memory_seq_rm(self._memory, branch, -1, -1)

    def clear_branches(self) -> None:
        """Remove all positions that only branches have."""
        self._has_branches = False
        for sequence in range(1, 1 + self._ended):
            self.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def _clear(self) -> None:
        """Empty the KV cache, its data too: a masked key has weight zero, and zero times NaN is NaN."""
        self.library.llama_memory_clear(self._memory, True)
        self.cached_keys.clear()


def _byte_pointer(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
