"""Kernels of ours inside the unmodified llama.cpp: a faster prefill, on weights left where they are mapped.

`python -m llava_edge.runtimes.native` builds and tries them, once for each machine; our set-up does that. What it found
out lies in the cache folder, below a key of everything it depends on: llama.cpp's library, our sources, the processor.
Loading a model then asks `activate`. What is not as it was tried is not used: llama.cpp computes as it does without us.

src/         the shared libraries: a backend for ggml and operators for ONNX Runtime, one file for each kernel
build.py     sources -> libraries             check.py     is it right, does it pay: in a process of its own
choice.py    what is used after that, and why
ggml.py      one operation of ggml at a time  library.py   the library's own functions
operator.py  vision.onnx with our operators   onnx_bytes.py  its graph, read and written
steps.py     which of its nodes are one step of CLIP
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llava_edge import interpreter, store
from llava_edge.errors import LlavaEdgeError, MissingError, UnavailableError
from llava_edge.gguf import Gguf
from llava_edge.runtimes import bindings, devices
from llava_edge.runtimes.native import build
from llava_edge.runtimes.native.choice import COMMAND, Status, choose, pays
from llava_edge.runtimes.native.ggml import Ggml, loaded
from llava_edge.runtimes.native.library import DEVICE, Library

ACCEPTED = {("0.3.36", "0.25.3")}  # llama-cpp-python, ggml: what src/ggml_interface.h was compared with
CHECK_SECONDS = 300

# Features of the processor, by machine, and how a sentence calls them.
_NEEDED = {
    "x86_64": ({"avx2", "fma", "f16c"}, "AVX2, FMA or F16C"),
    "aarch64": ({"asimddp"}, "the instructions of FEAT_DotProd"),
}

LIBRARY, OPERATOR, _STATE = "kernels.so", "vision.so", "state.json"  # in `place()`
DAY = 86400  # seconds
KEPT_DAYS = 60  # since its last use: what other versions built


@dataclass
class _Process:
    """What became of loading: a backend stays until the process ends, for all of its models."""

    decided: Status | None = None


_process = _Process()
_lock = threading.Lock()


def status() -> Status:
    """What a model loaded now would use, from what was found out before. Opens no library."""
    if wanted() == "off":
        return Status("Turned off by LLAVA_EDGE_NATIVE.")
    try:
        state = _state(place())
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, ValueError, MissingError):
        return Status("Not built for this machine.", COMMAND)
    try:
        return choose(state, wanted())
    except (AttributeError, KeyError, TypeError, ValueError):
        return Status("Not used: what was found out about them is damaged.", COMMAND)


def unbuilt() -> bool:
    """Whether nothing is used for the only reason that `COMMAND` was not run for these sources yet."""
    try:
        if wanted() == "off" or (place() / _STATE).exists():
            return False
        build.tools()
    except (LlavaEdgeError, OSError):
        return False
    return True


def activate() -> Status:
    """Before a model is loaded: let llama.cpp use what `status` says. Whatever goes wrong, nothing is used.

    Once something is, the same is for each later model: those that are open already would be computed by it, too.
    """
    with _lock:
        if _process.decided is not None:
            return _process.decided
        found = status()
        if not found.used:
            return found
        try:
            path = place() / LIBRARY
            ggml = _fitting(path, found)
        except (OSError, UnavailableError) as error:
            return Status(f"Not used: {error}", COMMAND)
        try:
            _load(path, ggml, found)
        except (OSError, UnavailableError, ValueError) as error:  # half of it may be loaded: it is not tried again
            found = Status(f"Not used: {error}", COMMAND)
        _process.decided = found
        return found


def attends(language: Gguf) -> bool:
    """Whether our attention takes heads as wide as a model's (src/attention.cpp). Raises `BundleError`."""
    if "llama.attention.key_length" in language.metadata:
        width = language.number("llama.attention.key_length", 1, 1 << 17)
    else:
        width = language.metadata["llama.embedding_length"] // language.number("llama.attention.head_count", 1, 1024)
    return width % 16 == 0 and width <= 256


def operator_library() -> Path | None:
    """The operator for ONNX Runtime, if it was tried here and was right. Opens nothing."""
    return _tried_operator(lambda state: True)


def projector_library() -> Path | None:
    """The same file, if its kernel computes the projector faster than numpy does here."""
    return _tried_operator(lambda state: pays(state["projector"], "ours"))


