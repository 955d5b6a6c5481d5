"""Items -> records: nothing held out is trained on, and the answers are true."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import pytest

from llava_edge.models import conversations
from llava_edge.models.conversations import (
    Catalogue,
    build_records,
    caption,
    caption_records,
    choice_of_four,
    questions,
    yes_no,
)
from llava_edge.models.data import to_messages
from llava_edge.models.sources import Item

ITEMS = [
    Item(f"g{i}{split}.jpg", "grocery", split, label, category, f"{label} is tasty.")
    for split in ("train", "val")
    for i, (label, category) in enumerate(
        [("Granny Smith", "Apple"), ("Royal Gala", "Apple"), ("Lime", "Lime"), ("Pink Lady", "Apple")]
    )
] + [
    Item("c1.jpg", "clothing", "train", "hat", "clothing"),
    Item("c2.jpg", "clothing", "train", "pants", "clothing"),
    Item("c3.jpg", "clothing", "train", "dress", "clothing"),
    Item("c4.jpg", "clothing", "train", "shirt", "clothing"),
    Item("t1.png", "tuxpaint", "train", text="A lion."),
    Item("t2.png", "tuxpaint", "val", text="A held-out lion."),
    Item("v1.png", "easy-vqa", "train", qa=(("what shape?", "circle"),)),
]
ROUNDS = {"grocery": 2.0, "clothing": 1.0, "tuxpaint": 1.0, "easy-vqa": 1.0}


def test_held_out_pictures_and_captions_appear_nowhere() -> None:
    records = build_records(ITEMS, rounds=ROUNDS, per_picture=4, seed=1) + caption_records(ITEMS)
    held_out = {item.image for item in ITEMS if item.split == "val"}
    assert records
    assert not held_out & {record.get("image") for record in records}
    assert "held-out" not in str(records)


def test_records_are_reproducible_and_readable_by_the_trainer() -> None:
    records = build_records(ITEMS, rounds=ROUNDS, per_picture=4, chats=[[("Hi", "Hello")]], seed=1)
    assert records == build_records(ITEMS, rounds=ROUNDS, per_picture=4, chats=[[("Hi", "Hello")]], seed=1)
    assert records != build_records(ITEMS, rounds=ROUNDS, per_picture=4, chats=[[("Hi", "Hello")]], seed=2)
    for record in records:
        messages = to_messages(record)
        assert sum(message.images for message in messages) == ("image" in record)
    assert "image" not in records[-1]


def test_every_kind_of_question_comes_in_several_wordings() -> None:
    records = build_records(ITEMS, rounds=dict.fromkeys(ROUNDS, 60.0), per_picture=9, chats=[[("Hi", "Hello")]], seed=1)
    asked = Counter(turn.text for record in records for turn in to_messages(record) if turn.role == "user")
    kinds: dict[str, Sequence[str]] = {
        "name": conversations.NAME_QUESTIONS["grocery"],
        "which kind": conversations.KIND_QUESTIONS,
        "category": conversations.CATEGORY_QUESTIONS,
        "description": conversations.CAPTION_QUESTIONS,
        "content": conversations.CONTENT_QUESTIONS,
        "product": conversations.PRODUCT_QUESTIONS,
        "text only": ["Hi"],
        "easy-VQA's own": ["what shape?"],
    }
    for kind, wordings in kinds.items():
        assert [wording for wording in wordings if not asked[wording]] == [], kind
    for wordings in (conversations.YES_NO_QUESTIONS, conversations.CHOICE_QUESTIONS):
        for wording in wordings:
            pattern = re.escape(wording).replace(r"\{\}", ".+")
            assert any(re.fullmatch(pattern, text) for text in asked), wording


@pytest.mark.parametrize("item", [item for item in ITEMS if item.label], ids=lambda item: item.image)
def test_yes_and_no_are_true_and_about_even(item: Item) -> None:
    catalogue = Catalogue.of(ITEMS)
    rng = random.Random(0)
    asked = [yes_no(item, catalogue, rng) for _ in range(200)]
    for question, answer in asked:
        assert (re.search(rf"\b{item.label}\b", question) is not None) == (answer == "Yes")
    assert 70 <= sum(answer == "Yes" for _, answer in asked) <= 130


def test_the_right_name_of_four_is_at_every_place() -> None:
    rng, catalogue, item = random.Random(0), Catalogue.of(ITEMS), ITEMS[0]
    places = set()
    for _ in range(100):
        question, answer = choice_of_four(item, catalogue, rng)
        names = sorted(catalogue.labels["grocery"], key=question.find)
        places.add(names.index(answer))
    assert places == {0, 1, 2, 3}


def test_wrong_names_are_mostly_of_the_same_category() -> None:
    catalogue = Catalogue.of(ITEMS)
    wrong = [catalogue.wrong_labels(ITEMS[0], 1, random.Random(i))[0] for i in range(200)]
    assert "Granny Smith" not in wrong
    assert sum(name in ("Royal Gala", "Pink Lady") for name in wrong) > 100


def test_a_choice_offers_the_answer_among_four() -> None:
    catalogue = Catalogue.of(ITEMS)
    for seed in range(50):
        for question, answer in questions(ITEMS[0], catalogue, random.Random(seed)):
            if ", " in question and "grocery item" not in question:
                assert answer == "Granny Smith"
                assert answer in question
                assert question.count(",") == 2


def test_a_source_with_one_label_gets_only_questions_that_need_no_wrong_one() -> None:
    items = [Item(f"{n}.jpg", "clothing", "train", "hat", "clothing") for n in range(2)]
    records = build_records(items, rounds={"clothing": 50.0}, per_picture=9, seed=1)
    turns = [(turn.text, turn.role) for record in records for turn in to_messages(record)]
    asked = {text for text, role in turns if role == "user"}
    assert asked >= {wording.format("a hat") for wording in conversations.YES_NO_QUESTIONS}
    assert not asked & {wording.format(" or hat") for wording in conversations.CHOICE_QUESTIONS}
    assert ("No", "assistant") not in turns


def test_sentences_read_well() -> None:
    assert caption(ITEMS[0]) == "The photo shows Granny Smith, a kind of apple."
    assert caption(ITEMS[2]) == "The photo shows Lime."
    assert [caption(item) for item in ITEMS[8:11]] == [
        "The photo shows a piece of clothing: a hat.",
        "The photo shows a piece of clothing: pants.",
        "The photo shows a piece of clothing: a dress.",
    ]
