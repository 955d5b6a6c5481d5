"""What programs embed: the parts of the Python API that the other tests do not touch."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import io
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
from PIL import Image

from llava_edge import Chat, Chunk, EngineOptions, Llava, Options, Result
from llava_edge.bundle import Bundle
from llava_edge.errors import (
    ContextOverflowError,
    ImageError,
    MemoryLimitError,
    MissingError,
    UnavailableError,
    UsageError,
)
from llava_edge.models.micro import CONFIG
from llava_edge.options import DEFAULT_PROMPT, FinishReason, result_of
from llava_edge.prompt import Message
from llava_edge.runtimes import machine, pictures, sampling
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.pictures import Picture, prepare

ROOT = Path(__file__).resolve().parent.parent
RED = Image.new("RGB", (40, 30), "red")


def test_the_device_can_be_named(micro_bundle: Path, llava: Llava) -> None:
    assert llava.device == "cpu (asked for)"
    with Llava.load(micro_bundle, EngineOptions(threads=1, context=64), device="cpu") as small:
        assert small.context == 64  # beside the other options
    with pytest.raises(UnavailableError, match="metal"):
        Llava.load(micro_bundle, EngineOptions(threads=1), device="metal" if sys.platform != "darwin" else "cuda")


def test_what_is_raised_while_a_model_loads_stops_it(micro_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Stopped(Exception):
        pass

    heard: list[float] = []

    def stop(fraction: float) -> None:
        heard.append(fraction)
        raise Stopped("by the person")

    threads = threading.active_count()
    with pytest.raises(Stopped, match="by the person"):
        Llava.load(micro_bundle, device="cpu", on_load=stop)
    assert threading.active_count() == threads  # one that freed engines while Python ends would abort the process
    assert len(heard) == 1
    assert capfd.readouterr().err == ""
    with Llava.load(micro_bundle, device="cpu", on_load=heard.append) as loaded:
        assert heard[-1] == 1
        assert loaded.ask("hi", options=Options(max_tokens=1)).completion_tokens == 1


def test_stop_iteration_of_a_callback_is_an_error_as_in_a_generator(micro_bundle: Path) -> None:
    """It must not end in a model that was not loaded."""
    with pytest.raises(RuntimeError) as raised:
        Llava.load(micro_bundle, device="cpu", on_load=lambda fraction: next(iter(())))
    assert isinstance(raised.value.__cause__, StopIteration)


def test_pictures_are_read_while_the_model_loads(micro_bundle: Path) -> None:
    begun, manifest = threading.Event(), Bundle.open(micro_bundle).manifest

    def read() -> Picture:
        assert begun.wait(30)  # the model does not wait for it
        return prepare(RED, manifest)

    with Llava.load(micro_bundle, device="cpu", pictures=[read], on_load=lambda fraction: begun.set()) as loaded:
        assert loaded.ask("hi", RED, Options(max_tokens=1)).image_tokens == CONFIG.image_tokens


@pytest.mark.parametrize("error", [ImageError("It is damaged."), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_pictures_that_cannot_be_had_stop_loading(error: BaseException, micro_bundle: Path) -> None:
    def read() -> Picture:
        raise error

    threads = set(threading.enumerate())
    with pytest.raises(type(error)):
        Llava.load(micro_bundle, device="cpu", pictures=[read, read])
    assert ended(set(threading.enumerate()) - threads)  # nobody waits for pictures any more


@pytest.mark.parametrize("number", range(4))
def test_without_another_thread_loading_fails_in_a_sentence(
    number: int, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started, before = threading.Thread.start, list[threading.Thread](), set(threading.enumerate())

    def start_some(thread: threading.Thread) -> None:
        if len(started) == number:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    with pytest.raises(MemoryLimitError, match=r"No more threads can be started.*ulimit -u"):
        Llava.load(micro_bundle, device="cpu")
    assert ended(set(threading.enumerate()) - before)


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_while_a_thread_is_started_leaves_none_behind(
    number: int, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python waits until a started thread runs, and may be interrupted meanwhile."""
    start, started, before = threading.Thread.start, list[threading.Thread](), set(threading.enumerate())

    def start_and_interrupt(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)
        if len(started) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        Llava.load(micro_bundle, device="cpu")
    assert ended(set(threading.enumerate()) - before)


