"""The engine on a tiny real bundle: what goes in, what comes out, what is refused, what cancelling leaves behind."""

from __future__ import annotations

import os
import pickle
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import in_child

from llava_edge import Llava
from llava_edge.bundle import (
    LANGUAGE,
    PROJECTOR,
    VISION,
    VISION_DATA,
    Bundle,
    file_entry,
    read_manifest,
    write_manifest,
)
from llava_edge.conversation import Chat
from llava_edge.errors import (
    BundleError,
    ContextOverflowError,
    MemoryLimitError,
    MissingError,
    OptionError,
    UnavailableError,
    UsageError,
)
from llava_edge.options import Chunk, EngineOptions, Options, result_of
from llava_edge.prompt import Message, Piece
from llava_edge.runtimes import CancelledError, bindings, machine, probe, worker
from llava_edge.runtimes.batch import Batch
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.pipeline import Engine
from llava_edge.runtimes.projector import gelu, linear
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.stats import RequestStats
from llava_edge.runtimes.stderr_capture import capture_stderr, write_stderr
from llava_edge.runtimes.text import TextStream
from llava_edge.runtimes.vision import VisionEncoder
from llava_edge.templates import TEMPLATES, Template

CPU = EngineOptions(device="cpu", threads=1)
SHORT = Options(max_tokens=24)
ROOT = Path(__file__).parent.parent
NEVER = threading.Event()


