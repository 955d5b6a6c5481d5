"""The compiled kernels of this machine and what their tests found, in a folder per version of all they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llava_edge import store
from llava_edge.errors import UnavailableError
from llava_edge.runtimes import machine
from llava_edge.runtimes.native import build

LIBRARY, OPERATOR, STATE = "kernels.so", "vision.so", "state.json"  # in `folder()`
DAY = 86400  # seconds
MAX_UNUSED_DAYS = 60  # builds of other versions are removed after this time without use
UNFINISHED = "build-"  # beginning of the names of folders that are compiled in

# Required processor features by machine, and their names for an error message.
_REQUIRED_FEATURES = {
    "x86_64": ({"avx2", "fma", "f16c"}, "AVX2, FMA or F16C"),
    "aarch64": ({"asimddp"}, "the instructions of FEAT_DotProd"),
}


def folder() -> Path:
    """Folder of this machine's libraries and results. Raises `UnavailableError` where the kernels cannot run."""
    architecture = platform.machine() if sys.platform == "linux" else ""
    if architecture not in _REQUIRED_FEATURES:
        raise UnavailableError("Native kernels exist only for Linux on x86-64 and aarch64.")
    name, features = machine.processor()
    required, feature_names = _REQUIRED_FEATURES[architecture]
    if not required <= set(features):
        raise UnavailableError(f"This processor lacks {feature_names}.")
    library = build.package() / "lib"
    base = next(iter(sorted(library.glob("libggml-base.so*"))), None)
    if base is None:
        raise UnavailableError("This llama-cpp-python has no libggml-base.")
    # Of llama.cpp's own kernels there may be one file per processor; each may have copies in the place of links.
    rivals = {path.name.split(".so")[0]: path for path in sorted(library.glob("libggml-cpu*.so*"))}
    return store.home() / "native" / _key((base, *rivals.values()), f"{name} {features}")


def read_state(folder: Path) -> Any:
    """Read the test results; touch the file at most once a day, which tells `_remove_stale_builds` of the use."""
    path = folder / STATE
    state = json.loads(path.read_text("utf-8"))
    with suppress(OSError):  # another user's, or read-only
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    return state


def publish(work: Path, folder: Path) -> None:
    """Move the libraries, then the state: if there is a state, everything is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, OPERATOR, STATE):
        if (work / name).exists():
            shutil.move(work / name, folder / name)
    _remove_stale_builds(folder)


@cache
def _key(libraries: tuple[Path, ...], processor: str) -> str:
    """Hash of everything that the kernels, and the races that they won, depend on."""
    digest = hashlib.sha256(processor.encode())
    for path in (*libraries, *sorted(build.SOURCES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _remove_stale_builds(used: Path) -> None:
    """Remove other versions' folders after `MAX_UNUSED_DAYS` without use, and what killed builds left. A loaded library
    stays mapped.
    """
    with suppress(OSError):
        for folder in used.parent.iterdir():
            unfinished = folder.name.startswith(UNFINISHED)
            if folder == used or not (unfinished or re.fullmatch("[0-9a-f]{32}", folder.name)):
                continue
            state = folder / STATE
            last_use = (state if state.exists() else folder).stat().st_mtime
            if time.time() - last_use > (DAY if unfinished else MAX_UNUSED_DAYS * DAY):
                shutil.rmtree(folder, ignore_errors=True)