def ended(threads: set[threading.Thread]) -> bool:
    """Whether they end soon, if need be because a garbage collection finds them unused."""
    gc.collect()
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


def test_a_model_that_nothing_refers_to_is_freed(micro_bundle: Path) -> None:
    def own() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread not in before}

    before, short = set(threading.enumerate()), Options(max_tokens=2)
    dropped = Llava.load(micro_bundle, device="cpu")
    answer = dropped.ask("What is it?", RED, short).text
    pictures = weakref.ref(dropped._engine._cache)
    threads = own()
    assert len(threads) >= 3
    dropped = Llava.load(micro_bundle, device="cpu")  # as a cell of a notebook that is run again
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert pictures() is None  # which may hold 64 MiB
    chat = dropped.chat(options=short)
    del dropped
    assert "".join(chunk.text for chunk in chat.say("What is it?", RED)) == answer
    del chat
    stream = Llava.load(micro_bundle, device="cpu").stream("What is it?", RED, short)
    assert "".join(chunk.text for chunk in stream) == answer
    del stream
    for thread in own():
        thread.join(30)
        assert not thread.is_alive()


def test_embeddings_are_what_the_checkpoint_computes(micro_bundle: Path, micro_checkpoint: Path, llava: Llava) -> None:
    """CLIP and projector by transformers, on the same pixels."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from llava_edge.image import load_image, preprocess

    reference = LlavaForConditionalGeneration.from_pretrained(micro_checkpoint, dtype=torch.float32)
    pixels = torch.from_numpy(preprocess(load_image(RED), llava.bundle.manifest.preprocessing))[None]
    with torch.no_grad():
        wanted = reference.get_image_features(pixel_values=pixels)
    found = llava.embed_image(RED)
    assert_type(found, np.ndarray[tuple[int, int], np.dtype[np.float32]])
    assert found.dtype == np.float32
    assert found.shape == (llava.bundle.manifest.vision.image_tokens, llava.bundle.manifest.language.hidden_size)
    assert np.allclose(found, wanted[0].numpy(), atol=1e-4)
    assert not np.allclose(found, llava.embed_image(Image.new("RGB", (40, 30), "blue")), atol=1e-2)
    kept = found.copy()
    found[:] = 0  # it is the caller's own
    assert np.array_equal(llava.embed_image(RED), kept)


HI = [Message("user", "hi")]
HI_RED = [Message("user", "hi", 1), Message("assistant", "x")]
WRONG: dict[str, Any] = {
    "no text": lambda llava: llava.ask(None),
    "bytes": lambda llava: llava.ask(b"hi"),
    "many": lambda llava: list(next(llava.ask_many(["hi", None]))),
    "chat": lambda llava: list(llava.chat().say(None)),
    "dict": lambda llava: llava.ask("hi", (), {"max_tokens": 5}),
    "engine options": lambda llava: llava.ask("hi", (), EngineOptions()),
    "cancel": lambda llava: list(llava.stream("hi", cancel=5)),
    "messages": lambda llava: list(llava.answer(["hi"])),
    "no messages": lambda llava: list(llava.answer(None)),
    "raw message": lambda llava: list(llava.answer([{"role": "user", "content": "hi"}])),
    "picture in a message": lambda llava: list(llava.answer([Message("user", "hi", "a.jpg")])),  # type: ignore[arg-type]
    "less than no pictures": lambda llava: list(
        llava.answer([Message("user", "hi", 2), Message("assistant", "x"), Message("user", "y", -1)], [RED])
    ),
    "picture in an answer": lambda llava: list(llava.answer([*HI, Message("assistant", "x", 1), *HI], [RED])),
    "no question": lambda llava: list(llava.answer([Message("assistant", "x"), *HI])),
    "load": lambda llava: Llava.load(llava.bundle.folder, Options()),  # type: ignore[arg-type]
    "draft": lambda llava: EngineOptions(draft=5),  # type: ignore[arg-type]
    "cache": lambda llava: EngineOptions(cache="no"),  # type: ignore[arg-type]
    "a file as the cache": lambda llava: Llava.load(llava.bundle.folder, EngineOptions(cache=Path(__file__))),
    "nothing": lambda llava: llava.ask("  "),
    "nothing of many": lambda llava: list(llava.ask_many(["hi", ""])),
    "nothing after a picture": lambda llava: list(llava.answer([*HI_RED, Message("user", "\n")], RED)),
    "nothing to describe": lambda llava: llava.ask(),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_a_usage_error(call: Any, llava: Llava) -> None:
    """Which `except LlavaEdgeError` catches, and which says what was expected."""
    with pytest.raises(UsageError):
        call(llava)
    assert llava.ask("hi", None, Options(max_tokens=1)).completion_tokens == 1


def test_a_system_text_stands_before_the_question(llava: Llava) -> None:
    few: Any = {"options": Options(max_tokens=24), "system": "Be brief."}
    wanted = llava.ask("What?", RED, few["options"])
    messages = [Message("system", "Be brief."), Message("user", "What?", 1)]
    system = result_of(llava.answer(messages, RED, few["options"]))
    assert system.text != wanted.text
    streams = [llava.stream("What?", RED, **few), *llava.ask_many(["What?"], RED, **few)]
    streams += llava.ask_each([RED], "What?", **few)
    found = [llava.ask("What?", RED, **few), asyncio.run(llava.aask("What?", RED, **few))]
    for result in (*found, *map(result_of, streams)):
        assert (result.text, result.prompt_tokens) == (system.text, system.prompt_tokens)


def test_a_picture_alone_is_a_question(llava: Llava) -> None:
    few: Any = Options(max_tokens=8)
    wanted = llava.ask("", RED, few)
    assert wanted.image_tokens < wanted.prompt_tokens < llava.ask("Why?", RED, few).prompt_tokens
    streams = [*llava.ask_many([" "], RED, few), llava.answer([Message("user", "", 1)], RED, few)]
    assert {result_of(stream).text for stream in [*streams, llava.chat(options=few).say("\n", RED)]} == {wanted.text}


def test_an_answer_is_gone_on_with(llava: Llava) -> None:
    """From any of its tokens on, each of which is a letter here."""

    def answer(begun: str, count: int) -> str:
        messages = [Message("user", "Hello", 1), Message("assistant", begun)]
        return result_of(llava.answer(messages, RED, Options(max_tokens=count, grammar="root ::= [a-z]*"))).text

    whole = llava.ask("Hello", RED, Options(max_tokens=20, grammar="root ::= [a-z]*")).text
    assert answer("", 20) == answer(" ", 20) == whole
    assert len(whole) == 20
    for taken in (1, 7, 19):
        assert answer(whole[:taken], 20 - taken) == whole[taken:]


@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_cannot_be_copied_says_so(do: Callable[[object], object], llava: Llava) -> None:
    stream = llava.stream("hi", options=Options(max_tokens=3))
    for what, said in ((llava, "load another"), (llava.chat(), "resume it"), (stream, "neither copied")):
        with pytest.raises(TypeError, match=said):
            do(what)
    assert result_of(stream).completion_tokens == 3


def test_objects_that_are_nearly_pictures(llava: Llava, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")

    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path / "red.png")

    few: Any = Options(max_tokens=4)
    assert llava.ask("hi", Named(), few).text == llava.ask("hi", RED, few).text  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"BytesIO.*read\(\)"):
        llava.ask("hi", io.BytesIO(b""), few)  # type: ignore[arg-type]
    for wrong in (b"no picture", np.zeros(3)):
        with pytest.raises(ImageError, match="Picture 2 of 3 "):
            llava.ask("hi", [RED, wrong, RED], few)


def test_a_large_picture_that_memory_cannot_hold_is_refused(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LARGE", 1199)
    RED.save(tmp_path / "red.png")
    for free in (4 * 1200, None):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        assert prepare(tmp_path / "red.png", llava._engine.bundle.manifest).crops.any()
    monkeypatch.setattr(machine, "available_memory", lambda: 4 * 1200 - 1)
    for source, name in ((tmp_path / "red.png", r".*red\.png"), ((tmp_path / "red.png").read_bytes(), "The picture")):
        with pytest.raises(ImageError, match=f"^{name} has 1,200 pixels and takes 0 MiB of memory, but 0 MiB are"):
            prepare(source, llava._engine.bundle.manifest)
    monkeypatch.setattr(pictures, "LARGE", 1200)
    assert prepare(tmp_path / "red.png", llava._engine.bundle.manifest).crops.any()


def test_a_picture_of_an_earlier_turn_can_be_described(llava: Llava) -> None:
    chat = llava.chat(options=Options(max_tokens=2))
    assert list(chat.say("What colour?", RED))
    assert list(chat.say(DEFAULT_PROMPT))


def test_a_conversation_kept_elsewhere_is_gone_on_with_or_refused(llava: Llava) -> None:
    first, second = (llava.chat(options=Options(max_tokens=2)) for _ in range(2))
    assert list(first.say("What colour?", RED))
    second.resume(first.messages, RED)
    kept = [*first.messages]
    long = [Message("user", "word " * 2000), kept[1]]
    refused: list[tuple[Any, Any, str]] = [
        (kept, [], "slots for 1 images"),
        ([], RED, "slots for 0 images"),
        ([Message("system", "x")], RED, "slots for 0 images"),
        (kept[:1], RED, "ends with a question"),
        (kept[1:], [], "must alternate"),
        (kept, b"no picture", "not a picture"),
        (long, [], "positions"),
        ("abc", (), "Expected a list of Message"),
        ([{"role": "user"}], (), "Expected a Message"),
    ]
    for messages, images, said in refused:
        with pytest.raises((UsageError, ImageError, ContextOverflowError), match=said):
            second.resume(messages, images)
    assert second.messages == kept
    assert [chunk.text for chunk in second.say("And?")] == [chunk.text for chunk in first.say("And?")]
    second.resume([])
    assert second.messages == []


def test_embedding_refuses_what_asking_refuses(llava: Llava) -> None:
    with pytest.raises(ImageError):
        llava.embed_image(b"no picture")
    with pytest.raises(MissingError):
        llava.embed_image("nowhere.jpg")
    assert llava.ask("Hello", options=Options(max_tokens=2)).completion_tokens == 2


def test_bytes_of_any_kind_are_one_picture(llava: Llava) -> None:
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    wanted = llava.ask("?", buffer.getvalue(), Options(max_tokens=4))
    embedded = llava.embed_image(buffer.getvalue())
    for same in (bytearray(buffer.getvalue()), memoryview(buffer.getvalue())):
        for images in (same, [same]):
            found = llava.ask("?", images, Options(max_tokens=4))
            assert (found.text, found.prompt_tokens) == (wanted.text, wanted.prompt_tokens)
        assert (llava.embed_image(same) == embedded).all()


def test_chances_are_the_softmax(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(max_tokens=6, top_logprobs=20)
    chunks = list(llava.stream("Hello", options=options))
    chances = [chance for chunk in chunks for chance in chunk.chances]
    assert len(chances) == sum(chunk.token_count for chunk in chunks) == 6
    for chance in chances:
        assert chance.logprob == chance.top[0][1]  # greedy
        assert sorted((logprob for _, logprob in chance.top), reverse=True) == [logprob for _, logprob in chance.top]
        assert sum(math.exp(logprob) for _, logprob in chance.top) <= 1 + 1e-9
    assert all(not chunk.chances for chunk in llava.stream("Hello", options=Options(max_tokens=3)))
    language = llava._engine.model.language
    monkeypatch.setattr(language, "logits", lambda row, real=language.logits: real(row) + 900)  # exp() overflows
    every = sampling.token_chance(language, 5, language.vocabulary.size, -1).top
    assert sum(math.exp(logprob) for _, logprob in every) == pytest.approx(1, abs=1e-12)


def test_chances_of_white_space_that_begins_an_answer_come_in_pieces(llava: Llava) -> None:
    """Or the server's process for the model would say more in one line than its parent reads."""
    options = Options(max_tokens=300, top_logprobs=20, grammar=r'root ::= "\n"{200} "a"')
    chunks = list(llava.stream("hi", options=options))
    assert result_of(chunks).text == "a"
    assert sum(len(chunk.chances) for chunk in chunks) == result_of(chunks).completion_tokens
    assert max(len(chunk.chances) for chunk in chunks) < 100


