"""LLaMA's vocabulary cut down to the pieces that the tests' prompts can need, under their own ids.

Merging those pieces gives exactly what the whole vocabulary gives for these prompts; other text falls back to shorter
pieces and bytes. The other ids are filled with unused pieces.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.llm_gguf import write_language
from llava_edge.export.tokenizer import read_tokenizer
from llava_edge.models import micro
from llava_edge.models.config import to_hf
from llava_edge.runtimes.language import LanguageModel

DATA = Path(__file__).parent / "data" / "llama_pieces.json"
PIECES: dict[str, list[int]] = json.loads(DATA.read_text("utf-8"))["pieces"]  # text -> [id, score]
SIZE = 32000
ADDED = ["<im_patch>", "<im_start>", "<im_end>", "<|im_start|>", "<|im_end|>"]  # ids from 32000 on; LLaVA's come first

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6


def sentencepiece_model() -> bytes:
    """tokenizer.model with LLaMA's settings."""
    protobuf: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # it ships no types
    model = protobuf.ModelProto()
    known = {i: (text, float(score), NORMAL) for text, (i, score) in PIECES.items()}
    known |= {0: ("<unk>", 0.0, UNKNOWN), 1: ("<s>", 0.0, CONTROL), 2: ("</s>", 0.0, CONTROL)}
    known |= {3 + byte: (f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)}
    for i in range(SIZE):
        text, score, kind = known.get(i, (f"<unused {i}>", -1e6, UNUSED))
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.vocab_size = SIZE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    data: bytes = model.SerializeToString()
    return data


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of the micro model with this vocabulary and random weights."""
    rows = SIZE + len(ADDED)
    text = replace(micro.CONFIG.text, vocab_size=rows, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    config = replace(micro.CONFIG, text=text, template="vicuna_v1", image_markers=("<im_start>", "<im_end>"))
    (folder / "config.json").write_text(json.dumps(to_hf(config)), "utf-8")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "added_tokens.json").write_text(json.dumps({name: SIZE + i for i, name in enumerate(ADDED)}), "utf-8")
    save_file(micro.random_tensors(config), folder / "model.safetensors")
    return folder


def engine(folder: Path) -> LanguageModel:
    """llama.cpp with the exported vocabulary."""
    checkpoint = open_checkpoint(folder)
    vocabulary = read_tokenizer(folder, checkpoint.config)
    write_language(checkpoint, vocabulary, folder / "language.gguf", "test")
    return LanguageModel(folder / "language.gguf", context=32, threads=1)
