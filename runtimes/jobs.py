"""One thread that owns the engines: callers queue up, each reads its own stream and can stop its own job.

Also the threads that it hands parts of its work to. Knows nothing about what the jobs do.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llava_edge.errors import UsageError
from llava_edge.options import Chunk
from llava_edge.runtimes import CancelledError

Stream = Generator[Chunk, None, None]
Last = Callable[[], Chunk]
Tasks = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
T = TypeVar("T")

CLOSED = "The engine is closed; load another one."
FORKED = "The engine is not in this process, which was forked from its own; load one here."
POLL_SECONDS = 0.05  # how often a waiting caller looks whether it was cancelled
PAUSE_SECONDS = 1.0  # without a job: longer than programs take from one question to the next


class _Cancel(threading.Event):
    """Set by whoever leaves a stream, and as soon as the caller's own event is, which is only read."""

    def __init__(self, callers: threading.Event) -> None:
        super().__init__()
        self._callers = callers

    def is_set(self) -> bool:
        return super().is_set() or self._callers.is_set()


class _Turn:
    """Whether the owner has begun with a job, or with several that are done together. Only one side can be first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_by = ""

    def begin(self) -> bool:
        """By the owner; False if it was dropped."""
        return self._take("owner")

    def drop(self) -> bool:
        """By whoever waits; False if it has begun."""
        return self._take("caller")

    def _take(self, side: str) -> bool:
        with self._lock:
            self._taken_by = self._taken_by or side
            return self._taken_by == side


@dataclass
class Job:
    """One request: what the owner thread runs, and where it puts what comes out. None ends the stream.

    served: whether the owner's thread lives, which it does not in a process that was forked.
    dropped: makes the only chunk of a job that is cancelled while it waits for its turn; None: it waits all the same.
    others: jobs that this one does too; whatever ends it ends them.
    """

    run: Callable[[Job], None]
    cancel: threading.Event
    served: Callable[[], bool]
    dropped: Last | None = None
    turn: _Turn = field(default_factory=_Turn)
    output: queue.SimpleQueue[Chunk | BaseException | None] = field(default_factory=queue.SimpleQueue)
    others: list[Job] = field(default_factory=list)
    vision_run: Any = None  # of VisionEncoder.new_run, while pictures are encoded

    def stop(self) -> None:
        """Ask the owner thread to leave this job, from any thread."""
        self.cancel.set()
        if self.vision_run is not None:
            self.vision_run.terminate = True

    def next(self) -> Chunk | BaseException | None:
        """Wait for what comes out."""
        while True:
            try:
                return self.output.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self.served() and self.output.empty():
                    raise UsageError(FORKED) from None
                if not self.cancel.is_set():
                    continue
                if self.dropped is not None and self.turn.drop():
                    self.output.put(None)
                    return self.dropped()
                self.stop()


class _Reader(Stream):
    """The stream of a job, which `start` queues. Left before its last chunk or end, even unread, it cancels the job."""

    def __init__(self, job: Job, start: Callable[[], None] | None = None) -> None:
        self._job = job
        self._start = start
        self._ended = self._whole = False

    def send(self, value: None) -> Chunk:
        if self._ended:
            raise StopIteration
        try:
            if self._start is not None:
                start, self._start = self._start, None
                start()
            item = self._job.next()
            if isinstance(item, BaseException):
                raise item
        except BaseException:
            self.close()
            raise
        if item is None:
            self._whole = True
            self.close()
            raise StopIteration
        self._whole = item.final is not None
        return item

    def throw(self, *error: Any) -> Chunk:
        self.close()
        return super().throw(*error)  # raises it

    def close(self) -> None:
        self._ended = True
        if not self._whole:
            self._job.turn.drop()
            self._job.stop()
        self._job.output.put(None)  # for whoever else waits for this stream, and then takes it for whole

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A stream can be neither copied nor sent to another process.")

    def __del__(self) -> None:
        self.close()


class Owner:
    """The thread. `pause` runs in it when nobody has asked for a while, `last` when it ends.

    It holds no job that is done: what jobs refer to, an engine that nobody uses any more, can be collected.
    """

    def __init__(self, last: Callable[[], object]) -> None:
        self.pause: Callable[[], None] = lambda: None
        self._last = last
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # what closes it can be a collection, anywhere in its thread
        self._closed = False
        self._at_work: Job | None = None
        self._thread = threading.Thread(target=self._serve, name="llava-edge engine", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[Job], None], cancel: threading.Event, dropped: Last | None = None) -> Stream:
        """A job's chunks; it is queued with the first one that is asked for. Raises what the job raises.

        Leaving early, by Ctrl-C too, cancels it.
        """
        job = Job(run, _Cancel(cancel), self._thread.is_alive, dropped)
        return _Reader(job, lambda: self._queue(job))

    def begin(self, run: Callable[[Job], None]) -> Stream:
        """As `submit`, but queued now."""
        job = Job(run, threading.Event(), self._thread.is_alive)
        self._queue(job)
        return _Reader(job)

    def do(self, run: Callable[[Job], None]) -> None:
        """Run it in the thread, and wait for its end. Raises what it raises."""
        for _ in self.submit(run, threading.Event()):
            pass

    def submit_together(
        self, run: Callable[[list[Job]], None], cancel: threading.Event, count: int, dropped: Last
    ) -> list[Stream]:
        """Queue one job that fills `count` streams. Leaving one before its last chunk cancels all."""
        own, turn = _Cancel(cancel), _Turn()
        alive = self._thread.is_alive
        jobs = [Job(lambda job: run([job, *job.others]), own, alive, dropped, turn) for _ in range(count)]
        jobs[0].others += jobs[1:]
        self._queue(jobs[0])
        return [_Reader(job) for job in jobs]

    def close(self, *, wait: bool = True) -> None:
        """Cancel the job in work, refuse those that wait, and end the thread. Harmless when repeated."""
        if not self._thread.is_alive():  # in a forked process somebody may have the lock for ever
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            if self._at_work is not None:
                self._at_work.stop()
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def close_at_exit(self) -> None:
        """Have Python wait for the thread when it ends, which would abort while engines are being freed."""
        atexit.register(self.close)

    def _queue(self, job: Job) -> None:
        if not self._thread.is_alive():
            raise UsageError(CLOSED if self._closed else FORKED)
        with self._lock:
            if self._closed:
                raise UsageError(CLOSED)
            self._jobs.put(job)

    def _next(self) -> Job | None:
        """Wait for it; when that takes long, do once what was put off for those who ask."""
        try:
            return self._jobs.get(timeout=PAUSE_SECONDS)
        except queue.Empty:
            self.pause()
            return self._jobs.get()

    def _serve(self) -> None:
        while self._serve_one():
            pass
        self._last()
        atexit.unregister(self.close)  # or it would keep what `pause` refers to: the parts of an engine, and its cache

    def _serve_one(self) -> bool:
        """Whether there may be another one."""
        job = self._next()
        if job is None or not job.turn.begin():
            return job is not None
        end: BaseException | None = None
        with self._lock:
            self._at_work = job
            if self._closed:
                end = UsageError(CLOSED)
        try:
            if end is None:
                job.run(job)
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            end = error
        with self._lock:
            self._at_work = None
        for one in (job, *job.others):
            one.output.put(end)
        return True


def outcome(future: Future[T], cancel: threading.Event) -> T:
    """Wait for it. Raises `CancelledError` if `cancel` is set before its turn has come."""
    try:
        while not wait([future], POLL_SECONDS).done:
            if cancel.is_set() and future.cancel():
                raise CancelledError
        return future.result()
    except BaseException:
        future.cancel()
        raise


class Worker:
    """A thread that does one thing after the other until `shutdown`, which Python's end and nobody's use of it do, too.

    One of concurrent.futures takes no more work once the main thread has ended, when others may still read answers.
    """

    def __init__(self, name: str) -> None:
        self._tasks: Tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
        self._thread.start()
        self._finish = weakref.finalize(self, _finish, self._tasks, self._thread)

    @property
    def alive(self) -> bool:
        """Whether it takes work: not after `shutdown`, and not in a process that was forked."""
        return self._finish.alive and self._thread.is_alive()

    def submit(self, run: Callable[..., T], *args: Any) -> Future[T]:
        """Have it done after what was submitted before. Raises RuntimeError after `shutdown`."""
        if not self._finish.alive:
            raise RuntimeError("the thread has ended")
        future: Future[T] = Future()
        self._tasks.put((future, run, args))
        return future

    def shutdown(self) -> None:
        """End it after what was submitted. Harmless when repeated."""
        self._finish()


def _work(tasks: Tasks) -> None:
    """Holds neither the `Worker` nor what was done, so that they can be collected."""
    while (task := tasks.get()) is not None:
        future, run, args = task
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(run(*args))
        except BaseException as error:  # noqa: BLE001 - who waits for the future gets it
            future.set_exception(error)
        del task, future, run, args


def _finish(tasks: Tasks, thread: threading.Thread) -> None:
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join()
