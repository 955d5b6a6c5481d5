"""The model's process can die, hang and be left; the server stays, and nobody takes a torn answer for a whole one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import in_child
from serving import ROOM, ROOT, Server, paused, png, question, read_all, running, wait_for_text

from llava_edge.bundle import Bundle
from llava_edge.options import EngineOptions

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


LONG = question("Hello", stream=True, max_tokens=-1)  # an answer by `talkative`


@pytest.fixture(scope="module")
def server(talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(talkative, tmp_path_factory.mktemp("server"), "--queue", "64", "--context", str(ROOM)) as started:
        yield started


# Two processes.


@linux
def test_only_the_child_has_the_model(server: Server) -> None:
    def mapped(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    for name in ("language.gguf", "vision.onnx", "libllama", "onnxruntime"):
        assert name not in mapped(server.process.pid)
        assert name in mapped(server.child())


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_answer_that_died_has_no_clean_end(number: int, server: Server) -> None:
    crashes = server.health()["crashes"]
    wanted = server.text("Hello", (png(),))
    streaming = wait_for_text(server.start(LONG))
    waiting = server.start(question("Hello", (png(),)))
    os.kill(server.child(), number)
    said = read_all(streaming)
    assert b'data: {"error":{"message":"The model\'s process ended' in said
    assert b"[DONE]" not in said
    # What waited for its turn is answered by the next process.
    answer = json.loads(read_all(waiting).partition(b"\r\n\r\n")[2])
    assert answer["choices"][0]["message"]["content"] == wanted
    assert server.health()["crashes"] == crashes + 1
    assert server.process.poll() is None


@linux
def test_the_openai_client_sees_that_an_answer_died(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "Hello"}]
        stream = client.chat.completions.create(model="micro", messages=messages, max_tokens=-1, stream=True)
        next(iter(stream))
        os.kill(server.child(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="process ended"):
            list(stream)
        assert client.chat.completions.create(model="micro", messages=messages, max_tokens=2).choices


@linux
def test_a_whole_answer_that_died_is_an_error(server: Server) -> None:
    crashes = server.health()["crashes"]
    threads, child = counts(server)[0][1], server.child()
    waiting = server.start(question("Hello", max_tokens=-1))
    server.wait_until(lambda: counts(server)[0][1] > threads)  # the one that answers it
    os.kill(child, signal.SIGKILL)
    said = read_all(waiting)
    assert said.startswith(b"HTTP/1.1 500 ")
    assert b"x-should-retry: false\r\n" in said.lower()  # or the client asks again what ended the process
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "crash"
    server.wait_until(lambda: server.health()["crashes"] == crashes + 1)


@linux
def test_a_request_that_the_process_did_not_receive_is_asked_again(server: Server) -> None:
    """The end of a large process takes a moment, in which it is sent requests still."""
    wanted = server.text("Hello", (png(),))
    with paused(server):
        asked = server.start(question("Hello", (png(),)))
        server.wait_until(lambda: server.metric("llava_edge_requests_running") == 1)
        os.kill(server.child(), signal.SIGKILL)
    answer = json.loads(read_all(asked).partition(b"\r\n\r\n")[2])
    assert answer["choices"][0]["message"]["content"] == wanted


@linux
def test_a_server_that_was_stopped_for_a_while_goes_on(server: Server) -> None:
    """As by Ctrl-Z or `docker pause`. A client that has left meanwhile takes no line in the log for each token."""
    crashes, child = server.health()["crashes"], server.child()
    leaving = wait_for_text(server.start(LONG))
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        leaving.close()
        time.sleep(0.5)  # in which the model goes on
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    server.wait_until(lambda: server.metric("llava_edge_requests_running") == 0)
    assert server.text("Hello", (png(),))
    assert (server.health()["crashes"], server.child()) == (crashes, child)
    assert "socket.send" not in server.log.read_text()


@linux
def test_it_is_started_again_without_being_asked(server: Server) -> None:
    before, open_before = server.child(), pipes(server)
    os.kill(before, signal.SIGKILL)
    server.wait_until(lambda: server.health()["status"] != "ok")
    server.wait_until(lambda: server.health()["status"] == "ok")
    assert server.child() != before
    assert pipes(server) == open_before


@pytest.mark.parametrize(("received", "statuses"), [(True, (500, 500, 500, 503)), (False, (500, 503))])
def test_three_deaths_without_an_answer_are_enough(
    received: bool, statuses: tuple[int, ...], micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then requests are refused for a while, instead of a process being loaded for each of them only to die.

    Nor is one asked again for ever that a process does not live to receive.
    """
    from llava_edge.server import supervisor
    from llava_edge.server.limits import Limits
    from llava_edge.server.model_process import Job, ProcessDiedError
    from llava_edge.server.problems import Problem
    from llava_edge.server.requests import parse_chat

    tries = []

    class Mortal:
        @staticmethod
        async def spawn(*_: object) -> Mortal:
            tries.append(1)
            return Mortal()

        def __init__(self) -> None:
            self.jobs: dict[int, Any] = {}
            self.late = False

        async def wait_ready(self) -> dict[str, Any]:
            return {"device": "cpu", "parallel": 1}

        async def read_events(self) -> None:
            await asyncio.Event().wait()

        async def run(self, job: Job, _: float) -> None:
            job.received = received
            raise ProcessDiedError

        async def terminate(self, timeout: float = 0.0) -> int:
            return -11

    async def run() -> None:
        limits = Limits()
        under_test = supervisor.Supervisor(Bundle.open(micro_bundle), EngineOptions(), limits)
        await under_test.start()
        ask = parse_chat(question(), "micro", limits)
        for wanted in statuses:
            with pytest.raises(Problem) as caught:
                async for _ in under_test.answer(ask):
                    pass
            assert caught.value.status == wanted
            await asyncio.sleep(0.01)
        assert caught.value.retry_after == 1
        assert (under_test.state, under_test.crashes, len(tries)) == ("failed", 3, 3)
        await asyncio.sleep(0.6)
        assert under_test.state == "ok"  # and then it is tried again
        await under_test.close()

    monkeypatch.setattr(supervisor, "ModelProcess", Mortal)
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", 0.5)
    asyncio.run(run())


