"""The engine thread and its job queue: each caller reads the stream of its own job, and can cancel that job alone.

Knows nothing about what the jobs do.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.options import Chunk
from llava_edge.runtimes.worker import POLL_SECONDS, start_thread

Stream = Generator[Chunk, None, None]
MakeChunk = Callable[[], Chunk]

CLOSED = "The engine is closed; load another one."
FORKED = "The engine was loaded before this process was forked and cannot be used in it; load one here."
IDLE_SECONDS = 1.0  # without a job until `on_idle`: longer than programs take from one question to the next


class _Cancel(threading.Event):
    """Set when a stream is closed early, or as soon as the caller's own event is, which is only read.

    Without a lock: while one stream of a job sets it, garbage collection may close another one in the same thread.
    """

    def __init__(self, caller_event: threading.Event) -> None:
        super().__init__()
        self._caller_event = caller_event
        self._stopped = False

    def set(self) -> None:
        self._stopped = True

    def is_set(self) -> bool:
        return self._stopped or self._caller_event.is_set()


class _Claim:
    """Decides atomically what becomes of a queued job, or several that run as one: whoever is first.

    All methods may be repeated.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a garbage collection may withdraw what is being withdrawn
        self._claimed_by = ""

    @property
    def withdrawn(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._claimed_by == "caller"

    def start(self) -> bool:
        """Claim it for the engine thread; False if it was withdrawn or refused."""
        return self._claim("engine")

    def withdraw(self) -> bool:
        """Claim it for the caller; False if it was started or refused."""
        return self._claim("caller")

    def refuse(self) -> bool:
        """Claim it for whoever closes the engine; False if it was started or withdrawn."""
        return self._claim("closing")

    def _claim(self, side: str) -> bool:
        with self._lock:
            self._claimed_by = self._claimed_by or side
            return self._claimed_by == side


@dataclass
class Job:
    """One request: the function that the engine thread runs, and the queue of its output. None ends the stream.

    thread_alive: whether the engine thread lives, which it does not in a forked process.
    join: what the function of another job needs to do this one's work too, see `EngineThread.take`; None: nobody may.
    cancelled_chunk: makes the only chunk of a job that is cancelled while queued; None: such a job still waits.
    followers: jobs whose streams this one fills too; what ends it ends them.
    """

    run: Callable[[Job], None]
    cancel: threading.Event
    thread_alive: Callable[[], bool]
    cancelled_chunk: MakeChunk | None = None
    join: Callable[[Job], Any] | None = None
    claim: _Claim = field(default_factory=_Claim)
    output: queue.SimpleQueue[Chunk | BaseException | None] = field(default_factory=queue.SimpleQueue)
    followers: list[Job] = field(default_factory=list)
    abort: Callable[[], object] = lambda: None  # stops work that does not look at `cancel`
    ended: bool = False

    def end(self, error: BaseException | None = None) -> None:
        """End the stream, with an error if there is one. Harmless when repeated."""
        if not self.ended:
            self.ended = True
            self.output.put(error)

    def stop(self) -> None:
        """Ask the engine thread, from any thread, to abort this job."""
        self.cancel.set()
        self.abort()

    def next(self) -> Chunk | BaseException | None:
        """Wait for the next output."""
        while True:
            try:
                return self.output.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self.thread_alive() and self.output.empty():
                    raise UsageError(FORKED) from None
                if not self.cancel.is_set():
                    continue
                if self.cancelled_chunk is not None and self.claim.withdraw():
                    self.output.put(None)
                    return self.cancelled_chunk()
                self.stop()


class _JobStream(Stream):
    """The stream of a job, which `start` queues. Closing it before its last chunk, even unread, cancels the job."""

    def __init__(self, job: Job, start: Callable[[], None] | None = None) -> None:
        self._job = job
        self._start = start
        self._closed = self._complete = False

    def send(self, value: None) -> Chunk:
        if self._closed:
            raise StopIteration
        try:
            if self._start is not None:
                start, self._start = self._start, None
                start()
            item = self._job.next()
            self._complete = item is None or isinstance(item, BaseException) or item.final is not None
            if isinstance(item, StopIteration):  # it would be taken for the end of the stream
                raise RuntimeError("A function raised StopIteration.") from item
            if isinstance(item, BaseException):
                raise item
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close()
            raise StopIteration
        return item

    def throw(self, *error: Any) -> Chunk:
        self.close()
        return super().throw(*error)  # raises it

    def close(self) -> None:
        self._closed = True
        if not self._complete:
            self._job.claim.withdraw()
            self._job.stop()
        self._job.output.put(None)  # wakes other readers of this stream, for whom it then ends

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A stream can be neither copied nor sent to another process.")

    def __del__(self) -> None:
        self.close()


class EngineThread:
    """Runs jobs one after the other. `on_idle` runs in the thread after `IDLE_SECONDS` without a job, `on_exit` last.

    It keeps no reference to a finished job, so that what jobs refer to, an unused engine, can be garbage-collected.
    """

    def __init__(self, on_exit: Callable[[], object]) -> None:
        self.on_idle: Callable[[], None] = lambda: None
        self._on_exit = on_exit
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # re-entrant: a garbage collection in any place of this thread may call `close`
        self._closed = False
        self._running: list[Job] = []
        self._ahead: Job | None = None  # from the queue, where it was the first one
        self._thread = threading.Thread(target=self._run_jobs, name="llava-edge engine", daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            self._jobs.put(None)  # Ctrl-C may have come when the thread was started
            raise

    def submit(
        self,
        run: Callable[[Job], None],
        cancel: threading.Event,
        cancelled_chunk: MakeChunk | None = None,
        join: Callable[[Job], Any] | None = None,
    ) -> Stream:
        """Return the stream of a job, which is queued when its first chunk is requested. Raises what the job raises.

        Closing the stream early, by Ctrl-C too, cancels the job.
        """
        job = Job(run, _Cancel(cancel), self._thread.is_alive, cancelled_chunk, join)
        return _JobStream(job, lambda: self._enqueue(job))

    def start(self, run: Callable[[Job], None]) -> Stream:
        """Like `submit`, but queue the job now."""
        job = Job(run, threading.Event(), self._thread.is_alive)
        self._enqueue(job)
        return _JobStream(job)

    def run(self, run: Callable[[Job], None]) -> None:
        """Run a function in the thread and wait until it returns. Raises what it raises."""
        for _ in self.submit(run, threading.Event()):
            pass

    def submit_many(
        self, run: Callable[[list[Job]], None], cancel: threading.Event, count: int, cancelled_chunk: MakeChunk
    ) -> list[Stream]:
        """Queue one job that fills `count` streams. Closing one before its last chunk cancels all."""
        shared_cancel, claim = _Cancel(cancel), _Claim()
        alive = self._thread.is_alive
        jobs = [
            Job(lambda job: run([job, *job.followers]), shared_cancel, alive, cancelled_chunk, claim=claim)
            for _ in range(count)
        ]
        jobs[0].followers += jobs[1:]
        self._enqueue(jobs[0])
        return [_JobStream(job) for job in jobs]

    def close(self, *, wait: bool = True) -> None:
        """Cancel the running job, refuse the queued ones, and end the thread. Harmless when repeated."""
        if not self._thread.is_alive():  # in a forked process the lock may be held for ever
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            for job in self._running:
                if job.claim.refuse():  # taken by another job, but it still waits for room
                    job.end(UsageError(CLOSED))
                job.stop()
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def take(self) -> Job | None:
        """Return the next job if it may be joined, for the function of another one to do its work, too.

        Until that has started its claim, the caller may still withdraw it.
        """
        job = self._look_ahead()
        if job is None or job.join is None:
            return None
        with self._lock:
            if self._closed:  # `_run_next` refuses it
                return None
            self._ahead = None
            self._running = [running for running in self._running if not running.ended] + [job]
        return job

    def close_at_exit(self) -> None:
        """Let Python wait for the thread at exit: the process would abort if it ended while engines are being freed."""
        atexit.register(self.close)

    def _enqueue(self, job: Job) -> None:
        if not self._thread.is_alive():
            raise UsageError(CLOSED if self._closed else FORKED)
        with self._lock:
            if self._closed:
                raise UsageError(CLOSED)
            self._jobs.put(job)

    def _look_ahead(self) -> Job | None:
        """Return the next job, which stays the next one; None if there is none now."""
        while self._ahead is None or self._ahead.claim.withdrawn:
            self._ahead = None
            if self._jobs.empty():
                return None
            self._ahead = self._jobs.get()
            if self._ahead is None:  # for `_next`; nothing comes after it
                self._jobs.put(None)
                return None
        return self._ahead

    def _next(self) -> Job | None:
        """Wait for the next job, None at the end; call `on_idle` once if that takes long."""
        if self._ahead is not None:
            job, self._ahead = self._ahead, None
            return job
        try:
            return self._jobs.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            self.on_idle()
            return self._jobs.get()

    def _run_jobs(self) -> None:
        while self._run_next():
            pass
        self._on_exit()
        atexit.unregister(self.close)  # or it would keep what `on_idle` refers to: an engine's parts and its cache

    def _run_next(self) -> bool:
        """Run the next job; return whether there may be another one."""
        job = self._next()
        if job is None or not job.claim.start():
            return job is not None
        error: BaseException | None = None
        with self._lock:
            self._running = [job, *job.followers]
            if self._closed:
                error = UsageError(CLOSED)
        try:
            if error is None:
                job.run(job)
        except BaseException as raised:  # noqa: BLE001 - the callers get it
            error = raised
        with self._lock:
            finished, self._running = self._running, []
        for job in finished:
            job.end(error)
        return True
