"""Runs the processes of a measurement, interleaved: each repeat runs every configuration once, so that other load
affects all of them alike. The first repeats only warm up page cache and processor and are not counted.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from llava_edge import __version__, interpreter
from llava_edge.bench import records
from llava_edge.bench.messages import Answer, Failure, Sample, Task
from llava_edge.bench.picture import marked_copy
from llava_edge.bench.records import (
    AGAIN,
    FIRST,
    KNOWN,
    QUESTIONS,
    WARM,
    Configuration,
    Limit,
    Question,
    Report,
    Run,
    Stage,
    summarize,
)
from llava_edge.bench.work import Work, bundle_work
from llava_edge.bundle import Bundle
from llava_edge.errors import LlavaEdgeError, UnavailableError, UsageError
from llava_edge.options import DEFAULT_PROMPT, Device, EngineOptions, Options, PresetName
from llava_edge.outputs import storage_errors
from llava_edge.runtimes import machine, native
from llava_edge.runtimes.pictures import check_budget
from llava_edge.runtimes.presets import check_context
from llava_edge.runtimes.roofline import Roofline
from llava_edge.store import resolve
from llava_edge.typed import build

T = TypeVar("T")


class MeasurementError(LlavaEdgeError):
    """A process that measures has failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.exit_code = failure.exit_code


@dataclass(frozen=True)
class Plan:
    """What to measure: every combination of bundle, threads (0: all cores), context (0: the model's), image tokens
    (budgets; 0: all) and preset. Raises `UsageError` for values that would fail after minutes of measuring."""

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
    presets: Sequence[PresetName] = ("auto",)

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
    """All configurations of a plan. Raises `MissingError` or `BundleError`."""
    pairs = []
    bundles = {model: Bundle.open(resolve(model)) for model in plan.models}
    alike = Counter(_description(bundle) for bundle in bundles.values())
    for model, bundle in bundles.items():
        name, quantization, vision = description = _description(bundle)
        if alike[description] > 1:  # two exports of a checkpoint
            name = str(model)
        common = (name, bundle.manifest.identity, quantization, vision, plan.device)
        for swept in product(_threads(plan), plan.contexts, plan.budgets, dict.fromkeys(plan.presets)):
            pairs.append((Configuration(*common, *swept), bundle))
    return pairs


def _description(bundle: Bundle) -> tuple[str, str, str]:
    """Name, quantization and precision of the vision tower."""
    manifest = bundle.manifest
    return manifest.name, manifest.language.quantization, manifest.vision.precision


def measure(plan: Plan, on_step: Callable[[str, float], None] = lambda label, fraction: None) -> Report:
    """Run the plan. `on_step` gets the next step and the fraction done.

    A configuration that fails, or that the model does not support, gets an `error`, and the others continue. Raises
    `MissingError`, `BundleError` or `ImageError` for what is wrong before anything runs, and the first configuration's
    error if the model supports none.
    """
    marked_copy(plan.image, 0)
    cases = [_Case(configuration, bundle, _configuration_error(configuration, bundle))
             for configuration, bundle in configurations(plan)]  # fmt: skip
    if (first_error := cases[0].error) and all(case.error for case in cases):
        raise first_error
    threads = _threads(plan)
    peaks: dict[str, dict[str, float]] = {}
    errors: dict[str, str] = {}
    rounds = range(-plan.warmup, plan.repeats)
    for number in rounds:
        if all(case.error for case in cases):
            break
        done = (number + plan.warmup) / len(rounds)
        for count in threads if plan.limits and number >= 0 else ():
            on_step(f"Limits of the machine, threads: {count}", done)
            try:
                _update_peaks(peaks, _run_child(Roofline, "limits", str(count)))
            except MeasurementError as error:
                errors[str(count)] = str(error)
        for i, case in enumerate(cases):
            progress = "warming up" if number < 0 else f"{number + 1} of {plan.repeats}"
            on_step(f"{case.configuration.label}: {progress}", done + i / len(cases) / len(rounds))
            case.run(plan, number)
    runs = tuple(case.result(peaks) for case in cases)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    errors = {count: error for count, error in errors.items() if count not in peaks}
    found = {**peaks, **dict.fromkeys(errors)}
    return Report(records.SCHEMA, now, _machine(), _versions(), settings(plan), found, runs, errors)


