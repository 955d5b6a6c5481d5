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

from llava_edge import Llava, Options
from llava_edge.conversation import Chat
from llava_edge.prompt import Message
from llava_edge.repl import Repl

RunRepl = Callable[[list[str]], tuple[Chat, str]]


@pytest.fixture
def run_repl(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> RunRepl:
    """Feed lines to a new conversation; get it and what it showed."""

    def new(lines: list[str]) -> tuple[Chat, str]:
        chat, shown = llava.chat(options=Options(max_tokens=6)), io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        Repl(chat, shown.write).run()
        return chat, shown.getvalue()

    return new


def test_answers_are_shown_and_remembered(run_repl: RunRepl) -> None:
    chat, shown = run_repl(["hello", "", "and then?"])
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


def test_an_image_goes_with_the_next_question(run_repl: RunRepl, tmp_path: Path) -> None:
    path = tmp_path / "a red one.png"
    Image.new("RGB", (9, 9), "red").save(path)
    chat, _ = run_repl([f"/image {path}", f"/image '{path}'", "what?", "and?"])
    assert [message.images for message in chat.messages] == [2, 0, 0, 0]


def test_files_are_found_as_people_name_them(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a red é.png"
    Image.new("RGB", (9, 9), "red").save(path)
    names = ["~/a red é.png", str(path).replace(" ", "\\ "), path.as_uri(), f'"{path}"', "'~/a red é.png'"]
    chat, _ = run_repl([*(f"/image {name}" for name in names), "what?"])
    assert chat.messages[0].images == len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS refuses such names")
def test_a_name_that_is_not_utf_8_is_found_saved_and_loaded(run_repl: RunRepl, tmp_path: Path) -> None:
    path, saved = tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / "talk.json"
    Image.new("RGB", (9, 9), "red").save(path)
    first, _ = run_repl([f"/image {path}", f"/image {path.as_uri()}", "what?", f"/save {saved}"])
    assert first.messages[0].images == 2
    loaded, _ = run_repl([f"/load {saved}"])
    assert loaded.messages == first.messages


def test_a_file_of_exactly_that_name_goes_first(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes and backslashes may be in names of files, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("'red'", "back\\slash.png"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / name, "PNG")
    chat, _ = run_repl(["/image 'red'", "/image back\\slash.png", "/image 'back\\slash.png'", "what?"])
    assert chat.messages[0].images == 3


def test_only_conversations_are_replaced(run_repl: RunRepl, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, talked = tmp_path / "photo.jpg", tmp_path / "talk.json"
    Image.new("RGB", (9, 9), "red").save(photo)
    before = photo.read_bytes()
    run_repl(["first", f"/save {talked}", "second", f"/save {talked}", f"/save {photo}"])
    assert photo.read_bytes() == before
    assert len(json.loads(talked.read_text("utf-8"))["messages"]) == 4
    assert "choose another name" in capsys.readouterr().err


def test_what_is_no_conversation_is_not_even_read(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would wait for ever, and a large file fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "film").open("wb") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    names = [tmp_path / "pipe", tmp_path / "film", tmp_path]
    run_repl([f"/save {name}" for name in names])
    said = capsys.readouterr().err
    assert all(f"{name} exists and is not a saved conversation" in said for name in names)


def test_a_conversation_is_saved_where_people_mean(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_repl(["/save ~/home.json", "/save 'a b.json'", "/save a\\ c.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"home.json", "a b.json", "a c.json"}


def test_a_link_leads_to_what_is_saved(run_repl: RunRepl, tmp_path: Path) -> None:
    """As in a folder that is kept in step with another machine's."""
    link, real = tmp_path / "talk.json", tmp_path / "real.json"
    link.symlink_to(real)
    run_repl([f"/save {real}", "first", f"/save {link}"])
    assert link.readlink() == real
    assert len(json.loads(real.read_text("utf-8"))["messages"]) == 2


def test_what_was_saved_outlives_a_loss_of_power(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flushed to the disk before it takes the place of the last save."""
    path, flushed, fsync = tmp_path / "talk.json", list[tuple[int, bool]](), os.fsync

    def watched(file: int) -> None:
        fsync(file)
        flushed.append((os.fstat(file).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", watched)
    run_repl([f"/save {path}"])
    assert (path.stat().st_ino, False) in flushed


def test_a_full_disk_leaves_the_last_save(
    run_repl: RunRepl, llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files ends a write half way, as a full disk does."""
    path = tmp_path / "talk.json"
    run_repl([f"/save {path}"])
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


def test_bad_input_is_one_sentence_and_the_chat_goes_on(run_repl: RunRepl, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/image none.png", "/image", "/image ''", "/image https://x.org/y.png", "/save", "/save ''"]
    lines += ["/save a\0b", "/save /no/such/folder/x.json", "/nonsense", "word " * 2000, "hello"]
    chat, _ = run_repl(lines)
    out, said = capsys.readouterr()
    assert out == "\n"  # the end of the one answer
    assert [message.text for message in chat.messages][:1] == ["hello"]
    parts = ["none.png does not exist", "https://x.org/y.png is a web address", "/image needs", "/save needs"]
    parts += ["cannot be written", "/nonsense", "positions"]
    assert [part for part in parts if part not in said] == []
    assert "Traceback" not in said


def test_an_image_is_not_lost_when_the_question_fails(run_repl: RunRepl, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (9, 9), "red").save(path)
    chat, _ = run_repl([f"/image {path}", "word " * 2000, "what?"])
    assert [message.images for message in chat.messages] == [1, 0]


def test_reset_and_save(run_repl: RunRepl, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    chat, _ = run_repl(["first", "/reset", "second é", f"/save {path}"])
    saved = [(turn["role"], turn["text"]) for turn in json.loads(path.read_text("utf-8"))["messages"]]
    assert saved == [("user", "second é"), ("assistant", chat.messages[1].text)]


def photos(folder: Path, *colours: str) -> list[Path]:
    for colour in colours:
        Image.new("RGB", (9, 9), colour).save(folder / f"{colour}.png")
    return [folder / f"{colour}.png" for colour in colours]


def test_a_loaded_conversation_goes_on_as_the_saved_one(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, in place of what was said there."""
    path = tmp_path / "talk.json"
    photos(tmp_path, "red", "blue", "green")
    monkeypatch.chdir(tmp_path)
    begun = ["/image red.png", "what?", "and?", "/image blue.png", "now?", "/image green.png", f"/save {path}"]
    first, shown = run_repl([*begun, "last?"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second, last = run_repl(["forget this", f"/load {path}", "last?"])
    assert second.messages == first.messages
    assert [message.images for message in second.messages] == [1, 0, 0, 0, 1, 0, 1, 0]
    assert [picture.key for picture in second._pictures] == [picture.key for picture in first._pictures]
    assert shown.endswith(last.removeprefix(run_repl(["forget this"])[1]))
    said = capsys.readouterr().err
    assert f"Loaded 6 messages from {path}.\nImages to be shown with your next question: 1.\n" in said


def test_what_was_loaded_can_be_saved_and_forgotten(run_repl: RunRepl, tmp_path: Path) -> None:
    path, copy = tmp_path / "talk.json", tmp_path / "copy.json"
    (red,) = photos(tmp_path, "red")
    run_repl([f"/image {red}", "what?", f"/image {red}", f"/save {path}"])
    chat, _ = run_repl([f"/load {path}", f"/save {copy}", "/reset", "hello"])
    assert copy.read_bytes() == path.read_bytes()
    assert [message.images for message in chat.messages] == [0, 0]


def test_conversations_of_earlier_versions_can_be_loaded(
    run_repl: RunRepl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the names of images as they were typed, and a system text like any other turn."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    photos(tmp_path, "red", "blue")
    turns = [("system", "Be brief.", 0), ("user", "what?", 2), ("assistant", "red and blue", 0)]
    old = {
        "images": ["'~/red.png'", "blue.png"],
        "messages": [{"role": role, "text": text, "images": count} for role, text, count in turns],
    }
    (tmp_path / "talk.json").write_text(json.dumps(old), "utf-8")
    chat, _ = run_repl(["/load ~/talk.json"])
    assert chat.messages == [Message(role, text, count) for role, text, count in turns]  # type: ignore[arg-type]
    assert len(chat._pictures) == 2


def remarks(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said, but for answers that were cut off."""
    return [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("(cut off")]


QUESTION = {"role": "user", "text": "what?", "images": 0}
ANSWER = {"role": "assistant", "text": "red", "images": 0}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8 a photo",
        b"[" * 100_000,
        b'["images", "messages"]',
        b'{"model": "smol"}',
        {"images": [], "messages": [QUESTION]},
        {"images": [], "messages": [ANSWER, QUESTION]},
        {"images": [], "messages": [QUESTION, ANSWER | {"role": "tool"}]},
        {"images": [], "messages": [QUESTION, {"role": "assistant"}]},
        {"images": [], "messages": [QUESTION, ANSWER | {"text": None}]},
        {"images": [], "messages": [QUESTION, "red"]},
        {"images": [], "messages": 5},
        {"images": "red", "messages": []},
        {"images": [5], "messages": []},
        {"images": [], "messages": [QUESTION | {"images": 1}, ANSWER]},
        {"images": ["red.png"], "messages": [QUESTION | {"images": -1}, ANSWER]},
        {"images": ["red.png"], "messages": [QUESTION | {"images": 0.5}, ANSWER]},
        {"images": ["red.png"], "messages": [QUESTION, ANSWER | {"images": 1}]},
    ],
    ids=lambda content: str(content)[:60],
)
def test_what_is_no_conversation_is_not_loaded(
    content: object,
    run_repl: RunRepl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos(tmp_path, "red")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat, _ = run_repl(["hello", f"/load {path}", "and?"])
    assert remarks(capsys) == [f"Not loaded: {path} is not a conversation written by /save."]
    assert [message.text for message in chat.messages[::2]] == ["hello", "and?"]


def test_what_cannot_be_loaded_leaves_the_conversation(
    run_repl: RunRepl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = photos(tmp_path, "red", "blue")
    asked = [f"/image {red}", "what?", f"/image {blue}", "and?"]
    run_repl([*asked, f"/save {tmp_path / 'gone.json'}"])
    red.unlink()
    long = [QUESTION | {"text": "word " * 2000}, ANSWER]
    (tmp_path / "long.json").write_text(json.dumps({"images": [], "messages": long}), "utf-8")
    os.mkfifo(tmp_path / "pipe")
    bad = {"images": ["\ud800", "a\0b"], "messages": []}
    (tmp_path / "bad.json").write_text(json.dumps(bad), "utf-8")
    names = ["", "gone.json", "long.json", "none.json", "pipe", "x" * 300, "a\0b", "bad.json"]
    capsys.readouterr()
    lines = [f"/load {tmp_path / name if name else ''}" for name in names]
    chat, _ = run_repl([f"/image {blue}", "first", *lines, f"/image {blue}", *lines, "second"])
    assert [(turn.text, turn.images) for turn in chat.messages[::2]] == [("first", 1), ("second", 1)]
    said = remarks(capsys)
    parts = [
        "/load needs a file name.",
        f"Not loaded: {red} does not exist; expected the path of a picture.",
        "Not loaded: The prompt needs",
        "none.json cannot be read: No such file or directory.",
        "pipe is not a conversation written by /save.",
        "cannot be read: File name too long.",
        "/load needs a file name.",
        "Not loaded: '\\ud800' cannot be the name of a file.",
    ]
    for line, part in zip(said[1:], [*parts, "will be shown", *parts], strict=True):
        assert part in line


def test_ctrl_c_while_loading_keeps_the_conversation(
    run_repl: RunRepl, llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    (red,) = photos(tmp_path, "red")
    run_repl([f"/image {red}", "what?", f"/save {path}"])
    chat = llava.chat(options=Options(max_tokens=2))

    def interrupted(image: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "prepare", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n/load {path}\nand?\n"))
    Repl(chat, lambda text: None).run()
    assert [message.text for message in chat.messages[::2]] == ["hello", "and?"]
    assert "(stopped)" in capsys.readouterr().err


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


def test_quit_and_the_end_of_input(run_repl: RunRepl) -> None:
    for leave in ("/quit", "/exit", "quit", "exit"):
        chat, _ = run_repl([leave, "never asked"])
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
    assert capsys.readouterr().err.count("to quit: /quit, Ctrl-D") == 2


def test_a_full_context_names_the_way_out(run_repl: RunRepl, capsys: pytest.CaptureFixture[str]) -> None:
    run_repl(["word " * 2000])
    assert "/reset" not in capsys.readouterr().err  # a new conversation is no shorter
    run_repl(["hello", "word " * 2000])
    assert "Start a new conversation with /reset" in capsys.readouterr().err


def test_a_path_as_a_question_is_a_question(run_repl: RunRepl) -> None:
    chat, _ = run_repl(["/etc/passwd is what?"])
    assert chat.messages[0].text == "/etc/passwd is what?"
