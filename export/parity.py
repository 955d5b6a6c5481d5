"""The parity table: the code of `runtimes/` compared with PyTorch, stage by stage. Needs torch.

Each stage gets the reference's input, so that every row shows one stage's own error; the exception is `embeddings`,
which shows CLIP's error after the projector:

    pixels       our preprocessing against the recipe of CLIPImageProcessor, written out in reference.py; equal
    clip fp32    the tower in float32, before its precision is reduced
    clip P       vision.onnx
    attention    its other output, which token budgets use
    projector    projector.gguf
    embeddings   vision.onnx, then projector.gguf: the image embeddings of a running bundle
    arrangement  with "anyres", the order of the crops' embeddings and `image_newline` between them; equal
    logits f16   the float16 language file, before quantization, at the end of the prompt and along its greedy answer
    greedy f16   share of these positions with the same most likely token as the reference
    logits Q     the shipped file along the same answer: the cost of quantization
    greedy Q

The reference is `models/`, one block in memory at a time, so a 7B needs no more memory than its largest tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import anyres
from llava_edge.bundle import LANGUAGE, Bundle, ParityRow
from llava_edge.errors import CheckpointError, import_problem, install_hint
from llava_edge.export import Progress, samples
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.reference import reference_pixels
from llava_edge.export.verify import relative_error
from llava_edge.interrupts import held_back
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes import mapping
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.tokenization import prompt_encoder
from llava_edge.runtimes.vision import VisionEncoder

Array = np.ndarray[Any, Any]

CLIP_LIMITS = {"fp32": 1e-4, "fp16": 2e-3, "int8": 3e-2}  # relative
PROJECTOR_LIMIT = 1e-5  # relative; the tanh form of GELU would give about 2e-4
AMPLIFICATION = 5.0  # at most, of CLIP's relative error by the projector or in its attention
# Cosine. The cost of quantization depends on the model and is reported, not judged; the file is checked tensor by
# tensor. These limits only catch a broken model.
QUANT_LIMITS = {"f16": 0.9999, "q8_0": 0.995, "q5_k_m": 0.95, "q4_k_m": 0.85, "q4_0": 0.6}
# Cosine of a language file that was quantized elsewhere, against its own dequantised weights. The difference is that
# llama.cpp rounds activations to 8 bits: 0.9997 or better on random models of 2 and 16 blocks in all quantizations,
# 0.9982 for SmolLM2-135M in Q4_1. q and k with rows in the wrong order gave at most 0.98.
PREQUANTIZED_LIMITS = {"f32": 0.9999, "f16": 0.9999}
PREQUANTIZED_LIMIT = 0.99
GREEDY_LIMITS = {"f16": 0.95}  # near ties may go either way; after quantization it is only reported

STEPS = 64  # of the greedy answer
_QUESTION = "Describe the picture."
_REPACK_BYTES = 1 << 30  # larger files are not repacked, which would hold a second copy in memory


def unavailable_reason() -> str:
    """Why parity cannot be measured here, as a sentence; empty if it can."""
    try:
        with held_back():
            import torch  # noqa: F401
    except ModuleNotFoundError:
        return f"Parity was not measured: torch is not installed. {install_hint('train')}, then run this command again."
    except ImportError as error:
        return f"Parity was not measured: torch {import_problem(error, 'train')}"
    return ""


def check_same_sizes(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` if the bundle and the checkpoint have different sizes."""
    vision, language, config = bundle.manifest.vision, bundle.manifest.language, checkpoint.config
    ours = (vision.width, vision.image_tokens, language.hidden_size, language.vocab_size)
    theirs = (config.vision.hidden_size, config.image_tokens, config.text.hidden_size, config.text.vocab_size)
    if ours != theirs:
        raise CheckpointError(
            f"{bundle.folder} was not made from {checkpoint.folder}: vision width, image tokens, hidden size and "
            f"vocabulary are {ours} in the bundle and {theirs} in the checkpoint."
        )


