"""The HTTP routes. Parses requests, forwards them to the child and formats its answers; computes nothing itself."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_edge.bundle import Manifest
from llava_edge.server import ollama, replies, requests, responses
from llava_edge.server.connection import AnswerStream, DisconnectedError, collect, read_body, unless_disconnected
from llava_edge.server.guard import Guard
from llava_edge.server.json_body import parse
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import CONTENT_TYPE, Metrics
from llava_edge.server.middleware import Middleware, problem_response
from llava_edge.server.page import Page
from llava_edge.server.problems import Problem, bad_request
from llava_edge.server.replies import Event
from llava_edge.server.requests import ModelRequest
from llava_edge.server.supervisor import Supervisor
from llava_edge.server.votes import VoteLog

OpenAIParser = Callable[[dict[str, Any], str, Limits], ModelRequest]
OllamaParser = Callable[[dict[str, Any], Limits], ModelRequest]
Reply = replies.Reply | responses.Reply | ollama.Reply  # format an answer: whole, or as a stream of `media_type`


class _AnswerResponse(JSONResponse):
    """A whole answer. It may repeat half of a surrogate pair from the request, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


class App:
    """The route handlers and their shared state."""

    def __init__(
        self, manifest: Manifest, supervisor: Supervisor, vote_log: VoteLog, limits: Limits, metrics: Metrics
    ) -> None:
        self._manifest = manifest
        self._model = manifest.name
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
            Route("/v1/chat/completions", partial(self._openai_answer, requests.parse_chat, True), methods=["POST"]),
            Route("/v1/completions", partial(self._openai_answer, requests.parse_completion, False), methods=["POST"]),
            Route("/v1/responses", self._respond, methods=["POST"]),
            Route("/api/version", self._ollama_version),
            Route("/api/tags", self._ollama_models),
            Route("/api/ps", self._ollama_loaded_models),
            Route("/api/show", self._ollama_model, methods=["POST"]),
            Route("/api/chat", partial(self._ollama_answer, ollama.parse_chat, True), methods=["POST"]),
            Route("/api/generate", partial(self._ollama_answer, ollama.parse_generate, False), methods=["POST"]),
            Route("/log", self._log_file, methods=["GET"]),
            Route("/log", self._log_add, methods=["POST"]),
            Route("/log", self._log_delete, methods=["DELETE"]),
            Route("/log/state", self._log_state, methods=["GET", "PUT"]),
        ]
        handlers = {
            Problem: _problem_handler,
            HTTPException: _http_error_handler,
            Exception: _bug_handler,
            DisconnectedError: _disconnect_handler,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        paths = {route.path for route in routes}
        return Middleware(app, guard, self._limits, self._metrics, paths, log)

    # Requests are parsed in a thread: of a large JSON schema, LLGuidance takes up to seconds, and lets others run.

    async def _openai_answer(self, parse_request: OpenAIParser, chat: bool, request: Request) -> Response:
        body = await self._parse_body(request)
        model_request = await run_in_threadpool(parse_request, body, self._model, self._limits)
        return await self._answer(request, model_request, replies.Reply(self._model, chat, model_request.include_usage))

    async def _respond(self, request: Request) -> Response:
        body = await self._parse_body(request)
        model_request = await run_in_threadpool(responses.parse, body, self._model, self._limits)
        return await self._answer(request, model_request, responses.Reply(self._model, body, model_request))

    async def _ollama_answer(self, parse_request: OllamaParser, chat: bool, request: Request) -> Response:
        body = await self._parse_body(request)
        reply = ollama.Reply(ollama.parse_model(body, self._model), chat)
        if ollama.only_loads(body):
            return JSONResponse(reply.loaded())
        return await self._answer(request, await run_in_threadpool(parse_request, body, self._limits), reply)

    async def _answer(self, request: Request, model_request: ModelRequest, reply: Reply) -> Response:
        events = self._supervisor.answer(model_request)
        if not model_request.stream:
            return _AnswerResponse(reply.complete(await unless_disconnected(request, collect(events))))
        # Wait for the first event before sending the status, so that an invalid request gets its own.
        first_event = await unless_disconnected(request, anext(events))
        return AnswerStream(self._stream(first_event, events, reply), events, reply.media_type)

    async def _stream(
        self, first_event: Event, events: AsyncGenerator[dict[str, Any], None], reply: Reply
    ) -> AsyncGenerator[bytes, None]:
        yield reply.start() + reply.chunk(first_event)
        event = first_event
        try:
            async for event in events:
                yield reply.chunk(event)
        except Problem as problem:
            yield reply.error(problem)
            return
        yield reply.end(event)

    async def _parse_body(self, request: Request) -> dict[str, Any]:
        return parse(await read_body(request, self._limits), self._limits)

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse(replies.model_list(self._model, self._created))

    async def _get_model(self, request: Request) -> Response:
        if not requests.is_name_of(request.path_params["name"], self._model):
            raise Problem(404, f"This server has the model {self._model!r} only.", code="model_not_found")
        return JSONResponse(replies.model(self._model, self._created))

    async def _ollama_version(self, _: Request) -> Response:
        return JSONResponse({"version": ollama.VERSION})

    async def _ollama_models(self, _: Request) -> Response:
        return JSONResponse(ollama.model_list(self._manifest, self._created))

    async def _ollama_loaded_models(self, _: Request) -> Response:
        return JSONResponse(ollama.loaded_models(self._manifest, self._created, self._supervisor.ready))

    async def _ollama_model(self, request: Request) -> Response:
        ollama.parse_model(await self._parse_body(request), self._model)
        return JSONResponse(ollama.model_details(self._manifest, self._supervisor.ready.get("context", 0)))

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


async def _problem_handler(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(problem, request.scope["path"])


async def _http_error_handler(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    not_found = "There is no such path; OpenAI's API is under /v1, Ollama's under /api."
    if request.scope["path"].startswith(("/v1/", "/api/")):
        not_found = "This server does not have this part of the API."
    message = "This path does not support the method." if error.status_code == 405 else not_found
    response = problem_response(Problem(error.status_code, message), request.scope["path"])
    response.headers.update(error.headers or {})  # Allow: the methods of the path
    return response


async def _bug_handler(request: Request, error: Exception) -> Response:
    problem = Problem(500, "This is a bug in llava-edge; the server's log has the details.")
    return problem_response(problem, request.scope["path"])


async def _disconnect_handler(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's "client closed request", for the log
