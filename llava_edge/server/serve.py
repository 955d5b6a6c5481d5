"""Start the server: sockets, the child process, uvicorn; and shut it down."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llava_edge import interpreter, store
from llava_edge.bundle import Bundle
from llava_edge.errors import DataError, MissingError, UnavailableError, UsageError, install_hint
from llava_edge.options import EngineOptions
from llava_edge.server import guard
from llava_edge.server.limits import Limits
from llava_edge.server.metrics import Metrics
from llava_edge.server.supervisor import Supervisor
from llava_edge.server.votes import VoteLog
from llava_edge.templates import get_template

if TYPE_CHECKING:
    import uvicorn

MIN_KEY_LENGTH = 16  # characters
GRACE_SECONDS = 1  # for answers to finish on shutdown, then again for telling the clients of the others
BACKLOG = 64  # connections that a listening socket accepts at once, before one beyond the limit can be closed
RESERVED_FILES = 2 * BACKLOG + 64  # beside those of connections


@dataclass(frozen=True)
class Settings:
    """host: an IP address; any but loopback requires a key, or `no_key`. port: 0 picks a free one.

    key: the API key, sent as `Authorization: Bearer KEY`. allowed_hosts: additional host names of the server.
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
        if self.key and not _is_key(self.key):
            raise UsageError(f"The API key must have at least {MIN_KEY_LENGTH} printable ASCII characters.")
        if not guard.is_loopback(self.host) and not self.key and not self.no_key:
            raise UsageError(
                f"--host {self.host} can be reached from other machines, so a key is needed: set $LLAVA_EDGE_API_KEY "
                "or --api-key-file (or pass --insecure-no-key)."
            )


def serve(bundle: Bundle, options: EngineOptions, settings: Settings, log: Callable[[str], None]) -> None:
    """Serve until a signal. `log` gets the lines to show on the terminal.

    Raises `UnavailableError` if the address is in use, the extra is missing or this is a frozen app, and whatever
    loading the model raises.
    """
    interpreter.refuse_frozen("The server")
    settings = replace(settings, limits=_within_descriptors(settings.limits))
    if not all(find_spec(name) for name in ("starlette", "uvicorn")):
        raise UnavailableError(f"The server needs the extra [serve]. {install_hint('serve')}")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every write to a client that has left
    with ExitStack() as stack:
        sockets = [stack.enter_context(listener) for listener in _listen(settings.host, settings.port, log)]
        asyncio.run(_serve(bundle, options, settings, sockets, log))


async def _serve(
    bundle: Bundle, options: EngineOptions, settings: Settings, sockets: list[socket.socket], log: Callable[[str], None]
) -> None:
    import uvicorn

    from llava_edge.server.app import App
    from llava_edge.server.protocol import protocol_class

    port = sockets[0].getsockname()[1]
    hosts = guard.accepted_hosts(settings.host, port, settings.allowed_hosts)
    limits = settings.limits
    metrics = Metrics()
    supervisor = Supervisor(bundle, options, limits, metrics.count_answer, log)
    manifest = bundle.manifest
    votes = None
    with suppress(MissingError):  # no home folder
        votes = store.home() / "log" / "votes.jsonl"
    vote_log = VoteLog(votes, manifest.name, get_template(manifest.template))
    allowed_origins = guard.parse_origins(settings.allowed_origins)
    access_guard = guard.Guard(hosts, settings.key, settings.allowed_hosts, allowed_origins)
    app = App(manifest, supervisor, vote_log, limits, metrics).asgi(access_guard, log)
    config = uvicorn.Config(
        app,
        backlog=BACKLOG,
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
        log(f"{manifest.name} on http://{guard.url_host(settings.host)}:{port} (Ctrl-C stops it)")
        await _graceful_server(supervisor)(config).serve(sockets=sockets)
    finally:
        # uvicorn raises the signal again when it is done, which cancels whatever is awaited next.
        close_task = asyncio.ensure_future(supervisor.close())
        try:
            await asyncio.shield(close_task)
        except asyncio.CancelledError:
            await close_task
            raise


def _within_descriptors(limits: Limits) -> Limits:
    """Fewer connections where the system allows too few open files for them; macOS gives 256 to who does not ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    wanted = limits.connections + RESERVED_FILES
    if soft < wanted:
        asked = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked, hard))
            soft = asked
    return replace(limits, connections=max(1, min(limits.connections, soft - RESERVED_FILES)))


def _graceful_server(supervisor: Supervisor) -> type[uvicorn.Server]:
    """uvicorn's server, but with unfinished answers ended by an error before uvicorn cancels them with tracebacks."""
    import uvicorn

    class GracefulServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, supervisor.reject_requests)
            await super().shutdown(sockets)

    return GracefulServer


def _listen(host: str, port: int, log: Callable[[str], None]) -> list[socket.socket]:
    """Listening sockets; for 127.0.0.1 also one on ::1, where it exists, since `localhost` may mean either."""
    try:
        first = _listening_socket(host, port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnavailableError(f"Cannot listen on {host} port {port}: {reason}. Choose another --port.") from error
    if host != "127.0.0.1":
        return [first]
    try:
        return [first, _listening_socket("::1", first.getsockname()[1])]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            port = first.getsockname()[1]
            log(f"Another program listens on [::1] port {port}; it gets requests to `localhost` where that means ::1.")
        return [first]


def _listening_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # IPPROTO_TCP explicitly, or asyncio leaves TCP_NODELAY off: answers on kept connections were 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # now, since two sockets can bind one address; clients that connect wait for the model
    except BaseException:
        listener.close()
        raise
    return listener


def read_key(file: Path | None, environment: str) -> str:
    """The API key from a file or from the environment.

    Raises `UsageError` if both are given, `MissingError` if the file cannot be read, `DataError` if it holds no key.
    """
    if file is None:
        return environment
    if environment:
        raise UsageError("Both $LLAVA_EDGE_API_KEY and --api-key-file give a key; give only one of them.")
    try:
        key = file.read_text("utf-8").strip()
    except OSError as error:
        raise MissingError(f"Cannot read the API key file {file}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"The API key file {file} is not UTF-8 text.") from error
    if not _is_key(key):
        raise DataError(f"The API key file {file} needs a key of at least {MIN_KEY_LENGTH} printable ASCII characters.")
    return key


def _is_key(text: str) -> bool:
    return len(text) >= MIN_KEY_LENGTH and text.isascii() and text.isprintable()
