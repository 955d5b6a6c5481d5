"""The importance matrix: how much each input channel of the language model's weights matters for pictures.

For every Linear and the output head, the mean square of each input channel over prompts with pictures, run through
the real model: CLIP, projector, LLaMA. llama.cpp's quantizer spends a tensor's precision where these are large. A
picture takes many more positions than the question about it, so image and text positions are averaged separately, then
combined by `IMAGE_WEIGHT`.

The language model is never in memory as a whole: all prompts run through one block after another, each read once.
Needs torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge import anyres
from llava_edge.bundle import Manifest, Preprocessing
from llava_edge.errors import MissingError, UnavailableError, import_problem
from llava_edge.export import samples
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.image import load_image
from llava_edge.interrupts import held_back
from llava_edge.models.llama_gguf import tensor_names
from llava_edge.models.shapes import EMBEDDINGS, FINAL_NORM, TEXT_PREFIX
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.tokenization import prompt_encoder

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray[Any, Any]
Importance = dict[str, Array]  # GGUF tensor name -> (input channels,) float32, none negative

IMAGE_WEIGHT = 0.5
PICTURES = 32  # of a folder, sampled with a fixed seed
PROMPTS = 32  # at least; if there are fewer pictures, they are reused with other questions
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# Typical questions and answers; the answers need not be true of the picture.
QUESTIONS = (
    ("What is this?", "It is an apple."),
    ("Describe the picture in detail.", "The picture shows a table with a plate of food on it. Behind it is a window."),
    ("What colours do you see?", "Mostly green and brown, with some white and a little red."),
    ("Is there a person in the picture?", "No"),
    ("How many things are there, and where?", "Three: one on the left, one in the middle, and one on the right."),
    ("Read the text in the picture.", "There is no text that can be read."),
)


@dataclass(frozen=True)
class Prompt:
    """Input of the language model: embeddings (T, hidden size) float32, and which positions are a picture's (T,)."""

    embeds: Array
    is_image: Array


def measure(
    checkpoint: Checkpoint,
    manifest: Manifest,
    float16: Path,
    folder: Path | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Importance:
    """Compute the matrix of a checkpoint. Raises `MissingError` or `ImageError` for the pictures.

    manifest: gives the preprocessing and prompt layout. float16: the language file, of which only the tokenizer is
    used. folder: photos like those the model will see; by default the sample pictures.
    """
    images = encode(checkpoint, manifest.preprocessing, pictures(folder))
    return accumulate(checkpoint, _prompts(checkpoint, manifest, float16, images), progress)


def check_pictures(folder: Path | None) -> None:
    """Raise `UnavailableError` without torch, `MissingError` or `ImageError` for a folder's pictures."""
    try:
        with held_back():
            import torch  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"An importance matrix is computed with torch, which {import_problem(error, 'train')}"
        ) from error
    for _ in pictures(folder):  # decode each one now, so that none fails later in the export
        pass


def describe(folder: Path | None) -> str:
    """The calibration data in words, for the manifest."""
    count = len(samples.pictures()) if folder is None else len(_files(folder))
    return f"{count} {'drawings' if folder is None else 'pictures'}, image weight {IMAGE_WEIGHT}"


def pictures(folder: Path | None) -> Iterable[Image.Image]:
    """`PICTURES` of a folder and its subfolders, or the sample pictures. Decoded one at a time."""
    return samples.pictures() if folder is None else map(load_image, _files(folder))


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise MissingError(f"{folder} holds no pictures to calibrate with; expected a folder of photos.")
    return random.Random(0).sample(files, min(PICTURES, len(files)))


def encode(checkpoint: Checkpoint, spec: Preprocessing, images: Iterable[Image.Image]) -> list[Array]:
    """Pictures -> their embeddings (positions, hidden size), through CLIP and the projector."""
    from llava_edge.models import streamed

    config, tensors = checkpoint.config, checkpoint.tensors
    sizes: list[tuple[int, int]] = []

    def crops() -> Iterator[Array]:
        for image in images:
            sizes.append(image.size)
            yield anyres.crops(image, spec)

    features = streamed.image_features(config, tensors, crops())
    return streamed.arrange(config, tensors, streamed.project(config, tensors, features), sizes)


