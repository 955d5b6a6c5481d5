"""A real `llava-edge serve` process for the tests, and plain HTTP to talk to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ROOM = 1 << 14  # positions of the fixture `talkative`
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """A server that runs. `log` is what it says on stderr."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        """(status, headers, body) of one request on a connection of its own. `body`: bytes, or sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, data, {**given, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def chat(self, body: object, headers: dict[str, str] | None = None) -> Answer:
        """`request` where a conversation goes on."""
        return self.request("POST", "/v1/chat/completions", body, headers)

    def ask(self, text: str = "What colour?", images: tuple[bytes, ...] = (), **more: Any) -> dict[str, Any]:
        """The answer to a question, which must succeed."""
        status, _, body = self.chat(question(text, images, **more))
        assert status == 200, (body, self.log.read_text()[-3000:])
        found: dict[str, Any] = json.loads(body)
        return found

    def text(self, *arguments: Any, **more: Any) -> str:
        """The text of `ask`."""
        content = self.ask(*arguments, **more)["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content

    def raw(self, data: bytes, timeout: float = 20) -> bytes:
        """Everything the server says to these bytes until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 20), b""))

    def start(self, body: dict[str, Any]) -> socket.socket:
        """Send a request and return the connection, nothing read from it."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(self.post + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return connection

    @property
    def post(self) -> bytes:
        """The head of a request, without its end and length."""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        return head.encode() + b"Content-Type: application/json\r\n"

    def health(self) -> dict[str, Any]:
        """What /health says."""
        found: dict[str, Any] = json.loads(self.request("GET", "/health")[2])
        return found

    def metric(self, name: str) -> float:
        """A value of /metrics by its name and labels."""
        text = self.request("GET", "/metrics")[2].decode()
        return float(re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[0])

    def child(self) -> int:
        """Process id of the child with the model, once there is one."""
        self.wait_until(lambda: len(self._children()) == 1)
        return self._children()[0]

    def _children(self) -> list[int]:
        own = self.process.pid
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == own and b"spawn_main" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def wait_until(self, condition: Any, seconds: float = 20.0) -> float:
        """Seconds until `condition()` is true; fails after `seconds`."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, self.log.read_text()[-400:]
            time.sleep(0.02)
        return time.monotonic() - start


def question(text: str = "What colour?", images: tuple[bytes, ...] = (), **more: Any) -> dict[str, Any]:
    """The body of a request."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]
    content = [*parts, {"type": "text", "text": text}] if images else text
    return {"model": "micro", "messages": [{"role": "user", "content": content}], "max_tokens": 16, **more}


def image_question(source: object) -> dict[str, Any]:
    """The body of a request with `source` as its image_url."""
    content = [{"type": "image_url", "image_url": source}]
    return question() | {"messages": [{"role": "user", "content": content}]}


def data_url(data: bytes, kind: str = "png") -> str:
    """A picture as clients send it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (20, 14)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def running(
    bundle: Path,
    folder: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    first: tuple[str, ...] = (),
    limits: str = "",
) -> Iterator[Server]:
    """Start a server on a free port; stop it with SIGTERM. Skips where the extra is not installed.

    first: folders that Python looks for modules in before all others. limits: arguments of `Limits` instead of the
    command line's.
    """
    pytest.importorskip("starlette", reason="the extra [serve] is not installed")
    pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
    log = folder / "server.log"
    paths = os.pathsep.join([*first, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "LLAVA_EDGE_HOME": str(folder / "home"), "PYTHONPATH": paths, **(environment or {})}
    settings.pop("PYTEST_CURRENT_TEST", None)  # may contain a key, for which tests search the environment
    program = ["-c", _PATCHED.format(limits=limits)] if limits else ["-m", "llava_edge"]
    command = [sys.executable, *program, "serve", "--model", str(bundle), "--port", "0", "--device", "cpu"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--threads", "1", *options], stderr=stderr, cwd=folder, env=settings)
    try:
        port = _port(process, log)
        yield Server(process, port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def read_all(connection: socket.socket) -> bytes:
    """The whole response, or the rest of a stream."""
    said = b""
    with connection:
        while part := connection.recv(65536):
            said += part
            head, end, body = said.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if (end and len(body) == int(length[1])) if length else said.endswith(b"0\r\n\r\n"):
                break
    return said


def wait_for_text(connection: socket.socket) -> socket.socket:
    """Wait for the first text of a stream. Returns the connection."""
    received = b""
    while b'"content":"' not in received.replace(b'"content":""', b""):
        part = connection.recv(65536)
        assert part, received
        received += part
    return connection


@contextlib.contextmanager
def paused(server: Server) -> Iterator[None]:
    """Nothing is computed meanwhile, so that no answer ends."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    child = server.child()
    os.kill(child, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            os.kill(child, signal.SIGCONT)


_PATCHED = """
from llava_edge.server import limits
class Changed(limits.Limits):
    def __init__(self, **given): super().__init__(**given | dict({limits}))
from llava_edge import cli
from llava_edge.server.limits import Limits
limits.Limits = Changed
cli.main()
"""


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    for _ in range(1200):
        if found := re.search(r"http://\S+:(\d+) ", log.read_text()):
            return int(found[1])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())
