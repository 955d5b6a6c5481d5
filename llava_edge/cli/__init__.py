"""The `llava-edge` command: runs a subcommand and turns errors into one sentence and an exit code.

Each subcommand is a module of its own, imported on use. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn

import click

from llava_edge import __version__
from llava_edge.errors import (
    NO_THREAD,
    PYTHONS_NO_THREAD,
    LlavaEdgeError,
    MemoryLimitError,
    MissingError,
    OptionError,
    StorageError,
    is_out_of_memory,
    lacking_dependency,
)
from llava_edge.paths import is_file
from llava_edge.runtimes import limit_spinning

# Name -> one line of help. Static, so that --help imports no subcommand.
COMMANDS = {
    "run": "Answer questions about images.",
    "batch": "Ask one question about each of many images.",
    "chat": "Chat about images in the terminal.",
    "serve": "Serve a model: OpenAI's and Ollama's API, and a chat page.",
    "models": "List, pull or remove models.",
    "cache": "List or clear the image cache.",
    "info": "Show what a bundle, GGUF file or checkpoint contains.",
    "verify": "Check every byte of a bundle against its manifest.",
    "export": "Convert a LLaVA checkpoint into a bundle.",
    "train": "Train a LLaVA from a recipe.",
    "bench": "Measure speed and memory, stage by stage.",
    "eval": "Measure accuracy on held-out questions.",
    "doctor": "Check this machine and suggest fixes.",
}

# Command names of other tools -> ours.
SUGGESTIONS = {
    **dict.fromkeys(("list", "ls", "ps"), "models list"),
    **dict.fromkeys(("pull", "download", "get", "install"), "models pull"),
    **dict.fromkeys(("rm", "remove", "delete", "uninstall"), "models rm"),
    **dict.fromkeys(("ask", "describe", "generate"), "run"),
    **dict.fromkeys(("convert", "create", "quantize"), "export"),
    **dict.fromkeys(("caption", "tag", "each"), "batch"),
    "show": "info",
    "benchmark": "bench",
    "evaluate": "eval",
    "server": "serve",
}

# Options of other tools, mainly llama.cpp's -> ours; the first that the command has.
OPTION_SUGGESTIONS = {
    **dict.fromkeys(("--n-predict", "--num-predict", "--predict", "--max-new-tokens"), ("--max-tokens",)),
    **dict.fromkeys(("--ctx-size", "--num-ctx", "--n-ctx"), ("--context",)),
    **dict.fromkeys(("--gpu-layers", "--n-gpu-layers"), ("--device",)),
    **dict.fromkeys(("--cache-type-k", "--cache-type-v"), ("--kv",)),
    **dict.fromkeys(("--question", "--query", "--text"), ("--prompt",)),
    **dict.fromkeys(("--model-draft", "--draft-model"), ("--draft",)),
    "--temp": ("--temperature",),
    "--format": ("--json-schema", "--json"),
    "-m": ("--model",),
    "-i": ("--image",),
    "-p": ("--prompt", "--port"),
    "-o": ("--output",),
}

COMPLETE = "_LLAVA_EDGE_COMPLETE"  # set by the scripts with which click has shells complete commands
INTERRUPTED = 130
BROKEN_PIPE = 141  # exit code that shells report for a program killed by SIGPIPE


class _Group(click.Group):
    """Subcommands by name: the module `llava_edge.cli.NAME` has a click command called NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"llava_edge.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"There is no command {args[0]!r}{_suggestion(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _suggestion(name: str) -> str:
    if is_file(name):
        return f"; to ask about an image, run: llava-edge run --image {shlex.quote(name)}"
    from difflib import get_close_matches

    command = SUGGESTIONS.get(name) or next(iter(get_close_matches(name, COMMANDS, 1)), "")
    return f"; did you mean 'llava-edge {command}'?" if command else "; 'llava-edge --help' lists all commands."


def _unknown_option(error: click.NoSuchOption) -> str:
    known = {name for param in error.ctx.command.params for name in param.opts} if error.ctx else set()
    ours = next((name for name in OPTION_SUGGESTIONS.get(error.option_name, ()) if name in known), None)
    meant = " or ".join(map(repr, [ours] if ours else error.possibilities or []))
    return f"No such option {error.option_name!r}." + (f" Did you mean {meant}?" if meant else "")


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},  # inherited by all commands
)
@click.version_option(__version__, prog_name="llava-edge")
@click.pass_context
def cli(context: click.Context) -> None:
    """LLaVA on your own machine: an image and a question in, an answer out.

    \b
    llava-edge models pull smol
    llava-edge run --image photo.jpg --prompt "What is this?"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its exit code."""
    limit_spinning()
    _prepare_streams()
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, "llava-edge", COMPLETE, instruction))
    code = execute(sys.argv[1:] if arguments is None else arguments)
    if code in (INTERRUPTED, BROKEN_PIPE):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills the process
        # Engine threads may still be running C code, which finalizing the interpreter would crash.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
    _discard_unwritten_output()
    gc.freeze()  # or Python looks through all that modules made before it ends: a tenth of a short command
    sys.exit(code)


