"""Prompts byte for byte and id for id as LLaVA was trained on them, and labels on answers alone.

The golden ids are of the published liuhaotian/llava-v1.5-7b; the LLaMA vocabulary is cut down to the pieces that can
occur in these texts, so that merging them gives exactly what the whole vocabulary gives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llava_edge import prompt
from llava_edge.errors import UsageError
from llava_edge.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Message, Piece
from llava_edge.templates import TEMPLATES

SU = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def as_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one string, `<image>` for a picture."""
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)


# (template, messages, the whole prompt)
STRINGS: dict[str, tuple[str, list[Message], str]] = {
    "vicuna_v1, two turns": (
        "vicuna_v1",
        [Message("user", "What is this?", 1), Message("assistant", "A cat."), Message("user", "Sure?")],
        f"<s>{SU} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    ),
    "vicuna_v1, closed": (
        "vicuna_v1",
        [Message("user", "Hi"), Message("assistant", " Hello. \n")],
        f"<s>{SU} USER: Hi ASSISTANT: Hello.</s>",
    ),
    "own system text": (
        "vicuna_v1",
        [Message("system", "Be brief."), Message("user", "Hi")],
        "<s>Be brief. USER: Hi ASSISTANT:",
    ),
    "two pictures": (
        "vicuna_v1",
        [Message("system", ""), Message("user", "Compare.", 2)],
        "<s>USER: <image>\n<image>\nCompare. ASSISTANT:",
    ),
    "plain": ("plain", [Message("user", "Describe.", 1), Message("assistant", "a cat")], "<s><image>a cat\n"),
    "plain_chatml": ("plain_chatml", [Message("user", "x", 1), Message("assistant", "a cat")], "<image>a cat\n"),
    "plain, open": ("plain", [Message("user", "Describe.", 1)], "<s><image>"),
    "chatml, two turns, system": (
        "chatml",
        [
            Message("system", "Be brief."),
            Message("user", "What is this?", 1),
            Message("assistant", "A cat."),
            Message("user", "Sure?"),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize(("template", "messages", "expected"), STRINGS.values(), ids=STRINGS)
def test_prompt_strings(template: str, messages: list[Message], expected: str) -> None:
    assert as_text(prompt.render(template, messages)) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_at_the_end_can_stay_open(name: str) -> None:
    """Of an empty one nothing is left."""
    question = Message("user", "Hi", 1)
    opened = as_text(prompt.render(name, [question]))
    for text, left in (("", ""), (" \n", ""), (" The sky \n", "The sky"), ("#", "#")):
        turns = [question, Message("assistant", text)]
        unclosed = as_text(prompt.render(name, turns, unclosed=True))
        assert unclosed.removeprefix(opened).removeprefix(" ") == left
        assert as_text(prompt.render(name, turns)).startswith(unclosed)
    if TEMPLATES[name].style != "plain":
        turns.append(question)
        assert prompt.render(name, turns, unclosed=True) == prompt.render(name, turns)


@pytest.mark.parametrize("name", ["plain", "plain_chatml"])
def test_a_layout_for_captions_refuses_what_it_would_drop(name: str) -> None:
    """LLaVA's preprocess_plain asserts that there is an image, and two messages at most."""
    question, answer = Message("user", "Hi", 1), Message("assistant", "a cat")
    for turns in ([Message("user", "Hi")], [question, answer, question]):
        with pytest.raises(UsageError, match="expected one message with images"):
            prompt.render(name, turns)


@pytest.mark.parametrize(
    "roles", [[], ["system"], ["assistant"], ["user", "user"], ["user", "system"], ["user", "assistant", "assistant"]]
)
def test_turns_must_alternate(roles: list[prompt.Role]) -> None:
    for template in TEMPLATES:
        with pytest.raises(UsageError):
            prompt.render(template, [Message(role, "x") for role in roles])


def test_answers_have_no_images() -> None:
    with pytest.raises(UsageError, match="Only user messages can have images"):
        prompt.render("vicuna_v1", [Message("user", "x"), Message("assistant", "x", 1)])


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'llama_3' is not known; choose one of .*vicuna_v1.*chatml"):
        prompt.render("llama_3", [Message("user", "x")])


# LLaMA's SentencePiece -------------------------------------------------------------------------------------------

DATA = Path(__file__).parent / "data"
PIECES: dict[str, list[int]] = json.loads((DATA / "llama_pieces.json").read_text("utf-8"))["pieces"]  # [id, score]
CONTROL = {"<s>": 1, "</s>": 2}


def spm(text: str) -> list[int]:
    """SentencePiece BPE: dummy prefix, then merge the best-scored pair, leftmost first, until none is a piece."""
    parts = list("▁" + text.replace(" ", "▁"))
    while pairs := [(-PIECES[a + b][1], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [n for part in parts for n in ([PIECES[part][0]] if part in PIECES else [3 + b for b in part.encode()])]


GOLDEN = [
    *(1, 319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892),
    *(13173, 29892, 322, 1248, 568, 6089, 304, 278, 5199, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871, -200),
    *(29871, 13, 12148, 8453, 445, 1967, 297, 9493, 29889, 319, 1799, 9047, 13566, 29901),
]


@pytest.mark.parametrize(("template", "word"), [("llava_v1", 5199), ("vicuna_v1", 1404)])
def test_golden_ids_of_llava_1_5(template: str, word: int) -> None:
    pieces = prompt.render(template, [Message("user", "Please describe this image in detail.", 1)])
    expected = [word if n == 5199 else n for n in GOLDEN]
    assert len(expected) == 50
    assert prompt.encode(pieces, spm, CONTROL.__getitem__) == expected


def test_golden_labels_of_stage_one() -> None:
    pieces = prompt.render("plain", [Message("user", "thrown away", 1), Message("assistant", "a cat on a mat")])
    ids, labels = prompt.encode_with_labels(pieces, spm, CONTROL.__getitem__)
    assert ids == [1, -200, 263, 6635, 373, 263, 1775, 13]
    assert labels == [IGNORE_INDEX, IGNORE_INDEX, 263, 6635, 373, 263, 1775, 13]


# A GPT-2 style byte-level BPE, as SmolLM2 has --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Bytes, some merges, ChatML's control tokens; parsing of control tokens inside text is off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(["user\nWhat is this?", "assistant\nA cat. \n\n The answer is yes."] * 4, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_chatml(bpe: Tokenizer, turns: Sequence[Message]) -> tuple[list[int], list[int]]:
    def encode_text(text: str) -> list[int]:
        ids: list[int] = bpe.encode(text, add_special_tokens=False).ids
        return ids

    return prompt.encode_with_labels(prompt.render("chatml", turns), encode_text, bpe.token_to_id)


LINES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(conversation=st.lists(st.tuples(LINES, LINES), min_size=1, max_size=4), images=st.integers(0, 2))
def test_chatml_labels_hold_for_any_text(bpe: Tokenizer, conversation: list[tuple[str, str]], images: int) -> None:
    turns: list[Message] = []
    for i, (question, answer) in enumerate(conversation):
        turns += [Message("user", question, images if i == 0 else 0), Message("assistant", answer)]
    ids, labels = encode_chatml(bpe, turns)
    end = bpe.token_to_id("<|im_end|>")
    assert ids.count(IMAGE_TOKEN_INDEX) == images
    assert ids.count(end) == 2 * len(conversation)
    trained = [label for label in labels if label != IGNORE_INDEX]
    answers = "".join(answer.strip() + "<|im_end|>" for _, answer in conversation)
    assert bpe.decode(trained, skip_special_tokens=False) == answers
    # The label stands on the very token it names, and the newline after the end token is not trained.
    assert all(label in (IGNORE_INDEX, n) for n, label in zip(ids, labels, strict=True))
    assert labels[-2:] == [end, IGNORE_INDEX]
    rest = [n for n, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX and n != IMAGE_TOKEN_INDEX]
    masked = prompt.render("chatml", turns)
    expected = "".join(piece.text for piece in masked if not piece.trained)
    assert bpe.decode(rest, skip_special_tokens=False) == expected


def test_a_token_over_the_border_masks_the_whole_sample() -> None:
    """If the answer's first letters merge with what stands before, LLaVA's rule cannot tell them apart."""

    def pairs(text: str) -> list[int]:
        return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]

    pieces = [Piece("text", "odd"), Piece("text", "answer", True), Piece("control", "</s>", True)]
    assert prompt.encode_with_labels(pieces, pairs, CONTROL.__getitem__)[1] == [IGNORE_INDEX] * 6
    longer = [*pieces, Piece("text", "even")]  # what comes after it cannot help
    assert prompt.encode_with_labels(longer, pairs, CONTROL.__getitem__)[1] == [IGNORE_INDEX] * 8
    pieces[0] = Piece("text", "even")
    assert prompt.encode_with_labels(pieces, pairs, CONTROL.__getitem__)[1][2:] == [*pairs("answer"), 2]
