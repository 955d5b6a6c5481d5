"""What every test gets: its own home, one thread, and a tiny real model made once per session.

`micro_checkpoint`, `micro_bundle`, `float16` and `trained_micro` are shared and must not be written to; `bundle_copy`
is the test's own.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from serving import Server, running

from llava_edge.runtimes import limit_spinning

if TYPE_CHECKING:
    from llava_edge import Llava
    from llava_edge.runtimes.language import LanguageModel

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # "gw0" and so on; None without processes beside this one

# Before numpy, torch or an engine starts its threads: the models here are too small to share.
os.environ.setdefault("OMP_NUM_THREADS", "1")
limit_spinning()

# Set in many containers. Users do not have it, and with it a full disk or a closed pipe is met at another moment.
os.environ.pop("PYTHONUNBUFFERED", None)

# Set in many containers, too, and without bytecode every process that a test starts compiles the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

gc.disable()  # until all tests are collected

# The same examples every time, however slow the machine is today.
settings.register_profile("llava-edge", deadline=None, derandomize=True, database=None)
settings.load_profile("llava-edge")

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]  # of the fixture `run`


def pytest_collection_finish() -> None:
    """What torch and transformers make on import stays, so the garbage collector need not look through it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Where nothing is said of threads: two that wait for each other hundreds of times per token cost the tests more
    than they spare."""
    from llava_edge.runtimes import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "thread_count", lambda: (1, "tests compute with one thread"))
        yield


@pytest.fixture(scope="session", autouse=True)
def home_of_shared_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is made for many tests is made before `isolated_home`, and must not write to the user's folder either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_EDGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that no test reads or writes the user's."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir=tmp_path_factory.getbasetemp()))  # `mktemp` looks at all others
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return ROOT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from llava_edge import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face LLaVA folder with random weights, small enough to convert in seconds."""
    from llava_edge.models.micro import write_checkpoint

    folder = tmp_path_factory.mktemp("micro") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def micro_bundle(micro_checkpoint: Path) -> Path:
    """`micro_checkpoint` exported; q8_0, so that llama.cpp's own quantizer runs (its rows need no multiple of 256)."""
    from llava_edge.export.exporter import ExportOptions, export

    out = micro_checkpoint.parent / "bundle"
    export(ExportOptions(checkpoint=micro_checkpoint, out=out, quant="q8_0", vision="fp32", name="micro"))
    return out