def _prompts(checkpoint: Checkpoint, manifest: Manifest, float16: Path, images: Sequence[Array]) -> list[Prompt]:
    """Pictures with questions and answers, in the model's prompt layout."""
    table = checkpoint.tensors[EMBEDDINGS]
    rows = []
    for n, ids in enumerate(_token_ids(manifest, float16, len(images))):
        at, image = ids.index(IMAGE_TOKEN_INDEX), images[n % len(images)]
        is_image = np.zeros(len(ids) - 1 + len(image), bool)
        is_image[at : at + len(image)] = True
        rows.append(Prompt(np.concatenate([table[ids[:at]], image, table[ids[at + 1 :]]]), is_image))
    return rows


def _token_ids(manifest: Manifest, float16: Path, pictures: int) -> list[list[int]]:
    turns = [QUESTIONS[(n + n // pictures) % len(QUESTIONS)] for n in range(max(PROMPTS, pictures))]
    with LanguageModel(float16, context=1) as engine:
        encode_prompt = prompt_encoder(engine.vocabulary, manifest)
        return [encode_prompt([Message("user", text, 1), Message("assistant", answer)]) for text, answer in turns]


def accumulate(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], progress: Callable[[float], None] = lambda share: None
) -> Importance:
    """The matrix over `prompts`, each of which has image and text positions."""
    import torch

    from llava_edge.models import streamed
    from llava_edge.models.llama import RMSNorm

    c, tensors = checkpoint.config.text, checkpoint.tensors
    states = [torch.from_numpy(item.embeds)[None] for item in prompts]
    weights = _position_weights([item.is_image for item in prompts])
    targets = {source: target for target, source in tensor_names(c).items()}
    matrix: Importance = {}
    for number in range(c.num_hidden_layers):
        prefix = f"{TEXT_PREFIX}layers.{number}."
        sums = _run_block(checkpoint, prefix, states, weights)  # loads the block and frees it
        matrix |= {targets[f"{prefix}{path}.weight"]: values for path, values in sums.items()}
        progress((number + 1) / c.num_hidden_layers)
    prefix = FINAL_NORM.removesuffix("weight")
    norm = streamed.load_part(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps), tensors, prefix)
    squares = [_weighted_squares(norm(x)[0], weight) for x, weight in zip(states, weights, strict=True)]
    head = "token_embd.weight" if c.tie_word_embeddings else "output.weight"
    return matrix | {head: np.sum(squares, axis=0).astype(np.float32)}


def _position_weights(masks: Sequence[Array]) -> list[Array]:
    """Weight of each position: all image positions sum to `IMAGE_WEIGHT`, all text positions to the rest."""
    image = sum(int(mask.sum()) for mask in masks)
    text = sum(int((~mask).sum()) for mask in masks)
    return [np.where(mask, IMAGE_WEIGHT / image, (1 - IMAGE_WEIGHT) / text) for mask in masks]


def _run_block(checkpoint: Checkpoint, prefix: str, states: list[Tensor], weights: Sequence[Array]) -> Importance:
    """Run every prompt through the block `prefix`, in place. Returns weighted squares by the path of each Linear."""
    import torch

    from llava_edge.models import streamed
    from llava_edge.models.llama import Block, Context, rotary

    c = checkpoint.config.text
    block = streamed.load_part(lambda: Block(c), checkpoint.tensors, prefix)
    sums: dict[str, Array] = {}
    current_weights = weights[0]

    def recording_hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[path] = sums.get(path, 0) + _weighted_squares(inputs[0][0], current_weights)

        return record

    for path, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(recording_hook(path))
    with torch.no_grad():
        for n, x in enumerate(states):
            current_weights = weights[n]
            cos, sin = rotary(torch.arange(x.shape[1])[None], c.head_dim, c.rope_theta)
            states[n] = block(x, Context(cos, sin, None))
    return {path: values.astype(np.float32) for path, values in sums.items()}


def _weighted_squares(x: Tensor, weights: Array) -> Array:
    """(T, channels) and (T,) -> (channels,) float64."""
    return np.asarray(weights @ x.double().square().numpy())
