"""The parity table: the very code of `runtimes/` against PyTorch, stage by stage. Needs torch.

Each stage gets the reference's own input, so that every row shows one stage's own error; `embeddings` is the exception
that shows what becomes of CLIP's error behind the projector:

    pixels       our preprocessing against the recipe of CLIPImageProcessor, written out in reference.py; equal
    clip fp32    the tower in float32, before its precision was reduced
    clip P       vision.onnx
    attention    its other output, by which a token budget chooses
    projector    projector.gguf
    embeddings   vision.onnx, then projector.gguf: what stands at the image's positions when a bundle is run
    arrangement  with "anyres", the order of the crops' embeddings and `image_newline` between them; equal
    logits f16   the float16 language file, before quantization, at the prompt's end and along its greedy answer
    greedy f16   share of these positions where the most likely token is the reference's
    logits Q     the shipped file along the same answer; what four bits cost
    greedy Q

The reference is `models/`, one block in memory at a time, so a 7B needs no more memory than its largest tensor.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import anyres
from llava_edge.bundle import LANGUAGE, Bundle, ParityRow
from llava_edge.errors import CheckpointError, install
from llava_edge.export import samples
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.reference import reference_pixels
from llava_edge.export.verify import relative
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes import mapping
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.tokenization import prompt_encoder
from llava_edge.runtimes.vision import VisionEncoder

Array = np.ndarray[Any, Any]
Progress = Callable[[str, float | None], None]

CLIP_LIMITS = {"fp32": 1e-4, "fp16": 2e-3, "int8": 3e-2}  # relative
PROJECTOR_LIMIT = 1e-5  # relative; the tanh form of GELU would give about 2e-4
AMPLIFICATION = 5.0  # of CLIP's relative error by the projector or in its attention, at most
# Cosine. What bits cost depends on the model and is reported rather than judged; the file's content is checked tensor
# by tensor. These only stop a bundle that lost its model.
QUANT_LIMITS = {"f16": 0.9999, "q8_0": 0.995, "q5_k_m": 0.95, "q4_k_m": 0.85, "q4_0": 0.6}
# Cosine of a language file that was quantized elsewhere, against its own weights dequantised. What differs is that
# llama.cpp rounds activations to 8 bits: 0.9997 or better on random models of 2 and 16 blocks in all quantizations,
# 0.9982 for SmolLM2-135M in Q4_1. q and k with rows in the wrong order gave at most 0.98.
KEPT_LIMITS = {"f32": 0.9999, "f16": 0.9999}
KEPT_LIMIT = 0.99
GREEDY_LIMITS = {"f16": 0.95}  # near ties may fall either way; what quantization changes is reported

STEPS = 64  # of the greedy answer
_QUESTION = "Describe the picture."
_REPACK_BYTES = 1 << 30  # larger files are measured as they are mapped: repacking would hold them in memory again


def obstacle() -> str:
    """Why parity cannot be measured here, as a sentence; empty if it can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return f"Parity was not measured: torch is not installed. {install('train')}, then export again."
    return ""


