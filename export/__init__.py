"""Checkpoint -> bundle: the stage between the trainer (models/) and the runtime (runtimes/).

torch is needed only for `pytorch_model.bin`, the parity table, importance matrices and conversations.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]  # gets the name of a stage and the share of it that is done, if known
