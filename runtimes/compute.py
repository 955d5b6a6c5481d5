"""The worker thread in which llama.cpp computes on the CPU, shared by all models of this process.

OpenMP keeps a thread team for each thread that computes, and libgomp lets none of them spin while there are more of
them than processors: with one compute thread per model, a token of either of two models took up to four times as long.
So models take turns, call by call. Also, llama.cpp configures AMX tiles once per thread: whatever else uses AMX in that
thread (PyTorch in bfloat16 does) changes or releases the configuration, and llama.cpp's next product dies of SIGILL.
"""

from __future__ import annotations

import weakref

from llava_edge.locks import fork_safe_lock
from llava_edge.runtimes.worker import Worker

_lock = fork_safe_lock()
_current: weakref.ref[Worker] | None = None


def shared_worker() -> Worker:
    """Return the current worker thread while a model uses it, otherwise (also in a forked process) a new one."""
    global _current
    with _lock:
        worker = _current() if _current else None
        if worker is None or not worker.alive:
            worker = Worker("llama.cpp")
            _current = weakref.ref(worker)
        return worker
