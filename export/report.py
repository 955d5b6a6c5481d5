"""Compares every quantization of the language model: its size, and how its predictions differ on held-out pictures.

Every file predicts the same answers of the same conversations (`held_out.py`), float16 first; the full distributions
of the next token are compared. An "image-aware" file was quantized with an importance matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import gguf
from llava_edge.bundle import Bundle
from llava_edge.export import Progress, held_out
from llava_edge.export.held_out import Pictures, Sample
from llava_edge.export.importance import Importance
from llava_edge.export.quantize import Quant, quantize
from llava_edge.runtimes.language import LanguageModel

Array = np.ndarray[Any, Any]

TITLE = "# What quantization costs"  # first line of a report

MEASURED: tuple[tuple[Quant, bool], ...] = (
    ("f16", False),
    ("q8_0", False),  # ignores a matrix
    ("q5_k_m", False),
    ("q5_k_m", True),
    ("q4_k_m", False),
    ("q4_k_m", True),
    ("q4_0", False),
    ("q4_0", True),
)


@dataclass(frozen=True)
class Row:
    """One file. Over all answer tokens: mean `kl` in nats from float16's distribution to this one's, `perplexity` of
    the answers, share of tokens where both have the same most likely one. types: number of weights by GGUF type."""

    quant: Quant
    image_aware: bool
    size: int
    kl: float
    perplexity: float
    agreement: float
    types: dict[str, int]


@dataclass(frozen=True)
class Report:
    """held_out, calibration: the data measured on and that of the matrix, in words. tokens: number of answer tokens."""

    name: str
    held_out: str
    calibration: str
    tokens: int
    rows: list[Row]


def measure(
    bundle: Bundle,
    float16: Path,
    scratch: Path,
    importance: Importance,
    calibration: str,
    data: Path | None = None,
    threads: int = 0,
    progress: Progress = lambda stage, share: None,
) -> Report:
    """Quantize `float16` in every way, one after another, and measure each file. `scratch` is an empty folder.

    bundle: gives vision, projector and template. data: conversations; by default sample pictures with float16's own
    answers. threads: for llama.cpp's quantizer.
    """
    progress("reading held-out conversations", None)
    if data:
        samples, pictures = held_out.read_conversations(data, bundle, float16, scratch)
    else:
        samples, pictures = held_out.sample_conversations(bundle, float16, scratch)
    rows, tokens = [], sum(len(sample.answers) for sample in samples)
    for quant, image_aware in MEASURED:
        progress(f"measuring {_label(quant, image_aware)}", None)
        path = float16 if quant == "f16" else scratch / "language.gguf"
        if path != float16:
            quantize(float16, path, quant, threads, importance if image_aware else None)
        kl, loss, agreement = np.mean(_scores(path, samples, pictures, scratch), 0)
        size = path.stat().st_size
        rows.append(Row(quant, image_aware, size, float(kl), exp(loss), float(agreement), _types(path)))
    source = data.name if data else "drawings, float16's own answers"
    description = f"{len(samples)} conversations about {len({sample.image for sample in samples})} pictures ({source})"
    return Report(bundle.manifest.name, description, calibration, tokens, rows)


def _scores(path: Path, samples: Sequence[Sample], pictures: Pictures, scratch: Path) -> Array:
    """(answer tokens, 3), by `compare`. The first file's logits are saved in `scratch` as the reference."""
    scores = []
    with LanguageModel(path, context=max(len(sample.keys) for sample in samples)) as engine:
        for number, sample in enumerate(samples):
            saved = scratch / f"logits-{number}.npy"
            logits = np.stack([row.copy() for row in held_out.predictions(engine, sample, pictures)])
            if not saved.exists():
                np.save(saved, logits)
            scores.append(compare(np.load(saved), logits, sample.targets))
    return np.concatenate(scores)


def compare(reference: Array, logits: Array, targets: Sequence[int]) -> Array:
    """(n, vocab) logits twice and n token ids -> (n, 3): KL(first || second) in nats, negative
    log-probability of the target in the second, 1 if both have the same most likely token."""
    reference_logs, logs = _log_softmax(reference), _log_softmax(logits)
    kl = (np.exp(reference_logs) * (reference_logs - logs)).sum(-1)
    same = reference.argmax(-1) == logits.argmax(-1)
    return np.stack([kl, -logs[np.arange(len(targets)), targets], same], -1)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _types(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in gguf.read(path).tensors.values():
        counts[tensor.kind] += int(np.prod(tensor.shape))
    return dict(counts.most_common())


def _label(quant: str, image_aware: bool) -> str:
    return f"{quant}, image-aware" if image_aware else quant


def markdown(report: Report) -> str:
    """The report as Markdown."""
    baseline = report.rows[0].perplexity
    lines = [
        f"{TITLE} {report.name}",
        "",
        f"Language model alone, by llama.cpp, on {report.tokens} answer tokens: {report.held_out}.",
        f"Image-aware files were quantized with an importance matrix from {report.calibration}.",
        "",
        "| language model | MB | bits a weight | KL to f16, nats | perplexity | change | same first choice | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        weights = sum(row.types.values())
        kinds = ", ".join(f"{kind} {count / weights:.0%}" for kind, count in row.types.items() if count > weights / 200)
        lines.append(
            f"| {_label(row.quant, row.image_aware)} | {row.size / 1e6:.1f} | {8 * row.size / weights:.2f} "
            f"| {row.kl:.5f} | {row.perplexity:.4f} | {row.perplexity / baseline - 1:+.2%} | {row.agreement:.2%} "
            f"| {kinds} |"
        )
    return "\n".join([*lines, "", "F16, F32 and Q8_0 ignore the matrix.", ""])