def test_what_the_child_says_is_not_trusted() -> None:
    """Lines that are no JSON, no object or without their fields end the child, not the server."""
    from llava_edge.server.limits import Limits
    from llava_edge.server.model_process import Job, ModelProcess, ProcessDiedError
    from llava_edge.server.requests import parse_chat

    lies = [b"nonsense\n", b"[1]\n", b'{"id": 1, "error": 5}\n', b"x" * (1 << 21)]

    async def hear(lie: bytes) -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        process = ModelProcess(multiprocessing.get_context("spawn").Process(), reader, writer)
        job = process.jobs[1] = Job(1, parse_chat(question(), "micro", Limits()))

        def talk() -> None:
            with theirs, contextlib.suppress(BrokenPipeError):
                theirs.recv(1 << 16)
                theirs.sendall(lie)

        threading.Thread(target=talk).start()
        running = asyncio.create_task(process.run(job, 1.0))
        with pytest.raises((ProcessDiedError, TypeError, KeyError)):
            await process.read_events()
        running.cancel()
        writer.transport.abort()

    for lie in lies:
        asyncio.run(hear(lie))


def test_a_parent_that_was_killed_within_a_line_ends_the_child() -> None:
    """Which no signal does but on Linux."""
    from llava_edge.server.child import _EventWriter, _Worker

    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rb") as lines:
        with ours:
            ours.sendall(b'{"id": 1, "mess')
        worker = threading.Thread(target=_Worker(None, lines, _EventWriter(theirs), 0).run, daemon=True)  # type: ignore[arg-type]
        worker.start()
        worker.join(10)
        assert not worker.is_alive()


def test_pictures_are_not_written_out() -> None:
    """As text they take four times their size, and 30 ms for a photo: in an error that nobody reads, say."""
    from llava_edge.server.limits import Limits
    from llava_edge.server.requests import parse_chat
    from llava_edge.server.supervisor import Supervisor

    class Photo(bytes):
        def __repr__(self) -> str:
            raise AssertionError("a picture was written out")

    async def ask() -> list[dict[str, Any]]:
        supervisor = Supervisor(Bundle.__new__(Bundle), EngineOptions(), Limits())
        asked = replace(parse_chat(question(), "micro", Limits()), images=(Photo(b"pixels"),))
        events = supervisor.answer(asked)
        first = asyncio.ensure_future(anext(events))
        while not supervisor.queue_length:
            await asyncio.sleep(0)
        supervisor._queue.popleft().send({"result": {}})
        return [await first, *[said async for said in events]]

    assert asyncio.run(ask()) == [{"result": {}}]


