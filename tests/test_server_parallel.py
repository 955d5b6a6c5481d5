"""A server that answers several clients at a time, which it does with native kernels."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from native_kernels import fast, found_out, here, install
from serving import ROOM, Server, png, question, read_all, running, wait_for_text

from llava_edge.runtimes.native import installed

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
pytestmark = here

LONG = question("Hello", stream=True, max_tokens=400)


@pytest.fixture(scope="module")
def home(native_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the native kernels are, all of which are used."""
    folder = tmp_path_factory.mktemp("parallel") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_EDGE_HOME", str(folder))
        types = {kind: race | {"one": {"plain": 3.0, "few": 1.0}} for kind, race in found_out()["types"].items()}
        install(fast(native_build, folder.parent / installed.LIBRARY), types=types)
    return folder


@pytest.fixture(scope="module")
def server(micro_bundle: Path, home: Path) -> Iterator[Server]:
    with running(micro_bundle, home.parent, "--queue", "64") as started:
        yield started


def test_a_short_answer_comes_beside_a_long_one(talkative: Path, home: Path) -> None:
    with running(talkative, home.parent, "--context", str(ROOM)) as server:
        long = wait_for_text(server.start(question("Hello", stream=True, max_tokens=ROOM // 2)))
        assert (server.health()["running"], server.metric("llava_edge_requests_running")) == (1, 1)
        assert server.text("Hi", (png(),), max_tokens=3)
        assert server.metric("llava_edge_requests_in_work") == 2  # the long one, and this question
        long.close()


def test_clients_get_the_answers_they_get_alone(server: Server) -> None:
    """Bit for bit, whatever else is answered meanwhile."""

    def ask(number: int) -> str:
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        more: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 3 == 0 else {}
        return server.text(f"Question {number}?", (png(colour),) * (number % 2), max_tokens=4 + number, **more)

    numbers = range(24)
    alone = [ask(number) for number in numbers]
    with ThreadPoolExecutor(12) as clients:
        together = list(clients.map(ask, numbers))
    assert together == alone
    assert len(set(alone)) > 20


def test_who_leaves_takes_nobody_along(server: Server) -> None:
    staying, leaving = (wait_for_text(server.start(LONG)) for _ in range(2))
    leaving.close()
    assert server.text("Hi", max_tokens=3)
    assert b"[DONE]" in read_all(staying)
    assert server.health()["crashes"] == 0


def test_a_bad_picture_ends_no_other_answer(server: Server) -> None:
    long = wait_for_text(server.start(LONG))
    status, _, body = server.chat(question("Hi", (png()[:40],)))
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
    assert b"[DONE]" in read_all(long)


def test_a_death_ends_the_answers_in_work_alone(micro_bundle: Path, home: Path) -> None:
    with running(micro_bundle, home.parent) as server:
        child = server.child()
        tasks = Path(f"/proc/{child}/task")
        before = len(list(tasks.iterdir()))
        streams = [server.start(LONG) for _ in range(3)]
        server.wait_until(lambda: len(list(tasks.iterdir())) == before + 3)  # it has received them
        os.kill(child, signal.SIGKILL)
        for said in map(read_all, streams):
            assert b'"error"' in said
            assert b"[DONE]" not in said
        assert server.text("Hi", max_tokens=3)
        assert server.health()["crashes"] == 1


def test_one_at_a_time_if_asked(micro_bundle: Path, home: Path) -> None:
    with running(micro_bundle, home.parent, "--parallel", "1") as server:
        long = wait_for_text(server.start(LONG))
        with ThreadPoolExecutor(1) as client:
            waiting = client.submit(server.text, "Hi", max_tokens=3)
            assert b"[DONE]" in read_all(long)
            assert waiting.result(20)


def test_each_answer_has_its_own_time_limit(micro_bundle: Path, home: Path) -> None:
    with running(micro_bundle, home.parent, limits="answer_seconds=0.3") as server:
        assert server.text("Hi", max_tokens=2)
        os.kill(server.child(), signal.SIGSTOP)
        streams = [server.start(LONG) for _ in range(2)]
        found = [read_all(stream) for stream in streams]
        os.kill(server.child(), signal.SIGCONT)
        assert all(b'"code":"timeout"' in said for said in found)
        server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1)
        assert server.text("Hi", max_tokens=2)
        assert server.health()["crashes"] == 0
