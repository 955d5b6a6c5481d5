"""Prompts -> token ids, with text right after a control token tokenized as the bundle's model was trained.

LLaMA's tokenizers differ there in three ways (`prompt.AfterControl`). llama.cpp puts SentencePiece's dummy prefix
before every stretch of text; the other two ways are derived from that. For a vocabulary without a dummy prefix all
three are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llava_edge import prompt
from llava_edge.bundle import Manifest
from llava_edge.prompt import AfterControl, EncodeText, Message
from llava_edge.runtimes.vocabulary import Vocabulary

_SPACE = "▁"  # how SentencePiece writes a space
_GUARD = "\0"  # in no piece together with other characters, so that nothing merges with it
_UNKNOWN = 0  # LLaMA's <unk>


def prompt_encoder(
    vocabulary: Vocabulary, manifest: Manifest, *, unclosed: bool = False
) -> Callable[[Sequence[Message]], list[int]]:
    """Return the function that renders messages in a bundle's prompt layout and tokenizes them (`prompt.encode`)."""
    encode_after_control = after_control_encoder(vocabulary, manifest.after_control)

    def encode(messages: Sequence[Message]) -> list[int]:
        pieces = prompt.render(manifest.template, messages, manifest.image_markers, unclosed=unclosed)
        return prompt.encode(pieces, vocabulary.tokenize, vocabulary.control_id, encode_after_control)

    return encode


def after_control_encoder(vocabulary: Vocabulary, mode: AfterControl) -> EncodeText:
    """Return the function that tokenizes text after a control token."""
    if mode == "bare":
        return partial(_encode_bare, vocabulary, vocabulary.tokenize(_GUARD))
    if mode == "cut":
        return partial(_encode_cut, vocabulary, vocabulary.token_texts())
    return vocabulary.tokenize


def _encode_bare(vocabulary: Vocabulary, guard: list[int], text: str) -> list[int]:
    """Tokenize without a dummy prefix. `guard`: tokens of `_GUARD`; a single one if the vocabulary has no prefix."""
    if len(guard) == 1:
        return vocabulary.tokenize(text)
    return vocabulary.tokenize(_GUARD + text)[len(guard) :]


def _encode_cut(vocabulary: Vocabulary, token_texts: list[str], text: str) -> list[int]:
    """Do as LlamaTokenizer._tokenize of transformers 4.31: strip the dummy prefix from the first token.

    If what is left of it is not a token, it becomes `<unk>`.
    """
    ids = vocabulary.tokenize(text)
    if not ids or text.startswith((" ", _SPACE)) or not token_texts[ids[0]].startswith(_SPACE):
        return ids
    rest = token_texts[ids[0]].removeprefix(_SPACE)
    if not rest:
        return ids[1:]
    return [token_texts.index(rest) if rest in token_texts else _UNKNOWN, *ids[1:]]
