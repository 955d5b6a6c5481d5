"""How far the native kernels move a model's answers from those of llama.cpp's own kernels.

    python benchmarks/faithful.py CONVERSATIONS.json [--model NAME|DIR] [--limit N]

CONVERSATIONS.json: as LLaVA is trained on, with pictures relative to its folder. Every answer token is predicted from
what stands before it, once with the native kernels and once without, behind the same image embeddings; printed are the
perplexity of the given answers, by both, the mean KL divergence between both, and for how many tokens the likeliest is
the same. Needs the extra `train`, which reads the conversations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from math import exp
from pathlib import Path

import click
import numpy as np

from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.export import held_out
from llava_edge.export.report import compare
from llava_edge.runtimes import devices
from llava_edge.runtimes.language import LanguageModel
from llava_edge.store import DEFAULT_MODEL, resolve


@click.command()
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--limit", default=200, show_default=True, help="Conversations at most.")
@click.option("--logits", type=click.Path(path_type=Path), hidden=True)
def main(data: Path, model: str, limit: int, logits: Path | None) -> None:
    """Compare in two processes, of which the second is told not to use the native kernels."""
    bundle = Bundle.open(resolve(model))
    if logits is not None:
        _predict(bundle, data, limit, logits)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for native in ("off", ""):
            path = Path(folder) / f"logits-{native or 'native'}.npz"
            options = ["--model", model, "--limit", str(limit), "--logits", str(path)]
            environment = {**os.environ, "LLAVA_EDGE_NATIVE": native}
            subprocess.run([sys.executable, __file__, str(data), *options], check=True, env=environment)
            with np.load(path) as arrays:
                found.append(dict(arrays))
    known, native_ones = found
    if not np.array_equal(known["targets"], native_ones["targets"]):
        raise click.ClickException("The two processes predicted different tokens: the file has changed meanwhile.")
    ours, stock = [], []
    for target, one, other in zip(known["targets"], known["logits"], native_ones["logits"], strict=True):
        ours.append(compare(one[None], other[None], [target])[0])
        stock.append(compare(one[None], one[None], [target])[0])
    kl, loss, same = np.mean(ours, 0)
    plain, perplexity = exp(np.mean(stock, 0)[1]), exp(loss)
    click.echo(f"{len(ours)} answer tokens. {native_ones['kernels']}", err=True)
    click.echo(f"perplexity: llama.cpp's {plain:.5f}, ours {perplexity:.5f}", err=True)
    click.echo(f"KL divergence {kl:.6f} nats; the same likeliest token: {same:.2%}", err=True)
    changed = {"perplexity_changed": perplexity / plain - 1, "kl": float(kl), "same": float(same)}
    click.echo(json.dumps({"tokens": len(ours), **changed}))


def _predict(bundle: Bundle, data: Path, limit: int, to: Path) -> None:
    """Write logits of all answer tokens, the tokens, and what computed them."""
    path = bundle.part(LANGUAGE)
    rows, targets = [], []
    with tempfile.TemporaryDirectory() as folder:
        samples, pictures = held_out.conversations(data, bundle, path, Path(folder))
        step = max(1, len(samples) // limit)
        samples = samples[::step][:limit]
        context, threads = max(len(sample.keys) for sample in samples), devices.thread_count()[0]
        with closing(LanguageModel(path, adapter=bundle.adapter, context=context, threads=threads)) as engine:
            for sample in samples:
                rows += [row.astype(np.float32) for row in held_out.predictions(engine, sample, pictures)]
                targets += sample.targets
            np.savez(to, logits=np.stack(rows), targets=np.array(targets), kernels=engine.native.reason)


if __name__ == "__main__":
    main()
