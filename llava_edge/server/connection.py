"""One client's connection: its body, its going away, and answers streamed to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem

T = TypeVar("T")


class DisconnectedError(Exception):
    """The client disconnected."""


class AnswerStream(StreamingResponse):
    """A streamed answer. Closes `events`, which its `lines` are made from, however the response ends."""

    def __init__(
        self, lines: AsyncGenerator[bytes, None], events: AsyncGenerator[dict[str, Any], None], media_type: str
    ) -> None:
        headers = {"X-Accel-Buffering": "no"}  # or an nginx proxy buffers the events
        super().__init__(lines, headers=headers, media_type=media_type)
        self._lines = lines
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._lines):
            await super().__call__(scope, receive, send)


async def read_body(request: Request, limits: Limits) -> bytes:
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
        raise DisconnectedError from None
    if size > limits.body:
        raise Problem(413, f"The body has {size} bytes; at most {limits.body} are accepted.")
    return b"".join(parts)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects. Raises `DisconnectedError`."""
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
        raise DisconnectedError from None


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(events: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    async with aclosing(events):
        return [event async for event in events]
