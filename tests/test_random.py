"""Random checkpoints of published sizes: the numbers are right, and a small one is a checkpoint like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.models import micro, random
from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import language_shapes, projector_shapes, vision_shapes


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(
    ("geometry", "projector", "language"),
    # Published parameter counts, the language model's with a vocabulary of 32000.
    [
        ("llava-v1-7b", 4_198_400, 6_738_415_616),
        ("llava-v1.5-7b", 20_979_712, 6_738_415_616),
        ("llava-v1.5-13b", 31_467_520, 13_015_864_320),
    ],
)
def test_geometries_have_the_published_numbers_of_parameters(geometry: str, projector: int, language: int) -> None:
    config = random.GEOMETRIES[geometry]
    config = replace(config, text=replace(config.text, vocab_size=32000))
    assert count(projector_shapes(config)) == projector
    assert count(language_shapes(config)) == language
    if config.vision.image_size == 336:
        assert count(vision_shapes(config)) == 303_507_456


TILED = replace(micro.CONFIG, square="anyres", grids=((32, 64),), merge="spatial_unpad")


@pytest.mark.parametrize("config", [micro.CONFIG, TILED], ids=["1.5", "1.6"])
def test_a_small_one_opens_as_a_checkpoint_in_shards(
    config: LlavaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "SHARD_BYTES", 1_000_000)
    monkeypatch.setattr(random, "_MAX_RANDOM", 1000)
    folder = random.write_random(tmp_path, config)
    assert len(list(folder.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == config
    weight = checkpoint.tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    assert 0.5 < float(weight.std()) * 16 < 0.7
    assert abs(float(checkpoint.tensors["language_model.model.norm.weight"].mean()) - 1) < 0.05
