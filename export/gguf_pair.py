"""llama.cpp's pair of GGUF files, language model and mmproj -> the `Checkpoint` that the exporter works from.

The language file is copied byte for byte, but for types of tokens (`_new_controls`); its tensors are only read for
comparison. Every kind of mmproj that was published for LLaVA is supported: with and without `clip.projector_type`,
quantized or not, with the two feed-forward names swapped, as llama.cpp's first converter wrote them (detected by their
widths), and with the tiles of LLaVA-1.6. Anything but LLaVA is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np

from llava_edge import gguf, templates
from llava_edge.bundle import Square, tiling_problem
from llava_edge.errors import CheckpointError
from llava_edge.export import chat_template
from llava_edge.export.checkpoint import Checkpoint, LanguageFile, Tensors, check_square, tensor_mismatches
from llava_edge.export.mmproj import ARCHITECTURE, tensor_names
from llava_edge.export.normalisation import Normalisation
from llava_edge.export.tensors import StoredTensor
from llava_edge.export.vocabulary import USER_DEFINED, check_template, control_tokens
from llava_edge.gguf import Gguf
from llava_edge.models import llama_gguf, trained_layout
from llava_edge.models.config import LlavaConfig, TextConfig, VisionConfig
from llava_edge.models.shapes import NEWLINE, Shapes, tensor_shapes

V1_IMAGE_SIZE = 224  # of LLaVA v1, which crops; v1.5 has 336 and pads
MISTRAL = (14336, 8)  # feed-forward width and kv heads of Mistral-7B
WINDOW = 4096  # positions: the sliding window of the first Mistral-7B

Grids = tuple[tuple[int, int], ...]

_NEWLINE = re.compile(r"(model|v)\.image_newline")  # the first converter's name, and llama.cpp's today
_IGNORED = re.compile(r"v\.post_ln\.(weight|bias)|v\.blk\.\d+\..*")  # after the layer that LLaVA reads


def open_pair(language: Path, mmproj: Path, template: str, square: Square | None = None) -> Checkpoint:
    """Read and check both headers, without reading weights yet.

    template: name of the prompt layout; empty for the one that sizes and chat template suggest. square: how pictures
    are made square, instead of what the sizes suggest.
    Raises `MissingError`, `BundleError` for a damaged GGUF, or `CheckpointError` for one that is not a LLaVA.
    """
    text_file, vision_file = _read_headers(language, mmproj)
    text = _text_config(text_file)
    if _has_window(text):
        text = replace(text, max_position_embeddings=min(text.max_position_embeddings, WINDOW))
    vision, layer, notes = _vision_config(vision_file)
    projector, grids = _projector_type(vision_file, text), _grids(vision_file)
    guessed_square, square_note = _square(vision, projector, grids)
    if square:
        check_square(mmproj, tiled=bool(grids))
        square_note = ""
    if template:
        templates.get_template(template)
    else:
        chat_template_text = str(text_file.metadata.get("tokenizer.chat_template", ""))
        template = chat_template.resolve_template(chat_template_text, _guess_template(text, grids), language)
    config = LlavaConfig(
        vision=vision,
        text=text,
        vision_feature_layer=layer,
        projector_type=projector,
        square=square or guessed_square,
        grids=grids,
        merge="spatial_unpad" if grids else "flat",
        template=template,
        image_token_index=text.vocab_size,
        # tokenizer_config.json has `legacy: false` for LLaVA-1.5, but not for v1 and Mistral (so BakLLaVA); without a
        # dummy prefix both are the same.
        after_control="prefix" if guessed_square == "crop" or _is_mistral(text) else "bare",
    )
    fault = tiling_problem(vision.image_size, config.square, grids, config.merge, config.image_tokens)
    if fault:
        raise CheckpointError(f"{mmproj} cannot be right: {fault}.")
    new_controls = _new_controls(text_file, template)
    tensors = _vision_tensors(vision_file, config) | _match_tensors(
        text_file,
        llama_gguf.tensor_names(text),
        tensor_shapes(config),
        partial(llama_gguf.read_language_tensor, c=text),
    )
    notes += [f"The prompt layout follows from the files; {template} is used. --template names another."]
    notes += [square_note] if square_note else []
    if new_controls:
        notes.append(
            f"{len(new_controls)} tokens of the prompt layout, which any text could become, are made control tokens."
        )
    if projector == "linear":
        notes.append(f"{mmproj} has one projector layer; it is taken as LLaVA v1's, without an activation behind it.")
    return Checkpoint(
        folder=language,
        config=config,
        tensors=Tensors(tensors),
        tokenizer=language,
        notes=tuple(notes),
        language_file=LanguageFile(language, _quantization(text_file), new_controls),
        normalisation=_normalisation(vision_file),
    )


def _square(vision: VisionConfig, projector: str, grids: Grids) -> tuple[Square, str]:
    """How pictures are made square, and a sentence that says why."""
    if grids:
        return "anyres", f"Pictures are also seen in tiles, at {len(grids)} sizes, as the file of LLaVA 1.6 says."
    crops = projector == "linear" or vision.image_size == V1_IMAGE_SIZE
    method, version = ("cropped", "v1") if crops else ("padded", "v1.5")
    note = f"Neither file says how pictures are made square; they are {method}, as LLaVA {version} was trained."
    note += f" --square {'pad' if crops else 'crop'} says otherwise."
    return "crop" if crops else "pad", note


def _has_window(text: TextConfig) -> bool:
    """Whether it is Mistral's first 7B, whose sliding window is not in the GGUF. Later ones have another rope_theta."""
    return _is_mistral(text) and text.rope_theta == 10000


