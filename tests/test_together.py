"""Several questions about the same images: one reading of them, then one token of each answer in a pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge import Llava
from llava_edge.bundle import LANGUAGE
from llava_edge.errors import BundleError, ContextOverflowError, UsageError
from llava_edge.options import EngineOptions, Options, Result, TokenChance, result_of
from llava_edge.runtimes import decoding
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.kv_cache import MAX_BRANCHES
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.sampling import Sampler

NEVER = threading.Event()
RED = Image.new("RGB", (48, 32), "red")
QUESTIONS = ["a list:", "the red", "one, two,", "é€😀", "say the colour of a", "12"]
SHORT = Options(max_tokens=24, speculate="off")


@pytest.fixture(scope="module")
def llava(micro_bundle: Path) -> Iterator[Llava]:
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, cache=False)) as loaded:
        yield loaded


@pytest.fixture
def pass_sizes(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each pass over the weights evaluates."""
    language = llava._engine.model.scheduler._language
    language.truncate(0)
    seen: list[int] = []
    right = language._evaluate

    def evaluate(batch: Any, cancel: threading.Event, *, few: bool) -> None:
        seen.append(batch.handle.n_tokens)
        right(batch, cancel, few=few)

    monkeypatch.setattr(language, "_evaluate", evaluate)
    return seen


def ask_together(llava: Llava, questions: list[str], options: Options, images: Any = RED) -> list[Result]:
    return [result_of(stream) for stream in llava.ask_many(questions, images, options)]


def test_a_token_budget_is_shared(llava: Llava, pass_sizes: list[int]) -> None:
    options = replace(SHORT, image_tokens=3, max_tokens=2)
    found = ask_together(llava, QUESTIONS[:2], options)
    assert [result.image_tokens for result in found] == [3, 3]
    assert pass_sizes.count(3) == 1  # the picture, once
    alone = [llava.ask(question, RED, options).text for question in QUESTIONS[:2]]
    assert [result.text for result in found] == alone


def chances(stream: Any) -> list[TokenChance]:
    return [chance for chunk in stream for chance in chunk.chances]


def test_answers_are_those_alone_as_far_as_rounding_goes(llava: Llava) -> None:
    """Up to the first token that differs, probabilities are equal; there, both tokens are as good as equally likely."""
    options = Options(max_tokens=24, speculate="off", top_logprobs=2)
    alone = [chances(llava.stream(question, RED, options)) for question in QUESTIONS]
    compared = 0
    for mine, wanted in zip(map(chances, llava.ask_many(QUESTIONS, RED, options)), alone, strict=True):
        for one, other in zip(mine, wanted, strict=False):
            assert one.logprob == pytest.approx(other.logprob, abs=0.1)
            if one.token != other.token:
                assert other.top[0][1] - other.top[1][1] < 0.1
                break
            compared += 1
    assert compared > 100


def test_pictures_are_read_once_and_weights_once_for_a_token_of_each(llava: Llava, pass_sizes: list[int]) -> None:
    results = ask_together(llava, QUESTIONS, SHORT)
    assert pass_sizes[1] == llava.bundle.manifest.vision.image_tokens
    steps = pass_sizes[2 + len(QUESTIONS) :]  # behind the system's text, the picture and the questions
    assert len(steps) == max(result.completion_tokens for result in results) - 1
    assert steps[0] == len(QUESTIONS)
    assert [result.timings.encode_ms > 0 for result in results] == [True] + 5 * [False]
    assert [result.cache for result in results] == ["miss"] + 5 * ["kv"]


def test_the_kv_cache_is_afterwards_as_before(llava: Llava) -> None:
    """The next answer has the bits it would have had."""
    language = llava._engine.model.scheduler._language
    wanted = []
    for question in QUESTIONS:
        text = llava.ask(question, RED, SHORT).text
        wanted.append((text, language.logits().copy()))
    ask_together(llava, QUESTIONS, SHORT)
    for question, (text, logits) in zip(QUESTIONS, wanted, strict=True):
        assert llava.ask(question, RED, SHORT).text == text
        assert np.array_equal(language.logits(), logits)


