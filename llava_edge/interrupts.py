"""Ctrl-C and the signals that end a program: handled alike, and held back where they would do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that temporary files are removed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signals = [number for number, handler in handlers.items() if handler is not signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in signals:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, handlers[number])


@contextmanager
def held_back() -> Iterator[None]:
    """Handle signals at the end.

    For imports of C++ extensions: a KeyboardInterrupt in PyTorch's initialization aborts the process; in that of
    onnxruntime or onnx it becomes an ImportError without a cause.
    """
    if threading.current_thread() is not threading.main_thread():  # it handles none
        yield
        return
    caught: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda signum, frame: caught.append(signum))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum in caught:
            signal.raise_signal(signum)
