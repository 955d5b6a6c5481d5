"""Records -> labels -> packs -> batches: what is trained, and that sharing a picture changes nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llava_edge.errors import DataError
from llava_edge.models import micro
from llava_edge.models.data import (
    collate,
    load_tokenizer,
    modality_length_order,
    pack,
    read_records,
    to_messages,
    tokenize,
)
from llava_edge.models.llava import from_state
from llava_edge.models.train import batch_loss
from llava_edge.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TOKENS = micro.CONFIG.image_tokens


@pytest.fixture(scope="module")
def tokenizer(micro_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(micro_checkpoint / "tokenizer.json")


def chat(*turns: str, image: str | None = "a.png") -> dict[str, object]:
    roles = ("human", "gpt")
    record: dict[str, object] = {
        "id": "x",
        "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)],
    }
    return record | ({"image": image} if image else {})


def test_only_answers_and_their_end_are_trained(tokenizer: Tokenizer) -> None:
    sample = tokenize(chat("<image>\nWhat is it?", "red", "Sure?", "Yes"), "chatml", tokenizer, 512)
    trained = [token for token, label in zip(sample.ids, sample.labels, strict=True) if label != IGNORE_INDEX]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "red<|im_end|>Yes<|im_end|>"
    whole = tokenizer.decode([i for i in sample.ids if i != IMAGE_TOKEN_INDEX], skip_special_tokens=False)
    assert whole == (
        "<|im_start|>user\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )


def test_typed_control_tokens_stay_text(tokenizer: Tokenizer) -> None:
    sample = tokenize(chat("<image>\n<|im_end|>", "<|im_start|>"), "chatml", tokenizer, 512)
    assert sample.ids.count(tokenizer.token_to_id("<|im_end|>")) == 2  # one for each turn, none typed


def test_stage_one_drops_the_question_and_trains_the_whole_caption(tokenizer: Tokenizer) -> None:
    sample = tokenize(chat("<image>\nDescribe it.", "a red box"), "plain_chatml", tokenizer, 512)
    assert sample.ids[0] == IMAGE_TOKEN_INDEX
    assert tokenizer.decode(list(sample.ids[1:])) == "a red box\n"
    assert sample.labels == (IGNORE_INDEX, *sample.ids[1:])
    batch = collate(pack([sample], 512), TOKENS)
    # The caption's first token is predicted from the picture's last position.
    assert int(batch.labels[0, TOKENS - 1]) == sample.ids[1]
    assert int((batch.labels != IGNORE_INDEX).sum()) == len(sample.ids) - 1


def test_the_image_comes_first_wherever_the_record_has_it() -> None:
    (message,) = to_messages(chat("What is it?\n<image>"))
    assert (message.text, message.images) == ("What is it?", 1)


ASK, ANSWER = {"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (chat("no slot", "x"), "0 <image> in questions and 0 in answers, but 1 image"),
        (chat("<image><image>", "x"), "2 <image>"),
        (chat("<image>", "x", image=None), "1 <image> in questions and 0 in answers, but 0 image"),
        (chat("what?", "<image>"), "0 <image> in questions and 1 in answers"),
        (chat("<image>", "x") | {"image": ""}, "an image without a name"),
        (chat("\ud800", "x", image=None), "with a text as value"),
        ({"id": "1"}, "with a text as value"),
        ({"id": "1", "conversations": []}, "alternating turns"),
        ({"id": "1", "conversations": ["hi"]}, "with a text as value"),
        ({"id": "1", "conversations": [ASK | {"value": None}, ANSWER]}, "with a text as value"),
        ({"id": "1", "conversations": [ASK | {"from": "tool"}, ANSWER]}, "with a text as value"),
        ({"id": "1", "conversations": [ASK, ASK]}, "alternating turns"),
        ({"id": "1", "conversations": [ANSWER]}, "alternating turns"),
    ],
)
def test_records_that_cannot_be_meant_are_refused(record: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]), "utf-8")
    with pytest.raises(DataError, match=rf"Record '.'.*{re.escape(said)}"):
        to_messages(*read_records(path))


def test_a_pack_has_the_loss_of_its_samples(tokenizer: Tokenizer) -> None:
    """Three conversations on one picture, evaluated together and apart."""
    records = [
        chat("<image>\nWhat is it?", "red"),
        chat("<image>\nIs it blue, or is it not?", "No", "Sure?", "Yes"),
        chat("<image>\nDescribe it.", "It is red."),
    ]
    samples = [tokenize(record, "chatml", tokenizer, 512) for record in records]
    model = from_state(micro.CONFIG, micro.random_tensors())
    features = torch.randn(1, TOKENS, micro.CONFIG.vision.hidden_size)
    together = pack(samples, 512)
    assert len(together) == 1
    apart = [pack([sample], 512)[0] for sample in samples]
    with torch.no_grad():
        joint = batch_loss(model, collate(together, TOKENS), features)
        single = sum(batch_loss(model, collate([one], TOKENS), features) for one in apart)
        padded = batch_loss(model, collate(apart, TOKENS), features.expand(3, -1, -1))
    torch.testing.assert_close(joint, single, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(padded, single, rtol=1e-5, atol=1e-4)


def test_packs_keep_to_one_picture_and_to_the_length(tokenizer: Tokenizer) -> None:
    a, b = (tokenize(chat("<image>\nWhat?", "red", image=name), "chatml", tokenizer, 512) for name in ("a", "b"))
    text = tokenize(chat("Hello", "Hi", image=None), "chatml", tokenizer, 512)
    assert [len(item.branches) for item in pack([a, a, b, text, text], 512)] == [2, 1, 1, 1]
    assert [len(item.branches) for item in pack([a, a], len(a.ids) + 3)] == [1, 1]


def test_batches_have_one_modality_and_like_lengths() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(1, 300) for _ in range(200)] + [-rng.randint(1, 300) for _ in range(50)]
    order = modality_length_order(lengths, 8, random.Random(0))
    assert sorted(order) == list(range(250))
    batches = [order[i : i + 8] for i in range(0, 248, 8)]
    mixed = [batch for batch in batches if len({lengths[i] > 0 for i in batch}) == 2]
    assert len(mixed) <= 1  # the two incomplete batches may meet at the end
    spread = [max(abs(lengths[i]) for i in b) - min(abs(lengths[i]) for i in b) for b in batches[:-1]]
    assert sum(spread) / len(spread) < 80  # 250 or so if lengths were ignored
    assert order != modality_length_order(lengths, 8, random.Random(1))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "{}", "[]", "[1]", '[{"image": 5}]', '[{"image": null}]'])
def test_unreadable_records_are_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=r"bad\.json"):
        read_records(tmp_path / "bad.json")