def test_the_next_answer_about_a_later_picture_has_its_bits(llava: Llava) -> None:
    """In the KV cache, the last picture is not where it would be alone, with free places before it."""
    language, blue = llava._engine.model.scheduler._language, Image.new("RGB", (48, 32), "blue")
    language.truncate(0)
    text = llava.ask("the red", blue, SHORT).text
    wanted = language.logits().copy()
    for stream in llava.ask_each([RED, blue, blue], "the red", SHORT):
        result_of(stream)
    assert llava.ask("the red", blue, SHORT).text == text
    assert np.array_equal(language.logits(), wanted)


def test_each_answer_ends_by_itself(llava: Llava) -> None:
    stop = llava.ask(QUESTIONS[0], RED, SHORT).text[3:5]
    results = ask_together(llava, QUESTIONS, Options(max_tokens=24, stop=(stop,)))
    assert results[0].finish_reason == "stop"
    assert not any(stop in result.text for result in results)


def test_each_answer_is_drawn_by_its_own_seed(llava: Llava) -> None:
    drawn = Options(max_tokens=12, temperature=0.9, seed=3)
    first, again = ([result.text for result in ask_together(llava, QUESTIONS, drawn)] for _ in range(2))
    assert first == again
    other = [result.text for result in ask_together(llava, QUESTIONS, Options(max_tokens=12, temperature=0.9, seed=4))]
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("questions", "tokens"), [(2 * MAX_BRANCHES + 1, 4), (5, 150)])
def test_as_many_as_there_is_room_for(questions: int, tokens: int, llava: Llava, pass_sizes: list[int]) -> None:
    """The context has 512 positions: three answers of 150 tokens."""
    asked = [f"{number}, a list:" for number in range(questions)]
    results = ask_together(llava, asked, Options(max_tokens=tokens, speculate="off"))
    assert len(results) == questions
    assert {result.finish_reason for result in results} <= {"length", "stop"}
    assert max(count for count in pass_sizes if count < 9) <= MAX_BRANCHES
    assert sum(len(result.text) > 0 for result in results) >= questions - 1


def test_questions_without_a_picture(llava: Llava) -> None:
    results = ask_together(llava, ["a list:", "the red"], SHORT, ())
    assert [r.text for r in results] == [llava.ask(q, (), SHORT).text for q in ("a list:", "the red")]
    assert ask_together(llava, [], SHORT) == []


