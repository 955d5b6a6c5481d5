"""Shared by several commands: click options, their conversion to option dataclasses, and loading."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.terminal import status_line
from llava_edge.cli.types import FILE_NAME, MODEL
from llava_edge.errors import DataError, MissingError, UnavailableError, UsageError, import_problem
from llava_edge.options import DEVICES, KV_TYPES, PRESETS, SPECULATE, EngineOptions, Options
from llava_edge.paths import expand_path, is_file
from llava_edge.runtimes.machine import allowed_cpus
from llava_edge.store import DEFAULT_MODEL

if TYPE_CHECKING:
    from llava_edge.api import Llava
    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.pictures import Picture

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

MAX_STDIN_BYTES = 1 << 28  # as for image files

_SAMPLING_HELP = {
    "max_tokens": "Maximum number of tokens in an answer.",
    "temperature": "Sampling temperature (0: greedy).",
    "top_p": "Sample from the smallest set of tokens with this total probability.",
    "top_k": "Sample from this many of the likeliest tokens (0: all).",
    "min_p": "Sample from tokens at least this likely relative to the likeliest.",
    "repeat_penalty": "Penalty for tokens already in the answer, such as 1.1 (1: none).",
    "seed": "Random seed; a new one each time if omitted.",
    "image_tokens": "Maximum number of tokens per image (0: all); fewer are faster.",
}
system_option = click.option(
    "--system", default="", show_default=False, metavar="TEXT", help="System prompt, instead of the model's own."
)


def engine_options(command: Command) -> Command:
    """Add the model and the engine options; the command receives them as keyword arguments."""
    options: list[Decorator] = [
        click.option(
            "--model", type=MODEL, default=DEFAULT_MODEL, metavar="NAME|DIR", help="Model name or bundle folder."
        ),
        click.option("--device", type=click.Choice(DEVICES), default="auto", help="Device to compute on."),
        click.option("--threads", type=int, default=0, help="Number of threads (0: one per physical core)."),
        click.option(
            "--context",
            type=int,
            default=0,
            help="Context length in tokens (0: the model's, at most 4096, or 2048 with --preset memory).",
        ),
        click.option(
            "--preset",
            type=click.Choice(PRESETS),
            default="auto",
            help="latency: copy weights into a faster order where that pays; memory: only memory-map them, and keep a "
            "smaller KV cache.",
        ),
        click.option(
            "--kv",
            type=click.Choice(KV_TYPES),
            default="auto",
            help="KV cache type (auto: f16, or q8_0 with --preset memory).",
        ),
        click.option("--cache/--no-cache", default=True, help="Cache what is computed from images."),
        click.option(
            "--draft",
            type=FILE_NAME,
            metavar="FILE",
            help="Draft model for speculative decoding: a small GGUF with the same vocabulary.",
        ),
        click.option("--verbose", is_flag=True, help="Show the engines' logs on stderr."),
    ]
    return _apply_options(command, options)


def generation_options(command: Command) -> Command:
    """Add the engine and sampling options; the command receives them as keyword arguments."""
    options: list[Decorator] = [
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; repeatable."),
        click.option(
            "--speculate",
            type=click.Choice(SPECULATE),
            default="auto",
            help="Propose tokens from earlier text and verify them: same answer, often sooner.",
        ),
    ]
    defaults = Options()
    for name, text in _SAMPLING_HELP.items():
        value = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        kind = int if value is None else type(value)
        options.append(click.option(flag, type=kind, default=value, help=text))
    return engine_options(_apply_options(command, options))


def answer_options(command: Command) -> Command:
    """Add the system prompt and what answers must follow; the command receives them as keyword arguments."""
    options: list[Decorator] = [
        system_option,
        click.option("--json-schema", type=FILE_NAME, metavar="FILE", help="JSON schema that answers must follow."),
        click.option(
            "--grammar",
            type=FILE_NAME,
            metavar="FILE",
            help="Grammar that answers must follow: GBNF, or Lark with %llguidance.",
        ),
    ]
    return _apply_options(command, options)


def _apply_options(command: Command, options: list[Decorator]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def options_from(values: dict[str, Any]) -> tuple[Options, EngineOptions]:
    """Take the shared values out of a command's keyword arguments. Raises `UsageError` on a bad one."""
    sampling = Options(
        stop=values["stop"], speculate=values["speculate"], **{name: values[name] for name in _SAMPLING_HELP}
    )
    return sampling, engine_options_from(values)


