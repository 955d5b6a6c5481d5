"""One question about each of many images: `llava-edge batch` and `Llava.ask_each`."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from images import HEIC, encode, picture

from llava_edge import Llava
from llava_edge.cache import Cache
from llava_edge.cli.batch import _AnswerFile
from llava_edge.errors import ContextOverflowError, ImageError, MissingError, UsageError
from llava_edge.options import EngineOptions, Options, result_of

SHORT = Options(max_tokens=12, speculate="off")


@pytest.fixture
def run(run: Run, micro_bundle: Path) -> Run:
    """Run the command on some paths with some options: (exit code, stdout, stderr)."""
    options = ("--model", micro_bundle, "--device", "cpu", "--threads", "1", "--max-tokens", "6")
    return lambda *arguments: run("batch", *arguments, *options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three images, of which one is in a folder inside it, and of what is none."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("b.png", "sub/c.PNG", "a.png", ".hidden.png", ".trash/d.png", "notes.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(seed=number), "PNG"))
    return folder


def names(lines: list[str]) -> list[str]:
    return [line.partition("\t")[0] for line in lines]


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# The command.


def test_each_image_of_a_folder_gets_a_line(run: Run, photos: Path, llava: Llava) -> None:
    code, out, err = run(photos)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    expected = [photos / "a.png", photos / "b.png", photos / "sub/c.PNG"]
    assert names(lines) == list(map(str, expected))
    for image, line in zip(expected, lines, strict=True):
        alone = llava.ask(images=image, options=Options(max_tokens=6)).text
        assert line.partition("\t")[2] == " ".join(alone.split())


def test_files_are_taken_in_the_order_given(run: Run, photos: Path) -> None:
    code, out, _ = run(photos / "b.png", photos / "notes.txt", photos / "a.png", "--prompt", "the red")
    assert code == 0
    assert names(out.splitlines()) == [str(photos / name) for name in ("b.png", "notes.txt", "a.png")]


def test_an_unusable_image_does_not_stop_the_others(run: Run, photos: Path) -> None:
    (photos / "aa.jpg").write_bytes(b"not a picture")
    code, out, err = run(photos)
    assert code == 65
    assert len(out.splitlines()) == 3
    assert err.startswith(f"{photos / 'aa.jpg'} is not a picture")
    assert err.endswith("llava-edge: 1 of 4 images got no answer.\n")


def test_pictures_of_formats_that_are_not_read_are_named(run: Run, photos: Path) -> None:
    (photos / "IMG_1.HEIC").write_bytes(HEIC)
    (photos / "scan.tif").write_bytes(encode(picture(), "TIFF"))
    code, out, err = run(photos)
    assert code == 65
    assert len(out.splitlines()) == 3
    heic, tiff, summary = err.splitlines()
    assert heic.startswith(f"{photos / 'IMG_1.HEIC'} is a HEIC picture (convert it")
    assert tiff.startswith(f"{photos / 'scan.tif'} is a TIFF")
    assert summary == "llava-edge: 2 of 5 images got no answer."


def test_json_lines_have_the_answer_or_the_error(run: Run, photos: Path) -> None:
    (photos / "aa.jpg").write_bytes(b"not a picture")
    _, out, _ = run(photos, "--json", "--prompt", "the red")
    found = list(map(json.loads, out.splitlines()))
    assert [Path(record["image"]).name for record in found] == ["a.png", "aa.jpg", "b.png", "c.PNG"]
    assert {record["prompt"] for record in found} == {"the red"}
    assert ["text" in record for record in found] == [True, False, True, True]
    assert "is not a picture" in found[1]["error"]
    assert found[0]["timings"]["encode_ms"] > 0


def test_a_schema_constrains_every_answer(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["ab", "cd"]}')
    _, out, _ = run(photos, "--json-schema", tmp_path / "schema.json")
    assert {line.partition("\t")[2] for line in out.splitlines()} <= {'"ab"', '"cd"'}


@pytest.mark.usefixtures("second_answer_runs_dry")
def test_an_answer_that_its_grammar_ends_does_not_stop_the_others(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "form.gbnf").write_text('root ::= "abc"')
    code, out, err = run(photos, "--grammar", tmp_path / "form.gbnf")
    assert (code, out) == (65, f"{photos / 'a.png'}\tabc\n{photos / 'sub/c.PNG'}\tabc\n")
    assert err.startswith(f"{photos / 'b.png'}: The model has no token that the grammar, or JSON schema, allows next.")
    assert err.endswith("llava-edge: 1 of 3 images got no answer.\n")


@pytest.mark.parametrize(
    ("flag", "value", "wanted", "says"),
    [
        ("--grammar", 'root ::= "x', 65, "form.gbnf cannot be used. llama.cpp cannot parse the grammar"),
        ("--image-tokens", "17", 2, "--image-tokens is 17"),
    ],
)
def test_options_that_suit_no_image_are_refused_once(
    flag: str, value: str, wanted: int, says: str, run: Run, photos: Path, tmp_path: Path
) -> None:
    """Before any image is looked at: the first one here is none."""
    (photos / "a.png").write_bytes(b"not a picture")
    if flag == "--grammar":
        (tmp_path / "form.gbnf").write_text(value)
        value = str(tmp_path / "form.gbnf")
    code, _, err = run(photos, flag, value, "--output", tmp_path / "answers")
    assert (code, err.count("\n")) == (wanted, 1)
    assert says in err
    assert (tmp_path / "answers").read_text() == ""


def test_a_file_of_answers_is_continued(run: Run, photos: Path, tmp_path: Path) -> None:
    """Answers stay, errors are tried again, and another question is another answer."""
    answers = tmp_path / "answers.jsonl"
    damaged = photos / "a.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    code, out, _ = run(photos, "--output", answers)
    assert (code, out) == (65, "")
    first = answers.read_text("utf-8")
    damaged.write_bytes(whole)
    code, _, err = run(photos, "--output", answers)
    assert (code, err) == (0, f"(2 of 3 images are answered in {answers} already)\n")
    assert answers.read_text("utf-8").startswith(first)
    assert [Path(record["image"]).name for record in records(answers)] == ["a.png", "b.png", "c.PNG", "a.png"]
    assert run(photos, "--output", answers) == (0, "", f"(3 of 3 images are answered in {answers} already)\n")
    assert len(records(answers)) == 4
    run(photos / "b.png", "--output", answers, "--prompt", "the red")
    assert [record["prompt"] for record in records(answers)][-1] == "the red"


@pytest.mark.parametrize("kept", [-40, 5])
def test_a_line_that_was_cut_off_is_written_again(kept: int, run: Run, photos: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    run(photos, "--output", answers)
    complete = answers.read_bytes()
    last = complete.splitlines(keepends=True)[-1]
    answers.write_bytes(complete.removesuffix(last) + last[:kept])
    assert run(photos, "--output", answers)[0] == 0
    assert [record["image"] for record in records(answers)] == [
        json.loads(line)["image"] for line in complete.splitlines()
    ]


@pytest.mark.parametrize("kept", [1, 9, 300])
def test_however_little_was_written_of_a_line(kept: int, run: Run, photos: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    run(photos / "a.png", "--output", answers)
    whole = answers.read_bytes()
    answers.write_bytes(whole + whole[:kept])
    assert run(photos, "--output", answers)[0] == 0
    assert [Path(record["image"]).name for record in records(answers)] == ["a.png", "b.png", "c.PNG"]


def test_a_disk_that_takes_a_part_of_a_line(tmp_path: Path, micro_bundle: Path) -> None:
    """`write` then succeeds, and only the next one fails."""
    with _AnswerFile(tmp_path / "answers", micro_bundle) as file:
        whole, file._file = file._file, Nearly(tmp_path / "answers", "ab")
        with whole, file._file:
            file.add(b'{"image": "a"}\n')
            file.add(b'{"image": "b"}\n')
    assert (tmp_path / "answers").read_bytes() == b'{"image": "a"}\n{"image": "b"}\n'


class Nearly(io.FileIO):
    """A file that takes 7 bytes at a time."""

    def write(self, data: Any) -> int:
        return super().write(data[:7])


def test_two_runs_do_not_write_to_one_file(run: Run, photos: Path, tmp_path: Path, micro_bundle: Path) -> None:
    """Both would answer the same, and the second would cut off what the first has written meanwhile."""
    answers = tmp_path / "answers.jsonl"
    with _AnswerFile(answers, micro_bundle):
        code, _, err = run(photos, "--output", answers)
    assert (code, err) == (73, f"llava-edge: Another llava-edge is adding answers to {answers}; let it end first.\n")
    assert run(photos, "--output", answers)[0] == 0


def test_an_answer_file_that_another_computer_adds_to(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an SMB share, where a lock that is taken is EACCES."""

    def taken(file: int, kind: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("llava_edge.locks.fcntl.flock", taken)
    code, _, err = run(photos, "--output", tmp_path / "answers.jsonl")
    assert (code, err.startswith("llava-edge: Another llava-edge is adding answers to ")) == (73, True)


def test_an_answer_file_where_nothing_can_be_locked(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(file: int, kind: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("llava_edge.locks.fcntl.flock", unknown)
    assert run(photos, "--output", tmp_path / "answers.jsonl")[0] == 0
    assert len(records(tmp_path / "answers.jsonl")) == 3


def test_the_same_name_in_another_folder_is_another_image(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers.jsonl"
    (photos / "sub" / "a.png").write_bytes(encode(picture(seed=9), "PNG"))
    for folder in (photos, photos / "sub", photos):
        monkeypatch.chdir(folder)
        assert run("a.png", "--output", answers)[0] == 0
    assert [record["image"] for record in records(answers)] == [str(photos / "a.png"), str(photos / "sub/a.png")]


def test_an_image_is_answered_once_however_its_folder_is_named(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers.jsonl"
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos / "sub")
    assert run("../../photos/a.png", "--output", answers)[0] == 0
    for name in ("../a.png", photos / "a.png", tmp_path / "link/a.png"):
        assert run(name, "--output", answers) == (0, "", f"(1 of 1 images are answered in {answers} already)\n")
    assert len(records(answers)) == 1


def test_a_folder_that_cannot_be_read_is_said(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are missing from the answers. (Permissions would not stop tests that root runs.)"""
    closed, list_folder = str(photos / "sub"), os.scandir

    def scandir(path: Any) -> Any:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, out, err = run(photos)
    assert (code, len(out.splitlines())) == (65, 2)
    told = "1 of the folders could not be read."
    assert err == f"{closed} cannot be read: Permission denied.\nllava-edge: {told}\n"
    assert run(closed)[2].endswith(f"llava-edge: {told}\n")


def test_an_image_in_a_closed_folder_is_not_said_to_be_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_edge.cli.batch.denied", lambda path: True)
    code, _, err = run("no/a.png")
    assert (code, err) == (66, "llava-edge: no/a.png cannot be read: Permission denied.\n")


def test_links_that_lead_in_circles(run: Run, photos: Path) -> None:
    (photos / "sub" / "circle").symlink_to(photos)
    (photos / "c.jpg").symlink_to(photos / "c.jpg")
    (photos / "d.jpg").symlink_to(photos / "b.png")
    code, out, err = run(photos)
    assert (code, len(out.splitlines())) == (65, 4)
    assert err.startswith(f"{photos / 'c.jpg'} cannot be read: ")


@pytest.mark.parametrize(
    "content", ["a shopping list", "a\nb\n", '{"image": 3}\n', "[" * 100_000 + "\n", '{"text": "", "image": "a"}']
)
def test_a_file_of_something_else_is_left_alone(content: str, run: Run, photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(content)
    code, _, err = run(photos, "--output", other)
    assert code == 65
    assert "is not a file that 'llava-edge batch' wrote: see line 1." in err
    assert other.read_text() == content


def test_names_that_are_not_utf8(run: Run, photos: Path, tmp_path: Path) -> None:
    odd = photos / os.fsdecode(b"caf\xe9.png")
    (photos / "a.png").rename(odd)
    answers = tmp_path / "answers.jsonl"
    for _ in range(2):
        assert run(odd, "--output", answers)[0] == 0
    assert [record["image"] for record in records(answers)] == [str(odd)]
    assert run(odd)[1].startswith(f"{photos}/caf.png\t")


def test_what_cannot_work_is_said_before_the_model_is_loaded(
    run: Run, photos: Path, tmp_path: Path, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Llava, "load", load)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for arguments, code, why in (
        ((), 2, "Missing argument 'PATH...'"),
        ((photos / "no.png",), 66, "no.png does not exist."),
        ((tmp_path / "empty",), 66, "no file in it ends in .jpg"),
        ((photos, "--prompt", " "), 2, "The prompt is empty"),
        ((photos, "--output", micro_bundle / "answers"), 73, "inside the bundle"),
        ((photos, "--output", tmp_path / "no" / "answers"), 73, "its folder does not exist"),
        ((photos, "--output", tmp_path / "pipe"), 73, "is not a regular file"),
        ((photos, "--output", "-"), 2, "--json prints the objects on stdout"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "")
        assert why in err


# In Python.


def test_answers_are_those_of_each_image_alone(llava: Llava) -> None:
    """More than the context holds at a time, of which most answers would still be decoded when others begin."""
    images = [picture(seed=number) for number in range(12)]
    alone = [llava.ask("the red", image, SHORT).text for image in images]
    found = [result_of(stream) for stream in llava.ask_each(images, "the red", SHORT)]
    different = [mine.text for mine, wanted in zip(found, alone, strict=True) if mine.text != wanted]
    assert len(different) <= 1  # without the native kernels a batch rounds differently from a single token
    assert len(set(alone)) > 6
    assert [result.cache for result in found] == ["kv"] * 12  # `ask` has read them


def test_an_unusable_image_is_an_error_of_its_own_stream(llava: Llava, tmp_path: Path) -> None:
    images = [picture(), tmp_path / "no.png", np.zeros((3, 3), np.float64), b"no picture", picture(seed=1)]
    streams = llava.ask_each(images, "the red", SHORT)  # type: ignore[arg-type]
    assert result_of(streams[0]).completion_tokens == 12
    for stream, error in zip(streams[1:4], (MissingError, ImageError, ImageError), strict=True):
        with pytest.raises(error):
            list(stream)
    assert result_of(streams[4]).completion_tokens == 12


def test_an_image_that_the_caller_changes_is_answered_as_it_was(llava: Llava) -> None:
    image, other = picture(seed=3), picture(seed=4)
    expected = llava.ask("the red", image.copy(), SHORT).text
    streams = llava.ask_each([other, image], "the red", SHORT)
    image[:] = 0
    assert result_of(streams[1]).text == expected


def test_closing_a_stream_stops_all(llava: Llava) -> None:
    streams = llava.ask_each([picture(seed=n) for n in range(30)], "the red", Options(max_tokens=100))
    next(streams[0])
    streams[1].close()
    results = [result_of(stream) for stream in (streams[0], *streams[2:])]
    assert {result.finish_reason for result in results[-20:]} == {"cancelled"}
    assert sum(result.prompt_tokens > 0 for result in results) < 28  # the last ones were not even read
    assert llava.ask("the red", picture(), SHORT).completion_tokens == 12


def test_states_of_images_are_not_saved(micro_bundle: Path, tmp_path: Path) -> None:
    """They would take hundreds of megabytes each; embeddings are kept."""
    images = [encode(picture(seed=number), "PNG") for number in range(4)]
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, cache=tmp_path)) as loaded:
        for stream in loaded.ask_each(images, "the red", SHORT):
            list(stream)
        again = [result_of(stream).cache for stream in loaded.ask_each(images, "a list:", SHORT)]
    assert again == ["embedding"] * 4
    assert [entry.about["kind"] for entry in Cache(tmp_path).entries()] == ["embeddings"] * 4


def test_too_long_a_question_is_an_error_of_every_stream(llava: Llava) -> None:
    for stream in llava.ask_each([picture()] * 2, "the " * 600, SHORT):
        with pytest.raises(ContextOverflowError):
            list(stream)


def test_no_image_and_a_single_image_are_not_lists_of_images(llava: Llava) -> None:
    assert llava.ask_each([]) == []
    for single in ("a.png", Path("a.png"), b"bytes", bytearray(b"ab"), memoryview(b"ab"), picture(), io.BytesIO()):
        with pytest.raises(UsageError, match="ask_each expects a list of images"):
            llava.ask_each(single)  # type: ignore[arg-type]