def text_of(chunks: Iterable[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (48, 32), colour)


# Text in, tokens out.


def test_tokens_equal_the_checkpoints_tokenizer(language: LanguageModel, micro_checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(micro_checkpoint / "tokenizer.json"))
    for text in ("the red colour", "  two  spaces\n\nand 1234 digits", "é€😀 \u200f עברית", "a\0b", "it's we'll", ""):
        assert language.vocabulary.tokenize(text) == oracle.encode(text, add_special_tokens=False).ids
        assert b"".join(map(language.vocabulary.piece, language.vocabulary.tokenize(text))) == text.encode()


def test_control_tokens_in_a_users_text_stay_text(language: LanguageModel) -> None:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    controls = {language.vocabulary.control_id(name) for name in names}
    assert len(controls) == 3
    assert {language.vocabulary.piece(token) for token in controls} == {b""}
    for name in (*names, "<image>", "<__media__>", "<s>"):
        for text in (name, f"a {name} b", f"a{name}"):
            ids = language.vocabulary.tokenize(text)
            assert not controls & set(ids)
            assert b"".join(map(language.vocabulary.piece, ids)) == text.encode()


def test_a_control_token_that_is_not_there(language: LanguageModel) -> None:
    for name in ("</s>", "the", "<|im_start|><|im_end|>"):
        with pytest.raises(BundleError, match="no control token"):
            language.vocabulary.control_id(name)


def test_what_a_tokenizer_should_not_do(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a vocabulary of a damaged file."""
    vocabulary, library = language.vocabulary, language.library
    with pytest.raises(ContextOverflowError, match="has 1048577 bytes"):
        vocabulary.tokenize("a" * 1048577)
    monkeypatch.setattr(library, "llama_tokenize", lambda *_: -7)
    with pytest.raises(BundleError, match="needs 7 tokens for a text of 1 bytes"):
        vocabulary.tokenize("a")
    monkeypatch.setattr(library, "llama_vocab_get_text", lambda *_: b"\xff")
    assert vocabulary.token_texts()[0] == "\ufffd"

    def to_piece(pointer: Any, token: int, buffer: Any, size: int, *_: Any) -> int:
        buffer[: min(size, 99)] = b"x" * min(size, 99)
        return 99 if size >= 99 else -99

    monkeypatch.setattr(library, "llama_token_to_piece", to_piece)
    assert vocabulary.piece(5) == b"x" * 99


# The memory of the language model.


def test_a_kept_beginning_gives_the_logits_of_a_fresh_start(language: LanguageModel) -> None:
    rows = np.random.default_rng(0).standard_normal((20, language.hidden_size)).astype(np.float32)
    image: list[Key] = [("hash", row) for row in range(20)]
    first, last = language.vocabulary.tokenize("what colour is"), language.vocabulary.tokenize("the other one?")

    def evaluate(done: int) -> np.ndarray[Any, Any]:
        language.evaluate_tokens(first[done:], NEVER)
        start = max(0, done - len(first))
        language.evaluate_embeddings(rows[start:], image[start:], NEVER)
        language.evaluate_tokens(last, NEVER)
        return language.logits().copy()

    keys: list[Key] = [*first, *image, *last]
    assert language.keep_common_prefix([0]) == 0
    fresh = evaluate(0)
    assert language.keep_common_prefix([*first, *image[:7], ("another", 7), *last]) == len(first) + 7
    assert language.keep_common_prefix(keys) == len(first) + 7
    assert np.allclose(evaluate(len(first) + 7), fresh, atol=1e-3)
    assert language.keep_common_prefix(keys) == len(keys) - 1  # one position is always left, for its logits


def test_an_evaluation_that_python_has_no_memory_to_wait_for_leaves_nothing(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp goes on meanwhile, and would add positions that nobody knows of."""
    tokens = language.vocabulary.tokenize("the red colour")
    language.keep_common_prefix([0])
    language.evaluate_tokens(tokens, NEVER)
    wanted = language.logits().copy()
    language.keep_common_prefix([0])

    def late(batch: Batch) -> int:
        begun.set()
        time.sleep(0.1)
        return LanguageModel._llama_decode(language, batch)

    def failed(futures: list[Any], timeout: float | None = None) -> Any:
        monkeypatch.undo()
        assert begun.wait(20)
        raise MemoryError

    begun = threading.Event()
    monkeypatch.setattr(language, "_llama_decode", late)
    monkeypatch.setattr(worker, "wait", failed)
    with pytest.raises(MemoryError):
        language.evaluate_tokens(tokens, NEVER)
    language.evaluate_tokens(tokens, NEVER)
    assert np.array_equal(language.logits(), wanted)


def test_cancelled_evaluation_leaves_nothing_half_done(language: LanguageModel) -> None:
    """Setting the event in the middle of a long prompt stops it, and the next evaluation is not disturbed."""
    tokens = language.vocabulary.tokenize("the red colour ") * 30
    assert len(tokens) > 200
    language.keep_common_prefix([0])
    language.evaluate_tokens(tokens, NEVER)
    wanted = language.logits().copy()
    language.keep_common_prefix([0])
    cancel = threading.Event()
    real = language._abort
    try:
        # Aborting from inside the computation, at a fixed graph node, so that the moment does not depend on speed.
        asked = iter(range(10_000))
        language._abort = language.library.ggml_abort_callback(lambda _: next(asked) >= 10)
        with pytest.raises(CancelledError):
            language.evaluate_tokens(tokens, cancel)
    finally:
        language._abort = real
    assert language.cached_keys == []
    language.evaluate_tokens(tokens, NEVER)
    assert np.allclose(language.logits(), wanted, atol=1e-3)


def test_logits_are_computed_of_no_other_position(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a product with the whole vocabulary each."""
    decode, seen = language.library.llama_decode, list[list[int]]()

    def noted(context: Any, batch: Any) -> int:
        seen.append([batch.logits[i] for i in range(batch.n_tokens)])
        return int(decode(context, batch))

    monkeypatch.setattr(language.library, "llama_decode", noted)
    language.truncate(0)
    language.evaluate_tokens([5] * 3, NEVER)
    language.evaluate_all_logits([5] * 2, NEVER)
    language.evaluate_tokens([5] * 3, NEVER)
    assert seen == [[0, 0, 1], [1, 1], [0, 0, 1]]


def test_a_kv_cache_that_cannot_be_shortened_is_emptied(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to remain is lost, too, so nothing may be evaluated behind it."""
    monkeypatch.setattr(language.library, "llama_memory_seq_rm", lambda *_: False)
    language.truncate(0)
    language.evaluate_tokens([5] * 8, NEVER)
    with pytest.raises(BundleError, match="cannot remove"):
        language.truncate(4)
    assert language.cached_keys == []
    language.evaluate_tokens([5] * 8, NEVER)
    branches = Branches(language)
    branches.start(0)
    with pytest.raises(BundleError, match="cannot remove"):  # what a branch shares with the prompt
        language.truncate(0)
    branches.close()


# Sampling.


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.7),
        Options(temperature=1.5, top_k=5),
        Options(temperature=1.0, top_p=0.6),
        Options(temperature=2.0, min_p=0.3),
        Options(temperature=1.3, top_k=40, top_p=0.8, min_p=0.02),
    ],
)
def test_draws_follow_transformers_warpers(options: Options, language: LanguageModel) -> None:
    """Only tokens that Hugging Face's `generate` could draw, about as often as it would."""
    import torch
    from transformers.generation import logits_process as hf

    language.keep_common_prefix([0])
    language.evaluate_tokens(language.vocabulary.tokenize("the red colour"), NEVER)
    scores = torch.from_numpy(language.logits().copy())[None] * 1.0
    warpers: list[Any] = [hf.TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        warpers.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(hf.MinPLogitsWarper(options.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    wanted = scores.softmax(-1)[0].numpy()

    draws = 4000
    sampler = Sampler(language, replace(options, seed=0))
    counts = np.bincount([sampler.sample() for _ in range(draws)], minlength=len(wanted))
    sampler.close()
    assert not counts[wanted == 0].any()
    # Five standard deviations of a binomial count: a wrong order of the steps is far outside.
    assert np.all(np.abs(counts / draws - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-3)


def sampled(language: LanguageModel, options: Options, count: int) -> list[int]:
    """Tokens of an answer to nothing in particular."""
    start_over(language)
    sampler = Sampler(language, options)
    found = []
    for _ in range(count):
        found.append(sampler.sample())
        language.evaluate_tokens(found[-1:], NEVER)
    sampler.close()
    return found


def start_over(language: LanguageModel) -> None:
    language.keep_common_prefix([0])
    language.evaluate_tokens(language.vocabulary.tokenize("the red colour"), NEVER)


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_the_penalty_is_that_of_transformers(penalty: float, language: LanguageModel) -> None:
    """Over the last 64 tokens of the answer; with those of the whole answer or the prompt, others are the likeliest."""
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    penalize = RepetitionPenaltyLogitsProcessor(penalty)

    def answer(window: int, before: list[int]) -> list[int]:
        start_over(language)
        found: list[int] = []
        for _ in range(120):
            seen = torch.tensor([[*before, *found][-window:]], dtype=torch.long)
            scores = torch.from_numpy(language.logits().copy())[None]
            found.append(int((penalize(seen, scores) if seen.numel() else scores).argmax()))
            language.evaluate_tokens(found[-1:], NEVER)
        return found

    got = sampled(language, Options(repeat_penalty=penalty), 120)
    assert got == answer(64, [])
    assert penalty < 1 or got not in (answer(120, []), answer(64, language.vocabulary.tokenize("the red colour")))


def test_penalties_for_each_time_and_for_once(language: LanguageModel) -> None:
    """As OpenAI defines them: the logit less count * frequency, and less presence if there is any."""
    start_over(language)
    found: list[int] = []
    for _ in range(60):
        counts = np.bincount(found, minlength=language.vocabulary.size)
        found.append(int(np.argmax(language.logits() - 0.05 * counts - 0.7 * (counts > 0))))
        language.evaluate_tokens(found[-1:], NEVER)
    settings = ((0.05, 0.7), (0.7, 0.05), (0.05, 0), (0, 0.7), (0, 0))  # swapped, too, and each alone
    answers = [sampled(language, Options(frequency_penalty=f, presence_penalty=p), 60) for f, p in settings]
    assert answers[0] == found
    assert len(set(map(tuple, answers))) == len(settings)


def test_a_penalty_ends_a_loop(llava: Llava) -> None:
    plain = Options(max_tokens=200)
    loop, free = (llava.ask("hello", options=replace(plain, repeat_penalty=value)).text for value in (1.0, 2.0))
    assert loop == llava.ask("hello", options=plain).text
    assert novelty(loop) < 0.5
    assert novelty(free) > 2 * novelty(loop)
    for change in ({"speculate": "ngram"}, {"speculate": "off"}, {"top_logprobs": 1}):
        found = llava.ask("hello", options=replace(plain, repeat_penalty=2.0, **change))
        assert (found.text, found.drafted_tokens) == (free, 0)
    together = llava.ask_many(["hello", "hello"], options=replace(plain, repeat_penalty=2.0))
    assert [text_of(stream) for stream in together] == [free, free]


def novelty(text: str) -> float:
    """The share of neighbouring characters that were not neighbours before."""
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    return len(set(pairs)) / len(pairs)


def test_a_penalty_beside_a_grammar(llava: Llava) -> None:
    """It chooses among what the grammar allows, and nothing else."""
    form = Options(grammar="root ::= [a-h]{8}", max_tokens=12)
    plain, varied = (llava.ask("hello", options=replace(form, presence_penalty=value)).text for value in (0.0, 2.0))
    assert set(plain + varied) <= set("abcdefgh")
    assert len(set(plain)) < len(set(varied))


def test_the_seed_decides(llava: Llava) -> None:
    def answer(seed: int) -> str:
        return llava.ask("hello", options=Options(max_tokens=16, temperature=1.0, seed=seed)).text

    assert answer(1) == answer(1)
    assert len({answer(2**32 - 1) for _ in range(4)}) == 1  # llama.cpp's own name for a random seed
    assert len({answer(seed) for seed in range(5)}) > 1


def test_without_a_seed_an_answer_is_drawn_anew_and_can_be_repeated(llava: Llava) -> None:
    drawn = Options(max_tokens=16, temperature=1.0)
    results = [llava.ask("hello", options=drawn) for _ in range(4)]
    assert len({result.text for result in results}) > 1
    for result in results:
        assert llava.ask("hello", options=replace(drawn, seed=result.seed)).text == result.text
    questions = ["hello", "hello", "hello", "you"]
    together = [chunk.final for stream in llava.ask_many(questions, options=drawn) for chunk in stream if chunk.final]
    assert len({found.seed for found in together if found}) == 4
    for question, found in zip(questions, filter(None, together), strict=True):
        assert llava.ask(question, options=replace(drawn, seed=found.seed)).text == found.text


def test_probabilities_are_those_of_their_own_tokens_with_drafts_asked_for(llava: Llava) -> None:
    asked = Options(max_tokens=40, top_logprobs=2)
    plain, drafted = (list(llava.stream("hello", options=replace(asked, speculate=how))) for how in ("off", "ngram"))
    assert [chunk.chances for chunk in drafted] == [chunk.chances for chunk in plain]


def test_a_greedy_answer_has_no_seed(llava: Llava) -> None:
    first, second = (llava.ask("hello", options=Options(max_tokens=16, seed=seed)) for seed in (None, 5))
    assert (first.text, first.seed) == (second.text, None)
    assert second.seed is None


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """llama.cpp aborts."""
    probe.write_model(tmp_path / "probe.gguf", "Q8_0")
    language = LanguageModel(tmp_path / "probe.gguf", context=64, threads=1)
    with pytest.raises(BundleError, match="no tokenizer"):
        language.vocabulary.tokenize("hello")
    language.close()


def test_hardly_any_temperature_is_greedy(llava: Llava) -> None:
    greedy = llava.ask("hello", options=Options(max_tokens=16)).text
    for temperature in (1e-5, 1e-7, 1e-38, 5e-324):
        assert llava.ask("hello", options=Options(max_tokens=16, temperature=temperature)).text == greedy


# Answers.


def test_the_stream_is_the_answer(llava: Llava) -> None:
    chunks = list(llava.stream("What colour is it?", picture("red"), SHORT))
    final = chunks[-1].final
    assert final is not None
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert text_of(chunks) == final.text == llava.ask("What colour is it?", picture("red"), SHORT).text
    assert sum(chunk.token_count for chunk in chunks) == final.completion_tokens <= 24
    assert final.finish_reason == chunks[-1].finish_reason
    assert final.image_tokens == llava.bundle.manifest.vision.image_tokens < final.prompt_tokens
    assert final.timings.total_ms >= final.timings.ttft_ms > 0
    assert (final.memory.peak_rss_bytes or 1) >= (final.memory.private_bytes or 0)


def model_of(llava: Llava) -> LanguageModel:
    return llava._engine.model.language


def logits_after(llava: Llava, images: list[Image.Image]) -> np.ndarray[Any, Any]:
    llava.ask("?", images, Options(max_tokens=1))
    return model_of(llava).logits().copy()


def test_the_model_sees_each_image_in_its_place(llava: Llava) -> None:
    red, blue = picture("red"), picture("blue")
    seen = [logits_after(llava, images) for images in ([red], [blue], [red, blue], [blue, red])]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one - other).max() > 1e-3
    assert np.allclose(logits_after(llava, [red]), seen[0], atol=1e-3)  # after other prompts, too


def test_stop_text(llava: Llava) -> None:
    whole = llava.ask("hello", options=SHORT).text
    stop = whole[len(whole) // 2 :][:2]
    result = llava.ask("hello", options=Options(max_tokens=24, stop=(stop,), speculate="off"))
    assert result.text == whole[: whole.find(stop)]
    assert result.finish_reason == "stop"
    assert result.completion_tokens < 24


def test_times_of_an_answer_add_up(llava: Llava) -> None:
    """The first token's time is no part of the rate of the others."""
    result = llava.ask("Hello", options=Options(max_tokens=5, speculate="off"))
    times = result.timings
    assert times.ttft_ms + times.decode_ms == pytest.approx(times.total_ms)
    assert times.decode_tokens_per_s * times.decode_ms / 1000 == pytest.approx(result.completion_tokens - 1)
    ended = llava.ask("Hello", options=Options(grammar='root ::= "a" "b" "c"'))
    times = ended.timings
    assert ended.finish_reason == "stop"
    assert times.decode_tokens_per_s * times.decode_ms / 1000 == pytest.approx(ended.completion_tokens)
    begun = time.monotonic()
    stream = llava.stream("Hello", options=Options(max_tokens=200, speculate="off"))
    next(stream)
    read = time.monotonic()
    assert result_of(stream).timings.ttft_ms / 1000 <= read - begun
    earlier: Any = {"options": Options(max_tokens=1), "started": time.monotonic() - 50_000}
    for stream in (llava.stream("Hello", **earlier), *llava.ask_many(["Hello"], **earlier)):
        assert result_of(stream).timings.ttft_ms > 50_000_000


def test_the_end_of_the_context_ends_the_answer(micro_bundle: Path) -> None:
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, context=64)) as small:
        result = small.ask("hello", options=Options(max_tokens=500))
        assert result.finish_reason == "length"
        assert result.prompt_tokens + result.completion_tokens == 64


def test_a_prompt_may_fill_the_context_but_for_one_position(llava: Llava, micro_bundle: Path) -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    needed = llava.ask("hello", images, Options(max_tokens=1)).prompt_tokens
    assert needed == len(llava._engine.model.language.cached_keys)
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, context=needed + 1)) as enough:
        assert enough.ask("hello", images).completion_tokens == 1
    said = f"needs {needed} positions .* the context has {needed}"
    options = EngineOptions(device="cpu", threads=1, context=needed)
    with Llava.load(micro_bundle, options) as small, pytest.raises(ContextOverflowError, match=said):
        small.ask("hello", images)


