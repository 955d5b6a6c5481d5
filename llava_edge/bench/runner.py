"""All processes of a measurement, interleaved: each repeat asks every configuration once, so that whatever else the
machine does meanwhile falls on all of them. The first repeats only warm files and processor up and are not counted.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from llava_edge import __version__, interpreter
from llava_edge.bench import records
from llava_edge.bench.picture import variant
from llava_edge.bench.records import (
    AGAIN,
    FIRST,
    KNOWN,
    QUESTIONS,
    WARM,
    Configuration,
    Measured,
    Question,
    Report,
    Stage,
    stage,
)
from llava_edge.bench.work import Work, work
from llava_edge.bundle import Bundle
from llava_edge.errors import LlavaEdgeError, UnavailableError, UsageError
from llava_edge.options import DEFAULT_PROMPT, Device, EngineOptions, Options, Preset
from llava_edge.runtimes import devices, native
from llava_edge.runtimes.pictures import check_budget
from llava_edge.runtimes.presets import check_context
from llava_edge.store import resolve

Sample = dict[str, Any]  # what child.py prints


@dataclass(frozen=True)
class Plan:
    """What to measure: every bundle with every number of threads (0: all cores), context (0: the model's), positions
    for a picture (0: all) and preset. Raises `UsageError` for what would fail after minutes of measuring."""

    models: Sequence[str | Path]
    threads: Sequence[int] = (0,)
    contexts: Sequence[int] = (0,)
    budgets: Sequence[int] = (0,)
    device: Device = "auto"
    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 32
    image: Path | None = None
    repeats: int = 5
    warmup: int = 1
    limits: bool = True
    presets: Sequence[Preset] = ("auto",)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UsageError("The prompt is empty; give a question with --prompt.")
        Options(max_tokens=self.max_tokens)
        for budget in self.budgets:
            Options(image_tokens=budget)
        for threads in self.threads:
            EngineOptions(threads=threads)
        for context in self.contexts:
            EngineOptions(context=context)


def configurations(plan: Plan) -> list[tuple[Configuration, Bundle]]:
    """What the plan asks for. Raises `MissingError` or `BundleError`."""
    found = []
    for bundle in [Bundle.open(resolve(model)) for model in plan.models]:
        about = bundle.manifest
        kind = (about.name, about.identity, about.language.quantization, about.vision.precision, plan.device)
        for swept in product(_threads(plan), plan.contexts, plan.budgets, plan.presets):
            found.append((Configuration(*kind, *swept), bundle))
    return found


def measure(plan: Plan, on_step: Callable[[str, float], None] = lambda label, fraction: None) -> Report:
    """Run the plan. `on_step` gets what comes next and the fraction done.

    A configuration that fails, or that the model refuses, has its `error`; the others go on. Raises `MissingError`,
    `BundleError`, `ImageError` for what can be seen to be wrong before anything runs, and what the model says to the
    first configuration if it refuses all.
    """
    variant(plan.image, 0)
    cases = [_Case(configuration, bundle, _refusal(configuration, bundle))
             for configuration, bundle in configurations(plan)]  # fmt: skip
    if (refusal := cases[0].error) and all(case.error for case in cases):
        raise refusal
    threads = _threads(plan)
    peaks: dict[str, dict[str, float]] = {}
    rounds = range(-plan.warmup, plan.repeats)
    for number in rounds:
        if all(case.error for case in cases):
            break
        done = (number + plan.warmup) / len(rounds)
        for count in threads if plan.limits and number >= 0 else ():
            on_step(f"Limits of the machine, {count} threads", done)
            _raise_peaks(peaks, _child({"kind": "limits", "threads": count}))
        for i, case in enumerate(cases):
            turn = "warming up" if number < 0 else f"{number + 1} of {plan.repeats}"
            on_step(f"{case.configuration.label}: {turn}", done + i / len(cases) / len(rounds))
            case.run(plan, number)
    runs = tuple(case.measured(peaks) for case in cases)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(records.SCHEMA, now, _machine(), _versions(), settings(plan), peaks, runs)


def _threads(plan: Plan) -> list[int]:
    return list(dict.fromkeys(count or devices.thread_count()[0] for count in plan.threads))


def _refusal(configuration: Configuration, bundle: Bundle) -> LlavaEdgeError | None:
    """What `llava-edge run` says to these settings before it loads anything."""
    try:
        check_context(configuration.context, bundle.manifest.language.context_length)
        check_budget(Options(image_tokens=configuration.image_tokens), bundle.manifest)
    except LlavaEdgeError as error:
        return error
    return None


@dataclass
class _Case:
    """A configuration on its way: samples so far, or why there will be none."""

    configuration: Configuration
    bundle: Bundle
    error: LlavaEdgeError | None = None
    samples: list[Sample] = field(default_factory=list)

    def run(self, plan: Plan, number: int) -> None:
        """Two processes with a cache of their own; negative numbers only warm up. Pictures are new each time."""
        if self.error:
            return
        with tempfile.TemporaryDirectory() as folder:
            pictures = [Path(folder) / name for name in ("one.png", "other.png")]
            for offset, path in enumerate(pictures):
                path.write_bytes(variant(plan.image, 2 * (number + plan.warmup) + offset))
            one, other = map(str, pictures)
            task = _task(plan, self.bundle, self.configuration, str(Path(folder) / "cache"))
            sample = _child({**task, "pictures": {FIRST: one, WARM: other, AGAIN: other}})
            later = {} if "error" in sample else _child({**task, "pictures": {KNOWN: one}})
        for found in (sample, later):
            if "error" in found:
                self.error = LlavaEdgeError(found["error"])
                self.error.exit_code = found["exit_code"]
                return
        if number >= 0:
            sample["questions"] |= later["questions"]
            self.samples.append(sample)

    def measured(self, peaks: dict[str, dict[str, float]]) -> Measured:
        if self.error:
            return Measured(self.configuration, str(self.error), exit_code=self.error.exit_code)
        return summary(self.configuration, work(self.bundle), self.samples, peaks)


def summary(
    configuration: Configuration, needed: Work, samples: Sequence[Sample], peaks: dict[str, dict[str, float]]
) -> Measured:
    """The samples of one configuration, at least one, as medians, extremes and shares of the limits."""
    device = samples[0]["device"]
    found = peaks.get(str(configuration.threads), {}) if device == "cpu" else {}
    questions = {
        name: _question(configuration, needed, [sample["questions"][name] for sample in samples], samples[0], found)
        for name in QUESTIONS
    }
    process = {
        records.START: stage([sample["start_ms"] for sample in samples]),
        records.LOAD: stage([sample["load_ms"] for sample in samples]),
        records.COLD: stage([sample["cold_ms"] for sample in samples]),
    }
    memory = {}
    for kind in ("peak_rss", "private", "file"):
        values = [sample["memory"][f"{kind}_bytes"] for sample in samples]
        if None not in values:
            memory[kind] = int(median(values))
    return Measured(replace(configuration, device=device), "", process, questions, memory)


def _question(
    configuration: Configuration, needed: Work, results: list[Sample], sample: Sample, found: dict[str, float]
) -> Question:
    timings = [result["timings"] for result in results]
    cache = tuple(result["cache"] for result in results)
    tokens = results[0]["image_tokens"]
    prompt, known, answer = (results[0][name] for name in ("prompt_tokens", "text_known", "completion_tokens"))
    # What the work of a stage is, and the limit it runs into; only where the stage was computed in full.
    bounds = {
        records.ENCODE: (needed.encode_ops * sample["crops"], _products(configuration.vision == "int8")),
        records.PROJECT: (needed.project_ops * sample["projected"], _products(sample["integer_projector"])),
        records.PREFILL: (needed.prefill_ops(prompt, known), _products(configuration.quantization != "f16")),
    }
    bounds = bounds if set(cache) == {"miss"} else {}
    decoded = sum(result["completion_tokens"] - 1 for result in results)  # the first token is the prompt's
    passes = 1 - sum(result["accepted_tokens"] for result in results) / max(decoded, 1)  # for each of them
    bounds[records.DECODE] = (needed.token_bytes(prompt + answer / 2, sample["kv"]) * passes, "read_bytes")
    values = {
        records.IMAGE: [t["image_ms"] for t in timings],
        records.PREPROCESS: [t["preprocess_ms"] - t["image_ms"] for t in timings],
        records.ENCODE: [t["encode_ms"] - t["project_ms"] for t in timings],
        records.PROJECT: [t["project_ms"] for t in timings],
        records.PREFILL: [t["prefill_ms"] for t in timings],
        records.FIRST_TOKEN: [t["ttft_ms"] for t in timings],
        records.DECODE: [1000 / t["decode_tokens_per_s"] for t in timings if t["decode_tokens_per_s"]],
        records.TOTAL: [t["total_ms"] for t in timings],
    }
    stages = {name: _stage(times, *bounds.get(name, (0.0, "")), found) for name, times in values.items() if times}
    return Question(cache, tokens, prompt, answer, stages)


def _products(integers: bool) -> str:
    """The limit that products run into."""
    return "int8_ops" if integers else "fp32_ops"


def _stage(times: list[float], amount: float, limit: str, found: dict[str, float]) -> Stage:
    if limit not in found or median(times) <= 0:
        return stage(times)
    return stage(times, amount / (median(times) / 1000) / found[limit], limit)


def _task(plan: Plan, bundle: Bundle, configuration: Configuration, cache: str) -> Sample:
    return {
        "kind": "answer",
        "bundle": str(bundle.folder),
        "cache": cache,
        "threads": configuration.threads,
        "context": configuration.context,
        "device": plan.device,
        "prompt": plan.prompt,
        "max_tokens": plan.max_tokens,
        "image_tokens": configuration.image_tokens,
        "preset": configuration.preset,
    }


def _child(task: Sample) -> Sample:
    """What a fresh process measured, or what child.py prints instead. It dies with this process's interruption."""
    try:
        found: Sample = interpreter.run_json("A measurement", "-m", "llava_edge.bench.child", json.dumps(task))
        return found
    except interpreter.ChildError as error:
        kind = UnavailableError if error.killed else LlavaEdgeError
        return {"error": f"Its process {error}; try 'llava-edge doctor'.", "exit_code": kind.exit_code}


def _raise_peaks(peaks: dict[str, dict[str, float]], found: Sample) -> None:
    """Keep the best of all repeats: a limit is what the machine can do when nothing else runs."""
    if "error" in found:
        return
    best = peaks.setdefault(str(found.pop("threads")), {})
    for name, value in found.items():
        best[name] = max(best.get(name, 0.0), value)


def _machine() -> dict[str, Any]:
    name, features = devices.processor()
    count, reason = devices.thread_count()
    return {
        "processor": name,
        "features": features,
        "cores": count,
        "cores_reason": reason,
        "memory_available_bytes": devices.available_memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "native": native.status().reason,
    }


def _versions() -> dict[str, str]:
    packages = ("llama-cpp-python", "onnxruntime", "numpy", "pillow")
    found = {package: metadata.version(package) for package in packages}
    return {"llava-edge": __version__, "python": platform.python_version(), **found}


def settings(plan: Plan) -> dict[str, Any]:
    """What a report says of how it was measured."""
    return {
        "prompt": plan.prompt,
        "max_tokens": plan.max_tokens,
        "image": plan.image.name if plan.image else "drawn",
        "repeats": plan.repeats,
        "warmup": plan.warmup,
    }
