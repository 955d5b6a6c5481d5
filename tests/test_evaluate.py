"""Scoring: one pass must agree with real greedy decoding, and the questions must be the held-out ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import whole
from click.testing import CliRunner
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from llava_edge.cli import cli, execute
from llava_edge.cli import eval as cli_eval
from llava_edge.errors import LlavaEdgeError
from llava_edge.models import micro, streamed
from llava_edge.models.data import load_tokenizer
from llava_edge.models.evaluate import (
    Question,
    TorchScorer,
    count_correct,
    majority_baseline,
    question_sets,
    shuffle_images,
)
from llava_edge.models.features import FeatureCache
from llava_edge.models.llava import from_state
from llava_edge.models.sources import Item
from llava_edge.prompt import Message, encode, render


@pytest.fixture(scope="module")
def tokenizer(micro_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(micro_checkpoint / "tokenizer.json")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for colour in ("red", "green", "blue"):
        micro.draw(colour, rng).save(tmp_path / f"{colour}.png")
    return tmp_path


def decoded(tensors: whole.Arrays, tokenizer: Tokenizer, cache: FeatureCache, picture: Path, question: str) -> str:
    """The model's own greedy answer to the whole prompt, decoded."""
    ids = encode(
        render("chatml", [Message("user", question, 1)]),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.token_to_id,
    )
    cache.ensure([picture])
    images = streamed.project(micro.CONFIG, tensors, list(cache.get([picture]).float().numpy()))
    answer = whole.greedy(micro.CONFIG, tensors, ids, images, 40, tokenizer.token_to_id("<|im_end|>"))
    text: str = tokenizer.decode(answer)
    return text


