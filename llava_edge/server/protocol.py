"""uvicorn's HTTP/1.1 protocol with the timeouts it lacks: for request headers and for clients that stop reading."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_edge.server.limits import Limits


def protocol_class(limits: Limits) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn that enforces `limits`."""

    class LimitedProtocol(H11Protocol):
        """Closes connections of clients that are too slow, and those beyond the limit."""

        def connection_made(self, transport: Any) -> None:
            self._head_timer: asyncio.TimerHandle | None = None
            self._stall_timer: asyncio.TimerHandle | None = None
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._head_timer = self.loop.call_later(limits.head_seconds, self._close_idle)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                _cancel(self._head_timer)
                self._head_timer = None
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.head_seconds, self._close_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head_timer)
            _cancel(self._stall_timer)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_stall_timer(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            _cancel(self._stall_timer)
            super().resume_writing()

        def _start_stall_timer(self, unsent: int) -> None:
            """Abort the connection unless the client reads something within `stall_seconds`."""
            self._stall_timer = self.loop.call_later(limits.stall_seconds, self._check_stall, unsent)

        def _check_stall(self, previous: int) -> None:
            unsent = self.transport.get_write_buffer_size()
            if unsent < previous:
                self._start_stall_timer(unsent)
            else:
                self.transport.abort()

        def _close_idle(self) -> None:
            self._head_timer = None
            if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return LimitedProtocol


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