def check_fits(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse to compare a bundle with a checkpoint of other sizes: `CheckpointError` naming them."""
    vision, language, config = bundle.manifest.vision, bundle.manifest.language, checkpoint.config
    ours = (vision.width, vision.image_tokens, language.hidden_size, language.vocab_size)
    theirs = (config.vision.hidden_size, config.image_tokens, config.text.hidden_size, config.text.vocab_size)
    if ours != theirs:
        raise CheckpointError(
            f"{bundle.folder} is not made from {checkpoint.folder}: vision width, image tokens, hidden size and "
            f"vocabulary are {ours} there and {theirs} here."
        )


def parity(
    bundle: Bundle,
    checkpoint: Checkpoint,
    float16: Path | None = None,
    float32: Path | None = None,
    progress: Progress = lambda what, share: None,
) -> list[ParityRow]:
    """Measure every stage, worst last. The bundle's hashes are not looked at.

    float16: the language file before quantization, float32: the folder of the tower before that; if they are there.
    progress: gets what is computed and its share done, None if unknown.
    """
    from llava_edge.models import streamed

    progress("pictures", None)
    config, tensors, manifest = checkpoint.config, checkpoint.tensors, bundle.manifest
    images = samples.pictures()
    sizes = [image.size for image in images]
    pixels = [anyres.crops(image, manifest.preprocessing) for image in images]
    right = replace(manifest.preprocessing, square=config.square, grids=config.grids)
    rows = [_equal_row("pixels", pixels, [reference_pixels(image, right) for image in images])]
    attention: list[Array] = []
    if manifest.vision.attention:
        features, attention = streamed.image_features_with_attention(config, tensors, pixels)
    else:
        features = streamed.image_features(config, tensors, pixels)
    embeds = streamed.project(config, tensors, features)
    shown = streamed.arrange(config, tensors, embeds, sizes)
    if float32:
        whole = _encoded(VisionEncoder(Bundle(float32, manifest)), pixels)
        rows.append(_relative_row("clip fp32", whole, features, CLIP_LIMITS["fp32"]))
    rows += _vision_rows(bundle, pixels, features, attention, embeds)
    if config.square == "anyres":
        orders = [anyres.layout(size, manifest.preprocessing, manifest.vision.image_tokens) for size in sizes]
        newline = Projector(bundle).newline
        placed = [anyres.arrange(item, newline, order) for item, order in zip(embeds, orders, strict=True)]
        rows.append(_equal_row("arrangement", placed, shown))
    mapping.trim()
    files = {"f16": float16} if float16 else {}
    files[manifest.language.quantization] = bundle.part(LANGUAGE)
    rows += _language_rows(files, checkpoint, bundle, shown[0], progress)
    return sorted(rows, key=_strain)


def _encoded(encoder: VisionEncoder, pixels: Sequence[Array]) -> list[Array]:
    """(crops, 3, S, S) of each picture -> (crops, image_tokens, width) of each."""
    return [np.stack([encoder.encode(crop) for crop in crops]) for crops in pixels]


def _vision_rows(
    bundle: Bundle, pixels: list[Array], features: list[Array], attention: list[Array], embeds: list[Array]
) -> list[ParityRow]:
    """The last three are the reference's; `attention` is empty for a bundle without."""
    encoder, layers = VisionEncoder(bundle), Projector(bundle)
    precision = bundle.manifest.vision.precision
    limit = CLIP_LIMITS[precision]
    ours = _encoded(encoder, pixels)
    rows = [_relative_row(f"clip {precision}", ours, features, limit)]
    if attention:
        looks = [np.stack([encoder.encode_attended(crop)[1] for crop in item]) for item in pixels]
        rows.append(_relative_row(f"attention {precision}", looks, attention, AMPLIFICATION * limit))
    rows.append(_relative_row("projector", [layers.project(item) for item in features], embeds, PROJECTOR_LIMIT))
    rows.append(_relative_row("embeddings", [layers.project(item) for item in ours], embeds, AMPLIFICATION * limit))
    return rows


def _strain(row: ParityRow) -> float:
    """How much of its limit a row uses; above 1 it fails."""
    if row.measure in ("cosine", "agreement"):
        return (1 - row.value) / (1 - row.limit)
    return row.value / row.limit if row.limit else np.inf * row.value if row.value else 0.0


def _equal_row(stage: str, ours: list[Array], wanted: list[Array]) -> ParityRow:
    if [item.shape for item in ours] != [item.shape for item in wanted]:
        most = sys.float_info.max
        return ParityRow(stage, "max_abs", most, 0.0, most, most, False)
    largest = _max_abs(ours, wanted)
    worst = max(relative(a, b) for a, b in zip(ours, wanted, strict=True))
    return ParityRow(stage, "max_abs", largest, 0.0, largest, worst, largest == 0)


def _relative_row(stage: str, ours: list[Array], wanted: list[Array], limit: float) -> ParityRow:
    """The worst picture counts."""
    worst = max(relative(a, b) for a, b in zip(ours, wanted, strict=True))
    return ParityRow(stage, "relative", worst, limit, _max_abs(ours, wanted), worst, worst <= limit)


def _max_abs(ours: list[Array], wanted: list[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, wanted, strict=True))


def _language_rows(
    files: Mapping[str, Path],
    checkpoint: Checkpoint,
    bundle: Bundle,
    image: Array,
    progress: Progress = lambda what, share: None,
) -> list[ParityRow]:
    """Every file along the greedy answer of the first; the shipped one with its adapter."""
    manifest = bundle.manifest
    rows: list[ParityRow] = []
    answer: list[int] = []
    wanted: Array | None = None
    for name, path in files.items():
        context = len(image) + 512 + STEPS
        repack = path.stat().st_size < _REPACK_BYTES
        adapter = bundle.adapter if path == bundle.part(LANGUAGE) else None
        with LanguageModel(path, adapter=adapter, context=context, repack=repack) as engine:
            ids = prompt_encoder(engine, manifest)([Message("user", _QUESTION, 1)])
            ours = _follow(engine, ids, image, answer, partial(progress, f"the answer of {name}"))
        if wanted is None:
            wanted = _reference_logits(checkpoint, ids, image, answer, partial(progress, "the reference"))
        kept = checkpoint.language_file is not None or name not in QUANT_LIMITS
        limit = KEPT_LIMITS.get(name, KEPT_LIMIT) if kept else QUANT_LIMITS[name]
        rows += [_logits_row(name, limit, ours, wanted), _greedy_row(name, ours, wanted)]
    return rows


def _follow(
    engine: LanguageModel, ids: list[int], image: Array, answer: list[int], progress: Callable[[float], None]
) -> Array:
    """(STEPS + 1, vocab) logits behind the prompt and behind each token of `answer`, which is filled if it is empty."""
    never = threading.Event()
    at = ids.index(IMAGE_TOKEN_INDEX)
    progress(0.0)
    engine.evaluate_tokens(ids[:at], never)
    engine.evaluate_embeddings(image, [("reference", row) for row in range(len(image))], never)
    engine.evaluate_tokens(ids[at + 1 :], never)
    found = [engine.logits().copy()]
    for step in range(STEPS):
        if step == len(answer):
            answer.append(int(found[-1].argmax()))
        engine.evaluate_tokens([answer[step]], never)
        found.append(engine.logits().copy())
        progress((step + 1) / STEPS)
    return np.stack(found)


def _reference_logits(
    checkpoint: Checkpoint, ids: list[int], image: Array, answer: Sequence[int], progress: Callable[[float], None]
) -> Array:
    from llava_edge.models import streamed

    embeds = streamed.splice(checkpoint.tensors, [*ids, *answer], [image])
    start = len(embeds) - len(answer) - 1
    return streamed.logits(checkpoint.config, checkpoint.tensors, embeds, start, progress)


def _logits_row(name: str, limit: float, ours: Array, wanted: Array) -> ParityRow:
    """The worst position counts."""
    cosines = (ours * wanted).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(wanted, axis=-1))
    value = float(cosines.min())
    return ParityRow(
        f"logits {name}", "cosine", value, limit, _max_abs([ours], [wanted]), relative(ours, wanted), value >= limit
    )


def _greedy_row(name: str, ours: Array, wanted: Array) -> ParityRow:
    """`max_abs`: by how much the reference prefers its own choice, at most; `relative`: that over its logits' std."""
    mine, theirs = ours.argmax(-1), wanted.argmax(-1)
    gaps = wanted.max(-1) - np.take_along_axis(wanted, mine[:, None], -1)[:, 0]
    value, limit = float((mine == theirs).mean()), GREEDY_LIMITS.get(name, 0.0)
    largest = float(gaps.max())
    return ParityRow(
        f"greedy {name}", "agreement", value, limit, largest, largest / float(wanted.std()), value >= limit
    )
