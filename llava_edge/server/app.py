"""The HTTP routes. Parses requests, forwards them to the child and formats its answers; computes nothing itself."""

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
RequestParser = Callable[[dict[str, Any], str, Limits], ModelRequest]


class App:
    """The route handlers and their shared state."""

    def __init__(self, model: str, supervisor: Supervisor, vote_log: VoteLog, limits: Limits, metrics: Metrics) -> None:
        self._model = model
        self._supervisor = supervisor
        self._vote_log = vote_log
        self._limits = limits
        self._metrics = metrics
        self._page = Page()
        self._created = int(time.time())

    def asgi(self, guard: Guard, log: Callable[[str], None]) -> Middleware:
        """The application for uvicorn. `log` gets one line per request."""
        routes = [
            Route("/", self._chat_page),
            Route("/examples/{name}", self._example_photo),
            Route("/health", self._health),
            Route("/metrics", self._prometheus),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._get_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/log", self._log_file, methods=["GET"]),
            Route("/log", self._log_add, methods=["POST"]),
            Route("/log", self._log_delete, methods=["DELETE"]),
            Route("/log/state", self._log_state, methods=["GET", "PUT"]),
        ]
        handlers = {
            Problem: _problem_handler,
            HTTPException: _http_error_handler,
            Exception: _bug_handler,
            _DisconnectedError: _disconnect_handler,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        paths = {route.path for route in routes}
        return Middleware(app, guard, self._limits, self._metrics, paths, log)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, requests.parse_chat, chat=True)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, requests.parse_completion, chat=False)

    async def _answer(self, request: Request, parse_request: RequestParser, chat: bool) -> Response:
        model_request = parse_request(await self._parse_body(request), self._model, self._limits)
        reply = replies.Reply(self._model, chat)
        events = self._supervisor.answer(model_request)
        if not model_request.stream:
            return JSONResponse(reply.complete(await _unless_disconnected(request, _collect(events))))
        # Wait for the first event before sending the status, so that an invalid request gets its own.
        first_event = await _unless_disconnected(request, anext(events))
        return _EventStream(self._sse(first_event, events, reply, model_request.include_usage), events)

    async def _sse(
        self,
        first_event: dict[str, Any],
        events: AsyncGenerator[dict[str, Any], None],
        reply: replies.Reply,
        include_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        yield reply.start() + reply.chunk(first_event)
        event = first_event
        try:
            async for event in events:
                yield reply.chunk(event)
        except Problem as problem:
            yield replies.error_event(problem)
            return
        yield reply.end(event, include_usage)

    async def _parse_body(self, request: Request) -> dict[str, Any]:
        return parse(await _read_body(request, self._limits), self._limits)

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse(replies.model_list(self._model, self._created))

    async def _get_model(self, request: Request) -> Response:
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
            "running": supervisor.running,
            "queue": supervisor.queue_length,
            "crashes": supervisor.crashes,
        }
        return JSONResponse(state, 200 if supervisor.state == "ok" else 503)

    async def _prometheus(self, request: Request) -> Response:
        supervisor = self._supervisor
        text = self._metrics.render(
            up=int(supervisor.state == "ok"),
            crashes_total=supervisor.crashes,
            starts_total=supervisor.starts,
            requests_running=supervisor.running,
            queue_length=supervisor.queue_length,
            requests_in_work=request.scope["active_requests"],
        )
        return Response(text, media_type=CONTENT_TYPE)

    async def _chat_page(self, _: Request) -> Response:
        return Response(self._page.html, headers=self._page.headers, media_type="text/html")

    async def _example_photo(self, request: Request) -> Response:
        photo = self._page.examples.get(request.path_params["name"])
        if photo is None:
            raise Problem(404, "There is no such path.")
        return Response(photo, media_type="image/jpeg")

    async def _log_state(self, request: Request) -> Response:
        if request.method == "PUT":
            enabled = (await self._parse_body(request)).get("on")
            if not isinstance(enabled, bool):
                raise bad_request("on must be true or false.", "on")
            self._vote_log.enabled = enabled
        return JSONResponse({"on": self._vote_log.enabled, "bytes": self._vote_log.size()})

    async def _log_add(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        self._vote_log.add(await self._parse_body(request), address)
        return Response(status_code=204)

    async def _log_file(self, _: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="llava-edge-log.jsonl"'}
        return Response(self._vote_log.read(), headers=headers, media_type="application/jsonl")

    async def _log_delete(self, _: Request) -> Response:
        self._vote_log.delete()
        return Response(status_code=204)


class _EventStream(StreamingResponse):
    """Server-sent events. Closes `events`, which they are made from, however the response ends."""

    def __init__(self, lines: AsyncGenerator[bytes, None], events: AsyncGenerator[dict[str, Any], None]) -> None:
        headers = {"X-Accel-Buffering": "no"}  # or an nginx proxy buffers the events
        super().__init__(lines, headers=headers, media_type="text/event-stream")
        self._lines = lines
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._lines):
            await super().__call__(scope, receive, send)


class _DisconnectedError(Exception):
    """The client disconnected."""


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The request's body. Keeps at most `limits.body` bytes in memory. Raises `Problem` (408, 413)."""
    size, parts = 0, list[bytes]()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:  # keep reading: closing early would lose the response
                    parts.clear()
                else:
                    parts.append(part)
    except TimeoutError:
        raise Problem(408, f"The body did not arrive within {limits.body_seconds:g} seconds.") from None
    except ClientDisconnect:
        raise _DisconnectedError from None
    if size > limits.body:
        raise Problem(413, f"The body has {size} bytes; at most {limits.body} are accepted.")
    return b"".join(parts)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects. Raises `_DisconnectedError`."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        disconnect.cancel()
        if not task.done():
            task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise _DisconnectedError from None


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(events: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    async with aclosing(events):
        return [event async for event in events]


async def _problem_handler(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(problem)


async def _http_error_handler(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    not_found = "There is no such path; the API is under /v1."
    message = "This path does not support the method." if status == 405 else not_found
    response = problem_response(Problem(status, message))
    response.headers.update(getattr(error, "headers", None) or {})  # Allow: the methods of the path
    return response


async def _bug_handler(_: Request, error: Exception) -> Response:
    return problem_response(Problem(500, "This is a bug in llava-edge; the server's log has the details."))


async def _disconnect_handler(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's "client closed request", for the log
