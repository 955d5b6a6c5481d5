"""The thread in which llama.cpp computes on the processor, one for all models of this process.

OpenMP keeps a team of threads for each thread that computes, and libgomp lets none of them spin while there are more of
them than processors: with a thread for each of two models a token of either took up to four times as long. So models
take turns, call by call. And llama.cpp sets the AMX tile configuration once in each thread: whatever else uses AMX
there (PyTorch in bfloat16 does) changes or releases it, and llama.cpp's next product dies of SIGILL.
"""

from __future__ import annotations

import os
import threading
import weakref

from llava_edge.runtimes.jobs import Worker

_lock = threading.Lock()
# Nobody in a forked process would let it go, so a fork waits for it, and for the other locks that models share.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_last: weakref.ref[Worker] | None = None


def thread() -> Worker:
    """The one there is, while anybody has it; else a new one, as in a process that was forked."""
    global _last
    with _lock:
        found = _last() if _last else None
        if found is None or not found.alive:
            found = Worker("llama.cpp")
            _last = weakref.ref(found)
        return found
