"""One random model written in every published layout of checkpoints, and its config.json changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import in_halves, published, write_mmproj
from safetensors.numpy import save_file

from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.exporter import ExportOptions
from llava_edge.export.llm_gguf import write_language as write_gguf
from llava_edge.export.tokenizer import read_tokenizer
from llava_edge.models import micro
from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import TEXT_PREFIX, VISION_PREFIX

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
        "mm_vision_tower": "somebody/clip-vit-micro",
        "mm_use_im_start_end": False,
        **extra,
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; `text_config__name` reaches into a part."""
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    for key, value in changes.items():
        *parts, last = key.split("__")
        place = raw
        for part in parts:
            place = place[part]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")


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


INSIDE = replace(micro.CONFIG.vision, hidden_size=128, num_attention_heads=2)  # CLIP's heads are 64 wide
GRIDS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
CONFIGS = {
    "huggingface": micro.CONFIG,
    "original": micro.CONFIG,
    "original in pickles": micro.CONFIG,
    "clip inside": replace(micro.CONFIG, vision=INSIDE),
    "v1": replace(micro.CONFIG, projector_type="linear", square="crop"),
    "v1.6": replace(micro.CONFIG, vision=INSIDE, square="anyres", grids=GRIDS, merge="spatial_unpad"),
    "lora": micro.CONFIG,
    "projector": micro.CONFIG,
    "delta": replace(micro.CONFIG, projector_type="linear", square="crop"),
    "gguf pair": micro.CONFIG,
}


def whole(layout: str, folder: Path, seed: int) -> ExportOptions:
    """All the files of one random model in a layout of `CONFIGS`, and how they are exported: q8_0 and fp32.

    Its weights are ones that float16 holds, as those of published checkpoints are.
    """
    config = CONFIGS[layout]
    tensors = in_halves(micro.random_tensors(config, seed=seed))
    options = ExportOptions(folder / "model", folder / "out", "q8_0", "fp32", template="chatml")
    if layout in ("huggingface", "gguf pair"):
        micro.write_checkpoint(folder / "model", config=config, tensors=tensors)
    if layout == "huggingface":
        return options
    if layout == "gguf pair":
        checkpoint = open_checkpoint(folder / "model")
        write_gguf(checkpoint, read_tokenizer(checkpoint.tokenizer, config), folder / "model.gguf", "test")
        mmproj = write_mmproj(folder / "mmproj.gguf", config, published(tensors, config.vision_blocks, swapped=True))
        return replace(options, checkpoint=folder / "model.gguf", mmproj=mmproj)
    raw = original_config(config)
    if config.square == "anyres":
        raw |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": GRIDS, "mm_patch_merge_type": config.merge}
    elif config.square == "crop":
        del raw["image_aspect_ratio"]
    named = {original_name(name, config.projector_type): value for name, value in tensors.items()}
    if layout in ("clip inside", "v1.6"):
        write(folder / "model", raw, named)
        return options
    options = replace(options, vision_tower=write_clip(folder / "clip", tensors, config))
    named = {name: value for name, value in named.items() if "vision_tower" not in name}
    if layout in ("original", "v1"):
        write(folder / "model", raw, named)
    elif layout == "original in pickles":
        write_pickles(folder / "model", raw, named)
    else:
        base = {name: value for name, value in tensors.items() if name.startswith("language_model.")}
        if layout == "lora":
            write_lora(folder / "model", tensors, raw)
        elif layout == "projector":
            write_projector(folder / "model", tensors, raw)
        else:
            near = np.random.default_rng(seed)
            norms = {name: value for name, value in base.items() if "norm" in name}
            base = {
                n: v + np.float32(0.01) * near.standard_normal(v.shape, np.float32) for n, v in base.items()
            } | norms
            write_delta(folder / "model", tensors, base, raw)
        options = replace(options, base=write_language_model(folder / "base", base, config))
    return options
