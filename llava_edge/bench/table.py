"""Reports as text tables and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO

from llava_edge.bench.compare import Ratio, stages
from llava_edge.bench.records import QUESTIONS, WARM, Report, Run, Stage

COLUMNS = (
    "model", "quantization", "vision", "device", "threads", "context", "budget", "preset", "question", "cache",
    "image_tokens", "prompt_tokens", "completion_tokens", "stage", "median_ms", "low_ms", "high_ms", "samples", "share",
    "limit",
)  # fmt: skip

LIMIT_NAMES = {"int8_ops": "8-bit products", "fp32_ops": "float32 products", "read_bytes": "memory reads"}


def table(report: Report) -> str:
    """A report as text, for a terminal of 110 columns."""
    machine = report.machine
    lines = [f"{machine['processor']}: {' '.join(machine['features'])}"]
    lines.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    lines.append(f"native kernels: {machine.get('native', 'unknown')}")  # missing in old reports
    for threads, limits in report.limits.items():
        if limits is None:
            text = f"not measured. {report.limits_errors.get(threads, '')}"
        else:
            text = (
                f"products of 8 bits {limits['int8_ops'] / 1e12:.2f} and of float32 "
                f"{limits['fp32_ops'] / 1e12:.2f} T operations/s, memory {limits['read_bytes'] / 1e9:.1f} GB/s"
            )
        lines.append(f"limits with threads={threads}: {text}")
    for run in report.runs:
        lines += ["", *_run_lines(run)]
    return "\n".join(lines)


def comparison(ratios: Sequence[Ratio], name: str, other: Sequence[str] = ()) -> str:
    """Speedups over the report called `name`. other: conditions that differ, see `condition_differences`."""
    lines = [f"times faster than {name} (of the medians; range of the extremes)"]
    lines += [f"  note: {condition}" for condition in other]
    if not ratios:
        lines.append("  nothing to compare: no configuration is in both")
    for number, ratio in enumerate(ratios):
        if number == 0 or ratios[number - 1].label != ratio.label:
            lines.append(ratio.label)
        stage = f"{ratio.question} {ratio.stage}".strip()
        lines.append(
            f"  {stage:22} {ratio.old:10.1f} -> {ratio.new:10.1f} ms  {ratio.ratio:6.2f} x "
            f"({ratio.low:.2f} to {ratio.high:.2f})  {ratio.verdict}"
        )
    return "\n".join(lines)


def to_csv(report: Report) -> str:
    """A report as CSV, one row per stage and question; stages of the process have no question.

    budget: `--image-tokens`; image_tokens: how many the question had. Failed configurations have no rows.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in report.runs:
        for (question, name), stage in stages(run):
            result = run.questions.get(question)
            counts = (result.image_tokens, result.prompt_tokens, result.completion_tokens) if result else ("",) * 3
            cache = "|".join(dict.fromkeys(result.cache)) if result else ""
            share = "" if stage.share is None else stage.share
            row = [*run.configuration.settings, question, cache, *counts, name]
            writer.writerow([*row, stage.median, stage.low, stage.high, len(stage.samples), share, stage.limit])
    return text.getvalue()


def memory_text(run: Run) -> str:
    """Peak, private and file-backed memory in megabytes; empty where the system does not report it."""
    names = {"peak_rss": "peak", "private": "private", "file": "of files"}
    return ", ".join(f"{run.memory[key] / 1e6:,.0f} MB {text}" for key, text in names.items() if key in run.memory)


def _run_lines(run: Run) -> list[str]:
    if run.error:
        return [f"{run.configuration.label}: FAILED. {run.error}"]
    warm = run.questions[WARM]
    counts = f"{warm.prompt_tokens} positions, {warm.image_tokens} of them image; {warm.completion_tokens} answered"
    lines = [f"{run.configuration.label}, {run.configuration.device}", f"  {counts}; memory: {memory_text(run)}"]
    lines += [f"  {name:18} {_cell(stage)}" for name, stage in run.process.items()]
    headings = [f"{name} ({', '.join(dict.fromkeys(run.questions[name].cache))})" for name in QUESTIONS]
    lines.append(f"  {'ms':18} " + " ".join(f"{head:26}" for head in headings) + f" {WARM}: share of limit")
    for name in warm.stages:
        cells = [_cell(run.questions[question].stages.get(name)) for question in QUESTIONS]
        lines.append(
            (f"  {name:18} " + " ".join(f"{cell:26}" for cell in cells) + f" {_share(warm.stages[name])}").rstrip()
        )
    return lines


def _cell(stage: Stage | None) -> str:
    return "" if stage is None else f"{stage.median:9.1f} ({stage.low:.1f} to {stage.high:.1f})"


def _share(stage: Stage) -> str:
    return "" if stage.share is None else f"{stage.share:5.1%} of {LIMIT_NAMES[stage.limit]}"
