"""How far the native kernels move a model's answers from those of llama.cpp's own kernels.

    python benchmarks/kl_divergence.py CONVERSATIONS.json [--model NAME|DIR] [--limit N]

CONVERSATIONS.json: in LLaVA's training format, with pictures relative to its folder. Every answer token is predicted
from what precedes it, with and without the native kernels, from the same image embeddings. Prints the perplexity of the
given answers with both, the mean KL divergence between them, how often the most likely token is the same, and how many
greedy answers to the first questions are. A third process shows how far llama.cpp's own kernels diverge if each number
of the embeddings changes by a millionth: rounding activations to 8 bits turns any difference into one of that size.
Needs the extra `train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import click
import numpy as np

from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.export import held_out
from llava_edge.export.report import Array, compare
from llava_edge.runtimes.language import LanguageModel
from llava_edge.store import DEFAULT_MODEL, resolve


@click.command()
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--limit", default=200, show_default=True, help="Conversations at most.")
@click.option("--logits", type=click.Path(path_type=Path), hidden=True)
@click.option("--perturb", is_flag=True, hidden=True)
def main(data: Path, model: str, limit: int, logits: Path | None, perturb: bool) -> None:
    """Compare processes with and without the native kernels."""
    bundle = Bundle.open(resolve(model))
    if logits is not None:
        _predict(bundle, data, limit, logits, perturb)
        return
    with tempfile.TemporaryDirectory() as folder:
        predictions = []
        for native, more in (("off", []), ("", []), ("off", ["--perturb"])):
            path = Path(folder) / "logits.npz"
            options = ["--model", model, "--limit", str(limit), "--logits", str(path), *more]  # embeddings go beside it
            environment = {**os.environ, "LLAVA_EDGE_NATIVE": native}
            subprocess.run([sys.executable, __file__, str(data), *options], check=True, env=environment)
            with np.load(path) as arrays:
                predictions.append(dict(arrays))
    stock, ours, perturbed = predictions
    plain = exp(_scores(stock, stock)[1])
    click.echo(f"{len(stock['targets'])} answer tokens. {ours['kernels']}", err=True)
    click.echo(f"llama.cpp's own kernels: perplexity {plain:.5f}", err=True)
    summary = {}
    for name, other in (("native", ours), ("llama.cpp, perturbed embeddings", perturbed)):
        kl, loss, same = _scores(stock, other)
        equal = int((stock["answers"] == other["answers"]).sum())
        click.echo(
            f"{name}: {exp(loss):.5f}, KL divergence {kl:.6f} nats, same most likely token {same:.2%}, "
            f"{equal} of {len(stock['answers'])} greedy answers equal",
            err=True,
        )
        summary[name] = {"perplexity_changed": exp(loss) / plain - 1, "kl": kl, "same": same, "equal_answers": equal}
    counts = {"tokens": len(stock["targets"]), "answers": len(stock["answers"])}
    click.echo(json.dumps({**counts, "perplexity": plain, **summary}))


def _scores(stock: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Return the means of `compare` over all answer tokens, one at a time: distributions in float64 are large."""
    if not np.array_equal(stock["targets"], other["targets"]):
        raise click.ClickException("Two processes predicted different tokens: the file was changed meanwhile.")
    rows = zip(stock["logits"], other["logits"], stock["targets"], strict=True)
    return [float(mean) for mean in np.mean([compare(a[None], b[None], [token])[0] for a, b, token in rows], 0)]


class _Perturbed(held_out.Pictures):
    """Pictures' embeddings, each number changed by about a millionth of itself."""

    def __init__(self, pictures: held_out.Pictures) -> None:
        self._pictures = pictures

    def __getitem__(self, name: str) -> Array:
        rows = self._pictures[name]
        perturbed: Array = rows * (1 + 1e-6 * np.random.default_rng(0).standard_normal(rows.shape))
        return perturbed.astype(np.float32)


def _predict(bundle: Bundle, data: Path, limit: int, path_out: Path, perturb: bool) -> None:
    """Write the logits of all answer tokens, the tokens, greedy answers, and which kernels computed them."""
    path = bundle.part(LANGUAGE)
    rows, targets, answers = [], [], []
    samples, pictures = held_out.read_conversations(data, bundle, path, path_out.parent)
    step = max(1, len(samples) // limit)
    samples = samples[::step][:limit]
    context = max(len(sample.keys) for sample in samples) + held_out.MAX_OWN_TOKENS
    with LanguageModel(path, adapter=bundle.adapter, context=context) as engine:
        embeddings = _Perturbed(pictures) if perturb else pictures
        for sample in samples:
            rows += [row.astype(np.float32) for row in held_out.predictions(engine, sample, embeddings)]
            targets += sample.targets
            question = replace(sample, keys=sample.keys[: sample.answers[0]], answers=())
            answers.append(" ".join(map(str, held_out.greedy_answer(engine, question, embeddings))))
        np.savez(
            path_out,
            logits=np.stack(rows),
            targets=np.array(targets),
            answers=np.array(answers),
            kernels=engine.native.reason,
        )


if __name__ == "__main__":
    main()
