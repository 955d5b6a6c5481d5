"""Starting a thread; one that runs tasks one after the other, and waiting for one of them."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from llava_edge.errors import NO_THREAD, PYTHONS_NO_THREAD, MemoryLimitError
from llava_edge.runtimes import CancelledError

Tasks = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
T = TypeVar("T")

POLL_SECONDS = 0.05  # how often a waiting caller checks for cancellation


def wait_result(future: Future[T], cancel: threading.Event) -> T:
    """Wait for a future. Raises `CancelledError` if `cancel` is set before the worker thread has started on it.

    After any error but Ctrl-C the task has ended, or will not begin.
    """
    try:
        while not wait([future], POLL_SECONDS).done:
            if cancel.is_set() and future.cancel():
                raise CancelledError
        return future.result()
    except BaseException as error:
        if not future.cancel() and isinstance(error, Exception):  # too little memory to wait
            wait([future])
        raise


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises `MemoryLimitError` where no more threads can be started."""
    try:
        thread.start()
    except RuntimeError as error:
        if str(error) == PYTHONS_NO_THREAD:
            raise MemoryLimitError(NO_THREAD) from error
        raise


class Worker:
    """A thread that runs one task after the other until `shutdown`, or until it is garbage-collected or Python exits.

    A ThreadPoolExecutor would refuse tasks once the main thread has ended, when others may still read answers.
    Raises `MemoryLimitError` where no more threads can be started.
    """

    def __init__(self, name: str) -> None:
        self._tasks: Tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run_tasks, args=(self._tasks,), name=name, daemon=True)
        self._finish = weakref.finalize(self, _finish, self._tasks, self._thread)
        try:
            start_thread(self._thread)
        except BaseException:
            self._finish()  # Ctrl-C may have come when the thread was started
            raise

    @property
    def alive(self) -> bool:
        """Whether it accepts tasks: not after `shutdown`, and not in a forked process."""
        return self._finish.alive and self._thread.is_alive()

    def submit(self, run: Callable[..., T], *args: Any) -> Future[T]:
        """Queue a call. Raises RuntimeError after `shutdown`."""
        if not self._finish.alive:
            raise RuntimeError("the thread has ended")
        future: Future[T] = Future()
        self._tasks.put((future, run, args))
        return future

    def shutdown(self) -> None:
        """End the thread after all queued tasks. Harmless when repeated."""
        self._finish()


def _run_tasks(tasks: Tasks) -> None:
    """Keep no reference to the `Worker` or to finished tasks, so that they can be garbage-collected."""
    while (task := tasks.get()) is not None:
        future, run, args = task
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(run(*args))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
            future.set_exception(error)
        del task, future, run, args


def _finish(tasks: Tasks, thread: threading.Thread) -> None:
    tasks.put(None)
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()
