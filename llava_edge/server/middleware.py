"""ASGI middleware: admits or refuses each request, adds security headers to each response, counts and logs it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_edge.server import ollama
from llava_edge.server.guard import Guard
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import Metrics
from llava_edge.server.problems import Problem, server_busy

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_CLOSE = (b"connection", b"close")
_UNLOGGED = (("/health", 200), ("/metrics", 200))  # polled every few seconds
_SHORT_DRAIN_STATUSES = (401, 403, 408)  # not authorized, or already out of time for its body
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


def problem_response(problem: Problem, path: str) -> Response:
    """An error in OpenAI's format, or in Ollama's where the path is."""
    headers = problem.headers
    if problem.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="llava-edge"'  # so that browsers prompt for the key as a password
    body = ollama.error(problem) if path.startswith("/api/") else problem.body()
    return JSONResponse(body, problem.status, headers)


class Middleware:
    """Wraps an ASGI application. `paths` are the routes that logs and metrics may name."""

    def __init__(
        self,
        app: ASGIApp,
        guard: Guard,
        limits: Limits,
        metrics: Metrics,
        paths: Collection[str],
        log: Callable[[str], None],
    ) -> None:
        self._app = app
        self._guard = guard
        self._limits = limits
        self._metrics = metrics
        self._paths = paths
        self._log = log
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = scope["method"], scope["raw_path"], scope["headers"]
        headers = [*_HEADERS, *self._guard.cors_headers(*request)]
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            headers.append(_CLOSE)  # RFC 9112, 6.1: a proxy in front may have seen another end of the body
        exchange = _Exchange(receive, send, self._limits, headers)
        start = time.monotonic()
        try:
            self._admit(scope)
            if self._guard.is_preflight(*request):
                await Response(status_code=204)(scope, exchange.receive, exchange.send)
            else:
                await self._forward(scope, exchange)
        except Problem as problem:
            await problem_response(problem, scope["path"])(scope, exchange.receive, exchange.send)
        finally:
            route = scope["path"] if scope["path"] in self._paths else "(other)"
            method = scope["method"] if scope["method"] in _METHODS else "(other)"
            self._metrics.count_request(route, exchange.status)
            if (route, exchange.status) not in _UNLOGGED:
                self._log(f"{method} {route} {exchange.status} {(time.monotonic() - start) * 1000:.0f} ms")

    def _admit(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.head:
            raise Problem(431, f"The headers have more than {self._limits.head} bytes.")
        self._guard.check(scope["method"], scope["raw_path"], scope["headers"])
        if self._active >= self._limits.requests:
            raise server_busy("Too many requests at once. Try again soon.", 2)

    async def _forward(self, scope: Scope, exchange: _Exchange) -> None:
        self._active += 1
        scope["active_requests"] = self._active
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._active -= 1


class _Exchange:
    """The ASGI messages of one request and its response."""

    def __init__(self, receive: Receive, send: Send, limits: Limits, headers: list[tuple[bytes, bytes]]) -> None:
        self._receive = receive
        self._send = send
        self._limits = limits
        self._headers = headers
        self._body_read = False  # to its end
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers, *await self._drain_body()]}
        await self._send(message)

    async def _drain_body(self) -> list[tuple[bytes, Any]]:
        """Read the rest of the body: closing while the client sends would reset the connection and lose the answer."""
        limits = self._limits
        seconds = limits.refused_seconds if self.status in _SHORT_DRAIN_STATUSES else limits.body_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._body_read:
                    await self.receive()
        return [] if self._body_read else [_CLOSE]
