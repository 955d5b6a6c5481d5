"""Held-out accuracy of PyTorch in float32 and of a bundle on the same questions, with three baselines.

An answer is correct if the whole greedy answer equals the expected one. For PyTorch one forward pass shows that: with
the expected answer as input, greedy decoding would produce it if and only if each of its tokens, and the end token, is
the most likely one. So all questions about a picture share one pass.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer

from llava_edge.errors import CheckpointError
from llava_edge.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig
from llava_edge.models.conversations import GROUP_QUESTIONS, KIND_QUESTIONS, NAME_QUESTIONS, make_record
from llava_edge.models.data import Batch, collate, pack, tokenize
from llava_edge.models.features import FeatureCache, check_single_crop
from llava_edge.models.llava import Llava
from llava_edge.models.sources import Item
from llava_edge.models.train import answer_logits
from llava_edge.prompt import IGNORE_INDEX

Ask = Callable[[Path, str], str]  # picture, question -> answer
Progress = Callable[[int, int], None]

MAX_LENGTH = 512  # tokens of text in a pack, the trainer's default
BATCH = 4  # packs evaluated at a time


@dataclass(frozen=True)
class Question:
    """One held-out question; `image` is relative to the data folder."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Correct answers on one set. `name`: what answered."""

    set: str
    name: str
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total


def question_sets(items: Iterable[Item], split: str = "val") -> dict[str, list[Question]]:
    """The question sets of a split. One wording per set, the first of those the trainer uses."""
    items = [item for item in items if item.split == split]

    def select(source: str, question: str, answer: Callable[[Item], str]) -> list[Question]:
        return [Question(item.image, question, answer(item)) for item in items if item.source == source]

    easy_vqa = [Question(i.image, q, a) for i in items if i.source == "easy-vqa" for q, a in i.qa]
    return {
        "grocery category": select("grocery", KIND_QUESTIONS[0], lambda item: item.category),
        "grocery fine": select("grocery", NAME_QUESTIONS["grocery"][0], lambda item: item.label),
        "clothing": select("clothing", NAME_QUESTIONS["clothing"][0], lambda item: item.label),
        "easy-VQA": easy_vqa,
        "emoji group (unseen style)": select("emoji", GROUP_QUESTIONS[0], lambda item: item.category),
    }


def majority_baseline(train: Sequence[Question], held_out: Sequence[Question], name: str) -> Score:
    """Score always giving a question's most frequent training answer, or the set's if the question is new."""
    overall = Counter(q.answer for q in train).most_common(1)[0][0]
    by_question: dict[str, Counter[str]] = {}
    for question in train:
        by_question.setdefault(question.question, Counter())[question.answer] += 1
    guess = {question: answers.most_common(1)[0][0] for question, answers in by_question.items()}
    right = sum(guess.get(q.question, overall) == q.answer for q in held_out)
    return Score(name, "majority", right, len(held_out))


def shuffle_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each about another question's picture."""
    images = [q.image for q in questions]
    random.Random(0).shuffle(images)
    return [Question(image, q.question, q.answer) for image, q in zip(images, questions, strict=True)]


class TorchScorer:
    """Scores questions with the PyTorch model in float32."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, features: FeatureCache, data: Path) -> None:
        self.model, self.tokenizer, self.features, self.data = model, tokenizer, features, data

    def count_correct(self, questions: Sequence[Question], progress: Progress = lambda done, total: None) -> int:
        """Count the greedy answers that equal the expected ones."""
        template = self.model.config.template
        ordered = sorted(questions, key=lambda q: q.image)
        samples = [
            tokenize(make_record(i, q.image, [(q.question, q.answer)]), template, self.tokenizer, MAX_LENGTH)
            for i, q in enumerate(ordered)
        ]
        packs = pack(samples, MAX_LENGTH)
        self.features.ensure([self.data / q.image for q in ordered])
        correct = 0
        for start in range(0, len(packs), BATCH):
            batch = collate(packs[start : start + BATCH], self.model.config.image_tokens)
            correct += self._count_correct(batch)
            progress(min(start + BATCH, len(packs)), len(packs))
        return correct

    @torch.inference_mode()
    def _count_correct(self, batch: Batch) -> int:
        features = self.features.get([self.data / image for image in batch.images])
        is_answer = batch.labels != IGNORE_INDEX
        hits = torch.ones_like(is_answer)
        hits[is_answer] = answer_logits(self.model, batch, features).argmax(-1) == batch.labels[is_answer]
        return _count_full_hits(is_answer, hits)


def _count_full_hits(is_answer: torch.Tensor, hits: torch.Tensor) -> int:
    """Count runs of answer positions that are all hits. Answers are never adjacent: a question is between them."""
    correct = 0
    for row in zip(is_answer.tolist(), hits.tolist(), strict=True):
        for in_answer, run in groupby(zip(*row, strict=True), itemgetter(0)):
            correct += in_answer and all(hit for _, hit in run)
    return correct


def count_correct(
    ask: Ask, data: Path, questions: Sequence[Question], progress: Progress = lambda done, total: None
) -> int:
    """Count the answers of a runtime that equal the expected ones, ignoring leading and trailing white space."""
    correct = 0
    for done, q in enumerate(sorted(questions, key=lambda q: q.image), 1):
        correct += ask(data / q.image, q.question).strip() == q.answer.strip()
        progress(done, len(questions))
    return correct


def check_supported(config: LlavaConfig, normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    """Raise `CheckpointError` for a model whose pictures or prompts `score_model` would prepare wrongly.

    normalisation: mean and standard deviation of its pixels.
    """
    check_single_crop(config)
    other_pixels = normalisation != (CLIP_MEAN, CLIP_STD)
    if other_pixels or config.image_markers:
        what = "normalises pixels otherwise than CLIP" if other_pixels else "has markers around pictures"
        raise CheckpointError(
            f"The model {what}, which evaluation in PyTorch does not support; export it, and name it with --bundle."
        )


def score_model(
    model: Llava,
    tokenizer: Tokenizer,
    data: Path,
    sets: dict[str, list[Question]],
    progress: Callable[[str], Progress],
    log: Callable[[str], object] = lambda line: None,
) -> list[Score]:
    """Score PyTorch in float32, then the same model with a grey picture and with other questions' pictures."""
    features = FeatureCache(data / "features-fp32", model, bf16=False, log=log)
    scorer = TorchScorer(model, tokenizer, features, data)
    blank = "blank.png"
    Image.new("RGB", (224, 224), (128, 128, 128)).save(data / blank)
    scores = []
    for name, questions in sets.items():
        variants = {
            "PyTorch fp32": questions,
            "blank image": [Question(blank, q.question, q.answer) for q in questions],
            "shuffled images": shuffle_images(questions),
        }
        for label, variant in variants.items():
            correct = scorer.count_correct(variant, progress(f"{label}: {name}"))
            scores.append(Score(name, label, correct, len(variant)))
    return scores
