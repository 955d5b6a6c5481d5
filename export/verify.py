"""The finished parts, read back: against their source, and stage by stage against PyTorch.

Read-back needs no torch: every GGUF tensor is dequantised and compared with the checkpoint. The parity table
does; it runs the very code of `runtimes/` against `models/`, each stage on the reference's input, so that every
row shows one stage's own error:

    pixels       our preprocessing against the recipe of CLIPImageProcessor, written out here; equal
    clip         vision.onnx
    projector    projector.gguf
    logits f16   the float16 language file on the reference's image embeddings, before quantization
    logits Q     the quantized one; what four bits cost
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge import gguf, prompt
from llava_edge.bundle import LANGUAGE, Bundle, ParityRow, Preprocessing
from llava_edge.errors import CheckpointError
from llava_edge.export import llm_gguf, projector, samples
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.image import preprocess
from llava_edge.models import llama_gguf
from llava_edge.models.shapes import tensor_shapes
from llava_edge.prompt import IMAGE_TOKEN_INDEX
from llava_edge.runtimes import devices
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder

if TYPE_CHECKING:
    from llava_edge.models.llava import Llava

Array = np.ndarray[Any, Any]

CLIP_LIMITS = {"fp32": 1e-4, "fp16": 2e-3, "int8": 3e-2}  # relative
PROJECTOR_LIMIT = 1e-5  # relative; the tanh form of GELU would give about 2e-4
# Cosine. What bits cost depends on the model and is reported rather than judged; the file's content is checked tensor
# by tensor. These only stop a bundle that lost its model.
QUANT_LIMITS = {"f16": 0.9999, "q8_0": 0.995, "q5_k_m": 0.95, "q4_k_m": 0.85, "q4_0": 0.6}

# Cosine of a language file that was quantized elsewhere, against its own weights dequantised. What differs is that
# llama.cpp rounds activations to 8 bits: 0.9997 or better on random models of 2 and 16 blocks in all quantizations,
# 0.9982 for SmolLM2-135M in Q4_1. q and k with rows in the wrong order gave at most 0.98.
KEPT_LIMITS = {"f32": 0.9999, "f16": 0.9999}
KEPT_LIMIT = 0.99

# Largest relative (l2) error of a tensor by GGUF type. For b bits with one scale per n values a block's error is at
# most about max / 2^(b-1) / sqrt(12), and max / rms at most sqrt(n): 0.2 for q4_0. A swapped tensor gives about 1.4.
TYPE_LIMITS = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.13, "Q5_0": 0.13, "Q5_1": 0.13}
TYPE_LIMITS |= {"Q4_K": 0.25, "Q4_0": 0.25, "Q4_1": 0.25}

_QUESTION = "Describe the picture."
_ANSWER_TOKENS = 6  # how far the reference's own greedy answer is followed


def read_back_language(path: Path, checkpoint: Checkpoint, progress: Callable[[float], None] = lambda x: None) -> None:
    """Compare every tensor of a language file with its source. Raises `CheckpointError` naming the worst."""
    names = llama_gguf.tensor_names(checkpoint.config.text)
    _read_back(path, names, lambda target: llm_gguf.gguf_tensor(checkpoint, target, names[target]), progress)
    gguf.check_language(gguf.read(path))


def read_back_projector(path: Path, checkpoint: Checkpoint) -> None:
    """The same for projector.gguf."""
    names = projector.tensor_names(checkpoint.config)
    _read_back(path, names, lambda target: checkpoint.tensors[names[target]], lambda share: None)


def _read_back(
    path: Path, names: Mapping[str, str], source: Callable[[str], Array], progress: Callable[[float], None]
) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {item.name: item for item in GGUFReader(path).tensors}
    if stored.keys() != names.keys():
        raise CheckpointError(f"{path} holds other tensors than were written: {sorted(stored.keys() ^ names.keys())}.")
    for done, (name, item) in enumerate(stored.items()):
        ours, wanted = dequantize(item.data, item.tensor_type), source(name)
        limit = TYPE_LIMITS.get(item.tensor_type.name, 0.0)
        error = relative(ours, wanted) if ours.shape == wanted.shape else np.inf
        if not error <= limit:
            raise CheckpointError(
                f"{path} does not hold what was written: {name} as {item.tensor_type.name} is off by {error:.2g} "
                f"(relative), at most {limit:.2g} is possible."
            )
        progress((done + 1) / len(stored))


def relative(ours: Array, reference: Array) -> float:
    """l2 norm of the difference over that of the reference."""
    norm = float(np.linalg.norm(reference))
    difference = float(np.linalg.norm(ours.astype(np.float32) - reference))
    return difference / norm if norm else float(difference > 0)


def obstacle(checkpoint: Checkpoint) -> str:
    """Why parity cannot be measured here, as a sentence; empty if it can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "Parity was not measured: torch is not installed. Run pip install 'llava-edge[train]' and export again."
    values = sum(int(np.prod(shape)) for shape in tensor_shapes(checkpoint.config).values())
    needed, free = values * 4 * 1.2, devices.available_memory()
    if free is not None and free < needed:
        return f"Parity was not measured: it takes {needed / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free."
    return ""


