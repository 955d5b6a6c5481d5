"""Autotuning of ONNX Runtime: the fastest settings to encode a picture here, measured once on request, and stored.

Three choices depend on the machine: the number of threads; whether weights are prepacked at load, into a private copy
of all of them; and whether our operators are faster than ONNX Runtime's own. The export decides the precision. Nothing
is measured while an answer is computed, or after one, which would slow down the next: `doctor --tune` and `models pull`
measure.
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
from llava_edge.errors import LlavaEdgeError, UnavailableError
from llava_edge.outputs import replacing
from llava_edge.runtimes import bindings, machine, native
from llava_edge.runtimes.vision import VisionEncoder
from llava_edge.typed import Range, build

ROUNDS = 2  # of loading and measuring each candidate in turn
MIN_GAIN = 0.05  # relative; less is noise, and the default setting stays
# Relative difference of features, unless the manifest has a limit of its own. In int8 the standard operators are up to
# 1 % off what the same weights give in float32, ours up to 0.3 % (12 photos, CLIP ViT-B/16).
TOLERANCE, TOLERANCE_INT8 = 1e-3, 3e-2


@dataclass(frozen=True)
class Setting:
    """A way to run vision.onnx, with its best times in milliseconds."""

    threads: Annotated[int, Range(1, 512)]
    prepack: bool
    load_ms: float = 0.0
    encode_ms: float = 0.0
    native: bool = False

    def __str__(self) -> str:
        weights = ("rearranged" if self.prepack else "as mapped") + (", our operator" if self.native else "")
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{threads}, weights {weights}: {self.encode_ms:.0f} ms a picture, {self.load_ms:.0f} ms to load"


def default_setting(bundle: Bundle, threads: int) -> Setting:
    """Return the setting for machines on which nothing was measured.

    Our operators were 1.5 to 1.7 times as fast as ONNX Runtime on AVX2 without VNNI, 1.5 to 2 times with AVX-512 VNNI
    (AMD Zen 4), and no faster where ONNX Runtime uses AMX, as ours did not when that was measured.
    """
    faster = bundle.manifest.vision.precision == "int8" and not machine.int8_is_fast()
    return Setting(threads, False, native=faster and native.operator_library() is not None)


def measure(bundle: Bundle) -> list[Setting]:
    """Measure candidates on the CPU and store the results. The first is the default setting, if its features are right.

    Candidates whose features are wrong are left out. Raises `BundleError`, and `UnavailableError` if other programs
    kept the processor busy meanwhile; results that cannot be written are only returned.
    """
    count = machine.thread_count()[0]
    load = machine.ExternalLoad()
    reference = VisionEncoder(bundle).encode(_pixels(bundle))
    default = default_setting(bundle, count)
    counts = dict.fromkeys((count, max(1, count // 2)))
    results = _measure(bundle, [replace(default, threads=n) for n in counts], reference)
    if not results:  # the features of our operators differ too much from those of the standard ones
        results = _measure(bundle, [Setting(n, False) for n in counts], reference)
    threads = _cheapest(results, lambda setting: setting.encode_ms).threads
    variants = [Setting(threads, True)]
    if native.operator_library() is not None:
        variants.append(Setting(threads, False, native=not results[0].native))
    results += _measure(bundle, variants, reference)
    share = load.share()
    if share > machine.MAX_EXTERNAL_LOAD:
        raise UnavailableError(
            f"Other programs used {share:.0%} of the processor while it was measured; the results were discarded."
        )
    with suppress(OSError, LlavaEdgeError):  # nowhere to store them
        _store(bundle, results)
    return results


def _store(bundle: Bundle, results: Sequence[Setting]) -> None:
    path = _path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(setting) for setting in results]), "utf-8")


def load(bundle: Bundle) -> list[Setting]:
    """Return the results for this bundle's CLIP, processor and version of ONNX Runtime; empty if there are none."""
    try:
        return build(list[Setting], json.loads(_path(bundle).read_text("utf-8")))
    except (OSError, ValueError, RecursionError, LlavaEdgeError, ImportError):
        return []


def choose(results: Sequence[Setting], copies: bool) -> Setting | None:
    """Choose the setting that loads and encodes one picture fastest; without `copies`, none that prepacks."""
    allowed = [setting for setting in results if copies or not setting.prepack]
    return _cheapest(allowed, lambda setting: setting.load_ms + setting.encode_ms) if allowed else None


def _cheapest(results: Sequence[Setting], cost: Callable[[Setting], float]) -> Setting:
    """Return the cheapest setting if it gains `MIN_GAIN` over the first one, else the first one."""
    best = min(results, key=cost)
    return best if cost(best) < (1 - MIN_GAIN) * cost(results[0]) else results[0]


def _measure(bundle: Bundle, candidates: Sequence[Setting], reference: np.ndarray[Any, Any]) -> list[Setting]:
    """Return the candidates whose features equal the reference, with their best times."""
    precision = bundle.manifest.vision.precision
    default_limit = TOLERANCE_INT8 if precision == "int8" else TOLERANCE
    limit = next((row.limit for row in bundle.manifest.parity if row.stage == f"clip {precision}"), default_limit)
    pixels, times = _pixels(bundle), dict[Setting, list[tuple[float, float]]]()
    for _ in range(ROUNDS):
        for setting in candidates:
            start = time.perf_counter()
            encoder = open_encoder(bundle, setting)
            loaded = time.perf_counter()
            features = encoder.encode(pixels)  # also warms up
            warm = time.perf_counter()
            encoder.encode(pixels)
            load_and_encode_ms = (loaded - start) * 1000, (time.perf_counter() - warm) * 1000
            if np.linalg.norm(features - reference) <= limit * np.linalg.norm(reference):
                times.setdefault(setting, []).append(load_and_encode_ms)
    return [
        replace(setting, load_ms=min(load for load, _ in pairs), encode_ms=min(encode for _, encode in pairs))
        for setting, pairs in times.items()
    ]


def open_encoder(bundle: Bundle, setting: Setting, provider: str = "CPUExecutionProvider") -> VisionEncoder:
    """Open vision.onnx with a setting."""
    return VisionEncoder(bundle, setting.threads, provider, prepack=setting.prepack, native=setting.native)


def _pixels(bundle: Bundle) -> np.ndarray[Any, Any]:
    side = bundle.manifest.preprocessing.image_size
    return np.random.default_rng(0).standard_normal((3, side, side), np.float32)


def _path(bundle: Bundle) -> Path:
    """Return the file of the results, named by a hash of all that they depend on."""
    files = [bundle.manifest.files[name].sha256 for name in (VISION, VISION_DATA) if name in bundle.manifest.files]
    about = [files, machine.processor(), machine.thread_count()[0], bindings.version("onnxruntime")]
    about += [str(native.operator_library())]  # its folder's name is a hash of all it depends on
    return store.home() / "tune" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