@pytest.fixture(scope="module")
def server(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`llava-edge serve` with `micro_bundle`, for all tests of a file that has no server of its own."""
    with running(micro_bundle, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def float16(micro_checkpoint: Path) -> Path:
    """The language model of `micro_checkpoint` before it is quantized."""
    from llava_edge.export.checkpoint import open_checkpoint
    from llava_edge.export.llm_gguf import write_language
    from llava_edge.export.tokenizer import read_tokenizer

    checkpoint, path = open_checkpoint(micro_checkpoint), micro_checkpoint.parent / "float16.gguf"
    write_language(checkpoint, read_tokenizer(micro_checkpoint, checkpoint.config), path, "micro")
    return path


def filled(folder: Path, make: Callable[[Path], None], of: str) -> Path:
    """`folder`, which `make` fills unless it did before, of the same; the other processes of pytest wait meanwhile."""
    made = folder.with_name(f"{folder.name}.made")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != of:
            made.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.write_text(of)
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """What `make` makes, for all processes of this run of pytest."""
    top = factory.getbasetemp()
    return filled((top.parent if WORKER else top) / name, make, "this run")


def compiled_once(
    request: pytest.FixtureRequest, name: str, make: Callable[[Path], None], compiler: str | None, *given: object
) -> Path:
    """What `make` compiles of the C++ sources, for later runs, too: in pytest's cache folder until a source changes.

    given: whatever else it depends on.
    """
    from llava_edge.runtimes.native import build

    if compiler is None or not hasattr(request.config, "cache"):  # -p no:cacheprovider
        return made_once(request.getfixturevalue("tmp_path_factory"), name, make)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, version, build.FLAGS, given)).encode())
    tests, headers = Path(__file__).parent, build.package().parent / "include"
    compiled = (tests.glob("*.cpp"), tests.glob("*.h"), headers.glob("*.h"))
    sources = (build.SOURCES.iterdir(), [Path(build.__file__)], *compiled)
    for path in sorted(itertools.chain(*sources)):
        digest.update(repr((path, path.read_bytes())).encode())
    return filled(request.config.cache.mkdir("compiled") / name, make, digest.hexdigest())


@pytest.fixture(scope="session")
def trained_micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of the micro recipe, really trained: it names the colour of a picture."""
    from llava_edge.models.recipe import load_recipe
    from llava_edge.models.run import Folders, train_recipe

    def train(work: Path) -> None:
        train_recipe(load_recipe("micro"), Folders(work / "run", work / "data", work / "features"))

    return made_once(tmp_path_factory, "trained", train) / "run" / "model"


@pytest.fixture(scope="session")
def colours(trained_micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trained_micro` exported, with an int8 tower and a language model in 4 bits: it answers in a word."""
    from llava_edge.export.exporter import ExportOptions, export

    def make(folder: Path) -> None:
        export(ExportOptions(checkpoint=trained_micro, out=folder, quant="q4_0", vision="int8", name="colours"))

    return made_once(tmp_path_factory, "colours", make)


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `micro_bundle`, but with room for answers that take longer than anything a test does meanwhile: a minute."""
    from serving import ROOM

    from llava_edge.export.exporter import ExportOptions, export
    from llava_edge.models import micro

    def make(folder: Path) -> None:
        config = replace(micro.CONFIG, text=replace(micro.CONFIG.text, max_position_embeddings=ROOM))
        checkpoint = micro.write_checkpoint(folder / "checkpoint", config=config)
        export(ExportOptions(checkpoint, folder / "bundle", quant="q8_0", vision="fp32", name="micro"))

    return made_once(tmp_path_factory, "talkative", make) / "bundle"


@pytest.fixture(scope="session")
def native_build(request: pytest.FixtureRequest) -> Path:
    """The folder of the native libraries as tests build them; $LLAVA_EDGE_TEST_NATIVE names another one's kernels."""
    from native_kernels import UNITS

    from llava_edge.runtimes.native import build, installed

    flags = ("-O1", "-Werror")

    def compile_all(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        assert not build.build(folder / installed.LIBRARY, folder / installed.OPERATOR, units=UNITS, flags=flags)

    if ready := os.environ.get("LLAVA_EDGE_TEST_NATIVE"):
        return Path(ready).parent
    return compiled_once(request, "native", compile_all, build.compiler(), UNITS, flags)


@pytest.fixture(scope="session")
def arm_program(request: pytest.FixtureRequest) -> Path:
    """The native kernels compiled for ARM, to be run by `emulator.run`."""
    import emulator

    source = Path(emulator.__file__).read_bytes()
    return compiled_once(request, "arm", emulator.compiled, emulator.COMPILER, source) / "program"


@pytest.fixture(scope="module")
def llava(micro_bundle: Path) -> Iterator[Llava]:
    """`micro_bundle`, loaded for the tests of a file."""
    from llava_edge import EngineOptions, Llava

    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def language(micro_bundle: Path) -> Iterator[LanguageModel]:
    """The language model of `micro_bundle` alone."""
    from llava_edge.bundle import LANGUAGE
    from llava_edge.runtimes.language import LanguageModel

    model = LanguageModel(micro_bundle / LANGUAGE, context=512, threads=1)
    yield model
    model.close()


@pytest.fixture
def bundle_copy(micro_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `micro_bundle` to damage."""
    return Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))


@pytest.fixture
def second_answer_runs_dry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all words away from the second answer with a grammar, after its first token: the vocabulary can say all."""
    from llava_edge.runtimes.sampling import Sampler

    real, samplers = Sampler._allowed, list[Sampler]()

    def allowed(self: Sampler, constraint: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        samplers.append(self)
        is_dry = list(dict.fromkeys(samplers)).index(self) == 1 and samplers.count(self) > 1
        return real(self, constraint, ids)[: 0 if is_dry else None]

    monkeypatch.setattr(Sampler, "_allowed", allowed)
