"""Kernels of ours inside the unmodified llama.cpp: a faster prefill, on weights left where they are mapped.

`python -m llava_edge.runtimes.native` builds and tries them, once for each machine; our set-up does that. What it found
out lies in the cache folder, below a key of everything it depends on: llama.cpp's library, our sources, the processor.
Loading a model then asks `activate`. What is not as it was tried is not used: llama.cpp computes as it does without us.

src/         the shared libraries: a backend for ggml and operators for ONNX Runtime, one file for each kernel
build.py     sources -> libraries             check.py     is it right, does it pay: in a process of its own
ggml.py      one operation of ggml at a time  library.py   the library's own functions
operator.py  vision.onnx with our operators   onnx_bytes.py  its graph, read and written
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llava_edge import python, store
from llava_edge.errors import LlavaEdgeError, MissingError, UnavailableError
from llava_edge.gguf import Gguf
from llava_edge.runtimes import bindings, devices
from llava_edge.runtimes.native import build
from llava_edge.runtimes.native.ggml import TYPES, Ggml, loaded
from llava_edge.runtimes.native.library import DEVICE, FEW, Library

COMMAND = "python -m llava_edge.runtimes.native"
CROWDED = f"Tried beside other programs, so that the choice may be wrong: run '{COMMAND}' when the machine is quiet."
ACCEPTED = {("0.3.36", "0.25.3")}  # llama-cpp-python, ggml: what src/ggml_interface.h was compared with
CHECK_SECONDS = 300
GAIN = 1.05  # a kernel is used from here on
ONE_KEPT = 0.9  # of llama.cpp's speed with one row, where a kernel wins with eight: repeats differ by 7 %
DECODE_KEPT = 0.95  # of llama.cpp's speed on re-ordered weights, or they are re-ordered
OPT_IN = {"amx-int8"}  # less exact: only if $LLAVA_EDGE_NATIVE names it

# Features of the processor, by machine, and how a sentence calls them.
_NEEDED = {
    "x86_64": ({"avx2", "fma", "f16c"}, "AVX2, FMA or F16C"),
    "aarch64": ({"asimddp"}, "the instructions of FEAT_DotProd"),
}

LIBRARY, OPERATOR, _STATE = "kernels.so", "vision.so", "state.json"  # in `place()`
DAY = 86400  # seconds
KEPT_DAYS = 60  # since its last use: what other versions built


@dataclass(frozen=True)
class Status:
    """What is used, or why nothing is. `reason` is a sentence; `fix` the command to run, if one would help.

    many: types of weights, each with the kernel that takes its products and from how many rows on; few: types whose
    products of fewer rows, 31 at most, are taken. attention, few_attention: of 32 queries or more, and of fewer.
    mapped: types that llama.cpp need not re-order, because what is used is as fast without, or because it cannot.
    """

    reason: str
    fix: str = ""
    many: tuple[tuple[str, str, int], ...] = ()
    few: tuple[str, ...] = ()
    attention: bool = False
    few_attention: bool = False
    mapped: tuple[str, ...] = ()
    library: str = ""  # hash of its file

    @property
    def used(self) -> bool:
        """Whether anything is."""
        return bool(self.many or self.few or self.attention or self.few_attention)

    @property
    def identity(self) -> list[object]:
        """What results depend on: empty if llama.cpp computes alone."""
        taken = [self.many, self.few, self.attention, self.few_attention]
        return [self.library, *taken] if self.used else []


@dataclass
class _Process:
    """What became of loading: a backend stays until the process ends, for all of its models."""

    decided: Status | None = None


_process = _Process()
_lock = threading.Lock()


def status() -> Status:
    """What a model loaded now would use, from what was found out before. Opens no library."""
    if wanted() == "off":
        return Status("Turned off by LLAVA_EDGE_NATIVE.")
    try:
        state = _state(place())
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, ValueError, MissingError):
        return Status("Not built for this machine.", COMMAND)
    try:
        return choose(state, wanted())
    except (AttributeError, KeyError, TypeError, ValueError):
        return Status("Not used: what was found out about them is damaged.", COMMAND)


def unbuilt() -> bool:
    """Whether nothing is used for the only reason that `COMMAND` was not run for these sources yet."""
    try:
        if wanted() == "off" or (place() / _STATE).exists():
            return False
        build.tools()
    except (LlavaEdgeError, OSError):
        return False
    return True


def activate() -> Status:
    """Before a model is loaded: let llama.cpp use what `status` says. Whatever goes wrong, nothing is used.

    Once something is, the same is for each later model: those that are open already would be computed by it, too.
    """
    with _lock:
        if _process.decided is not None:
            return _process.decided
        found = status()
        if not found.used:
            return found
        try:
            path = place() / LIBRARY
            ggml = _fitting(path, found)
        except (OSError, UnavailableError) as error:
            return Status(f"Not used: {error}", COMMAND)
        try:
            _load(path, ggml, found)
        except (OSError, UnavailableError, ValueError) as error:  # half of it may be loaded: it is not tried again
            found = Status(f"Not used: {error}", COMMAND)
        _process.decided = found
        return found


def attends(language: Gguf) -> bool:
    """Whether our attention takes heads as wide as a model's (src/attention.cpp)."""
    heads = language.number("llama.attention.head_count", 1, 1024)
    width = language.metadata.get("llama.attention.key_length", language.metadata["llama.embedding_length"] // heads)
    return bool(width % 16 == 0 and width <= 256)


def operator_library() -> Path | None:
    """The operator for ONNX Runtime, if it was tried here and was right. Opens nothing."""
    return _tried_operator(lambda state: True)


def projector_library() -> Path | None:
    """The same file, if its kernel computes the projector faster than numpy does here."""
    return _tried_operator(lambda state: _pays(state["projector"], "ours"))


def _tried_operator(also: Callable[[dict[str, Any]], bool]) -> Path | None:
    try:
        folder = place()
        state = _state(folder)
        good = wanted() != "off" and "failed" not in state and OPERATOR not in state["problems"] and also(state)
        return folder / OPERATOR if good and _sha256(folder / OPERATOR) == state["operator"] else None
    except (LlavaEdgeError, OSError, AttributeError, ValueError, KeyError, TypeError):
        return None


def reordering_pays(found: Status, types: Iterable[str]) -> bool:
    """Whether llama.cpp should copy weights of these types into an order of its own, when `found` is used."""
    return not found.many or any(kind not in found.mapped and kind != "F32" for kind in types)


def prepare(say: Callable[[str], None] = lambda line: None) -> Status:
    """Build and try the kernels for this machine, whatever was known before. Raises nothing; the status says it."""
    try:
        folder = place()
        say("Compiling the native kernels.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            work = Path(name)
            build.build(work / LIBRARY, work / OPERATOR)
            say("Trying them against llama.cpp's own; takes about 25 s.")
            hashes = {"sha256": _sha256(work / LIBRARY)}
            if (work / OPERATOR).exists():  # not on aarch64
                hashes["operator"] = _sha256(work / OPERATOR)
            state = {**hashes, **_check(work / LIBRARY)}
            (work / _STATE).write_text(json.dumps(state), "utf-8")
            _publish(work, folder)
    except UnavailableError as error:
        return Status(str(error))
    except (OSError, LlavaEdgeError) as error:
        return Status(f"The native kernels could not be built: {error}", COMMAND)
    return status()


def choose(state: dict[str, Any], kernel: str = "") -> Status:
    """From what `check` found out to what is used; `kernel` names the one to take, if it may be taken.

    Raises `AttributeError`, `KeyError`, `TypeError` or `ValueError` if the state is not what `check` writes.
    """
    if "failed" in state:
        return Status(f"Not used: {state['failed']}.", COMMAND)
    problems, types = state["problems"], {kind: state["types"][kind] for kind in TYPES}
    right = [name for name in state["kernels"] if name not in problems and (name not in OPT_IN or name == kernel)]
    if kernel and kernel not in state["kernels"]:
        known = ", ".join(["off", *state["kernels"]])
        return Status(f"Not used: LLAVA_EDGE_NATIVE is {kernel!r}; one of {known} was expected.")
    if kernel in right:
        right = [kernel]
    if not right:
        return Status(f"Not used: {' '.join(problems.values()) or 'this processor runs no kernel.'}", COMMAND)
    best = {
        kind: min((name for name in race["many"] if name in right), key=race["many"].__getitem__, default="")
        for kind, race in types.items()
    }
    many = tuple(
        (kind, best[kind], _least_rows(types[kind], best[kind]))
        for kind in types
        if _pays(types[kind]["many"], best[kind])
    )
    few = tuple(kind for kind in types if _few_pay(types[kind]["one"], types[kind]["eight"], FEW))
    mapped = tuple(kind for kind in types if _mapped_suffices(types[kind], best[kind]))
    races = state["attention"]
    crowded = [CROWDED] if state["crowded"] else []
    attention = "attention" not in problems and _pays(races["many"], "ours")
    few_attention = "few attention" not in problems and _few_pay(races["one"], races["eight"], "ours")
    if not (many or few or attention or few_attention):
        return Status(" ".join(["Not used: llama.cpp's own kernels are as fast here.", *crowded]))
    used = sorted({name for _, name, _ in many})
    parts = [f"{name} for {', '.join(kind for kind, its, _ in many if its == name)}" for name in used]
    parts += [f"few rows of {', '.join(few)}"] if few else []
    parts += ["attention"] if attention else []
    parts += ["attention of few queries"] if few_attention else []
    reason = " ".join([f"{'; '.join(parts)}.", *problems.values(), *crowded])
    return Status(reason, "", many, few, attention, few_attention, mapped, state["sha256"])


def _pays(race: dict[str, float], ours: str) -> bool:
    return ours in race and race["plain"] >= GAIN * race[ours]


def _least_rows(races: dict[str, dict[str, float]], ours: str) -> int:
    """From how many rows on unpacking pays: beside llama.cpp, and from 16 on beside our own kernel for few rows, too.

    Guesses and answers given together are fewer, and have to get the bits of a single row (runtimes/speculation.py).
    """
    if not _pays(races["some"], ours):
        return 128
    sixteen = races["sixteen"]
    return 16 if _pays(sixteen, ours) and sixteen.get(FEW, float("inf")) >= GAIN * sixteen[ours] else 32


def _few_pay(one: dict[str, float], eight: dict[str, float], ours: str) -> bool:
    """One kernel is for both: it has to win with one row, or with eight and lose nothing to speak of with one."""
    return _pays(one, ours) or (_pays(eight, ours) and one["plain"] >= ONE_KEPT * one[ours])


def _mapped_suffices(race: dict[str, dict[str, float]], best: str) -> bool:
    """Whether weights of a type are as fast where they are mapped as re-ordered by llama.cpp, if it does that."""
    many, one = race["many"], race["one"]
    if "repacked" not in many or "repacked" not in one:
        return True
    decode = min(one["plain"], one.get(FEW, one["plain"]))
    return _pays(many, best) and many[best] <= many["repacked"] and decode * DECODE_KEPT <= one["repacked"]


def wanted() -> str:
    """$LLAVA_EDGE_NATIVE: empty, "off", or the name of a kernel."""
    return os.environ.get("LLAVA_EDGE_NATIVE", "").strip().lower()


def _fitting(path: Path, found: Status) -> Ggml:
    """The loaded ggml, if it is one that the library was made for. Raises `UnavailableError` or `OSError`."""
    ggml = Ggml()
    version = (bindings.version(), ggml.version())
    if version not in ACCEPTED:
        raise UnavailableError(f"llama-cpp-python {version[0]} with ggml {version[1]} is not one they were made for.")
    if loaded("libgomp.so.1") is None:
        raise UnavailableError("this llama.cpp computes without OpenMP, whose threads they share.")
    if _sha256(path) != found.library:
        raise UnavailableError("their file has changed since they were tried.")
    return ggml


def _load(path: Path, ggml: Ggml, found: Status) -> None:
    """Into this process, to stay. Raises `UnavailableError`, `OSError` or `ValueError`."""
    library = Library(path)
    library.use()
    if not ggml.load_backend(path) or not ggml.device(DEVICE):
        raise UnavailableError("ggml does not accept them.")
    library.use(found.many, found.few, found.attention, found.few_attention)


def _check(library: Path) -> dict[str, Any]:
    """What the child process says about a library."""
    code = f"from llava_edge.runtimes.native import check; check.main({str(library)!r})"
    command = python.command("The check of native kernels", "-c", code)
    try:
        done = subprocess.run(
            command, env=python.environment(), capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"their check did not end within {CHECK_SECONDS} s"}
    if done.returncode < 0:
        return {"failed": f"their check was killed by signal {-done.returncode}"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": f"their check failed: {lines[-1].rstrip('.')}"}
    return found


def place() -> Path:
    """Where everything about this machine's kernels is. Raises `UnavailableError` where there can be none."""
    machine = platform.machine() if sys.platform == "linux" else ""
    if machine not in _NEEDED:
        raise UnavailableError("There are native kernels for Linux on x86-64 and aarch64 only.")
    name, features = devices.processor()
    needed, said = _NEEDED[machine]
    if not needed <= set(features):
        raise UnavailableError(f"This processor lacks {said}.")
    base = next(iter(sorted((build.package() / "lib").glob("libggml-base.so*"))), None)
    if base is None:
        raise UnavailableError("This llama-cpp-python has no libggml-base.")
    return store.home() / "native" / _key(base, f"{name} {features}")


@cache
def _key(base: Path, processor: str) -> str:
    """Of all that the kernels depend on; once in a process, which asks several times."""
    digest = hashlib.sha256(processor.encode())
    for path in (base, *sorted(build.SOURCES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _state(folder: Path) -> Any:
    """What was found out. That it was asked for is noted in the file's time, once a day, for `_clear_up`."""
    path = folder / _STATE
    state = json.loads(path.read_text("utf-8"))
    with suppress(OSError):  # somebody else's, or read-only
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    return state


def _clear_up(used: Path) -> None:
    """Remove the folders of other versions that were not used for long. Where one is loaded, it stays mapped."""
    with suppress(OSError):
        for folder in used.parent.iterdir():
            if folder == used or not re.fullmatch("[0-9a-f]{32}", folder.name):
                continue
            state = folder / _STATE
            since = (state if state.exists() else folder).stat().st_mtime
            if time.time() - since > KEPT_DAYS * DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    """Libraries, then state: with a state everything is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, OPERATOR, _STATE):
        if (work / name).exists():
            shutil.move(work / name, folder / name)
    _clear_up(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
