"""The server's side of the model's process (child.py): starts it, sends it requests, and passes its events on."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - with the next one: `terminate` would import both, without a descriptor
import json
import multiprocessing.connection
import signal
import socket
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any, NoReturn

from llava_edge import errors
from llava_edge.bundle import Bundle
from llava_edge.errors import UnavailableError
from llava_edge.options import EngineOptions
from llava_edge.server import child
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request
from llava_edge.server.requests import ModelRequest

_LINE = 1 << 20  # bytes of the longest line accepted from the child
_CLIENT_ERRORS = {"UsageError", "OptionError", "ImageError", "ContextOverflowError"}  # their messages may be sent


@dataclass(eq=False)
class Job:
    """A queued or running request.

    `events` receives the child's events, or a `Problem`; `ended` the child's last event. `timer` is the supervisor's.
    """

    number: int
    request: ModelRequest
    events: asyncio.Queue[dict[str, Any] | Problem] = field(default_factory=asyncio.Queue)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)  # the client disconnected, or its time is over
    received: bool = False  # by the child, whose death may be this request's doing from then on
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


class ProcessDiedError(Exception):
    """The model's process ended or broke the protocol."""


class ModelProcess:
    """The child process and the socket to it."""

    def __init__(
        self, process: multiprocessing.process.BaseProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.jobs: dict[int, Job] = {}  # running ones, by number
        self.late = False  # with ending a job; it gets no others meanwhile: if it hangs, they would keep it alive

    @staticmethod
    async def spawn(bundle: Bundle, options: EngineOptions, limits: Limits) -> ModelProcess:
        """Start the process."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE)
            arguments = (theirs, str(bundle.folder), options, limits.pixels)
            # Not fork: the engines do not survive it, and the child must inherit nothing.
            process = multiprocessing.get_context("spawn").Process(target=child.main, args=arguments, daemon=True)
            _start(process)
        return ModelProcess(process, reader, writer)

    async def wait_ready(self) -> dict[str, Any]:
        """Wait until the model is loaded. Raises `ProcessDiedError`, or the error the child failed with."""
        event = await self._read_event()
        if failed := event.get("failed"):
            kind = getattr(errors, failed["kind"], UnavailableError)
            raise kind(failed["message"])
        ready: dict[str, Any] = event["ready"]
        return ready

    async def read_events(self) -> NoReturn:
        """Pass events on to the running jobs. Raises `ProcessDiedError`, or another error for a malformed event."""
        while True:
            event = await self._read_event()
            job = self.jobs.get(event["id"])
            if job is None:
                continue
            job.received = True
            if "received" in event:
                continue
            self._forward(job, event)
            if ("result" in event or "error" in event) and not job.ended.done():
                job.ended.set_result(event)
                self.late = False

    async def run(self, job: Job, timeout: float) -> dict[str, Any]:
        """Send a job and wait until it has ended, also if it is cancelled. Returns the last event.

        timeout: see `cancel`. Raises `ProcessDiedError`.
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

    async def cancel(self, job: Job, timeout: float) -> dict[str, Any]:
        """Tell the child that a job is cancelled. Returns its last event.

        Raises `ProcessDiedError` if there is none for `timeout` seconds, unless the child works for others meanwhile:
        it cannot end an answer while it reads another one's picture.
        """
        self._writer.write(json.dumps({"cancel": job.number}).encode("ascii") + b"\n")
        works = self._works()
        while not (await asyncio.wait({job.ended}, timeout=timeout))[0]:
            worked, works = works, self._works()
            if not (worked or works):
                raise ProcessDiedError
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
        code = self._process.exitcode
        if code is not None:  # as where SIGCHLD is ignored
            self._process.close()  # its pipes, which would stay open until a garbage collection
        return code

    @staticmethod
    def _forward(job: Job, event: dict[str, Any]) -> None:
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
            raise ProcessDiedError from error
        if not isinstance(event, dict):
            raise ProcessDiedError
        return event


def _start(process: multiprocessing.process.BaseProcess) -> None:
    """Start it with SIGINT blocked, which it inherits: Ctrl-C would end its imports with a traceback."""
    resource_tracker.ensure_running()  # or `start` starts that one, and then unblocks the signal
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
