"""The native kernels compiled for ARM and run in an emulator, through native_arm.cpp."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_kernels import Array

from llava_edge.runtimes.native import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
LIBRARIES = "/usr/aarch64-linux-gnu"
PLAIN = "cortex-a72"  # a processor with NEON and neither FEAT_DotProd nor FEAT_I8MM
emulated = pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64-static to run code for ARM"
)


def compiled(folder: Path, *flags: str) -> None:
    """All units for aarch64 as one library, as `build.build` links them but for ggml, which nothing here calls; and
    the program that computes with it: `folder`/program."""
    assert COMPILER
    folder.mkdir(exist_ok=True)
    headers = build.package().parent / "include"
    common = [COMPILER, *build.FLAGS, "-Werror", *flags, f"-I{headers}", f"-I{build.SOURCES}"]
    objects = []
    for number, unit in enumerate(build.AARCH64):
        objects.append(str(folder / f"{number}.o"))
        subprocess.run([*common, *unit.flags, "-c", str(build.SOURCES / unit.source), "-o", objects[-1]], check=True)
    listed, library = str(build.SOURCES / "kernels.cpp"), str(folder / "kernels.so")
    defined = [f"-DNATIVE_HAS_{unit.kernel}" for unit in build.AARCH64 if unit.kernel]
    subprocess.run([*common, *defined, "-shared", "-Wl,-z,lazy", *objects, listed, "-o", library], check=True)
    source = str(Path(__file__).with_name("native_arm.cpp"))
    lazily = ("-Wl,-z,lazy", "-Wl,--unresolved-symbols=ignore-all", f"-Wl,-rpath,{folder}")
    subprocess.run(
        [*common, "-fvisibility=default", source, library, *lazily, "-o", str(folder / "program")], check=True
    )


def run(program: Path, *arguments: str, processor: str = "max", given: bytes = b"") -> bytes:
    command = [str(EMULATOR), "-L", LIBRARIES, "-cpu", processor, str(program), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


class Emulated:
    """A program that `compiled` made, in place of `native_kernels.Kernels`: one process for each way, until `close`."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def attend(self, way: str, q: Array, k: Array, v: Array, mask: Array, threads: int = 1) -> Array:
        """As `native_kernels.Kernels.attend`."""
        if way not in self._started:
            command = [str(EMULATOR), "-L", LIBRARIES, "-cpu", PLAIN, str(self._program), "attention", way]
            self._started[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        given, said = self._started[way].stdin, self._started[way].stdout
        assert given
        assert said
        head = np.array([len(q), len(k), q.shape[1], k.shape[1], q.shape[2], threads], np.int32)
        k, v = (part if part.dtype == np.uint8 else part.astype(np.float16) for part in (k, v))
        row = np.int32(k[0, 0].nbytes)
        parts = (head, row, q.astype(np.float32), k, v, mask.astype(np.float16))
        given.write(b"".join(part.tobytes() for part in parts))
        given.flush()
        assert said.read(4) == b"\1\0\0\0"  # nothing, where it died
        found = np.frombuffer(said.read(4 * q.size), np.float32)
        return found.reshape(q.shape[1], q.shape[0], q.shape[2])

    def close(self) -> None:
        """End the processes, which must end well."""
        codes = [process.communicate() and process.returncode for process in self._started.values()]
        assert not any(codes)