def _threads(plan: Plan) -> list[int]:
    return list(dict.fromkeys(count or machine.thread_count()[0] for count in plan.threads))


def _configuration_error(configuration: Configuration, bundle: Bundle) -> LlavaEdgeError | None:
    """The error that `llava-edge run` gives for these settings before it loads anything."""
    try:
        check_context(configuration.context, bundle.manifest.language.context_length)
        check_budget(Options(image_tokens=configuration.image_tokens), bundle.manifest)
    except LlavaEdgeError as error:
        return error
    return None


@dataclass
class _Case:
    """A configuration being measured: samples so far, or the error that ended it."""

    configuration: Configuration
    bundle: Bundle
    error: LlavaEdgeError | None = None
    samples: list[Sample] = field(default_factory=list)

    def run(self, plan: Plan, number: int) -> None:
        """Run two processes with their own cache and new pictures; negative numbers only warm up."""
        if self.error:
            return
        with tempfile.TemporaryDirectory() as folder:
            pictures = [Path(folder) / name for name in ("one.png", "other.png")]
            for offset, path in enumerate(pictures):
                with storage_errors(path):
                    path.write_bytes(marked_copy(plan.image, 2 * (number + plan.warmup) + offset))
            one, other = map(str, pictures)
            cache = str(Path(folder) / "cache")
            try:
                sample = self._answer(plan, cache, {FIRST: one, WARM: other, AGAIN: other})
                known_sample = self._answer(plan, cache, {KNOWN: one})
            except MeasurementError as error:
                self.error = error
                return
        if number >= 0:
            self.samples.append(replace(sample, answers=sample.answers | known_sample.answers))

    def _answer(self, plan: Plan, cache: str, pictures: dict[str, str]) -> Sample:
        task = Task(
            bundle=str(self.bundle.folder),
            cache=cache,
            threads=self.configuration.threads,
            context=self.configuration.context,
            device=plan.device,
            preset=self.configuration.preset,
            prompt=plan.prompt,
            max_tokens=plan.max_tokens,
            image_tokens=self.configuration.image_tokens,
            pictures=pictures,
        )
        return _run_child(Sample, "answers", json.dumps(asdict(task)))

    def result(self, peaks: dict[str, dict[str, float]]) -> Run:
        if self.error:
            return Run(self.configuration, str(self.error), exit_code=self.error.exit_code)
        return summarize_run(self.configuration, bundle_work(self.bundle), self.samples, peaks)


def summarize_run(
    configuration: Configuration, work: Work, samples: Sequence[Sample], peaks: dict[str, dict[str, float]]
) -> Run:
    """Summarize at least one sample of a configuration as medians, extremes and shares of the limits."""
    device = samples[0].device
    limits = peaks.get(str(configuration.threads), {}) if device == "cpu" else {}
    questions = {
        name: _question(configuration, work, [sample.answers[name] for sample in samples], samples[0], limits)
        for name in QUESTIONS
    }
    process = {
        records.START: summarize([sample.start_ms for sample in samples]),
        records.LOAD: summarize([sample.load_ms for sample in samples]),
        records.COLD: summarize([sample.cold_ms for sample in samples]),
    }
    memory = {
        "peak_rss": [sample.memory.peak_rss_bytes for sample in samples],
        "private": [sample.memory.private_bytes for sample in samples],
        "file": [sample.memory.file_bytes for sample in samples],
    }
    medians = {
        kind: int(median(value for value in values if value is not None))
        for kind, values in memory.items()
        if None not in values
    }
    return Run(replace(configuration, device=device), "", process, questions, medians)


