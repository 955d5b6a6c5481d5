"""A small language model that guesses what the large one will say next (speculative decoding, arXiv:2211.17192).

It needs the same vocabulary and sees no pictures: their positions are left out of its prompt (arXiv:2404.08856 found
that to work as well). What it guesses is checked by `speculation`, so it changes no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from llava_edge import gguf
from llava_edge.errors import MissingError, UsageError
from llava_edge.paths import is_file
from llava_edge.runtimes.language import Key, LanguageModel


def check_draft(path: Path, target: gguf.Gguf) -> None:
    """By the headers alone, before anything is loaded.

    Raises `MissingError`, `BundleError`, or `UsageError` if its vocabulary is not `target`'s: one of them may have more
    tokens at the end.
    """
    if not is_file(str(path)):
        raise MissingError(f"There is no draft model {path}; a GGUF file was expected.")
    header = gguf.read(path)
    gguf.check_language(header)
    mine, others = (file.items("tokenizer.ggml.tokens") for file in (header, target))
    different = next((i for i, pair in enumerate(zip(mine, others, strict=False)) if pair[0] != pair[1]), None)
    if different is not None or not mine:
        raise UsageError(
            f"{path} has another vocabulary than the model it should guess for (token {different or 0} differs): "
            "choose a smaller model of the same family."
        )


class Draft:
    """The model in a GGUF file of text alone, which `check_draft` took.

    repack, verbose: as of `LanguageModel`.
    """

    def __init__(
        self, path: Path, target: LanguageModel, threads: int, *, repack: bool = True, verbose: bool = False
    ) -> None:
        trained = gguf.read(path).number("llama.context_length", 1, 1 << 24)
        context = min(target.context_size, trained)
        self._language = LanguageModel(path, context=context, threads=threads, repack=repack, verbose=verbose)
        self._tokens = min(target.vocab_size, self._language.vocab_size)

    def close(self) -> None:
        """Free it; harmless when repeated."""
        self._language.close()

    def guess(self, keys: Sequence[Key], count: int, cancel: threading.Event) -> list[int]:
        """Up to `count` tokens after `keys`, fewer when it has no room or no such token. Raises `CancelledError`."""
        language = self._language
        text = [key for key in keys if isinstance(key, int)]
        if not text or max(text) >= language.vocab_size or len(text) + count > language.context_size:
            return []
        language.evaluate_tokens(text[language.keep(text) :], cancel)
        guess = [language.best()]
        while len(guess) < count and guess[-1] < self._tokens:
            language.evaluate_tokens(guess[-1:], cancel)
            guess.append(language.best())
        return guess if guess[-1] < self._tokens else guess[:-1]
