"""`python -m llava_edge.models.random GEOMETRY FOLDER`: a checkpoint of a published size with random weights.

For measuring export, loading and speed at 7B or 13B without a download: sizes, shapes, dtype and sharding are the
published ones, the answers are noise. Written tensor by tensor, so memory is needed for the largest one only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np

from llava_edge.models import micro
from llava_edge.models.config import LlavaConfig, TextConfig, VisionConfig, write_settings
from llava_edge.models.shapes import Shapes, stream_tensors, tensor_shapes

_7B = TextConfig(vocab_size=32064)
_13B = replace(_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
               num_key_value_heads=40)  # fmt: skip
_V1 = VisionConfig(image_size=224)
_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# Sizes from the config.json files of liuhaotian/llava-v1-*, llava-v1.5-*, llava-v1.6-vicuna-*.
GEOMETRIES = {
    "llava-v1-7b": LlavaConfig(vision=_V1, text=_7B, projector_type="linear", square="crop"),
    "llava-v1-13b": LlavaConfig(vision=_V1, text=_13B, projector_type="linear", square="crop"),
    "llava-v1.5-7b": LlavaConfig(text=_7B),
    "llava-v1.5-13b": LlavaConfig(text=_13B),
    "llava-v1.6-vicuna-7b": LlavaConfig(text=_7B, square="anyres", grids=_GRIDS, merge="spatial_unpad"),
    "llava-v1.6-vicuna-13b": LlavaConfig(text=_13B, square="anyres", grids=_GRIDS, merge="spatial_unpad"),
}

SHARD_BYTES = 5_000_000_000  # as transformers splits
_MAX_RANDOM = 1 << 22  # random numbers per tensor; a larger one repeats them


def write_random(folder: Path, config: LlavaConfig, seed: int = 0) -> Path:
    """Write config.json, tokenizer.json (byte-level, few merges) and float16 shards with their index."""
    write_settings(folder, replace(config, template="chatml"), micro.tokenizer_json())
    shards = _split_shards(tensor_shapes(config))
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stream_tensors(folder / name, shapes, "float16", partial(_random_tensor, shapes, rng))
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return folder


def _split_shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    return shards


def _random_tensor(shapes: Shapes, rng: np.random.Generator, name: str) -> np.ndarray:
    shape = shapes[name]
    normal = rng.standard_normal(min(int(np.prod(shape)), _MAX_RANDOM), dtype=np.float32)
    return np.resize(micro.scale_random(name, shape, normal).astype(np.float16), shape)


@click.command()
@click.argument("geometry", type=click.Choice(list(GEOMETRIES)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Blocks of the language model (default: all).")
@click.option("--seed", default=0, show_default=True)
def main(geometry: str, folder: Path, layers: int | None, seed: int) -> None:
    """Write a checkpoint of a published GEOMETRY with random float16 weights into FOLDER."""
    config = GEOMETRIES[geometry]
    if layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=layers))
    write_random(folder, config, seed)
    click.echo(str(folder))


if __name__ == "__main__":
    main()