def _question(
    configuration: Configuration, work: Work, answers: list[Answer], sample: Sample, limits: dict[str, float]
) -> Question:
    results = [answer.result for answer in answers]
    timings = [result.timings for result in results]
    cache = tuple(result.cache for result in results)
    tokens, prompt, answered = results[0].image_tokens, results[0].prompt_tokens, results[0].completion_tokens
    # The work of each stage and the limit that bounds it, only where the stage was computed in full.
    stage_work: dict[str, tuple[float, Limit]] = {
        records.ENCODE: (work.encode_ops * sample.crops, _product_limit(configuration.vision == "int8")),
        records.PROJECT: (work.project_ops * sample.projected, _product_limit(sample.integer_projector)),
        records.PREFILL: (work.prefill_ops(prompt, answers[0].text_known), _product_limit(sample.integer_prefill)),
    }
    stage_work = stage_work if set(cache) == {"miss"} else {}
    # Prefill gives the first token, and the one that ends an answer does not count as one of it.
    decoded = sum(result.completion_tokens - (result.finish_reason == "length") for result in results)
    passes = 1 - sum(result.accepted_tokens for result in results) / max(decoded, 1)  # per decoded token
    stage_work[records.DECODE] = (work.token_bytes(prompt + answered / 2, sample.kv) * passes, "read_bytes")
    values = {
        records.IMAGE: [t.image_ms for t in timings],
        records.PREPROCESS: [t.preprocess_ms - t.image_ms for t in timings],
        records.ENCODE: [t.encode_ms - t.project_ms for t in timings],
        records.PROJECT: [t.project_ms for t in timings],
        records.PREFILL: [t.prefill_ms for t in timings],
        records.FIRST_TOKEN: [t.ttft_ms for t in timings],
        records.DECODE: [1000 / t.decode_tokens_per_s for t in timings if t.decode_tokens_per_s],
        records.TOTAL: [t.total_ms for t in timings],
    }
    stages = {name: _stage(times, *stage_work.get(name, (0.0, "")), limits) for name, times in values.items() if times}
    return Question(cache, tokens, prompt, answered, stages)


def _product_limit(integers: bool) -> Limit:
    """The limit that bounds products."""
    return "int8_ops" if integers else "fp32_ops"


def _stage(times: list[float], required_work: float, limit: Limit, limits: dict[str, float]) -> Stage:
    if limit not in limits or median(times) <= 0:
        return summarize(times)
    return summarize(times, required_work / (median(times) / 1000) / limits[limit], limit)


def _run_child(kind: type[T], *arguments: str) -> T:
    """Run `child` in a fresh process and return what it found. Ctrl-C ends it, too.

    Raises `MeasurementError`.
    """
    try:
        found = interpreter.run_json("A measurement", "-m", "llava_edge.bench.child", *arguments)
    except interpreter.ChildError as error:
        code = (UnavailableError if error.killed else LlavaEdgeError).exit_code
        raise MeasurementError(Failure(f"Its process {error}; try 'llava-edge doctor'.", code)) from error
    if "error" in found:
        raise MeasurementError(build(Failure, found))
    return build(kind, found)


def _update_peaks(peaks: dict[str, dict[str, float]], limits: Roofline) -> None:
    """Keep the best of all repeats: a limit is what the machine can do without other load."""
    best = peaks.setdefault(str(limits.threads), {})
    for name in ("int8_ops", "fp32_ops", "read_bytes"):
        best[name] = max(best.get(name, 0.0), getattr(limits, name))


def _machine() -> dict[str, Any]:
    name, features = machine.processor()
    count, reason = machine.thread_count()
    return {
        "processor": name,
        "features": features,
        "cores": count,
        "cores_reason": reason,
        "memory_available_bytes": machine.available_memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "native": native.status().reason,
    }


def _versions() -> dict[str, str]:
    packages = ("llama-cpp-python", "onnxruntime", "numpy", "pillow")
    versions = {package: metadata.version(package) for package in packages}
    return {"llava-edge": __version__, "python": platform.python_version(), **versions}


def settings(plan: Plan) -> dict[str, Any]:
    """The settings that a report records."""
    return {
        "prompt": plan.prompt,
        "max_tokens": plan.max_tokens,
        "image": plan.image.name if plan.image else "drawn",
        "repeats": plan.repeats,
        "warmup": plan.warmup,
    }
