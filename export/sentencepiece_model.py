"""`tokenizer.model`, a SentencePiece file -> the vocabulary fields of a GGUF.

It is a protobuf of which only five fields are needed, so it is parsed by hand.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from llava_edge import protobuf
from llava_edge.errors import CheckpointError
from llava_edge.export.tensors import refuse_placeholder
from llava_edge.export.vocabulary import BYTE, NORMAL, UNKNOWN, Vocabulary, require


def read_sentencepiece(path: Path) -> Vocabulary:
    """Field numbers are those of sentencepiece_model.proto. Raises `CheckpointError`."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    value: Any
    refuse_placeholder(path)
    try:
        for field, value in protobuf.fields(path.read_bytes()):
            if field == 1:
                piece: dict[int, Any] = dict(protobuf.fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(protobuf.fields(value))
            elif field == 3:
                normalizer = dict(protobuf.fields(value))
    except (IndexError, KeyError, ValueError, struct.error, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model ({error!r}); download it again.") from error
    if not pieces:
        raise CheckpointError(f"{path} is not a SentencePiece model: it has no pieces; download it again.")
    # llama.cpp's tokenizer merges by score, falls back to bytes, and does not normalise text.
    rules = {
        "is a unigram model; only BPE is supported": trainer.get(3, 1) == 2,
        "has no byte pieces to fall back to": sum(kind == BYTE for _, _, kind in pieces) == 256,
        "normalises text; only identity is supported": normalizer.get(1, b"") in (b"", b"identity"),
        "removes extra spaces, which llama.cpp does not": not normalizer.get(4, 1),
    }
    require(path, rules)
    tokens, scores, types = zip(*pieces, strict=True)
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        unknown=types.index(UNKNOWN) if UNKNOWN in types else None,
        add_space_prefix=bool(normalizer.get(3, 1)),
    )
