"""Where results may be written, asked before the work that gives them."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_edge import outputs
from llava_edge.errors import CannotCreateError, StorageError
from llava_edge.outputs import check_output, check_space, replacing, storage_errors, write_problem


def test_whether_a_folder_takes_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert write_problem(tmp_path) == write_problem(tmp_path / "a" / "b") == ""
    assert write_problem(tmp_path / "file") == write_problem(tmp_path / "file" / "b") == "Not a directory"
    assert write_problem(tmp_path / "link") == "No such file or directory"  # nor can a folder be made of that name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_new_files_old_ones_and_links_to_either_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    (tmp_path / "to old").symlink_to("old")
    (tmp_path / "to new").symlink_to("new")
    for name in ("old", "new", "to old", "to new"):
        check_output(tmp_path / name, distinct_from=[tmp_path / "other"], bundles=[tmp_path / "bundle"])
    check_output(Path("/dev/null"))
    reader, writer = os.pipe()  # as of a shell's >(...), or of what is piped on
    check_output(Path(f"/dev/fd/{writer}"))
    os.close(reader)
    os.close(writer)
    assert (tmp_path / "old").read_text() == "kept"
    assert not (tmp_path / "new").exists()


def test_what_would_be_lost_or_spoil_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (
        ("folder", "is a folder"),
        ("no/file", "its folder does not exist"),
        ("loop", "cannot be written to"),
        ("taken", "something else"),
        ("folder/../taken", "something else"),
        ("bundle/file", "inside the bundle"),
        ("link/file", "inside the bundle"),
    ):
        with pytest.raises(CannotCreateError, match=why):
            check_output(
                tmp_path / name,
                distinct_from=[tmp_path / "folder" / ".." / "taken"],
                bundles=[tmp_path / "bundle", tmp_path / "link"],
            )


def test_a_dash_would_be_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs, and --image, take it for a standard stream."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotCreateError, match="does not stand for standard output"):
        check_output(Path("-"))


def test_what_the_system_lets_nobody_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it lets root, who runs tests."""
    (tmp_path / "old").touch()
    monkeypatch.setattr(outputs, "write_problem", lambda folder: "Read-only file system")
    check_output(tmp_path / "old", appended=True)
    for name, appended in (("new", True), ("new", False), ("old", False)):
        with pytest.raises(CannotCreateError, match="cannot be written to"):
            check_output(tmp_path / name, appended=appended)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CannotCreateError, match="cannot be written to"):
        check_output(tmp_path / "old", appended=True)


def test_a_closed_folder_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "denied", lambda path: True)
    with pytest.raises(CannotCreateError, match=r"no/file cannot be written to: Permission denied\."):
        check_output(tmp_path / "no" / "file")


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that would be full to the last byte."""
    check_space(tmp_path, 1, "It")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_200_000_000))
    check_space(tmp_path, 1_990_000_000, "It")
    with pytest.raises(StorageError, match=r"^It needs about 2\.31 GB in .*, but only 2\.2 GB are free\.$"):
        check_space(tmp_path, 2_100_000_000, "It")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=16_000_000))
    with pytest.raises(StorageError, match=r"needs about 0\.022 GB in .*, but only 0\.016 GB are free\.$"):
        check_space(tmp_path, 20_000_000, "It")


def test_a_write_that_fails_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with (
        pytest.raises(StorageError, match=r"file could not be written: No such file or directory\.$"),
        storage_errors(path, RuntimeError),
    ):
        path.write_text("lost")
    with pytest.raises(StorageError, match=r"pos, as when the disk is full\.$"), storage_errors(path, RuntimeError):
        raise RuntimeError("unexpected pos")
    with pytest.raises(RuntimeError), storage_errors(path):
        raise RuntimeError("a bug")


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """Behind links too, with the mode that the user gave them; an interrupt leaves nothing behind."""
    old = tmp_path / "folder" / "old"
    old.parent.mkdir()
    old.write_text("old")
    old.chmod(0o640)
    (tmp_path / "link").symlink_to(old)
    for error in (OSError, KeyboardInterrupt):
        with suppress(error), replacing(old) as temporary:
            temporary.write_text("half")
            raise error
        assert old.read_text() == "old"
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert (old.read_text(), old.stat().st_mode & 0o777) == ("new", 0o640)
    assert (tmp_path / "link").is_symlink()
    assert list(old.parent.iterdir()) == [old]


def test_a_file_is_replaced_where_no_mode_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on vfat: there the new file has the old one's mode already. Nor can every file system flush one file."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def unknown(file: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    old = tmp_path / "old"
    old.write_text("old")
    monkeypatch.setattr(os, "chmod", refused)
    monkeypatch.setattr(os, "fsync", unknown)
    with replacing(old) as temporary:
        temporary.write_text("new")
    assert old.read_text() == "new"


def test_a_pipe_or_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """/dev/null must not become a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as target:
        target.write_text("through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    ends = os.openpty()
    terminal = Path(os.ttyname(ends[1]))
    with replacing(terminal) as target:
        assert target == terminal
    for end in ends:
        os.close(end)
