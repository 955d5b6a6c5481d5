"""What llama.cpp allows an answer to be, given a grammar."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from llava_edge import Llava, Options
from llava_edge.runtimes.sampling import Sampler


def sample_json(llava: Llava, grammar: str, seed: int, longest: int = 200) -> Any:
    """What an answer at a high temperature is, or None if it was cut off."""
    answer = llava.ask("?", options=Options(grammar=grammar, temperature=3.0, seed=seed, max_tokens=longest))
    return json.loads(answer.text) if answer.finish_reason == "stop" else None


def allows(llava: Llava, grammar: str, text: str) -> bool:
    """Whether llama.cpp lets the tokens of `text`, and then the end, pass."""
    with allowing(llava, grammar) as allowed:
        return allowed(text)


@contextmanager
def allowing(llava: Llava, grammar: str) -> Iterator[Callable[[str], bool]]:
    """`allows` of many texts: the grammar is parsed once."""
    language = llava._engine.model.scheduler._language
    library, vocabulary = language.library, language.vocabulary
    end = library.llama_vocab_eos(vocabulary.pointer)

    def allowed(text: str) -> bool:
        at_start = library.llama_sampler_clone(sampler._grammar)
        try:
            return all(passes(library, at_start, token) for token in [*vocabulary.tokenize(text), end])
        finally:
            library.llama_sampler_free(at_start)

    with closing(Sampler(language, Options(grammar=grammar))) as sampler:
        yield allowed


def passes(library: Any, grammar: Any, token: int) -> bool:
    data = library.llama_token_data(token, 0.0, 0.0)
    choice = library.llama_token_data_array(ctypes.pointer(data), 1, -1, False)
    library.llama_sampler_apply(grammar, ctypes.byref(choice))
    if data.logit == 0:
        library.llama_sampler_accept(grammar, token)
    return bool(data.logit == 0)
