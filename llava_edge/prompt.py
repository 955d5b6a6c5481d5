"""Messages -> prompt pieces -> token ids. Used by the trainer, the exporter and the runtime alike.

A prompt is a list of `Piece`s: plain text, a control token by name, or an image slot. Control tokens never
travel inside text, so nothing a user types can become one: text is tokenized with special parsing off.

Tokenization follows LLaVA's rule (llava/mm_utils.py, tokenizer_image_token): every stretch of text between
images and control tokens is tokenized on its own, and only one BOS stands at the start. With SentencePiece
each stretch therefore gets its own dummy prefix, which is what the published checkpoints were trained on.

This module knows nothing about tokenizers' files, tensors or engines; the caller hands in two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llava_edge.errors import UsageError

IMAGE_TOKEN_INDEX = -200  # llava/constants.py; stands for one image in a list of ids, never an embedding row
IGNORE_INDEX = -100  # llava/constants.py; a label that is not trained
IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
EncodeText = Callable[[str], list[int]]
ControlId = Callable[[str], int]


@dataclass(frozen=True)
class Message:
    """One turn. `images` counts the pictures shown with it; they stand before the text, in order."""

    role: Role
    text: str
    images: int = 0


@dataclass(frozen=True)
class Piece:
    """One stretch of a prompt. `trained` marks what an answer consists of (LLaVA's label rule)."""

    kind: Literal["text", "control", "image"]
    text: str = ""
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """A chat layout as data.

    style "two": `SYSTEM USER: q ASSISTANT: a</s>USER: ...` (Vicuna v1).
    style "chatml": `<|im_start|>role\\n...<|im_end|>` with `newline` after each end token.
    style "plain": image and caption only, stage 1 of training.
    """

    style: Literal["two", "chatml", "plain"]
    system: str
    bos: str | None
    end: str  # control token that closes an answer
    newline: str = ""

    @property
    def stops(self) -> tuple[str, ...]:
        """Control tokens that end an answer."""
        return (self.end,) if self.style != "plain" else ()


_ABOUT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)

# Sources: llava/conversation.py for the first three; `chatml` is SmolLM2's layout with no system turn, and
# `plain_chatml` is stage 1 for a vocabulary without BOS.
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template("two", _ABOUT.format(who="user"), "<s>", "</s>"),
    "llava_v1": Template("two", _ABOUT.format(who="human"), "<s>", "</s>"),
    "plain": Template("plain", "", "<s>", "</s>"),
    "plain_chatml": Template("plain", "", None, "<|im_end|>"),
    "chatml": Template("chatml", "", None, "<|im_end|>", "\n"),
}


def template(name: str) -> Template:
    """Look a built-in template up by name. Raises `UsageError` naming the valid ones."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise UsageError(f"Prompt template {name!r} is not known; choose one of {', '.join(TEMPLATES)}.") from None


def render(name: str, messages: Sequence[Message]) -> list[Piece]:
    """Lay messages out. If the last one is the user's, the assistant's turn is opened and left open.

    Raises `UsageError` when the turns do not alternate user / assistant after an optional system message.
    """
    layout = template(name)
    system, turns = _split_system(layout, messages)
    pieces = [Piece("control", layout.bos)] if layout.bos else []
    if layout.style == "plain":
        return pieces + _plain(turns)
    if layout.style == "two":
        return pieces + _two(layout, system, turns)
    return pieces + _chatml(layout, system, turns)


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
    return system, turns


def _user_text(turn: Message) -> list[Piece]:
    """`<image>\\n` for every picture, then the text (llava/train/train.py, preprocess_multimodal)."""
    pieces: list[Piece] = []
    for _ in range(turn.images):
        pieces += [Piece("image"), Piece("text", "\n")]
    return [*pieces, Piece("text", turn.text.strip())]


def _two(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    pieces = [Piece("text", system + " ")] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [Piece("text", "USER: "), *_user_text(turn), Piece("text", " ASSISTANT:")]
        else:
            # The separating space belongs to the first answer token in SentencePiece.
            pieces += [Piece("text", " " + turn.text.strip(), True), Piece("control", layout.end, True)]
    return pieces


def _chatml(layout: Template, system: str, turns: list[Message]) -> list[Piece]:
    start, end = Piece("control", "<|im_start|>"), Piece("control", layout.end)
    after = Piece("text", layout.newline)
    pieces = [start, Piece("text", "system\n" + system), end, after] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [start, Piece("text", "user\n"), *_user_text(turn), end, after]
            pieces += [start, Piece("text", "assistant\n")]
        else:
            pieces += [Piece("text", turn.text.strip(), True), Piece("control", layout.end, True), after]
    return pieces


def _plain(turns: list[Message]) -> list[Piece]:
    """Stage 1: the question is thrown away; image, caption, newline. No end token."""
    pieces = [Piece("image")] * turns[0].images
    if len(turns) > 1:
        pieces.append(Piece("text", turns[1].text.strip() + "\n", True))
    return pieces


def encode(pieces: Sequence[Piece], encode_text: EncodeText, control_id: ControlId) -> list[int]:
    """Token ids, with `IMAGE_TOKEN_INDEX` for each image slot."""
    return encode_with_labels(pieces, encode_text, control_id)[0]


def encode_with_labels(
    pieces: Sequence[Piece], encode_text: EncodeText, control_id: ControlId
) -> tuple[list[int], list[int]]:
    """Ids and labels of equal length; labels are `IGNORE_INDEX` except for answers and their end tokens.

    Neighbouring text is tokenized as one stretch. Where an answer begins inside a stretch, its first token is
    found as LLaVA does: by the length of the stretch's beginning tokenized alone. If that beginning comes out
    as other tokens inside the whole (a tokenization mismatch), the sample's labels are all masked.
    """
    ids: list[int] = []
    labels: list[int] = []
    mismatch = False
    for run in _runs(pieces):
        if run[0].kind == "image":
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        elif run[0].kind == "control":
            token = control_id(run[0].text)
            ids.append(token)
            labels.append(token if run[0].trained else IGNORE_INDEX)
        else:
            stretch = encode_text("".join(piece.text for piece in run))
            trained_from = _first_trained(run, stretch, encode_text)
            mismatch |= trained_from < 0
            ids += stretch
            labels += [IGNORE_INDEX] * max(trained_from, 0) + stretch[max(trained_from, 0) :]
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


def _first_trained(run: list[Piece], stretch: list[int], encode_text: EncodeText) -> int:
    """Index of the first trained token in `stretch`; its length if there is none; -1 on a mismatch."""
    before = ""
    for piece in run:
        if piece.trained:
            break
        before += piece.text
    else:
        return len(stretch)
    start = encode_text(before) if before else []
    return len(start) if stretch[: len(start)] == start else -1
