"""The wheel: the right files under the right names, and a command that starts far away from this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest

AREAS = ("export", "models", "runtimes")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing stale gets in and nothing is left behind."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("llava_edge", "tests", *AREAS):
        shutil.copytree(root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_module_once_under_llava_edge(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"llava_edge"}
    expected = {f"llava_edge/{path.relative_to(root / 'llava_edge')}" for path in _own_modules(root / "llava_edge")}
    expected |= {f"llava_edge/{path.relative_to(root)}" for area in AREAS for path in (root / area).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert len(names) == len(set(names))


def _own_modules(folder: Path) -> list[Path]:
    """Modules of llava_edge/ that are not reached through one of the three links."""
    return [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in AREAS]


def test_the_wheel_holds_the_data(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {f"llava_edge/{path.relative_to(root)}" for path in (root / "models/recipes").glob("*.toml")}
    zoo = [path for path in (root / "llava_edge/zoo").rglob("*") if path.is_file()]
    data |= {str(path.relative_to(root)) for path in zoo if path.suffix != ".pyc"}
    data |= {str(path.relative_to(root)) for path in (root / "llava_edge/server/page").glob("*.[hj]*")}
    data |= {f"llava_edge/{path.relative_to(root)}" for path in (root / "runtimes/native/src").iterdir()}
    assert any(name.endswith("index.html") for name in data)
    assert any(name.endswith("backend.cpp") for name in data)
    assert data | {"llava_edge/py.typed"} <= names


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(path).decode("utf-8"))
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    needs = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {need.split(">")[0].split("=")[0] for need in needs} == {
        *("numpy", "pillow", "onnxruntime", "llama-cpp-python", "llguidance", "click")
    }
    assert set(metadata.get_all("Provides-Extra", [])) == {"export", "serve", "train", "dev"}


def test_pyinstaller_finds_the_hooks(wheel: Path, root: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entries = ConfigParser()
    entries.read_string(archive.read(path).decode("utf-8"))
    module, _, name = entries["pyinstaller40"]["hook-dirs"].partition(":")
    (folder,) = getattr(import_module(module), name)()
    assert {path.name for path in Path(folder).glob("hook-*.py")} == {"hook-llava_edge.py", "hook-onnxruntime.py"}


def test_an_installed_wheel_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """In a folder with a package called `models`, which must not get in the way."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, capture_output=True, check=True)
    for area in AREAS:
        (elsewhere / area).mkdir(parents=True)
        (elsewhere / area / "__init__.py").write_text("raise RuntimeError('not this one')", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import llava_edge.models as m, llava_edge.runtimes as r; print(m.__file__, r.__file__)")
    assert all(path.startswith(str(target)) for path in where.split())
    assert "run" in python("-m", "llava_edge", "--help")
    assert "--image" in python("-m", "llava_edge", "run", "--help")
    assert "run" in python(str(target / "bin/llava-edge"), "--help")


# Makefile


def test_make_builds_the_kernels_anew_when_their_sources_change(root: Path, tmp_path: Path) -> None:
    """They alone: nothing else is installed again."""
    for name in ("Makefile", "setup.py"):
        shutil.copy(root / name, tmp_path)
    for name in ("scripts", "runtimes/native"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", "run.done", "run.native", "dev.done", "dev.native"):
        (tmp_path / ".venv" / name).touch()

    def commands(target: str) -> str:
        said = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return "\n".join(line for line in said.splitlines() if "native" in line or "install" in line)

    assert commands("run") == commands("setup") == ""
    later = time.time() + 5
    for name in ("check.py", "src/few.cpp"):
        os.utime(tmp_path / "runtimes/native" / name, (later, later))
        for target in ("run", "setup"):
            assert "-m llava_edge.runtimes.native" in commands(target)
            assert "install" not in commands(target)
        os.utime(tmp_path / "runtimes/native" / name, (1, 1))


# scripts/install_llama_cpp.sh


def install(root: Path, python: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(root / "scripts/install_llama_cpp.sh"), python]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_build_that_works_is_left_alone(root: Path, tmp_path: Path) -> None:
    """Without a compiler and from elsewhere, by a path as the caller writes it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', "utf-8")
    (tmp_path / "here" / "python").chmod(0o755)
    done = install(root, "here/python", tmp_path, CXX="no-such-compiler")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("wish", [{"CMAKE_ARGS": "-DGGML_CUDA=on"}, {"FORCE": "1"}])
def test_a_wish_for_another_build_is_followed(wish: dict[str, str], root: Path, tmp_path: Path) -> None:
    """Anew, without a wheel that pip kept, and with the flags that gcc 12 needs; pip itself is not run."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    pip = f'printf "%s|" "$CMAKE_ARGS" "$CXXFLAGS" "$SKBUILD_CMAKE_ARGS" "$@" >"{asked}"; exit'
    python.write_text(
        f'#!/bin/sh\ncase "$*" in "-m pip install"*) {pip};; esac\nexec "{sys.executable}" "$@"\n', "utf-8"
    )
    python.chmod(0o755)
    done = install(root, str(python), tmp_path, CXX="sh", **wish)
    assert done.returncode == 0, done.stderr
    arguments, flags, ours, *words = asked.read_text("utf-8").split("|")
    assert arguments == wish.get("CMAKE_ARGS", "")
    assert ("-fno-dse" in flags) == (sys.platform == "linux")
    assert Path(ours.removeprefix("-DCMAKE_PROJECT_llama.cpp_INCLUDE=")).is_file(), "what leaves out llama.cpp's common"
    assert {"--no-cache-dir", "--force-reinstall", "--no-deps", "--no-binary"} <= set(words)
    (name,) = wish
    assert f"anew, because {name} is " in done.stderr


def test_no_compiler_is_said_first(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    done = install(root, str(tmp_path / "venv/bin/python"), tmp_path, CXX="no-such-compiler")
    assert done.returncode == 69
    assert "there is no C++ compiler" in done.stderr
