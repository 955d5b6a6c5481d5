"""Requests that arrive while another one is answered, from other threads: answered together with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import encode, picture

from llava_edge import Llava
from llava_edge.errors import BundleError, ImageError, UsageError
from llava_edge.options import Chunk, EngineOptions, Options, Result
from llava_edge.prompt import Message
from llava_edge.runtimes import language as language_module
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.parallel import ParallelDecoder
from llava_edge.runtimes.pipeline import Engine
from llava_edge.runtimes.prefill import Segment
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.speculation import Speculation

LONG = Options(max_tokens=150, speculate="off")
SHORT = replace(LONG, max_tokens=20)
IMAGES = [encode(picture(seed=number), "PNG") for number in range(4)]


@pytest.fixture
def llava(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llava]:
    """Tests have no native kernels, with which alone answers are joined, because their bits stay the same.

    However its answers end, nothing of them stays in llama.cpp.
    """
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, cache="memory")) as loaded:
        loaded._engine.model.language.batch_invariant = True
        library, samplers = loaded._engine.model.language.library, list[int]()
        free = library.llama_sampler_free

        def making(make: Any, *arguments: Any) -> Any:
            samplers.append(make(*arguments))
            return samplers[-1]

        def freed(sampler: Any) -> None:
            free(sampler)
            samplers.remove(sampler)

        for name in ("llama_sampler_chain_init", "llama_sampler_init_grammar"):
            monkeypatch.setattr(library, name, partial(making, getattr(library, name)))
        monkeypatch.setattr(library, "llama_sampler_free", freed)
        yield loaded
    assert samplers == []


@pytest.fixture
def batches(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each pass over the weights continues."""
    language = llava._engine.model.language
    assert language
    seen: list[int] = []
    right = language.evaluate_branches

    def evaluate(tokens: Any, positions: Any, sequences: Any) -> None:
        seen.append(len(tokens))
        right(tokens, positions, sequences)

    monkeypatch.setattr(language, "evaluate_branches", evaluate)
    return seen


def begin(llava: Llava, question: str, images: Any = (), options: Options = LONG) -> tuple[Iterator[Chunk], str]:
    """A stream after its first chunk, so that it is being answered, and that chunk's text."""
    stream = llava.stream(question, images, options)
    return stream, next(stream).text


def rest(stream: Iterator[Chunk]) -> tuple[str, Result]:
    chunks = list(stream)
    assert chunks[-1].final
    return "".join(chunk.text for chunk in chunks), chunks[-1].final


class Hold:
    """Until `go` is set, an answer that is decoded alone gets no token after its first `steps`, when `begun` is set."""

    def __init__(self, llava: Llava, monkeypatch: pytest.MonkeyPatch, steps: int = 1) -> None:
        self.begun, self.go, self._steps = threading.Event(), threading.Event(), steps
        self._right = llava._engine._thread.take
        monkeypatch.setattr(llava._engine._thread, "take", self._take)

    def _take(self) -> Job | None:
        if self._steps:
            self._steps -= 1
            if not self._steps:
                self.begun.set()
            return None
        assert self.go.wait(20)
        return self._right()


def together(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, requests: list[tuple[str, Any, Options]], steps: int = 1
) -> list[Result | Exception]:
    """The results of requests of which the others are queued when the first one has its first `steps` tokens."""
    hold, queued = Hold(llava, monkeypatch, steps), threading.Semaphore(0)
    enqueue = llava._engine._thread._enqueue

    def counted(job: Any) -> None:
        enqueue(job)
        queued.release()

    monkeypatch.setattr(llava._engine._thread, "_enqueue", counted)

    def ask(question: str, images: Any, options: Options) -> Result | Exception:
        try:
            return llava.ask(question, images, options)
        except Exception as error:  # noqa: BLE001 - compared by the tests
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        futures = []
        for request in requests:
            futures.append(pool.submit(ask, *request))
            assert queued.acquire(timeout=20)
            assert hold.begun.wait(20)
        hold.go.set()
        return [future.result(60) for future in futures]


