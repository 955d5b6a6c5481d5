"""`llava-edge serve`: a server for this machine that speaks OpenAI's API and Ollama's, with a chat page."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from llava_edge.cli.arguments import engine_options, engine_options_from
from llava_edge.cli.terminal import is_writable, status_line
from llava_edge.errors import UsageError


@click.command()
@click.option(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on; other than loopback needs a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on (0: a free one).")
@click.option(
    "--api-key-file", type=Path, metavar="FILE", help="File with the clients' API key; or set $LLAVA_EDGE_API_KEY."
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Additional host name for this server; repeatable.")
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose pages may use the API, such as http://localhost:3000; repeatable.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 8),
    default=8,
    help="Maximum number of requests answered at a time (1 on a GPU and without the native kernels).",
)
@click.option("--queue", type=click.IntRange(1, 4096), default=16, help="Maximum number of waiting requests.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, help="Time limit per answer, in seconds.")
@click.option("--insecure-no-key", is_flag=True, help="Serve other machines without a key.")
@engine_options
def serve(
    host: str,
    port: int,
    api_key_file: Path | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    parallel: int,
    queue: int,
    timeout: float,
    insecure_no_key: bool,
    model: str,
    **shared: Any,
) -> None:
    """Serve a model: OpenAI's API under /v1, Ollama's under /api, chat page at /.

    Needs the extra [serve].

    \b
    llava-edge serve
    LLAVA_EDGE_API_KEY=... llava-edge serve --host 0.0.0.0 --allow-host box.local
    """
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout is {timeout}; expected a number of seconds.")
    engine = engine_options_from(shared)
    from llava_edge.bundle import Bundle
    from llava_edge.server.limits import Limits
    from llava_edge.server.serve import Settings, read_key
    from llava_edge.server.serve import serve as run
    from llava_edge.store import resolve

    # Removed from the environment, so that the model's process does not inherit it.
    key = read_key(api_key_file, os.environ.pop("LLAVA_EDGE_API_KEY", ""))
    limits = Limits(parallel=parallel, queue=queue, requests=max(64, 2 * queue), answer_seconds=timeout)
    host = "127.0.0.1" if host == "localhost" else host
    settings = Settings(host, port, key, insecure_no_key, allow_host, allow_origin, limits)
    bundle = Bundle.open(resolve(model))
    with status_line("Loading the model") as status:

        def say(line: str) -> None:
            status.clear()
            if is_writable(sys.stderr):
                click.echo(line, err=True)

        status(None)
        run(bundle, engine, settings, say)
