"""Where models are looked for, and what is said when there is none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from llava_edge import store
from llava_edge.bundle import LANGUAGE, MANIFEST
from llava_edge.errors import MissingError, UsageError


def install(name: str) -> Path:
    folder = store.models_folder() / name
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return folder


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert store.home() == tmp_path / "own"
    monkeypatch.setenv("LLAVA_EDGE_HOME", "~/models")  # as service managers and .env files leave it
    assert store.home() == tmp_path / "me" / "models"
    monkeypatch.delenv("LLAVA_EDGE_HOME")
    assert store.home() == tmp_path / "cache" / "llava-edge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.home() == tmp_path / "me" / ".cache" / "llava-edge"
    assert not store.home().exists()  # asking creates nothing


def test_a_model_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(MissingError, match="llava-edge models pull smol") as caught:
        store.resolve("smol")
    assert f"in {store.models_folder()}, where LLAVA_EDGE_HOME says" in str(caught.value)


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "https://example.org/llava", "hf://a/b"])
def test_an_address_of_a_checkpoint_says_what_to_do_with_it(name: str) -> None:
    with pytest.raises(MissingError, match=r"download the checkpoint, then run 'llava-edge export"):
        store.resolve(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    install("mine")
    with pytest.raises(MissingError, match="smol, mine"):
        store.resolve("no-such-model")


@pytest.mark.parametrize("name", ["../models/mine", "..", ".", "", " ", "a/b", "a\\b"])
def test_a_name_never_leaves_the_folder(name: str) -> None:
    install("mine")
    for folder in (store.models_folder(), store.home()):
        (folder / MANIFEST).write_text("{}")
    if name and Path(name).exists():
        assert store.resolve(name) == Path(name)
    else:
        with pytest.raises(MissingError):
            store.resolve(name)


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = install("mine")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert store.resolve("mine") == installed
    assert store.resolve("./mine").resolve() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))  # shells leave `--model=~/mine` as it is
    assert store.resolve("~/mine") == store.resolve(Path("~/mine")) == tmp_path / "mine"
    assert store.resolve(tmp_path / "mine") == tmp_path / "mine"
    assert store.resolve(Path("mine")) == Path("mine")  # a Path is never a name


def test_a_folder_that_is_here_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoints/llava` looks like the name of a model on a hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="downloads only its own models"):
        store.refuse_download("checkpoints/llava", "get it")
    (tmp_path / "checkpoints" / "llava").mkdir(parents=True)
    store.refuse_download("checkpoints/llava", "get it")


def test_entries_show_known_and_installed() -> None:
    assert [(entry.name, entry.folder) for entry in store.entries()] == [("smol", None)]
    folder = install("mine")
    (store.models_folder() / "half").mkdir()  # no manifest: not a model
    assert [(entry.name, entry.folder) for entry in store.entries()] == [("smol", None), ("mine", folder)]


def test_only_what_was_pulled_is_removed(tmp_path: Path) -> None:
    """Neither what a link leads to, be it to a folder or to a file, nor what somebody put beside the parts."""
    mine = install("mine")
    (mine / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"also holds notes\.txt"):
        store.remove("mine")
    (tmp_path / "weights").write_text("mine")
    (mine / LANGUAGE).symlink_to(tmp_path / "weights")
    (store.models_folder() / "link").symlink_to(mine)
    with pytest.raises(UsageError, match="is a link to"):
        store.remove("link")
    assert len(list(mine.iterdir())) == 3
    (mine / "notes.txt").unlink()
    store.remove("mine")
    assert not mine.exists()
    assert (tmp_path / "weights").read_text() == "mine"


def test_what_is_in_a_closed_folder_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with root's HOME. (Permissions would not stop tests that root runs.)"""
    mine, closed = install("mine"), [str(store.models_folder()), str(tmp_path / "closed")]
    look, ask = os.stat, os.access

    def is_closed(path: Any) -> bool:
        return str(path).startswith(tuple(f"{folder}/" for folder in closed))

    def stat(path: Any, **more: Any) -> os.stat_result:
        if is_closed(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **more)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: not is_closed(path) and ask(path, mode))
    remedy = r"cannot be read: Permission denied; set LLAVA_EDGE_HOME"
    for name in ("smol", "mine"):
        for action in (store.resolve, store.remove):
            with pytest.raises(MissingError, match=remedy):
                action(name)
    assert [(entry.name, entry.folder) for entry in store.entries()] == [("smol", mine.with_name("smol"))]
    with pytest.raises(MissingError, match=r"closed/bundle cannot be read: Permission denied\."):
        store.resolve(str(tmp_path / "closed" / "bundle"))
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert store.resolve("mine") == Path("mine")  # which is open


@pytest.mark.parametrize("name", ["../models/mine", "..", ".", "", "a/b", "smol"])
def test_nothing_is_removed_by_what_is_no_name_of_a_model(name: str) -> None:
    folder = install("mine")
    for above in (store.models_folder(), store.home()):
        (above / MANIFEST).write_text("{}")
    with pytest.raises(MissingError, match=r"installed: mine\."):
        store.remove(name)
    assert folder.is_dir()
