"""One random model written in every published layout of checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from llava_edge.export.names import TEXT_PREFIX, VISION_PREFIX
from llava_edge.models import micro
from llava_edge.models.config import LlavaConfig

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


def original_name(name: str, projector: str = "mlp2x_gelu") -> str:
    """A classic name as haotian-liu/LLaVA stores it."""
    if name.startswith("multi_modal_projector.linear_"):
        number, kind = name.removeprefix("multi_modal_projector.linear_").split(".")
        module = "" if projector == "linear" else f"{2 * int(number) - 2}."
        return f"model.mm_projector.{module}{kind}"
    name = re.sub(f"^{re.escape(TEXT_PREFIX)}", "model.", name)
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^image_newline$", "model.image_newline", name)
    return re.sub(f"^{re.escape(VISION_PREFIX)}", "model.vision_tower.vision_tower.vision_model.", name)


def original_config(config: LlavaConfig = micro.CONFIG, **extra: Any) -> dict[str, Any]:
    """config.json as the repository writes it."""
    sizes = dict(vars(config.text))
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **sizes,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": False,
        **extra,
    }


def is_vision(name: str) -> bool:
    return name.startswith(VISION_PREFIX)


def write(folder: Path, config: Mapping[str, Any], tensors: Arrays | None = None, *, tokenizer: bool = True) -> Path:
    """config.json, model.safetensors and a tokenizer, each where there is one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(micro.tokenizer_json(), ensure_ascii=False), "utf-8")
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_pickles(folder: Path, config: Mapping[str, Any], tensors: Arrays) -> Path:
    """The same in two pytorch_model shards with an index, as the repository's own are."""
    write(folder, config)
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, chosen in shards.items():
        torch.save({name: torch.from_numpy(tensors[name]) for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def write_clip(folder: Path, tensors: Arrays, config: LlavaConfig = micro.CONFIG) -> Path:
    """A CLIP folder of its own, with a text tower that is to be ignored."""
    vision = dict(vars(config.vision))
    stored = {name.removeprefix("vision_tower."): value for name, value in tensors.items() if is_vision(name)}
    stored |= {"text_model.embeddings.token_embedding.weight": np.ones((3, 4), np.float32)}
    stored |= {"logit_scale": np.ones((), np.float32)}
    return write(folder, {"model_type": "clip", "text_config": {}, "vision_config": vision}, stored, tokenizer=False)


def write_language_model(folder: Path, tensors: Arrays, config: LlavaConfig = micro.CONFIG) -> Path:
    """The language model alone, as Vicuna and LLaMA are published."""
    kept = {original_name(name): value for name, value in tensors.items() if name.startswith("language_model.")}
    sizes = dict(vars(config.text))
    return write(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}, kept)


def write_projector(folder: Path, tensors: Arrays, config: Mapping[str, Any]) -> Path:
    """mm_projector.bin and config.json."""
    write(folder, config, tokenizer=False)
    kept = {original_name(k): torch.from_numpy(v) for k, v in tensors.items() if k.startswith("multi_modal")}
    torch.save(kept, folder / "mm_projector.bin")
    return folder


def write_lora(
    folder: Path, tensors: Arrays, config: Mapping[str, Any], *, rank: int = 4, alpha: int = 16
) -> tuple[Path, Arrays]:
    """A LoRA as llava/train/train.py saves it. Returns the folder and the tensors that merging has to give."""
    rng = np.random.default_rng(5)
    write(folder, config, tokenizer=False)
    adapter: dict[str, torch.Tensor] = {}
    merged = dict(tensors)
    for name in [key for key in tensors if key.startswith("language_model.") and "_proj." in key]:
        rows, columns = tensors[name].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) * 0.05 for shape in ((rank, columns), (rows, rank)))
        stem = "base_model.model." + original_name(name).removesuffix(".weight")
        adapter |= {f"{stem}.lora_A.weight": torch.from_numpy(a), f"{stem}.lora_B.weight": torch.from_numpy(b)}
        merged[name] = tensors[name] + alpha / rank * (b @ a)
    torch.save(adapter, folder / "adapter_model.bin")
    whole = {
        f"base_model.model.{original_name(k)}": torch.from_numpy(v) for k, v in tensors.items() if "multi_modal" in k
    }
    torch.save(whole, folder / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    return folder, merged


def write_delta(folder: Path, tensors: Arrays, base: Arrays, config: Mapping[str, Any]) -> Path:
    """Differences in float16 to `base`, which has fewer rows of embeddings."""
    stored: Arrays = {}
    for name, value in tensors.items():
        if is_vision(name):
            continue
        change = value.astype(np.float16)
        if name in base:
            change[: len(base[name])] -= base[name].astype(np.float16)
        stored[original_name(name, "linear")] = change
    return write(folder, config, stored)
