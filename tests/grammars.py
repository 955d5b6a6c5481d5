"""What an answer may be, given a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from llava_edge import Llava, Options
from llava_edge.runtimes.constraints import LarkConstraint


def sample_json(llava: Llava, grammar: str, seed: int, longest: int = 200) -> Any:
    """What an answer at a high temperature is, or None if it was cut off."""
    answer = llava.ask("?", options=Options(grammar=grammar, temperature=3.0, seed=seed, max_tokens=longest))
    return json.loads(answer.text) if answer.finish_reason == "stop" else None


def allows(llava: Llava, grammar: str, text: str) -> bool:
    """Whether the tokens of `text`, and then the end, may be sampled."""
    return allowing(llava, grammar)(text)


def allowing(llava: Llava, grammar: str) -> Callable[[str], bool]:
    """`allows` of many texts: the grammar is parsed once."""
    language = llava._engine.model.scheduler._language
    vocabulary = language.vocabulary
    end = language.library.llama_vocab_eos(vocabulary.pointer)
    followed = LarkConstraint(vocabulary, grammar)

    def allowed(text: str) -> bool:
        followed._matcher.reset()
        return all(_goes_on(followed, token) for token in [*vocabulary.tokenize(text), end])

    return allowed


def _goes_on(followed: LarkConstraint, token: int) -> bool:
    may = bool(followed.allowed(np.array([token])).all())
    if may:
        followed.accept(token)
    return may