def test_without_room_for_two_questions_end_one_by_one(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stream is at its end before the second begins, and no later error is its own."""
    read, calls, real = threading.Event(), list[bool](), decoding.decode

    def late(*arguments: Any) -> Any:
        calls.append(not calls or read.wait(10))
        if len(calls) == 3:
            raise BundleError("damaged")
        return real(*arguments)

    monkeypatch.setattr("llava_edge.runtimes.scheduler.decode", late)
    streams = llava.ask_many(["one", "two", "three"], (), replace(SHORT, max_tokens=300))
    assert list(next(streams))[-1].final
    read.set()
    assert list(next(streams))[-1].final
    with pytest.raises(BundleError, match="damaged"):
        list(next(streams))
    assert calls == [True, True, True]


def test_other_work_between_two_questions_changes_nothing(llava: Llava) -> None:
    blue = Image.new("RGB", (48, 32), "blue")
    wanted = [result.text for result in ask_together(llava, ["a list:", "the red"], SHORT)]
    found = []
    for stream in llava.ask_many(["a list:", "the red"], RED, SHORT):
        found.append("".join(chunk.text for chunk in stream))
        llava.ask("the red", blue, SHORT)
    assert found == wanted


def test_room_is_counted_before_the_first_question_is_answered(llava: Llava) -> None:
    with pytest.raises(ContextOverflowError, match=r"Question 2: The prompt needs \d+ positions"):
        next(llava.ask_many(["short", "the " * 600], RED))


@pytest.mark.parametrize("images", [(), RED])
def test_cancelling_ends_all_questions(images: Any, llava: Llava) -> None:
    cancel = threading.Event()
    reasons = []
    for stream in llava.ask_many(["one,", "two,"], images, Options(max_tokens=200), cancel=cancel):
        next(stream, None)
        cancel.set()
        reasons += [chunk.finish_reason for chunk in stream if chunk.finish_reason]
    assert reasons[0] == "cancelled"
    assert len(reasons) <= 2
    each = llava.ask_each([RED, RED], "one,", SHORT, cancel=cancel)
    assert [result_of(stream).finish_reason for stream in each] == ["cancelled"] * 2


def test_leaving_one_early_ends_all_questions(llava: Llava, pass_sizes: list[int]) -> None:
    streams = list(llava.ask_many(["one,", "two,"], RED, Options(max_tokens=200)))
    next(streams[1])
    streams[1].close()
    assert list(streams[0])[-1].finish_reason == "cancelled"
    assert len(pass_sizes) < 200
    assert llava.ask("one,", RED, SHORT).finish_reason == "length"


def test_a_stream_outlives_the_iterator_it_is_from(llava: Llava) -> None:
    """Never does it read as an empty answer: if the others were dropped, it says that it was cancelled."""
    only = next(llava.ask_many(["one,"], RED, SHORT))
    assert result_of(only).text == llava.ask("one,", RED, SHORT).text
    first = next(llava.ask_many(["one,", "two,"], RED, Options(max_tokens=200)))
    assert result_of(first).finish_reason == "cancelled"


def test_an_error_reaches_every_stream(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise BundleError("not finite")

    monkeypatch.setattr(llava._engine.model.scheduler._language, "evaluate_branches", broken)
    for stream in list(llava.ask_many(["one,", "two,"], RED, SHORT)):
        with pytest.raises(BundleError, match="not finite"):
            list(stream)
    monkeypatch.undo()
    assert llava.ask("one,", RED, SHORT).finish_reason == "length"


def test_branches_are_the_continuations_they_would_be_alone(micro_bundle: Path) -> None:
    """Of different lengths; and a check that a wrong position would show."""
    language = LanguageModel(micro_bundle / LANGUAGE, context=256, threads=1)
    start, ends = [5, 6, 7, 8], [[20, 21, 22], [30], [40, 41]]
    alone = []
    for end in ends:
        language.truncate(0)
        language.evaluate_tokens([*start, *end, 50], NEVER)
        alone.append(language.logits().copy())
    language.truncate(0)
    language.evaluate_tokens(start, NEVER)
    branches = Branches(language)
    for end in ends:
        language.truncate(len(start))
        language.evaluate_tokens(end, NEVER)
        branches.start(len(start) if end is not ends[0] else 0)
    branches.step([50, 50, 50], [1, 2, 3])
    for row, logits in enumerate(alone):
        np.testing.assert_allclose(language.logits(row), logits, atol=0.05)
        assert np.abs(language.logits(row) - alone[row - 1]).max() > 0.5
    branches.end(2)
    branches.keep_prompt()  # takes no number
    assert [branches.start(0) for _ in range(MAX_BRANCHES - 2)] == [2, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="No more than 8 branches"):
        branches.start(0)
    assert language.save_state(3)  # in a sequence of its own
    branches.step([50, 50], [7, 8])
    np.testing.assert_allclose(language.logits(1), language.logits(0), atol=0.05)
    branches.close()
    assert language.cached_keys == [*start, *ends[-1]]
    language.truncate(0)
    language.evaluate_tokens([5] * 256, NEVER)  # nothing is left of them
    language.close()


@pytest.mark.parametrize("context", [1, 2, 8, 9, 10])
def test_a_small_context_has_fewer_branches(context: int, micro_bundle: Path) -> None:
    """llama.cpp aborts the process when it is asked for more sequences than positions."""
    language = LanguageModel(micro_bundle / LANGUAGE, context=context, threads=1)
    assert language.max_branches == max(0, min(context - 3, MAX_BRANCHES))
    language.evaluate_tokens([5], NEVER)
    language.close()


def test_a_first_question_that_its_grammar_ends_does_not_stop_the_second(
    llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first token, when it is still alone."""
    real, samplers = Sampler._allowed, list[Sampler]()

    def allowed(self: Sampler, constraint: Any, ids: Any) -> Any:
        samplers.append(self)
        return real(self, constraint, ids)[: 0 if self is samplers[0] else None]

    monkeypatch.setattr(Sampler, "_allowed", allowed)
    first, second = llava.ask_many(["one,", "two,"], RED, Options(grammar='root ::= "yes"', max_tokens=8))
    with pytest.raises(UsageError, match="no token that the grammar"):
        list(first)
    assert result_of(second).text == "yes"


def test_one_question_is_not_many(llava: Llava) -> None:
    with pytest.raises(UsageError, match="ask_many expects a list"):
        next(llava.ask_many("ab", RED))
