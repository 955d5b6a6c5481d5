"""Locks of threads, which survive a fork, and of files."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import IO, Any


def fork_safe_lock() -> threading.Lock:
    """Return a lock that forks wait for: a forked process could never release one that another thread held.

    A fork acquires these locks in reverse order of their creation. So while one is held, only locks created before it
    may be acquired.
    """
    lock = threading.Lock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


def lock_file(file: int | IO[Any], *, wait: bool) -> bool:
    """Whether the file is locked now, until it is closed; False on file systems without locks.

    Raises `BlockingIOError` if another process has the lock and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if isinstance(error, PermissionError) and not wait:  # a lock that another computer has on an SMB share
            raise BlockingIOError(error.errno, error.strerror) from error
        return False  # no locks here: ENOLCK, ENOSYS, ENOTSUP, EINVAL; file systems do not agree on one
    return True
