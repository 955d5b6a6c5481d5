"""Our own kernels in an unmodified llama.cpp: a faster prefill on memory-mapped weights.

`python -m llava_edge.runtimes.native` builds and tests them once per machine, as part of the set-up. Libraries and
test results are cached under a key of everything they depend on: llama.cpp's library, our sources, the processor.
Loading a model then calls `activate`. If anything differs from what was tested, llama.cpp's own kernels are used.

src/          the shared libraries: a backend for ggml and operators for ONNX Runtime, one file per kernel
build.py      compiles them                    check.py     tests and benchmarks them in a child process
installed.py  where both results are kept      choice.py    which kernels are used, and why
ggml.py       runs single operations of ggml   library.py   the library's own functions
operator.py   vision.onnx with our operators   onnx_bytes.py  reads and writes its graph
patterns.py   finds the node patterns in it that our operators replace
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llava_edge import interpreter
from llava_edge.bundle import sha256_of
from llava_edge.errors import NO_THREAD, PYTHONS_NO_THREAD, LlavaEdgeError, MissingError, UnavailableError
from llava_edge.gguf import Gguf, Tensor
from llava_edge.locks import fork_safe_lock
from llava_edge.runtimes import bindings
from llava_edge.runtimes.native import build, installed
from llava_edge.runtimes.native.choice import COMMAND, Status, choose, is_faster
from llava_edge.runtimes.native.ggml import Ggml, loaded_library
from llava_edge.runtimes.native.library import DEVICE, Library

ACCEPTED = {("0.3.36", "0.25.3")}  # llama-cpp-python, ggml: versions that src/ggml_interface.h was compared with
CHECK_SECONDS = 300
_NOT_BUILT = Status("Not built for this machine.", COMMAND)

MAX_F16_VALUES = 1 << 20  # of a matrix in products of few rows (src/few.cpp); those of most adapters are smaller


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
        state = installed.read_state(installed.folder())
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, ValueError, MissingError):
        return _NOT_BUILT
    try:
        return choose(state, requested_kernel())
    except (AttributeError, KeyError, TypeError, ValueError):
        return Status("Not used: their cached test results are damaged.", COMMAND)


def needs_build() -> bool:
    """Whether the kernels could be built here, but `COMMAND` was not run for these sources yet."""
    try:
        if requested_kernel() == "off" or (installed.folder() / installed.STATE).exists():
            return False
        build.find_toolchain()
    except (LlavaEdgeError, OSError):
        return False
    return True


def advice() -> str:
    """What to tell a user whose model could be computed by the kernels and is not; empty if nothing can be done.

    Call it when the model is loaded: it activates the kernels as that does.
    """
    found = activate()
    if found.used or requested_kernel() == "off":
        return ""
    if found == _NOT_BUILT:  # such as after an update
        command = f"to build them, run: {COMMAND}"
        return f"the native kernels are not built for this version; {command}" if needs_build() else ""
    if found.fix:
        return f"native kernels: {found.reason} Run: {found.fix}"
    return f"native kernels: {found.reason}" if requested_kernel() else ""


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
            path = installed.folder() / installed.LIBRARY
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


def supports_attention(language: Gguf, *, eight_bits: bool) -> bool:
    """Whether our attention kernel supports a model's head width (src/attention.cpp); `eight_bits`: over a KV cache in
    q8_0, whose blocks have 32 values. Raises `BundleError`.
    """
    if "llama.attention.key_length" in language.metadata:
        width = language.number("llama.attention.key_length", 1, 1 << 17)
    else:
        width = language.metadata["llama.embedding_length"] // language.number("llama.attention.head_count", 1, 1024)
    return width % (32 if eight_bits else 16) == 0 and width <= 256


def computes_all(status: Status, language: Gguf, adapter: Gguf | None, *, eight_bits: bool) -> bool:
    """Whether our kernels compute all products and all attention of a model, as in `supports_attention`."""
    files = [language] if adapter is None else [language, adapter]
    matrices = [tensor for file in files for tensor in file.tensors.values() if len(tensor.shape) > 1]
    products = all(tensor.kind in status.few_rows and _supports_few(tensor) for tensor in matrices)
    attention = status.attention and status.few_attention and supports_attention(language, eight_bits=eight_bits)
    return products and attention


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
        path = installed.folder() / installed.OPERATOR
        state = installed.read_state(path.parent)
        passed = "failed" not in state and installed.OPERATOR not in state["problems"] and condition(state)
        return path if passed and sha256_of(path) == state["operator"] else None
    except (LlavaEdgeError, OSError, AttributeError, ValueError, KeyError, TypeError):
        return None


def prepare(log: Callable[[str], None] = lambda line: None) -> Status:
    """Build and test the kernels for this machine, even if that was done before. Errors are in the status returned."""
    try:
        folder = installed.folder()
        log("Compiling the native kernels.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=installed.UNFINISHED, dir=folder.parent) as name:
            work = Path(name)
            library, operator = work / installed.LIBRARY, work / installed.OPERATOR
            for kernel, error in build.build(library, operator).items():
                log(f"{kernel} kernels are left out: {error}")
            log("Testing them and comparing their speed with llama.cpp's own; this takes about 25 s.")
            hashes = {"sha256": sha256_of(library)}
            if operator.exists():  # not on aarch64
                hashes["operator"] = sha256_of(operator)
            state = {**hashes, **_run_check(library)}
            (work / installed.STATE).write_text(json.dumps(state), "utf-8")
            installed.publish(work, folder)
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, LlavaEdgeError) as error:
        return Status(f"The native kernels could not be built: {error}", COMMAND)
    except RuntimeError as error:
        if str(error) != PYTHONS_NO_THREAD:
            raise
        return Status(f"The native kernels could not be built: {NO_THREAD}", COMMAND)
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
    if sha256_of(path) != expected.library:
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
