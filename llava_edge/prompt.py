"""Messages -> prompt pieces -> token ids. Used by the trainer, the exporter and the runtime alike.

A prompt is a list of `Piece`s: plain text, a control token by name, or an image slot. Control tokens are
never part of text, so nothing a user types can become one: text is tokenized without parsing special tokens.

Tokenization follows LLaVA's rule (llava/mm_utils.py, tokenizer_image_token): each segment of text between
images and control tokens is tokenized on its own, with a single BOS at the start. With SentencePiece each
segment therefore gets its own dummy prefix; only after control tokens do tokenizers differ (`AfterControl`).

This module knows nothing about tokenizer files, tensors or engines; the caller passes the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Literal

from llava_edge.errors import UsageError
from llava_edge.templates import Style, Template, get_template

IMAGE_TOKEN_INDEX = -200  # llava/constants.py; stands for one image in a list of ids, never an embedding row
IGNORE_INDEX = -100  # llava/constants.py; label of tokens without loss
IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
# How text right after a control token is tokenized. LLaMA's tokenizers differ; for `USER` after `</s>`:
#   prefix  with SentencePiece's dummy prefix, as everywhere: `▁US ER`, 3148 1001 (legacy transformers, llama.cpp)
#   bare    without it: `USER`, 11889 (transformers from 4.34 on with legacy = false)
#   cut     the prefix cut off the first token: `US ER`, 3308 1001 (transformers 4.31 to 4.33 with legacy = false)
AfterControl = Literal["prefix", "bare", "cut"]
EncodeText = Callable[[str], list[int]]
ControlId = Callable[[str], int]


@dataclass(frozen=True)
class Message:
    """One turn. `images` is the number of images in it; the template puts them before or after the text."""

    role: Role
    text: str
    images: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of a prompt. `trained` marks the pieces of an answer, whose tokens get labels (LLaVA's label rule).

    kind "bos": the control token that the tokenizer itself puts first. Text after it is tokenized like any text.
    """

    kind: Literal["text", "control", "bos", "image"]
    text: str = ""
    trained: bool = False


def render(
    name: str, messages: Sequence[Message], markers: Sequence[str] = (), *, unclosed: bool = False
) -> list[Piece]:
    """Convert messages to pieces. If the last one is the user's, the assistant's turn is opened.

    markers: names of the two control tokens around every image, for models that have them (mm_use_im_start_end).
    unclosed: also leave an answer at the end open, so that generation continues it.
    Raises `UsageError` when the turns do not alternate user / assistant after an optional system message.
    """
    layout = get_template(name)
    system, turns = _split_system(layout, messages)
    pieces = [Piece("bos", layout.bos)] if layout.bos else []
    for piece in _LAYOUTS[layout.style](layout, system, turns):
        if piece.kind == "image" and markers:
            pieces += [Piece("control", markers[0]), piece, Piece("control", markers[1])]
        else:
            pieces.append(piece)
    return _drop_closing(pieces, turns[-1].text.strip()) if unclosed and turns[-1].role == "assistant" else pieces


def _drop_closing(pieces: Sequence[Piece], answer: str) -> list[Piece]:
    """Drop what closes the answer at the end; if the answer is empty, also the space before it."""
    last = max(i for i, piece in enumerate(pieces) if piece.kind == "text" and piece.trained)
    text = pieces[last].text
    return [*pieces[:last], replace(pieces[last], text=text[: text.index(answer) + len(answer)] if answer else "")]


