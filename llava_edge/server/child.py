"""The process with the model: reads requests from one socket, answers them one by one on it.

Lines of JSON both ways; pictures follow their request as raw bytes. Nothing is pickled, so that a child which a
picture took over can send its parent nothing but text.

parent -> child  {"id", "messages", "options", "images": [sizes]} + bytes;  {"cancel": id}
child -> parent  {"ready": {"device", "context", "load_ms"}};  {"failed": {"kind", "message"}}
                 {"id", "text", "chances"};  the last one has "result", or is {"id", "error": {"kind", "message"}}
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import socket
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.errors import ImageError, LlavaEdgeError, MemoryLimitError
from llava_edge.options import Chunk, EngineOptions, Options, TokenChance
from llava_edge.prompt import Message
from llava_edge.server import sandbox

if TYPE_CHECKING:
    from llava_edge.api import Llava


def main(link: socket.socket, bundle: str, options: EngineOptions, pixels: int) -> None:
    """What the spawned process runs, until the parent closes the link."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    lines = link.makefile("rb")
    out = _Out(link)
    try:
        from llava_edge.runtimes import probe

        probe.require_working_build()  # starts a program, which nothing behind the next line can
        sandbox.enter(Path(bundle), options.device, options.draft)
        from llava_edge.api import Llava  # only now: numpy starts threads, and a thread keeps what it had before

        # Not on disk: what clients show leaves no trace there, and a child that a picture took over cannot leave a
        # state of llama.cpp behind that the next program of this user would load.
        options = replace(options, cache="memory" if options.cache else False)
        with Llava.load(Path(bundle), options) as llava:
            sandbox.limit_memory()
            out.send({"ready": {"device": llava.device, "context": llava.context, "load_ms": llava.load_ms}})
            _Worker(llava, lines, out, pixels).run()
    except LlavaEdgeError as error:
        out.send({"failed": {"kind": type(error).__name__, "message": str(error)}})
    # Not sys.exit: the thread that reads the link may be inside it.
    os._exit(0)


class _Out:
    """Writes events; the parent may be gone."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def send(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._link.sendall(json.dumps(value).encode("ascii") + b"\n")


class _Worker:
    """Answers requests in this thread while another one reads the link, so that a cancellation is seen at once."""

    def __init__(self, llava: Llava, lines: io.BufferedReader, out: _Out, pixels: int) -> None:
        self._llava = llava
        self._lines = lines
        self._out = out
        self._pixels = pixels
        self._asked: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]] | None] = queue.SimpleQueue()
        self._cancels: dict[int, threading.Event] = {}

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        while (asked := self._asked.get()) is not None:
            request, images = asked
            cancel = self._cancels[request["id"]]
            try:
                self._answer(request, images, cancel)
            except LlavaEdgeError as error:
                self._fail(request, type(error).__name__, str(error))
            except MemoryError:
                self._fail(request, MemoryLimitError.__name__, "")
            except Exception as error:  # noqa: BLE001 - the parent says so without details, and the child goes on
                self._fail(request, type(error).__name__, "")
            del self._cancels[request["id"]]

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the parent was killed, the latter within a line
            while line := self._lines.readline():
                self._take(json.loads(line))
        for event in list(self._cancels.values()):
            event.set()
        self._asked.put(None)

    def _take(self, request: dict[str, Any]) -> None:
        if "cancel" in request:
            if event := self._cancels.get(request["cancel"]):
                event.set()
            return
        images = [self._lines.read(size) for size in request["images"]]
        self._cancels[request["id"]] = threading.Event()
        self._asked.put((request, images))

    def _answer(self, request: dict[str, Any], images: list[bytes], cancel: threading.Event) -> None:
        from llava_edge.image import pixel_count

        if sum(map(pixel_count, images)) > self._pixels:
            raise ImageError(f"The images have more than {self._pixels} pixels together, the limit.")
        messages = [Message(**message) for message in request["messages"]]
        options = Options(**request["options"] | {"stop": tuple(request["options"]["stop"])})
        for chunk in self._llava.answer(messages, images, options, cancel=cancel):
            self._out.send({"id": request["id"], **_event(chunk)})

    def _fail(self, request: dict[str, Any], kind: str, message: str) -> None:
        self._out.send({"id": request["id"], "error": {"kind": kind, "message": message}})


def _event(chunk: Chunk) -> dict[str, Any]:
    said: dict[str, Any] = {"text": chunk.text, "chances": [_chance(chance) for chance in chunk.chances]}
    if chunk.final is not None:
        said["result"] = asdict(chunk.final) | {"text": ""}
    return said


def _chance(chance: TokenChance) -> list[Any]:
    return [list(chance.token), chance.logprob, [[list(token), logprob] for token, logprob in chance.top]]
