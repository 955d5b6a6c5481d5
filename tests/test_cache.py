"""The cache on disk: what comes back is what was put, whatever happens to its files; and it stays small and private."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_edge import cache
from llava_edge.cache import Cache, user_cache
from llava_edge.cli import cli
from llava_edge.errors import UsageError

KEY, OTHER = "ab" * 32, "cd" * 32
PAYLOAD = bytes(range(256)) * 40
ABOUT = {"kind": "state", "model": "micro", "positions": "7"}


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    found = Cache(tmp_path / "cache", min_free=0)
    assert found.put(KEY, ABOUT, PAYLOAD)
    return found


def test_what_was_put_comes_back_in_another_process(kept: Cache) -> None:
    code = f"from llava_edge.cache import Cache; import sys, pathlib\n" \
           f"sys.stdout.buffer.write(Cache(pathlib.Path({str(kept.folder)!r})).get({KEY!r}) or b'nothing')"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == PAYLOAD
    assert kept.get(OTHER) is None
    assert kept.put(KEY, {}, memoryview(b"newer"))
    assert kept.get(KEY) == b"newer"


def test_nobody_else_can_read_it(kept: Cache) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in kept.folder.iterdir()}
    assert modes == {KEY: 0o600, "secret": 0o600}
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    for opened in (0o755, 0o750, 0o701):
        kept.folder.chmod(opened)
        assert kept.get(KEY) == PAYLOAD
        assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("name", [KEY, "secret", ""])
def test_what_is_somebody_elses_is_not_read(name: str, kept: Cache) -> None:
    os.chown(kept.folder / name, 65534, 65534)
    assert kept.get(KEY) is None


def test_a_link_to_a_folder_is_as_good_as_one(kept: Cache, tmp_path: Path) -> None:
    kept.folder.rename(tmp_path / "large disk")
    kept.folder.symlink_to(tmp_path / "large disk")
    assert kept.get(KEY) == PAYLOAD
    assert kept.put(OTHER, ABOUT, PAYLOAD)
    assert kept.disabled_reason() == ""
    (tmp_path / "large disk").chmod(0o755)
    assert kept.get(OTHER) == PAYLOAD
    assert stat.S_IMODE((tmp_path / "large disk").stat().st_mode) == 0o700


def test_a_link_to_a_folder_for_all_closes_nothing(kept: Cache, tmp_path: Path) -> None:
    """As root's to /tmp would."""
    kept.folder.rename(tmp_path / "tmp")
    kept.folder.symlink_to(tmp_path / "tmp")
    (tmp_path / "tmp").chmod(0o1777)
    assert kept.get(KEY) is None
    assert not kept.put(OTHER, ABOUT, PAYLOAD)
    assert "shared by all users" in kept.disabled_reason()
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777


def test_why_nothing_is_kept_is_said(kept: Cache, tmp_path: Path) -> None:
    assert kept.disabled_reason() == ""
    assert Cache(tmp_path / "later", min_free=0).disabled_reason() == ""
    shutil.rmtree(kept.folder)
    kept.folder.touch()
    assert "cannot be written to (Not a directory)" in kept.disabled_reason()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_somebody_else_is_said(linked: bool, kept: Cache, tmp_path: Path) -> None:
    """As after a single `sudo llava-edge run`; and a link to one of ours that another user made is none of ours."""
    if linked:
        kept.folder.rename(tmp_path / "ours")
        kept.folder.symlink_to(tmp_path / "ours")
    os.chown(kept.folder, 1, 1, follow_symlinks=False)
    assert kept.get(KEY) is None
    assert not kept.put(OTHER, ABOUT, PAYLOAD)
    assert "belongs to another user" in kept.disabled_reason()