def execute(arguments: Sequence[str]) -> int:
    """Run the command line; print errors on stderr and return the exit code."""
    try:
        with cli.make_context("llava-edge", list(arguments)) as context:
            cli.invoke(context)
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.NoSuchOption as error:
        return _fail(_unknown_option(error), error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except OptionError as error:
        return _fail(f"--{error.field.replace('_', '-')} {error.problem}", error.exit_code)
    except LlavaEdgeError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if not _can_start_thread():  # OpenBLAS sends SIGINT when it cannot
            return _fail(NO_THREAD, MemoryLimitError.exit_code)
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not error.filename:  # of os.getcwd
            return _fail("The current folder was removed; change to another one.", MissingError.exit_code)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.", StorageError.exit_code)
    except Exception as error:  # noqa: BLE001 - a bug, reported with its traceback
        if is_out_of_memory(error):
            return _fail("Not enough memory.", MemoryLimitError.exit_code)
        if str(error) == PYTHONS_NO_THREAD:
            return _fail(NO_THREAD, MemoryLimitError.exit_code)
        if isinstance(error, ModuleNotFoundError) and (problem := lacking_dependency(error)):
            return _fail(str(problem), problem.exit_code)
        traceback.print_exc()
        return _fail("This is a bug in llava-edge; please report it with the lines above.", LlavaEdgeError.exit_code)


def _can_start_thread() -> bool:
    try:
        threading.Thread(target=bool).start()
    except RuntimeError:
        return False
    return True


def _fail(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"llava-edge: {' '.join(sentence.split())}", err=True)
    return code


def _discard_unwritten_output() -> None:
    """Drop what stdout refused: Python would try again at exit, print another error and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Replace characters that the terminal cannot show, and keep running without a readable stderr."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:  # closed by the parent process: keep later files from getting its descriptor
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _ClosedStdout()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        old, binary = sys.stdout, sys.stdout.buffer
        if isinstance(binary, io.RawIOBase):  # PYTHONUNBUFFERED: what a full disk did not take would be lost unsaid
            binary = io.BufferedWriter(binary)
        sys.stdout = _NamedStdout(binary, old.encoding, "replace", None, old.line_buffering, old.write_through)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process exits
    elif isinstance(sys.stderr, io.TextIOWrapper):
        stderr = _LossyStderr(sys.stderr.buffer, encoding=sys.stderr.encoding, errors="replace", line_buffering=True)
        sys.stderr = stderr  # the original stays open as sys.__stderr__


class _ClosedStdout(io.TextIOBase):
    """Stands in for a closed stdout: writing an answer to it is an error."""

    def write(self, text: str, /) -> int:
        raise OSError(errno.EBADF, "Standard output is closed")


class _NamedStdout(io.TextIOWrapper):
    """Standard output whose errors say so. That of a closed pipe stays a `BrokenPipeError`, by its number."""

    def write(self, text: str, /) -> int:
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _naming_stdout():
            super().flush()


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"Standard output cannot be written: {error.strerror}") from error


class _LossyStderr(io.TextIOWrapper):
    """Standard error that ignores failed writes: a full disk or a closed pipe there must not end the command."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()