def assert_same_together(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, requests: list[tuple[str, Any, Options]], steps: int = 1
) -> list[Result]:
    alone = [llava.ask(question, image, options).text for question, image, options in requests]
    found = [result for result in together(llava, monkeypatch, requests, steps) if isinstance(result, Result)]
    assert [result.text for result in found] == alone
    return found


def test_answers_are_decoded_together_and_are_those_alone(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, Any, Options]] = [
        ("the red", image, replace(LONG, max_tokens=20 + 10 * number)) for number, image in enumerate(IMAGES)
    ]
    alone = [llava.ask(question, image, options) for question, image, options in requests]
    found = together(llava, monkeypatch, requests)
    assert max(batches) == len(requests)
    different = 0
    for one, other in zip(found, alone, strict=True):
        assert isinstance(one, Result)
        assert (one.finish_reason, one.completion_tokens) == (other.finish_reason, other.completion_tokens)
        different += one.text != other.text
    assert different <= 1  # without the native kernels a batch rounds differently from a single token
    assert len({result.text for result in alone}) == len(alone)


@pytest.mark.parametrize(("speculate", "steps"), [("auto", 1), ("ngram", 1), ("ngram", 8)])
def test_an_answer_with_drafts_goes_on_without(
    speculate: Any, steps: int, llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, options = llava._engine.model.scheduler, Options(max_tokens=60, speculate=speculate)
    monkeypatch.setattr(scheduler, "_speculation", Speculation(scheduler._language))
    requests: list[tuple[str, Any, Options]] = [
        ("a list: one, two, one, two, one,", (), options),
        ("the red", IMAGES[0], options),
    ]
    found = assert_same_together(llava, monkeypatch, requests, steps)
    assert max(batches) == 2
    assert (found[0].drafted_tokens > 0) == (found[0].accepted_tokens > 0) == (steps > 1)  # as there were before


def test_a_sampled_answer_goes_on_with_its_own_numbers(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(max_tokens=40, temperature=0.8, seed=7, repeat_penalty=1.3)
    requests: list[tuple[str, Any, Options]] = [
        ("the red", IMAGES[0], replace(options, grammar="root ::= [a-z ]{99}")),
        ("a list:", (), replace(options, seed=8)),
    ]
    assert_same_together(llava, monkeypatch, requests)
    assert max(batches) == 2


def test_without_the_same_bits_requests_are_answered_in_turn(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llava._engine.model.language.batch_invariant = False
    found = together(llava, monkeypatch, [("the red", IMAGES[0], LONG), ("a list:", (), LONG)])
    assert not batches
    assert all(isinstance(result, Result) for result in found)


def test_without_room_a_request_waits(llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The context has 512 positions. The third would fit beside the first, but is not preferred to the second."""
    long = replace(LONG, max_tokens=350)
    requests: list[tuple[str, Any, Options]] = [("one,", (), long), ("a list:", (), long), ("12", (), SHORT)]
    alone = [llava.ask(question, image, each).completion_tokens for question, image, each in requests]
    found = together(llava, monkeypatch, requests)
    assert [result.completion_tokens for result in found if isinstance(result, Result)] == alone
    assert set(batches) == {1, 2}
    assert len(batches) < alone[1]  # the first, beside which there is no room, keeps its drafts


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_joins_where_all_positions_suffice_and_not_with_one_more(
    more: int, llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the room for the first prompt, or what is left of its answer, llama.cpp would end both or one wait."""
    questions = ["a list: " * 20, "12"]
    prompts = sum(llava.ask(question, (), replace(LONG, max_tokens=1)).prompt_tokens for question in questions)
    limits = [50, llava.context - prompts - 50 + 1 + more]  # the first one's first token is in no other place
    requests = [
        (question, (), replace(LONG, max_tokens=tokens)) for question, tokens in zip(questions, limits, strict=True)
    ]
    found = together(llava, monkeypatch, requests)
    assert [result.completion_tokens for result in found if isinstance(result, Result)] == limits
    assert bool(batches) == (more == 0)


def test_an_unusable_picture_is_an_error_of_its_own_request(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    found = together(
        llava, monkeypatch, [("the red", IMAGES[0], LONG), ("the red", b"no picture", LONG), ("a list:", (), LONG)]
    )
    assert isinstance(found[1], ImageError)
    assert [isinstance(result, Result) for result in found] == [True, False, True]


def test_a_picture_that_clip_fails_on_is_an_error_of_its_own_request(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is joining or the first; its text is already in the KV cache then."""
    prepared = llava._engine.prepare(IMAGES[1])
    broken: Any = replace(prepared, crops=np.full_like(prepared.crops, np.nan), key="broken")
    found = together(llava, monkeypatch, [("the red", IMAGES[0], LONG), ("12", broken, LONG), ("12", (), SHORT)])
    assert [type(each) for each in found] == [Result, BundleError, Result]
    assert "vision.onnx produced values that are not finite" in str(found[1])
    assert max(batches) == 2
    streams = llava.ask_each([broken, IMAGES[0]], "the red", LONG)
    with pytest.raises(BundleError):
        list(streams[0])
    assert rest(streams[1])[0] == llava.ask("the red", IMAGES[0], LONG).text


def test_a_broken_model_is_an_error_of_all(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise BundleError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(llava._engine.model.language, "evaluate_branches", broken)
        found = together(llava, patch, [("the red", IMAGES[0], LONG), ("a list:", (), LONG)])
    assert all(isinstance(error, BundleError) for error in found)
    assert llava.ask("the red", IMAGES[0], replace(LONG, max_tokens=5)).completion_tokens == 5


def test_others_get_a_token_between_two_pictures(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B reads each for many seconds."""
    language, seen = llava._engine.model.language, list[str]()
    assert language

    def record(name: str) -> None:
        right = getattr(language, name)

        def recorded(*arguments: Any, **more: Any) -> None:
            seen.append(name)
            right(*arguments, **more)

        monkeypatch.setattr(language, name, recorded)

    for name in ("evaluate_embeddings", "evaluate_branches"):
        record(name)
    together(llava, monkeypatch, [("a list:", (), LONG), *(("the red", image, SHORT) for image in IMAGES)])
    pictures = [place for place, name in enumerate(seen) if name == "evaluate_embeddings"]
    assert len(pictures) == len(IMAGES)
    assert all(second - first > 1 for first, second in pairwise(pictures))


@pytest.fixture
def passes(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, threading.Event]]:
    """Positions and cancel event of each pass over the weights, with small parts of prompts that others wait for."""
    language, seen = llava._engine.model.language, list[tuple[int, threading.Event]]()
    right = language._evaluate

    def evaluate(batch: Any, cancel: threading.Event, *, few: bool) -> None:
        seen.append((batch.handle.n_tokens, cancel))
        right(batch, cancel, few=few)

    monkeypatch.setattr(language_module, "SHARED_BATCH", 16)
    monkeypatch.setattr(language, "_evaluate", evaluate)
    return seen


@pytest.mark.parametrize("tokens", [150, 5])
def test_others_get_tokens_while_a_prompt_is_read(
    tokens: int, llava: Llava, passes: list[tuple[int, threading.Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 7B reads a picture for many seconds. With few tokens the other one ends meanwhile."""
    requests: list[tuple[str, Any, Options]] = [
        ("a list:", (), replace(LONG, max_tokens=tokens)),
        ("the red and the blue. " * 10, IMAGES[0], SHORT),
    ]
    alone = [llava.ask(*request) for request in requests]
    passes.clear()
    found = together(llava, monkeypatch, requests)
    assert [result.text for result in found if isinstance(result, Result)] == [result.text for result in alone]
    counts = [count for count, _ in passes]
    parts = [place for place, count in enumerate(counts) if 16 <= count < 32]
    assert len(parts) > 5
    between = [counts[first + 1 : second] for first, second in pairwise(parts)]
    assert [1] in between
    assert (between.count([1]) >= 5) == (tokens > 5)


def test_a_prompt_can_be_cancelled_between_its_parts(
    llava: Llava, passes: list[tuple[int, threading.Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, fill, cancelled = ParallelDecoder._sample, "the red and the blue. " * 10, list[int]()

    def cancel_reading(decoder: ParallelDecoder, branch: Any, row: int) -> None:
        sample(decoder, branch, row)
        (part, event), (tokens, _) = passes[-2:]
        if part > 8 and tokens == 1 and not cancelled:
            cancelled.append(part)
            event.set()

    monkeypatch.setattr(ParallelDecoder, "_sample", cancel_reading)
    found = together(llava, monkeypatch, [("the red", (), LONG), (fill, (), SHORT), ("12", (), SHORT)])
    reasons = [result.finish_reason for result in found if isinstance(result, Result)]
    assert reasons == ["length", "cancelled", "length"]
    assert cancelled


def test_a_prompt_cancelled_between_its_parts_changes_no_other_answer(
    llava: Llava, passes: list[tuple[int, threading.Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was evaluated of it lies between the tokens of the answer, whose later tokens must not take its place."""
    options, sample = replace(LONG, top_logprobs=1), ParallelDecoder._sample
    expected = [chunk.chances for chunk in llava.stream("the red", (), options)]
    hold, stream = Hold(llava, monkeypatch), llava.stream("the red", (), options)
    chunks = [next(stream)]

    def cancel_reading(decoder: ParallelDecoder, branch: Any, row: int) -> None:
        sample(decoder, branch, row)
        if passes[-2][0] > 8:
            passes[-2][1].set()

    monkeypatch.setattr(ParallelDecoder, "_sample", cancel_reading)
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(llava.ask, "the red and the blue. " * 10, (), SHORT)
        while llava._engine._thread._jobs.empty():
            pass
        hold.go.set()
        assert cancelled.result(20).finish_reason == "cancelled"
    assert [chunk.chances for chunk in [*chunks, *stream]] == expected


def test_leaving_an_answer_leaves_the_others(llava: Llava, batches: list[int]) -> None:
    endless = Options(max_tokens=400, speculate="off")
    first, _ = begin(llava, "the red", (), replace(LONG, max_tokens=100))
    second, _ = begin(llava, "a list:", (), replace(endless, max_tokens=200))
    third, _ = begin(llava, "12", (), replace(LONG, max_tokens=50))
    second.close()  # type: ignore[attr-defined]
    assert rest(first)[1].completion_tokens == 100
    assert rest(third)[1].completion_tokens == 50


def test_a_cancelled_answer_ends_alone(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, cancel = Hold(llava, monkeypatch), threading.Event()
    first = llava.stream("the red", (), replace(LONG, max_tokens=60))
    next(first)
    second = llava.stream("a list:", (), LONG, cancel=cancel)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, second)
        while llava._engine._thread._jobs.empty():
            pass
        cancel.set()
        hold.go.set()
        assert reading.result(20)[-1].finish_reason == "cancelled"
    assert rest(first)[1].completion_tokens == 60


def test_a_request_that_waits_for_room_can_be_cancelled_at_once(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even while the model computes for others; what comes after it then gets its room."""
    language, requests = llava._engine.model.language, threading.Semaphore(0)
    assert language
    cancel, go = threading.Event(), threading.Event()
    prepare, evaluate = llava._engine._preparer.prepare, language.evaluate_tokens

    def prepared(*arguments: Any) -> Any:
        requests.release()
        return prepare(*arguments)

    def wait(tokens: Any, event: threading.Event, between: Any = None) -> None:
        if requests.acquire(blocking=False):  # the second request is prepared
            assert go.wait(20)
        evaluate(tokens, event, between)

    hold = Hold(llava, monkeypatch)
    long = replace(LONG, max_tokens=300)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(llava.ask, "the red", (), long)
        assert hold.begun.wait(20)
        monkeypatch.setattr(llava._engine._preparer, "prepare", prepared)
        monkeypatch.setattr(language, "evaluate_tokens", wait)
        second = pool.submit(list, llava.stream("a list:", (), long, cancel=cancel))
        while llava._engine._thread._jobs.empty():
            pass
        hold.go.set()
        while llava._engine._thread._jobs.qsize():
            pass
        third = pool.submit(llava.ask, "12", (), SHORT)
        cancel.set()
        assert second.result(5)[-1].finish_reason == "cancelled"
        assert not first.done()
        go.set()
        assert third.result(20).completion_tokens == SHORT.max_tokens
        assert first.result(20).completion_tokens == long.max_tokens
    assert max(batches) == 2


def test_positions_of_a_cancelled_prompt_are_free_again(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third request has the picture of the second, which is cancelled; the fourth has no room beside the others."""
    language = llava._engine.model.language
    assert language
    evaluate, evaluated = language.evaluate_embeddings, list[str]()

    def cancel_second(rows: Any, keys: Any, cancel: threading.Event, between: Any) -> None:
        evaluate(rows, keys, cancel, between)
        evaluated.append(keys[0][0])
        if len(evaluated) == 1:
            cancel.set()

    with_picture = llava.ask("the red", IMAGES[2], replace(LONG, max_tokens=1)).prompt_tokens
    without = llava.ask("the red", (), replace(LONG, max_tokens=1)).prompt_tokens
    room = llava.context - with_picture - 2 * without - 200 - 50
    options = [replace(LONG, max_tokens=tokens) for tokens in (200, 50, 50, room + 10)]
    images = [(), IMAGES[1], IMAGES[1], ()]
    monkeypatch.setattr(language, "evaluate_embeddings", cancel_second)
    questions = ["the red", "the red", "the red", "12"]
    found = together(llava, monkeypatch, list(zip(questions, images, options, strict=True)))
    reasons = [result.finish_reason for result in found if isinstance(result, Result)]
    assert reasons == ["length", "cancelled", "length", "length"]
    assert len(evaluated) == 2


def test_a_grammar_without_a_next_token_is_an_error_of_its_own_request(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Sampler._allowed
    calls: list[Sampler] = []

    def fail(sampler: Sampler, constraint: Any, ids: Any) -> Any:
        calls.append(sampler)
        if calls.count(sampler) == 2:
            raise UsageError("no token")
        return right(sampler, constraint, ids)

    monkeypatch.setattr(Sampler, "_allowed", fail)
    strict = replace(LONG, grammar='root ::= "aaaaaaaa"')
    requests: list[tuple[str, Any, Options]] = [("the red", (), LONG), ("a list:", (), strict), ("12", (), SHORT)]
    found = together(llava, monkeypatch, requests)
    assert [type(each) for each in found] == [Result, UsageError, Result]
    assert max(batches) == 3
    found = [llava.ask("the red", (), SHORT), *together(llava, monkeypatch, [requests[1], requests[2]])]
    assert [type(each) for each in found] == [Result, UsageError, Result]


def test_closing_the_model_ends_all(micro_bundle: Path) -> None:
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1)) as loaded:
        loaded._engine.model.language.batch_invariant = True
        streams = [begin(loaded, question, (), Options(max_tokens=140))[0] for question in ("one", "two", "12")]
    assert [rest(stream)[1].finish_reason for stream in streams] == ["cancelled"] * 3


def test_a_known_picture_is_restored_beside_others(
    llava: Llava, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its saved state comes to another place of the KV cache."""
    expected = [llava.ask("the red", image, SHORT).text for image in IMAGES[:2]]
    llava.ask("12", (), SHORT)  # saves the state of the last picture
    found = together(llava, monkeypatch, [("the red", image, SHORT) for image in IMAGES[:2]])
    assert max(batches) == 2
    assert [result.cache for result in found if isinstance(result, Result)] == ["kv", "kv"]
    assert [result.text for result in found if isinstance(result, Result)] == expected


def test_a_state_that_cannot_be_restored_beside_others_is_an_error(
    llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never an answer from positions that are gone."""
    for image in IMAGES[:2]:
        llava.ask("the red", image, SHORT)
    llava.ask("12", (), SHORT)
    language = llava._engine.model.language
    assert language
    restore, restored = language.library.llama_state_seq_set_data, []

    def fail_second(*arguments: Any) -> int:
        restored.append(1)
        return int(restore(*arguments)) if len(restored) == 1 else 0

    with monkeypatch.context() as patch:
        patch.setattr(language.library, "llama_state_seq_set_data", fail_second)
        found = together(llava, patch, [("the red", image, SHORT) for image in IMAGES[:2]])
    assert len(restored) == 2
    assert all(isinstance(error, BundleError) for error in found)
    assert llava.ask("the red", IMAGES[0], SHORT).completion_tokens == 20


def test_positions_that_cannot_be_removed_beside_others_are_an_error(
    llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All positions are dropped then, those of the others too."""
    for image in IMAGES[:2]:
        llava.ask("the red", image, SHORT)
    llava.ask("12", (), SHORT)  # saves the state of the last picture, in whose place nothing may be
    language = llava._engine.model.language
    assert language
    remove, branched = language.library.llama_memory_seq_rm, list[int]()

    def failed(memory: Any, sequence: int, first: int, last: int) -> bool:
        if sequence == 0 and language._has_branches:
            branched.append(first)
            return False
        return bool(remove(memory, sequence, first, last))

    with monkeypatch.context() as patch:
        patch.setattr(language.library, "llama_memory_seq_rm", failed)
        found = together(llava, patch, [("the red", image, SHORT) for image in IMAGES[:2]])
    assert set(branched) == {0}
    assert all(isinstance(error, BundleError) for error in found)
    assert llava.ask("the red", IMAGES[0], SHORT).completion_tokens == 20


def test_a_conversation_joins_and_goes_on(llava: Llava) -> None:
    chat = llava.chat()
    stream, _ = begin(llava, "a list:", (), LONG)
    first = list(chat.say("the red", IMAGES[0]))[-1].final
    assert first
    rest(stream)
    second = list(chat.say("and the blue"))[-1].final
    assert second
    assert second.prompt_tokens > first.prompt_tokens
    assert isinstance(llava._engine, Engine)


def test_positions_that_will_be_kept_are_known_before(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is counted by them: those of a turn that reused part of a text are not kept, although they are the same."""
    prefill, kept = llava._engine.model.scheduler._prefill, list[tuple[int, int]]()
    assert prefill
    right = prefill.run

    def run(segments: list[Segment], *arguments: Any, reuse: bool = False, **more: Any) -> int:
        expected = prefill.kept(segments)
        actual = right(segments, *arguments, reuse=reuse, **more)
        if not reuse:
            kept.append((expected, actual))
        return actual

    monkeypatch.setattr(prefill, "run", run)
    for image in IMAGES[:2]:
        for question in ("the red", "a list:"):
            llava.ask(question, image, SHORT)
    chat = llava.chat(options=SHORT)
    list(chat.say("one, two"))
    messages = [*chat.messages, Message("user", "the red", 1)]
    list(chat.say("the red", IMAGES[2]))
    list(llava.answer(messages, IMAGES[2], SHORT))
    list(llava.answer(messages, IMAGES[2], SHORT))
    assert [expected > 0 for expected, _ in kept] == [False, True, False, True, False, True]
    assert all(expected in (0, actual) for expected, actual in kept)
    assert kept[4] == (0, 0)
