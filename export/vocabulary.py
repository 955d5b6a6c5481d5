"""The vocabulary fields of a GGUF, and checks that every kind of tokenizer file shares."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_edge import gguf
from llava_edge.errors import CheckpointError
from llava_edge.prompt import Message, render
from llava_edge.templates import get_template

# Token types, the same numbers in SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

PAD_SCORE = -10000.0  # the value of llama.cpp's own converter

# Names of padding tokens. Llama 2 was first published with one more token than embedding rows, and copies still are.
_PADDING = ("<pad>", "[PAD]", "<PAD>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer fields of a GGUF. `tokens`, `scores` and `types` have one entry per embedding row."""

    model: Literal["llama", "gpt2"]
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    add_bos: bool = True
    add_space_prefix: bool = False
    pre: str = "default"
    merges: tuple[str, ...] = ()
    unknown: int | None = None
    bos: int = 1
    eos: int = 2

    def write(self, writer: Any) -> None:
        """Add the fields to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)


def pad(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """Add unused `[PADi]` tokens until there is one for each of `rows`."""
    size = len(vocabulary.tokens)
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *(f"[PAD{i}]" for i in range(size, rows))),
        types=vocabulary.types + (UNUSED,) * (rows - size),
        scores=vocabulary.scores + (PAD_SCORE,) * (rows - size),
    )


def control_tokens(tokens: Iterable[str], types: Iterable[int]) -> set[str]:
    """Return the tokens that are control tokens."""
    return {text for text, kind in zip(tokens, types, strict=False) if kind == CONTROL}


def make_control(path: Path, ids: Collection[int]) -> None:
    """Give these tokens of a GGUF the type of control tokens, in place."""
    types = gguf.read(path).metadata["tokenizer.ggml.token_type"]
    with path.open("r+b") as file:
        for token in ids:
            file.seek(types.offset + 4 * token)
            file.write(CONTROL.to_bytes(4, "little"))


def check_template(where: str, template: str, controls: Collection[str]) -> None:
    """Raise `CheckpointError` unless a prompt layout's control tokens, and none of its text, are in `controls`."""
    remedy = "pass the layout that the model was trained with as --template."
    missing = [text for text in get_template(template).controls if text not in controls]
    if missing:
        raise CheckpointError(
            f"The prompt template {template!r} needs the special tokens {', '.join(missing)}, which {where} lacks; "
            + remedy
        )
    turns = [Message("user", "", images=1), Message("assistant", "")]  # more would add no other texts
    written = "".join(piece.text for piece in render(template, turns) if piece.kind == "text")
    if found := min((text for text in controls if text in written), default=None):
        raise CheckpointError(  # [INST] since Mistral-7B v0.3
            f"The prompt template {template!r} has {found!r} as text, which is a special token of {where}; {remedy}"
        )


def check_size(folder: Path, size: int, rows: int) -> None:
    """Raise `CheckpointError` if there are more tokens than embeddings."""
    if size > rows:
        raise CheckpointError(f"The tokenizer in {folder} has {size} tokens, the embedding table only {rows} rows.")


def is_rowless_padding(token: int, text: Any, rows: int) -> bool:
    """Whether a token only fills up batches, so that no prompt has it, and has no embedding."""
    return token >= rows and text in _PADDING


def require(path: Path, rules: dict[str, bool]) -> None:
    """Raise `CheckpointError` for the first of `rules` (what is wrong otherwise -> whether it is met) that is not."""
    for problem, good in rules.items():
        if not good:
            raise CheckpointError(f"The tokenizer {path} {problem}, so its tokens would come out wrong.")