@pytest.mark.parametrize(("begun", "rest"), [("Well,", "  yes"), ("Well, ", "yes"), ("", "yes")])
def test_a_continued_answer_keeps_the_space_after_a_word(begun: str, rest: str, llava: Llava) -> None:
    messages = [Message("user", "hello"), Message("assistant", begun)]
    options = Options(max_tokens=16, grammar='root ::= "  yes"')
    assert result_of(llava.answer(messages, (), options)).text == rest


def test_context_overflow_is_told_before_any_work(micro_bundle: Path) -> None:
    """The image does not even exist: nothing was opened before the positions were counted."""
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, context=40)) as small:
        tokens = small.bundle.manifest.vision.image_tokens
        with pytest.raises(ContextOverflowError, match=rf"2 images: {2 * tokens}.*context has 40"):
            small.ask("?", ["none.png", "none.png"])
        with pytest.raises(MissingError):
            small.ask("?", "none.png")
        with pytest.raises(ContextOverflowError, match="bytes"):
            small.ask("x " * (1 << 19))
        assert small.ask("?", options=SHORT).completion_tokens > 0


def test_a_picture_that_nobody_waits_for_is_no_fault_of_the_bundle(micro_bundle: Path) -> None:
    encoder = VisionEncoder(Bundle.open(micro_bundle), 1, "CPUExecutionProvider")
    pixels, run = np.zeros((3, 32, 32), np.float32), encoder.new_run_options()
    encoder.encode(pixels, run)
    run.terminate = True  # as whoever leaves does, from another thread
    with pytest.raises(CancelledError):
        encoder.encode(pixels, run)


