"""What C code writes to standard error: llama.cpp says there what is wrong with a grammar, and repeats all of it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

LONGEST = 1 << 16  # bytes that are looked at

_lock = threading.Lock()  # the stream belongs to the whole process
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
T = TypeVar("T")


def overhear(call: Callable[[], T]) -> tuple[T, str]:
    """What a short call returns, and what was written to standard error meanwhile, by other threads, too."""
    with _lock, ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:  # no standard error, or no place for a file: then it goes where it would
            return call(), ""
        os.dup2(file.fileno(), 2)
        try:
            result = call()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return result, file.read(LONGEST).decode("utf-8", "replace")


def repeat(said: str) -> None:
    """Write it where it was meant to go."""
    with suppress(OSError):
        os.write(2, said.encode())