# Leaving.


@pytest.mark.parametrize("stage", ["waiting", "prefill", "streaming"])
def test_who_leaves_is_not_worked_for(stage: str, server: Server) -> None:
    crashes = server.health()["crashes"]
    first = wait_for_text(server.start(LONG)) if stage == "waiting" else None
    leaving = server.start(LONG)
    if stage == "streaming":
        wait_for_text(leaving)
    server.wait_until(lambda: server.health()["queue"] == (1 if stage == "waiting" else 0))
    leaving.close()
    if first:
        server.wait_until(lambda: server.health()["queue"] == 0)
        first.close()
    assert server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1) < 2
    assert server.text("Hello", max_tokens=3)
    assert server.health()["crashes"] == crashes


def test_what_is_left_is_counted(server: Server) -> None:
    tokens, left, whole = (
        'llava_edge_tokens_total{kind="answer"}',
        'llava_edge_answers_total{reason="cancelled"}',
        'llava_edge_answers_total{reason="length"}',
    )
    server.ask("Hello", max_tokens=4)
    before = [server.metric(name) for name in (tokens, whole)]
    wait_for_text(server.start(LONG)).close()
    server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1)
    made = server.ask("Hello", max_tokens=4)["usage"]["completion_tokens"]
    assert server.metric(left) >= 1
    assert server.metric(tokens) > before[0] + made
    assert server.metric(whole) == before[1] + 1  # the one that was left did not run to its end


@linux
def test_answers_come_in_the_order_of_the_questions(server: Server) -> None:
    asked = []
    with paused(server):
        for number in range(4):
            asked.append(server.start(LONG))
            server.wait_until(lambda number=number: server.metric("llava_edge_requests_in_work") == number + 2)
    for left, connection in zip((3, 2, 1, 0), asked, strict=True):
        wait_for_text(connection)
        assert server.health()["queue"] == left
        connection.close()


@linux
def test_a_full_queue_refuses_at_once(micro_bundle: Path, tmp_path: Path) -> None:
    with running(micro_bundle, tmp_path, "--queue", "2") as server:
        with paused(server):
            busy = server.start(question("Hello"))
            server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 2)
            waiting = [server.start(question("Hello", max_tokens=2)) for _ in range(2)]
            server.wait_until(lambda: server.health()["queue"] == 2)
            for _ in range(20):
                status, headers, body = server.chat(question())
                assert (status, json.loads(body)["error"]["type"]) == (503, "overloaded_error")
                assert int(headers["retry-after"]) > 0
        busy.close()
        assert all(read_all(connection).startswith(b"HTTP/1.1 200") for connection in waiting)


def test_time_limits_of_queue_and_answer(micro_bundle: Path, tmp_path: Path) -> None:
    with running(micro_bundle, tmp_path, limits="queue_seconds=0.4, answer_seconds=1.0") as server:
        with paused(server):
            busy = server.start(question("Hello"))
            server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 2)
            assert server.chat(question())[0] == 503
            late = read_all(busy)
            assert b'"code":"timeout"' in late
            assert b"x-should-retry: false\r\n" in late.lower()
        assert server.text("Hello")
        assert server.health()["crashes"] == 0


# Ends.


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_the_child_ends_with_the_server(number: int, code: int, talkative: Path, tmp_path: Path) -> None:
    with running(talkative, tmp_path) as server:
        child = server.child()
        streaming = wait_for_text(server.start(LONG))
        server.process.send_signal(number)
        assert server.process.wait(10) == code
        server.wait_until(lambda: not Path(f"/proc/{child}").exists(), 2)
        streaming.close()
        assert "Traceback" not in server.log.read_text()


