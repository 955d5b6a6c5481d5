"""uvicorn's HTTP/1.1 with the time limits it lacks: for a request's head, and for a client that stops reading."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_edge.server.limits import Limits


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """A protocol class with these limits."""

    class Limited(H11Protocol):
        """A connection that is closed when its client is too slow, or is one too many."""

        def connection_made(self, transport: Any) -> None:
            self._head: asyncio.TimerHandle | None = None
            self._stall: asyncio.TimerHandle | None = None
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._head = self.loop.call_later(limits.head_seconds, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                _stop(self._head)
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.head_seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._head)
            _stop(self._stall)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            _stop(self._stall)
            super().resume_writing()

        def _watch(self, waiting: int) -> None:
            """Look again later; unless something was read until then, give up."""
            self._stall = self.loop.call_later(limits.stall_seconds, self._look, waiting)

        def _look(self, before: int) -> None:
            waiting = self.transport.get_write_buffer_size()
            if waiting < before:
                self._watch(waiting)
            else:
                self.transport.abort()

        def _too_slow(self) -> None:
            self._head = None
            if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return Limited


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
