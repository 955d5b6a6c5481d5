"""The child process, kept running, and the queue before it: one request at a time, in the order they came.

All of it lives in the event loop. A request that is in work when the child dies ends with an error; those that wait
stay and are served by the next child.
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
from typing import Any

from llava_edge import errors
from llava_edge.bundle import Bundle
from llava_edge.errors import UnavailableError
from llava_edge.options import EngineOptions
from llava_edge.server import child
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request, model_crashed, server_busy, server_stopped
from llava_edge.server.requests import Ask

MAX_CRASHES = 3  # without an answer between them; then requests are refused for a while
REST_SECONDS = 60.0
_LINE = 1 << 20  # longest line of the child
_SAYABLE = {"UsageError", "ImageError", "ContextOverflowError"}  # what their sentences name is the client's own


@dataclass(eq=False)
class _Job:
    """A request on its way. `events` gets what the child says, or a `Problem`."""

    number: int
    ask: Ask
    events: asyncio.Queue[dict[str, Any] | Problem] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # the client is not interested any more
    ended: bool = False

    def say(self, event: dict[str, Any] | Problem) -> None:
        """Hand something on; a `Problem`, a result or an error is the last."""
        self.ended = self.ended or isinstance(event, Problem) or "result" in event
        self.events.put_nowait(event)


class Supervisor:
    """Start it with `start`, ask with `answer`, end it with `close`. `crashes` counts deaths nobody asked for.

    count: gets the result of each answer, also of one that was left, which nobody else gets.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        limits: Limits,
        count: Callable[[dict[str, Any]], None] = lambda result: None,
    ) -> None:
        self._bundle = bundle
        self._options = options
        self._limits = limits
        self._count_result = count
        self._waiting: deque[_Job] = deque()
        self._asked: set[_Job] = set()  # those that wait, and the one at work
        self._news = asyncio.Event()
        self._count = 0
        self._task: asyncio.Task[None] | None = None
        self._child: _Child | None = None
        self._in_row = 0
        self._stopped = False
        self.rest_until = 0.0  # time.monotonic
        self.crashes = 0
        self.starts = 0
        self.ready: dict[str, Any] = {}  # what the child said of itself; empty while there is none

    @property
    def state(self) -> str:
        """ "ok", "starting" or "failed" (too many crashes; it will be tried again)."""
        if self.ready:
            return "ok"
        return "failed" if time.monotonic() < self.rest_until else "starting"

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def start(self) -> None:
        """Load the model. Raises the `LlavaEdgeError` that kept the child from it."""
        self._child = await self._started()
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Tell whoever still waits for an answer, or for the rest of one, or asks from now on, that there is none."""
        self._stopped = True
        for job in self._asked:
            job.say(server_stopped())

    async def close(self) -> None:
        """End the child."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._child:
            await self._child.end()

    async def answer(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what the child says until the event with the result. Leaving early frees the child.

        Raises `Problem`: the request cannot be answered, the queue is full or the server ends (503), the child died
        (500).
        """
        if self._stopped:  # its body was late
            raise server_stopped()
        if self.state == "failed":
            wait = int(self.rest_until - time.monotonic()) + 1
            raise server_busy("The model's process ended several times in a row; it will be tried again soon.", wait)
        if len(self._waiting) >= self._limits.queue:
            raise server_busy(f"There are {len(self._waiting)} requests waiting already. Try again soon.", 2)
        self._count += 1
        job = _Job(self._count, ask)
        self._waiting.append(job)
        self._asked.add(job)
        self._news.set()
        timer = asyncio.get_running_loop().call_later(self._limits.queue_seconds, self._give_up, job)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Problem):
                    raise event
                yield event
                if "result" in event:
                    return
        finally:
            timer.cancel()
            self._asked.discard(job)
            job.left.set()
            if job in self._waiting:  # the error of removing it in vain would have all of a job in it, as text
                self._waiting.remove(job)

    def _give_up(self, job: _Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            job.say(server_busy("The request waited too long for the model. Try again later.", 10))

    async def _run(self) -> None:
        while True:
            try:
                self._child = self._child or await self._started()
                await self._serve(self._child)
            except Exception as error:  # noqa: BLE001 - a child that talks nonsense is as good as dead
                await self._bury(error)

    async def _serve(self, process: _Child) -> None:
        """Hand jobs to a child until it dies (`_DiedError`)."""
        while True:
            while not self._waiting:
                self._news.clear()
                await process.watch(self._news)
            await self._work(process, self._waiting.popleft())

    async def _work(self, process: _Child, job: _Job) -> None:
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                said = await process.work(job, self._limits.cancel_seconds)
            self._in_row = 0
        except TimeoutError:
            job.say(Problem(500, "The answer took longer than this server allows.", code="timeout"))
            said = await process.cancel(job, self._limits.cancel_seconds)
        except BaseException:
            if not job.ended:
                job.say(model_crashed())
            raise
        if "result" in said:
            self._count_result(said["result"])

    async def _started(self) -> _Child:
        self.starts += 1
        process = await _Child.spawn(self._bundle, self._options, self._limits)
        try:
            async with asyncio.timeout(self._limits.load_seconds):
                self.ready = await process.open()
        except BaseException as error:
            code = await process.end(patience=1.0)
            if isinstance(error, TimeoutError | _DiedError):
                raise UnavailableError(
                    f"The model's process ended while it loaded {self._bundle.folder} (exit code {code}). "
                    "Run 'llava-edge doctor'."
                ) from error
            raise
        return process

    async def _bury(self, error: Exception) -> None:
        """After a death: count, and rest if there were too many."""
        self.ready = {}
        code = None
        if self._child:
            code = await self._child.end(patience=1.0)
            self._child = None
        self.crashes += 1
        self._in_row += 1
        reason = f"exit code {code}" if code is not None else str(error)
        print(f"llava-edge: the model's process ended ({reason}); starting it again.", file=sys.stderr)
        if self._in_row < MAX_CRASHES:
            return
        self.rest_until = time.monotonic() + REST_SECONDS
        while self._waiting:
            self._waiting.popleft().say(model_crashed())
        await asyncio.sleep(REST_SECONDS)
        self._in_row = 0


class _DiedError(Exception):
    """The child is gone."""


class _Child:
    """One process and the socket to it."""

    def __init__(
        self, process: multiprocessing.process.BaseProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._next: asyncio.Task[dict[str, Any]] | None = None

    @staticmethod
    async def spawn(bundle: Bundle, options: EngineOptions, limits: Limits) -> _Child:
        """Start the process."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE)
            arguments = (theirs, str(bundle.folder), options, limits.pixels)
            # Not fork: engines do not survive it, and the child shall inherit nothing.
            process = multiprocessing.get_context("spawn").Process(target=child.main, args=arguments, daemon=True)
            process.start()
        return _Child(process, reader, writer)

    async def open(self) -> dict[str, Any]:
        """Wait until the model is loaded. Raises `_DiedError`, or the error the child failed with."""
        said = await self._read()
        if failed := said.get("failed"):
            kind = getattr(errors, failed["kind"], UnavailableError)
            raise kind(failed["message"])
        ready: dict[str, Any] = said["ready"]
        return ready

    async def watch(self, news: asyncio.Event) -> None:
        """Wait for `news`. Raises `_DiedError` if the child dies before."""
        waiting = asyncio.create_task(news.wait())
        try:
            await asyncio.wait({waiting, self._listen()}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._listen().done():
            await self._heard()

    async def work(self, job: _Job, patience: float) -> dict[str, Any]:
        """Send a job and hand on what comes back; if its client leaves, stop it. The last that came.

        Raises `_DiedError`.
        """
        header = json.dumps({"id": job.number, **job.ask.header()}).encode("ascii") + b"\n"
        try:
            self._writer.writelines([header, *job.ask.images])
            await self._writer.drain()
        except OSError as error:
            raise _DiedError from error
        said: dict[str, Any] = {}
        left = asyncio.create_task(job.left.wait())
        try:
            while not job.ended:
                await asyncio.wait({left, self._listen()}, return_when=asyncio.FIRST_COMPLETED)
                if left.done() and not self._listen().done():
                    return await self.cancel(job, patience)
                said = await self._heard()
                self._hand_on(job, said)
        finally:
            left.cancel()
        return said

    async def cancel(self, job: _Job, patience: float) -> dict[str, Any]:
        """Make the child leave a job; its last word. Raises `_DiedError` if it does not within `patience` seconds."""
        try:
            self._writer.write(json.dumps({"cancel": job.number}).encode("ascii") + b"\n")
            async with asyncio.timeout(patience):
                while True:
                    said = await self._heard()
                    if said.get("id") == job.number and ("result" in said or "error" in said):
                        return said
        except (OSError, TimeoutError) as error:
            raise _DiedError from error

    async def end(self, patience: float = 0.0) -> int | None:
        """Kill it if it does not end by itself: it has nothing to lose. Returns its exit code."""
        if patience:
            await asyncio.to_thread(self._process.join, patience)
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        if self._next:
            self._next.cancel()
        self._writer.transport.abort()
        return self._process.exitcode

    @staticmethod
    def _hand_on(job: _Job, said: dict[str, Any]) -> None:
        if said.get("id") != job.number:
            return
        if "error" not in said:
            job.say(said)
        elif said["error"]["kind"] in _SAYABLE:
            code = "context_length_exceeded" if said["error"]["kind"] == "ContextOverflowError" else None
            param = "image_tokens" if said["error"]["message"].startswith("image_tokens") else "messages"
            job.say(bad_request(said["error"]["message"], param, code))
        else:
            job.say(Problem(500, "The model failed on this request.", code="model_error"))

    def _listen(self) -> asyncio.Task[dict[str, Any]]:
        """The task that reads the next event; it goes on when nobody waits for it."""
        if self._next is None:
            self._next = asyncio.create_task(self._read())
        return self._next

    async def _heard(self) -> dict[str, Any]:
        task = self._listen()
        said = await asyncio.shield(task)
        self._next = None
        return said

    async def _read(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            said = json.loads(line)
        except (OSError, ValueError) as error:  # ValueError: no JSON, which is also what half a line at its death is
            raise _DiedError from error
        if not isinstance(said, dict):
            raise _DiedError
        return said
