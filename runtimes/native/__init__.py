"""Our own kernels in an unmodified llama.cpp: a faster prefill on memory-mapped weights.

`python -m llava_edge.runtimes.native` builds and tests them once per machine, as part of the set-up. Libraries and
test results are cached under a key of everything they depend on: llama.cpp's library, our sources, the processor.
Loading a model then calls `activate`. If anything differs from what was tested, llama.cpp's own kernels are used.

src/         the shared libraries: a backend for ggml and operators for ONNX Runtime, one file per kernel
build.py     compiles them                    check.py     tests and benchmarks them in a child process
choice.py    which kernels are used, and why
ggml.py      runs single operations of ggml   library.py   the library's own functions
operator.py  vision.onnx with our operators   onnx_bytes.py  reads and writes its graph
patterns.py  finds the node patterns in it that our operators replace
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
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from llava_edge import interpreter, store
from llava_edge.errors import LlavaEdgeError, MissingError, UnavailableError
from llava_edge.gguf import Gguf, Tensor
from llava_edge.locks import fork_safe_lock
from llava_edge.runtimes import bindings, machine
from llava_edge.runtimes.native import build
from llava_edge.runtimes.native.choice import COMMAND, Status, choose, is_faster
from llava_edge.runtimes.native.ggml import Ggml, loaded_library
from llava_edge.runtimes.native.library import DEVICE, Library

ACCEPTED = {("0.3.36", "0.25.3")}  # llama-cpp-python, ggml: versions that src/ggml_interface.h was compared with
CHECK_SECONDS = 300

# Required processor features by machine, and their names for an error message.
_REQUIRED_FEATURES = {
    "x86_64": ({"avx2", "fma", "f16c"}, "AVX2, FMA or F16C"),
    "aarch64": ({"asimddp"}, "the instructions of FEAT_DotProd"),
}

LIBRARY, OPERATOR, _STATE = "kernels.so", "vision.so", "state.json"  # in `kernel_folder()`
DAY = 86400  # seconds
MAX_F16_VALUES = 1 << 20  # of a matrix in products of few rows (src/few.cpp); those of most adapters are smaller
MAX_UNUSED_DAYS = 60  # builds of other versions are removed after this time without use


@dataclass
class _Process:
    """Result of loading: a backend stays loaded until the process ends, for all models."""

    status: Status | None = None
    library: Library | None = None


_process = _Process()
_lock = fork_safe_lock()


def status() -> Status:
    """What a model loaded now would use, according to the cached test results. Opens no library."""
    if requested_kernel() == "off":
        return Status("Turned off by LLAVA_EDGE_NATIVE.")
    try:
        state = _read_state(kernel_folder())
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, ValueError, MissingError):
        return Status("Not built for this machine.", COMMAND)
    try:
        return choose(state, requested_kernel())
    except (AttributeError, KeyError, TypeError, ValueError):
        return Status("Not used: their cached test results are damaged.", COMMAND)


def needs_build() -> bool:
    """Whether the kernels could be built here, but `COMMAND` was not run for these sources yet."""
    try:
        if requested_kernel() == "off" or (kernel_folder() / _STATE).exists():
            return False
        build.find_toolchain()
    except (LlavaEdgeError, OSError):
        return False
    return True


def activate() -> Status:
    """Load the kernels that `status` names into llama.cpp; call before a model is loaded. Uses none if that fails.

    Later calls return the first result, because a backend serves all models of the process, including open ones.
    """
    with _lock:
        if _process.status is not None:
            return _process.status
        expected = status()
        if not expected.used:
            return expected
        try:
            path = kernel_folder() / LIBRARY
            ggml = _compatible_ggml(path, expected)
        except (OSError, UnavailableError) as error:
            return Status(f"Not used: {error}", COMMAND)
        try:
            _load_backend(path, ggml, expected)
            _process.status = expected
        except (OSError, UnavailableError, ValueError) as error:  # may be partly loaded, so it is not tried again
            _process.status = Status(f"Not used: {error}", COMMAND)
        return _process.status


def set_threads(count: int) -> None:
    """Set the threads of our kernels for all models of the process; 0: as many as llama.cpp's own operations use."""
    if _process.library is not None:
        _process.library.set_threads(count)


def supports_attention(language: Gguf) -> bool:
    """Whether our attention kernel supports a model's head width (src/attention.cpp). Raises `BundleError`."""
    if "llama.attention.key_length" in language.metadata:
        width = language.number("llama.attention.key_length", 1, 1 << 17)
    else:
        width = language.metadata["llama.embedding_length"] // language.number("llama.attention.head_count", 1, 1024)
    return width % 16 == 0 and width <= 256


def computes_all(status: Status, language: Gguf, adapter: Gguf | None) -> bool:
    """Whether our kernels compute all products and all attention of a model. Raises `BundleError`."""
    files = [language] if adapter is None else [language, adapter]
    matrices = [tensor for file in files for tensor in file.tensors.values() if len(tensor.shape) > 1]
    products = all(tensor.kind in status.few_rows and _supports_few(tensor) for tensor in matrices)
    return status.attention and status.few_attention and products and supports_attention(language)


def _supports_few(matrix: Tensor) -> bool:
    """Whether our kernels for few rows take a matrix of a supported type (src/few.cpp)."""
    return matrix.kind != "F16" or (matrix.shape[1] % 8 == 0 and prod(matrix.shape) <= MAX_F16_VALUES)