def test_a_larger_context_is_advised_only_where_there_is_one(micro_bundle: Path) -> None:
    trained = read_manifest(micro_bundle).language.context_length
    for context in (40, trained):
        with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, context=context)) as model:
            with pytest.raises(ContextOverflowError) as caught:
                model.ask("x" * trained)
            assert ("--context" in str(caught.value)) == (context < trained)


def test_tokens_that_the_vocabulary_says_end_an_answer_end_it(language: LanguageModel) -> None:
    """Also where the prompt layout has another: llama.cpp knows `<|endoftext|>` by its name."""
    job = Job(lambda job: None, threading.Event(), lambda: True)
    answer = Answer(language, {language.vocabulary.control_id("<|im_end|>")}, TextStream(), 5, RequestStats(0), job)
    assert answer.add_token(language.vocabulary.tokenize("a")[0]) is None
    assert answer.add_token(language.vocabulary.control_id("<|endoftext|>")) == "stop"
    assert (answer.stats.text, answer.stats.tokens) == ("a", 1)
    other = replace(answer, end_tokens=set(language.vocabulary.tokenize("a")))  # which llama.cpp does not know
    assert other.add_token(language.vocabulary.tokenize("a")[0]) == "stop"


def test_text_with_anything_in_it(llava: Llava) -> None:
    for text in ("<|im_end|><|im_start|>system", "<image>", "a\0b", "\ud800", "\u202eabc"):
        assert llava.ask(text, options=SHORT).prompt_tokens > 0


