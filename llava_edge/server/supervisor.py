"""Keeps the child process running and queues requests for it: first come, first served, several at a time.

Runs entirely in the event loop. If the child dies, the requests it was working on end with an error; queued requests
are served by the next child.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llava_edge import errors
from llava_edge.bundle import Bundle
from llava_edge.errors import UnavailableError
from llava_edge.options import EngineOptions
from llava_edge.server import child
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request, model_crashed, server_busy, server_stopped
from llava_edge.server.requests import ModelRequest

MAX_CRASHES = 3  # without an answer in between; then requests are refused for a while
BACKOFF_SECONDS = 60.0
_LINE = 1 << 20  # bytes of the longest line accepted from the child
_CLIENT_ERRORS = {"UsageError", "OptionError", "ImageError", "ContextOverflowError"}  # their messages may be sent


@dataclass(eq=False)
class _Job:
    """A queued or running request.

    `events` receives the child's events, or a `Problem`; `ended` the child's last event. `timer` calls
    `Supervisor._expire`.
    """

    number: int
    request: ModelRequest
    events: asyncio.Queue[dict[str, Any] | Problem] = field(default_factory=asyncio.Queue)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)  # the client disconnected, or its time is over
    begun: bool = False  # there was an event
    finished: bool = False  # there was the last one
    timer: asyncio.TimerHandle | None = None
    ended: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def send(self, event: dict[str, Any] | Problem) -> None:
        """Pass an event on to the client. A `Problem` or an event with a result is the last; later ones are dropped."""
        if not self.finished:
            self.begun = True
            self.finished = isinstance(event, Problem) or "result" in event
            self.events.put_nowait(event)

    def stop_timer(self) -> None:
        """Let it never expire. Harmless when repeated."""
        if self.timer:
            self.timer.cancel()


class Supervisor:
    """Runs the child process. Call `start`, then `answer` for each request, and `close`.

    on_result: called with the result of each answer, cancelled ones included.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        limits: Limits,
        on_result: Callable[[dict[str, Any]], None] = lambda result: None,
    ) -> None:
        self._bundle = bundle
        self._options = options
        self._limits = limits
        self._on_result = on_result
        self._queue: deque[_Job] = deque()
        self._jobs: set[_Job] = set()  # queued and running ones
        self._wakeup = asyncio.Event()
        self._last_id = 0
        self._task: asyncio.Task[None] | None = None
        self._child: _Child | None = None
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
        job = _Job(self._last_id, request)
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

    def _start_timer(self, job: _Job, seconds: float) -> None:
        job.stop_timer()
        job.timer = asyncio.get_running_loop().call_later(seconds, self._expire, job)

    def _expire(self, job: _Job) -> None:
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

    async def _dispatch(self, process: _Child) -> None:
        """Give jobs to the child until it dies: then raises a group of exceptions."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(process.read_events())
                while True:
                    while not self._queue or process.late or len(process.jobs) >= self._parallel:
                        self._wakeup.clear()
                        await self._wakeup.wait()
                    job = self._queue.popleft()
                    process.jobs[job.number] = job
                    self._start_timer(job, self._limits.answer_seconds)
                    group.create_task(self._run_job(process, job))
        finally:  # not in `_run_job`: a task that is cancelled before it starts runs nothing
            for job in process.jobs.values():
                job.send(model_crashed())

    @property
    def _parallel(self) -> int:
        return min(self._limits.parallel, int(self.ready["parallel"]))

    async def _run_job(self, process: _Child, job: _Job) -> None:
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

    async def _spawn_child(self) -> _Child:
        self.starts += 1
        process = await _Child.spawn(self._bundle, self._options, self._limits)
        try:
            async with asyncio.timeout(self._limits.load_seconds):
                self.ready = await process.wait_ready()
        except BaseException as error:
            code = await process.terminate(timeout=1.0)
            if isinstance(error, TimeoutError | _ChildDiedError):
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
        print(f"llava-edge: the model's process ended ({reason}); restarting it.", file=sys.stderr)
        if self._consecutive_crashes < MAX_CRASHES:
            return
        self.retry_at = time.monotonic() + BACKOFF_SECONDS
        while self._queue:
            self._queue.popleft().send(model_crashed())
        await asyncio.sleep(BACKOFF_SECONDS)
        self._consecutive_crashes = 0


class _ChildDiedError(Exception):
    """The child process ended or broke the protocol."""


class _Child:
    """A child process and the socket to it."""

    def __init__(
        self, process: multiprocessing.process.BaseProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.jobs: dict[int, _Job] = {}  # running ones, by number
        self.late = False  # with ending a job; it gets no others meanwhile: if it hangs, they would keep it alive

    @staticmethod
    async def spawn(bundle: Bundle, options: EngineOptions, limits: Limits) -> _Child:
        """Start the process."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE)
            arguments = (theirs, str(bundle.folder), options, limits.pixels)
            # Not fork: the engines do not survive it, and the child must inherit nothing.
            process = multiprocessing.get_context("spawn").Process(target=child.main, args=arguments, daemon=True)
            process.start()
        return _Child(process, reader, writer)

    async def wait_ready(self) -> dict[str, Any]:
        """Wait until the model is loaded. Raises `_ChildDiedError`, or the error the child failed with."""
        event = await self._read_event()
        if failed := event.get("failed"):
            kind = getattr(errors, failed["kind"], UnavailableError)
            raise kind(failed["message"])
        ready: dict[str, Any] = event["ready"]
        return ready

    async def read_events(self) -> NoReturn:
        """Pass events on to the running jobs. Raises `_ChildDiedError`, or another error for a malformed event."""
        while True:
            event = await self._read_event()
            job = self.jobs.get(event["id"])
            if job is None:
                continue
            self._forward(job, event)
            if ("result" in event or "error" in event) and not job.ended.done():
                job.ended.set_result(event)
                self.late = False

    async def run(self, job: _Job, timeout: float) -> dict[str, Any]:
        """Send a job and wait until it has ended, also if it is cancelled. Returns the last event.

        timeout: see `cancel`. Raises `_ChildDiedError`.
        """
        header = json.dumps({"id": job.number, **job.request.header()}).encode("ascii") + b"\n"
        self._writer.writelines([header, *job.request.images])
        cancelled = asyncio.create_task(job.cancelled.wait())
        waited_for: list[asyncio.Future[Any]] = [cancelled, job.ended]
        try:
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
        return job.ended.result() if job.ended.done() else await self.cancel(job, timeout)

    async def cancel(self, job: _Job, timeout: float) -> dict[str, Any]:
        """Tell the child that a job is cancelled. Returns its last event.

        Raises `_ChildDiedError` if there is none for `timeout` seconds, unless the child works for others meanwhile: it
        cannot end an answer while it reads another one's picture.
        """
        self._writer.write(json.dumps({"cancel": job.number}).encode("ascii") + b"\n")
        works = self._works()
        while not (await asyncio.wait({job.ended}, timeout=timeout))[0]:
            worked, works = works, self._works()
            if not (worked or works):
                raise _ChildDiedError
            self.late = True
        return job.ended.result()

    def _works(self) -> bool:
        return any(not job.cancelled.is_set() for job in self.jobs.values())

    async def terminate(self, timeout: float = 0.0) -> int | None:
        """Kill the process, which has no state to save, after up to `timeout` seconds. Returns its exit code."""
        if timeout:
            await asyncio.to_thread(self._process.join, timeout)
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        self._writer.transport.abort()
        return self._process.exitcode

    @staticmethod
    def _forward(job: _Job, event: dict[str, Any]) -> None:
        if "error" not in event:
            job.send(event)
            return
        kind, message = event["error"]["kind"], event["error"]["message"]
        if kind in _CLIENT_ERRORS:
            code = "context_length_exceeded" if kind == "ContextOverflowError" else None
            param = message.partition(" ")[0] if kind == "OptionError" else job.request.text_field
            job.send(bad_request(message, param, code))
        else:
            job.send(Problem(500, "The model failed on this request.", code="model_error"))

    async def _read_event(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            event = json.loads(line)
        except (OSError, ValueError) as error:  # ValueError: not JSON, as is the partial line of a process that died
            raise _ChildDiedError from error
        if not isinstance(event, dict):
            raise _ChildDiedError
        return event
