"""Runs bundles; the only package that uses onnxruntime and llama.cpp. Knows nothing about HTTP or training."""

from __future__ import annotations

import os


class CancelledError(Exception):
    """The caller cancelled the work. Never leaves this package."""


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep soon, unless the environment sets a policy.

    libgomp reads this once, when the first library that needs it is loaded: PyTorch or llama.cpp, which then share it.
    With its default, 300,000 rounds, threads spin for milliseconds at each of a thousand barriers per token; beside
    other busy processes an answer then took ten times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
