"""Prompt templates of the published LLaVAs, as data for `llava_edge.prompt`.

Every text must match, byte for byte, what a model was trained on. Unless noted otherwise they come from the versions of
llava/conversation.py over the years.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_edge.errors import UsageError

Style = Literal["two", "single", "llama_2", "chatml", "plain"]


@dataclass(frozen=True)
class Template:
    """A prompt template. Styles are named after LLaVA's `SeparatorStyle` (chatml: MPT).

    style "two": `SYSTEM USER: q ASSISTANT: a</s>USER: ...` (Vicuna v1).
    style "single": `SYSTEM###Human: q###Assistant: a###Human: ...` (Vicuna v0). Here `###` is text, so a user can type
    it and thereby end a turn, as in the original.
    style "llama_2": `[INST] <<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\nq [/INST] a </s><s>[INST] ...`. Its brackets are text too.
    style "chatml": `<|im_start|>role\\n...<|im_end|>` with `newline` after each end token.
    style "plain": image and caption only, stage 1 of training.

    bos: control token the tokenizer puts first. end: what closes an answer; a control token except in style "single".
    turn_start: control token before every question but the first.
    example: question and answer placed before every conversation.
    image_last: images come after the question, as in April 2023.
    """

    style: Style
    system: str
    bos: str | None
    end: str
    newline: str = ""
    turn_start: str = ""
    example: tuple[str, str] | None = None
    image_last: bool = False

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Control tokens that end an answer."""
        return (self.end,) if self.style in ("two", "llama_2", "chatml") else ()

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end an answer: LLaMA tokenizes `###` in several ways, so only the decoded text tells."""
        return (self.end,) if self.style == "single" else ()

    @property
    def controls(self) -> tuple[str, ...]:
        """Every control token that a prompt of this template may contain."""
        names = (self.bos, self.turn_start, "<|im_start|>" if self.style == "chatml" else "", *self.stop_tokens)
        return tuple(dict.fromkeys(name for name in names if name))


_ASSISTANT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_HUMAN_ASSISTANT = _ASSISTANT.format(who="human")

# No space between the sentences: that is how the models of 2023 before v1.0 were trained.
_WAIV = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)

_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."

_ENERGY_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template("two", _ASSISTANT.format(who="user"), "<s>", "</s>"),
    "llava_v1": Template("two", _HUMAN_ASSISTANT, "<s>", "</s>"),
    "llava_v1_1": Template("two", _WAIV, "<s>", "</s>"),  # called llava_v1 in July 2023; the v1-1 weights
    "llava_v0": Template("single", _HUMAN_ASSISTANT, "<s>", "###"),
    "v0": Template("single", _HUMAN_ASSISTANT, "<s>", "###", example=_ENERGY_EXAMPLE),
    # The v0 weights of April 2023.
    "multimodal": Template(
        "single", _WAIV, "<s>", "###", example=("Hi!", "Hi there!  How can I help you today?\n"), image_last=True
    ),
    "llava_llama_2": Template("llama_2", _LLAMA_2, "<s>", "</s>", turn_start="<s>"),
    "mistral_instruct": Template("llama_2", "", "<s>", "</s>"),
    "mpt": Template("chatml", _MPT, None, "<|im_end|>"),
    "chatml_direct": Template("chatml", "Answer the questions.", None, "<|im_end|>"),  # v1.6-34b
    "plain": Template("plain", "", "<s>", "</s>"),
    "plain_chatml": Template("plain", "", None, "<|im_end|>"),  # for a vocabulary without BOS
    "chatml": Template("chatml", "", None, "<|im_end|>", newline="\n"),  # SmolLM2's, with no system turn
}


def get_template(name: str) -> Template:
    """Look up a built-in template by name. Raises `UsageError` with the valid names."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise UsageError(f"Prompt template {name!r} is not known; choose one of {', '.join(TEMPLATES)}.") from None
