"""`llava-edge batch`: ask one question about each of many images. One line on stdout for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.arguments import answer_options, check_options, constrain, generation_options, options_from
from llava_edge.cli.terminal import json_line, printable, report_unused_kernels, show, show_json, status_line
from llava_edge.cli.types import FILE_NAME
from llava_edge.errors import (
    CannotCreateError,
    ContextOverflowError,
    DataError,
    ImageError,
    MissingError,
    UsageError,
)
from llava_edge.locks import lock_file
from llava_edge.options import DEFAULT_PROMPT, Options, result_of
from llava_edge.outputs import check_output, storage_errors
from llava_edge.paths import denied, exists, expand_path

if TYPE_CHECKING:
    from llava_edge.api import Llava
    from llava_edge.runtimes.jobs import Stream

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")  # of image_format.ACCEPTED, in a folder
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl")  # of pictures too, whose errors say so

Record = dict[str, Any]

_START = b'{"image": '  # of each line of an output file


@click.command()
@click.argument("paths", nargs=-1, required=True, type=FILE_NAME, metavar="PATH...")
@click.option("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="Question about each image.")
@answer_options
@generation_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print each answer as a JSON object on one line, with timings and memory."
)
@click.option(
    "--output",
    type=FILE_NAME,
    metavar="FILE",
    help="Append JSON objects to this file instead of printing, and skip images that it answers already.",
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

    A PATH is an image, or a folder of which all images are taken, those in folders inside it too. Hidden files are left
    out, and links to folders inside it are not followed.

    \b
    llava-edge batch photos
    llava-edge batch a.jpg b.png --prompt "What colour is it?"
    llava-edge batch photos --output captions.jsonl
    """
    options, engine = options_from(shared)
    options = constrain(options, json_schema, grammar)
    if output == "-":
        raise UsageError("--output is '-', but it takes a file; --json prints the objects on stdout.")
    if not prompt.strip():
        raise UsageError("The prompt is empty; give a question with --prompt.")
    unreadable: list[OSError] = []
    images = [image for path in paths for image in _find_images(Path(expand_path(path)), unreadable)]
    for error in unreadable:
        click.echo(f"{printable(str(error.filename))} cannot be read: {error.strerror}.", err=True)
    from llava_edge.api import Llava
    from llava_edge.bundle import Bundle
    from llava_edge.store import resolve

    bundle = Bundle.open(resolve(model))
    asked = prompt, bundle.manifest.name
    with _AnswerFile(Path(expand_path(output)), bundle.folder) if output else nullcontext() as file:
        waiting = [image for image in images if not (file and file.has(image, *asked))]
        if len(waiting) < len(images):
            count = f"{len(images) - len(waiting)} of {len(images)}"
            click.echo(f"({count} images are answered in {output} already)", err=True)
        report = _Report(as_json, prompt, file)
        if waiting:
            with status_line("Loading the model") as status:
                llava = Llava.load(bundle.folder, engine, on_load=status)
            with llava:
                check_options(llava, options, json_schema, grammar)
                report_unused_kernels(llava.device)
                _ask(llava, waiting, prompt, system, options, report)
    problems = [f"{report.failed} of {len(waiting)} images got no answer"] if report.failed else []
    problems += [f"{len(unreadable)} of the folders could not be read"] if unreadable else []
    if problems:
        raise DataError(f"{' and '.join(problems)}.")


def _ask(llava: Llava, images: list[Path], prompt: str, system: str, options: Options, report: _Report) -> None:
    streams = llava.ask_each(images, prompt, options, system=system)
    for number, (image, stream) in enumerate(zip(images, streams, strict=True)):
        with status_line(f"Image {number + 1} of {len(images)}") as status:
            status(number / len(images))
            record = _read_answer(image, stream)
        report.add(image, record)


