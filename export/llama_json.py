"""A LLaMA tokenizer that was saved as `tokenizer.json` alone, as transformers 5 does -> SentencePiece's scores.

llama.cpp joins the neighbours whose joint piece has the highest score; the file has the same as a list of merges. The
list is turned into scores, and refused where merging by those would not be merging by the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.prompt import AfterControl

_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_DOUBLE = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": _SPACE * 2}  # for Metaspace leaves one as it is
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_NORMALIZERS: tuple[list[Any], ...] = ([], [_REPLACE], [_REPLACE, _DOUBLE])
_SCHEMES: dict[str, AfterControl] = {"always": "prefix", "first": "bare"}


def is_llama(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json falls back to bytes, as SentencePiece does."""
    model = raw.get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def dummy_prefix(path: Path, raw: Mapping[str, Any]) -> AfterControl | None:
    """What the space in front of a text means for text behind a control token; None if there is no such space.

    Older files prepend it to every stretch of text; `first` in newer ones is what `legacy: false` was.
    """
    normalizers = _stages(raw.get("normalizer"), "normalizers")
    cuts = _stages(raw.get("pre_tokenizer"), "pretokenizers")
    if normalizers == [_PREPEND, _REPLACE] and not cuts:
        return "prefix"
    if normalizers == [_REPLACE] and not cuts:
        return None
    for scheme in (*_SCHEMES, "never"):
        if normalizers in _NORMALIZERS and cuts == [{**_METASPACE, "prepend_scheme": scheme}]:
            return _SCHEMES.get(scheme)
    raise CheckpointError(
        f"{path} treats spaces in a way that is not known here; put the tokenizer.model it was made from beside it."
    )


def _stages(entry: Any, parts: str) -> list[Any]:
    """A step of a tokenizer.json, which may be missing, one, or a sequence."""
    if isinstance(entry, dict) and entry.get("type") == "Sequence":
        return list(entry.get(parts, []))
    return [entry] if entry else []


def scores(path: Path, vocabulary: Sequence[str], merges: Sequence[Sequence[str]]) -> dict[str, float]:
    """Piece -> minus its place in the order of merging; pieces that are never merged have none."""
    found: dict[str, float] = {}
    for left, right in merges:
        found.setdefault(left + right, -float(len(found)))
    known, listed = set(vocabulary), {(left, right) for left, right in merges}
    possible = {
        (piece[:at], piece[at:])
        for piece in vocabulary
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    }
    changes = sum(a + b != c + d for (a, b), (c, d) in pairwise(merges))
    if possible != listed or changes + 1 != max(len(found), 1):
        raise CheckpointError(
            f"{path} merges in an order that no scores have, so its tokens would come out wrong; put the "
            "tokenizer.model it was made from beside it."
        )
    return found
