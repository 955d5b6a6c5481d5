"""`llava-edge batch`: ask one question about each of many images. One line on stdout for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from llava_edge.cli.arguments import generation_options, options_from
from llava_edge.cli.run import grammar_text
from llava_edge.cli.terminal import printable, show, status_line, suggest_native_build
from llava_edge.errors import (
    CannotCreateError,
    ContextOverflowError,
    DataError,
    ImageError,
    MissingError,
    UsageError,
)
from llava_edge.options import DEFAULT_PROMPT, result_of
from llava_edge.outputs import check_output, storage_errors
from llava_edge.paths import exists, expand_path

if TYPE_CHECKING:
    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.jobs import Stream

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")  # of image_format.ACCEPTED, in a folder

Record = dict[str, Any]

_START = b'{"image": '  # of each line of an output file


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, metavar="TEXT", help="Question about each image.")
@click.option("--system", default="", metavar="TEXT", help="System prompt, instead of the model's own.")
@click.option("--json-schema", metavar="FILE", help="JSON schema that answers must follow.")
@click.option("--grammar", metavar="FILE", help="GBNF grammar (llama.cpp's) that answers must follow.")
@generation_options
@click.option("--json", "as_json", is_flag=True, help="Print each answer as a JSON object, with timings and memory.")
@click.option(
    "--output",
    metavar="FILE",
    help="Append JSON objects to this file instead, and skip images that it answers already.",
)
def batch(
    paths: tuple[str, ...],
    prompt: str,
    system: str,
    json_schema: str | None,
    grammar: str | None,
    as_json: bool,
    output: str | None,
    model: str,
    **shared: Any,
) -> None:
    """Ask one question about each of many images.

    A PATH is an image, or a folder of which all images are taken, those in folders inside it too.

    \b
    llava-edge batch photos
    llava-edge batch a.jpg b.png --prompt "What colour is it?"
    llava-edge batch photos --output captions.jsonl
    """
    options, engine = options_from(shared)
    options = replace(options, grammar=grammar_text(json_schema, grammar))
    if not prompt.strip():
        raise UsageError("The prompt is empty; give a question with --prompt.")
    images = [image for path in paths for image in _find_images(Path(expand_path(path)))]
    from llava_edge.api import Llava
    from llava_edge.bundle import Bundle
    from llava_edge.store import resolve

    bundle = Bundle.open(resolve(model))
    report = _Report(as_json, Path(expand_path(output)) if output else None, prompt, bundle)
    waiting = [image for image in images if not report.has(image)]
    if len(waiting) < len(images):
        click.echo(f"({len(images) - len(waiting)} of {len(images)} images are answered in {output} already)", err=True)
    if not waiting:
        return
    with status_line("Loading the model") as status:
        llava = Llava.load(bundle.folder, engine, on_load=status)
    with llava, report:
        suggest_native_build(llava.device)
        streams = llava.ask_each(waiting, prompt, options, system=system)
        for number, (image, stream) in enumerate(zip(waiting, streams, strict=True)):
            with status_line(f"Image {number + 1} of {len(waiting)}") as status:
                status(number / len(waiting))
                record = _read_answer(stream)
            report.add(image, record)
    if report.failed:
        raise DataError(f"{report.failed} of {len(waiting)} images could not be used.")


def _find_images(path: Path) -> Iterator[Path]:
    """Yield the path itself, or the images in a folder in order of their names. Raises `MissingError` without any."""
    if not exists(path):
        raise MissingError(f"{path} does not exist.")
    if not path.is_dir():
        yield path
        return
    found = False
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found = True
                yield Path(folder, name)
    if not found:
        suffixes = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise MissingError(f"There are no images in {path}: no file in it ends in {suffixes}.")


def _read_answer(stream: Stream) -> Record:
    try:
        return asdict(result_of(stream))
    except (ImageError, MissingError, ContextOverflowError) as error:
        return {"error": str(error)}


class _Report:
    """Where answers go: to stdout, or to a file of JSON lines, in which the answers of earlier runs are kept.

    Raises `CannotCreateError` or `DataError` if the file is unsuitable.
    """

    def __init__(self, as_json: bool, path: Path | None, prompt: str, bundle: Bundle) -> None:
        self.failed = 0
        self._as_json = as_json
        self._prompt = prompt
        self._answered: set[Path] = set()
        self._path = path
        self._file: BinaryIO | None = None
        self._size = 0  # of what is kept of the file
        if path is not None:
            check_output(path, bundles=[bundle.folder])
            if path.exists() and not path.is_file():
                raise CannotCreateError(f"{path} is not a regular file, to which answers could be added.")
            for record, size in _read_records(path) if path.exists() else ():
                self._size += size
                if (record.get("prompt"), record.get("model")) == (prompt, bundle.manifest.name) and "text" in record:
                    self._answered.add(Path(record["image"]).absolute())

    def has(self, image: Path) -> bool:
        """Whether the file has an answer about an image, of the same model to the same prompt."""
        return image.absolute() in self._answered

    def add(self, image: Path, record: Record) -> None:
        """Report the answer about an image, or its error."""
        if "error" in record:
            self.failed += 1
            click.echo(record["error"], err=True)
        if self._as_json or self._file:
            name = str(image)
            is_utf8 = not any("\udc80" <= mark <= "\udcff" for mark in name)  # else escaped, as JSON allows
            line = json.dumps({"image": name, "prompt": self._prompt, **record}, ensure_ascii=not is_utf8)
            with storage_errors(self._path) if self._path else nullcontext():
                click.echo(line.encode(), self._file)
        elif "text" in record:
            show(f"{printable(str(image))}\t{' '.join(record['text'].split())}\n")

    def __enter__(self) -> _Report:
        if self._path:
            with storage_errors(self._path):
                self._file = self._path.open("ab", buffering=0)
                self._file.truncate(self._size)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def _read_records(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the records of earlier runs and their sizes in bytes, but no incomplete last one. Raises `DataError`."""
    with storage_errors(path):
        *lines, rest = path.read_bytes().split(b"\n")
    if rest[: len(_START)] == _START[: len(rest)]:  # cut off when the disk was full, or the power gone
        rest = b""
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        record = _parse(line)
        if record is None or number > len(lines):
            raise DataError(f"{path} is not a file that 'llava-edge batch' wrote: see line {number}.")
        yield record, len(line) + 1


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("image"), str) else None
