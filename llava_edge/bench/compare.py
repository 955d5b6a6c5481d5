"""Compare two reports: how many times faster each stage of a configuration became, and how certain that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_edge.bench.records import TOTAL, Configuration, Report, Run, Stage

# On both sides: with three, one in ten pairs of equal series does not overlap; with four, one in 35.
MIN_SAMPLES = 4


@dataclass(frozen=True)
class Ratio:
    """old / new of one stage: 2 is twice as fast as before.

    ratio: of the medians. low, high: of the extremes, fastest old by slowest new sample and the reverse.
    samples: the smaller number of both sides.
    """

    label: str
    question: str  # empty for stages of the process
    stage: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    samples: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" only if every old sample is on one side of every new one, and there are enough."""
        if self.samples < MIN_SAMPLES:
            return f"too few repeats to tell: both sides need {MIN_SAMPLES}"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference beyond the spread"


def compare(old: Report, new: Report) -> list[Ratio]:
    """Ratios of all stages that both reports have, for configurations that differ at most in the bundle's content.

    The total of a question is left out if its answers differ in length.
    """
    ratios = []
    for old_run, run in _pairs(old, new):
        old_stages, lengths = dict(stages(old_run)), _length_differences(old_run, run)
        for (question, name), stage in stages(run):
            old_stage = old_stages.get((question, name))
            if name == TOTAL and question in lengths:
                continue
            if old_stage is not None and min(old_stage.low, stage.low) > 0:
                ratios.append(_stage_ratio(run.configuration.label, question, name, old_stage, stage))
    return ratios


def setting_differences(old: Report, settings: Mapping[str, Any]) -> str:
    """Settings that differ between then and now, which makes times incomparable; empty if none do."""
    names = {"prompt": "prompt", "image": "picture", "max_tokens": "max-tokens"}
    return "; ".join(
        f"{label} {old.settings[name]!r} then, {settings[name]!r} now"
        for name, label in names.items()
        if name in old.settings and old.settings[name] != settings[name]
    )


def has_common_configuration(old: Report, new: Sequence[Configuration]) -> bool:
    """Whether `old` has any of the configurations to be measured. Device "auto" matches any."""
    measured = [run.configuration for run in old.runs if not run.error]
    return any(
        (replace(one, device=other.device) if one.device == "auto" else one).settings == other.settings
        for one in new
        for other in measured
    )


def condition_differences(old: Report, new: Report) -> list[str]:
    """Conditions that may explain different times: processor, kernels, versions, lengths of answers."""
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in ("processor", "native")]
    pairs += [(name, old.versions.get(name), version) for name, version in new.versions.items()]
    for old_run, run in _pairs(old, new):
        for question, (before, now) in _length_differences(old_run, run).items():
            pairs.append((f"tokens answered, {run.configuration.label}, {question}", before, now))
    return [f"{name}: {before} then, {now} now" for name, before, now in pairs if before is not None and before != now]


def stages(run: Run) -> Iterator[tuple[tuple[str, str], Stage]]:
    """((question or "", stage name), stage) in execution order."""
    for name, stage in run.process.items():
        yield ("", name), stage
    for question, result in run.questions.items():
        for name, stage in result.stages.items():
            yield (question, name), stage


def _pairs(old: Report, new: Report) -> Iterator[tuple[Run, Run]]:
    """Old and new run of each configuration that both measured."""
    old_runs = {run.configuration.settings: run for run in old.runs if not run.error}
    for run in new.runs:
        old_run = old_runs.get(run.configuration.settings)
        if old_run is not None and not run.error:
            yield old_run, run


def _length_differences(old: Run, new: Run) -> dict[str, tuple[int, int]]:
    """Question -> tokens answered then and now, where these differ."""
    lengths = {
        name: (old.questions[name].completion_tokens, question.completion_tokens)
        for name, question in new.questions.items()
    }
    return {name: (before, now) for name, (before, now) in lengths.items() if before != now}


def _stage_ratio(label: str, question: str, name: str, old: Stage, new: Stage) -> Ratio:
    samples = min(len(old.samples), len(new.samples))
    return Ratio(label, question, name, old.median, new.median, old.median / new.median, old.low / new.high,
                 old.high / new.low, samples)  # fmt: skip
