"""`Item`s -> LLaVA conversation records (a JSON array of {id, image, conversations}).

A record is a question about a picture, sometimes two, or a chat without one; several share a picture, which the trainer
evaluates once for them (`data.pack`). Everything random comes from one seed.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.models.sources import Item, collect

Record = dict[str, Any]
Question = tuple[str, str]  # question, answer

NAME = {
    "grocery": ("What grocery item is this?", "Name this product.", "Which product is shown here?",
                "What is the name of this grocery item?"),
    "clothing": ("What kind of clothing is this?", "What piece of clothing is shown?", "Name this garment.",
                 "Which type of clothing can you see?"),
    "objects": ("What object is this?", "Name the main object in this photo.", "What does this photo show?",
                "What is the main thing in this picture?"),
    "emoji": ("What does this emoji show?", "Name this emoji.", "Which emoji is this?", "What is this emoji called?"),
}  # fmt: skip
KIND = ("What kind of grocery item is this?", "Which type of food or drink is this?", "What kind of product is it?",
        "Which kind of item is shown?")  # fmt: skip
CATEGORY = ("Is this a grocery item, clothing, an object or a drawing?",
            "What is the category of this picture: grocery item, clothing, object or drawing?")  # fmt: skip
GROUP = ("Which group does this emoji belong to?", "What category is this emoji in?",
         "Name the group of this emoji.")  # fmt: skip
CONTENT = ("What is in the picture?", "What is this?", "What do you see?", "What can be seen in this image?")
SENTENCE = ("Describe this image in one sentence.", "Describe the picture briefly.",
            "Write one sentence about this image.", "Give a short description of this image.")  # fmt: skip
PRODUCT = ("Tell me about this product.", "Describe this product.", "What can you say about this product?")
IS_IT = ("Is this {}?", "Does this picture show {}?", "Is {} shown here?")
CHOICE = ("Which of these is it: {}?", "Choose the right name: {}.", "Is it {}?")
CATEGORY_NAMES = {"grocery": "grocery item", "clothing": "clothing", "objects": "object", "emoji": "drawing"}


@dataclass(frozen=True)
class Catalogue:
    """Labels by source and by (source, category): where wrong answers for choices and yes/no come from."""

    labels: dict[str, list[str]]
    near: dict[tuple[str, str], list[str]]

    @staticmethod
    def of(items: Iterable[Item]) -> Catalogue:
        """Collect from every item that has a label."""
        labels: dict[str, set[str]] = defaultdict(set)
        near: dict[tuple[str, str], set[str]] = defaultdict(set)
        for item in items:
            if item.label:
                labels[item.source].add(item.label)
                near[item.source, item.category].add(item.label)
        return Catalogue({k: sorted(v) for k, v in labels.items()}, {k: sorted(v) for k, v in near.items()})

    def wrong(self, item: Item, count: int, rng: random.Random) -> list[str]:
        """Wrong labels, hard ones (same category) first by two to one."""
        chosen: list[str] = []
        near = [label for label in self.near[item.source, item.category] if label != item.label]
        far = [label for label in self.labels[item.source] if label != item.label]
        while len(chosen) < count:
            pool = near if near and rng.random() < 0.67 else far
            label = rng.choice(pool)
            if label not in chosen:
                chosen.append(label)
            if len(chosen) == len(far):
                break
        return chosen


def article(name: str) -> str:
    """ "a"/"an" before a label where English wants one: not before plurals, brands with digits or proper pairs."""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def sentence(item: Item) -> str:
    """The one-sentence description that `SENTENCE` questions are answered with."""
    if item.source == "grocery":
        kind = "" if item.label.lower() == item.category.lower() else f", a kind of {item.category.lower()}"
        return f"The photo shows {item.label}{kind}."
    if item.source == "clothing":
        return f"The photo shows a piece of clothing: {article(item.label)}."
    if item.source == "objects":
        return f"The photo shows {article(item.label)}."
    if item.source == "emoji":
        return f"A drawing of {item.label}."
    return item.text


def questions(item: Item, catalogue: Catalogue, rng: random.Random) -> list[Question]:
    """A question of most kinds that fit the item, in random wording; long or easy kinds come less often."""
    if item.source == "easy-vqa":
        return list(item.qa)
    if item.source == "tuxpaint":
        return [(rng.choice(SENTENCE), item.text), (rng.choice(CONTENT), item.text)]
    name = item.label
    made = [
        (rng.choice(NAME[item.source]), name),
        (rng.choice(CONTENT + SENTENCE), sentence(item)),
        yes_no(item, catalogue, rng),
        choice_of_four(item, catalogue, rng),
    ]
    if item.source == "grocery":
        made.append((rng.choice(KIND), item.category))
    if item.source == "emoji":
        made += [(rng.choice(GROUP), item.category)] * 2
    if rng.random() < 0.3:
        made.append((rng.choice(CATEGORY), CATEGORY_NAMES[item.source]))
    if item.text and item.source == "grocery" and rng.random() < 0.3:
        made.append((rng.choice(PRODUCT), item.text))
    return made


def yes_no(item: Item, catalogue: Catalogue, rng: random.Random) -> Question:
    """Half yes, half no; wrong names are mostly of the same category."""
    truth = rng.random() < 0.5
    label = item.label if truth else catalogue.wrong(item, 1, rng)[0]
    return rng.choice(IS_IT).format(article(label)), "Yes" if truth else "No"


def choice_of_four(item: Item, catalogue: Catalogue, rng: random.Random) -> Question:
    """The right label among four, in random order."""
    options = [item.label, *catalogue.wrong(item, 3, rng)]
    rng.shuffle(options)
    return rng.choice(CHOICE).format(f"{', '.join(options[:-1])} or {options[-1]}"), item.label


def record(number: int, image: str | None, turns: Sequence[Question]) -> Record:
    """One LLaVA record; without an image it is text only."""
    conversation = []
    for i, (question, answer) in enumerate(turns):
        slot = "<image>\n" if image and i == 0 else ""
        conversation += [{"from": "human", "value": slot + question}, {"from": "gpt", "value": answer}]
    made: Record = {"id": f"{number:06d}", "conversations": conversation}
    if image:
        made["image"] = image
    return made


def build(
    items: Sequence[Item],
    *,
    rounds: dict[str, float],
    per_picture: int,
    chats: Sequence[Sequence[Question]] = (),
    multi_turn: float = 0.15,
    seed: int = 0,
) -> list[Record]:
    """Records for all training items.

    rounds: how often each source's pictures are asked about (1.5 = once, and half of them twice).
    per_picture: questions a round; multi_turn: share of rounds that become one conversation of two turns.
    """
    rng = random.Random(seed)
    catalogue = Catalogue.of(items)
    train = [item for item in items if item.split == "train"]
    records: list[Record] = []
    for item in train:
        wanted = rounds.get(item.source, 0.0)
        for _ in range(int(wanted) + (rng.random() < wanted % 1)):
            for turns in _turns(item, catalogue, per_picture, multi_turn, rng):
                records.append(record(len(records), item.image, turns))
    records += [record(len(records) + i, None, chat) for i, chat in enumerate(chats)]
    return records


def _turns(
    item: Item, catalogue: Catalogue, per_picture: int, multi_turn: float, rng: random.Random
) -> list[list[Question]]:
    """One round of questions about a picture, as conversations: of one turn each, or the first of two."""
    made = questions(item, catalogue, rng)
    rng.shuffle(made)
    singles = [[question] for question in made[: per_picture * (2 if item.source == "easy-vqa" else 1)]]
    if len(singles) > 1 and rng.random() < multi_turn:
        singles = [[*singles[0], *singles[1]], *singles[2:]]
    return singles


def caption_records(items: Sequence[Item], seed: int = 0) -> list[Record]:
    """Stage 1: one caption a picture, for every training picture that has a sentence."""
    rng = random.Random(seed)
    train = [item for item in items if item.split == "train" and item.source != "easy-vqa"]
    rng.shuffle(train)
    return [record(i, item.image, [(rng.choice(SENTENCE), sentence(item))]) for i, item in enumerate(train)]


CHATS = Path(__file__).parent / "recipes" / "smol_chat.json"  # the unmodified language model's own answers


def write_records(
    folder: Path, photos: Path, *, seed: int, rounds: dict[str, float], per_picture: int, multi_turn: float
) -> None:
    """Collect the pictures and write captions.json (stage 1) and questions.json (stage 2) into `folder`."""
    items = collect(folder, photos)
    chats = [[(turn["question"], turn["answer"])] for turn in json.loads(CHATS.read_text("utf-8"))]
    asked = build(items, rounds=rounds, per_picture=per_picture, chats=chats, multi_turn=multi_turn, seed=seed)
    for name, records in (("captions.json", caption_records(items, seed)), ("questions.json", asked)):
        (folder / name).write_text(json.dumps(records), "utf-8")
