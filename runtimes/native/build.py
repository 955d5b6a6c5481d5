"""C++ sources -> one shared library, with the machine's compiler. Which kernels it has depends on what that knows."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llava_edge.errors import UnavailableError
from llava_edge.runtimes import bindings

SOURCES = Path(__file__).parent / "src"

AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# No fast-math: NaN has to stay NaN.
FLAGS = ("-std=c++17", "-O3", "-g1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra")


@dataclass(frozen=True)
class Unit:
    """A source file as it is compiled. `kernel`: left out with it where the compiler does not know the flags."""

    source: str
    flags: tuple[str, ...] = AVX2
    kernel: str = ""


_OPERATORS = ("operators.cpp", "linear.cpp", "vision_attention.cpp")  # in ONNX Runtime's library alone
_VECTORS = ("int8.cpp", "int16.cpp")  # each compiled for every set of instructions
_VNNI512 = (*_AVX512, "-mavx512vnni", "-DNATIVE_WIDE")

X86_64 = (
    *(
        unit
        for source in _VECTORS
        for unit in (
            Unit(source),
            Unit(source, (*AVX2, "-mavxvnni"), "AVXVNNI"),
            Unit(source, _VNNI512, "AVX512VNNI"),
        )
    ),
    Unit("amx_bf16.cpp", (*_AVX512, "-mavx512bf16"), "AMX"),
    Unit("amx_int8.cpp", (*_AVX512, "-mavx512bf16"), "AMX"),
    Unit("attention.cpp"),
    Unit("attention.cpp", _VNNI512, "AVX512VNNI"),
    Unit("few.cpp"),
    Unit("few_wide.cpp", _VNNI512, "AVX512VNNI"),
    Unit("few_attention.cpp"),
    Unit("product.cpp"),
    *(Unit(source) for source in _OPERATORS),
    Unit("backend.cpp"),
    Unit("memory.cpp"),
    Unit("api.cpp"),
)

AARCH64 = (
    Unit("arm_int8.cpp", ("-march=armv8.2-a+i8mm",), "I8MM"),
    Unit("arm_int8.cpp", ("-march=armv8.2-a+dotprod",), "DOTPROD"),
    Unit("attention.cpp", ("-fno-schedule-insns",)),  # scheduled, its loads would need more registers than there are
    Unit("few.cpp", ("-march=armv8.2-a+dotprod",)),
    Unit("few_attention.cpp", ()),
    *(Unit(source, ()) for source in ("product.cpp", "backend.cpp", "memory.cpp", "api.cpp")),
)

UNITS = AARCH64 if platform.machine() == "aarch64" else X86_64


def compiler() -> str | None:
    """The C++ compiler: $CXX or c++; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "c++")


def package() -> Path:
    """Folder of the installed llama_cpp. Raises `UnavailableError`."""
    try:
        return bindings.package()
    except ImportError as error:
        raise UnavailableError("llama-cpp-python is not installed.") from error


def tools() -> tuple[str, Path]:
    """The compiler and the folder of ggml's headers. Raises `UnavailableError` where nothing can be built."""
    tool, headers = compiler(), package().parent / "include"
    if tool is None:
        raise UnavailableError("There is no C++ compiler; install one (Debian: sudo apt-get install build-essential).")
    if _is_clang(tool):
        raise UnavailableError(f"{tool} is clang, whose OpenMP has threads of its own; install gcc and set CXX=g++.")
    if not (headers / "ggml-backend.h").is_file():
        raise UnavailableError(f"This llama-cpp-python has no headers in {headers}.")
    return tool, headers


def build(
    target: Path, operator: Path | None = None, *, units: Sequence[Unit] = UNITS, flags: Sequence[str] = ()
) -> None:
    """Compile `units` and link them into `target`, whose folder also gets the objects, and ONNX Runtime's operator, if
    they have it.

    flags: in addition to `FLAGS`. Raises `UnavailableError` with what the compiler said first.
    """
    (tool, headers), folder = tools(), package() / "lib"
    (base,) = sorted(folder.glob("libggml-base.so.0")) or [folder / "libggml-base.so"]
    common = [tool, *FLAGS, *flags, f"-I{headers}", f"-I{SOURCES}"]

    def compile_one(numbered: tuple[int, Unit]) -> tuple[Unit, Path, str]:
        number, unit = numbered
        out = target.parent / f"{number}-{Path(unit.source).stem}.o"
        return unit, out, _run([*common, *unit.flags, "-c", str(SOURCES / unit.source), "-o", str(out)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, enumerate(units)))
    lacking = {unit.kernel for unit, _, problem in done if problem}
    for unit, _, problem in done:
        if problem and not unit.kernel:
            raise UnavailableError(f"{unit.source} does not compile: {problem}")
    defined = [f"-DNATIVE_HAS_{name}" for name in {unit.kernel for unit in units} - lacking if name]

    def link(path: Path, without: Sequence[str], *libraries: str) -> None:
        objects = [str(out) for unit, out, _ in done if unit.kernel not in lacking and unit.source not in without]
        listed = str(SOURCES / "kernels.cpp")
        problem = _run([*common, *defined, "-shared", *objects, listed, *libraries, "-o", str(path)])
        if problem:
            raise UnavailableError(f"The native kernels cannot be linked: {problem}")

    # By its path: the loader then finds the copy that llama.cpp has loaded, by the name inside.
    link(target, _OPERATORS, str(base))
    if operator is not None and any(unit.source in _OPERATORS for unit in units):
        link(operator, ["backend.cpp", "memory.cpp", "api.cpp"])


def _is_clang(tool: str) -> bool:
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return "clang" in said.stdout


def _run(command: Sequence[str]) -> str:
    """First complaint of a command that failed; empty if it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"
