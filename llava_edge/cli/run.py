"""`llava-edge run`: questions about any number of images; the answers are streamed to stdout."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.arguments import AboutPictures, generation_options, options_from, picture_path, read_stdin
from llava_edge.cli.terminal import advise, show, status_line
from llava_edge.errors import DataError, MissingError, UsageError
from llava_edge.options import DEFAULT_PROMPT

if TYPE_CHECKING:
    from llava_edge.options import Result
    from llava_edge.runtimes.jobs import Stream


@click.command(cls=AboutPictures)
@click.option("--image", "images", multiple=True, metavar="FILE", help="Image to look at; may be repeated; - is stdin.")
@click.option("--prompt", "prompts", multiple=True, default=[DEFAULT_PROMPT], show_default=True, metavar="TEXT",
              help="The question; may be repeated; - is stdin.")  # fmt: skip
@generation_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object per answer, with timings and memory, each on a line."
)
def run(images: tuple[str, ...], prompts: tuple[str, ...], as_json: bool, model: str, **shared: Any) -> None:
    """Answer a question about images.

    \b
    llava-edge run --image photo.jpg
    llava-edge run --image a.jpg --image b.jpg --prompt "What is different?"
    llava-edge run --image photo.jpg --prompt "What is this?" --prompt "What colour is it?"
    curl -s URL | llava-edge run --image - --prompt "What is this?" --json
    """
    options, engine = options_from(shared)
    prompts = _prompt_texts(prompts, images)
    from llava_edge.api import Llava
    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.devices import process_start
    from llava_edge.runtimes.pictures import check_budget, limited, prepare
    from llava_edge.store import resolve

    started = process_start()
    # Images are read before the model is loaded: a wrong file name should not cost a wait.
    manifest = Bundle.open(resolve(model)).manifest
    check_budget(options, manifest)
    if not images and prompts == (DEFAULT_PROMPT,):
        raise UsageError("There is no image to describe: name one with --image, or ask something else with --prompt.")
    pictures = [limited(prepare(_image_source(image), manifest), options, manifest) for image in images]
    with status_line("Loading the model") as status:
        llava = Llava.load(model, engine, pictures=pictures, on_load=status)
    with llava:
        if sys.stderr.isatty() or shared["preset"] != "auto" or shared["verbose"]:
            click.echo(f"device: {llava.device}; preset: {llava.preset}", err=True)
        advise(llava.device)
        for stream in llava.ask_many(prompts, pictures, options, started=started):
            result = _answer(stream, "Looking at the image" if pictures else "Reading", quiet=as_json)
            if as_json:
                click.echo(json.dumps(asdict(result), ensure_ascii=False))
            elif result.finish_reason == "length":
                full = result.completion_tokens < options.max_tokens
                why = "the context is full, see --context" if full else "--max-tokens allows no more"
                click.echo(f"(cut off after {result.completion_tokens} tokens: {why})", err=True)


def _answer(stream: Stream, doing: str, quiet: bool) -> Result:
    final, shown = None, False
    try:
        # Whoever does not read on, because nobody reads the output, does not let the model go on either.
        with closing(stream), status_line(doing) as status:
            status(None)
            for chunk in stream:
                status.clear()
                final = chunk.final
                if not quiet:
                    shown = True
                    show(chunk.text)
    finally:
        if shown:
            click.echo()
    if final is None:
        raise RuntimeError("the stream ended without a result")
    return final


def _prompt_texts(prompts: tuple[str, ...], images: tuple[str, ...]) -> tuple[str, ...]:
    if [*prompts, *images].count("-") > 1:
        raise UsageError("Standard input can be read once, but '-' is given more than once.")
    return tuple(map(_prompt_text, prompts))


def _prompt_text(prompt: str) -> str:
    if prompt == "-":
        try:
            prompt = read_stdin().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"The prompt on standard input is not UTF-8: {error.reason}.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty; give a question with --prompt.")
    return prompt


def _image_source(name: str) -> str | bytes:
    if name == "-":
        return read_stdin()
    path = picture_path(name)
    try:
        piped = Path(path).is_fifo()
    except OSError:  # a name that is too long
        piped = False
    if piped:
        raise MissingError(f"{path} is a pipe, not a picture file; pipe the picture into this command with --image -.")
    return path
