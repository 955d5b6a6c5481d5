"""The supervisor of the model's process, with a child that the test plays."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from processes import in_child
from serving import question

from llava_edge.bundle import Bundle
from llava_edge.options import EngineOptions

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

from llava_edge.server import supervisor
from llava_edge.server.limits import Limits
from llava_edge.server.model_process import ModelProcess, ProcessDiedError
from llava_edge.server.problems import Problem
from llava_edge.server.requests import parse_chat

Event = dict[str, Any]


class Played:
    """A supervisor, and the other end of its link to the child."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.supervisor = supervisor.Supervisor(Bundle.__new__(Bundle), EngineOptions(), limits)
        self.starts = 0
        self.killed = asyncio.Event()

    async def spawn(self, *_: object) -> ModelProcess:
        ours, theirs = socket.socketpair()
        self.reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.say({"ready": {"device": "cpu", "parallel": 8}})
        self.starts += 1
        return ModelProcess(_Process(self), *await asyncio.open_connection(sock=ours))  # type: ignore[arg-type]

    def say(self, event: Event) -> None:
        self.writer.write(json.dumps({"text": "", "chances": [], **event}).encode() + b"\n")

    def end(self, number: int) -> None:
        """End an answer."""
        timings = dict.fromkeys((f"{stage}_ms" for stage in ("preprocess", "encode", "prefill", "ttft", "decode")), 0)
        counts = dict.fromkeys(("prompt_tokens", "image_tokens", "completion_tokens"), 1)
        self.say({"id": number, "result": {"finish_reason": "stop", "timings": timings | {"total_ms": 0}, **counts}})

    async def hear(self) -> Event:
        """The next request, or cancellation of one."""
        async with asyncio.timeout(5):
            event: Event = json.loads(await self.reader.readline())
            await self.reader.readexactly(sum(event.get("images", ())))
        return event

    def ask(self, **more: Any) -> asyncio.Task[list[Event]]:
        """A client's request. Cancelling it is leaving."""
        request = parse_chat(question(**more), "micro", self.limits)

        async def read() -> list[Event]:
            async with asyncio.timeout(5):
                return [event async for event in self.supervisor.answer(request)]

        return asyncio.create_task(read())

    async def ask_two(self) -> tuple[asyncio.Task[list[Event]], asyncio.Task[list[Event]]]:
        """Two requests that the child has got."""
        both = self.ask(), self.ask()
        for _ in both:
            await self.hear()
        return both


class _Process:
    """What `ModelProcess` uses of a process."""

    exitcode = -9

    def __init__(self, played: Played) -> None:
        self._played = played
        self._writer = played.writer

    def join(self, timeout: float = 0.0) -> None:
        pass

    def close(self) -> None:
        pass

    def kill(self) -> None:
        self._played.killed.set()
        self._writer.transport.abort()


