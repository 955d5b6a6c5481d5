"""Which settings of ONNX Runtime encode a picture fastest here: measured once, on request, and remembered.

One vision.onnx leaves three things to the machine: how many threads pay, whether weights are rearranged when it is
loaded, which is a private copy of all of them, and whether our operator is faster than ONNX Runtime's own. Precision is
settled by the export. Nothing is measured while somebody waits for an answer, nor behind an answer, where it would slow
down the next: `doctor --tune` and `models pull` do it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from llava_edge import store
from llava_edge.bundle import VISION, VISION_DATA, Bundle
from llava_edge.errors import BundleError, LlavaEdgeError, UnavailableError
from llava_edge.runtimes import bindings, devices, native
from llava_edge.runtimes.vision import VisionEncoder
from llava_edge.typed import Range, build

ROUNDS = 2  # each candidate is opened and measured in turns with the others
GAIN = 0.05  # of its time: less than this is noise, and the plain settings stay
# Relative difference of features, unless the manifest has a limit for its own. In int8 the standard operators are up to
# 1 % off what the same weights give in float32, ours up to 0.3 % (12 photos, CLIP ViT-B/16).
EQUAL, EQUAL_INT8 = 1e-3, 3e-2


@dataclass(frozen=True)
class Setting:
    """One way to run vision.onnx, with the best of its times in milliseconds."""

    threads: Annotated[int, Range(1, 512)]
    prepack: bool
    load_ms: float = 0.0
    encode_ms: float = 0.0
    native: bool = False

    def __str__(self) -> str:
        weights = ("rearranged" if self.prepack else "as mapped") + (", our operator" if self.native else "")
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{threads}, weights {weights}: {self.encode_ms:.0f} ms a picture, {self.load_ms:.0f} ms to load"


def untuned(bundle: Bundle, threads: int) -> Setting:
    """What is taken where nothing was measured.

    Our operator was 1.5 to 1.7 times as fast as ONNX Runtime on AVX2 without VNNI, 1.5 to 2 times with AVX-512 VNNI
    (AMD Zen 4), and no faster where ONNX Runtime uses AMX.
    """
    pays = bundle.manifest.vision.precision == "int8" and not devices.int8_is_fast()
    return Setting(threads, False, native=pays and native.operator_library() is not None)


def measure(bundle: Bundle) -> list[Setting]:
    """Measure the candidates on the processor and remember the result. The first is what untuned machines use.

    Candidates that give other features than it does are left out. Raises `BundleError`, and `UnavailableError` if other
    programs kept the processor busy meanwhile; a result that cannot be written is only returned.
    """
    count = devices.thread_count()[0]
    others = devices.ExternalLoad()
    pixels = _pixels(bundle)
    wanted = VisionEncoder(bundle).encode(pixels)
    first = untuned(bundle, count)
    counts = dict.fromkeys((count, max(1, count // 2)))
    found = _compare(bundle, [replace(first, threads=n) for n in counts], wanted)
    if not found:  # our operator gives other features than the standard ones
        found = _compare(bundle, [Setting(n, False) for n in counts], wanted)
    threads = _best(found, lambda item: item.encode_ms).threads
    more = [Setting(threads, True)]
    if native.operator_library() is not None:
        more.append(Setting(threads, False, native=not found[0].native))
    found += _compare(bundle, more, wanted)
    share = others.share()
    if share > devices.MAX_EXTERNAL_LOAD:
        raise UnavailableError(
            f"Other programs took {share:.0%} of the processor while it was measured; nothing is kept."
        )
    with suppress(OSError, LlavaEdgeError):  # without a home it is measured for nothing, and nothing else is lost
        _remember(bundle, found)
    return found


def _remember(bundle: Bundle, found: Sequence[Setting]) -> None:
    path = _path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(item) for item in found]), "utf-8")
    part.replace(path)


def known(bundle: Bundle) -> list[Setting]:
    """What was measured for this bundle's tower, processor and version of ONNX Runtime; empty if nothing was."""
    try:
        return build(list[Setting], json.loads(_path(bundle).read_text("utf-8")))
    except (OSError, ValueError, RecursionError, LlavaEdgeError, ImportError):
        return []


def choose(found: Sequence[Setting], copies: bool) -> Setting | None:
    """The setting to take of those measured: with `copies`, by what the first picture of a process waits for."""
    allowed = [item for item in found if copies or not item.prepack]
    return _best(allowed, lambda item: item.load_ms + item.encode_ms) if allowed else None


def _best(found: Sequence[Setting], cost: Callable[[Setting], float]) -> Setting:
    """The cheapest, if it is `GAIN` cheaper than the first."""
    best = min(found, key=cost)
    return best if cost(best) < (1 - GAIN) * cost(found[0]) else found[0]


def _compare(bundle: Bundle, candidates: Sequence[Setting], wanted: np.ndarray[Any, Any]) -> list[Setting]:
    precision = bundle.manifest.vision.precision
    usual = EQUAL_INT8 if precision == "int8" else EQUAL
    limit = next((row.limit for row in bundle.manifest.parity if row.stage == f"clip {precision}"), usual)
    pixels, times = _pixels(bundle), dict[Setting, list[tuple[float, float]]]()
    for _ in range(ROUNDS):
        for item in candidates:
            start = time.perf_counter()
            encoder = opened(bundle, item)
            loaded = time.perf_counter()
            features = encoder.encode(pixels)  # also warms up
            begun = time.perf_counter()
            encoder.encode(pixels)
            took = (loaded - start) * 1000, (time.perf_counter() - begun) * 1000
            if np.linalg.norm(features - wanted) <= limit * np.linalg.norm(wanted):
                times.setdefault(item, []).append(took)
    return [
        replace(item, load_ms=min(load for load, _ in took), encode_ms=min(encode for _, encode in took))
        for item, took in times.items()
    ]


def opened(bundle: Bundle, setting: Setting, provider: str = "CPUExecutionProvider") -> VisionEncoder:
    """The encoder, run that way."""
    return VisionEncoder(bundle, setting.threads, provider, prepack=setting.prepack, native=setting.native)


def _pixels(bundle: Bundle) -> np.ndarray[Any, Any]:
    side = bundle.manifest.preprocessing.image_size
    return np.random.default_rng(0).standard_normal((3, side, side), np.float32)


def _path(bundle: Bundle) -> Path:
    """Named by all that the times depend on."""
    files = [bundle.manifest.files[name].sha256 for name in (VISION, VISION_DATA) if name in bundle.manifest.files]
    if not files:
        raise BundleError(f"{bundle.folder} has no vision.onnx in its manifest.")
    about = [files, devices.processor(), devices.thread_count()[0], bindings.version("onnxruntime")]
    about += [str(native.operator_library())]  # its folder is named by all it depends on
    return store.home() / "tune" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
