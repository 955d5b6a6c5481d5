"""Messages -> prompt pieces -> token ids. Used by the trainer, the exporter and the runtime alike.

A prompt is a list of `Piece`s: plain text, a control token by name, or an image slot. Control tokens never
travel inside text, so nothing a user types can become one: text is tokenized with special parsing off.

Tokenization follows LLaVA's rule (llava/mm_utils.py, tokenizer_image_token): every stretch of text between
images and control tokens is tokenized on its own, and only one BOS stands at the start. With SentencePiece
each stretch therefore gets its own dummy prefix; only behind control tokens tokenizers differ (`AfterControl`).

This module knows nothing about tokenizers' files, tensors or engines; the caller hands in the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Literal

from llava_edge.errors import UsageError
from llava_edge.templates import Style, Template, template

IMAGE_TOKEN_INDEX = -200  # llava/constants.py; stands for one image in a list of ids, never an embedding row
IGNORE_INDEX = -100  # llava/constants.py; a label that is not trained
IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
# How the text right behind a control token begins. LLaMA's tokenizers differ, here in `USER` behind `</s>`:
#   prefix  with SentencePiece's dummy prefix, as everywhere: `▁US ER`, 3148 1001 (legacy transformers, llama.cpp)
#   bare    without: `USER`, 11889 (transformers from 4.34 on with legacy = false)
#   cut     the prefix cut off the first token: `US ER`, 3308 1001 (transformers 4.31 to 4.33 with legacy = false)
AfterControl = Literal["prefix", "bare", "cut"]
EncodeText = Callable[[str], list[int]]
ControlId = Callable[[str], int]


@dataclass(frozen=True)
class Message:
    """One turn. `images` counts the pictures shown with it; the template says on which side of the text they stand."""

    role: Role
    text: str
    images: int = 0


@dataclass(frozen=True)
class Piece:
    """One stretch of a prompt. `trained` marks what an answer consists of (LLaVA's label rule).

    kind "bos": the control token that the tokenizer itself puts first. Text behind it begins like any text.
    """

    kind: Literal["text", "control", "bos", "image"]
    text: str = ""
    trained: bool = False


def render(
    name: str, messages: Sequence[Message], markers: Sequence[str] = (), *, unclosed: bool = False
) -> list[Piece]:
    """Lay messages out. If the last one is the user's, the assistant's turn is opened and left open.

    markers: names of the two control tokens around every picture, for models that have them (mm_use_im_start_end).
    unclosed: leave an answer at the end open, too, so that what comes next goes on with it.
    Raises `UsageError` when the turns do not alternate user / assistant after an optional system message.
    """
    layout = template(name)
    system, turns = _split_system(layout, messages)
    pieces = [Piece("bos", layout.bos)] if layout.bos else []
    for piece in _LAYOUTS[layout.style](layout, system, turns):
        if piece.kind == "image" and markers:
            pieces += [Piece("control", markers[0]), piece, Piece("control", markers[1])]
        else:
            pieces.append(piece)
    return _cut(pieces, turns[-1].text.strip()) if unclosed and turns[-1].role == "assistant" else pieces


def _cut(pieces: Sequence[Piece], answer: str) -> list[Piece]:
    """Without what closes the answer at the end; nothing of an empty one is left."""
    last = max(i for i, piece in enumerate(pieces) if piece.kind == "text" and piece.trained)
    text = pieces[last].text
    return [*pieces[:last], replace(pieces[last], text=text[: text.rindex(answer) + len(answer)] if answer else "")]


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
            raise UsageError("Only messages of the user can have images.")
    return system, turns


def _question(layout: Template, turn: Message) -> list[Piece]:
    """`<image>\\n` for every picture, then the text (llava/train/train.py, preprocess_multimodal)."""
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
    about = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    again = [Piece("control", layout.again)] if layout.again else []
    pieces: list[Piece] = []
    for i, turn in enumerate(turns):
        if turn.role == "user":
            pieces += again if i else []
            pieces += [Piece("text", "[INST] " + ("" if i else about)), *_question(layout, turn)]
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
    """Stage 1: the question is thrown away; image, caption, newline. No end token."""
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
    """Token ids, with `IMAGE_TOKEN_INDEX` for each image slot."""
    return encode_with_labels(pieces, encode_text, control_id, encode_after_control)[0]


def encode_with_labels(
    pieces: Sequence[Piece],
    encode_text: EncodeText,
    control_id: ControlId,
    encode_after_control: EncodeText | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of equal length; labels are `IGNORE_INDEX` except for answers and their end tokens.

    encode_after_control: for text right behind a control token other than BOS, where it differs (`AfterControl`).
    Neighbouring text is tokenized as one stretch. Where an answer begins or ends inside a stretch, the token there
    is found as LLaVA does: by the length of the stretch's beginning tokenized alone. If that beginning comes out
    as other tokens inside the whole (a tokenization mismatch), the sample's labels are all masked.
    """
    ids: list[int] = []
    labels: list[int] = []
    mismatch = False
    encode_here = encode_text
    for run in _runs(pieces):
        kind = run[0].kind
        if kind == "image":
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        elif kind != "text":
            token = control_id(run[0].text)
            ids.append(token)
            labels.append(token if run[0].trained else IGNORE_INDEX)
        else:
            stretch = encode_here("".join(piece.text for piece in run))
            found = _labels(run, stretch, encode_here)
            mismatch |= found is None
            ids += stretch
            labels += found or []
        encode_here = encode_after_control if kind == "control" and encode_after_control else encode_text
    if mismatch:
        labels = [IGNORE_INDEX] * len(ids)
    return ids, labels


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group neighbouring text pieces; drop empty ones; everything else stands alone."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if piece.kind == "text" and not piece.text:
            continue
        if piece.kind == "text" and runs and runs[-1][0].kind == "text":
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _labels(run: list[Piece], stretch: list[int], encode_text: EncodeText) -> list[int] | None:
    """Labels of a stretch of text; None on a mismatch."""
    labels: list[int] = []
    grouped = groupby(run, attrgetter("trained"))
    groups = [(trained, "".join(piece.text for piece in group)) for trained, group in grouped]
    before = ""
    for i, (trained, text) in enumerate(groups):
        before += text
        start = encode_text(before) if i + 1 < len(groups) else stretch
        if stretch[: len(start)] != start:
            return None
        labels += start[len(labels) :] if trained else [IGNORE_INDEX] * (len(start) - len(labels))
    return labels