def test_the_likeliest_tokens_are_found_without_sorting_all(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting a vocabulary takes as long as a small model takes for a token. Of equals the first come first."""
    values = np.random.default_rng(0).integers(0, 40, 500) / 8
    for count in (0, 1, 5, 20, 499, 500, 501):
        assert sampling._top_indices(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()
    sizes, sort = list[int](), np.argsort

    def noticed(values: np.ndarray[Any, Any], **how: Any) -> Any:
        sizes.append(len(values))
        return sort(values, **how)

    monkeypatch.setattr(np, "argsort", noticed)
    llava.ask("Hello", options=Options(max_tokens=6, top_logprobs=5))
    assert len(sizes) == 6
    assert max(sizes) < llava.bundle.manifest.language.vocab_size / 2


# asyncio.


def test_awaited_answers_are_the_answers(llava: Llava) -> None:
    options = Options(max_tokens=12)
    wanted = [llava.ask(f"Question {i}", RED, options).text for i in range(4)]

    async def run() -> list[str]:
        results = await asyncio.gather(*(llava.aask(f"Question {i}", RED, options) for i in range(4)))
        return [result.text for result in results]

    assert asyncio.run(run()) == wanted


def test_an_awaited_stream_leaves_the_loop_free(llava: Llava) -> None:
    async def run() -> tuple[list[Chunk], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        chunks = [chunk async for chunk in llava.astream("Hello", options=Options(max_tokens=200))]
        ticking.cancel()
        return chunks, ticks

    chunks, ticks = asyncio.run(run())
    assert ticks > 3
    assert chunks[-1].final
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].final.text


def test_cancelling_a_task_stops_the_work(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, take = list[int](), Answer.add_token

    def counted(self: Answer, token: int) -> FinishReason | None:
        taken.append(token)
        return take(self, token)

    monkeypatch.setattr(Answer, "add_token", counted)

    async def run() -> None:
        stream = llava.astream("Hello", options=Options(max_tokens=480))
        assert await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(llava.aask("Hello", options=Options(max_tokens=480)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert llava.ask("Hello", options=Options(max_tokens=2)).completion_tokens == 2
    assert len(taken) < 900  # of 962


def test_errors_arrive_where_they_are_awaited(llava: Llava) -> None:
    with pytest.raises(ImageError):
        asyncio.run(llava.aask("Hello", b"no picture"))
    with pytest.raises(ImageError):
        asyncio.run(llava.aembed_image(b"no picture"))


def test_awaited_embeddings_are_the_embeddings(llava: Llava) -> None:
    awaited = asyncio.run(llava.aembed_image(RED))
    assert_type(awaited, np.ndarray[tuple[int, int], np.dtype[np.float32]])
    assert np.array_equal(awaited, llava.embed_image(RED))


def test_an_awaited_conversation_is_the_conversation(llava: Llava) -> None:
    turns: list[tuple[str, list[Image.Image]]] = [("What is it?", [RED]), ("Why?", [])]
    options = Options(max_tokens=12)
    plain = llava.chat("Be brief.", options)
    for text, images in turns:
        list(plain.say(text, images))

    async def run() -> list[Message]:
        chat = llava.chat("Be brief.", options)
        for text, images in turns:
            async for chunk in chat.asay(text, images):
                if chunk.final:
                    break  # what an impatient reader does; the turn is kept all the same
        return chat.messages

    assert asyncio.run(run()) == plain.messages


def test_the_last_chunk_of_an_awaited_turn_comes_when_it_is_kept(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = llava.chat(options=Options(max_tokens=2))
    generate = chat._engine.generate

    def slow(*arguments: Any, **named: Any) -> Iterator[Chunk]:
        yield from generate(*arguments, **named)
        time.sleep(0.1)

    monkeypatch.setattr(chat._engine, "generate", slow)

    async def run() -> None:
        async for chunk in chat.asay("What is it?"):
            if chunk.final:
                assert len(chat.messages) == 2

    asyncio.run(run())


def test_an_awaited_turn_that_is_left_is_kept_as_far_as_it_came(llava: Llava) -> None:
    chat = llava.chat(options=Options(max_tokens=480))

    async def run() -> str:
        stream = chat.asay("Hello")
        said = (await anext(stream)).text
        await stream.aclose()
        return said

    said = asyncio.run(run())
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].text.startswith(said)
    with pytest.raises(ImageError):
        asyncio.run(anext(chat.asay("And this?", b"no picture")))
    assert len(chat.messages) == 2


# Pictures and messages that change.

FEW = Options(max_tokens=24)
ASKED: dict[str, Callable[[Llava, Any], Any]] = {
    "stream": lambda llava, image: llava.stream("What?", image, FEW),
    "ask_many": lambda llava, image: llava.ask_many(["What?"], image, FEW),
    "answer": lambda llava, image: llava.answer([Message("user", "What?", 1)], image, FEW),
    "say": lambda llava, image: llava.chat(options=FEW).say("What?", image),
    "astream": lambda llava, image: llava.astream("What?", image, FEW),
    "aask": lambda llava, image: llava.aask("What?", image, FEW),
    "asay": lambda llava, image: llava.chat(options=FEW).asay("What?", image),
}


def await_text(asked: Any) -> str:
    """What comes of a call that was made before."""

    async def awaited() -> Any:
        return [chunk async for chunk in asked] if inspect.isasyncgen(asked) else await asked

    found = asyncio.run(awaited()) if inspect.isasyncgen(asked) or inspect.iscoroutine(asked) else asked
    return str(found.text) if isinstance(found, Chunk | Result) else "".join(map(await_text, found))


@pytest.mark.parametrize("kind", ["Pillow", "array", "bytearray"])
@pytest.mark.parametrize("call", ASKED.values(), ids=ASKED)
def test_a_picture_is_what_it_was_at_the_call(call: Any, kind: str, llava: Llava) -> None:
    """Although the program draws into it, or fills a frame of its camera anew, before the answer is read."""
    image = Image.new("RGB", (40, 30), "red")
    source: Any = image if kind == "Pillow" else np.array(image) if kind == "array" else bytearray(bmp(image))
    asked = call(llava, source)
    image.paste("blue", (0, 0, 40, 30))
    if kind != "Pillow":
        source[:] = np.array(image) if kind == "array" else bmp(image)
    red, blue = (llava.ask("What?", Image.new("RGB", (40, 30), colour), FEW).text for colour in ("red", "blue"))
    assert await_text(asked) == red != blue
    assert await_text(call(llava, source)) == blue


def test_embeddings_are_of_the_picture_at_the_call(llava: Llava) -> None:
    image = RED.copy()
    asked = llava.aembed_image(image)
    image.paste("blue", (0, 0, *image.size))
    assert np.array_equal(asyncio.run(asked), llava.embed_image(RED))
    assert not np.array_equal(llava.embed_image(image), llava.embed_image(RED))


def test_a_conversation_is_what_it_was_at_the_call(llava: Llava) -> None:
    messages = [Message("user", "What?")]
    asked = llava.answer(messages, options=FEW)
    messages += [Message("assistant", "red"), Message("user", "Why?")]
    assert await_text(asked) == llava.ask("What?", options=FEW).text


def test_files_are_opened_when_the_answer_is_read(llava: Llava, tmp_path: Path) -> None:
    stream = llava.stream("What?", tmp_path / "later.png", FEW)
    with pytest.raises(MissingError):
        list(llava.stream("What?", tmp_path / "later.png", FEW))
    RED.save(tmp_path / "later.png")
    assert await_text(stream) == llava.ask("What?", RED, FEW).text


def bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


# Overlapping turns.


def assert_same_state(llava: Llava, chat: Chat) -> None:
    """The model is shown the same next as of a conversation with the same turns that nothing happened to."""
    images = [RED] * sum(message.images for message in chat.messages)
    plain = llava.chat(options=chat._options)
    plain.resume(chat.messages, images)
    found, wanted = (result_of(talk.say("And now?")) for talk in (chat, plain))
    assert (found.prompt_tokens, found.image_tokens) == (wanted.prompt_tokens, wanted.image_tokens)


def test_a_turn_waits_for_the_one_that_was_left(llava: Llava) -> None:
    """As `break` leaves it: Python closes the stream later, when the next turn has been asked for."""
    chat = llava.chat(options=Options(max_tokens=480))

    async def run() -> Result | None:
        async for _ in chat.asay("What is this?", RED):
            break
        chunks = [chunk async for chunk in chat.asay("Why?")]
        return chunks[-1].final

    second = asyncio.run(run())
    assert second
    assert second.image_tokens == llava.bundle.manifest.vision.image_tokens
    assert [(message.text, message.images) for message in chat.messages[::2]] == [("What is this?", 1), ("Why?", 0)]
    assert len(chat.messages) == 4


def test_a_turn_that_waits_for_another_one_can_be_cancelled(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, although the other one is not at its end."""
    chat, begun, go = llava.chat(options=FEW), threading.Event(), threading.Event()
    generate = chat._engine.generate

    def held(*arguments: Any, **named: Any) -> Iterator[Chunk]:
        begun.set()
        assert go.wait(20)
        yield from generate(*arguments, **named)

    monkeypatch.setattr(chat._engine, "generate", held)

    async def turn(text: str) -> None:
        async for _ in chat.asay(text):
            pass

    async def run() -> bool:
        first = asyncio.create_task(turn("One?"))
        await asyncio.to_thread(begun.wait, 20)
        second = asyncio.create_task(turn("Two?"))
        while len(chat._async_queue) < 2:
            await asyncio.sleep(0.001)
        second.cancel()
        ended, _ = await asyncio.wait([second], timeout=5)
        go.set()
        await first
        return bool(ended)

    assert asyncio.run(run())
    assert [message.text for message in chat.messages][:-1] == ["One?"]


def test_turns_of_several_tasks_are_answered_in_their_order(llava: Llava) -> None:
    chat = llava.chat(options=FEW)

    async def turn(number: int, images: Any) -> None:
        await asyncio.sleep(0.02 * number)
        async for _ in chat.asay(f"Question {number}?", images):
            pass

    async def run() -> None:
        await asyncio.gather(turn(0, RED), turn(1, ()), turn(2, RED))

    asyncio.run(run())
    turns = [(message.text, message.images) for message in chat.messages[::2]]
    assert turns == [("Question 0?", 1), ("Question 1?", 0), ("Question 2?", 1)]
    assert_same_state(llava, chat)


def test_a_turn_while_another_is_open_is_refused(llava: Llava) -> None:
    chat = llava.chat(options=FEW)
    first = chat.say("What is this?", RED)
    next(first)
    for wrong in (lambda: list(chat.say("Why?", RED)), lambda: asyncio.run(anext(chat.asay("Why?")))):
        with pytest.raises(UsageError, match="still open"):
            wrong()
    first.close()
    assert [message.images for message in chat.messages] == [1, 0]
    assert_same_state(llava, chat)


def test_threads_that_ask_at_once_leave_a_conversation_that_goes_on(llava: Llava) -> None:
    chat = llava.chat(options=FEW)
    refused: list[UsageError] = []

    def ask(number: int) -> None:
        try:
            list(chat.say(f"Question {number}", RED))
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chat.messages) == 2 * (4 - len(refused))
    assert chat.messages
    assert_same_state(llava, chat)