def parity(bundle: Bundle, checkpoint: Checkpoint, float16: Path | None) -> list[ParityRow]:
    """Measure every stage, worst last. `float16` is the language file before quantization, None if there was none.

    The bundle's hashes are not looked at. Needs torch.
    """
    import torch

    from llava_edge.models.llava import from_state

    model = from_state(checkpoint.config, checkpoint.tensors)
    manifest = bundle.manifest
    images = samples.pictures()
    pixels = [preprocess(image, manifest.preprocessing) for image in images]
    rows = [_pixel_row(images, pixels, manifest.preprocessing)]
    with torch.no_grad():
        features = [model.encode_image(torch.from_numpy(item)[None])[0].numpy() for item in pixels]
        embeds = [model.projector(torch.from_numpy(item)).numpy() for item in features]
    encoder, layers = VisionEncoder(bundle, _threads(), "CPUExecutionProvider"), Projector(bundle)
    precision = manifest.vision.precision
    ours = [encoder.encode(item) for item in pixels]
    rows.append(_relative_row(f"clip {precision}", ours, features, CLIP_LIMITS[precision]))
    ours = [layers.project(item) for item in features]
    rows.append(_relative_row("projector", ours, embeds, PROJECTOR_LIMIT))
    quant = manifest.language.quantization
    files = {"f16": float16} if float16 else {}
    files[quant] = bundle.part(LANGUAGE)
    reference: list[Array] = []
    for name, path in files.items():
        limit = QUANT_LIMITS[name] if float16 else KEPT_LIMITS.get(name, KEPT_LIMIT)
        rows.append(_logits_row(name, path, limit, model, manifest.template, embeds[0], reference))
    return sorted(rows, key=_strain)


def _strain(row: ParityRow) -> float:
    """How much of its limit a row uses; above 1 it fails."""
    if row.measure == "cosine":
        return (1 - row.value) / (1 - row.limit)
    return row.value / row.limit if row.limit else np.inf * row.value if row.value else 0.0


def _pixel_row(images: list[Image.Image], pixels: list[Array], spec: Preprocessing) -> ParityRow:
    wanted = [_reference_pixels(image, spec) for image in images]
    largest = _max_abs(pixels, wanted)
    worst = max(relative(a, b) for a, b in zip(pixels, wanted, strict=True))
    return ParityRow("pixels", "max_abs", largest, 0.0, largest, worst, largest == 0)


def _relative_row(stage: str, ours: list[Array], wanted: list[Array], limit: float) -> ParityRow:
    """The worst picture counts."""
    worst = max(relative(a, b) for a, b in zip(ours, wanted, strict=True))
    return ParityRow(stage, "relative", worst, limit, _max_abs(ours, wanted), worst, worst <= limit)


def _max_abs(ours: list[Array], wanted: list[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, wanted, strict=True))


def _logits_row(
    name: str, path: Path, limit: float, model: Llava, template: str, embeds: Array, reference: list[Array]
) -> ParityRow:
    """Cosine between logits at the end of a prompt and along the reference's answer; the worst position counts.

    `reference` is filled by the first call and used by the next.
    """
    engine = LanguageModel(path, context=len(embeds) + 512, threads=_threads())
    try:
        pieces = prompt.render(template, [prompt.Message("user", _QUESTION, 1)])
        ids = prompt.encode(pieces, engine.tokenize, engine.control_id)
        answer = _reference_logits(model, ids, embeds, reference)
        ours = _engine_logits(engine, ids, embeds, answer)
    finally:
        engine.close()
    wanted = np.stack(reference)
    cosines = (ours * wanted).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(wanted, axis=-1))
    value = float(cosines.min())
    largest, error = float(np.abs(ours - wanted).max()), relative(ours, wanted)
    return ParityRow(f"logits {name}", "cosine", value, limit, largest, error, value >= limit)


def _reference_logits(model: Llava, ids: list[int], embeds: Array, reference: list[Array]) -> list[int]:
    """Fill `reference` with the logits (vocab,) of each position measured; return the answer tokens between them."""
    import torch

    if not reference:
        with torch.no_grad():
            inputs = model.splice(ids, torch.from_numpy(embeds)[None])[None]
            states, cache = model.language_model.hidden(inputs)
            reference.append(model.language_model.logits(states[0, -1]).numpy())
            for _ in range(_ANSWER_TOKENS):
                token = torch.tensor([[int(reference[-1].argmax())]])
                states, cache = model.language_model.hidden(model.language_model.model.embed_tokens(token), cache)
                reference.append(model.language_model.logits(states[0, -1]).numpy())
    return [int(logits.argmax()) for logits in reference[:-1]]


def _engine_logits(engine: LanguageModel, ids: list[int], embeds: Array, answer: list[int]) -> Array:
    """(answer tokens + 1, vocab) logits along the same path."""
    never = threading.Event()
    at = ids.index(IMAGE_TOKEN_INDEX)
    engine.evaluate_tokens(ids[:at], never)
    engine.evaluate_embeddings(embeds, [("reference", row) for row in range(len(embeds))], never)
    engine.evaluate_tokens(ids[at + 1 :], never)
    found = [engine.logits().copy()]
    for token in answer:
        engine.evaluate_tokens([token], never)
        found.append(engine.logits().copy())
    return np.stack(found)


def _reference_pixels(image: Image.Image, spec: Preprocessing) -> Array:
    """LLaVA's expand2square or CLIP's shortest-edge resize and centre crop, then rescale and normalise; Pillow."""
    size = spec.image_size
    if spec.square == "pad":
        side = max(image.size)
        colour = tuple(int(255 * value) for value in spec.mean)
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas.resize((size, size), Image.Resampling.BICUBIC)
    else:
        short, long = min(image.size), max(image.size)
        longer = int(size * long / short)
        image = image.resize((size, longer) if image.width == short else (longer, size), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    scaled = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    normalised = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def _threads() -> int:
    return devices.thread_count()[0]