def test_a_disk_without_permissions_is_said(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vfat, on which the mount decides who may read."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    kept.folder.chmod(0o755)
    monkeypatch.setattr(os, "chmod", refused)
    assert kept.get(KEY) is None
    assert not kept.put(OTHER, ABOUT, PAYLOAD)
    assert "on a disk without permissions" in kept.disabled_reason()


def test_a_long_description_costs_no_entry(kept: Cache) -> None:
    """A model may have any name."""
    assert kept.put(KEY, {"model": "long" * 5000}, PAYLOAD)
    assert kept.get(KEY) == PAYLOAD
    assert [entry.about for entry in kept.entries()] == [{}]


# Damage: nothing but the payload itself is ever returned.


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_byte_anywhere_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = Cache(tmp_path_factory.mktemp("cache"), min_free=0)
    assert kept.put(KEY, ABOUT, PAYLOAD)
    path = kept.folder / KEY
    whole = path.read_bytes()
    at = data.draw(st.one_of(st.integers(0, 120), st.integers(0, len(whole) - 1)))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    assert kept.get(KEY) is None
    assert not path.exists()
    assert kept.put(KEY, ABOUT, PAYLOAD)
    assert kept.get(KEY) == PAYLOAD


DAMAGE = {
    "emptied": "path.write_bytes(b'')",
    "cut": "os.truncate(path, 5000)",
    "longer": "path.write_bytes(path.read_bytes() + b'0')",
    "zeros": "path.write_bytes(bytes(path.stat().st_size))",
    "under another name": "path.rename(path.with_name(OTHER))",
    "a folder": "path.unlink(); path.mkdir()",
    "a link": "path.rename(path.parent.parent / 'real'); path.symlink_to(path.parent.parent / 'real')",
    "a pipe": "path.unlink(); os.mkfifo(path)",
    "another secret": "secret.write_bytes(bytes(32))",
    "a short secret": "secret.write_bytes(b'short')",
    "no secret": "secret.unlink()",
    "a folder for a secret": "secret.unlink(); secret.mkdir()",
    "no cache": "shutil.rmtree(path.parent)",
    "a file for a cache": "shutil.rmtree(path.parent); path.parent.touch()",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_a_miss(how: str, kept: Cache) -> None:
    path, secret = kept.folder / KEY, kept.folder / "secret"
    exec(DAMAGE[how], globals(), {"path": path, "secret": secret})
    assert kept.get(KEY) is None
    assert kept.get(OTHER) is None
    kept.put(OTHER, ABOUT, b"later")
    assert kept.get(OTHER) in (None, b"later")
    assert isinstance(kept.entries(), list)


def test_an_entry_of_somebody_elses_making_is_refused(kept: Cache, tmp_path: Path) -> None:
    """The right form and a right code, but not under this folder's secret."""
    foreign = Cache(tmp_path / "foreign", min_free=0)
    assert foreign.put(KEY, ABOUT, b"harm")
    shutil.copy(foreign.folder / KEY, kept.folder / KEY)
    assert kept.get(KEY) is None


@pytest.mark.parametrize("threads", [True, False])
def test_a_payload_of_many_parts(kept: Cache, monkeypatch: pytest.MonkeyPatch, threads: bool) -> None:
    """Each is checked while the next one is read, by a second thread if the system gives one."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("llava_edge.cache._READ_BYTES", 1000)
    if not threads:
        monkeypatch.setattr(threading.Thread, "start", refused)
    large = np.random.default_rng(0).bytes(10_500)
    for damaged in (None, 0, 999, 1000, 5432, 10_499):
        assert kept.put(OTHER, ABOUT, large)
        path = kept.folder / OTHER
        raw = bytearray(path.read_bytes())
        if damaged is not None:
            raw[damaged - len(large)] ^= 1
            path.write_bytes(raw)
        assert kept.get(OTHER) == (large if damaged is None else None)
        assert path.exists() == (damaged is None)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(kept: Cache) -> None:
    kept.folder.chmod(0o500)
    assert not kept.put(OTHER, ABOUT, PAYLOAD)
    assert kept.get(KEY) == PAYLOAD


def test_an_entry_whose_time_cannot_be_set_is_found(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that became read-only."""

    def refused(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("llava_edge.cache.os.utime", refused)
    assert kept.get(KEY) == PAYLOAD


def test_a_file_that_cannot_be_looked_at_costs_no_descriptor(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system whose server is gone: a server that asks again and again would run out of them."""

    def failed(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    before = len(list(Path("/dev/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr("llava_edge.cache.os.fstat", failed)
        assert kept.get(KEY) is None
        assert kept.entries()[0].about == {}
    assert len(list(Path("/dev/fd").iterdir())) == before
    assert kept.get(KEY) == PAYLOAD


def test_a_secret_that_cannot_be_written_leaves_no_file(kept: Cache) -> None:
    """As over a quota: every question would leave one more."""
    (kept.folder / "secret").unlink()
    code = (
        "import pathlib, resource, signal\nfrom llava_edge.cache import Cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\n"
        f"kept = Cache(pathlib.Path({str(kept.folder)!r}), min_free=0)\n"
        f"assert kept.get({KEY!r}) is None\nassert not kept.put({OTHER!r}, {{}}, b'')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [path.name for path in kept.folder.iterdir()] == [KEY]


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = Cache(tmp_path / "file" / "cache")
    assert not nowhere.put(KEY, ABOUT, PAYLOAD)
    assert nowhere.get(KEY) is None
    assert nowhere.entries() == []
    assert nowhere.clear() == (0, 0)


# Size.


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    kept = Cache(tmp_path, limit=4 * 1200, min_free=0)
    keys = [f"{i:064x}" for i in range(4)]
    for age, key in enumerate(keys[:3]):
        assert kept.put(key, {}, bytes(1000))
        os.utime(tmp_path / key, (0, time.time() - 100 + age))
    assert kept.get(keys[0]) is not None  # used just now
    assert kept.put(keys[3], {}, bytes(2000))
    assert [kept.get(key) is not None for key in keys] == [True, False, True, True]
    before = sorted(tmp_path.iterdir())
    assert not kept.put(keys[1], {}, bytes(5000))  # more than all of it: nothing goes in vain
    assert sorted(tmp_path.iterdir()) == before
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= kept.limit


def test_what_the_clock_dated_in_the_future_goes_first(tmp_path: Path) -> None:
    """Or, once the clock is right again, each new entry would go for the next one, for as long as it was ahead."""
    kept = Cache(tmp_path, limit=2 * 1200, min_free=0)
    unfinished, keys = tmp_path / ".new.tmp", [f"{i:064x}" for i in range(4)]
    assert all(kept.put(key, {}, bytes(1000)) for key in keys[:2])
    unfinished.write_bytes(bytes(10))
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() + 1e7))
    assert all(kept.put(key, {}, bytes(1000)) for key in keys[2:])
    assert [kept.get(key) is not None for key in keys] == [False, False, True, True]
    assert not unfinished.exists()


def test_a_full_folder_is_not_looked_through_for_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look takes 4 us an entry, of which there are thousands, while the model computes."""
    kept, looks, files = Cache(tmp_path, limit=100 * 1200, min_free=0), list[int](), Cache._scan

    def noticed(self: Cache) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        looks.append(1)
        return files(self)

    monkeypatch.setattr(Cache, "_scan", noticed)
    for number in range(600):
        assert kept.put(f"{number:064}", {}, b"x" * 160)
        assert number % 5 or sum(info.st_size for _, info in files(kept)) <= kept.limit
    assert len(looks) < 90
    assert kept.get(f"{599:064}") == b"x" * 160
    other = Cache(tmp_path, limit=1200, min_free=0)
    assert other.put("f" * 64, {}, b"x" * 160)
    assert sum(info.st_size for _, info in files(other)) <= other.limit


def test_the_disk_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(tmp_path, min_free=10_000)
    assert kept.put(KEY, {}, bytes(1000))
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10_500))
    assert kept.put(OTHER, {}, bytes(1000))  # in the place of the first
    assert kept.get(KEY) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 9_000))
    assert not kept.put(KEY, {}, bytes(1000))
    assert kept.get(OTHER) is not None  # its place would not be enough
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10_500))
    assert kept.put(KEY, {}, bytes(1000))