def test_an_open_answer_is_no_part_of_what_comes_after_a_reset(llava: Llava) -> None:
    chat = llava.chat("Be brief.", FEW)
    left = chat.say("What is this?", RED)
    next(left)
    chat.reset()
    assert list(chat.say("Hello"))
    left.close()
    assert [message.text for message in chat.messages][:-1] == ["Be brief.", "Hello"]
    assert_same_state(llava, chat)


def test_a_full_conversation_names_the_way_out(micro_bundle: Path) -> None:
    """In the words of Python, and not a shorter text where the new one is short."""
    with Llava.load(micro_bundle, EngineOptions(device="cpu", context=128)) as llava:
        chat = llava.chat(system="Be kind.", options=Options(max_tokens=16))
        for images in ((), RED):
            with pytest.raises(ContextOverflowError, match="Use a shorter text") as alone:
                list(chat.say("word " * 100, images))
            assert "reset" not in str(alone.value)
        assert list(chat.say("Why?"))
        with pytest.raises(ContextOverflowError, match=r"shorter conversation.*Chat\.reset\(\)"):
            [list(chat.say("Why?")) for _ in range(20)]
        chat.reset()
        assert list(chat.say("Why?"))


# Memory and privacy.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_loading_twice_shares_the_weights(micro_bundle: Path) -> None:
    """Both mappings of every weight file are of the same pages: none of them is private to one."""

    def mappings() -> dict[str, list[int]]:
        """For each mapping of a weight file, the kilobytes that only it holds and that were written to."""
        found: dict[str, list[int]] = {}
        name = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
                name = Path(path).name if path.startswith(str(micro_bundle)) else ""
                if name:
                    found.setdefault(name, []).append(0)
            elif name and line.startswith("Private_Dirty:"):
                found[name][-1] += int(line.split()[1])
        return found

    with Llava.load(micro_bundle, device="cpu") as one, Llava.load(micro_bundle, device="cpu") as two:
        assert one.ask("Hello", RED).text == two.ask("Hello", RED).text
        found = mappings()
    assert len(found["language.gguf"]) >= 2
    assert {name: kilobytes for name, kilobytes in found.items() if any(kilobytes)} == {}


def test_onnx_runtime_tells_nobody(micro_bundle: Path, tmp_path: Path) -> None:
    """Its telemetry keeps a device id and a queue of events in the home folder; ours stays empty."""

    def files(code: str, name: str) -> list[Path]:
        home = tmp_path / name
        home.mkdir()
        environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
        environment |= {"HOME": str(home), "LLAVA_EDGE_HOME": str(tmp_path / "own")}
        environment.pop("XDG_CACHE_HOME", None)
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
        return [path for path in home.rglob("*") if path.is_file()]

    load = f"from llava_edge import Llava\nLlava.load({str(micro_bundle)!r}, device='cpu').close()"
    assert files(load, "ours") == []
    if not files("import onnxruntime", "theirs"):
        pytest.skip("this onnxruntime has no telemetry")
