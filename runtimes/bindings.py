"""llama-cpp-python's bindings of C functions, without the rest of that package.

Importing `llama_cpp` imports its classes too, and with them jinja2, diskcache and sqlite3: 0.1 s of each start for what
nobody here uses. So its file of bindings is executed alone, under a name of ours. A program that imports `llama_cpp`,
before or afterwards, gets all of it as ever; the shared library is one.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from llava_edge import interpreter
from llava_edge.errors import UnavailableError

_NEEDED = "llama_cpp._ctypes_extensions"  # the one module of the package that the bindings import
_CUDA = ("cudart", "cublasLt", "cublas", "nvrtc", "curand", "cufft", "cudnn")  # what another needs stands before it


_executing = threading.Lock()  # two copies of the bindings would not know each other's types
os.register_at_fork(before=_executing.acquire, after_in_parent=_executing.release, after_in_child=_executing.release)


def functions() -> Any:
    """The module with `llama_decode` and the rest, once in a process. Raises `UnavailableError`."""
    with _executing:
        try:
            return _bindings()
        except (ImportError, OSError, RuntimeError) as error:
            raise _lacking("llama-cpp-python", error, f"scripts/install_llama_cpp.sh {sys.executable}") from error


def onnxruntime() -> Any:
    """The package of that name. Raises `UnavailableError`."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise _lacking("onnxruntime", error, f"{sys.executable} -m pip install onnxruntime") from error


def load_cuda() -> None:
    """Open CUDA's libraries where pip puts them (`onnxruntime-gpu[cuda,cudnn]`), which the loader does not search: all
    versions that are there.

    Opened once, they are found by name. `onnxruntime.preload_dlls` does the same, but prints to stdout.
    """
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    for name in _CUDA:
        for path in sorted(found for folder in folders for found in folder.glob(f"*/lib/lib{name}.so.*")):
            with suppress(OSError):  # ONNX Runtime says what it lacks
                ctypes.CDLL(str(path))


def _lacking(project: str, error: Exception, fix: str) -> UnavailableError:
    said = f"{project} cannot be loaded: {str(error).rstrip('.')}."
    if interpreter.is_frozen():
        return UnavailableError(
            f"{said} This app was made without it: install llava-edge where PyInstaller is, whose hook brings it, and "
            "make the app again."
        )
    return UnavailableError(f"{said} In a clone of llava-edge run: {fix}")


@cache
def _bindings() -> Any:
    folder, there = package(), _NEEDED in sys.modules
    try:
        if not there:
            sys.modules[_NEEDED] = _execute(_NEEDED, folder / "_ctypes_extensions.py")
        return _execute("llava_edge.runtimes._llama_cpp", folder / "llama_cpp.py")
    finally:
        if not there:
            sys.modules.pop(_NEEDED, None)


def version(name: str = "llama_cpp") -> str:
    """Of a package, without importing it; `importlib.metadata` takes 25 ms for that. Raises `ImportError`."""
    found = re.search(r'^__version__ = "([^"]+)"', (package(name) / "__init__.py").read_text("utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def package(name: str = "llama_cpp") -> Path:
    """Folder of an installed package. Raises `ImportError`, or `UnavailableError` if another file has its name."""
    spec = find_spec(name)
    if spec is not None and spec.origin is not None and spec.submodule_search_locations is None:
        raise UnavailableError(
            f"{spec.origin} is found in place of the package {name}: rename that file, or start from another folder."
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