def test_an_entry_that_another_process_removes_hides_no_other(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or `cache clear` would leave some, and the limit would be kept to by those that were seen."""
    listed = os.scandir

    def removed_meanwhile(folder: Path) -> contextlib.AbstractContextManager[list[os.DirEntry[str]]]:
        found = sorted(listed(folder), key=lambda item: item.name)
        (kept.folder / gone).unlink(missing_ok=True)
        return contextlib.nullcontext(found)

    gone = "00" * 32
    assert kept.put(gone, ABOUT, PAYLOAD)
    monkeypatch.setattr("llava_edge.cache.os.scandir", removed_meanwhile)
    assert [entry.path.name for entry in kept.entries()] == [KEY]
    assert kept.put(gone, ABOUT, PAYLOAD)
    assert kept.clear()[0] == 1
    assert kept.get(KEY) is None


def test_an_entry_that_the_disk_fails_on_hides_no_other(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(follow_symlinks: bool) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    def damaged(folder: Path) -> contextlib.AbstractContextManager[list[Any]]:
        return contextlib.nullcontext([SimpleNamespace(name=OTHER, stat=failed), *listed(folder)])

    listed = os.scandir
    monkeypatch.setattr("llava_edge.cache.os.scandir", damaged)
    full = Cache(kept.folder, limit=kept.folder.joinpath(KEY).stat().st_size, min_free=0)
    assert full.put("ef" * 32, ABOUT, PAYLOAD)
    assert [entry.path.name for entry in full.entries()] == ["ef" * 32]


def test_nothing_goes_into_a_folder_that_cannot_be_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would seem to be empty, and could grow for ever."""

    def failed(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    kept = user_cache()
    assert kept.put(KEY, ABOUT, PAYLOAD)
    monkeypatch.setattr("llava_edge.cache.os.scandir", failed)
    assert not user_cache().put(OTHER, ABOUT, PAYLOAD)
    assert user_cache().get(KEY) == PAYLOAD
    for command in ("ls", "clear"):
        assert run("cache", command) == (74, "", f"llava-edge: {kept.folder}: Input/output error.\n")
    monkeypatch.setattr("llava_edge.cli.doctor._engines", list)
    assert f"nothing is cached: {kept.folder} cannot be read (Input/output error)." in run("doctor", "--json")[1]


def test_a_folder_that_is_named_like_an_unfinished_file_stays(kept: Cache) -> None:
    """It could not be removed as a file, and nothing would go in any more."""
    folder = kept.folder / ".editor.tmp"
    folder.mkdir()
    os.utime(folder, (0, 0))
    assert Cache(kept.folder, min_free=0).put(OTHER, ABOUT, PAYLOAD)
    assert kept.clear()[0] == 2
    assert folder.exists()


def test_other_files_in_the_folder_stay(kept: Cache) -> None:
    """Since a link may lead to one that has more than the cache."""
    others = [kept.folder / name for name in ("letter.tmp", "photo.jpg")]
    for path in others:
        path.touch()
        os.utime(path, (0, 0))
    assert Cache(kept.folder, limit=kept.folder.joinpath(KEY).stat().st_size, min_free=0).put(OTHER, ABOUT, PAYLOAD)
    kept.clear()
    assert all(path.exists() for path in others)


def test_files_that_were_never_finished_go(kept: Cache) -> None:
    new, old = kept.folder / ".new.tmp", kept.folder / ".old.tmp"
    for path in (new, old):
        path.write_bytes(bytes(100))
    os.utime(old, (0, time.time() - 2 * cache._STALE_SECONDS))
    assert Cache(kept.folder, min_free=0).put(OTHER, ABOUT, PAYLOAD)  # of a process that looks for the first time
    assert new.exists()
    assert not old.exists()


def test_a_writer_killed_at_any_moment_leaves_nothing_wrong(tmp_path: Path) -> None:
    """Every file operation in turn is the last one of its process."""
    code = (
        "import os, sys, pathlib\nfrom llava_edge.cache import Cache\nleft = int(sys.argv[1])\n"
        "def watch(event, _):\n    global left\n"
        "    if event in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.chmod'):\n"
        "        left -= 1\n        left or os._exit(9)\n"
        f"sys.addaudithook(watch)\nCache(pathlib.Path({str(tmp_path)!r}) / 'cache', min_free=0)"
        f".put({KEY!r}, {{}}, b'x' * 50_000)\n"
    )
    codes = []
    for left in range(1, 30):
        codes.append(subprocess.run([sys.executable, "-c", code, str(left)], check=False).returncode)
        assert Cache(tmp_path / "cache").get(KEY) in (None, b"x" * 50_000)
        if codes[-1] == 0:
            break
    assert codes[0] == 9
    assert codes[-1] == 0
    assert Cache(tmp_path / "cache").get(KEY) == b"x" * 50_000


# The command.


def test_list_and_clear(isolated_home: Path) -> None:
    kept = user_cache()
    assert kept.folder == isolated_home / "cache"
    assert kept.put(KEY, ABOUT, PAYLOAD)
    assert kept.put(OTHER, {"model": "a\x1b[31m"}, PAYLOAD)
    (kept.folder / OTHER).write_bytes(b"damaged")
    listed = CliRunner().invoke(cli, ["cache", "ls"])
    assert "state" in listed.stdout
    assert "7 positions" in listed.stdout
    assert "2 entries" in listed.stderr
    found = json.loads(CliRunner().invoke(cli, ["cache", "ls", "--json"]).stdout)
    assert {entry["path"] for entry in found["entries"]} == {str(kept.folder / key) for key in (KEY, OTHER)}
    assert {entry["about"].get("positions") for entry in found["entries"]} == {7, None}
    assert "2 entries removed" in CliRunner().invoke(cli, ["cache", "clear"]).stderr
    assert user_cache().entries() == []
    assert user_cache().get(KEY) is None


@pytest.mark.parametrize("command", ["ls", "clear"])
def test_a_folder_that_may_not_be_read_is_not_said_to_be_empty(
    command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = user_cache().folder
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    code, out, err = run("cache", command)
    assert (code, out, err) == (66, "", f"llava-edge: {folder} cannot be read: Permission denied.\n")


@pytest.mark.parametrize("value", ["-1", "4G", "1e3", "99999999999", "٣"])
def test_a_limit_that_is_no_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_CACHE_MIB", value)
    with pytest.raises(UsageError, match="LLAVA_EDGE_CACHE_MIB"):
        user_cache()


def test_a_limit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_CACHE_MIB", "0")
    assert not user_cache().put(KEY, ABOUT, PAYLOAD)
    monkeypatch.setenv("LLAVA_EDGE_CACHE_MIB", "1")
    assert user_cache().limit == 1 << 20
