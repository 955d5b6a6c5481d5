"""bundle -> answer: the only home of onnxruntime and llama.cpp. Knows nothing about HTTP, terminals or training."""

from __future__ import annotations

import os


class CancelledError(Exception):
    """Work was stopped because its caller asked for that; never leaves this package."""


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait, unless the environment says how they should.

    libgomp reads this once, when the first library that needs it is loaded: PyTorch or llama.cpp, which then share it.
    Its default, 300,000 rounds, lets threads spin for milliseconds at each of a thousand barriers per token; beside
    other busy processes an answer then took ten times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
