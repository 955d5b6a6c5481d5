"""The routes: what is answered to whom. Weighs requests, asks the child, writes replies; computes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_edge.server import replies, requests
from llava_edge.server.guard import Guard
from llava_edge.server.json_body import parse
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import CONTENT_TYPE, Metrics
from llava_edge.server.middleware import Middleware, problem_response
from llava_edge.server.page import Page
from llava_edge.server.problems import Problem, bad_request
from llava_edge.server.requests import ModelRequest
from llava_edge.server.supervisor import Supervisor
from llava_edge.server.votes import VoteLog

T = TypeVar("T")
Read = Callable[[dict[str, Any], str, Limits], ModelRequest]


class App:
    """Everything the routes share."""

    def __init__(self, model: str, supervisor: Supervisor, vote_log: VoteLog, limits: Limits, metrics: Metrics) -> None:
        self._model = model
        self._supervisor = supervisor
        self._vote_log = vote_log
        self._limits = limits
        self._metrics = metrics
        self._page = Page()
        self._created = int(time.time())

    def asgi(self, guard: Guard, log: Callable[[str], None]) -> Middleware:
        """The application for uvicorn. `log` gets one line for each request."""
        routes = [
            Route("/", self._show_page),
            Route("/examples/{name}", self._example),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/log", self._log_file, methods=["GET"]),
            Route("/log", self._log_add, methods=["POST"]),
            Route("/log", self._log_delete, methods=["DELETE"]),
            Route("/log/state", self._log_state, methods=["GET", "PUT"]),
        ]
        handlers = {Problem: _say, HTTPException: _say_http, Exception: _say_bug, _GoneError: _say_nothing}
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.router.redirect_slashes = False
        paths = {route.path for route in routes}
        return Middleware(inner, guard, self._limits, self._metrics, paths, log)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, requests.parse_chat, chat=True)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, requests.parse_completion, chat=False)

    async def _answer(self, request: Request, read: Read, chat: bool) -> Response:
        ask = read(await self._body(request), self._model, self._limits)
        reply = replies.Reply(self._model, chat)
        events = self._supervisor.answer(ask)
        if not ask.stream:
            return JSONResponse(reply.whole(await _unless_gone(request, _all(events))))
        # Nothing is sent before the first event, so that what is wrong with a request has its status.
        first = await _unless_gone(request, anext(events))
        return _Stream(self._lines(first, events, reply, ask.include_usage), events)

    async def _lines(
        self, first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None], reply: replies.Reply, usage: bool
    ) -> AsyncGenerator[bytes, None]:
        yield reply.first() + reply.piece(first)
        said = first
        try:
            async for said in events:
                yield reply.piece(said)
        except Problem as problem:
            yield replies.failure(problem)
            return
        yield reply.last(said, usage)

    async def _body(self, request: Request) -> dict[str, Any]:
        return parse(await _read(request, self._limits), self._limits)

    async def _models(self, _: Request) -> Response:
        return JSONResponse(replies.models(self._model, self._created))

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            raise Problem(404, f"This server has the model {self._model!r} only.", code="model_not_found")
        return JSONResponse(replies.model(self._model, self._created))

    async def _health(self, _: Request) -> Response:
        supervisor = self._supervisor
        state = {
            "status": supervisor.state,
            "model": self._model,
            "device": supervisor.ready.get("device"),
            "context": supervisor.ready.get("context"),
            "queue": supervisor.queue_length,
            "crashes": supervisor.crashes,
        }
        return JSONResponse(state, 200 if supervisor.state == "ok" else 503)

    async def _show_metrics(self, request: Request) -> Response:
        supervisor = self._supervisor
        text = self._metrics.render(
            up=int(supervisor.state == "ok"),
            crashes_total=supervisor.crashes,
            starts_total=supervisor.starts,
            queue_length=supervisor.queue_length,
            requests_in_work=request.scope["active_requests"],
        )
        return Response(text, media_type=CONTENT_TYPE)

    async def _show_page(self, _: Request) -> Response:
        return Response(self._page.html, headers=self._page.headers, media_type="text/html")

    async def _example(self, request: Request) -> Response:
        picture = self._page.examples.get(request.path_params["name"])
        if picture is None:
            raise Problem(404, "There is no such address.")
        return Response(picture, media_type="image/jpeg")

    async def _log_state(self, request: Request) -> Response:
        if request.method == "PUT":
            enabled = (await self._body(request)).get("on")
            if not isinstance(enabled, bool):
                raise bad_request("on must be true or false.", "on")
            self._vote_log.enabled = enabled
        return JSONResponse({"on": self._vote_log.enabled, "bytes": self._vote_log.size()})

    async def _log_add(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        self._vote_log.add(await self._body(request), address)
        return Response(status_code=204)

    async def _log_file(self, _: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="llava-edge-log.jsonl"'}
        return Response(self._vote_log.read(), headers=headers, media_type="application/jsonl")

    async def _log_delete(self, _: Request) -> Response:
        self._vote_log.delete()
        return Response(status_code=204)


class _Stream(StreamingResponse):
    """Server-sent events; `events`, which they are made of, are closed whenever and however it ends."""

    def __init__(self, lines: AsyncGenerator[bytes, None], events: AsyncGenerator[dict[str, Any], None]) -> None:
        unheld = {"X-Accel-Buffering": "no"}  # or nginx before us collects the events
        super().__init__(lines, headers=unheld, media_type="text/event-stream")
        self._lines = lines
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._lines):
            await super().__call__(scope, receive, send)


class _GoneError(Exception):
    """The client left; nobody reads the answer."""


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, at most `limits.body` bytes of it kept. Raises `Problem` (408, 413)."""
    size, parts = 0, list[bytes]()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:  # the rest is read all the same: closing early would drop the answer, too
                    parts.clear()
                else:
                    parts.append(part)
    except TimeoutError:
        raise Problem(408, f"The body did not arrive within {limits.body_seconds:g} seconds.") from None
    except ClientDisconnect:
        raise _GoneError from None
    if size > limits.body:
        raise Problem(413, f"The body has {size} bytes; at most {limits.body} are accepted.")
    return b"".join(parts)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises `_GoneError`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise _GoneError from None


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(events: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    async with aclosing(events):
        return [said async for said in events]


async def _say(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(problem)


async def _say_http(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    missing = "There is no such address; the API is below /v1."
    message = "This address takes another method." if status == 405 else missing
    response = problem_response(Problem(status, message))
    response.headers.update(getattr(error, "headers", None) or {})  # which methods it takes
    return response


async def _say_bug(_: Request, error: Exception) -> Response:
    return problem_response(Problem(500, "This is a bug in llava-edge; the server's log has the details."))


async def _say_nothing(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's name for it, for the log