# Conversations.


def test_a_conversation_equals_the_same_messages_at_once(llava: Llava, micro_bundle: Path) -> None:
    """What is kept of the first turn changes nothing but the last digits; showing another image changes more."""
    chat = llava.chat(options=Options(max_tokens=1))
    text_of(chat.say("What is it?", picture("red")))
    text_of(chat.say("And this?", picture("blue")))
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    kept = model_of(llava).logits().copy()
    with Llava.load(micro_bundle, CPU) as fresh:

        def difference(first: str) -> float:
            shown = [picture(first), picture("blue")]
            text_of(fresh._engine.generate(chat.messages[:3], shown, Options(max_tokens=1)))
            return float(np.linalg.norm(model_of(fresh).logits() - kept) / np.linalg.norm(kept))

        assert difference("red") < 0.02
        assert difference("green") > 0.04
    chat.reset()
    assert chat.messages == []


def test_a_turn_does_not_look_at_an_image_again(llava: Llava) -> None:
    chat = llava.chat(options=SHORT)
    first, second = (result_of(chat.say("What?", images)) for images in ([picture("maroon")], []))
    assert first.image_tokens == second.image_tokens > 0
    assert first.timings.encode_ms > 0
    assert second.timings.encode_ms == 0
    assert second.cached_tokens >= first.prompt_tokens  # nor read what was said


def test_a_stopped_turn_keeps_what_was_said(llava: Llava) -> None:
    chat = llava.chat(options=Options(max_tokens=300))
    with closing(chat.say("hello")) as chunks:
        said = next(chunks).text
    assert chat.messages == [Message("user", "hello"), Message("assistant", said)]
    assert text_of(chat.say("go on"))


