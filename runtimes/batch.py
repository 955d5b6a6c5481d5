"""A llama_batch, the input of one llama_decode call, with its arrays as numpy views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Batch:
    """Up to `size` positions.

    values: int32 token ids (size,), or float32 embeddings (size, width) when width is not 0.
    """

    def __init__(self, api: Any, size: int, width: int) -> None:
        self._api = api
        self.handle = api.llama_batch_init(size, width, 1)
        values, shape = (self.handle.embd, (size, width)) if width else (self.handle.token, (size,))
        self.values: Array = np.ctypeslib.as_array(values, shape)
        self._positions = np.ctypeslib.as_array(self.handle.pos, (size,))
        self._outputs = np.ctypeslib.as_array(self.handle.logits, (size,))
        for i in range(size):
            self.handle.n_seq_id[i] = 1

    def place(self, positions: Sequence[int], outputs: int, sequences: Sequence[int]) -> None:
        """Put the first values at `positions` of `sequences`; logits are computed of the last `outputs`."""
        count = len(positions)
        self.handle.n_tokens = count
        self._positions[:count] = positions
        self._outputs[:count] = 0
        self._outputs[count - outputs : count] = 1
        for i, sequence in enumerate(sequences):
            self.handle.seq_id[i][0] = sequence

    def free(self) -> None:
        """Free the arrays; call it only once."""
        self._api.llama_batch_free(self.handle)
