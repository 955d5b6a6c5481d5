"""Turn LLaVA conversation records into padded batches for the trainer.

record -> `Sample` (ids, labels by LLaVA's masking rule) -> `Pack` (samples that share a picture, so that the
picture is evaluated once) -> `Batch` (tensors). Knows nothing about models or optimisers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llava_edge.errors import DataError, MissingError
from llava_edge.prompt import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, Message, encode_with_labels, render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation. `image` is a path relative to the data folder, or None for text only."""

    ids: tuple[int, ...]  # IMAGE_TOKEN_INDEX once where there is an image
    labels: tuple[int, ...]
    image: str | None


@dataclass(frozen=True)
class Pack:
    """Samples that share a picture, concatenated after their common prefix.

    Each sample attends to the prefix and to itself, at the positions it would have alone, so the loss of a pack is
    exactly the loss of its samples.
    """

    prefix: tuple[int, ...]  # up to and including the image slot; its labels are never trained
    branches: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (ids, labels) of what follows
    image: str | None

    def length(self, image_tokens: int) -> int:
        """Number of positions."""
        slots = self.prefix.count(IMAGE_TOKEN_INDEX)
        return len(self.prefix) + slots * (image_tokens - 1) + sum(len(ids) for ids, _ in self.branches)


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch; T is the longest pack."""

    tokens: Tensor  # (B, T) int64, 0 at image positions and padding
    is_image: Tensor  # (B, T) bool
    labels: Tensor  # (B, T) int64, the label of the *next* position's prediction, IGNORE_INDEX elsewhere
    positions: Tensor  # (B, T) int64
    mask: Tensor  # (B, 1, T, T) bool, True where attended
    images: tuple[str, ...]  # in the order of their positions in `tokens`


def read_records(path: Path) -> list[Record]:
    """Read a LLaVA JSON array. Raises `MissingError` or `DataError`."""
    if not path.is_file():
        raise MissingError(f"{path} does not exist; expected a JSON array of LLaVA conversations.")
    try:
        records = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} must be a JSON array of at least one conversation record.")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("image", ""), str):
            raise DataError(f"{path} has {record!r:.60} at index {number}; expected a record whose image is a string.")
    return records


def to_messages(record: Record) -> list[Message]:
    """Convert a record's turns to messages. As in LLaVA (llava/train/train.py), `<image>` is moved to the front and a
    leading answer is dropped. Raises `DataError`."""
    name = f"Record {record.get('id')!r}"
    roles: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
    try:
        turns = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
        "".join(text for _, text in turns).encode()  # refuses unpaired surrogates
    except (KeyError, TypeError, UnicodeEncodeError) as error:
        raise DataError(f"{name} must have conversations, each from human or gpt and with a text as value.") from error
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)):
        raise DataError(f"{name} must have alternating turns of human and gpt.")
    if record.get("image") == "":
        raise DataError(f"{name} has an image without a name.")
    questions, answers = (sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns[n::2]) for n in (0, 1))
    images = int("image" in record)
    if (questions, answers) != (images, 0):
        raise DataError(
            f"{name} has {questions} {IMAGE_PLACEHOLDER} in questions and {answers} in answers, but {images} image."
        )
    return [
        Message(role, text.replace(IMAGE_PLACEHOLDER, "").strip(), text.count(IMAGE_PLACEHOLDER))
        for role, text in turns
    ]


def tokenize(record: Record, template: str, tokenizer: Tokenizer, max_length: int) -> Sample:
    """Tokenize one record, truncated to `max_length` tokens (the image counts as one here)."""

    def encode_text(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    pieces = render(template, to_messages(record))
    ids, labels = encode_with_labels(pieces, encode_text, lambda name: control_id(tokenizer, name))
    return Sample(tuple(ids[:max_length]), tuple(labels[:max_length]), record.get("image"))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json. Control tokens are never parsed from text; look them up with `control_id`.

    Raises `DataError`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise DataError(f"{path} cannot be used as a tokenizer: {error}.") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def control_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a control token; `DataError` if the vocabulary lacks it."""
    token: int | None = tokenizer.token_to_id(name)
    if token is None:
        raise DataError(f"The tokenizer has no token {name!r}, which the prompt template needs.")
    return token


