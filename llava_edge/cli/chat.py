"""`llava-edge chat`: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from llava_edge.cli.arguments import (
    ImageCommand,
    generation_options,
    image_path,
    load_model_and_images,
    options_from,
    system_option,
)
from llava_edge.cli.terminal import report_unused_kernels, show, status_line
from llava_edge.cli.types import FILE_NAME


@click.command(cls=ImageCommand)
@click.option(
    "--image", "images", type=FILE_NAME, multiple=True, metavar="FILE", help="Image for the first question; repeatable."
)
@system_option
@generation_options
def chat(images: tuple[str, ...], system: str, model: str, **shared: Any) -> None:
    """Chat about images. /image FILE adds one, /help lists all commands, Ctrl-C stops an answer.

    \b
    llava-edge chat --image photo.jpg
    """
    options, engine = options_from(shared)
    from llava_edge.bundle import Bundle
    from llava_edge.repl import Repl
    from llava_edge.store import resolve

    with load_model_and_images(Bundle.open(resolve(model)), engine, options, images, image_path) as (llava, pictures):
        click.echo(f"{llava.bundle.manifest.name} on {llava.device}. /help lists the commands.", err=True)
        report_unused_kernels(llava.device)
        repl = Repl(llava.chat(system, options), show, _busy)
        repl.add(pictures, list(images))
        repl.run()


@contextmanager
def _busy(activity: str) -> Iterator[Callable[[], None]]:
    with status_line(activity) as status:
        status(None)
        yield status.clear
