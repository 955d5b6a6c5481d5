"""The chat loop, driven by lines on standard input as a person or a pipe would."""

from __future__ import annotations

import io
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from llava_edge import EngineOptions, Llava, Options
from llava_edge.api import Chat
from llava_edge.prompt import Message
from llava_edge.repl import Repl


@pytest.fixture(scope="module")
def llava(micro_bundle: Path) -> Iterator[Llava]:
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1)) as loaded:
        yield loaded


def talk(llava: Llava, lines: list[str], monkeypatch: pytest.MonkeyPatch, tokens: int = 6) -> tuple[Chat, str]:
    """Feed the lines to a new conversation; return it and what it showed."""
    chat, shown = llava.chat(options=Options(max_tokens=tokens)), io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    Repl(chat, shown.write).run()
    return chat, shown.getvalue()


def test_answers_are_shown_and_remembered(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, shown = talk(llava, ["hello", "", "and then?"], monkeypatch)
    assert [(message.role, message.images) for message in chat.messages] == [("user", 0), ("assistant", 0)] * 2
    assert shown == chat.messages[1].text + chat.messages[3].text


def test_what_is_done_is_said_until_the_answer_begins(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def waiting(doing: str) -> Iterator[Callable[[], None]]:
        seen.append(doing)
        yield lambda: seen.append("begun")
        seen.append("over")

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n" + "word " * 2000 + "\n"))
    Repl(llava.chat(options=Options(max_tokens=1)), lambda text: seen.append("answer"), waiting).run()
    assert seen[:3] == ["Reading", "begun", "answer"]
    assert seen[-1] == "Reading"  # the context overflowed, so nothing was begun


def test_an_image_goes_with_the_next_question(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a red one.png"
    Image.new("RGB", (9, 9), "red").save(path)
    chat, _ = talk(llava, [f"/image {path}", f"/image '{path}'", "what?", "and?"], monkeypatch)
    assert [message.images for message in chat.messages] == [2, 0, 0, 0]


def test_files_are_found_as_people_name_them(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a red é.png"
    Image.new("RGB", (9, 9), "red").save(path)
    names = ["~/a red é.png", str(path).replace(" ", "\\ "), path.as_uri(), f'"{path}"', "'~/a red é.png'"]
    chat, _ = talk(llava, [*(f"/image {name}" for name in names), "what?"], monkeypatch)
    assert chat.messages[0].images == len(names)


def test_only_conversations_are_replaced(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, talked = tmp_path / "photo.jpg", tmp_path / "talk.json"
    Image.new("RGB", (9, 9), "red").save(photo)
    before = photo.read_bytes()
    talk(llava, ["first", f"/save {talked}", "second", f"/save {talked}", f"/save {photo}"], monkeypatch)
    assert photo.read_bytes() == before
    assert len(json.loads(talked.read_text("utf-8"))["messages"]) == 4
    assert "choose another name" in capsys.readouterr().err


def test_what_is_no_conversation_is_not_even_read(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would wait for ever, and a large file fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "film").open("wb") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    names = [tmp_path / "pipe", tmp_path / "film", tmp_path]
    talk(llava, [f"/save {name}" for name in names], monkeypatch)
    said = capsys.readouterr().err
    assert all(f"{name} exists and is no saved conversation" in said for name in names)


def test_a_conversation_is_saved_where_people_mean(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    talk(llava, ["/save ~/home.json", "/save 'a b.json'", "/save a\\ c.json"], monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"home.json", "a b.json", "a c.json"}


def test_a_full_disk_leaves_the_last_save(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files ends a write half way, as a full disk does."""
    path = tmp_path / "talk.json"
    talk(llava, [f"/save {path}"], monkeypatch)
    path.chmod(0o600)
    before, chat = path.read_bytes(), llava.chat()
    chat.messages = [Message("user", "long " * 1000)]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/save {path}\n"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    try:
        Repl(chat, print).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert "cannot be written: File too large" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/save {path}\n"))
    Repl(chat, print).run()
    assert "long long" in path.read_text("utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_one_sentence_and_the_chat_goes_on(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/image none.png", "/image", "/image ''", "/image https://x.org/y.png", "/save", "/save ''"]
    lines += ["/save /no/such/folder/x.json", "/nonsense", "word " * 2000, "hello"]
    chat, _ = talk(llava, lines, monkeypatch)
    said = capsys.readouterr().err
    assert [message.text for message in chat.messages][:1] == ["hello"]
    for part in (
        "none.png does not exist",
        "https://x.org/y.png is a web address",
        "/image needs",
        "/save needs",
        "cannot be written",
        "/nonsense",
        "positions",
    ):
        assert part in said
    assert "Traceback" not in said


def test_an_image_is_not_lost_when_the_question_fails(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (9, 9), "red").save(path)
    chat, _ = talk(llava, [f"/image {path}", "word " * 2000, "what?"], monkeypatch)
    assert [message.images for message in chat.messages] == [1, 0]


def test_reset_and_save(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    chat, _ = talk(llava, ["first", "/reset", "second é", f"/save {path}"], monkeypatch)
    saved = json.loads(path.read_text("utf-8"))
    assert [(turn["role"], turn["text"]) for turn in saved["messages"]] == [
        ("user", "second é"),
        ("assistant", chat.messages[1].text),
    ]


def test_text_in_another_encoding_is_asked_and_saved(llava: Llava, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    command = [sys.executable, "-m", "llava_edge", "chat", "--model", str(llava.bundle.folder), "--max-tokens", "2"]
    for encoding in ("utf-8:strict", "ascii:surrogateescape"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        lines = b"caf\xe9\n/save %s\n" % os.fsencode(path)
        done = subprocess.run(command, input=lines, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(path.read_text("utf-8"))["messages"][-2]["text"].startswith("caf")
        path.unlink()


def test_quit_and_the_end_of_input(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    for leave in ("/quit", "/exit", "quit", "exit"):
        chat, _ = talk(llava, [leave, "never asked"], monkeypatch)
        assert chat.messages == []


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = llava.chat(options=Options(max_tokens=300))
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    Repl(chat, show).run()
    assert "stopped" in capsys.readouterr().err
    assert [message.text for message in chat.messages] == ["hello", "".join(pieces)]


class _Typed(io.StringIO):
    """A terminal in which some lines are Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_ctrl_c_at_the_prompt_keeps_the_conversation(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = llava.chat(options=Options(max_tokens=2))
    monkeypatch.setattr("sys.stdin", _Typed("hello\n^C\nand?\n^C\n^C\nnever asked\n"))
    with pytest.raises(KeyboardInterrupt):
        Repl(chat, lambda text: None).run()
    assert [message.text for message in chat.messages if message.role == "user"] == ["hello", "and?"]
    assert capsys.readouterr().err.count("/quit or Ctrl-D leaves") == 2


def test_a_full_context_names_the_way_out(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(llava, ["word " * 2000], monkeypatch)
    assert "/reset" not in capsys.readouterr().err  # a new conversation is no shorter
    talk(llava, ["hello", "word " * 2000], monkeypatch)
    assert "(/reset forgets the conversation so far)" in capsys.readouterr().err


def test_a_path_as_a_question_is_a_question(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = talk(llava, ["/etc/passwd is what?"], monkeypatch)
    assert chat.messages[0].text == "/etc/passwd is what?"
