"""The micro LLaVA: random weights, a byte-level vocabulary and one-colour images, for end-to-end tests in seconds.

Every shape is small but exercises the whole pipeline: hidden size 256 so that llama.cpp's K-quants apply,
grouped-query attention, an untied head, a class token to drop and a CLIP block after the selected layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.errors import CannotCreateError
from llava_edge.models import byte_level
from llava_edge.models.config import LlavaConfig, TextConfig, VisionConfig, write_settings
from llava_edge.models.conversations import Record, make_record
from llava_edge.models.shapes import save_tensors, tensor_shapes

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (30, 60, 220),
    "orange": (250, 140, 20),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
QUESTION = "What colour is it?"
CAPTIONS = "captions.json"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "r e", "re d", "o u", "c o", "l ou")


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 byte values, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(byte if byte in plain else next(other)) for byte in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer with `CONTROL_TOKENS` and `MERGES`."""
    tokens = [*CONTROL_TOKENS, *byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
    return byte_level.tokenizer_json(tokens, MERGES, range(len(CONTROL_TOKENS)))


VOCABULARY = len(CONTROL_TOKENS) + 256 + len(MERGES)

CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    ),
    text=TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
    template="chatml",
    image_token_index=VOCABULARY,
)


def random_tensors(config: LlavaConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a whole checkpoint, under classic Hugging Face names."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config).items():
        tensors[name] = scale_random(name, shape, rng.standard_normal(shape, dtype=np.float32))
    return tensors


def scale_random(name: str, shape: tuple[int, ...], normal: np.ndarray) -> np.ndarray:
    """Scale standard normal numbers for a tensor: norms near one, matrices so that activations keep their scale."""
    if "norm" in name.split(".")[-2:][0]:
        return (0.1 * normal + (1.0 if name.endswith("weight") else 0.0)).astype(np.float32)
    return normal * np.float32(0.6 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1)


def write_checkpoint(
    folder: Path, *, seed: int = 0, config: LlavaConfig = CONFIG, tensors: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Write config.json, tokenizer.json and model.safetensors; random weights unless `tensors` are given."""
    write_settings(folder, config, tokenizer_json())
    save_tensors(folder / "model.safetensors", tensors or random_tensors(config, seed))
    return folder


def draw(colour: str, rng: np.random.Generator, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A noisy rectangle of one colour."""
    noise = rng.integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def write_data(folder: Path, *, pictures: int, seed: int) -> None:
    """Pictures with captions.json (stage 1) and questions.json (stage 2) in LLaVA's record form."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    captions, questions = [_caption(i) for i in range(pictures)], []
    (folder / CAPTIONS).write_text(json.dumps(captions), "utf-8")  # first, because `check_data_folder` looks for it
    for i in range(pictures):
        colour, image = _colour(i), _image(i)
        draw(colour, rng).save(folder / image)
        questions += [make_record(i, image, [turn]) for turn in ((QUESTION, colour), (f"Is it {colour}?", "Yes"))]
    (folder / "questions.json").write_text(json.dumps(questions), "utf-8")


def check_data_folder(folder: Path) -> None:
    """Raise `CannotCreateError` for a folder with files that `write_data`, by its first caption, has not written."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    start, path = json.dumps([_caption(0)]).encode()[:-1], folder / CAPTIONS
    if not path.is_file() or not path.read_bytes().startswith(start):
        raise CannotCreateError(
            f"{folder} is not empty and holds no data of this recipe; name a new or empty folder with --data."
        )


def _colour(number: int) -> str:
    return list(COLOURS)[number % len(COLOURS)]


def _image(number: int) -> str:
    return f"{number:03d}.png"


def _caption(number: int) -> Record:
    return make_record(number, _image(number), [("Describe it.", f"It is {_colour(number)}.")])
