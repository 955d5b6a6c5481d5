"""What both kinds of `tokenizer.json` share: the tokens of a BPE model, and sequences of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.vocabulary import NORMAL, UNUSED, check_size, is_rowless_padding, require


def read_bpe(path: Path, raw: dict[str, Any], rows: int) -> tuple[dict[str, Any], tuple[str, ...], tuple[int, ...]]:
    """Return the model, its tokens and their types. Raises `CheckpointError` for what neither kind supports."""
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path} is not a BPE tokenizer; expected a model of type BPE with a vocab.")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    require(path, {"drops merges at random": not model.get("dropout"), "marks word ends or beginnings": not affixes})
    by_id = {int(i): text for text, i in model["vocab"].items()}
    added = {int(entry["id"]): entry["content"] for entry in raw.get("added_tokens", [])}
    by_id |= {i: text for i, text in added.items() if not is_rowless_padding(i, text, rows)}
    size = max(by_id, default=-1) + 1
    check_size(path.parent, size, rows)
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(size))
    return model, tokens, tuple(NORMAL if i in by_id else UNUSED for i in range(size))


def steps(entry: Any, key: str) -> list[Any]:
    """The steps of a tokenizer.json entry, which may be missing, a single one or a sequence."""
    if isinstance(entry, dict) and entry.get("type") == "Sequence":
        return list(entry.get(key, []))
    return [entry] if entry else []