def operator_library() -> Path | None:
    """The operators for ONNX Runtime, if they passed their tests here. Opens no library."""
    return _verified_operator(lambda state: True)


def projector_library() -> Path | None:
    """The same file, if its kernel computes the projector faster than numpy here."""
    return _verified_operator(lambda state: is_faster(state["projector"], "ours"))


def _verified_operator(condition: Callable[[dict[str, Any]], bool]) -> Path | None:
    try:
        if requested_kernel() == "off":
            return None
        folder = kernel_folder()
        state = _read_state(folder)
        passed = "failed" not in state and OPERATOR not in state["problems"] and condition(state)
        return folder / OPERATOR if passed and _sha256(folder / OPERATOR) == state["operator"] else None
    except (LlavaEdgeError, OSError, AttributeError, ValueError, KeyError, TypeError):
        return None


def prepare(log: Callable[[str], None] = lambda line: None) -> Status:
    """Build and test the kernels for this machine, even if that was done before. Errors are in the status returned."""
    try:
        folder = kernel_folder()
        log("Compiling the native kernels.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            work = Path(name)
            for kernel, error in build.build(work / LIBRARY, work / OPERATOR).items():
                log(f"{kernel} kernels are left out: {error}")
            log("Testing them and comparing their speed with llama.cpp's own; this takes about 25 s.")
            hashes = {"sha256": _sha256(work / LIBRARY)}
            if (work / OPERATOR).exists():  # not on aarch64
                hashes["operator"] = _sha256(work / OPERATOR)
            state = {**hashes, **_run_check(work / LIBRARY)}
            (work / _STATE).write_text(json.dumps(state), "utf-8")
            _publish(work, folder)
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, LlavaEdgeError) as error:
        return Status(f"The native kernels could not be built: {error}", COMMAND)
    return status()


def requested_kernel() -> str:
    """Value of $LLAVA_EDGE_NATIVE: empty, "off", or the name of a kernel."""
    return os.environ.get("LLAVA_EDGE_NATIVE", "").strip().lower()


def _compatible_ggml(path: Path, expected: Status) -> Ggml:
    """The loaded ggml, if the library can be loaded into it. Raises `UnavailableError` or `OSError`."""
    ggml = Ggml()
    version = (bindings.version(), ggml.version())
    if version not in ACCEPTED:
        raise UnavailableError(f"they do not support llama-cpp-python {version[0]} with ggml {version[1]}.")
    if loaded_library("libgomp.so.1") is None:
        raise UnavailableError("this llama.cpp was built without OpenMP, whose threads they share.")
    if _sha256(path) != expected.library:
        raise UnavailableError("their file has changed since it was tested.")
    return ggml


def _load_backend(path: Path, ggml: Ggml, status: Status) -> None:
    """Load the library into this process for good. Raises `UnavailableError`, `OSError` or `ValueError`."""
    library = Library(path)
    library.configure()
    if not ggml.load_backend(path) or not ggml.device(DEVICE):
        raise UnavailableError("ggml does not accept them.")
    library.configure(status.many_rows, status.few_rows, status.attention, status.few_attention)
    _process.library = library


def _run_check(library: Path) -> dict[str, Any]:
    """Test a library in a child process; returns its results."""
    code = f"from llava_edge.runtimes.native import check; check.main({str(library)!r})"
    try:
        found: dict[str, Any] = interpreter.run_json("The check of native kernels", "-c", code, seconds=CHECK_SECONDS)
        return found
    except interpreter.ChildError as error:
        return {"failed": f"their check {error}"}


def kernel_folder() -> Path:
    """Folder of this machine's libraries and results. Raises `UnavailableError` where the kernels cannot run."""
    architecture = platform.machine() if sys.platform == "linux" else ""
    if architecture not in _REQUIRED_FEATURES:
        raise UnavailableError("Native kernels exist only for Linux on x86-64 and aarch64.")
    name, features = machine.processor()
    required, feature_names = _REQUIRED_FEATURES[architecture]
    if not required <= set(features):
        raise UnavailableError(f"This processor lacks {feature_names}.")
    base = next(iter(sorted((build.package() / "lib").glob("libggml-base.so*"))), None)
    if base is None:
        raise UnavailableError("This llama-cpp-python has no libggml-base.")
    return store.home() / "native" / _key(base, f"{name} {features}")


@cache
def _key(base: Path, processor: str) -> str:
    """Hash of everything that the kernels depend on."""
    digest = hashlib.sha256(processor.encode())
    for path in (base, *sorted(build.SOURCES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _read_state(folder: Path) -> Any:
    """Read the test results; touch the file at most once a day, which tells `_remove_stale_builds` of the use."""
    path = folder / _STATE
    state = json.loads(path.read_text("utf-8"))
    with suppress(OSError):  # another user's, or read-only
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    return state


def _remove_stale_builds(used: Path) -> None:
    """Remove other versions' folders after `MAX_UNUSED_DAYS` without use. A loaded library stays mapped."""
    with suppress(OSError):
        for folder in used.parent.iterdir():
            if folder == used or not re.fullmatch("[0-9a-f]{32}", folder.name):
                continue
            state = folder / _STATE
            last_use = (state if state.exists() else folder).stat().st_mtime
            if time.time() - last_use > MAX_UNUSED_DAYS * DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    """Move the libraries, then the state: if there is a state, everything is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, OPERATOR, _STATE):
        if (work / name).exists():
            shutil.move(work / name, folder / name)
    _remove_stale_builds(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