Test = Callable[[Played], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test with a supervisor that has these limits, and close it."""

    @asynccontextmanager
    async def started(limits: Limits) -> AsyncIterator[Played]:
        played = Played(limits)
        monkeypatch.setattr(ModelProcess, "spawn", played.spawn)
        await played.supervisor.start()
        yield played
        closing = asyncio.create_task(played.supervisor.close())
        assert (await asyncio.wait({closing}, timeout=2))[0]

    def run(test: Test, **limits: float) -> None:
        async def whole() -> None:
            async with started(Limits(**limits)) as played:  # type: ignore[arg-type]
                await test(played)

        asyncio.run(whole())

    return run


async def problem(asked: asyncio.Task[Any]) -> str:
    with pytest.raises(Problem) as caught:
        await asked
    return str(caught.value.code)


def test_a_request_that_comes_as_the_child_dies_is_answered_by_the_next(play: Callable[..., None]) -> None:
    """Its task may be cancelled before it starts."""

    async def test(played: Played) -> None:
        for order in (0, 1):
            asked = [played.ask()] if order else []
            asyncio.get_running_loop().call_soon(died.set)
            asked += [played.ask()]
            while played.starts < order + 2:
                await asyncio.sleep(0.01)
            for each in asked:
                played.end((await played.hear())["id"])
                assert await each

    async def die_or_read(process: ModelProcess) -> None:
        reading = asyncio.create_task(read_events(process))
        try:
            await died.wait()
        finally:
            reading.cancel()
        died.clear()
        raise ProcessDiedError

    died, read_events = asyncio.Event(), ModelProcess.read_events
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelProcess, "read_events", die_or_read)
        play(test)


def test_what_the_child_received_ends_with_it(play: Callable[..., None]) -> None:
    """It may be what ended the child; the rest is asked again, in order."""

    async def test(played: Played) -> None:
        received, begun = await played.ask_two()
        leaving, first, second = (played.ask() for _ in range(3))
        for _ in range(3):
            await played.hear()
        played.say({"id": 1, "received": True})
        played.say({"id": 2, "text": "It"})
        leaving.cancel()
        await played.hear()
        played.writer.close()
        assert [await problem(received), await problem(begun)] == ["crash", "crash"]
        while played.starts < 2:
            await asyncio.sleep(0.01)
        for number, asked in ((4, first), (5, second)):
            assert (await played.hear())["id"] == number
            played.end(number)
            assert await asked

    play(test)


def test_the_end_of_the_server_is_not_forgotten_if_the_child_dies_then(play: Callable[..., None]) -> None:
    died = asyncio.Event()

    async def read_events(_: object) -> None:
        await died.wait()
        raise ProcessDiedError

    async def test(played: Played) -> None:
        await asyncio.sleep(0.01)
        died.set()
        await asyncio.sleep(0)  # the child's task has failed, and its group does not know yet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelProcess, "read_events", read_events)
        play(test)


def test_waiting_for_room_is_not_answering(play: Callable[..., None]) -> None:
    """An answer's time does not run while the context is full of earlier ones."""

    async def test(played: Played) -> None:
        first, second = await played.ask_two()
        await asyncio.sleep(0.7)
        played.end(1)
        await first
        await asyncio.sleep(0.7)
        played.end(2)
        await second

    play(test, answer_seconds=1.0)


def test_an_answer_that_has_begun_gets_no_more_time(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        first, second = await played.ask_two()
        played.say({"id": 2, "text": "It"})
        await asyncio.sleep(0.7)
        played.end(1)
        await first
        assert (await played.hear()) == {"cancel": 2}
        played.end(2)
        assert await problem(second) == "timeout"

    play(test, answer_seconds=1.0)


def test_a_child_that_hangs_gets_no_more_requests(play: Callable[..., None]) -> None:
    """With them there would always be somebody for whom it seems to work."""

    async def test(played: Played) -> None:
        leaving, staying = await played.ask_two()
        leaving.cancel()
        assert await played.hear() == {"cancel": 1}
        await asyncio.sleep(0.15)
        waiting = played.ask()
        await asyncio.sleep(0.05)
        assert (played.supervisor.running, played.supervisor.queue_length) == (2, 1)
        assert not played.killed.is_set()
        staying.cancel()
        assert await played.hear() == {"cancel": 2}
        await asyncio.wait_for(played.killed.wait(), 2)
        while played.starts < 2:
            await asyncio.sleep(0.01)
        assert (await played.hear())["id"] == 3
        played.end(3)
        assert await waiting

    play(test, cancel_seconds=0.1)


def test_it_gets_them_as_soon_as_it_ends_an_answer(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        leaving, staying = await played.ask_two()
        leaving.cancel()
        await played.hear()
        await asyncio.sleep(0.15)
        waiting = played.ask()
        played.end(1)
        assert (await played.hear())["id"] == 3
        for number in (2, 3):
            played.end(number)
        await asyncio.gather(staying, waiting)
        assert played.starts == 1

    play(test, cancel_seconds=0.1)


def test_a_child_has_time_to_end_an_answer_after_the_others(play: Callable[..., None]) -> None:
    """It may still have to read the one that is cancelled."""

    async def test(played: Played) -> None:
        leaving, staying = await played.ask_two()
        leaving.cancel()
        await played.hear()
        await asyncio.sleep(0.7)  # the second time that it is late is after 0.8 seconds
        played.end(2)
        await staying
        await asyncio.sleep(0.3)
        played.end(1)
        await asyncio.sleep(0.6)
        assert not played.killed.is_set()

    play(test, cancel_seconds=0.4)


def test_the_child_is_ended_when_clients_have_all_descriptors() -> None:
    """Or it would never be started again. In a process of its own, which has imported nothing else."""
    code = """
import asyncio, multiprocessing, os, resource, socket, time
from llava_edge.server.model_process import ModelProcess
async def end():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    child = ModelProcess(process, *await asyncio.open_connection(sock=socket.socketpair()[0]))
    free = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print(await child.terminate(timeout=0.01))
asyncio.run(end())
"""
    assert in_child(code).stdout == "-9\n"
