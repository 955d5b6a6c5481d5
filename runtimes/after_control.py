"""A bundle's prompts -> tokens, with text right behind a control token in each of the ways of LLaMA's tokenizers
(`prompt.AfterControl`).

llama.cpp puts SentencePiece's dummy prefix before every stretch of text; the other two ways are made from that one.
For a vocabulary without a dummy prefix all three are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llava_edge import prompt
from llava_edge.bundle import Manifest
from llava_edge.prompt import AfterControl, EncodeText, Message
from llava_edge.runtimes.language import LanguageModel

_SPACE = "▁"  # how SentencePiece writes a space
_GUARD = "\0"  # stands in no piece with other characters, so that nothing merges with it
_UNKNOWN = 0  # LLaMA's <unk>


def prompt_encoder(
    language: LanguageModel, manifest: Manifest, *, unclosed: bool = False
) -> Callable[[Sequence[Message]], list[int]]:
    """The function that lays messages out as a bundle's model was trained, and tokenizes them (`prompt.encode`)."""
    behind = encoder(language, manifest.after_control)

    def encode(messages: Sequence[Message]) -> list[int]:
        pieces = prompt.render(manifest.template, messages, manifest.image_markers, unclosed=unclosed)
        return prompt.encode(pieces, language.tokenize, language.control_id, behind)

    return encode


def encoder(language: LanguageModel, way: AfterControl) -> EncodeText:
    """The function that tokenizes text behind a control token."""
    if way == "bare":
        return partial(_bare, language, language.tokenize(_GUARD))
    if way == "cut":
        return partial(_cut, language, language.token_texts())
    return language.tokenize


def _bare(language: LanguageModel, guard: list[int], text: str) -> list[int]:
    """`guard` is the guard's own tokens; if it is one, the vocabulary has no dummy prefix."""
    if len(guard) == 1:
        return language.tokenize(text)
    return language.tokenize(_GUARD + text)[len(guard) :]


def _cut(language: LanguageModel, texts: list[str], text: str) -> list[int]:
    """LlamaTokenizer._tokenize of transformers 4.31: a rest that is no piece becomes `<unk>`."""
    ids = language.tokenize(text)
    if not ids or text.startswith((" ", _SPACE)) or not texts[ids[0]].startswith(_SPACE):
        return ids
    rest = texts[ids[0]].removeprefix(_SPACE)
    if not rest:
        return ids[1:]
    return [texts.index(rest) if rest in texts else _UNKNOWN, *ids[1:]]
