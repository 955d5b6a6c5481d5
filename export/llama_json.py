"""A LLaMA tokenizer saved as `tokenizer.json` only, as by transformers 5 -> the vocabulary fields of a GGUF.

llama.cpp merges the pair of neighbours whose merged piece has the highest score; the file has an ordered list of merges
instead. The list is converted to scores, and refused if merging by scores would give other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.bpe_json import read_bpe, steps
from llava_edge.export.vocabulary import BYTE, UNKNOWN, Vocabulary, require
from llava_edge.prompt import AfterControl

_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# Doubles a leading space, which Metaspace would leave as it is.
_DOUBLE_FIRST = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": _SPACE * 2}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_NORMALIZERS: tuple[list[Any], ...] = ([], [_REPLACE], [_REPLACE, _DOUBLE_FIRST])
_SCHEMES: dict[str, AfterControl] = {"always": "prefix", "first": "bare"}


def is_llama(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json has byte fallback, as SentencePiece does."""
    model = raw.get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def read_llama(path: Path, raw: dict[str, Any], rows: int) -> Vocabulary:
    """Build what `read_sentencepiece` does, from transformers' conversion of a tokenizer.model, parsed as `raw`."""
    prefix = dummy_prefix(path, raw)
    model, tokens, types = read_bpe(path, raw, rows)
    rules = {
        "has no byte pieces to fall back to": all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)),
        "looks whole words up before it merges": not model.get("ignore_merges"),
    }
    require(path, rules)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    scores = _merge_scores(path, list(model["vocab"]), merges)
    kinds = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {"<unk>": UNKNOWN}
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=tuple(kinds.get(text, kind) for text, kind in zip(tokens, types, strict=True)),
        scores=tuple(scores.get(text, 0.0) for text in tokens),
        unknown=tokens.index("<unk>") if "<unk>" in tokens else None,
        add_space_prefix=prefix is not None,
    )


def dummy_prefix(path: Path, raw: Mapping[str, Any]) -> AfterControl | None:
    """How the dummy prefix space applies to text after a control token; None if there is no dummy prefix.

    Older files prepend it to every segment of text; `first` in newer ones is what `legacy: false` was.
    """
    normalizers = steps(raw.get("normalizer"), "normalizers")
    pre_tokenizers = steps(raw.get("pre_tokenizer"), "pretokenizers")
    if normalizers == [_PREPEND, _REPLACE] and not pre_tokenizers:
        return "prefix"
    if normalizers == [_REPLACE] and not pre_tokenizers:
        return None
    for scheme in (*_SCHEMES, "never"):
        if normalizers in _NORMALIZERS and pre_tokenizers == [{**_METASPACE, "prepend_scheme": scheme}]:
            return _SCHEMES.get(scheme)
    raise CheckpointError(
        f"{path} handles spaces in an unsupported way; put the tokenizer.model it was made from beside it."
    )


def _merge_scores(path: Path, vocabulary: Sequence[str], merges: Sequence[Sequence[str]]) -> dict[str, float]:
    """Piece -> minus its rank in the merge order; pieces that are never merged are left out."""
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores)))
    pieces, pairs = set(vocabulary), {(left, right) for left, right in merges}
    possible = {
        (piece[:at], piece[at:])
        for piece in vocabulary
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    }
    changes = sum(a + b != c + d for (a, b), (c, d) in pairwise(merges))
    if possible != pairs or changes + 1 != max(len(scores), 1):
        raise CheckpointError(
            f"{path} has a merge order that scores cannot express, so its tokens would come out wrong; put the "
            "tokenizer.model it was made from beside it."
        )
    return scores
