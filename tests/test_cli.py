"""The command line: answers on stdout, one sentence for every error, clean ends on Ctrl-C and broken pipes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import gguf
import pytest
from conftest import Run
from PIL import Image
from processes import largest_file, with_mounts

from llava_edge import cli, interpreter, store
from llava_edge.bundle import LANGUAGE, MANIFEST, PROJECTOR, Bundle
from llava_edge.cli.types import MODEL
from llava_edge.errors import NO_THREAD
from llava_edge.models.micro import CONFIG, write_checkpoint
from llava_edge.options import DEFAULT_PROMPT, Result
from llava_edge.runtimes import machine

ROOT = Path(__file__).parent.parent
LIGHT = ("--device", "cpu", "--threads", "1")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def start(*arguments: str | Path, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llava_edge", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


# Help.


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name: str, run: Run) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: llava-edge {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_every_default(name: str) -> None:
    group = click.Context(cli.cli, **cli.cli.context_settings)
    command = cli.cli.get_command(group, name)
    assert command
    options = [option for option in command.params if isinstance(option, click.Option) and not option.is_flag]
    with_default = [option for option in options if isinstance(option.default, int | float | str | list)]
    context = click.Context(command, group)
    silent = [option for option in with_default if "default: " not in str(option.get_help_record(context))]
    assert [option.name for option in silent if option.default != ""] == []


def test_no_command_shows_help(run: Run) -> None:
    assert run() == run("--help") == (0, run("--help")[1], "")
    for name, text in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", run()[1], re.MULTILINE)


# run


def test_the_answer_is_on_stdout_and_nothing_else(micro_bundle: Path, photo: Path, run: Run) -> None:
    code, out, err = run("run", "--model", micro_bundle, "--image", photo, *LIGHT, "--max-tokens", "8")
    assert (code, err) == (0, "(cut off after 8 tokens: --max-tokens reached)\n")
    assert out.endswith("\n")
    _, json_out, _ = run("run", "--model", micro_bundle, "--image", photo, *LIGHT, "--max-tokens", "8", "--json")
    assert json.loads(json_out)["text"] + "\n" == out


def test_an_answer_that_the_context_ends_says_so(micro_bundle: Path, run: Run) -> None:
    code, _, err = run("run", "--model", micro_bundle, *LIGHT, "--prompt", "hello", "--context", "120")
    assert code == 0
    assert re.fullmatch(r"\(cut off after \d+ tokens: the context is full; see --context\)\n", err)


def test_json_has_the_documented_fields(micro_bundle: Path, photo: Path, run: Run) -> None:
    images = ("--image", photo, "--image", photo)
    code, out, _ = run("run", "--model", micro_bundle, *images, *LIGHT, "--max-tokens", "8", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found.pop("images"), found.pop("prompt")) == ([str(photo)] * 2, DEFAULT_PROMPT)
    assert list(found) == [item.name for item in fields(Result)]
    assert list(found) == ["text", "finish_reason", "model", "device", "image_tokens", "prompt_tokens",
                           "completion_tokens", "cache", "timings", "memory", "cached_tokens",
                           "drafted_tokens", "accepted_tokens", "seed"]  # fmt: skip
    assert list(found["timings"]) == ["load_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms",
                                      "decode_tokens_per_s", "total_ms", "image_ms", "project_ms"]  # fmt: skip
    assert list(found["memory"]) == ["peak_rss_bytes", "private_bytes", "file_bytes"]
    assert found["image_tokens"] == 2 * json.loads((micro_bundle / MANIFEST).read_text())["vision"]["image_tokens"]
    assert (found["device"], found["cache"], found["finish_reason"]) == ("cpu", "miss", "length")
    assert found["timings"]["ttft_ms"] > found["timings"]["prefill_ms"] > 0


SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


def test_answers_of_a_form(micro_bundle: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "item.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "form.gbnf").write_text('root ::= ("yes" | "no") "!"')
    ask = ("run", "--model", micro_bundle, "--prompt", "A colour?", *LIGHT)
    code, out, err = run(*ask, "--json-schema", f"'{tmp_path / 'item.json'}'")
    assert (code, json.loads(out)["colour"] in ("red", "blue")) == (0, True), err
    (tmp_path / "item.json").write_text(json.dumps(SCHEMA), "utf-8-sig")  # as some editors write it
    assert run(*ask, "--json-schema", tmp_path / "item.json")[:2] == (0, out)
    code, out, err = run(*ask, "--grammar", tmp_path / "form.gbnf")
    assert (code, out in ("yes!\n", "no!\n")) == (0, True), err
    assert run(*ask, "--max-tokens", 8)[1] not in ("yes!\n", "no!\n")


@pytest.mark.parametrize(
    ("flag", "content", "code", "says"),
    [
        ("--json-schema", None, 66, "which does not exist"),
        ("--json-schema", b"", 65, "which is empty"),
        ("--json-schema", b"\xff", 65, "not UTF-8"),
        ("--json-schema", b"{", 65, "is not JSON"),
        ("--json-schema", b"[" * 100_000, 65, "is not JSON"),
        ("--json-schema", b'{"properties": {"a": {"pattern": "(x"}}}', 65, "at '#/properties/a' has a pattern"),
        ("--grammar", None, 66, "which does not exist"),
        ("--grammar", b" \n", 65, "which is empty"),
        ("--grammar", b'root ::= "x', 65, "form cannot be used. llama.cpp cannot parse the grammar (unexpected end of"),
        ("--grammar", b'foo ::= "x"', 65, "form cannot be used. llama.cpp cannot parse the grammar; expected GBNF"),
        ("--grammar", b"(" * 300, 65, "form cannot be used. The grammar has parentheses nested deeper"),
        ("--grammar", b"x" * (1 << 20), 65, "form cannot be used. grammar must be a string of at most"),
    ],
)
def test_a_form_that_is_none(
    flag: str, content: bytes | None, code: int, says: str, micro_bundle: Path, photo: Path, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "form"
    if content is not None:
        file.write_bytes(content)
    found, out, err = run("run", "--model", micro_bundle, "--image", photo, flag, file, *LIGHT)
    assert (found, out) == (code, ""), err
    assert says in err
    assert "Traceback" not in err


def test_a_form_is_one_file(tmp_path: Path, run: Run) -> None:
    code, _, err = run("run", "--prompt", "?", "--grammar", tmp_path, "--json-schema", tmp_path)
    assert (code, "give one of them" in err) == (2, True)
    code, _, err = run("run", "--prompt", "?", "--grammar", tmp_path)
    assert (code, "cannot be read: Is a directory" in err) == (66, True)


def test_a_system_text_stands_before_every_question(micro_bundle: Path, run: Run) -> None:
    common = ("run", "--model", micro_bundle, *LIGHT, "--prompt", "a", "--prompt", "b", "--max-tokens", "4", "--json")
    plain, longer = (
        [json.loads(line)["prompt_tokens"] for line in run(*common, *extra)[1].splitlines()]
        for extra in ((), ("--system", "Answer in one word. " * 20))
    )
    assert len(plain) == len(longer) == 2
    assert all(more > less + 20 for less, more in zip(plain, longer, strict=True))


def test_a_drawn_answer_is_repeated_with_its_seed(micro_bundle: Path, run: Run) -> None:
    common = ("run", "--model", micro_bundle, *LIGHT, "--prompt", "hi", "--max-tokens", "12", "--temperature", "1")
    drawn = [json.loads(run(*common, "--json")[1]) for _ in range(4)]
    assert len({answer["text"] for answer in drawn}) > 1
    again = json.loads(run(*common, "--json", "--seed", str(drawn[0]["seed"]))[1])
    assert (again["text"], again["seed"]) == (drawn[0]["text"], drawn[0]["seed"])


def test_several_questions_are_answered_in_their_order(micro_bundle: Path, photo: Path, run: Run) -> None:
    common = ("run", "--model", micro_bundle, "--image", photo, *LIGHT, "--max-tokens", "8")
    alone = [run(*common, "--prompt", question) for question in ("What?", "Where?")]
    assert alone[0] != alone[1]
    both = run(*common, "--prompt", "What?", "--prompt", "Where?")
    assert both == (0, alone[0][1] + alone[1][1], alone[0][2] + alone[1][2])
    _, out, err = run(*common, "--prompt", "What?", "--prompt", "Where?", "--json")
    assert err == ""
    texts = [json.loads(line)["text"] + "\n" for line in out.splitlines()]
    assert texts == [answer for _, answer, _ in alone]
    code, out, err = run(*common, "--prompt", "What?", "--prompt", "where " * 600)
    assert (code, out) == (2, "")
    assert "Question 2" in err
    code, out, err = run(*common, "--prompt", "where " * 600)
    assert (code, out) == (2, "")
    assert "Question" not in err


@pytest.mark.usefixtures("second_answer_runs_dry")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_question_that_its_grammar_ends_does_not_stop_the_others(
    as_json: bool, micro_bundle: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "form.gbnf").write_text('root ::= "abc"')
    questions = [part for text in "xyz" for part in ("--prompt", text)]
    common = ("run", "--model", micro_bundle, *LIGHT, *questions, "--grammar", tmp_path / "form.gbnf")
    code, out, err = run(*common, *["--json"] * as_json)
    says = "Question 2: The model has no token that the grammar, or JSON schema, allows next."
    assert (code, err) == (2, f"{says}\nllava-edge: 1 of 3 questions got no answer.\n")
    if as_json:
        first, second, third = map(json.loads, out.splitlines())
        assert (first["text"], second["error"], third["text"]) == ("abc", says, "abc")
        assert [line["prompt"] for line in (first, second, third)] == ["x", "y", "z"]
    else:
        assert re.fullmatch(r"abc\na?b?c?\nabc\n", out)


def test_a_grammar_that_cannot_be_parsed_is_said_once(micro_bundle: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "form.gbnf").write_text('root ::= "x')
    common = ("run", "--model", micro_bundle, *LIGHT, "--prompt", "a", "--prompt", "b")
    code, out, err = run(*common, "--grammar", tmp_path / "form.gbnf")
    assert (code, out, err.count("\n")) == (65, "", 1)
    assert "form.gbnf cannot be used. llama.cpp cannot parse the grammar" in err


def test_a_picture_alone_is_a_question(micro_bundle: Path, photo: Path, run: Run) -> None:
    common = ("run", "--model", micro_bundle, "--image", photo, *LIGHT, "--max-tokens", "2", "--json")
    alone, more = (json.loads(run(*common, "--prompt", text)[1])["prompt_tokens"] for text in ("", "Why?"))
    assert alone < more


def test_the_device_is_named_where_it_is_of_interest(micro_bundle: Path, run: Run) -> None:
    common = ("run", "--model", micro_bundle, "--prompt", "hi", "--threads", "1", "--json")
    assert run(*common)[2] == ""
    code, _, err = run(*common, "--preset", "memory")
    assert code == 0
    assert re.fullmatch(r"device: [^.]*; preset: memory \(asked for\)\n", err)


def test_more_threads_than_processors_are_said_to_be_slow(
    micro_bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_edge.cli.arguments.allowed_cpus", lambda: {0, 3})
    common = ("run", "--model", micro_bundle, "--prompt", "hi", "--max-tokens", "1", "--json", "--threads")
    assert run(*common, "2")[2] == ""
    code, _, err = run(*common, "3")
    assert (code, err.count("\n")) == (0, 1)
    assert "3 threads on 2 processors wait for each other" in err


class _Stdin:
    """Standard input with bytes in it."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_dash_is_stdin(micro_bundle: Path, photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("run", "--model", micro_bundle, *LIGHT, "--max-tokens", "8")
    wanted = run(*common, "--image", photo, "--prompt", "What?")
    assert wanted[0] == 0
    monkeypatch.setattr("sys.stdin", _Stdin(photo.read_bytes()))
    assert run(*common, "--image", "-", "--prompt", "What?") == wanted
    for mark in (b"", b"\xef\xbb\xbf"):  # which editors write before UTF-8
        monkeypatch.setattr("sys.stdin", _Stdin(mark + b"What?"))
        assert run(*common, "--image", photo, "--prompt", "-") == wanted