def test_a_templates_stop_text_ends_the_answer(
    llava: Llava, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In style "single" an answer ends in text, not in a control token; that text is no part of the answer."""
    monkeypatch.setattr("llava_edge.prompt.render", lambda *_, **__: [Piece("text", "Human: hello###Assistant:")])
    whole = llava.ask("hello", options=SHORT)
    stop = whole.text[4:6]
    monkeypatch.setitem(TEMPLATES, "chatml", Template("single", "", None, stop))
    with Llava.load(bundle_copy, CPU) as loaded:
        cut = loaded.ask("hello", options=SHORT)
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_image_markers_of_the_manifest_reach_the_prompt(llava: Llava, bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    write_manifest(bundle_copy, replace(manifest, image_markers=["<|im_start|>", "<|im_end|>"]))
    with Llava.load(bundle_copy, CPU) as marked:
        two = marked.ask("?", [picture("red"), picture("blue")], SHORT)
        none = marked.ask("?", options=SHORT)
    assert two.prompt_tokens == llava.ask("?", [picture("red"), picture("blue")], SHORT).prompt_tokens + 4
    assert none.prompt_tokens == llava.ask("?", options=SHORT).prompt_tokens


def test_a_failed_turn_is_not_kept(llava: Llava) -> None:
    chat: Chat = llava.chat("Be brief.", SHORT)
    with pytest.raises(MissingError):
        text_of(chat.say("?", "none.png"))
    with pytest.raises(ContextOverflowError):
        text_of(chat.say("word " * 2000))
    assert chat.messages == [Message("system", "Be brief.")]


# Cancelling and threads.


def test_cancelling_from_another_thread(llava: Llava) -> None:
    wanted = llava.ask("hello", options=SHORT).text
    cancel = threading.Event()
    chunks = llava.stream("hello", options=Options(max_tokens=400), cancel=cancel)
    next(chunks)
    cancel.set()
    assert result_of(chunks).finish_reason == "cancelled"
    assert llava.ask("hello", options=SHORT).text == wanted


def test_cancelled_before_it_began(llava: Llava) -> None:
    cancel = threading.Event()
    cancel.set()
    final = result_of(llava.stream("hello", picture("red"), cancel=cancel))
    assert (final.finish_reason, final.text, final.completion_tokens) == ("cancelled", "", 0)
    assert (final.timings.ttft_ms, final.timings.decode_ms) == (0, 0)  # rather than since the machine started


def test_a_closed_engine_says_so(micro_bundle: Path) -> None:
    engine = Engine.open(Bundle.open(micro_bundle), CPU)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        next(engine.generate([Message("user", "hello")]))


def test_images_and_slots_must_match(llava: Llava) -> None:
    with pytest.raises(UsageError, match="slots for 1 images, but 0"):
        list(llava._engine.generate([Message("user", "hello", 1)], []))


# Broken bundles. The manifest is right about them, so that only what uses the content can notice.


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    manifest = read_manifest(path.parent)
    write_manifest(path.parent, replace(manifest, files={**manifest.files, path.name: file_entry(path)}))


@pytest.mark.parametrize("part", [VISION_DATA, PROJECTOR, LANGUAGE])
def test_weights_that_are_not_numbers_give_no_answer(part: str, bundle_copy: Path) -> None:
    path = bundle_copy / part
    size = path.stat().st_size
    # All ones is NaN as float32 and float16, and as the scale of a quantized block.
    at = {VISION_DATA: size // 2, PROJECTOR: size - 4096, LANGUAGE: size - 65536}[part]
    damage(path, at, b"\xff" * 4096)
    with Llava.load(bundle_copy, CPU) as broken:
        for options in (SHORT, Options(max_tokens=24, temperature=1.0)):
            with pytest.raises(BundleError, match=rf"/{part.removesuffix('.data')} .*not finite"):
                broken.ask("?", picture("red"), options)


@pytest.mark.parametrize("part", [VISION, PROJECTOR, LANGUAGE])
def test_a_damaged_header_is_one_sentence(part: str, bundle_copy: Path) -> None:
    damage(bundle_copy / part, 0, b"<html>" + b"x" * 200)
    with pytest.raises(BundleError, match=part):
        Llava.load(bundle_copy, CPU)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("language", {"hidden_size": 128}, "another bundle"),
        ("language", {"vocab_size": 300}, "another bundle"),
        ("vision", {"width": 32}, "width"),
        ("preprocessing", {"image_size": 64}, "inputs"),
        ("vision", {"image_tokens": 9}, "outputs"),
        ("", {"template": "vicuna_v1"}, "control token"),
    ],
)
def test_parts_that_do_not_fit_the_manifest(part: str, change: dict[str, Any], says: str, bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    if part:
        change = {part: replace(getattr(manifest, part), **change)}
    write_manifest(bundle_copy, replace(manifest, **change))
    with pytest.raises(BundleError, match=says):
        Llava.load(bundle_copy, CPU)


# Devices and options.


@pytest.mark.parametrize(
    "code",
    [
        "from llava_edge.runtimes import devices; devices.choose('auto')",
        "from llava_edge.runtimes import probe; probe.run_child('llama_cpp')",
        "import sys; from llava_edge import Llava; Llava.load(sys.argv[1]).close()",
        "import sys; from llava_edge.cli import main; main(['verify', sys.argv[1], '--against', sys.argv[2]])",
    ],
)
def test_threads_do_not_spin_whoever_loads_their_library(code: str, micro_bundle: Path, micro_checkpoint: Path) -> None:
    """libgomp reads its settings once, when it is loaded, by torch or by llama.cpp; beside busy processes a prompt took
    3 to 22 times as long where they came too late."""
    watch = """
import os, sys
for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
    os.environ.pop(name, None)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("llama_cpp", "torch"):
            print("spins:", os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr)
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
    assert in_child(watch + code, micro_bundle, micro_checkpoint).stderr == "spins: 1000\n"


def test_versions_are_those_that_pip_knows() -> None:
    for name, project in (("llama_cpp", "llama-cpp-python"), ("onnxruntime", "onnxruntime")):
        assert bindings.version(name).split("+")[0] == metadata.version(project).split("+")[0]
    with pytest.raises(ImportError, match="no_such_package"):
        bindings.version("no_such_package")


@pytest.mark.parametrize("file", ["llama_cpp.py", "llama_cpp/__init__.py"])
def test_a_file_named_like_llama_cpp_is_named(file: str, micro_bundle: Path, tmp_path: Path) -> None:
    """`python -m` looks for modules in the current folder first."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("print('this ran')\n")
    command = [sys.executable, "-m", "llava_edge", "run", "--model", str(micro_bundle), "--prompt", "hi"]
    command += ["--max-tokens", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT.resolve())}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "this ran" not in done.stdout
    assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
    assert str((tmp_path / file).parent) in done.stderr


def test_threads_that_need_the_bindings_first_get_the_same() -> None:
    code = """
import threading
from llava_edge.runtimes import bindings
found, together = [], threading.Barrier(4)
def need():
    together.wait()
    found.append(bindings.functions())
threads = [threading.Thread(target=need) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(map(id, found))))
"""
    assert in_child(code).stdout == "4 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("first", ["import llama_cpp", "pass"])
def test_llama_cpp_is_not_imported_for_its_functions(first: str, micro_bundle: Path) -> None:
    """Its classes cost 0.1 s. Who wants them gets them, before or afterwards, and the one library."""
    code = f"""
