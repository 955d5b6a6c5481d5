"""llama-cpp-python's ctypes bindings without the rest of that package, llama.cpp's log, and other engine libraries.

Importing `llama_cpp` also imports its classes, and with them jinja2, diskcache and sqlite3: 0.1 s of each start for
unused code. So the module of its bindings is executed alone, under a name of ours. A program that imports `llama_cpp`,
before or afterwards, gets the whole package as usual; the shared library is the same.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import deque
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from llava_edge import interpreter
from llava_edge.errors import UnavailableError
from llava_edge.interrupts import held_back
from llava_edge.locks import fork_safe_lock
from llava_edge.runtimes import limit_spinning, machine

_CTYPES_EXTENSIONS = "llama_cpp._ctypes_extensions"  # the only module of the package that the bindings import
_CUDA = ("cudart", "cublasLt", "cublas", "nvrtc", "curand", "cufft", "cudnn")  # in order of dependency
_ERROR = 4  # of ggml_log_level

errors: deque[str] = deque(maxlen=4)  # that llama.cpp logged last, as sentences
_callbacks: list[Any] = []  # that C holds pointers to
_verbose = False
_lock = fork_safe_lock()  # two copies of the bindings would have incompatible ctypes types


def functions() -> Any:
    """Return the module with llama.cpp's C functions, loaded once per process, for `library`.

    Raises `UnavailableError`.
    """
    with _lock:
        try:
            return _load_bindings()
        except (ImportError, OSError, RuntimeError) as error:
            raise _unavailable("llama-cpp-python", error, f"scripts/install_llama_cpp.sh {sys.executable}") from error


def library(verbose: bool = False) -> Any:
    """Return llama.cpp's C functions (untyped, hence Any) and silence its log unless `verbose`.

    Everyone loads llama.cpp through this function, so that `limit_spinning` always comes first.
    """
    global _verbose
    _verbose = verbose
    limit_spinning()
    api = functions()
    if not _callbacks:
        _callbacks.append(api.llama_log_callback(_log))
        api.llama_log_set(_callbacks[0], None)
        api.llama_backend_init()
    return api


def last_error() -> str:
    """Return llama.cpp's last error message as a sentence."""
    return errors[-1] if errors else "it gave no reason."


def onnxruntime() -> Any:
    """Import onnxruntime. Raises `UnavailableError`."""
    machine.require_proc()
    try:
        with held_back():
            return import_module("onnxruntime")
    except ImportError as error:
        raise _unavailable("onnxruntime", error, f"{sys.executable} -m pip install onnxruntime") from error


def load_cuda() -> None:
    """Load all versions of CUDA's libraries from where pip installs them (`onnxruntime-gpu[cuda,cudnn]`).

    The dynamic loader does not search there, but finds libraries that are already loaded. `onnxruntime.preload_dlls`
    does the same, but prints to stdout.
    """
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    for name in _CUDA:
        for path in sorted(file for folder in folders for file in folder.glob(f"*/lib/lib{name}.so.*")):
            with suppress(OSError):  # ONNX Runtime will report what is missing
                ctypes.CDLL(str(path))


def _unavailable(project: str, error: Exception, fix: str) -> UnavailableError:
    message = f"{project} cannot be loaded: {str(error).rstrip('.')}."
    if interpreter.is_frozen():
        return UnavailableError(
            f"{message} This app was built without it: install llava-edge in PyInstaller's environment, so that its "
            "hook is found, and build the app again."
        )
    return UnavailableError(f"{message} In a clone of llava-edge run: {fix}")


@cache
def _load_bindings() -> Any:
    folder, imported = package(), _CTYPES_EXTENSIONS in sys.modules
    try:
        if not imported:
            sys.modules[_CTYPES_EXTENSIONS] = _execute(_CTYPES_EXTENSIONS, folder / "_ctypes_extensions.py")
        return _execute("llava_edge.runtimes._llama_cpp", folder / "llama_cpp.py")
    finally:
        if not imported:
            sys.modules.pop(_CTYPES_EXTENSIONS, None)


def version(name: str = "llama_cpp") -> str:
    """Return a package's version without importing it; `importlib.metadata` takes 25 ms. Raises `ImportError`."""
    match = re.search(r'^__version__ = "([^"]+)"', (package(name) / "__init__.py").read_text("utf-8"), re.MULTILINE)
    return match[1] if match else "unknown"


def package(name: str = "llama_cpp") -> Path:
    """Return a package's folder. Raises `ImportError`, or `UnavailableError` if another file shadows it."""
    spec = find_spec(name)
    if spec is not None and spec.origin is not None and spec.submodule_search_locations is None:
        raise UnavailableError(
            f"{spec.origin} shadows the package {name}: rename that file, or start from another folder."
        )
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


def _execute(name: str, path: Path) -> Any:
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"llama-cpp-python has no {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _log(level: int, text: bytes, _: Any) -> None:
    message = text.decode("utf-8", "replace")
    if level == _ERROR and message.strip():
        errors.append(message.strip().splitlines()[0][:300].rstrip(".") + ".")
    if _verbose:
        sys.stderr.write(message)
