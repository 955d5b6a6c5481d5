"""Compile the C++ sources into shared libraries. Kernels that this machine's compiler cannot compile are left out."""

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
    """A source file and its flags. `kernel`: left out, with all its units, where the compiler cannot compile one."""

    source: str
    flags: tuple[str, ...] = AVX2
    kernel: str = ""


_OPERATORS = ("operators.cpp", "linear.cpp", "vision_attention.cpp")  # only in ONNX Runtime's library
_AVXVNNI, _VNNI512 = (*AVX2, "-mavxvnni"), (*_AVX512, "-mavx512vnni")

X86_64 = (
    Unit("int8.cpp"),
    Unit("int8.cpp", _AVXVNNI, "AVXVNNI"),
    Unit("int8.cpp", _VNNI512, "AVX512VNNI"),
    Unit("int16.cpp"),
    Unit("int16.cpp", _AVXVNNI, "AVXVNNI"),
    Unit("int16.cpp", _VNNI512, "AVX512VNNI"),
    Unit("amx_bf16.cpp", (*_AVX512, "-mavx512bf16"), "AMX"),
    Unit("amx_int8.cpp", (*_AVX512, "-mavx512bf16"), "AMX"),
    Unit("amx_int16.cpp", (*_AVX512, "-mavx512bf16"), "AMX"),
    Unit("attention.cpp"),
    Unit("attention.cpp", _VNNI512, "AVX512VNNI"),
    Unit("few.cpp"),
    Unit("few_wide_avx512.cpp", _VNNI512, "AVX512VNNI"),
    Unit("few_wide_avx2.cpp"),
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
    Unit("attention.cpp", ("-fno-schedule-insns",)),  # scheduled, its loads would spill registers
    Unit("few.cpp", ("-march=armv8.2-a+dotprod",)),
    Unit("few_attention.cpp", ()),
    *(Unit(source, ()) for source in ("product.cpp", "backend.cpp", "memory.cpp", "api.cpp")),
)

UNITS = AARCH64 if platform.machine() == "aarch64" else X86_64


def compiler() -> str | None:
    """Path of the C++ compiler, $CXX or c++; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "c++")


def package() -> Path:
    """Folder of the installed llama_cpp. Raises `UnavailableError`."""
    try:
        return bindings.package()
    except ImportError as error:
        raise UnavailableError("llama-cpp-python is not installed.") from error


def find_toolchain() -> tuple[str, Path]:
    """The compiler and the folder of ggml's headers. Raises `UnavailableError` where nothing can be built."""
    path, headers = compiler(), package().parent / "include"
    if path is None:
        raise UnavailableError("There is no C++ compiler; install one (Debian: sudo apt-get install build-essential).")
    if _is_clang(path):
        raise UnavailableError(f"{path} is clang, whose OpenMP uses its own threads; install gcc and set CXX=g++.")
    if not (headers / "ggml-backend.h").is_file():
        raise UnavailableError(f"This llama-cpp-python has no headers in {headers}.")
    return path, headers


def build(
    target: Path, operator: Path | None = None, *, units: Sequence[Unit] = UNITS, flags: Sequence[str] = ()
) -> dict[str, str]:
    """Compile `units`, link them into `target` and, if they include ONNX Runtime's operators, into `operator`.

    Objects are written to the folder of `target`. flags: in addition to `FLAGS`. Returns the first error of each kernel
    that was left out. Raises `UnavailableError` with the compiler's first error.
    """
    (compiler_path, headers), folder = find_toolchain(), package() / "lib"
    (base,) = sorted(folder.glob("libggml-base.so.0")) or [folder / "libggml-base.so"]
    command = [compiler_path, *FLAGS, *flags, f"-I{headers}", f"-I{SOURCES}"]

    def compile_unit(numbered: tuple[int, Unit]) -> tuple[Unit, Path, str]:
        number, unit = numbered
        out = target.parent / f"{number}-{Path(unit.source).stem}.o"
        return unit, out, _run([*command, *unit.flags, "-c", str(SOURCES / unit.source), "-o", str(out)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_unit, enumerate(units)))
    left_out = {unit.kernel: f"{unit.source} does not compile: {error}" for unit, _, error in results if error}
    if "" in left_out:
        raise UnavailableError(left_out[""])
    defines = [f"-DNATIVE_HAS_{name}" for name in {unit.kernel for unit in units} - left_out.keys() if name]

    def link(path: Path, without: Sequence[str], *libraries: str) -> None:
        objects = [str(out) for unit, out, _ in results if unit.kernel not in left_out and unit.source not in without]
        registry = str(SOURCES / "kernels.cpp")
        error = _run([*command, *defines, "-shared", *objects, registry, *libraries, "-o", str(path)])
        if error:
            raise UnavailableError(f"The native kernels cannot be linked: {error}")

    # Linked by path; at run time the loader finds the copy that llama.cpp has loaded, by its soname.
    link(target, _OPERATORS, str(base))
    if operator is not None and any(unit.source in _OPERATORS for unit in units):
        link(operator, ["backend.cpp", "memory.cpp", "api.cpp"])
    return left_out


def _is_clang(tool: str) -> bool:
    result = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return "clang" in result.stdout


def _run(command: Sequence[str]) -> str:
    """Run a command; returns its first error, empty if it succeeded."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
    return lines[0] if lines else f"exit code {result.returncode}"
