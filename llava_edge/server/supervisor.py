"""Keeps the child process running and queues requests for it: first come, first served, several at a time.

Runs entirely in the event loop. If the child dies, the requests it had received end with an error; all others are
served by the next child.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from llava_edge.bundle import Bundle
from llava_edge.errors import UnavailableError
from llava_edge.options import EngineOptions
from llava_edge.server.limits import Limits
from llava_edge.server.model_process import Job, ModelProcess, ProcessDiedError
from llava_edge.server.problems import Problem, model_crashed, server_busy, server_stopped
from llava_edge.server.requests import ModelRequest

MAX_CRASHES = 3  # without an answer in between; then requests are refused for a while
BACKOFF_SECONDS = 60.0


class Supervisor:
    """Runs the child process. Call `start`, then `answer` for each request, and `close`.

    on_result: called with the result of each answer, cancelled ones included. log: called with a line for each crash.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        limits: Limits,
        on_result: Callable[[dict[str, Any]], None] = lambda result: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._bundle = bundle
        self._options = options
        self._limits = limits
        self._on_result = on_result
        self._log = log
        self._queue: deque[Job] = deque()
        self._jobs: set[Job] = set()  # queued and running ones
        self._wakeup = asyncio.Event()
        self._last_id = 0
        self._task: asyncio.Task[None] | None = None
        self._child: ModelProcess | None = None
        self._consecutive_crashes = 0
        self._stopped = False
        self.retry_at = 0.0  # time.monotonic
        self.crashes = 0
        self.starts = 0
        self.ready: dict[str, Any] = {}  # the child's first event; empty while no model is loaded

    @property
    def state(self) -> str:
        """ "ok", "starting" or "failed" (after too many crashes, until the next start)."""
        if self.ready:
            return "ok"
        return "failed" if time.monotonic() < self.retry_at else "starting"

    @property
    def queue_length(self) -> int:
        """Number of requests that wait until the child takes them."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that the child has taken; those that do not fit into the context wait there."""
        return len(self._child.jobs) if self._child else 0

    async def start(self) -> None:
        """Start the child and load the model. Raises the `LlavaEdgeError` that the child failed with."""
        self._child = await self._spawn_child()
        self._task = asyncio.create_task(self._run())

    def reject_requests(self) -> None:
        """End all queued and running requests, and all later ones, with an error."""
        self._stopped = True
        for job in self._jobs:
            job.send(server_stopped())

    async def close(self) -> None:
        """End all requests and the child process."""
        self.reject_requests()
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._child:
            await self._child.terminate()

    async def answer(self, request: ModelRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the child's events up to the one with the result. Closing the generator early cancels the request.

        Raises `Problem`: the request cannot be answered (400, 500), the queue is full or the server is shutting down
        (503), the child died (500).
        """
        if self._stopped:  # while this request's body was being read
            raise server_stopped()
        if self.state == "failed":
            wait = int(self.retry_at - time.monotonic()) + 1
            raise server_busy("The model's process crashed several times in a row; it will be restarted soon.", wait)
        if len(self._queue) >= self._limits.queue:
            raise server_busy(f"{len(self._queue)} requests are waiting already. Try again soon.", 2)
        self._last_id += 1
        job = Job(self._last_id, request)
        self._queue.append(job)
        self._jobs.add(job)
        self._wakeup.set()
        self._start_timer(job, self._limits.queue_seconds)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Problem):
                    raise event
                yield event
                if "result" in event:
                    return
        finally:
            job.stop_timer()
            self._jobs.discard(job)
            job.cancelled.set()
            if job in self._queue:  # a ValueError from `remove` would format the whole job, images included
                self._queue.remove(job)

    def _start_timer(self, job: Job, seconds: float) -> None:
        job.stop_timer()
        job.timer = asyncio.get_running_loop().call_later(seconds, self._expire, job)

    def _expire(self, job: Job) -> None:
        job.cancelled.set()
        if job in self._queue:
            self._queue.remove(job)
            job.send(server_busy("The request waited too long for the model. Try again later.", 10))
        else:
            job.send(Problem(500, "The answer took longer than this server allows.", code="timeout"))

    async def _run(self) -> None:
        while True:
            try:
                self._child = self._child or await self._spawn_child()
                await self._dispatch(self._child)
            except Exception as error:  # noqa: BLE001 - a child that sends nonsense is treated as dead
                if self._stopped:  # a group that fails while it is cancelled forgets, before Python 3.13, that it is
                    return
                await self._handle_crash(error)

    async def _dispatch(self, process: ModelProcess) -> None:
        """Give jobs to the child until it dies: then raises a group of exceptions."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(process.read_events())
                parallel = min(self._limits.parallel, int(self.ready["parallel"]))
                while True:
                    while not self._queue or process.late or len(process.jobs) >= parallel:
                        self._wakeup.clear()
                        await self._wakeup.wait()
                    job = self._queue.popleft()
                    process.jobs[job.number] = job
                    self._start_timer(job, self._limits.answer_seconds)
                    group.create_task(self._run_job(process, job))
        finally:  # not in `_run_job`: a task that is cancelled before it starts runs nothing
            self._leave_process(process)

    def _leave_process(self, process: ModelProcess) -> None:
        """Queue the requests again that a dead child did not receive; end the others, as one may have killed it."""
        for job in reversed(process.jobs.values()):
            if job.received or job.cancelled.is_set():
                job.send(model_crashed())
            else:
                self._queue.appendleft(job)
                self._start_timer(job, self._limits.queue_seconds)

    async def _run_job(self, process: ModelProcess, job: Job) -> None:
        event = await process.run(job, self._limits.cancel_seconds)
        self._consecutive_crashes = 0
        del process.jobs[job.number]
        for later in process.jobs.values():
            # It may have waited in the child for the positions of the context that this one took.
            if later.number > job.number and not later.begun and not later.cancelled.is_set():
                self._start_timer(later, self._limits.answer_seconds)
        self._wakeup.set()
        if "result" in event:
            self._on_result(event["result"])

    async def _spawn_child(self) -> ModelProcess:
        self.starts += 1
        process = await ModelProcess.spawn(self._bundle, self._options, self._limits)
        try:
            async with asyncio.timeout(self._limits.load_seconds):
                self.ready = await process.wait_ready()
        except BaseException as error:
            code = await process.terminate(timeout=1.0)
            if isinstance(error, TimeoutError | ProcessDiedError):
                raise UnavailableError(
                    f"The model's process ended while it loaded {self._bundle.folder} (exit code {code}). "
                    "Run 'llava-edge doctor'."
                ) from error
            raise
        return process

    async def _handle_crash(self, error: Exception) -> None:
        """Count the crash; after too many in a row, refuse requests for `BACKOFF_SECONDS`."""
        self.ready = {}
        code = None
        if self._child:
            code = await self._child.terminate(timeout=1.0)
            self._child = None
        self.crashes += 1
        self._consecutive_crashes += 1
        reason = f"exit code {code}" if code is not None else str(error)
        self._log(f"llava-edge: the model's process ended ({reason}); restarting it.")
        if self._consecutive_crashes < MAX_CRASHES:
            return
        self.retry_at = time.monotonic() + BACKOFF_SECONDS
        while self._queue:
            self._queue.popleft().send(model_crashed())
        await asyncio.sleep(BACKOFF_SECONDS)
        self._consecutive_crashes = 0