def _split_system(layout: Template, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    turns = list(messages)
    system = layout.system
    if turns and turns[0].role == "system":
        system = turns.pop(0).text
    if not turns:
        raise UsageError("A prompt needs at least one user message.")
    for i, turn in enumerate(turns):
        if turn.role != ("user" if i % 2 == 0 else "assistant"):
            raise UsageError("Messages must alternate user, assistant, user, ... after an optional system message.")
        if turn.images and turn.role != "user":
            raise UsageError("Only user messages can have images.")
    return system, turns


def _question(layout: Template, turn: Message) -> list[Piece]:
    """`<image>\\n` for each image, then the text (llava/train/train.py, preprocess_multimodal)."""
    pieces: list[Piece] = []
    for _ in range(turn.images):
        pieces += [Piece("text", "\n"), Piece("image")] if layout.image_last else [Piece("image"), Piece("text", "\n")]
    text = Piece("text", turn.text.strip())
    return [text, *pieces] if layout.image_last else [*pieces, text]


def _two(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    pieces = [Piece("text", system + " ")] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [Piece("text", "USER: "), *_question(layout, turn), Piece("text", " ASSISTANT:")]
        else:
            # The separating space belongs to the first answer token in SentencePiece.
            pieces += [Piece("text", " " + turn.text.strip(), True), Piece("control", layout.end, True)]
    return pieces


def _single(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    end = layout.end
    pieces = [Piece("text", system + end)] if system else []
    if layout.example:
        question, answer = layout.example
        pieces.append(Piece("text", f"Human: {question}{end}Assistant: {answer}{end}"))
    for turn in turns:
        if turn.role == "user":
            pieces += [Piece("text", "Human: "), *_question(layout, turn), Piece("text", end + "Assistant:")]
        else:
            pieces.append(Piece("text", f" {turn.text.strip()}{end}", True))
    return pieces


def _llama_2(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    system_block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    turn_start = [Piece("control", layout.turn_start)] if layout.turn_start else []
    pieces: list[Piece] = []
    for i, turn in enumerate(turns):
        if turn.role == "user":
            pieces += turn_start if i else []
            pieces += [Piece("text", "[INST] " + ("" if i else system_block)), *_question(layout, turn)]
            pieces.append(Piece("text", " [/INST]"))
        else:
            pieces += [Piece("text", f" {turn.text.strip()} ", True), Piece("control", layout.end, True)]
    return pieces


def _chatml(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    start, end = Piece("control", "<|im_start|>"), Piece("control", layout.end)
    after = Piece("text", layout.newline)
    pieces = [start, Piece("text", "system\n" + system), end, after] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [start, Piece("text", "user\n"), *_question(layout, turn), end, after]
            pieces += [start, Piece("text", "assistant\n")]
        else:
            pieces += [Piece("text", turn.text.strip(), True), Piece("control", layout.end, True), after]
    return pieces


def _plain(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    """Stage 1 of training: image, caption, newline; the question is dropped. No end token.

    LLaVA's preprocess_plain asserts the same as is checked here.
    """
    if not turns[0].images or len(turns) > 2:
        raise UsageError("This prompt layout is for captions, not for conversations: expected one message with images.")
    pieces = [Piece("image")] * turns[0].images
    if len(turns) > 1:
        pieces.append(Piece("text", turns[1].text.strip() + "\n", True))
    return pieces


_LAYOUTS: dict[Style, Callable[[Template, str, list[Message]], list[Piece]]] = {
    "two": _two,
    "single": _single,
    "llama_2": _llama_2,
    "chatml": _chatml,
    "plain": _plain,
}


def encode(
    pieces: Sequence[Piece],
    encode_text: EncodeText,
    control_id: ControlId,
    encode_after_control: EncodeText | None = None,
) -> list[int]:
    """Convert pieces to token ids, with `IMAGE_TOKEN_INDEX` for each image slot."""
    return encode_with_labels(pieces, encode_text, control_id, encode_after_control)[0]


def encode_with_labels(
    pieces: Sequence[Piece],
    encode_text: EncodeText,
    control_id: ControlId,
    encode_after_control: EncodeText | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of equal length; labels are `IGNORE_INDEX` except for answers and their end tokens.

    encode_after_control: for text right after a control token other than BOS, where it differs (`AfterControl`).
    Adjacent text is tokenized as one segment. Where an answer begins or ends inside a segment, the token there is found
    as LLaVA does: by the token count of the text before it, tokenized alone. If that text is tokenized differently
    within the segment (a tokenization mismatch), all labels of the sample are masked.
    """
    ids: list[int] = []
    labels: list[int] = []
    mismatch = False
    tokenize = encode_text
    for segment in _segments(pieces):
        kind = segment[0].kind
        if kind == "image":
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        elif kind != "text":
            token = control_id(segment[0].text)
            ids.append(token)
            labels.append(token if segment[0].trained else IGNORE_INDEX)
        else:
            segment_ids = tokenize("".join(piece.text for piece in segment))
            segment_labels = _labels(segment, segment_ids, tokenize)
            mismatch |= segment_labels is None
            ids += segment_ids
            labels += segment_labels or []
        tokenize = encode_after_control if kind == "control" and encode_after_control else encode_text
    if mismatch:
        labels = [IGNORE_INDEX] * len(ids)
    return ids, labels


def _segments(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group adjacent text pieces and drop empty ones; each other piece is a group of its own."""
    segments: list[list[Piece]] = []
    for piece in pieces:
        if piece.kind == "text" and not piece.text:
            continue
        if piece.kind == "text" and segments and segments[-1][0].kind == "text":
            segments[-1].append(piece)
        else:
            segments.append([piece])
    return segments


def _labels(segment: list[Piece], segment_ids: list[int], encode_text: EncodeText) -> list[int] | None:
    """Labels of a text segment; None on a tokenization mismatch."""
    labels: list[int] = []
    grouped = groupby(segment, attrgetter("trained"))
    groups = [(trained, "".join(piece.text for piece in group)) for trained, group in grouped]
    before = ""
    for i, (trained, text) in enumerate(groups):
        before += text
        start = encode_text(before) if i + 1 < len(groups) else segment_ids
        if segment_ids[: len(start)] != start:
            return None
        labels += start[len(labels) :] if trained else [IGNORE_INDEX] * (len(start) - len(labels))
    return labels