def _is_mistral(text: TextConfig) -> bool:
    return (text.intermediate_size, text.num_key_value_heads) == MISTRAL


def _guess_template(text: TextConfig, grids: Grids) -> str:
    """The prompt layout of published LLaVAs with a language model of these sizes."""
    unlimited = _is_mistral(text) and (bool(grids) or not _has_window(text))
    return trained_layout.guess_template(hidden_size=text.hidden_size, unlimited_mistral=unlimited)[0]


def _read_headers(language: Path, mmproj: Path) -> tuple[Gguf, Gguf]:
    text, vision = gguf.read(language), gguf.read(mmproj)
    if _is_mmproj(text):
        raise CheckpointError(
            f"{language} is a picture encoder, not a language model; "
            f"run: llava-edge export LANGUAGE.gguf OUT --mmproj {shlex.quote(str(language))}"
        )
    if not _is_mmproj(vision):
        raise CheckpointError(
            f"{mmproj} holds no picture encoder (its architecture is {vision.architecture!r}); "
            "--mmproj takes the file that was published as mmproj beside the language model."
        )
    gguf.check_language(text)
    return text, vision


def _is_mmproj(file: Gguf) -> bool:
    return file.architecture == ARCHITECTURE or "v.patch_embd.weight" in file.tensors


