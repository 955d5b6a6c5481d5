"""`llava-edge run`: answer questions about images; answers are streamed to stdout."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.arguments import (
    ImageCommand,
    answer_options,
    check_options,
    constrain,
    generation_options,
    image_path,
    load_model_and_images,
    options_from,
    read_stdin,
)
from llava_edge.cli.terminal import report_unused_kernels, show, show_json, status_line
from llava_edge.cli.types import FILE_NAME
from llava_edge.errors import DataError, MissingError, UsageError
from llava_edge.options import DEFAULT_PROMPT

if TYPE_CHECKING:
    from llava_edge.options import Options, Result
    from llava_edge.runtimes.jobs import Stream


@click.command(cls=ImageCommand)
@click.option(
    "--image",
    "images",
    type=FILE_NAME,
    multiple=True,
    metavar="FILE",
    help="Image to ask about (-: stdin); repeatable.",
)
@click.option("--prompt", "prompts", multiple=True, default=[DEFAULT_PROMPT], metavar="TEXT",
              help="Question to ask (-: stdin); repeatable.")  # fmt: skip
@answer_options
@generation_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print each answer as a JSON object on one line, with timings and memory."
)
def run(
    images: tuple[str, ...],
    prompts: tuple[str, ...],
    system: str,
    json_schema: str | None,
    grammar: str | None,
    as_json: bool,
    model: str,
    **shared: Any,
) -> None:
    """Answer questions about images.

    \b
    llava-edge run --image photo.jpg
    llava-edge run --image a.jpg --image b.jpg --prompt "What is different?"
    llava-edge run --image photo.jpg --prompt "What is this?" --prompt "What colour is it?"
    llava-edge run --image photo.jpg --json-schema item.json
    curl -s URL | llava-edge run --image - --prompt "What is this?" --json
    """
    options, engine = options_from(shared)
    options = constrain(options, json_schema, grammar)
    prompts = _prompt_texts(prompts, images)
    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.machine import process_start
    from llava_edge.store import resolve

    started = process_start()
    bundle = Bundle.open(resolve(model))
    if not images and prompts == (DEFAULT_PROMPT,):
        raise UsageError("There is no image to describe; give one with --image, or a question with --prompt.")
    with load_model_and_images(bundle, engine, options, images, _image_source) as (llava, pictures):
        if sys.stderr.isatty() or shared["preset"] != "auto" or shared["verbose"]:
            click.echo(f"device: {llava.device}; preset: {llava.preset}", err=True)
        report_unused_kernels(llava.device)
        check_options(llava, options, json_schema, grammar)
        activity, failed = "Looking at the image" if images else "Reading", 0
        streams = llava.ask_many(prompts, pictures, options, system=system, started=started)
        for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True), 1):
            asked = {"images": images, "prompt": prompt}
            try:
                result = _print_answer(stream, activity, quiet=as_json)
            except UsageError as error:  # a grammar that allows no next token
                if len(prompts) == 1:
                    raise
                failed += 1
                sentence = f"Question {number}: {error}"
                click.echo(sentence, err=True)
                if as_json:  # a line for each question
                    show_json({**asked, "error": sentence})
            else:
                if as_json:
                    show_json({**asked, **asdict(result)})
                elif result.finish_reason == "length":
                    _report_cut(result, options)
        if failed:
            raise UsageError(f"{failed} of {len(prompts)} questions got no answer.")


def _report_cut(result: Result, options: Options) -> None:
    context_full = result.completion_tokens < options.max_tokens
    reason = "the context is full; see --context" if context_full else "--max-tokens reached"
    click.echo(f"(cut off after {result.completion_tokens} tokens: {reason})", err=True)


def _print_answer(stream: Stream, activity: str, quiet: bool) -> Result:
    final, has_output = None, False
    try:
        # Closing the stream stops the model, for example when stdout is a closed pipe.
        with closing(stream), status_line(activity) as status:
            status(None)
            for chunk in stream:
                status.clear()
                final = chunk.final
                if not quiet:
                    has_output = True
                    show(chunk.text)
    finally:
        if has_output:
            click.echo()
    assert final is not None
    return final


def _prompt_texts(prompts: tuple[str, ...], images: tuple[str, ...]) -> tuple[str, ...]:
    if [*prompts, *images].count("-") > 1:
        raise UsageError("Standard input can be read only once, but '-' is given more than once.")
    texts = tuple(map(_prompt_text, prompts))
    if not images and not all(text.strip() for text in texts):
        raise UsageError("The prompt is empty; give a question with --prompt.")
    return texts


def _prompt_text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        text = read_stdin().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The prompt on standard input is not UTF-8: {error.reason}.") from error
    if not text.strip():
        raise UsageError("The prompt on standard input is empty.")
    return text


def _image_source(name: str) -> str | bytes:
    if name == "-":
        return read_stdin()
    path = image_path(name)
    try:
        is_pipe = Path(path).is_fifo()
    except OSError:  # name too long
        is_pipe = False
    if is_pipe:
        raise MissingError(f"{path} is a pipe, not an image file; pipe the image into this command with --image -.")
    return path
