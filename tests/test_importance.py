"""The importance matrix is what really enters each Linear, and llama.cpp's quantizer obeys it."""

from __future__ import annotations

import weakref
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from llava_edge.bundle import Bundle, read_manifest
from llava_edge.errors import ImageError, MissingError, UsageError
from llava_edge.export import importance
from llava_edge.export.checkpoint import Checkpoint, Tensors, open_checkpoint
from llava_edge.export.exporter import ExportOptions
from llava_edge.export.importance import Importance
from llava_edge.export.quantize import Quant, quantize
from llava_edge.image import preprocess
from llava_edge.models import micro
from llava_edge.models.llama_gguf import tensor_names
from llava_edge.models.llava import Llava, from_state

Array = np.ndarray[Any, Any]


def hooked(model: Llava, prompts: list[importance.Prompt], image: float) -> Importance:
    """The same by hooks on the whole model, from its definition: all positions are kept, then averaged."""
    inputs: dict[str, list[Array]] = {}
    modules = dict(model.named_modules())
    targets = {source: target for target, source in tensor_names(model.config.text).items()}
    for source, target in targets.items():
        module = modules[source.removesuffix(".weight")]
        if isinstance(module, torch.nn.Linear) and "lm_head" not in source:
            seen = inputs.setdefault(target, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].numpy()))
    heads = inputs.setdefault("output.weight", [])
    for item in prompts:
        heads.append(model.language_model.hidden(torch.from_numpy(item.embeds)[None])[0].numpy())
    is_image = np.concatenate([item.is_image for item in prompts])
    squares = {name: np.concatenate(rows).astype(np.float64) ** 2 for name, rows in inputs.items()}
    return {
        name: image * rows[is_image].mean(0) + (1 - image) * rows[~is_image].mean(0) for name, rows in squares.items()
    }