def test_a_pipe_in_place_of_a_picture(micro_bundle: Path, tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run("run", "--model", micro_bundle, "--image", tmp_path / "pipe")
    assert code == 66
    assert "pipe the image into this command with --image -." in err


def test_pictures_are_found_as_people_name_them(
    micro_bundle: Path, photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    common = ("run", "--model", micro_bundle, *LIGHT, "--max-tokens", "2", "--image")
    wanted = run(*common, photo)
    assert wanted[0] == 0
    for name in ("~/photo.png", photo.as_uri(), f"'{photo}'"):
        assert run(*common, name) == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    assert run("chat", "--model", micro_bundle, *LIGHT, "--max-tokens", "2", "--image", "~/photo.png")[0] == 0


# Every bad input: its exit code, and one sentence with this part in it. {} is the micro bundle.
BAD: list[tuple[list[str], int, str]] = [
    (["nonsense"], 2, "nonsense"),
    (["rnu"], 2, "llava-edge run"),
    (["list"], 2, "llava-edge models list"),
    (["ps"], 2, "llava-edge models list"),
    (["pull", "smol"], 2, "llava-edge models pull"),
    (["rm", "smol"], 2, "llava-edge models rm"),
    ([__file__], 2, f"llava-edge run --image {shlex.quote(__file__)}"),
    (["run", __file__], 2, f"use --image {shlex.quote(__file__)}."),
    (["chat", __file__], 2, f"use --image {shlex.quote(__file__)}."),
    (["run", "What is this?" * 99], 2, "questions with --prompt"),
    (["run", "--model", "{}", "--image", ""], 2, "--image is ''"),
    (["chat", "--model", "{}", "--image", " "], 2, "--image is ' '"),
    (["run", "--model", "{}", "--draft", ""], 2, "--draft is ''"),
    (["run", "--model", "{}", "--draft", "x" * 300, "--prompt", "hi"], 66, "There is no draft model xxx"),
    (["run", "--nonsense"], 2, "--nonsense"),
    (["run", "--model", "{}"], 2, "--image"),
    (["train", "{}/vision.onnx"], 65, "is not a training recipe"),
    (["run", "--max-tokens", "many"], 2, "many"),
    (["run", "--model", "{}", "--max-tokens", "0"], 2, "--max-tokens is 0;"),
    (["run", "--model", "{}", "--max-tokens", "-1"], 2, "--max-tokens is -1;"),
    (["run", "--model", "{}", "--temperature", "nan"], 2, "--temperature is"),
    (["run", "--model", "{}", "--temperature", "-1"], 2, "--temperature is"),
    (["run", "--model", "{}", "--top-p", "2"], 2, "--top-p is 2.0; expected a number from 0 to 1"),
    (["run", "--model", "{}", "--min-p", "2"], 2, "--min-p is"),
    (["run", "--model", "{}", "--top-k", "-3"], 2, "--top-k is"),
    (["run", "--model", "{}", "--seed", "-1"], 2, "--seed is"),
    (["run", "--model", "{}", "--stop", ""], 2, "stop"),
    (["run", "--model", "{}", "--threads", "-1"], 2, "--threads is"),
    (["run", "--model", "{}", "--prompt", "hi", "--context", "99999"], 2, "trained for at most"),
    (["run", "--model", "{}", "--device", "tpu"], 2, "tpu"),
    (["run", "--model", "{}", "--prompt", ""], 2, "empty"),
    (["run", "--model", "{}", "--prompt", "  \n"], 2, "empty"),
    (["run", "--model", "{}", "--image", "-", "--prompt", "-"], 2, "more than once"),
    (["run", "--model", "{}", "--image", "none.png"], 66, "none.png"),
    (["run", "--model", "{}", "--image", "{}/language.gguf"], 65, "language.gguf"),
    (["run", "--model", "{}", "--prompt", "hi", "--context", "20", *LIGHT], 2, "positions"),
    (["run", "-p", "hi"], 2, "No such option '-p'. Did you mean '--prompt'?"),
    (["serve", "-p", "80"], 2, "No such option '-p'. Did you mean '--port'?"),
    (["run", "--temp", "0.5"], 2, "No such option '--temp'. Did you mean '--temperature'?"),
    (["batch", "photos", "--format", "json"], 2, "No such option '--format'. Did you mean '--json-schema'?"),
    (["chat", "--no-such"], 2, "No such option '--no-such'."),
    (["run", "--model", "no-such"], 66, "known models"),
    (["run", "--model", "/"], 65, "not a bundle"),
    (["run", "--model", "{}/manifest.json"], 65, "give its folder, {}."),
    (["run", "--model", "{}/language.gguf"], 65, "give its folder, {}."),
    (["run", "--model", __file__], 65, "expected a bundle folder"),
    *(
        ([*command.split(), ""], 66, "'' is neither a bundle folder nor a model name; known models: smol.")
        for command in ("run --model", "chat --model", "serve --model", "bench --model", "info", "verify")
    ),
    (["run"], 66, "llava-edge models pull smol"),
    (["chat"], 66, "llava-edge models pull smol"),
    (["chat", "--model", "{}", "--image", "none.png"], 66, "none.png"),
    (["verify"], 66, "llava-edge models pull smol"),
    (["verify", "/"], 65, "not a bundle"),
    (["info", "no-such"], 66, "known models"),
    (["info", "llava-hf/llava-1.5-7b-hf"], 66, "'llava-hf/llava-1.5-7b-hf' does not exist, and"),
    (["models", "pull", "llava-hf/llava-1.5-7b-hf"], 66, "downloads only its own models"),
    (["export", "llava-hf/llava-1.5-7b-hf", "out"], 66, "only its own models: download it, then give its folder"),
    (["export", "https://example.org/x", "out"], 66, "'https://example.org/x' does not exist, and"),
    (["export", "{}", "out", "--base", "lmsys/vicuna-7b-v1.5"], 66, "'lmsys/vicuna-7b-v1.5' does not exist, and"),
    (["export", "{}", "out", "--vision-tower", "openai/clip"], 66, "'openai/clip' does not exist, and"),
    (["export", "{}", "out", "--threads", "100000"], 2, "--threads is 100000; expected an integer from 0 to 512."),
    (["export", "{}", "out", "--threads", "-1"], 2, "--threads is -1; expected"),
    (["export", "{}", "out", "--name", " "], 2, "' ' cannot be a model's name"),
    (["verify", "{}", "--against", "llava-hf/llava-1.5-7b-hf"], 66, "downloads only its own models"),
    (["info", "/"], 65, "neither"),
    (["info", "{}/vision.onnx"], 65, "not a GGUF file"),
    (["models", "pull", "no-such"], 2, "smol"),
    (["run", "--model", "{}", "--image", "{}"], 66, "a folder"),
    (["run", "--model", "{}", "--image", "https://example.org/cat.jpg"], 66, "download the picture"),
    (["run", "--model", "{}", "--image", "{}/manifest.json"], 65, "not a picture"),
    (["run", "--model", "{}", "--prompt", "hi", "--image-tokens", "9999"], 2, "--image-tokens is 9999, but"),
    (["run", "--model", "{}", "--speculate", "perhaps"], 2, "perhaps"),
    (["run", "--model", "{}", *["--stop", "x"] * 17], 2, "at most 16"),
    (["run", "--model", "{}", "--prompt", "x" * 2_000_000, *LIGHT], 2, "Use a shorter text."),
    (["run", "--model", "{}", "--device", "cuda", "--prompt", "hello"], 69, "not available"),
    (["info", "/dev/null"], 65, "neither"),
    (["train", "no-such"], 66, "micro, smol"),
    (["train", "smol"], 2, "--photos"),
    (["train", "micro", "--photos", "."], 2, "draws its own pictures; omit --photos"),
    (["train", "smol", "--photos", "no-such"], 66, "labels.jsonl"),
    (["train", "micro", "--out", "{}/manifest.json/run"], 73, "name another folder with --out."),
    (["train", "micro", "--out", "out", "--data", "/dev/null/data"], 73, "name another folder with --data."),
    (["eval", "--photos", "no-such"], 2, "--bundle"),
    (["bench", "--model", "no-such"], 66, "known models"),
    (["bench", "--model", "{}", "--repeats", "0"], 2, "--repeats"),
    (["serve", "--model", "{}", "--port", "99999"], 2, "99999"),
    (["serve", "--model", "{}", "--timeout", "nan"], 2, "--timeout is nan"),
    (["serve", "--model", "{}", "--timeout", "inf"], 2, "--timeout is inf"),
    (["verify", "{}", "--base", "{}"], 2, "--against"),
    (["verify", "{}", "--square", "crop"], 2, "--against"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), BAD, ids=[" ".join(bad[0])[:80] for bad in BAD])
def test_bad_input_is_one_sentence(arguments: list[str], code: int, says: str, micro_bundle: Path, run: Run) -> None:
    found, _, err = run(*(argument.replace("{}", str(micro_bundle)) for argument in arguments))
    sentences = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert found == code
    assert len(sentences) == 1
    assert sentences[0].startswith("llava-edge: ")
    assert says.replace("{}", str(micro_bundle)) in sentences[0]


def test_a_gguf_file_is_no_model_but_can_become_one(micro_bundle: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "llava.gguf"
    file.symlink_to(micro_bundle / LANGUAGE)
    code, _, err = run("run", "--model", file, "--prompt", "hi")
    assert code == 65
    assert f"llava-edge export {file} BUNDLE --mmproj FILE" in err


def test_nothing_piped_into_dash(micro_bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"not a picture"):
        monkeypatch.setattr("sys.stdin", _Stdin(data))
        code, _, err = run("run", "--model", micro_bundle, "--image", "-")
        assert code in (65, 66)
        assert err.count("\n") == 1
    monkeypatch.setattr("sys.stdin", None)
    assert run("run", "--model", micro_bundle, "--image", "-")[0] == 2


# How a process ends.


def test_ctrl_c_while_the_program_starts(tmp_path: Path) -> None:
    """It arrives while the first module is imported."""
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    process = start("run", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_ctrl_c_while_streaming(micro_bundle: Path) -> None:
    process = start("run", "--model", micro_bundle, *LIGHT, "--max-tokens", "450", "--prompt", "hello")
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err == b""


def test_ctrl_c_while_loading(micro_bundle: Path) -> None:
    """The engine's own log tells that loading has begun; no answer may follow, and no traceback."""
    process = start("run", "--model", micro_bundle, *LIGHT, "--verbose", "--prompt", "hello")
    assert process.stderr is not None
    while b"llama_model_loader" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves(micro_bundle: Path) -> None:
    process = start("run", "--model", micro_bundle, *LIGHT, "--max-tokens", "450", "--prompt", "hello")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == b""


def test_a_home_that_cannot_be_created(photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(photo))
    for command in (("train", "micro"), ("models", "pull", "smol")):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (73, 1)
        assert str(photo) in err
        assert "LLAVA_EDGE_HOME" in err


def test_a_bundle_needs_no_home(micro_bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has neither HOME nor an entry in /etc/passwd. Models found by name need one."""
    monkeypatch.setenv("LLAVA_EDGE_HOME", "~nobody-has-this-name/models")
    monkeypatch.setattr(machine, "MAX_EXTERNAL_LOAD", 99)
    assert run("run", "--model", micro_bundle, "--prompt", "hi", "--max-tokens", "1")[0] == 0
    code, out, _ = run("doctor", "--model", micro_bundle, "--tune")
    assert code == 0
    assert re.search("^note +cache folder +There is no home folder; set LLAVA_EDGE_HOME", out, re.MULTILINE)
    assert re.search("^ok +model +", out, re.MULTILINE)
    for command in (["doctor"], ["doctor", "--model", "name"]):
        code, _, err = run(*command)
        assert (code, "There is no home folder; set LLAVA_EDGE_HOME" in err) == (69, True)


@pytest.mark.parametrize("lacking", ["click", "llguidance", "numpy", "PIL"])
def test_a_python_that_it_is_not_installed_for(lacking: str, photo: Path, micro_bundle: Path, tmp_path: Path) -> None:
    """As when a clone is the working directory and its virtual environment is not active, or is older than a pull."""
    (schema := tmp_path / "schema.json").write_text('{"const": 1}')
    code = f"import sys; sys.modules[{lacking!r}] = None; from llava_edge.__main__ import main; main()"
    command = [sys.executable, "-c", code, "run", "--model", str(micro_bundle), "--image", str(photo)]
    command += ["--json-schema", str(schema)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1), done.stderr
    assert done.stderr.startswith(f"llava-edge: {lacking} is not installed for {sys.executable}. ")


@pytest.mark.parametrize("lacking", ["onnx", "gguf", "safetensors"])
def test_without_the_extra_it_is_named_before_anything_is_done(
    lacking: str, micro_checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    monkeypatch.setattr("llava_edge.models.smol.fetch", lambda *_: pytest.fail("downloaded"))
    for command in (("models", "pull", "smol"), ("export", micro_checkpoint, tmp_path / "out")):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (69, 1)
        assert lacking in err
        assert "pip install '.[export]'" in err


@pytest.mark.parametrize("lacking", ["matplotlib", "safetensors"])
def test_training_without_what_it_ends_with_is_not_begun(
    lacking: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    code, _, err = run("train", "micro", "--out", tmp_path / "run", "--data", tmp_path / "run")
    assert code == 69
    assert f"Training needs {lacking}" in err
    assert "pip install '.[train]'" in err
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_stages(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty.toml").write_text("", "utf-8")
    code, _, err = run("train", str(tmp_path / "empty.toml"))
    assert code == 65
    assert "it has no [[stage]] tables" in err


def test_a_recipe_with_a_bad_number_begins_nothing(root: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text((root / "models/recipes/micro.toml").read_text("utf-8").replace("batch = 8", "batch = 0"))
    code, _, err = run("train", recipe, "--out", tmp_path / "run", "--data", tmp_path / "data")
    assert (code, err.count("\n")) == (65, 1)
    assert (
        f"{recipe} is not a training recipe: stage 'align' has batch = 0; expected an integer from 1 to 65536." in err
    )
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_limit_on_threads_is_no_bug_of_ours(micro_bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    code, out, err = run("run", "--model", micro_bundle, "--prompt", "?", *LIGHT)
    assert (code, out, err.count("\n")) == (71, "", 1)
    assert "ulimit -u" in err


def test_an_interrupt_for_want_of_threads_is_no_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS sends one."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(store, "entries", interrupted)
    code, _, err = run("models", "list")
    assert code == 71
    assert err.startswith("llava-edge: No more threads can be started")


def test_doctor_blames_no_engine_for_a_limit_on_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: object, **__: object) -> None:
        raise interpreter.ChildError(f"failed: llava_edge.errors.MemoryLimitError: {NO_THREAD.rstrip('.')}")

    monkeypatch.setattr(interpreter, "run_json", failed)
    code, _, err = run("doctor")
    assert (code, err) == (71, f"llava-edge: {NO_THREAD}\n")


def test_a_failed_answer_leaves_stdout_empty(micro_bundle: Path, photo: Path, tmp_path: Path, run: Run) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(micro_bundle, broken)
    data = (broken / "vision.onnx").read_bytes()
    (broken / "vision.onnx").write_bytes(bytes(len(data)))
    code, out, _ = run("run", "--model", broken, "--image", photo, *LIGHT, "--no-cache")
    assert (code, out) == (65, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the stream")
def test_closed_streams_and_a_plain_locale(micro_bundle: Path) -> None:
    command = f'"{sys.executable}" -m llava_edge run --model "{micro_bundle}" --max-tokens 4 --prompt hi'
    command += f" {' '.join(LIGHT)}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    talk = b"(cut off after 4 tokens: --max-tokens reached)\n"
    closed = b"llava-edge: Standard output is closed.\n"
    wanted = {"": (0, talk), "<&-": (0, talk), "2>&-": (0, b""), ">&-": (74, closed), ">&- 2>&- <&-": (74, b"")}
    for redirect, outcome in wanted.items():
        done = subprocess.run(f"{command} {redirect}", shell=True, cwd=ROOT, env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == outcome, redirect


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_talk_that_cannot_be_written_costs_no_answer(micro_bundle: Path) -> None:
    command = [sys.executable, "-m", "llava_edge", "run", "--model", str(micro_bundle), "--preset", "memory"]
    command += ["--prompt", "hi", "--max-tokens", "2"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 0
    assert done.stdout


def test_an_empty_question_on_stdin_is_not_no_question(micro_bundle: Path, photo: Path) -> None:
    command = [sys.executable, "-m", "llava_edge", "run", "--model", str(micro_bundle), "--image", str(photo)]
    done = subprocess.run([*command, "--prompt", "-"], cwd=ROOT, input=b" \n", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"llava-edge: The prompt on standard input is empty.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [("models", "list"), ("info", "--json"), ("run",), ("run", "--json"), ("batch",), ("batch", "--json"), ("chat",)],
)
def test_an_unwritable_stdout(arguments: tuple[str, ...], unbuffered: str, micro_bundle: Path, photo: Path) -> None:
    asked = ("--model", micro_bundle, *LIGHT, "--max-tokens", "2")
    named = {"info": (micro_bundle,), "run": ("--prompt", "hi", *asked), "batch": (photo, *asked), "chat": asked}
    more = named.get(arguments[0], ())
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llava_edge", *arguments, *map(str, more)],
            cwd=ROOT, input="hi\n", stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    said = done.stderr.splitlines()[-1]
    assert (done.returncode, said) == (74, "llava-edge: Standard output cannot be written: No space left on device.")


@pytest.mark.parametrize("command", ["run", "batch"])
def test_json_is_utf_8_whatever_the_encoding_of_stdout(command: str, micro_bundle: Path, photo: Path) -> None:
    orange = photo.rename(photo.parent / "\N{TANGERINE}.png")
    images = {"run": ("--image", orange), "batch": (orange,)}[command]
    done = subprocess.run(
        [sys.executable, "-m", "llava_edge", command, *map(str, images), "--model", str(micro_bundle), *LIGHT,
         "--prompt", "Größe?", "--max-tokens", "2", "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    found = json.loads(done.stdout)  # as jq would
    assert found["prompt"] == "Größe?"
    assert (found.get("image") or found["images"][0]) == str(orange)


@pytest.mark.parametrize("name", [b"\xc3\xa4.gguf", b"\xe4.gguf"], ids=["utf-8", "latin-1"])
def test_json_of_info_is_utf_8_whatever_the_name(name: bytes, micro_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(name)
    shutil.copyfile(micro_bundle / "projector.gguf", file)
    done = subprocess.run(
        [sys.executable, "-m", "llava_edge", "info", file, "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert json.loads(done.stdout.decode("utf-8"))["file"] == str(file)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_takes_a_part_of_stdout(unbuffered: str, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out, largest_file(512):
        done = subprocess.run(
            [sys.executable, "-m", "llava_edge", "run", "--help"],
            cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 74
    assert done.stderr == "llava-edge: Standard output cannot be written: File too large.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("command", ["run", "serve", "doctor"])
def test_without_proc_a_sentence_says_what_to_mount(command: str, micro_bundle: Path, photo: Path) -> None:
    """As in a chroot."""
    options: dict[str, list[str | Path]] = {"run": ["--image", photo], "serve": ["--port", "0"], "doctor": []}
    arguments = ("-m", "llava_edge", command, "--model", micro_bundle, *options[command])
    done = with_mounts("mount -t tmpfs none /proc", sys.executable, *arguments, folder=photo.parent)
    assert done.returncode == 69
    assert "Traceback" not in done.stderr
    sentence = "/proc is not mounted here, which ONNX Runtime needs. Run: mount -t proc proc /proc"
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("llava-edge ver", ["plain,verify"]),
        ("llava-edge run --dev", ["plain,--device"]),
        ("llava-edge run --device cu", ["plain,cuda"]),
        ("llava-edge run --image pho", ["file,pho"]),
        ("llava-edge batch pho", ["file,pho"]),
        ("llava-edge chat --model s", ["plain,small", "dir,s"]),
        ("llava-edge models rm ", ["plain,small", "dir,"]),
        ("llava-edge export ch", ["file,ch"]),
    ],
)
def test_shells_complete_commands_options_models_and_files(
    line: str, completed: list[str], isolated_home: Path, micro_bundle: Path
) -> None:
    shutil.copytree(micro_bundle, isolated_home / "models" / "small")
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_LLAVA_EDGE_COMPLETE": "bash_complete"}
    command = [sys.executable, "-m", "llava_edge"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | words, check=True)
    assert (done.stdout.split("\n")[: len(completed)], done.stderr) == (completed, "")


def test_shells_complete_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", "~nobody of this name/home")
    context = click.Context(cli.cli)
    items = MODEL.shell_complete(context, click.Argument(["model"]), "bun")
    assert [(item.type, item.value) for item in items] == [("dir", "bun")]


def test_a_current_folder_that_was_removed(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run("export", tmp_path, "out")
    assert (code, err) == (66, "llava-edge: The current folder was removed; change to another one.\n")


# chat, verify, info, models


def test_chat_reads_questions_from_stdin(micro_bundle: Path, photo: Path) -> None:
    few = ("--max-tokens", "4", *LIGHT)
    answers = set()
    for mark in (b"", b"\xef\xbb\xbf"):
        process = start("chat", "--model", micro_bundle, *few, "--image", photo, stdin=subprocess.PIPE)
        out, err = process.communicate(mark + b"What?\nAnd?\n/quit\nnever\n", timeout=60)
        assert process.returncode == 0
        assert b"/help lists the commands" in err
        answers.add(out)
    assert len(answers) == 1
    assert b"" not in answers


def test_verify_measures_a_bundle_against_its_checkpoint(
    micro_bundle: Path, micro_checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    code, out, err = run("verify", micro_bundle, "--against", micro_checkpoint, "--json")
    assert code == 0, err
    rows = {row["stage"]: row for row in json.loads(out)["parity"]}
    exact = {"pixels", "clip fp32", "attention fp32", "projector", "embeddings"}
    assert set(rows) == exact | {"logits q8_0", "greedy q8_0"}
    assert all(row["passed"] for row in rows.values())
    other = write_checkpoint(tmp_path / "other", seed=1)
    code, _, err = run("verify", micro_bundle, "--against", other)
    assert code == 65
    assert "does not agree with" in err
    assert "clip fp32" in err


def test_without_torch_verify_says_what_to_do(
    run: Run, micro_bundle: Path, micro_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run("verify", micro_bundle, "--against", micro_checkpoint)
    assert (code, out) == (69, "")
    assert "torch is not installed" in err
    assert err.endswith("'.[train]', then run this command again.\n")


def test_verify_refuses_before_it_reads_what_it_could_not_measure_against(
    micro_bundle: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "verify", lambda *_: pytest.fail("the bundle was read"))
    other = write_checkpoint(tmp_path / "other", config=replace(CONFIG, image_pool=2))
    code, _, err = run("verify", micro_bundle, "--against", other)
    assert code == 65
    assert "was not made from" in err
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run("verify", micro_bundle, "--against", other)
    assert code == 69
    assert "torch is not installed" in err


def test_verify_finds_one_flipped_bit(bundle_copy: Path, run: Run) -> None:
    code, out, err = run("verify", bundle_copy)
    assert (code, err) == (0, "")
    assert "4 files" in out
    path = bundle_copy / PROJECTOR
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)
    code, _, err = run("verify", bundle_copy)
    assert code == 65
    assert PROJECTOR in err


def test_a_command_that_is_proposed_can_be_pasted(run: Run, tmp_path: Path) -> None:
    spaced = tmp_path / "my file.gguf"
    spaced.touch()
    for arguments in ([spaced], ["run", spaced], ["run", "--model", spaced, "--prompt", "Why?"]):
        assert f" '{spaced}'" in run(*arguments)[2]


def test_info_of_a_bundle(micro_bundle: Path, run: Run) -> None:
    code, out, _ = run("info", micro_bundle)
    manifest = json.loads((micro_bundle / MANIFEST).read_text())
    assert code == 0
    assert all(entry["sha256"] in out for entry in manifest["files"].values())
    assert all(row["stage"] in out for row in manifest["parity"])
    code, out, _ = run("info", micro_bundle, "--json")
    assert json.loads(out)["files"] == manifest["files"]


def test_info_of_a_gguf_file_and_a_checkpoint(micro_bundle: Path, micro_checkpoint: Path, run: Run) -> None:
    _, out, _ = run("info", micro_bundle / LANGUAGE)
    assert "general.architecture" in out
    assert "array of" in out
    code, out, _ = run("info", micro_checkpoint, "--json")
    assert code == 0
    assert json.loads(out)["text"]["num_hidden_layers"] == 2


def test_info_shows_nothing_that_steers_the_terminal(run: Run, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "stranger.gguf", "llama")
    writer.add_string("tokenizer.chat_template", "\x1b[2J\x1b]0;title\x07USER:\nASSISTANT:\x9b2J")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code, out, _ = run("info", tmp_path / "stranger.gguf")
    assert code == 0
    assert "[2J]0;titleUSER:ASSISTANT:2J" in out
    assert out.replace("\n", "").isprintable()


def test_info_does_not_promise_an_export_that_would_fail(run: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    assert "export with" in run("info", tmp_path / "checkpoint")[1]
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    code, out, _ = run("info", tmp_path / "checkpoint")
    assert code == 0
    assert re.search(r"^needs .* has no tokenizer", out, re.MULTILINE)
    assert "export with" not in out


def test_models_are_listed_and_used_by_name(micro_bundle: Path, run: Run) -> None:
    assert "smol (default)  not installed" in run("models", "list")[1]
    store.models_folder().mkdir(parents=True)
    (store.models_folder() / "mine").symlink_to(micro_bundle)
    out = run("models", "list")[1]
    size = sum(entry.size for entry in Bundle.open(micro_bundle).manifest.files.values())
    assert f"mine  installed  {size / 1e6:.0f} MB" in out
    assert str(store.models_folder() / "mine") in out
    (store.models_folder() / "broken").mkdir()
    for text, why in (("{", "is not a valid manifest"), ('{"format_version": 9}', "a newer llava-edge")):
        (store.models_folder() / "broken" / "manifest.json").write_text(text)
        assert re.search(rf"^broken  cannot be used: .*{why}", run("models", "list")[1], re.MULTILINE)
    assert run("run", "--model", "mine", *LIGHT, "--max-tokens", "2", "--prompt", "hello")[0] == 0


def test_a_model_is_removed(micro_bundle: Path, run: Run) -> None:
    folder = store.models_folder() / "mine"
    shutil.copytree(micro_bundle, folder)
    code, out, err = run("models", "rm", "other")
    assert (code, out) == (66, "")
    assert "installed: mine." in err
    assert run("models", "rm", "mine") == (0, "", "mine is removed: 2 MB freed.\n")
    assert not folder.exists()
    assert "installed: none." in run("models", "rm", "mine")[2]
    shutil.copytree(micro_bundle, folder)
    (store.home() / "parts").mkdir()
    assert f"stay in {store.home() / 'parts'} for the next pull; delete that folder" in run("models", "rm", "mine")[2]


# doctor


def test_doctor_on_this_machine(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert (code, report["ok"]) == (0, True)
    assert found["llama.cpp"]["level"] == found["onnxruntime"]["level"] == "ok"
    assert found["default model"]["fix"] == "llava-edge models pull smol"
    assert {"processor", "threads", "memory", "devices", "cache folder"} <= set(found)


@pytest.fixture
def doctor_without_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are not looked at."""
    monkeypatch.setattr("llava_edge.cli.doctor._engines", list)


def test_doctor_reports_the_rest_where_no_temporary_file_can_be(micro_bundle: Path, run: Run) -> None:
    """As where all is read-only."""
    with largest_file(0):
        code, out, err = run("doctor", "--model", micro_bundle)
    assert (code, "llama_cpp could not be tested in a temporary folder: No usable" in err) == (69, True)
    assert re.search("^broken +llama.cpp +llama_cpp could not be tested", out, re.MULTILINE)
    assert re.search("^ok +onnxruntime +", out, re.MULTILINE)
    assert re.search("^ok +model +", out, re.MULTILINE)


@pytest.mark.usefixtures("doctor_without_engines")
def test_doctor_says_what_is_wrong_with_a_model(run: Run) -> None:
    code, _, err = run("doctor", "--model", "nosuch")
    assert code == 69
    assert "'nosuch' is neither a bundle folder nor a model name; known models: smol." in err
    assert "shown above" not in err


@pytest.mark.usefixtures("doctor_without_engines")
def test_doctor_looks_at_the_cache_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, dict[str, str]]:
        return {finding["subject"]: finding for finding in json.loads(run("doctor", "--json")[1])["findings"]}

    assert [found()[name]["level"] for name in ("cache folder", "image cache")] == ["ok", "ok"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    assert "nothing is cached: 1.0 GiB of the disk are free, and 2 must stay free" in found()["image cache"]["text"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / "file"))
    assert found()["cache folder"]["level"] == "note"
    assert "Not a directory" in found()["cache folder"]["text"]


@pytest.mark.usefixtures("doctor_without_engines")
def test_doctor_says_that_what_it_measured_cannot_be_stored(
    run: Run, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(machine, "MAX_EXTERNAL_LOAD", 99)
    code, out, _ = run("doctor", "--tune", "--model", micro_bundle)
    assert code == 0
    assert "note    vision         measured, but the results cannot be stored" in out


def test_doctor_survives_a_build_that_dies(tmp_path: Path) -> None:
    """A llama_cpp that ends its process with an illegal instruction, as one miscompiled for this processor does."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_ctypes_extensions.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    process = start("doctor", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 69
    assert b"SIGILL" in out
    assert b'CXXFLAGS="-fno-tree-dse -fno-dse" pip install' in out
    assert b"broken  llama.cpp" in out
    assert err.startswith(b"llava-edge: ")
    assert err.count(b"\n") == 1


def test_doctor_names_a_missing_engine(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('cannot open shared object file')\n")
    process = start("doctor", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 69
    assert b"broken  onnxruntime" in out
    assert b"cannot open shared object file" in out
