"""Text <-> token ids, by the tokenizer in language.gguf."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge.errors import BundleError, ContextOverflowError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_TEXT_BYTES = 1 << 20  # tokenizers have had overflows in long texts; a prompt of this size fits no context anyway


@dataclass(frozen=True)
class _Tokens:
    """What LLGuidance asks for."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    tokenize: Callable[[str], list[int]]
    bos_token_id: None = None

    def __call__(self, text: str) -> list[int]:
        return self.tokenize(text)


class Vocabulary:
    """The vocabulary of a model that is loaded from `path`, and must not be freed. pointer: llama.cpp's."""

    def __init__(self, library: Any, model: Any, path: Path) -> None:
        self._library = library
        self._path = path
        self.pointer = library.llama_model_get_vocab(model)
        self.size = int(library.llama_vocab_n_tokens(self.pointer))

    def tokenize(self, text: str) -> list[int]:
        """Tokenize plain text. Nothing in it becomes a control token, and none is added."""
        return self._tokenize(text.encode("utf-8", "replace"), special=False)

    def control_id(self, name: str) -> int:
        """Return the id of a control token such as `</s>`. Raises `BundleError` if the vocabulary has no such token."""
        ids = self._tokenize(name.encode(), special=True)
        if len(ids) == 1 and self._library.llama_vocab_is_control(self.pointer, ids[0]):
            return ids[0]
        raise BundleError(f"{self._path} has no control token {name!r}, which the bundle's prompt template needs.")

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens have none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = self._library.llama_token_to_piece(self.pointer, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    @cached_property
    def textless_tokens(self) -> np.ndarray[Any, Any]:
        """Ids of tokens that have no bytes and end no answer: control tokens and the unknown token."""
        ids = [token for token in self._without_bytes if not self.is_end_token(token)]
        return np.array(ids, np.intp)

    @cached_property
    def for_llguidance(self) -> LLTokenizer:
        """The vocabulary as LLGuidance needs it. Made once: of 49152 tokens it takes 0.2 s, import included.

        Without slices: those take another 0.06 s, and save 0.5 ms for each state of the grammar where most tokens may
        come next. Raises `BundleError` if no token ends an answer.
        """
        from llguidance import LLTokenizer, TokenizerWrapper

        special = self._without_bytes
        ends = [token for token in special if self.is_end_token(token)]
        if not ends:
            raise BundleError(f"{self._path} has no token that ends an answer, so that none can follow a grammar.")
        pieces = [self.piece(token) for token in range(self.size)]
        for token in special:  # LLGuidance panics at the name of one, <|im_end|> say, where it has no names
            pieces[token] = self._library.llama_vocab_get_text(self.pointer, token)
        tokens = _Tokens(pieces, special, ends[0], self.tokenize)
        return LLTokenizer(TokenizerWrapper(tokens), eos_token=ends, slices=[])

    @cached_property
    def _without_bytes(self) -> list[int]:
        """Ids of control tokens, the unknown token and the end token, whatever the file says that the latter is."""
        library = self._library
        kinds = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_UNKNOWN
        end = library.llama_vocab_eos(self.pointer)
        attributes = (library.llama_vocab_get_attr(self.pointer, token) for token in range(self.size))
        return [token for token, kind in enumerate(attributes) if kind & kinds or token == end]

    def token_texts(self) -> list[str]:
        """Return every token as the vocabulary spells it, e.g. `▁US`."""
        get = self._library.llama_vocab_get_text
        return [get(self.pointer, i).decode("utf-8", "replace") for i in range(self.size)]

    def is_end_token(self, token: int) -> bool:
        """Whether the vocabulary marks a token as the end of an answer."""
        return bool(self._library.llama_vocab_is_eog(self.pointer, token))

    def _tokenize(self, text: bytes, special: bool) -> list[int]:
        if self._library.llama_vocab_type(self.pointer) == self._library.LLAMA_VOCAB_TYPE_NONE:
            raise BundleError(f"{self._path} has no tokenizer.")
        if len(text) > MAX_TEXT_BYTES:
            raise ContextOverflowError(f"The prompt has {len(text)} bytes; at most {MAX_TEXT_BYTES} are accepted.")
        capacity = len(text) + 2  # a token has at least one byte; one more for SentencePiece's dummy prefix
        buffer = (self._library.llama_token * capacity)()
        count = self._library.llama_tokenize(self.pointer, text, len(text), buffer, capacity, False, special)
        if count < 0:
            raise BundleError(
                f"{self._path} needs {-count} tokens for a text of {len(text)} bytes: its vocabulary is broken."
            )
        return list(buffer[:count])
