"""The draft model of speculative decoding (arXiv:2211.17192): a small language model that proposes tokens.

It needs the same vocabulary and sees no pictures: their positions are left out of its prompt (arXiv:2404.08856 found
that to work as well). `speculation` verifies what it proposes, so it changes no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from llava_edge import gguf
from llava_edge.errors import MissingError, UsageError
from llava_edge.paths import is_file
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel


def check_draft(path: Path, target: gguf.Gguf) -> None:
    """Check a draft model by its header, before anything is loaded.

    Raises `MissingError`, `BundleError`, or `UsageError` if its vocabulary differs from `target`'s, except that one may
    have additional tokens at the end.
    """
    if not is_file(str(path)):
        raise MissingError(f"There is no draft model {path}; expected a GGUF file.")
    header = gguf.read(path)
    gguf.check_language(header)
    draft_tokens, target_tokens = (file.items("tokenizer.ggml.tokens") for file in (header, target))
    pairs = zip(draft_tokens, target_tokens, strict=False)
    different = next((i for i, (draft, token) in enumerate(pairs) if draft != token), None)
    if different is not None or not draft_tokens:
        raise UsageError(
            f"The vocabulary of {path} differs from that of the model it should draft for, from token "
            f"{different or 0} on: choose a smaller model of the same family."
        )


class DraftModel:
    """A text-only model in a GGUF file that passed `check_draft`.

    repack, verbose: as in `LanguageModel`.
    """

    def __init__(
        self, path: Path, target: LanguageModel, threads: int, *, repack: bool = True, verbose: bool = False
    ) -> None:
        header = gguf.read(path)
        context = min(target.context_size, header.number("llama.context_length"))
        self._language = LanguageModel(
            path, header=header, context=context, threads=threads, repack=repack, verbose=verbose
        )
        self._shared_tokens = min(target.vocabulary.size, self._language.vocabulary.size)

    def close(self) -> None:
        """Free the model. Harmless when repeated."""
        self._language.close()

    def propose(self, keys: Sequence[Key], count: int, cancel: threading.Event) -> list[int]:
        """Return up to `count` tokens to follow `keys`; none if its context is full or it lacks one of their tokens.

        Fewer than `count` if it predicts a token that the target lacks. Raises `CancelledError`.
        """
        language = self._language
        text = [key for key in keys if isinstance(key, int)]
        if not text or max(text) >= language.vocabulary.size or len(text) + count > language.context_size:
            return []
        language.evaluate_tokens(text[language.keep_common_prefix(text) :], cancel)
        proposal = [language.greedy_token()]
        while len(proposal) < count and proposal[-1] < self._shared_tokens:
            language.evaluate_tokens(proposal[-1:], cancel)
            proposal.append(language.greedy_token())
        return proposal if proposal[-1] < self._shared_tokens else proposal[:-1]