def engine_options_from(values: dict[str, Any]) -> EngineOptions:
    """Take the engine options out of them; warn on stderr about too many threads. Raises `UsageError` on a bad one."""
    engine = EngineOptions(**{field.name: values[field.name] for field in fields(EngineOptions)})
    if engine.draft:
        engine = replace(engine, draft=expand_path(values["draft"]))
    if engine.threads > (processors := len(allowed_cpus())):
        slow = f"{engine.threads} threads on {processors} processors wait for each other"
        click.echo(f"({slow} and take many times as long; use fewer, or omit --threads)", err=True)
    return engine


def constrain(options: Options, json_schema: str | None, grammar: str | None) -> Options:
    """Options with the grammar that answers must follow, if there is one. Raises `DataError` for an unusable file."""
    if json_schema is not None and grammar is not None:
        raise UsageError("--json-schema and --grammar cannot be combined; give one of them.")
    if grammar is not None:
        with _blame(grammar):
            return replace(options, grammar=_read_text(grammar, "--grammar"))
    if json_schema is None:
        return options
    from llava_edge.json_schema.grammar import from_schema

    try:
        with _blame(json_schema):
            return replace(options, grammar=from_schema(json.loads(_read_text(json_schema, "--json-schema"))))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{json_schema} is not JSON ({error}); expected a JSON schema.") from error


def check_options(llava: Llava, options: Options, json_schema: str | None, grammar: str | None) -> None:
    """Raise `UsageError` for options that suit no question to this model, `DataError` if it is the grammar's file."""
    llava.check_options(replace(options, grammar=""))
    with _blame(json_schema or grammar or ""):
        llava.check_options(options)


@contextmanager
def _blame(file: str) -> Iterator[None]:
    """Turn what is wrong with a file's content into `DataError`."""
    try:
        yield
    except UsageError as error:
        raise DataError(f"{file} cannot be used. {error}") from error


def _read_text(name: str, flag: str) -> str:
    path = Path(expand_path(name))
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingError(f"{flag} names {name!r}, which does not exist.") from error
    except OSError as error:
        raise MissingError(f"{flag} names {name!r}, which cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{flag} names {name!r}, which cannot be read: it is not UTF-8.") from error
    if not text.strip():
        raise DataError(f"{flag} names {name!r}, which is empty.")
    return text


class ImageCommand(click.Command):
    """A command that suggests --image and --prompt for unexpected arguments."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            if is_file(rest[0]):
                raise click.UsageError(
                    f"Unexpected argument {rest[0]!r}; for an image, use --image {shlex.quote(rest[0])}.", ctx
                )
            raise click.UsageError(
                f"Unexpected argument {rest[0]!r}; give images with --image and questions with --prompt.", ctx
            )
        return rest


def square_option(text: str) -> Decorator:
    """The option for how a checkpoint was trained to make pictures square."""
    return click.option("--square", type=click.Choice(["pad", "crop"]), help=text)


@contextmanager
def require_extra(extra: str, action: str) -> Iterator[None]:
    """Turn a failed import of one of our extras into `UnavailableError`. `action` begins the sentence."""
    try:
        yield
    except ImportError as error:
        package = error.name if isinstance(error, ModuleNotFoundError) else f"the extra [{extra}]"
        raise UnavailableError(f"{action} needs {package}, which {import_problem(error, extra)}") from error


@contextmanager
def load_model_and_images(
    bundle: Bundle, engine: EngineOptions, options: Options, names: Sequence[str], source: Callable[[str], str | bytes]
) -> Iterator[tuple[Llava, list[Picture]]]:
    """Load the model, and meanwhile read and encode the pictures that `source` gives for names, each name once."""
    from llava_edge.api import Llava
    from llava_edge.runtimes.pictures import apply_token_budget, check_budget, prepare

    check_budget(options, bundle.manifest)
    read = cache(lambda name: apply_token_budget(prepare(source(name), bundle.manifest), options, bundle.manifest))
    with status_line("Loading the model") as status:
        llava = Llava.load(bundle.folder, engine, pictures=[partial(read, name) for name in names], on_load=status)
    with llava:
        yield llava, [read(name) for name in names]


def image_path(name: str) -> str:
    """Resolve the path given by --image, as in `chat`. Raises `UsageError` if it is empty."""
    path = expand_path(name)
    if not path.strip():
        raise UsageError(f"--image is {name!r}; expected the path of an image.")
    return path


def read_stdin() -> bytes:
    """Read standard input, for `-`. Raises `UsageError` if nothing is piped in, `DataError` if it is too long."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("'-' reads standard input, but nothing is piped in.")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise DataError(f"Standard input has more than {MAX_STDIN_BYTES} bytes.")
    return data