def measure(
    bundle: Bundle,
    checkpoint: Checkpoint,
    float16: Path | None = None,
    float32: Path | None = None,
    progress: Progress = lambda what, share: None,
) -> list[ParityRow]:
    """Measure every stage; the worst row comes last. The bundle's hashes are not checked.

    float16, float32: the language file before quantization and the folder with the float32 tower, if available.
    """
    from llava_edge.models import streamed

    progress("pictures", None)
    config, tensors, manifest = checkpoint.config, checkpoint.tensors, bundle.manifest
    images = samples.pictures()
    sizes = [image.size for image in images]
    pixels = [anyres.crops(image, manifest.preprocessing) for image in images]
    spec = replace(manifest.preprocessing, square=config.square, grids=config.grids)
    rows = [_equal_row("pixels", pixels, [reference_pixels(image, spec) for image in images])]
    attention: list[Array] = []
    if manifest.vision.attention:
        features, attention = streamed.image_features_with_attention(config, tensors, pixels)
    else:
        features = streamed.image_features(config, tensors, pixels)
    embeds = streamed.project(config, tensors, features)
    image_embeds = streamed.arrange(config, tensors, embeds, sizes)
    if float32:
        float32_features = _encode(VisionEncoder(Bundle(float32, manifest)), pixels)
        rows.append(_relative_row("clip fp32", float32_features, features, CLIP_LIMITS["fp32"]))
    rows += _vision_rows(bundle, pixels, features, attention, embeds)
    if config.square == "anyres":
        orders = [anyres.layout(size, manifest.preprocessing, manifest.vision.image_tokens) for size in sizes]
        newline = Projector(bundle).newline
        arranged = [anyres.arrange(item, newline, order) for item, order in zip(embeds, orders, strict=True)]
        rows.append(_equal_row("arrangement", arranged, image_embeds))
    mapping.trim_heap()
    files = {manifest.language.quantization: bundle.part(LANGUAGE)}
    if float16:
        files.setdefault("f16", float16)
    rows += _language_rows(files, checkpoint, bundle, image_embeds[0], progress)
    return sorted(rows, key=_limit_fraction)


def _encode(encoder: VisionEncoder, pixels: Sequence[Array]) -> list[Array]:
    """(crops, 3, S, S) of each picture -> (crops, image_tokens, width) of each."""
    return [np.stack([encoder.encode(crop) for crop in crops]) for crops in pixels]


def _vision_rows(
    bundle: Bundle, pixels: list[Array], features: list[Array], attention: list[Array], embeds: list[Array]
) -> list[ParityRow]:
    """`features`, `attention` and `embeds` are the reference's; `attention` is empty for a bundle without."""
    encoder, layers = VisionEncoder(bundle), Projector(bundle)
    precision = bundle.manifest.vision.precision
    limit = CLIP_LIMITS[precision]
    ours = _encode(encoder, pixels)
    rows = [_relative_row(f"clip {precision}", ours, features, limit)]
    if attention:
        ours_attention = [np.stack([encoder.encode_with_attention(crop)[1] for crop in item]) for item in pixels]
        rows.append(_relative_row(f"attention {precision}", ours_attention, attention, AMPLIFICATION * limit))
    rows.append(_relative_row("projector", [layers.project(item) for item in features], embeds, PROJECTOR_LIMIT))
    rows.append(_relative_row("embeddings", [layers.project(item) for item in ours], embeds, AMPLIFICATION * limit))
    return rows


def _limit_fraction(row: ParityRow) -> float:
    """The error as a fraction of the row's limit; above 1 it fails."""
    if row.measure in ("cosine", "agreement"):
        return (1 - row.value) / (1 - row.limit)
    return row.value / row.limit if row.limit else np.inf * row.value if row.value else 0.0


def _equal_row(stage: str, ours: list[Array], reference: list[Array]) -> ParityRow:
    if [item.shape for item in ours] != [item.shape for item in reference]:
        maximum = sys.float_info.max
        return ParityRow(stage, "max_abs", maximum, 0.0, maximum, maximum, False)
    row = _relative_row(stage, ours, reference, 0.0)
    return replace(row, measure="max_abs", value=row.max_abs, passed=row.max_abs == 0)


def _relative_row(stage: str, ours: list[Array], reference: list[Array], limit: float) -> ParityRow:
    """The worst picture counts."""
    worst = max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))
    return ParityRow(stage, "relative", worst, limit, _max_abs(ours, reference), worst, worst <= limit)


