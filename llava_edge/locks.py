"""Locks that survive a fork."""

from __future__ import annotations

import os
import threading


def fork_safe_lock() -> threading.Lock:
    """Return a lock that forks wait for: a forked process could never release one that another thread held.

    A fork acquires these locks in reverse order of their creation. So while one is held, only locks created before it
    may be acquired.
    """
    lock = threading.Lock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
