"""One thread that owns the engines: callers queue up, each reads its own stream and can stop its own job.

Knows nothing about what the jobs do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.options import Chunk

Stream = Generator[Chunk, None, None]

POLL_SECONDS = 0.05  # how often a waiting caller looks whether it was cancelled


@dataclass
class Job:
    """One request: what the owner thread runs, and where it puts what comes out. None ends the stream.

    others: jobs that this one does too; whatever ends it ends them.
    """

    run: Callable[[Job], None]
    cancel: threading.Event
    output: queue.SimpleQueue[Chunk | BaseException | None] = field(default_factory=queue.SimpleQueue)
    others: list[Job] = field(default_factory=list)
    vision_run: Any = None  # of VisionEncoder.new_run, while pictures are encoded

    def stop(self) -> None:
        """Ask the owner thread to leave this job, from any thread."""
        self.cancel.set()
        if self.vision_run is not None:
            self.vision_run.terminate = True


class Owner:
    """The thread. `last` runs in it when it ends."""

    def __init__(self, last: Callable[[], None]) -> None:
        self._last = last
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="llava-edge engine", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[Job], None], cancel: threading.Event) -> Stream:
        """Queue a job and yield its chunks; raises what it raised. Leaving early, by Ctrl-C too, cancels it."""
        job = Job(run, cancel)
        self._queue(job)
        yield from self._read(job)

    def submit_together(self, run: Callable[[list[Job]], None], cancel: threading.Event, count: int) -> list[Stream]:
        """Queue one job that fills `count` streams. Leaving one before its last chunk cancels all."""
        jobs = [Job(lambda job: run([job, *job.others]), cancel) for _ in range(count)]
        jobs[0].others += jobs[1:]
        self._queue(jobs[0])
        return [self._read(job) for job in jobs]

    def _queue(self, job: Job) -> None:
        if not self._thread.is_alive():
            raise UsageError("The engine is closed.")
        self._jobs.put(job)

    def _read(self, job: Job) -> Stream:
        whole = False
        try:
            while (item := self._next(job)) is not None:
                if isinstance(item, BaseException):
                    raise item
                whole = item.final is not None
                yield item
        finally:
            if not whole:
                job.stop()

    def close(self, *, wait: bool = True) -> None:
        """End the thread after the job in work. Harmless when repeated."""
        self._jobs.put(None)
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def _next(self, job: Job) -> Chunk | BaseException | None:
        while True:
            try:
                return job.output.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if job.cancel.is_set():
                    job.stop()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            end: BaseException | None = None
            try:
                job.run(job)
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                end = error
            for one in (job, *job.others):
                one.output.put(end)
        self._last()