def pack(samples: Iterable[Sample], max_length: int) -> list[Pack]:
    """Join consecutive samples about the same picture while the pack stays within `max_length` tokens."""
    packs: list[Pack] = []
    room = 0
    for sample in samples:
        cut = sample.ids.index(IMAGE_TOKEN_INDEX) + 1 if sample.image else 0
        prefix, branch = sample.ids[:cut], (sample.ids[cut:], sample.labels[cut:])
        last = packs[-1] if packs else None
        # An answer right after the picture (stage 1) is predicted from the picture's last position: not shareable.
        shareable = bool(sample.image) and branch[1][0] == IGNORE_INDEX
        if last and shareable and last.image == sample.image and last.prefix == prefix and len(branch[0]) <= room:
            packs[-1] = Pack(prefix, (*last.branches, branch), sample.image)
            room -= len(branch[0])
        else:
            packs.append(Pack(prefix, (branch,), sample.image))
            room = max_length - len(sample.ids)
    return packs


def collate(packs: Sequence[Pack], image_tokens: int) -> Batch:
    """Build a batch, padded on the right."""
    longest = max(item.length(image_tokens) for item in packs)
    shape = (len(packs), longest)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    is_image = torch.zeros(shape, dtype=torch.bool)
    segments = torch.full(shape, -1)  # 0 = common prefix, 1.. = samples, -1 = padding
    for row, item in enumerate(packs):
        start = 0
        for token in item.prefix:
            width = image_tokens if token == IMAGE_TOKEN_INDEX else 1
            tokens[row, start : start + width] = max(token, 0)
            is_image[row, start : start + width] = token == IMAGE_TOKEN_INDEX
            start += width
        prefix = start
        positions[row, :prefix] = torch.arange(prefix)
        segments[row, :prefix] = 0
        for number, (ids, targets) in enumerate(item.branches, 1):
            end = start + len(ids)
            tokens[row, start:end] = torch.tensor(ids)
            positions[row, start:end] = torch.arange(prefix, prefix + len(ids))
            segments[row, start:end] = number
            labels[row, start : end - 1] = torch.tensor(targets[1:])  # a position predicts the next one
            if prefix and len(item.branches) == 1:
                labels[row, prefix - 1] = targets[0]
            start = end
    keys, queries = segments[:, None, :], segments[:, :, None]
    same_sample = (keys == 0) | (keys == queries)  # padding attends to the prefix and to itself
    mask = torch.ones(longest, longest, dtype=torch.bool).tril() & same_sample
    images = tuple(item.image for item in packs if item.image)
    return Batch(tokens, is_image, labels, positions, mask[:, None], images)


def modality_length_order(lengths: Sequence[int], batch: int, rng: random.Random) -> list[int]:
    """LLaVA's `group_by_modality_length`: an order in which each batch has one modality and similar lengths.

    `lengths` are negative for text-only items. Per modality: a random permutation, sorted by length within windows of
    8 batches, cut into batches. Full batches of both are shuffled; the two incomplete ones come last, together.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for text_only in (False, True):
        indices = [i for i, length in enumerate(lengths) if (length < 0) == text_only]
        rng.shuffle(indices)
        window = batch * 8  # sorting within a few batches keeps lengths similar and the order random
        for start in range(0, len(indices), window):
            indices[start : start + window] = sorted(
                indices[start : start + window], key=lambda i: abs(lengths[i]), reverse=True
            )
        full = len(indices) // batch * batch
        batches += [indices[start : start + batch] for start in range(0, full, batch)]
        rest += indices[full:]
    rng.shuffle(batches)
    return [i for indices in batches for i in indices] + rest