def _text_config(file: Gguf) -> TextConfig:
    """Raises `CheckpointError` for scaled or partial rotary embeddings."""
    heads = file.number("llama.attention.head_count")
    config = TextConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=file.number("llama.embedding_length"),
        intermediate_size=file.number("llama.feed_forward_length"),
        num_hidden_layers=file.number("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.metadata.get("llama.attention.head_count_kv", heads),
        rms_norm_eps=_positive_float(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_positive_float(file, "llama.rope.freq_base", 10000.0),
        max_position_embeddings=file.number("llama.context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id", 1),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id", 2),
    )
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    rotary_dims = file.metadata.get("llama.rope.dimension_count", config.head_dim)
    if scaling != "none" or "rope_freqs.weight" in file.tensors or rotary_dims != config.head_dim:
        raise CheckpointError(
            f"{file.path} has scaled or partial rotary embeddings, which are not supported; LLaVA's models have none."
        )
    return config


def _positive_float(file: Gguf, key: str, default: float | None = None) -> float:
    value = file.metadata.get(key, default)
    if not isinstance(value, float) or not isfinite(value) or value <= 0:
        raise CheckpointError(f"{file.path} has {key} = {value!r}; expected a positive number.")
    return _decimal(value)


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _quantization(file: Gguf) -> str:
    """llama.cpp's name of the quantization, e.g. "q4_k_m"; "gguf" if the file does not say."""
    from gguf import LlamaFileType

    names = {kind.value: kind.name for kind in LlamaFileType if kind is not LlamaFileType.GUESSED}
    name = names.get(file.metadata.get("general.file_type", -1), "gguf")
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def _vision_config(file: Gguf) -> tuple[VisionConfig, int, list[str]]:
    """CLIP's hyperparameters, the hidden state that LLaVA reads, and notes on assumptions."""
    for key, kind in (("use_gelu", "GELU"), ("use_silu", "SiLU")):
        if file.metadata.get(f"clip.{key}"):
            raise CheckpointError(f"{file.path} computes with {kind}, so its tower is not OpenAI's CLIP (quick-GELU).")
    blocks = file.number("clip.vision.block_count")
    config = VisionConfig(
        image_size=file.number("clip.vision.image_size"),
        patch_size=file.number("clip.vision.patch_size"),
        hidden_size=file.number("clip.vision.embedding_length"),
        intermediate_size=file.number("clip.vision.feed_forward_length"),
        num_hidden_layers=blocks,
        num_attention_heads=file.number("clip.vision.attention.head_count"),
        layer_norm_eps=_positive_float(file, "clip.vision.attention.layer_norm_epsilon"),
    )
    if config.hidden_size % config.num_attention_heads or not config.grid:
        raise CheckpointError(
            f"{file.path} has {config.num_attention_heads} heads in a width of {config.hidden_size}, and patches of "
            f"{config.patch_size} in pictures of {config.image_size}, which cannot be right."
        )
    layers = file.items("clip.vision.feature_layer")
    if not layers:
        return config, blocks, [f"{file.path} does not name a CLIP layer; the last of its {blocks} blocks is read."]
    if len(layers) != 1 or not 0 <= layers[0] <= blocks:
        raise CheckpointError(f"{file.path} reads the CLIP layers {layers}; LLaVA reads one, from 0 to {blocks}.")
    return config, int(layers[0]), []


def _projector_type(file: Gguf, text: TextConfig) -> str:
    kind = file.metadata.get("clip.projector_type", file.metadata.get("clip.vision.projector_type", "mlp"))
    if kind != "mlp":
        raise CheckpointError(f"{file.path} has a projector of the type {kind!r}; LLaVA's is 'mlp'.")
    last = "mm.2.weight" if "mm.2.weight" in file.tensors else "mm.0.weight"
    width = file.tensors[last].shape[0] if last in file.tensors else 0
    if width and width != text.hidden_size:
        raise CheckpointError(
            f"{file.path} projects to a width of {width}, the language model has {text.hidden_size}: "
            "the two files are of different models."
        )
    return "mlp2x_gelu" if last == "mm.2.weight" else "linear"


def _grids(file: Gguf) -> Grids:
    """LLaVA-1.6's (width, height) pairs, stored as a flat list; none for a model without tiles."""
    flat = file.items("clip.vision.image_grid_pinpoints")
    newline = any(map(_NEWLINE.fullmatch, file.tensors))
    merge = file.metadata.get("clip.vision.mm_patch_merge_type", "spatial_unpad")
    if not flat and not newline:
        return ()
    whole = bool(flat) and len(flat) % 2 == 0 and all(isinstance(side, int) for side in flat)
    if not newline or not whole or merge != "spatial_unpad":
        raise CheckpointError(
            f"{file.path} has the tiles of LLaVA 1.6, but not whole: {len(flat)} numbers in image_grid_pinpoints, "
            f"{'an' if newline else 'no'} image_newline, and mm_patch_merge_type {merge!r} instead of 'spatial_unpad'."
        )
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _normalisation(file: Gguf) -> Normalisation:
    mean, std = (file.items(f"clip.vision.image_{key}") for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(isinstance(v, float) and isfinite(v) for v in mean + std):
        raise CheckpointError(f"{file.path} should give clip.vision.image_mean and image_std as three numbers each.")
    if min(std) <= 0:
        raise CheckpointError(f"{file.path} has an image_std that is not positive: {std}.")
    mean, std = ([_decimal(value) for value in values] for values in (mean, std))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _new_controls(file: Gguf, template: str) -> tuple[int, ...]:
    """Ids of the prompt layout's tokens that are user-defined, as Yi's `<|im_start|>`: any text can become such.

    Raises `CheckpointError` if the layout's control tokens are missing otherwise.
    """
    tokens, types = file.items("tokenizer.ggml.tokens"), file.items("tokenizer.ggml.token_type")
    names = templates.get_template(template).controls
    kinds = enumerate(zip(tokens, types, strict=False))
    new = {i: text for i, (text, kind) in kinds if kind == USER_DEFINED and text in names}
    check_template(str(file.path), template, {*control_tokens(tokens, types), *new.values()})
    return tuple(new)


def _vision_tensors(file: Gguf, config: LlavaConfig) -> dict[str, StoredTensor]:
    """CLIP and projector under classic names. Raises what `_match_tensors` raises."""
    swapped = _has_swapped_ffn(file)
    standard = {
        NEWLINE if _NEWLINE.fullmatch(name) else _swap_ffn(name) if swapped else name: name for name in file.tensors
    }
    names = {standard.get(target, target): source for target, source in tensor_names(config).items()}
    return _match_tensors(file, names, tensor_shapes(config), llama_gguf.read_tensor)


def _match_tensors(
    file: Gguf, names: Mapping[str, str], shapes: Shapes, read: Callable[[Gguf, str], np.ndarray]
) -> dict[str, StoredTensor]:
    """names: file's -> classic. Raises `CheckpointError` for missing, misshapen and unknown tensors."""
    found = {name: it.shape for name, it in file.tensors.items() if name in names or not _IGNORED.fullmatch(name)}
    if mismatches := tensor_mismatches(found, {name: shapes[source] for name, source in names.items()}):
        raise CheckpointError(f"{file.path} does not fit its own hyperparameters: {mismatches}.")
    return {source: StoredTensor(shapes[source], partial(read, file, name)) for name, source in names.items()}


def _has_swapped_ffn(file: Gguf) -> bool:
    """Whether `ffn_down` is the first feed-forward layer, whose input has CLIP's width."""
    first = file.tensors.get("v.blk.0.ffn_down.weight")
    return first is not None and first.shape[-1] == file.metadata["clip.vision.embedding_length"]


def _swap_ffn(name: str) -> str:
    other = {"ffn_down": "ffn_up", "ffn_up": "ffn_down"}
    return ".".join(other.get(part, part) for part in name.split("."))
