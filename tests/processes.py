"""Processes of their own, for what a process keeps to its end, or with other mounts; what a process has in memory, and
may write."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def in_child(
    code: str,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    given: str = "",
    clone: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run `code`, which must end well. given: on its standard input; clone: whose llava_edge it imports."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=clone, env=environment, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def with_mounts(mount: str, *command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` where the shell command `mount` has mounted something, for it alone.

    Skips the test where this user may not.
    """
    own = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    mounted = [*own, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*mounted, "true"], cwd=folder, capture_output=True, check=False).returncode
    ):
        pytest.skip("this user may mount nothing here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*mounted, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than these bytes into a file fails, as on a full disk (EFBIG)."""
    limit, bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    sys.dont_write_bytecode = True  # Python 3.11 would keep what was cut off, and fail to import it ever after
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        sys.dont_write_bytecode = bytecode


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    return 1024 * sum(map(int, re.findall(rf"{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", text)))
