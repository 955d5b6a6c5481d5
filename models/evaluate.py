"""Held-out accuracy: the same questions to PyTorch in float32 and to a bundle, beside three baselines.

A question counts as right when the whole greedy answer equals the expected one. For PyTorch that is read off
one pass: greedy decoding produces exactly the expected answer if and only if, with that answer given, every
one of its tokens and the end token is the most likely one. So all questions on one picture share one pass.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer

from llava_edge.models.conversations import GROUP_QUESTIONS, KIND_QUESTIONS, NAME_QUESTIONS, make_record
from llava_edge.models.data import Batch, collate, pack, tokenize
from llava_edge.models.features import FeatureCache
from llava_edge.models.llava import Llava
from llava_edge.models.sources import Item
from llava_edge.models.train import trained_logits
from llava_edge.prompt import IGNORE_INDEX

Ask = Callable[[Path, str], str]  # picture, question -> answer
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """One held-out question; `image` is relative to the data folder."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Right answers on one set. `name` says who answered."""

    set: str
    name: str
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total


def question_sets(items: Iterable[Item], split: str = "val") -> dict[str, list[Question]]:
    """The held-out sets. One wording a set, the first of those the trainer varies."""
    chosen = [item for item in items if item.split == split]

    def ask(source: str, question: str, answer: Callable[[Item], str]) -> list[Question]:
        return [Question(item.image, question, answer(item)) for item in chosen if item.source == source]

    easy_vqa = [Question(i.image, q, a) for i in chosen if i.source == "easy-vqa" for q, a in i.qa]
    return {
        "grocery category": ask("grocery", KIND_QUESTIONS[0], lambda item: item.category),
        "grocery fine": ask("grocery", NAME_QUESTIONS["grocery"][0], lambda item: item.label),
        "clothing": ask("clothing", NAME_QUESTIONS["clothing"][0], lambda item: item.label),
        "easy-VQA": easy_vqa,
        "emoji group (unseen style)": ask("emoji", GROUP_QUESTIONS[0], lambda item: item.category),
    }


def majority(train: Sequence[Question], held_out: Sequence[Question], name: str) -> Score:
    """Always the most frequent training answer; for questions that vary, the most frequent for that question."""
    overall = Counter(q.answer for q in train).most_common(1)[0][0]
    by_question: dict[str, Counter[str]] = {}
    for question in train:
        by_question.setdefault(question.question, Counter())[question.answer] += 1
    guess = {question: answers.most_common(1)[0][0] for question, answers in by_question.items()}
    right = sum(guess.get(q.question, overall) == q.answer for q in held_out)
    return Score(name, "majority", right, len(held_out))


def shuffled(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each asked about the picture of another one."""
    images = [q.image for q in questions]
    random.Random(0).shuffle(images)
    return [Question(image, q.question, q.answer) for image, q in zip(images, questions, strict=True)]


class TorchJudge:
    """Scores questions with the PyTorch model in float32."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, features: FeatureCache, data: Path) -> None:
        self.model, self.tokenizer, self.features, self.data = model, tokenizer, features, data

    def right(self, questions: Sequence[Question], progress: Progress = lambda done, total: None) -> int:
        """How many greedy answers equal the expected ones."""
        template = self.model.config.template
        ordered = sorted(questions, key=lambda q: q.image)
        samples = [
            tokenize(make_record(i, q.image, [(q.question, q.answer)]), template, self.tokenizer, 512)
            for i, q in enumerate(ordered)
        ]
        packs = pack(samples, 512)
        self.features.ensure([self.data / q.image for q in ordered])
        right = 0
        for start in range(0, len(packs), 4):
            batch = collate(packs[start : start + 4], self.model.config.image_tokens)
            right += self._right(batch)
            progress(min(start + 4, len(packs)), len(packs))
        return right

    @torch.inference_mode()
    def _right(self, batch: Batch) -> int:
        features = self.features.get([self.data / image for image in batch.images])
        trained = batch.labels != IGNORE_INDEX
        hits = torch.ones_like(trained)
        hits[trained] = trained_logits(self.model, batch, features).argmax(-1) == batch.labels[trained]
        return _whole_answers(trained, hits)


def _whole_answers(trained: torch.Tensor, hits: torch.Tensor) -> int:
    """Count runs of trained positions that are hit throughout. Answers are never adjacent: a question is between."""
    right = 0
    for row_trained, row_hits in zip(trained.tolist(), hits.tolist(), strict=True):
        whole = inside = False
        for is_trained, hit in zip([*row_trained, False], [*row_hits, True], strict=True):
            if is_trained:
                whole = hit if not inside else whole and hit
            elif inside:
                right += whole
            inside = is_trained
    return right


def ask_all(ask: Ask, data: Path, questions: Sequence[Question], progress: Progress = lambda done, total: None) -> int:
    """How many answers of a runtime equal the expected ones, white space at the ends aside."""
    right = 0
    for done, q in enumerate(sorted(questions, key=lambda q: q.image), 1):
        right += ask(data / q.image, q.question).strip() == q.answer.strip()
        progress(done, len(questions))
    return right


def judge_model(
    model: Llava,
    tokenizer: Tokenizer,
    data: Path,
    sets: dict[str, list[Question]],
    progress: Callable[[str], Progress],
    talk: Callable[[str], object] = lambda line: None,
) -> list[Score]:
    """PyTorch in float32, then the same model on a grey picture and on other questions' pictures."""
    features = FeatureCache(data / "features-fp32", model, bf16=False, talk=talk)
    judge = TorchJudge(model, tokenizer, features, data)
    blank = "blank.png"
    Image.new("RGB", (224, 224), (128, 128, 128)).save(data / blank)
    scores = []
    for name, questions in sets.items():
        asked = {
            "PyTorch fp32": questions,
            "blank image": [Question(blank, q.question, q.answer) for q in questions],
            "shuffled images": shuffled(questions),
        }
        for label, variant in asked.items():
            right = judge.right(variant, progress(f"{label}: {name}"))
            scores.append(Score(name, label, right, len(variant)))
    return scores