@linux
def test_whose_answer_the_end_of_the_server_breaks_off_is_told(talkative: Path, tmp_path: Path) -> None:
    with running(talkative, tmp_path) as server:
        child = server.child()
        streaming = wait_for_text(server.start(LONG))
        os.kill(child, signal.SIGSTOP)  # so that neither answer ends by itself
        waiting = server.start(question("Hello"))
        server.wait_until(lambda: server.health()["queue"] == 1)
        server.process.send_signal(signal.SIGINT)
        rest, whole = read_all(streaming), read_all(waiting)
        assert server.process.wait(10) == 130
        assert not Path(f"/proc/{child}").exists()
        assert b'"code":"stopped"' in rest
        assert b"[DONE]" not in rest
        assert whole.startswith(b"HTTP/1.1 503")
        assert "ERROR" not in server.log.read_text()


def test_who_asks_while_the_server_ends_is_told() -> None:
    """Whose body came late, say; what is queued then would be broken off without a word."""
    from llava_edge.server.limits import Limits
    from llava_edge.server.problems import Problem
    from llava_edge.server.requests import parse_chat
    from llava_edge.server.supervisor import Supervisor

    async def ask() -> None:
        supervisor = Supervisor(Bundle.__new__(Bundle), EngineOptions(), Limits())
        supervisor.reject_requests()
        async with asyncio.timeout(10):
            await anext(supervisor.answer(parse_chat(question(), "micro", Limits())))

    with pytest.raises(Problem, match="stopped"):
        asyncio.run(ask())


