"""The process with the model: reads requests from a socket and answers them, each in a thread of its own.

Lines of JSON both ways; images follow their request as raw bytes. Nothing is pickled, so that a child compromised by an
image can send its parent nothing but text.

parent -> child  {"id", "messages", "options", "images": [sizes]} + bytes;  {"cancel": id}
child -> parent  {"ready": {"device", "context", "load_ms", "parallel"}};  {"failed": {"kind", "message"}}
                 {"id", "received"};  {"id", "text", "chances"};  the last one has "result", or is
                 {"id", "error": {"kind", "message"}}
"""

from __future__ import annotations

import contextlib
import io
import json
import os
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


def main(link: socket.socket, bundle: str, options: EngineOptions, max_pixels: int) -> None:
    """Entry point of the spawned process. Runs until the parent closes the link."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the parent decides
        signal.signal(signal_number, signal.SIG_IGN)
    lines = link.makefile("rb")
    writer = _EventWriter(link)
    try:
        from llava_edge.runtimes import probe

        probe.require_working_build()  # starts a program, which the sandbox forbids
        sandbox.enter(Path(bundle), options.device, options.draft)
        from llava_edge.api import Llava  # only now: numpy starts threads, which must be confined too

        # Not on disk: clients' images leave no trace there, and a compromised child cannot leave a llama.cpp state
        # behind that the user's next program would load.
        options = replace(options, cache="memory" if options.cache else False)
        with Llava.load(Path(bundle), options) as llava:
            sandbox.limit_memory()
            facts = {"device": llava.device, "context": llava.context, "load_ms": llava.load_ms}
            writer.send({"ready": {**facts, "parallel": llava.parallel}})
            _Worker(llava, lines, writer, max_pixels).run()
    except LlavaEdgeError as error:
        writer.send({"failed": {"kind": type(error).__name__, "message": str(error)}})
    os._exit(0)  # the parent waits for it; there is nothing to clean up


class _EventWriter:
    """Writes events to the parent, ignoring that it may have exited."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lock = threading.Lock()

    def send(self, value: dict[str, Any]) -> None:
        line = json.dumps(value).encode("ascii") + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self._link.sendall(line)


class _Worker:
    """Reads the link in this thread, so that cancelling takes effect at once, and answers each request in another."""

    def __init__(self, llava: Llava, lines: io.BufferedReader, writer: _EventWriter, max_pixels: int) -> None:
        self._llava = llava
        self._lines = lines
        self._writer = writer
        self._max_pixels = max_pixels
        self._cancels: dict[int, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Run until the parent closes the link, and all answers have ended."""
        with contextlib.suppress(OSError, ValueError):  # the parent was killed, ValueError: in mid-line
            while line := self._lines.readline():
                self._receive(json.loads(line))
        for cancel in list(self._cancels.values()):
            cancel.set()
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join()

    def _receive(self, request: dict[str, Any]) -> None:
        if "cancel" in request:
            if cancel := self._cancels.get(request["cancel"]):
                cancel.set()
            return
        images = [self._lines.read(size) for size in request["images"]]
        self._writer.send({"id": request["id"], "received": True})
        self._cancels[request["id"]] = threading.Event()
        thread = threading.Thread(target=self._answer_or_fail, args=(request, images), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._send_error(request, MemoryLimitError.__name__, "")
            del self._cancels[request["id"]]
            return
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]

    def _answer_or_fail(self, request: dict[str, Any], images: list[bytes]) -> None:
        try:
            self._answer(request, images, self._cancels[request["id"]])
        except LlavaEdgeError as error:
            self._send_error(request, type(error).__name__, str(error))
        except Exception as error:  # noqa: BLE001 - the client gets no details, and the child keeps running
            self._send_error(request, type(error).__name__, "")
        del self._cancels[request["id"]]

    def _answer(self, request: dict[str, Any], images: list[bytes], cancel: threading.Event) -> None:
        from llava_edge.image import pixel_count

        if sum(map(pixel_count, images)) > self._max_pixels:
            raise ImageError(
                f"The images have more than {self._max_pixels} pixels in total; send fewer or smaller ones."
            )
        messages = [Message(**message) for message in request["messages"]]
        options = Options(**request["options"] | {"stop": tuple(request["options"]["stop"])})
        for chunk in self._llava.answer(messages, images, options, cancel=cancel):
            self._writer.send({"id": request["id"], **_event(chunk)})

    def _send_error(self, request: dict[str, Any], kind: str, message: str) -> None:
        self._writer.send({"id": request["id"], "error": {"kind": kind, "message": message}})


def _event(chunk: Chunk) -> dict[str, Any]:
    event: dict[str, Any] = {"text": chunk.text, "chances": [_logprobs(chance) for chance in chunk.chances]}
    if chunk.final is not None:
        event["result"] = asdict(chunk.final) | {"text": ""}
    return event


def _logprobs(chance: TokenChance) -> list[Any]:
    return [list(chance.token), chance.logprob, [[list(token), logprob] for token, logprob in chance.top]]