def _tried_operator(also: Callable[[dict[str, Any]], bool]) -> Path | None:
    try:
        folder = place()
        state = _state(folder)
        good = wanted() != "off" and "failed" not in state and OPERATOR not in state["problems"] and also(state)
        return folder / OPERATOR if good and _sha256(folder / OPERATOR) == state["operator"] else None
    except (LlavaEdgeError, OSError, AttributeError, ValueError, KeyError, TypeError):
        return None


def prepare(say: Callable[[str], None] = lambda line: None) -> Status:
    """Build and try the kernels for this machine, whatever was known before. Raises nothing; the status says it."""
    try:
        folder = place()
        say("Compiling the native kernels.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            work = Path(name)
            build.build(work / LIBRARY, work / OPERATOR)
            say("Trying them against llama.cpp's own; takes about 25 s.")
            hashes = {"sha256": _sha256(work / LIBRARY)}
            if (work / OPERATOR).exists():  # not on aarch64
                hashes["operator"] = _sha256(work / OPERATOR)
            state = {**hashes, **_check(work / LIBRARY)}
            (work / _STATE).write_text(json.dumps(state), "utf-8")
            _publish(work, folder)
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, LlavaEdgeError) as error:
        return Status(f"The native kernels could not be built: {error}", COMMAND)
    return status()


def wanted() -> str:
    """$LLAVA_EDGE_NATIVE: empty, "off", or the name of a kernel."""
    return os.environ.get("LLAVA_EDGE_NATIVE", "").strip().lower()


def _fitting(path: Path, found: Status) -> Ggml:
    """The loaded ggml, if it is one that the library was made for. Raises `UnavailableError` or `OSError`."""
    ggml = Ggml()
    version = (bindings.version(), ggml.version())
    if version not in ACCEPTED:
        raise UnavailableError(f"llama-cpp-python {version[0]} with ggml {version[1]} is not one they were made for.")
    if loaded("libgomp.so.1") is None:
        raise UnavailableError("this llama.cpp computes without OpenMP, whose threads they share.")
    if _sha256(path) != found.library:
        raise UnavailableError("their file has changed since they were tried.")
    return ggml


def _load(path: Path, ggml: Ggml, found: Status) -> None:
    """Into this process, to stay. Raises `UnavailableError`, `OSError` or `ValueError`."""
    library = Library(path)
    library.use()
    if not ggml.load_backend(path) or not ggml.device(DEVICE):
        raise UnavailableError("ggml does not accept them.")
    library.use(found.many, found.few, found.attention, found.few_attention)


def _check(library: Path) -> dict[str, Any]:
    """What the child process says about a library."""
    code = f"from llava_edge.runtimes.native import check; check.main({str(library)!r})"
    try:
        found: dict[str, Any] = interpreter.run_json("The check of native kernels", "-c", code, seconds=CHECK_SECONDS)
        return found
    except interpreter.ChildError as error:
        return {"failed": f"their check {error}"}


def place() -> Path:
    """Where everything about this machine's kernels is. Raises `UnavailableError` where there can be none."""
    machine = platform.machine() if sys.platform == "linux" else ""
    if machine not in _NEEDED:
        raise UnavailableError("There are native kernels for Linux on x86-64 and aarch64 only.")
    name, features = devices.processor()
    needed, said = _NEEDED[machine]
    if not needed <= set(features):
        raise UnavailableError(f"This processor lacks {said}.")
    base = next(iter(sorted((build.package() / "lib").glob("libggml-base.so*"))), None)
    if base is None:
        raise UnavailableError("This llama-cpp-python has no libggml-base.")
    return store.home() / "native" / _key(base, f"{name} {features}")


@cache
def _key(base: Path, processor: str) -> str:
    """Of all that the kernels depend on; once in a process, which asks several times."""
    digest = hashlib.sha256(processor.encode())
    for path in (base, *sorted(build.SOURCES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _state(folder: Path) -> Any:
    """What was found out. That it was asked for is noted in the file's time, once a day, for `_clear_up`."""
    path = folder / _STATE
    state = json.loads(path.read_text("utf-8"))
    with suppress(OSError):  # somebody else's, or read-only
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    return state


def _clear_up(used: Path) -> None:
    """Remove the folders of other versions that were not used for long. Where one is loaded, it stays mapped."""
    with suppress(OSError):
        for folder in used.parent.iterdir():
            if folder == used or not re.fullmatch("[0-9a-f]{32}", folder.name):
                continue
            state = folder / _STATE
            since = (state if state.exists() else folder).stat().st_mtime
            if time.time() - since > KEPT_DAYS * DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    """Libraries, then state: with a state everything is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, OPERATOR, _STATE):
        if (work / name).exists():
            shutil.move(work / name, folder / name)
    _clear_up(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