def _max_abs(ours: list[Array], reference: list[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, reference, strict=True))


def _language_rows(
    files: Mapping[str, Path],
    checkpoint: Checkpoint,
    bundle: Bundle,
    image: Array,
    progress: Progress = lambda what, share: None,
) -> list[ParityRow]:
    """Compare every file along the greedy answer of the first one; the shipped file has its adapter applied.

    The others read that answer at once: token by token, a float16 file that exceeds the memory is read 64 times.
    """
    manifest = bundle.manifest
    rows: list[ParityRow] = []
    answer: list[int] = []
    reference: Array | None = None
    for name, path in files.items():
        context = len(image) + 512 + STEPS
        repack = path.stat().st_size < _REPACK_BYTES
        adapter = bundle.adapter if path == bundle.part(LANGUAGE) else None
        with LanguageModel(path, adapter=adapter, context=context, repack=repack) as engine:
            ids = prompt_encoder(engine.vocabulary, manifest)([Message("user", _QUESTION, 1)])
            ours = _answer_logits(engine, ids, image, answer, partial(progress, f"the answer of {name}"))
        if reference is None:
            reference = _reference_logits(checkpoint, ids, image, answer, partial(progress, "the reference"))
        prequantized = checkpoint.language_file is not None or name not in QUANT_LIMITS
        limit = PREQUANTIZED_LIMITS.get(name, PREQUANTIZED_LIMIT) if prequantized else QUANT_LIMITS[name]
        rows += [_logits_row(name, limit, ours, reference), _greedy_row(name, ours, reference)]
    return rows


def _answer_logits(
    engine: LanguageModel, ids: list[int], image: Array, answer: list[int], progress: Callable[[float], None]
) -> Array:
    """(STEPS + 1, vocab) logits after the prompt and each token of `answer`, which is filled if empty."""
    image_at = ids.index(IMAGE_TOKEN_INDEX)
    progress(0.0)
    engine.evaluate_tokens(ids[:image_at])
    engine.evaluate_embeddings(image, [("reference", row) for row in range(len(image))])
    engine.evaluate_tokens(ids[image_at + 1 :])
    logits = [engine.logits().copy()]
    if answer:
        return np.concatenate([logits, engine.evaluate_all_logits(answer)])
    for step in range(STEPS):
        answer.append(int(logits[-1].argmax()))
        engine.evaluate_tokens([answer[step]])
        logits.append(engine.logits().copy())
        progress((step + 1) / STEPS)
    return np.stack(logits)


def _reference_logits(
    checkpoint: Checkpoint, ids: list[int], image: Array, answer: Sequence[int], progress: Callable[[float], None]
) -> Array:
    from llava_edge.models import streamed

    embeds = streamed.splice(checkpoint.tensors, [*ids, *answer], [image])
    start = len(embeds) - len(answer) - 1
    return streamed.logits(checkpoint.config, checkpoint.tensors, embeds, start, progress)


def _logits_row(name: str, limit: float, ours: Array, reference: Array) -> ParityRow:
    """The worst position counts."""
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(reference, axis=-1)
    cosines = (ours * reference).sum(-1) / np.maximum(norms, np.finfo(np.float32).tiny)  # 0 beside zeros
    value, largest, error = float(cosines.min()), _max_abs([ours], [reference]), relative_error(ours, reference)
    return ParityRow(f"logits {name}", "cosine", value, limit, largest, error, value >= limit)


def _greedy_row(name: str, ours: Array, reference: Array) -> ParityRow:
    """`max_abs`: the largest margin of the reference's own choice over ours; `relative`: divided by its logits' std."""
    mine, theirs = ours.argmax(-1), reference.argmax(-1)
    margins = reference.max(-1) - np.take_along_axis(reference, mine[:, None], -1)[:, 0]
    value, limit = float((mine == theirs).mean()), GREEDY_LIMITS.get(name, 0.0)
    largest = float(margins.max())
    return ParityRow(
        f"greedy {name}", "agreement", value, limit, largest, largest / float(reference.std()), value >= limit
    )
