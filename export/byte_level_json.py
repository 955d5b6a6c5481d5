"""`tokenizer.json` with byte-level BPE, as of GPT-2, SmolLM and LLaMA 3 -> the vocabulary fields of a GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.bpe_json import read_bpe, steps
from llava_edge.export.vocabulary import Vocabulary, require

# The split pattern of LLaMA 3's tokenizer.json, which llama.cpp knows as "llama-bpe".
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_byte_level(path: Path, raw: dict[str, Any], rows: int) -> Vocabulary:
    """Build the vocabulary of the parsed file `raw`; `rows`: of the embedding table. Raises `CheckpointError`."""
    model, tokens, types = read_bpe(path, raw, rows)
    pre = _pre_tokenizer(path, raw)
    rules = {
        "normalises text, which llama.cpp would not": not raw.get("normalizer"),
        f"and llama.cpp's {pre!r} differ in ignore_merges": bool(model.get("ignore_merges")) == (pre == "llama-bpe"),
    }
    require(path, rules)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", []))
    return Vocabulary(
        model="gpt2",
        tokens=tokens,
        types=types,
        scores=(0.0,) * len(tokens),
        add_bos=_adds_bos(raw),
        pre=pre,
        merges=tuple(merges),
    )


def _pre_tokenizer(path: Path, raw: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer, detected by its content."""
    stages = steps(raw.get("pre_tokenizer"), "pretokenizers")
    kinds = [stage.get("type") for stage in stages]
    byte_level = stages[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    if byte_level and not byte_level.get("add_prefix_space", True):
        before, regex = stages[:-1], byte_level.get("use_regex", True)
        if not before and regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and before[0].get("individual_digits") and regex:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex:
            split = before[0]
            if split.get("pattern") == {"Regex": LLAMA3_SPLIT} and split.get("behavior") == "Isolated":
                return "llama-bpe"
    raise CheckpointError(
        f"{path} has an unsupported pre-tokenizer ({json.dumps(stages)[:200]}); supported are GPT-2's, "
        "SmolLM's and LLaMA 3's byte-level pre-tokenizers without a prefix space."
    )


def _adds_bos(raw: dict[str, Any]) -> bool:
    """Whether the post-processor adds a special token before the text."""
    return any(
        stage.get("type") == "TemplateProcessing" and "SpecialToken" in (stage.get("single") or [{}])[0]
        for stage in steps(raw.get("post_processor"), "processors")
    )
