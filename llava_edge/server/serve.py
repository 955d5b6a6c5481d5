"""The server from its settings to its end: sockets, the child, uvicorn."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llava_edge import python, store
from llava_edge.bundle import Bundle
from llava_edge.errors import MissingError, UnavailableError, UsageError, install
from llava_edge.options import EngineOptions
from llava_edge.server import guard
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import Metrics
from llava_edge.server.supervisor import Supervisor
from llava_edge.server.votes import VoteLog
from llava_edge.templates import template

if TYPE_CHECKING:
    import uvicorn

MIN_KEY = 16  # characters
GRACE_SECONDS = 1  # that answers get to end when the server is stopped, and then their clients to be told


@dataclass(frozen=True)
class Settings:
    """host: an address; another one than loopback needs a key, or `no_key`. port 0 takes a free one.

    key: what clients must send as `Authorization: Bearer KEY`. allowed_hosts: further names the server is known by.
    allowed_origins: origins whose pages may use the API.
    Raises `UsageError`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str = ""
    no_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.key and (len(self.key) < MIN_KEY or not self.key.isascii() or not self.key.isprintable()):
            raise UsageError(f"The API key must have at least {MIN_KEY} printable ASCII characters.")
        if not guard.is_loopback(self.host) and not self.key and not self.no_key:
            raise UsageError(
                f"--host {self.host} can be reached from other machines, so a key is needed: put one into "
                "$LLAVA_EDGE_API_KEY or a file for --api-key-file (or give --insecure-no-key)."
            )


def serve(bundle: Bundle, options: EngineOptions, settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until a signal. `say` gets lines for the person who started it.

    Raises `UnavailableError` when an address is taken, the extra is missing or this is a frozen app, or what loading
    the model raises.
    """
    python.refuse_frozen("The server")
    if not all(find_spec(name) for name in ("starlette", "uvicorn")):
        raise UnavailableError(f"The server needs an extra. {install('serve')}")
    with ExitStack() as bound:
        sockets = [bound.enter_context(each) for each in _bind(settings.host, settings.port, say)]
        asyncio.run(_serve(bundle, options, settings, sockets, say))


async def _serve(
    bundle: Bundle, options: EngineOptions, settings: Settings, sockets: list[socket.socket], say: Callable[[str], None]
) -> None:
    import uvicorn

    from llava_edge.server.app import App
    from llava_edge.server.protocol import protocol_class

    port = sockets[0].getsockname()[1]
    hosts = guard.hosts(settings.host, port, settings.allowed_hosts)
    limits = settings.limits
    metrics = Metrics()
    supervisor = Supervisor(bundle, options, limits, metrics.count_answer)
    manifest = bundle.manifest
    vote_log = VoteLog(store.home() / "log" / "votes.jsonl", manifest.name, template(manifest.template))
    pages = guard.origins(settings.allowed_origins)
    door = guard.Guard(hosts, settings.key, settings.allowed_hosts, pages)
    app = App(manifest.name, supervisor, vote_log, limits, metrics).asgi(door, say)
    config = uvicorn.Config(
        app,
        http=protocol_class(limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2 * GRACE_SECONDS,
        h11_max_incomplete_event_size=limits.head,
    )
    try:
        await supervisor.start()
        say(f"{manifest.name} on http://{guard.bracketed(settings.host)}:{port} (Ctrl-C ends it)")
        await _ending(supervisor)(config).serve(sockets=sockets)
    finally:
        # uvicorn raises Ctrl-C once more when it is done, which cancels whatever is awaited next.
        closing = asyncio.ensure_future(supervisor.close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            raise


def _ending(supervisor: Supervisor) -> type[uvicorn.Server]:
    """uvicorn's server, which would break off with tracebacks what does not end in time: here it is told before."""
    import uvicorn

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, supervisor.stop)
            await super().shutdown(sockets)

    return Ending


def _bind(host: str, port: int, say: Callable[[str], None]) -> list[socket.socket]:
    """Sockets for the address; for 127.0.0.1 one for ::1 too, where it exists, since `localhost` may mean either."""
    try:
        first = _bound(host, port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnavailableError(f"{host} port {port} cannot be used: {reason}. Choose another --port.") from error
    if host != "127.0.0.1":
        return [first]
    try:
        return [first, _bound("::1", first.getsockname()[1])]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            port = first.getsockname()[1]
            say(f"[::1] port {port} is another program's, which gets what is sent to `localhost` where that is ::1.")
        return [first]


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio leaves TCP_NODELAY off: each answer on a kept connection then came 40 ms late.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # two can be bound to one address. Who connects now waits for the model
    except BaseException:
        bound.close()
        raise
    return bound


def read_key(file: Path | None, environment: str) -> str:
    """The key from a file or the environment.

    Raises `UsageError` when both give one or the file is no key, `MissingError` if it cannot be read.
    """
    if file is None:
        return environment
    if environment:
        raise UsageError("There is a key in $LLAVA_EDGE_API_KEY and one in --api-key-file; give one of them.")
    try:
        key = file.read_text("utf-8").strip()
    except OSError as error:
        raise MissingError(f"The key file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{file} cannot be read as a key file: it is not UTF-8.") from error
    if not key:
        raise UsageError(f"{file} is empty; a key was expected in it.")
    return key