def test_the_matrix_is_what_hooks_on_the_whole_model_see(
    micro_checkpoint: Path, micro_bundle: Path, float16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, manifest = open_checkpoint(micro_checkpoint), Bundle.open(micro_bundle).manifest
    monkeypatch.setattr(importance, "IMAGE_WEIGHT", 0.3)
    model = from_state(checkpoint.config, checkpoint.tensors)
    pixels = [preprocess(image, manifest.preprocessing) for image in importance.pictures(None)]
    images = importance.encode(checkpoint, manifest.preprocessing, importance.pictures(None))
    wanted = model.multi_modal_projector(model.vision_tower.vision_model(torch.from_numpy(np.stack(pixels)))).numpy()
    np.testing.assert_allclose(np.stack(images), wanted, rtol=1e-4, atol=1e-5)
    prompts = importance._prompts(checkpoint, manifest, float16, images)
    assert {int(item.is_image.sum()) for item in prompts} == {16}
    ours, reference = importance.accumulate(checkpoint, prompts), hooked(model, prompts, 0.3)
    assert (
        ours.keys()
        == reference.keys()
        == set(tensor_names(checkpoint.config.text))
        - {name for name in tensor_names(checkpoint.config.text) if "norm" in name or "token_embd" in name}
    )
    for name, values in ours.items():
        np.testing.assert_allclose(values, reference[name], rtol=1e-5, err_msg=name)
    other = hooked(from_state(checkpoint.config, checkpoint.tensors), prompts, 0.5)
    assert any(not np.allclose(other[name], ours[name], rtol=1e-2) for name in ours)  # the weight is seen


def test_a_tied_head_weighs_the_embeddings(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(micro.CONFIG, text=replace(micro.CONFIG.text, tie_word_embeddings=True))
    tensors = micro.random_tensors(config)
    checkpoint = open_checkpoint(micro.write_checkpoint(tmp_path, config=config, tensors=tensors))
    embeds = np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    prompts = [importance.Prompt(embeds, np.arange(6) < 3)]
    found = importance.accumulate(checkpoint, prompts)
    assert "output.weight" not in found
    states = from_state(config, tensors).language_model.hidden(torch.from_numpy(embeds)[None])
    np.testing.assert_allclose(found["token_embd.weight"], states[0].square().mean(0).numpy(), rtol=1e-5)


class Watched(UserDict[str, Array]):
    """A checkpoint's tensors that knows which of the arrays it gave are still in memory."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        super().__init__(tensors)
        self.reads, self.most = list[str](), 0
        self._alive: weakref.WeakValueDictionary[str, Array] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> Array:
        array = self.data[name].copy()
        self.reads.append(name)
        self._alive[name] = array
        self.most = max(self.most, sum(item.size for item in self._alive.values()))
        return array


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(micro.CONFIG, text=replace(micro.CONFIG.text, num_hidden_layers=6))
    real = open_checkpoint(micro.write_checkpoint(tmp_path, config=config))
    watched = Watched(real.tensors)
    checkpoint = replace(real, tensors=cast(Tensors, watched))
    assert isinstance(checkpoint, Checkpoint)
    rng = np.random.default_rng(0)
    prompts = [importance.Prompt(rng.standard_normal((5, 256)).astype(np.float32), np.arange(5) < 2)]
    importance.accumulate(checkpoint, prompts)
    language = [name for name in watched.reads if "layers." in name]
    assert len(language) == len(set(language)) == 6 * 9
    block = sum(real.tensors[name].size for name in language if "layers.0." in name)
    assert watched.most == block


def quantized(source: Path, target: Path, quant: Quant, matrix: Importance | None) -> dict[str, Array]:
    """Tensors read back by the gguf package."""
    quantize(source, target, quant, 1, matrix)
    return {item.name: dequantize(item.data, item.tensor_type) for item in gguf.GGUFReader(target).tensors}


def weighted_error(weights: Array, stored: Array, matrix: Array) -> float:
    return float((matrix * (weights.astype(np.float64) - stored) ** 2).sum())


@pytest.fixture(scope="module")
def skewed(float16: Path) -> Importance:
    """A few channels a thousand times as active as most."""
    rng = np.random.default_rng(0)
    shapes = {item.name: item.data.shape[-1] for item in gguf.GGUFReader(float16).tensors if item.data.ndim == 2}
    del shapes["token_embd.weight"]
    return {name: np.exp(2 * rng.standard_normal(width)).astype(np.float32) for name, width in shapes.items()}


@pytest.mark.parametrize("quant", ["q4_k_m", "q4_0", "q5_k_m"])
def test_the_quantizer_spares_the_channels_that_matter(
    float16: Path, tmp_path: Path, skewed: Importance, quant: Quant
) -> None:
    rng = np.random.default_rng(1)
    shuffled = {name: rng.permutation(values) for name, values in skewed.items()}
    weights = {item.name: item.data for item in gguf.GGUFReader(float16).tensors}
    plain, aware, wrong = (
        quantized(float16, tmp_path / "q.gguf", quant, matrix) for matrix in (None, skewed, shuffled)
    )
    for name, matrix in skewed.items():
        errors = [weighted_error(weights[name], stored[name], matrix) for stored in (plain, aware, wrong)]
        assert errors[1] < 0.9 * errors[0], (name, errors)
        assert errors[2] > 0.95 * errors[0], (name, errors)  # the wrong channels: no gain


def test_equal_importance_is_no_harm(float16: Path, tmp_path: Path, skewed: Importance) -> None:
    weights = {item.name: item.data for item in gguf.GGUFReader(float16).tensors}
    equal = {name: np.ones_like(values) for name, values in skewed.items()}
    plain, even = (quantized(float16, tmp_path / "q.gguf", "q4_k_m", matrix) for matrix in (None, equal))
    for name, matrix in equal.items():
        errors = [weighted_error(weights[name], stored[name], matrix) for stored in (plain, even)]
        assert errors[1] < 1.02 * errors[0], (name, errors)


def test_channels_that_were_never_active_do_not_break_a_file(float16: Path, tmp_path: Path, skewed: Importance) -> None:
    silent = {name: np.where(np.arange(len(v)) < 64, 0, v).astype(np.float32) for name, v in skewed.items()}
    for quant in ("q4_k_m", "q4_0", "q5_k_m"):
        stored = quantized(float16, tmp_path / "q.gguf", quant, silent)
        assert all(np.isfinite(values).all() for values in stored.values())


def test_q8_takes_no_notice(float16: Path, tmp_path: Path, skewed: Importance) -> None:
    quantize(float16, tmp_path / "plain.gguf", "q8_0", 1)
    quantize(float16, tmp_path / "aware.gguf", "q8_0", 1, skewed)
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "aware.gguf").read_bytes()
    with pytest.raises(UsageError, match="q8_0 ignores an importance matrix"):
        ExportOptions(tmp_path, tmp_path, quant="q8_0", imatrix=True)


def test_calibration_takes_a_fixed_choice_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no pictures"):
        importance.check_pictures(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for n in range(40):
        micro.draw("red", rng, (8 + n, 8)).save(tmp_path / ("sub" if n % 2 else ".") / f"{n:02}.PNG")
    (tmp_path / "notes.txt").write_text("no picture", "utf-8")
    sizes = [image.size for image in importance.pictures(tmp_path)]
    assert sizes == [image.size for image in importance.pictures(tmp_path)]
    assert len(set(sizes)) == importance.PICTURES == 32
    assert importance.describe(tmp_path) == "32 pictures, image weight 0.5"
    for path in tmp_path.rglob("*.PNG"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"\.PNG"):
        importance.check_pictures(tmp_path)


def test_manifests_from_before_the_field_open(root: Path) -> None:
    assert read_manifest(root / "llava_edge/zoo/smol").language.calibration == ""