def test_a_model_that_cannot_be_loaded_is_said(bundle_copy: Path, tmp_path: Path) -> None:
    language = bundle_copy / "language.gguf"
    data = bytearray(language.read_bytes())
    data[:4] = b"XXXX"
    language.write_bytes(data)
    command = [sys.executable, "-m", "llava_edge", "serve", "--model", str(bundle_copy), "--port", "0"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert done.stderr.count("\n") == 1
    assert "language.gguf" in done.stderr


@linux
def test_a_log_that_nobody_reads_stops_nothing(micro_bundle: Path) -> None:
    """An app that starts the server reads where it listens, and perhaps no more from that pipe."""
    command = [sys.executable, "-m", "llava_edge", "serve", "--model", str(micro_bundle), "--port", "0"]
    with subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        try:
            port = int(re.findall(rb"http://\S+:(\d+) ", process.stderr.readline())[0])
            server = Server(process, port, micro_bundle)
            assert {server.request("GET", "/v1/models", timeout=10)[0] for _ in range(400)} == {200}
            pipe = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                while True:  # what the server left of it
                    os.write(pipe, b"x")
            os.close(pipe)
            os.kill(server.child(), signal.SIGKILL)
            server.wait_until(lambda: json.loads(server.request("GET", "/health", timeout=10)[2])["crashes"] == 1)
        finally:
            process.terminate()


def test_without_the_extra(micro_bundle: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nfrom llava_edge.cli import main\n"
    code += f"main(['serve', '--model', {str(micro_bundle)!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "Run in the clone of llava-edge: pip install '.[serve]'" in done.stderr


# The child's sandbox.


def test_pictures_are_known_again_and_leave_no_file(server: Server) -> None:
    """Not even of the cache: its files are loaded by programs that are in no sandbox."""
    first, second = (server.ask(text, (png((1, 2, 3)),)) for text in ("What?", "Why?"))
    assert (first["llava_edge"]["cache"], second["llava_edge"]["cache"]) == ("miss", "kv")
    assert [path for path in server.log.parent.rglob("*") if path.is_file()] == [server.log]


def test_a_draft_model_can_be_read_wherever_it_is(micro_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(micro_bundle / "language.gguf", tmp_path / "draft.gguf")
    with running(micro_bundle, tmp_path, "--draft", str(tmp_path / "draft.gguf")) as server:
        assert server.text(images=(png(),), max_tokens=4)


@linux
def test_the_child_can_do_little(micro_bundle: Path, isolated_home: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    log, kernels = isolated_home / "log" / "votes.jsonl", isolated_home / "native" / "kernels.so"
    for file in (log, kernels):
        file.parent.mkdir()
        file.touch()
    code = f"""
import ctypes, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from llava_edge.server import sandbox
libc = ctypes.CDLL(None, use_errno=True)
def tries():
    yield "read", lambda: open({str(secret)!r}).read()
    yield "list", lambda: os.listdir({str(tmp_path)!r})
    yield "log", lambda: open({str(log)!r}).read()
    yield "own kernels", lambda: open({str(kernels)!r}).read()
    yield "write", lambda: open({str(tmp_path / "new")!r}, "w")
    yield "bundle", lambda: open({str(micro_bundle / "new")!r}, "w")
    yield "socket", lambda: socket.create_connection(("127.0.0.1", 9), 1)
    yield "udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    yield "program", lambda: subprocess.run(["/bin/true"])
    yield "pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield "signal", lambda: os.kill({os.getpid()}, 0)
    yield "limits", lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_CORE)
    yield "priority", lambda: os.setpriority(os.PRIO_PROCESS, {os.getpid()}, os.nice(0))
    yield "thread", lambda: called({200 if platform.machine() == "x86_64" else 130}, {os.getpid()}, 0)  # tkill
    yield "own limits", lambda: resource.prlimit(0, resource.RLIMIT_CORE)
    yield "own thread", lambda: signal.pthread_kill(threading.get_ident(), 0)
    yield "io_uring", lambda: ring()
    yield "own", lambda: open({str(micro_bundle / "manifest.json")!r}).read()
def called(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "")
def ring():
    called(425, 4, ctypes.create_string_buffer(120))  # io_uring_setup
def outcome(do):
    try:
        do()
        return "works"
    except PermissionError: return "denied"
    except OSError as error: return type(error).__name__
before = {{name: outcome(do) for name, do in tries()}}
for name in ({str(tmp_path / "new")!r}, {str(micro_bundle / "new")!r}): os.unlink(name)
sandbox.enter(Path({str(micro_bundle)!r}), "cpu")
print(before, {{name: outcome(do) for name, do in tries()}}, sep="\\n")
"""
    before, after = map(eval, in_child(code).stdout.splitlines())
    rings = {"io_uring": before["io_uring"]}  # some systems have it turned off
    assert before == dict.fromkeys(before, "works") | {"socket": "ConnectionRefusedError"} | rings
    if after["read"] != "denied":
        pytest.skip("this kernel has no Landlock")
    allowed = ("own", "own limits", "own thread", "own kernels")
    assert after == dict.fromkeys(after, "denied") | dict.fromkeys(allowed, "works")


@linux
def test_no_thread_of_the_child_can_do_more(server: Server) -> None:
    """What a thread gives up, those that were there before it do not: numpy starts some when it is imported."""
    server.text("Hello", (png(),))
    threads = list(Path(f"/proc/{server.child()}/task").iterdir())
    assert len(threads) > 2
    for thread in threads:
        status = (thread / "status").read_text()
        assert "NoNewPrivs:\t1\nSeccomp:\t2\n" in status, status


@linux
def test_a_process_with_threads_is_not_confined() -> None:
    code = """
import threading, time
from pathlib import Path
from llava_edge.server import sandbox
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
sandbox.enter(Path("/nowhere"), "cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "UnavailableError: The model's process has 2 threads" in done.stderr


@linux
def test_a_signal_to_the_whole_group_ends_the_server_alone(server: Server) -> None:
    child = server.child()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child, number)
    time.sleep(0.3)
    assert server.text("Hello", max_tokens=2)
    assert server.child() == child


def test_ctrl_c_does_not_end_the_imports_of_the_child(micro_bundle: Path) -> None:
    """With a traceback of its own, beside what the server does about it."""
    from llava_edge.server.limits import Limits
    from llava_edge.server.model_process import ModelProcess

    async def load() -> dict[str, Any]:
        process = await ModelProcess.spawn(Bundle.open(micro_bundle), EngineOptions(device="cpu"), Limits())
        os.kill(process._process.pid or 0, signal.SIGINT)
        try:
            return await process.wait_ready()
        finally:
            await process.terminate()

    assert asyncio.run(load())["device"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@linux
def test_what_the_child_inherits(server: Server) -> None:
    limits = Path(f"/proc/{server.child()}/limits").read_text()
    rows = {line[:25].strip(): line[25:].split() for line in limits.splitlines()[1:]}
    assert rows["Max core file size"][:2] == ["0", "0"]
    assert rows["Max open files"][:2] == ["256", "256"]
    assert rows["Max address space"][0].isdigit()
    kinds = [str(file.readlink()) for file in Path(f"/proc/{server.child()}/fd").iterdir()]
    assert sum(kind.startswith("socket:") for kind in kinds) == 1  # the link to its parent, and no client's


# At length.


@pytest.mark.slow
def test_many_clients_get_their_own_answers(server: Server) -> None:
    """32 clients, 5 requests each, every one with its own picture and text: each answer is its serial answer."""

    def ask(number: int) -> str:
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        return server.text(f"Question {number}?", (png(colour),), max_tokens=12)

    numbers = range(32 * 5)
    alone = [ask(number) for number in numbers]
    assert len(set(alone)) > 16
    with ThreadPoolExecutor(32) as clients:
        together = list(clients.map(ask, numbers))
    assert together == alone


@pytest.mark.slow
@linux
def test_a_hundred_leave_at_any_moment(server: Server) -> None:
    wanted = server.text("Hello", (png(),))
    threads, files = counts(server)
    crashes = server.health()["crashes"]
    moments = random.Random(0)
    for number in range(100):
        body = question("Hello", (png(size=(300, 300)),), stream=bool(number % 3), max_tokens=-1)
        if number % 5:
            connection = server.start(body)
        else:  # in the middle of sending it
            data = json.dumps(body).encode()
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(server.post + b"Content-Length: %d\r\n\r\n" % len(data))
            connection.sendall(data[: moments.randrange(len(data))])
        moment = moments.choice([0.0, 0.002, 0.01, 0.03, 0.1, 0.3]) * moments.random()
        time.sleep(moment)
        connection.close()
        assert server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1) < 2
        assert server.text("Hello", (png(),)) == wanted
    assert server.health()["crashes"] == crashes
    assert counts(server) == (threads, files)


@pytest.mark.slow
@linux
def test_twenty_deaths(server: Server) -> None:
    wanted = server.text("Hello", (png(),))
    crashes = server.health()["crashes"]
    moments = random.Random(1)
    for number in range(20):
        streaming = server.start(LONG)
        if number % 2:
            wait_for_text(streaming)
        time.sleep(moments.random() * 0.02)
        os.kill(server.child(), moments.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS]))
        said = read_all(streaming)
        assert b"[DONE]" not in said
        assert b'"error"' in said
        assert server.text("Hello", (png(),)) == wanted
        assert server.health()["crashes"] == crashes + number + 1
    assert server.process.poll() is None


@pytest.mark.slow
@linux
@pytest.mark.parametrize("cache", ["--no-cache", "--cache"])
def test_three_hundred_requests_leave_nothing_behind(cache: str, micro_bundle: Path, tmp_path: Path) -> None:
    """Memory of both processes grows by at most 2 KiB a request; threads, descriptors and files stay."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def files() -> set[Path]:
        return set(tmp_path.rglob("*"))

    with running(micro_bundle, tmp_path, cache, environment={"TMPDIR": str(temporary)}) as server:

        def some(first: int, count: int) -> None:
            for number in range(first, first + count):
                shown = number if cache == "--no-cache" else number % 50  # known ones are kept on purpose, up to 64 MiB
                picture = png((shown % 256, shown // 256, 7), (64 + shown % 50, 64))
                server.text(f"Question {number}?", (picture,), max_tokens=8, stream=False)

        some(0, 100)
        before, use, there = counts(server), private(server), files()
        some(100, 300)
        assert counts(server) == before
        assert files() == there
        assert not any(temporary.iterdir())
        grown = [(after - now) / 300 for after, now in zip(private(server), use, strict=True)]
        print(f"bytes a request: server {grown[0]:.0f}, child {grown[1]:.0f}")
        assert max(grown) <= 2048


def counts(server: Server) -> tuple[list[int], list[int]]:
    """Threads and descriptors of both processes, once no connection is open."""
    pids = (server.process.pid, server.child())
    return (
        [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids],
        [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids],
    )


def pipes(server: Server) -> int:
    """Pipes that the server has open."""
    return sum("pipe:[" in str(file.resolve()) for file in Path(f"/proc/{server.process.pid}/fd").iterdir())


def private(server: Server) -> list[int]:
    """Private bytes of both processes."""
    found = []
    for pid in (server.process.pid, server.child()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_")))
    return found