def _find_images(path: Path, unreadable: list[OSError]) -> Iterator[Path]:
    """Yield the path itself, or the images in a folder in order of their names. Raises `MissingError` without any.

    unreadable: gets an error for each folder that cannot be read.
    """
    if not exists(path):
        problem = "cannot be read: Permission denied" if denied(path) else "does not exist"
        raise MissingError(f"{path} {problem}.")
    if not path.is_dir():
        yield path
        return
    errors: list[OSError] = []
    found = False
    for folder, subfolders, names in os.walk(path, onerror=errors.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES + UNREAD_SUFFIXES) and not name.startswith("."):
                found = True
                yield Path(folder, name)
    unreadable += errors
    if not (found or errors):
        suffixes = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise MissingError(f"There are no images in {path}: no file in it ends in {suffixes}.")


def _read_answer(image: Path, stream: Stream) -> Record:
    try:
        return asdict(result_of(stream))
    except (ImageError, MissingError) as error:  # which name the image
        return {"error": str(error)}
    except (ContextOverflowError, UsageError) as error:  # too many tiles; a grammar that allows no next token
        return {"error": f"{printable(str(image))}: {error}"}


class _Report:
    """Where answers go: to stdout, or to a file."""

    def __init__(self, as_json: bool, prompt: str, file: _AnswerFile | None) -> None:
        self.failed = 0
        self._as_json = as_json
        self._prompt = prompt
        self._file = file

    def add(self, image: Path, record: Record) -> None:
        """Report the answer about an image, or its error."""
        if "error" in record:
            self.failed += 1
            click.echo(record["error"], err=True)
        if self._file:
            line = json_line({"image": str(image.absolute()), "prompt": self._prompt, **record})
            self._file.add(line.encode() + b"\n")
        elif self._as_json:
            show_json({"image": str(image), "prompt": self._prompt, **record})
        elif "text" in record:
            show(f"{printable(str(image))}\t{' '.join(record['text'].split())}\n")


class _AnswerFile:
    """A file of JSON lines, to which one run at a time adds answers. Those of earlier runs are kept.

    Raises `CannotCreateError` or `DataError` if the file is unsuitable, `StorageError` if it cannot be read or written.
    """

    def __init__(self, path: Path, bundle: Path) -> None:
        check_output(path, bundles=[bundle], appended=True)
        if path.exists() and not path.is_file():
            raise CannotCreateError(f"{path} is not a regular file, to which answers could be added.")
        self._path = path
        with storage_errors(path):
            self._file = path.open("a+b", buffering=0)
        try:
            lock_file(self._file, wait=False)
            with storage_errors(path):
                self._file.seek(0)
                *lines, rest = self._file.readall().split(b"\n")
                self._answered = {_identity(record) for record in _parse(path, lines, rest) if "text" in record}
                self._file.truncate(self._file.tell() - len(rest))
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise CannotCreateError(f"Another llava-edge is adding answers to {path}; let it end first.") from error
            raise

    def has(self, image: Path, prompt: str, model: str) -> bool:
        """Whether it has an answer of this model to this prompt about an image."""
        return _identity({"image": str(image), "prompt": prompt, "model": model}) in self._answered

    def add(self, line: bytes) -> None:
        """Write a line at the end."""
        with storage_errors(self._path):
            while line:  # a nearly full disk takes a part of it before it fails
                line = line[self._file.write(line) :]

    def __enter__(self) -> _AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _identity(record: Record) -> tuple[Path, str, str]:
    image = Path(record["image"]).absolute()
    return _real(image.parent) / image.name, str(record.get("prompt")), str(record.get("model"))


@cache
def _real(folder: Path) -> Path:
    """The one name of a folder that has others, by `..` and links."""
    return Path(os.path.realpath(folder))


def _parse(path: Path, lines: list[bytes], rest: bytes) -> Iterator[Record]:
    """Yield the records of earlier runs. Raises `DataError`.

    rest: a line that was cut off, when the disk was full, say; empty if none was.
    """
    for number, line in enumerate(lines, 1):
        record = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not (isinstance(record, dict) and isinstance(record.get("image"), str)):
            raise _not_ours(path, number)
        yield record
    if rest[: len(_START)] != _START[: len(rest)]:
        raise _not_ours(path, len(lines) + 1)


def _not_ours(path: Path, line: int) -> DataError:
    return DataError(f"{path} is not a file that 'llava-edge batch' wrote: see line {line}.")