import sys
{first}
from llava_edge import Llava, Options
with Llava.load(sys.argv[1]) as model:
    print("jinja2" in sys.modules, "llama_cpp" in sys.modules)
    import llama_cpp
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler
    print(llama_cpp.llama_cpp.llama_n_ctx.__name__, len(model.ask("What?", options=Options(max_tokens=3)).text) > 0)
print(len({{line.split()[-1] for line in open("/proc/self/maps") if "libllama." in line}}))
"""
    there = first != "pass"
    assert in_child(code, micro_bundle).stdout == f"{there} {there}\nllama_n_ctx True\n1\n"


def test_numpys_threads_do_not_spin_after_a_product() -> None:
    """They would take the cores that llama.cpp needs next."""
    code = """
import time
import llava_edge
import numpy as np
a = np.ones((1000, 1000), np.float32)
for _ in range(3):
    a @ a
begun = time.process_time()
time.sleep(0.2)
print(time.process_time() - begun)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    assert float(in_child(code, environment=environment).stdout) < 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_threads_follow_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from llava_edge.runtimes.machine import thread_count; print(thread_count()[0])"
    )
    assert in_child(code).stdout == "1\n"


def test_process_start_is_before_now_and_not_long_ago() -> None:
    code = "import time; from llava_edge.runtimes import machine as m; print(time.monotonic() - m.process_start())"
    start = time.monotonic()
    age = float(in_child(code).stdout)
    assert 0 < age <= time.monotonic() - start + 0.05


