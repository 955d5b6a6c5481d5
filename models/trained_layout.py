"""The prompt layout a LLaVA was trained with, guessed from its language model: few files name it."""

from __future__ import annotations

_YI_34B_WIDTH = 7168  # hidden size; LLaVA-1.6-34B is built on it


def guess_template(*, hidden_size: object, unlimited_mistral: bool) -> tuple[str, str]:
    """Return the layout of the published LLaVAs with such a language model, and the reason.

    unlimited_mistral: whether it is a Mistral without sliding window; the one of 2023 with a window is BakLLaVA's.
    """
    if unlimited_mistral:
        return "mistral_instruct", "its language model is a Mistral without sliding window, as LLaVA 1.6's"
    if hidden_size == _YI_34B_WIDTH:
        return "chatml_direct", "its language model is as wide as Yi-34B"
    return "vicuna_v1", "that is what LLaVA 1.0, 1.5 and 1.6 on Vicuna are trained with"
