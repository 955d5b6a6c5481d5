"""A stream of chunks for asyncio: read in a thread of its own, and stopped when its reader leaves."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from llava_edge.options import Chunk, Result, result_of
from llava_edge.runtimes.jobs import Stream
from llava_edge.runtimes.worker import start_thread


async def collect_result(stream: AsyncGenerator[Chunk, None]) -> Result:
    async with aclosing(stream) as chunks:
        return result_of([chunk async for chunk in chunks])


async def stream_in_thread(
    start: Callable[[threading.Event], Stream], wait_for_end: bool = False
) -> AsyncGenerator[Chunk, None]:
    """Read a stream in its own thread. wait_for_end: after an early exit, wait until the stream has ended.

    The last chunk is delivered after the stream has ended: a caller that stops there, whose generator Python closes
    later, then finds its turn kept.
    """
    import asyncio  # 20 ms, not needed by the command line

    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    cancel = threading.Event()

    def put(item: Chunk | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed and nobody is waiting
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def pump() -> None:
        last: Chunk | None = None
        try:
            for chunk in start(cancel):
                if chunk.final is None:
                    put(chunk)
                else:
                    last = chunk
        except Exception as error:  # noqa: BLE001 - raised again in the event loop
            put(error)
        if last is not None:
            put(last)
        put(None)

    start_thread(threading.Thread(target=pump, name="llava-edge stream", daemon=True))
    ended = False
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
        ended = True
    finally:
        cancel.set()
        while wait_for_end and not ended:
            ended = await queue.get() is None
