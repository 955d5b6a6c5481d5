"""Two results of the same configuration as ratios: how many times faster the new one is, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_edge.bench.records import Configuration, Measured, Report, Stage

ENOUGH = 4  # samples on both sides: with three, one in ten pairs of equal series does not overlap; with four, one in 35


@dataclass(frozen=True)
class Ratio:
    """old / new of one stage: 2 is twice as fast as before.

    ratio: of the medians. low, high: of the extremes, the fastest old by the slowest new sample and the reverse.
    samples: that the side with fewer has.
    """

    label: str
    question: str  # empty for what a process does once
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
        if self.samples < ENOUGH:
            return f"too few repeats to tell: {ENOUGH} on both sides would do"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference beyond the spread"


def compare(old: Report, new: Report) -> list[Ratio]:
    """Every stage that both have, of configurations that agree in all but the bundle's exact content."""
    before = {_key(run.configuration): run for run in old.runs if not run.error}
    ratios = []
    for run in new.runs:
        known = before.get(_key(run.configuration))
        if known is None or run.error:
            continue
        earlier = dict(stages(known))
        for (question, name), stage in stages(run):
            then = earlier.get((question, name))
            if then is not None and min(then.low, stage.low) > 0:
                ratios.append(_ratio(run.configuration.label, question, name, then, stage))
    return ratios


def asked_otherwise(old: Report, settings: Mapping[str, Any]) -> str:
    """What was asked then and would be asked now, if that differs: such times do not compare. Empty if it does not."""
    names = {"prompt": "prompt", "image": "picture", "max_tokens": "max-tokens"}
    return "; ".join(
        f"{shown} {old.settings[name]!r} then, {settings[name]!r} now"
        for name, shown in names.items()
        if name in old.settings and old.settings[name] != settings[name]
    )


def in_common(old: Report, new: Sequence[Configuration]) -> bool:
    """Whether any configuration that is about to be measured is there. "auto" is any device."""
    known = [run.configuration for run in old.runs if not run.error]
    return any(
        _key(replace(one, device=other.device) if one.device == "auto" else one) == _key(other)
        for one in new
        for other in known
    )


def other_conditions(old: Report, new: Report) -> list[str]:
    """What may be why times differ, other than a change of settings: processor, kernels, versions."""
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in ("processor", "native")]
    pairs += [(name, old.versions.get(name), version) for name, version in new.versions.items()]
    return [f"{name}: {then} then, {now} now" for name, then, now in pairs if then is not None and then != now]


def stages(run: Measured) -> Iterator[tuple[tuple[str, str], Stage]]:
    """((question or "", stage name), stage) in the order of a run."""
    for name, stage in run.process.items():
        yield ("", name), stage
    for question, asked in run.questions.items():
        for name, stage in asked.stages.items():
            yield (question, name), stage


def _key(configuration: Configuration) -> tuple[object, ...]:
    c = configuration
    return (c.model, c.quantization, c.vision, c.device, c.threads, c.context, c.image_tokens, c.preset)


def _ratio(label: str, question: str, name: str, old: Stage, new: Stage) -> Ratio:
    samples = min(len(old.samples), len(new.samples))
    return Ratio(label, question, name, old.median, new.median, old.median / new.median, old.low / new.high,
                 old.high / new.low, samples)  # fmt: skip
