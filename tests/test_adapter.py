"""A language model as a finished file and a low-rank adapter: one that llama.cpp adds up is the checkpoint's."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import in_halves

from llava_edge import gguf
from llava_edge.bench.work import bundle_work
from llava_edge.bundle import ADAPTER, LANGUAGE, Bundle, file_entry, write_manifest
from llava_edge.cli import execute
from llava_edge.errors import BundleError, CheckpointError
from llava_edge.export.adapter import LowRank, read_back_adapter, write_adapter
from llava_edge.export.checkpoint import LanguageFile, open_checkpoint
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro
from llava_edge.runtimes import bindings
from llava_edge.runtimes.language import LanguageModel

Array = np.ndarray[Any, Any]

LAYER = "language_model.model.layers.1"
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
RANK = 4


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> LowRank:
    """Large random updates of the second layer, and its base as a float16 file."""
    folder = tmp_path_factory.mktemp("base")
    tensors = in_halves(micro.random_tensors())
    checkpoint = micro.write_checkpoint(folder / "checkpoint", tensors=tensors)
    export(ExportOptions(checkpoint, folder / "bundle", quant="f16", vision="fp32"))
    rng = np.random.default_rng(1)
    updates = {}
    for module in (f"{LAYER}.{name}" for name in MODULES):
        rows, columns = tensors[f"{module}.weight"].shape
        a, b = rng.standard_normal((RANK, columns)), rng.standard_normal((rows, RANK))
        updates[module] = (a.astype(np.float16), (b * columns**-0.5).astype(np.float16))
    return LowRank(LanguageFile(folder / "bundle" / LANGUAGE, "f16"), updates)


@pytest.fixture(scope="module")
def merged(low_rank: LowRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the updates folded into its weights."""
    tensors = in_halves(micro.random_tensors())
    for module, (a, b) in low_rank.updates.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + b.astype(np.float32) @ a.astype(np.float32)
    return micro.write_checkpoint(tmp_path_factory.mktemp("merged") / "checkpoint", tensors=tensors)


@pytest.fixture(scope="module")
def bundle(low_rank: LowRank, merged: Path) -> Path:
    out = merged.parent / "bundle"
    export(ExportOptions(merged, out, vision="fp32", low_rank=low_rank))
    return out


def logits(language: Path, adapter: Path | None = None) -> Array:
    import threading

    with closing(LanguageModel(language, adapter=adapter, context=64, threads=1)) as engine:
        engine.evaluate_tokens(engine.vocabulary.tokenize("What is it?"), threading.Event())
        return engine.logits().copy()


def test_base_and_adapter_answer_as_the_merged_model(bundle: Path, merged: Path, low_rank: LowRank) -> None:
    opened = Bundle.open(bundle)
    assert opened.adapter == bundle / ADAPTER
    assert (bundle / LANGUAGE).read_bytes() == low_rank.base.path.read_bytes()
    rows = {row.stage: row for row in opened.manifest.parity}
    assert rows["logits f16"].value >= 0.9999
    export(ExportOptions(merged, bundle.parent / "plain", quant="f16", vision="fp32"))
    wanted = logits(bundle.parent / "plain" / LANGUAGE)
    scale = np.abs(wanted).max()
    assert np.abs(logits(bundle / LANGUAGE, bundle / ADAPTER) - wanted).max() < 5e-3 * scale
    assert np.abs(logits(bundle / LANGUAGE) - wanted).max() > 0.1 * scale  # without it, another model


def test_bench_counts_the_adapter_that_each_token_reads(bundle: Path, low_rank: LowRank) -> None:
    opened = Bundle.open(bundle)
    files = {name: entry for name, entry in opened.manifest.files.items() if name != ADAPTER}
    with_it, without = bundle_work(opened), bundle_work(replace(opened, manifest=replace(opened.manifest, files=files)))
    numbers = sum(a.size + b.size for a, b in low_rank.updates.values())
    assert with_it.token_bytes(0) - without.token_bytes(0) == 2 * numbers
    assert with_it.prefill_ops(7) - without.prefill_ops(7) == 2 * 7 * numbers


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    micro.draw("red", np.random.default_rng(0)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_bundle_with_an_adapter_runs_and_verifies(bundle: Path, merged: Path, picture: Path) -> None:
    assert execute(["run", "--model", str(bundle), "--image", str(picture), "--max-tokens", "4"]) == 0
    assert execute(["verify", str(bundle), "--against", str(merged)]) == 0


@pytest.mark.parametrize("fault", ["missing", "cut", "of another model"])
def test_a_bundle_with_a_broken_adapter_is_refused(
    fault: str, bundle: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    adapter = copy / ADAPTER
    if fault == "missing":
        adapter.unlink()
    elif fault == "cut":
        adapter.write_bytes(adapter.read_bytes()[:-64])
    else:
        shutil.copyfile(copy / LANGUAGE, adapter)
        manifest = Bundle.open(bundle).manifest
        write_manifest(copy, replace(manifest, files={**manifest.files, ADAPTER: file_entry(adapter)}))
    assert execute(["run", "--model", str(copy), "--image", str(picture)]) == 65
    said = capsys.readouterr().err
    assert ADAPTER in said
    assert "Traceback" not in said


def test_an_adapter_that_llama_cpp_cannot_apply_is_one_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, freed = bindings.library(), list[object]()
    free = library.llama_model_free
    monkeypatch.setattr(library, "llama_set_adapters_lora", lambda *_: -1)
    monkeypatch.setattr(library, "llama_model_free", lambda model: freed.append(free(model)))
    with pytest.raises(BundleError, match="cannot apply the adapter"):
        logits(bundle / LANGUAGE, bundle / ADAPTER)
    assert len(freed) == 1


def write(low_rank: LowRank, path: Path) -> gguf.Gguf:
    write_adapter(low_rank, micro.CONFIG.text, path, "micro")
    return gguf.read(path)


def test_updates_that_do_not_fit_the_weights_are_refused(low_rank: LowRank, tmp_path: Path) -> None:
    base = gguf.read(low_rank.base.path)
    gguf.check_adapter(write(low_rank, tmp_path / "good.gguf"), base)
    module = f"{LAYER}.mlp.up_proj"
    a, b = low_rank.updates[module]
    for number, pair in enumerate([(a[:, 1:], b), (a, b[1:]), (a[1:], b)]):
        file = write(replace(low_rank, updates={module: pair}), tmp_path / f"{number}.gguf")
        with pytest.raises(BundleError, match="whose weight is"):
            gguf.check_adapter(file, base)
    with pytest.raises(BundleError, match="is not a LoRA adapter"):
        gguf.check_adapter(base, base)
    good = gguf.read(tmp_path / "good.gguf")
    name, tensor = next(iter(good.tensors.items()))
    third = {name.replace(".lora_a", ".lora_magnitude").replace(".lora_b", ".lora_magnitude"): tensor}
    with pytest.raises(BundleError, match="not part of a LoRA pair"):
        gguf.check_adapter(replace(good, tensors=good.tensors | third), base)


def test_an_adapter_that_gives_other_weights_is_refused(low_rank: LowRank, merged: Path, tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(merged), tmp_path / ADAPTER
    write(low_rank, path)
    read_back_adapter(low_rank.base.path, path, checkpoint)
    module = f"{LAYER}.self_attn.q_proj"
    a, b = low_rank.updates[module]
    for wrong in (b[::-1], b * 1.02):
        write(replace(low_rank, updates={**low_rank.updates, module: (a, wrong)}), path)
        with pytest.raises(CheckpointError, match="q_proj"):
            read_back_adapter(low_rank.base.path, path, checkpoint)