def test_one_pass_agrees_with_greedy_decoding(
    trained_micro: Path, pictures: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Right where real decoding gives the answer, wrong where it gives another one."""
    tensors = load_file(trained_micro / "model.safetensors")
    model = from_state(micro.CONFIG, tensors)
    cache = FeatureCache(tmp_path / "features", model, bf16=False)
    asked = [(name, question) for name in ("red", "green", "blue") for question in (micro.QUESTION, "Is it red?")]
    answers = [decoded(tensors, tokenizer, cache, pictures / f"{name}.png", question) for name, question in asked]
    scorer = TorchScorer(model, tokenizer, cache, pictures)
    right = [Question(f"{name}.png", q, a) for (name, q), a in zip(asked, answers, strict=True)]
    wrong = [Question(f"{name}.png", q, a + "s") for (name, q), a in zip(asked, answers, strict=True)]
    assert scorer.count_correct(right) == len(right)
    assert scorer.count_correct(wrong) == 0
    assert scorer.count_correct([*right[:2], *wrong[2:]]) == 2


def test_held_out_sets_ask_about_val_items_only() -> None:
    items = [
        Item("a.jpg", "grocery", "train", "Granny Smith", "Apple"),
        Item("b.jpg", "grocery", "val", "Royal Gala", "Apple"),
        Item("c.png", "easy-vqa", "val", qa=(("what color?", "red"), ("is it a circle?", "no"))),
    ]
    sets = question_sets(items)
    assert [q.answer for q in sets["grocery fine"]] == ["Royal Gala"]
    assert [q.answer for q in sets["grocery category"]] == ["Apple"]
    assert len(sets["easy-VQA"]) == 2
    assert [q.image for q in question_sets(items, "train")["grocery fine"]] == ["a.jpg"]


def test_majority_knows_the_question_but_not_the_picture() -> None:
    train = [Question("x", "colour?", "red")] * 3 + [Question("x", "colour?", "blue"), Question("x", "round?", "no")]
    held_out = [Question("y", "colour?", "red"), Question("y", "round?", "no"), Question("y", "new?", "red")]
    assert majority_baseline(train, held_out, "s").right == 3
    assert majority_baseline(train, [Question("y", "colour?", "blue")], "s").right == 0


def test_shuffling_keeps_questions_and_moves_pictures() -> None:
    questions = [Question(f"{i}.png", str(i), str(i)) for i in range(50)]
    moved = shuffle_images(questions)
    assert [q.question for q in moved] == [q.question for q in questions]
    assert sorted(q.image for q in moved) == sorted(q.image for q in questions)
    assert sum(a.image == b.image for a, b in zip(moved, questions, strict=True)) < 10


def test_a_runtime_is_asked_every_question(tmp_path: Path) -> None:
    questions = [Question(f"{number}.png", f"{number}?", "one") for number in (1, 2, 3)]
    answers = {"1?": " one\n", "2?": "three", "3?": "one or two"}
    assert count_correct(lambda image, question: answers[question], tmp_path, questions) == 1


def test_fewer_questions_are_spread_over_the_whole_set() -> None:
    """Sets are in the order of their labels: the first ones would be about one kind of thing."""
    questions = [Question(f"{number}.png", "?", str(number)) for number in range(100)]
    for limit in (1, 7, 33, 100, 1000):
        chosen = [int(question.answer) for question in cli_eval._subsample(questions, limit)]
        assert len(chosen) <= limit
        assert chosen[-1] >= 100 - 100 // limit - 1 or limit == 1
        assert len(set(np.diff(chosen))) <= 1
    assert cli_eval._subsample(questions, None) == questions


@pytest.fixture
def held_out(pictures: Path) -> list[str]:
    """A command line up to the bundles, about one kind of grocery."""
    items = [Item("red.png", "grocery", split, "Royal Gala", "Apple") for split in ("train", "val")]
    (pictures / "items.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), "utf-8")
    (pictures / "labels.jsonl").touch()
    return ["eval", "--photos", str(pictures), "--data", str(pictures)]


def test_each_bundle_has_a_column(micro_bundle: Path, bundle_copy: Path, held_out: list[str]) -> None:
    """Two of the same precisions, a copy even: neither hides the other."""
    done = CliRunner().invoke(cli, [*held_out, "--bundle", str(micro_bundle), "--bundle", str(bundle_copy)])
    assert done.exit_code == 0, done.stderr
    head = done.stdout.splitlines()[0]
    assert [head.count(f"{bundle}, q8_0 + fp32") for bundle in (micro_bundle, bundle_copy)] == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"[]", "should hold a JSON object"),
        ("config.json", None, "no config.json"),
        ("tokenizer.json", b"{", "cannot be used as a tokenizer"),
        ("tokenizer.json", None, "No such file"),
        ("model.safetensors", b"cut off", "model.safetensors"),
        ("model.safetensors", None, "model.safetensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_judged_is_one_sentence(
    name: str, content: bytes | None, said: str, micro_checkpoint: Path, tmp_path: Path, held_out: list[str]
) -> None:
    folder = Path(shutil.copytree(micro_checkpoint, tmp_path / "checkpoint"))
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    done = CliRunner().invoke(cli, [*held_out, "--checkpoint", str(folder)])
    assert isinstance(done.exception, LlavaEdgeError)
    assert said in str(done.exception)


def test_a_checkpoint_has_a_column_beside_its_baselines(trained_micro: Path, held_out: list[str]) -> None:
    done = CliRunner().invoke(cli, [*held_out, "--checkpoint", str(trained_micro), "--json"])
    assert done.exit_code == 0, done.stderr
    scores = {score["name"]: score["total"] for score in json.loads(done.stdout) if score["set"] == "grocery fine"}
    assert scores == {"majority": 1, "PyTorch fp32": 1, "blank image": 1, "shuffled images": 1}


def test_a_checkpoint_with_tiles_is_refused_before_anything_is_fetched(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(micro.CONFIG, square="anyres", grids=((32, 64),), merge="spatial_unpad")
    folder = micro.write_checkpoint(pictures / "next", config=config)
    monkeypatch.setattr("llava_edge.models.sources.collect", lambda *_: pytest.fail("pictures were collected"))
    done = CliRunner().invoke(cli, ["eval", "--photos", str(pictures), "--checkpoint", str(folder)])
    assert isinstance(done.exception, LlavaEdgeError)
    assert "needs several (LLaVA-1.6)" in str(done.exception)


@pytest.mark.parametrize("other", ["normalisation", "markers"])
def test_a_checkpoint_that_pytorch_would_be_asked_wrongly_is_refused(
    other: str, pictures: Path, held_out: list[str]
) -> None:
    markers = ("<|im_start|>", "<|im_end|>") if other == "markers" else ()
    folder = micro.write_checkpoint(pictures / "other", config=replace(micro.CONFIG, image_markers=markers))
    if other == "normalisation":
        (folder / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 32, "image_mean": [0.5, 0.5, 0.5]}')
    done = CliRunner().invoke(cli, [*held_out, "--checkpoint", str(folder)])
    assert isinstance(done.exception, LlavaEdgeError), done.stdout
    assert "--bundle" in str(done.exception)


def test_sets_without_questions_are_left_out(micro_bundle: Path, held_out: list[str]) -> None:
    done = CliRunner().invoke(cli, [*held_out, "--bundle", str(micro_bundle), "--limit", "5"])
    assert done.exit_code == 0, done.output
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == ["grocery category", "grocery fine"]


@pytest.mark.parametrize("wrong", [["--bundle", "no-such"], ["--image-tokens", "99"]])
def test_nothing_is_judged_for_minutes_that_ends_in_an_error(
    micro_bundle: Path, held_out: list[str], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_eval, "_judge_bundle", lambda *_: pytest.fail("the first bundle was judged"))
    done = CliRunner().invoke(cli, [*held_out, "--bundle", str(micro_bundle), *wrong])
    assert isinstance(done.exception, LlavaEdgeError)


def test_minutes_of_fetching_are_announced(
    micro_bundle: Path, held_out: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def collect(*_: Path) -> list[Item]:
        assert "minutes" in capfd.readouterr().err
        return []

    monkeypatch.setattr("llava_edge.models.sources.collect", collect)
    assert execute([*held_out, "--bundle", str(micro_bundle)]) == 0