def test_on_amx_the_build_is_checked_once_before_it_is_used(
    isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child tries it; only a good result is remembered. The bad build is one that dies of an illegal instruction."""
    monkeypatch.setattr(machine, "processor", lambda: ("a processor", ["amx_int8"]))
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp/__init__.py").touch()
    (tmp_path / "llama_cpp/_ctypes_extensions.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    with monkeypatch.context() as bad:
        bad.syspath_prepend(str(tmp_path))
        with pytest.raises(UnavailableError, match=r"SIGILL.*-fno-tree-dse"):
            probe.require_working_build()
    assert not list(isolated_home.rglob("builds/*"))
    probe.require_working_build()
    (note,) = isolated_home.rglob("builds/*")
    monkeypatch.setattr(probe, "check", lambda engine: pytest.fail("asked again"))
    probe.require_working_build()
    assert note.exists()


def test_on_amx_a_user_without_a_home_gets_answers(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run with a number that is nobody's."""
    monkeypatch.setattr(machine, "processor", lambda: ("a processor", ["amx_int8"]))
    monkeypatch.setattr(probe, "check", lambda engine: probe.Report())
    for name in ("LLAVA_EDGE_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with Llava.load(micro_bundle, CPU) as llava:
        assert llava.ask("What is it?", picture("red"), SHORT).text


BAD_OPTIONS: list[dict[str, Any]] = [
    *({"max_tokens": value} for value in (0, -1, 2**63, 1.5, "5", True, None)),
    *({"temperature": value} for value in (-1, float("nan"), float("inf"), "hot", True)),
    *({"top_p": value} for value in (1.1, -0.1)),
    *({"top_k": value} for value in (-1, 2**62)),
    *({"min_p": value} for value in (-0.1, 1.5)),
    *({"seed": value} for value in (-1, 2**32)),
    *({"repeat_penalty": value} for value in (0, -1, 11, float("nan"), "1.1")),
    *({"frequency_penalty": value} for value in (-2.1, 3)),
    *({"presence_penalty": value} for value in (-2.1, True)),
    {"stop": "text"},
    {"stop": ("",)},
    {"stop": ("x" * 257,)},
    {"stop": ("x",) * 17},
]


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_options_out_of_range_name_the_field(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**bad)
    assert [caught.value.field] == list(bad)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # from a process of multiprocessing


def test_numbers_of_numpy_are_taken_for_what_they_are() -> None:
    drawn = Options(seed=np.int64(3), max_tokens=np.int32(5), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert (drawn, type(drawn.seed), type(drawn.temperature)) == (Options(5, 0.5, seed=3), int, float)
    assert type(EngineOptions(threads=np.uint8(2)).threads) is int  # type: ignore[arg-type]
    for bad in (np.float32(2), np.int64(0), np.bool_(True)):
        with pytest.raises(UsageError, match="max_tokens"):
            Options(max_tokens=bad)  # type: ignore[arg-type]


def test_options_at_their_limits_are_taken() -> None:
    Options(max_tokens=1 << 20, temperature=100.0, top_k=1 << 24, min_p=1.0, seed=(1 << 32) - 1, top_logprobs=20)
    Options(max_tokens=1, temperature=0.0, top_p=0, top_k=0, min_p=0.0, seed=0, top_logprobs=0)
    Options(stop=("é" * 128,) * 16, repeat_penalty=10.0, frequency_penalty=2.0, presence_penalty=-2.0)


@pytest.mark.parametrize(
    "bad",
    [{"device": "tpu"}, {"threads": -1}, {"context": -5}, {"threads": True}, {"preset": "fast"}, {"kv": "q4_0"}],
)
def test_engine_options_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        EngineOptions(**bad)
    assert [caught.value.field] == list(bad)


def test_gelu_is_the_exact_form() -> None:
    import torch

    values = np.linspace(-12, 12, 20_001, dtype=np.float32)
    wanted = torch.nn.functional.gelu(torch.from_numpy(values).double()).numpy()
    assert np.abs(gelu(values) - wanted).max() < 1e-6
    tanh = torch.nn.functional.gelu(torch.from_numpy(values).double(), approximate="tanh").numpy()
    assert np.abs(gelu(values) - tanh).max() > 1e-4  # the usual approximation would be noticed


def test_wide_layers_are_computed_in_blocks() -> None:
    """LLaVA-1.5-7B's projector has 4096 outputs."""
    rng = np.random.default_rng(0)
    values, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (2050, 8), (2050,)))
    wanted = values.astype(np.float64) @ weight.T + bias
    assert np.abs(linear(values, weight, bias) - wanted).max() < 1e-5


def test_pytorch_and_llama_cpp_share_a_process(tmp_path: Path) -> None:
    """Both use AMX where there is one; each thread has one tile configuration, and PyTorch releases it."""
    import torch

    probe.write_model(tmp_path / "model.gguf", "Q4_0")
    with closing(LanguageModel(tmp_path / "model.gguf", context=256, threads=2)) as model:
        for _ in range(2):
            model.evaluate_tokens(range(64), NEVER)
            torch.randn(64, 256).bfloat16() @ torch.randn(256, 256).bfloat16()
        assert model.logits().std() > 0


AFTER_MAIN = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from llava_edge import Llava, Options
def ask():
    next(answer)
    started.set()
    with ThreadPoolExecutor(1) as pool:
        while True:  # until Python knows that the main thread has ended
            try:
                pool.submit(int)
            except RuntimeError:
                break
    print(len(list(answer)), len(list(llava.stream("Hello", sys.argv[2], limit))))
llava, started = Llava.load(sys.argv[1], device="cpu"), threading.Event()
limit = Options(200, grammar='root ::= "a"{99}')
answer = llava.stream("Hello", options=limit)
threading.Thread(target=ask).start()
started.wait()
"""


def test_a_thread_gets_its_answers_when_the_main_one_has_ended(micro_bundle: Path, tmp_path: Path) -> None:
    """Python waits for it."""
    picture = tmp_path / "new.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(picture)
    command = [sys.executable, "-c", AFTER_MAIN, str(micro_bundle), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (done.stdout, done.stderr) == ("99 100\n", "")


IN_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are UTF-8")
@pytest.mark.parametrize("locale", [{}, IN_ASCII], ids=["utf-8", "ascii"])
@pytest.mark.parametrize("name", [b"caf\xc3\xa9", b"caf\xe9"], ids=["utf-8", "latin-1"])
def test_a_folder_may_have_any_name_that_is_utf8(
    name: bytes, locale: dict[str, str], micro_bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime opens no others; in a locale of ASCII, Python itself calls both by characters that are none."""
    folder = tmp_path / os.fsdecode(name)
    folder.symlink_to(micro_bundle)
    command: list[str | bytes] = [sys.executable, "-m", "llava_edge", "run", "--model", os.fsencode(folder)]
    command += ["--prompt", "hello", "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **locale})
    said = done.stderr.decode("ascii", "replace")
    if name == b"caf\xc3\xa9":
        assert (done.returncode, bool(done.stdout.strip())) == (0, True), said
    else:
        assert done.returncode == 65
        assert "rename its folder" in said
        assert said.count("\n") == 1


def test_standard_error_is_captured_and_then_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    assert capture_stderr(lambda: os.write(2, b"wrong\n")) == (6, "wrong\n")
    with pytest.raises(ZeroDivisionError):
        capture_stderr(lambda: os.write(2, b"lost") // 0)
    write_stderr("said before\n")
    os.write(2, b"said behind\n")
    assert capfd.readouterr().err == "said before\nsaid behind\n"


def test_without_a_standard_error_nothing_is_captured() -> None:
    code = "import os; from llava_edge.runtimes.stderr_capture import capture_stderr, write_stderr; "
    code += "os.close(2); write_stderr('x'); "
    done = in_child(code + "print(capture_stderr(lambda: 5))")
    assert done.stdout == "(5, '')\n"


def test_too_little_memory_for_a_batch_is_said_and_the_next_answer_is_right(
    llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llava.ask("What?", options=Options(max_tokens=5)).text
    with monkeypatch.context() as patch:
        patch.setattr(llava._engine.model.language.library, "llama_decode", lambda *_: -2)  # as without memory
        with pytest.raises(MemoryLimitError, match="not enough memory"):
            llava.ask("What now?")
    assert llava.ask("What?", options=Options(max_tokens=5)).text == expected
