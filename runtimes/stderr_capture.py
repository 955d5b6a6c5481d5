"""Capturing what C code writes to standard error: llama.cpp explains there what is wrong with a grammar."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

from llava_edge.locks import fork_safe_lock

MAX_CAPTURED = 1 << 16  # bytes

_lock = fork_safe_lock()  # the stream belongs to the whole process
T = TypeVar("T")


def capture_stderr(call: Callable[[], T]) -> tuple[T, str]:
    """Run a short call; return its result and what was written to standard error meanwhile, by any thread."""
    with _lock, ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            original = os.dup(2)
        except OSError:  # no standard error, or no room for a file: capture nothing
            return call(), ""
        os.dup2(file.fileno(), 2)
        try:
            result = call()
        finally:
            os.dup2(original, 2)
            os.close(original)
        file.seek(0)
        return result, file.read(MAX_CAPTURED).decode("utf-8", "replace")


def write_stderr(text: str) -> None:
    """Write captured text to standard error after all."""
    with suppress(OSError):
        os.write(2, text.encode())
