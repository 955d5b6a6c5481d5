"""Turn `Item`s into LLaVA conversation records (a JSON array of {id, image, conversations}).

A record holds one or two questions about a picture, or a chat without one. Records may share a picture, which the
trainer then evaluates once (`data.pack`). All randomness comes from one seed.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.models.sources import RECORDS, Item, collect

Record = dict[str, Any]
Turn = tuple[str, str]  # question, answer

# Wordings of each kind of question.
NAME_QUESTIONS = {
    "grocery": ("What grocery item is this?", "Name this product.", "Which product is shown here?",
                "What is the name of this grocery item?"),
    "clothing": ("What kind of clothing is this?", "What piece of clothing is shown?", "Name this garment.",
                 "Which type of clothing can you see?"),
    "objects": ("What object is this?", "Name the main object in this photo.", "What does this photo show?",
                "What is the main thing in this picture?"),
    "emoji": ("What does this emoji show?", "Name this emoji.", "Which emoji is this?", "What is this emoji called?"),
}  # fmt: skip
KIND_QUESTIONS = ("What kind of grocery item is this?", "Which type of food or drink is this?",
                  "What kind of product is it?", "Which kind of item is shown?")  # fmt: skip
CATEGORY_QUESTIONS = ("Is this a grocery item, clothing, an object or a drawing?",
                      "What is the category of this picture: grocery item, clothing, object or drawing?")  # fmt: skip
GROUP_QUESTIONS = ("Which group does this emoji belong to?", "What category is this emoji in?",
                   "Name the group of this emoji.")  # fmt: skip
CONTENT_QUESTIONS = ("What is in the picture?", "What is this?", "What do you see?", "What can be seen in this image?")
CAPTION_QUESTIONS = ("Describe this image in one sentence.", "Describe the picture briefly.",
                     "Write one sentence about this image.", "Give a short description of this image.")  # fmt: skip
PRODUCT_QUESTIONS = ("Tell me about this product.", "Describe this product.", "What can you say about this product?")
YES_NO_QUESTIONS = ("Is this {}?", "Does this picture show {}?", "Is {} shown here?")
CHOICE_QUESTIONS = ("Which of these is it: {}?", "Choose the right name: {}.", "Is it {}?")
CATEGORY_NAMES = {"grocery": "grocery item", "clothing": "clothing", "objects": "object", "emoji": "drawing"}


@dataclass(frozen=True)
class Catalogue:
    """Labels by source and by (source, category), from which wrong answers are drawn."""

    labels: dict[str, list[str]]
    by_category: dict[tuple[str, str], list[str]]

    @staticmethod
    def of(items: Iterable[Item]) -> Catalogue:
        """Collect the labels of all items."""
        labels: dict[str, set[str]] = defaultdict(set)
        by_category: dict[tuple[str, str], set[str]] = defaultdict(set)
        for item in items:
            if item.label:
                labels[item.source].add(item.label)
                by_category[item.source, item.category].add(item.label)
        return Catalogue({k: sorted(v) for k, v in labels.items()}, {k: sorted(v) for k, v in by_category.items()})

    def wrong_labels(self, item: Item, count: int, rng: random.Random) -> list[str]:
        """Up to `count` wrong labels; two in three are of the same category, which is harder."""
        chosen: list[str] = []
        similar = [label for label in self.by_category[item.source, item.category] if label != item.label]
        others = [label for label in self.labels[item.source] if label != item.label]
        while len(chosen) < min(count, len(others)):
            pool = similar if similar and rng.random() < 0.67 else others
            label = rng.choice(pool)
            if label not in chosen:
                chosen.append(label)
        return chosen


def with_article(name: str) -> str:
    """Put "a" or "an" before a label, except before plurals."""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def caption(item: Item) -> str:
    """The one-sentence answer to `CAPTION_QUESTIONS`."""
    if item.source == "grocery":
        kind = "" if item.label.lower() == item.category.lower() else f", a kind of {item.category.lower()}"
        return f"The photo shows {item.label}{kind}."
    if item.source == "clothing":
        return f"The photo shows a piece of clothing: {with_article(item.label)}."
    if item.source == "objects":
        return f"The photo shows {with_article(item.label)}."
    if item.source == "emoji":
        return f"A drawing of {item.label}."
    return item.text


def questions(item: Item, catalogue: Catalogue, rng: random.Random) -> list[Turn]:
    """One question of most kinds that fit the item, in random wording; long or easy kinds are less frequent."""
    if item.source == "easy-vqa":
        return list(item.qa)
    if item.source == "tuxpaint":
        return [(rng.choice(CAPTION_QUESTIONS), item.text), (rng.choice(CONTENT_QUESTIONS), item.text)]
    turns = [
        (rng.choice(NAME_QUESTIONS[item.source]), item.label),
        (rng.choice(CONTENT_QUESTIONS + CAPTION_QUESTIONS), caption(item)),
        yes_no(item, catalogue, rng),
    ]
    if len(catalogue.labels[item.source]) > 1:
        turns.append(choice_of_four(item, catalogue, rng))
    if item.source == "grocery":
        turns.append((rng.choice(KIND_QUESTIONS), item.category))
    if item.source == "emoji":
        turns += [(rng.choice(GROUP_QUESTIONS), item.category)] * 2
    if rng.random() < 0.3:
        turns.append((rng.choice(CATEGORY_QUESTIONS), CATEGORY_NAMES[item.source]))
    if item.text and item.source == "grocery" and rng.random() < 0.3:
        turns.append((rng.choice(PRODUCT_QUESTIONS), item.text))
    return turns


def yes_no(item: Item, catalogue: Catalogue, rng: random.Random) -> Turn:
    """Half yes, half no (always yes if there is no other label); wrong labels are mostly of the same category."""
    wrong = [] if rng.random() < 0.5 else catalogue.wrong_labels(item, 1, rng)
    label = wrong[0] if wrong else item.label
    return rng.choice(YES_NO_QUESTIONS).format(with_article(label)), "No" if wrong else "Yes"


def choice_of_four(item: Item, catalogue: Catalogue, rng: random.Random) -> Turn:
    """The right label among up to four, in random order. The source needs at least two."""
    options = [item.label, *catalogue.wrong_labels(item, 3, rng)]
    rng.shuffle(options)
    return rng.choice(CHOICE_QUESTIONS).format(f"{', '.join(options[:-1])} or {options[-1]}"), item.label


def make_record(number: int, image: str | None, turns: Sequence[Turn]) -> Record:
    """One LLaVA record; without an image it is text only."""
    conversation = []
    for i, (question, answer) in enumerate(turns):
        slot = "<image>\n" if image and i == 0 else ""
        conversation += [{"from": "human", "value": slot + question}, {"from": "gpt", "value": answer}]
    record: Record = {"id": f"{number:06d}", "conversations": conversation}
    if image:
        record["image"] = image
    return record


def build_records(
    items: Sequence[Item],
    *,
    rounds: dict[str, float],
    per_picture: int,
    chats: Sequence[Sequence[Turn]] = (),
    multi_turn: float = 0.15,
    seed: int = 0,
) -> list[Record]:
    """Build the records of all training items.

    rounds: rounds of questions per picture, by source (1.5 = one, and two for half of the pictures).
    per_picture: questions per round; multi_turn: share of rounds that become one conversation of two turns.
    """
    rng = random.Random(seed)
    catalogue = Catalogue.of(items)
    train = [item for item in items if item.split == "train"]
    records: list[Record] = []
    for item in train:
        mean = rounds.get(item.source, 0.0)
        for _ in range(int(mean) + (rng.random() < mean % 1)):
            for turns in _round_conversations(item, catalogue, per_picture, multi_turn, rng):
                records.append(make_record(len(records), item.image, turns))
    records += [make_record(len(records) + i, None, chat) for i, chat in enumerate(chats)]
    return records


def _round_conversations(
    item: Item, catalogue: Catalogue, per_picture: int, multi_turn: float, rng: random.Random
) -> list[list[Turn]]:
    """One round of questions about a picture, as conversations of one turn each; the first may have two."""
    turns = questions(item, catalogue, rng)
    rng.shuffle(turns)
    conversations = [[turn] for turn in turns[: per_picture * (2 if item.source == "easy-vqa" else 1)]]
    if len(conversations) > 1 and rng.random() < multi_turn:
        conversations = [[*conversations[0], *conversations[1]], *conversations[2:]]
    return conversations


def caption_records(items: Sequence[Item], seed: int = 0) -> list[Record]:
    """Stage 1: one caption for every training picture that has one."""
    rng = random.Random(seed)
    train = [item for item in items if item.split == "train" and item.source != "easy-vqa"]
    rng.shuffle(train)
    return [
        make_record(i, item.image, [(rng.choice(CAPTION_QUESTIONS), caption(item))]) for i, item in enumerate(train)
    ]


CHATS_FILE = Path(__file__).parent / "recipes" / "smol_chat.json"  # the unmodified language model's own answers


def write_records(
    folder: Path, photos: Path, *, seed: int, rounds: dict[str, float], per_picture: int, multi_turn: float
) -> None:
    """Collect the pictures; write captions.json (stage 1) and questions.json (stage 2) to `folder`."""
    items = collect(folder, photos)
    chats = [[(turn["question"], turn["answer"])] for turn in json.loads(CHATS_FILE.read_text("utf-8"))]
    question_records = build_records(
        items, rounds=rounds, per_picture=per_picture, chats=chats, multi_turn=multi_turn, seed=seed
    )
    for name, records in zip(RECORDS, (caption_records(items, seed), question_records), strict=True):
        (folder / name).write_text(json.dumps(records), "utf-8")
