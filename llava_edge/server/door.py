"""The outermost layer of the application: lets requests in or not, and gives every answer the headers it must have."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_edge.server.guard import Guard
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import Metrics
from llava_edge.server.problems import Problem, busy

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_UNLOGGED = (("/health", 200), ("/metrics", 200))  # asked every few seconds
_HARDLY_WAITED_FOR = (401, 403, 408)  # who may not be here, or had the time for its body already
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


def problem_response(problem: Problem) -> Response:
    """An error in OpenAI's shape."""
    headers = problem.headers
    if problem.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="llava-edge"'  # the page's visitors can type the key as a password
    return JSONResponse(problem.body(), problem.status, headers)


class Door:
    """An ASGI application around another one. `paths` are the routes that logs and metrics may name."""

    def __init__(
        self,
        inner: ASGIApp,
        guard: Guard,
        limits: Limits,
        metrics: Metrics,
        paths: Collection[str],
        log: Callable[[str], None],
    ) -> None:
        self._inner = inner
        self._guard = guard
        self._limits = limits
        self._metrics = metrics
        self._paths = paths
        self._log = log
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["method"], scope["raw_path"], scope["headers"]
        visit = _Visit(receive, send, self._limits, [*_HEADERS, *self._guard.sharing(*head)])
        started = time.monotonic()
        try:
            self._let_in(scope)
            if self._guard.is_preflight(*head):
                await Response(status_code=204)(scope, visit.receive, visit.send)
            else:
                await self._work(scope, visit)
        except Problem as problem:  # it counts for none
            await problem_response(problem)(scope, visit.receive, visit.send)
        finally:
            route = scope["path"] if scope["path"] in self._paths else "(other)"
            method = scope["method"] if scope["method"] in _METHODS else "(other)"
            self._metrics.request(route, visit.status)
            if (route, visit.status) not in _UNLOGGED:
                self._log(f"{method} {route} {visit.status} {(time.monotonic() - started) * 1000:.0f} ms")

    def _let_in(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.head:
            raise Problem(431, f"The headers have more than {self._limits.head} bytes.")
        self._guard.check(scope["method"], scope["raw_path"], scope["headers"])
        if self._in_work >= self._limits.requests:
            raise busy("Too many requests at once. Try again soon.", 2)

    async def _work(self, scope: Scope, visit: _Visit) -> None:
        self._in_work += 1
        scope["in_work"] = self._in_work
        try:
            await self._inner(scope, visit.receive, visit.send)
        finally:
            self._in_work -= 1


class _Visit:
    """One request's messages on their way in and out."""

    def __init__(self, receive: Receive, send: Send, limits: Limits, headers: list[tuple[bytes, bytes]]) -> None:
        self._receive = receive
        self._send = send
        self._limits = limits
        self._headers = headers
        self._read = False  # the whole body
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers, *await self._closing()]}
        await self._send(message)

    async def _closing(self) -> list[tuple[bytes, Any]]:
        """Take in what is left of the body: a client that still sends would lose the answer in a reset."""
        limits = self._limits
        patience = limits.refused_seconds if self.status in _HARDLY_WAITED_FOR else limits.body_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._read:
                    await self.receive()
        return [] if self._read else [(b"connection", b"close")]
