"""Who waits for the engine, who leaves it, and who closes it; without an engine."""

from __future__ import annotations

import gc
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from llava_edge.errors import ImageError, UsageError
from llava_edge.options import Chunk, Result
from llava_edge.runtimes import CancelledError, jobs
from llava_edge.runtimes.jobs import EngineThread, Job
from llava_edge.runtimes.worker import POLL_SECONDS, Worker, wait_result

SOON = 5.0  # seconds in which everything here happens
LAST = Chunk("", 0, "stop", cast(Result, object()), ())
CANCELLED = Chunk("", 0, "cancelled", cast(Result, object()), ())


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    made = EngineThread(lambda: None)
    yield made
    made.close()


@pytest.fixture
def busy(engine: EngineThread) -> Iterator[Callable[[], None]]:
    """The engine is at work until this is called."""
    begun, free = threading.Event(), threading.Event()

    def work(job: Job) -> None:
        begun.set()
        free.wait(SOON)

    threading.Thread(target=lambda: list(engine.submit(work, threading.Event())), daemon=True).start()
    assert begun.wait(SOON)
    yield free.set
    free.set()


def finish(job: Job) -> None:
    job.output.put(LAST)


def test_who_waits_or_asks_while_it_closes_is_told(engine: EngineThread, busy: Callable[[], None]) -> None:
    closing = threading.Thread(target=engine.close)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, engine.submit(finish, threading.Event()))
        while engine._jobs.empty():
            pass
        closing.start()
        while not engine._closed:
            pass
        with pytest.raises(UsageError, match="closed"):
            next(engine.submit(finish, threading.Event()))
        busy()
        with pytest.raises(UsageError, match="closed"):
            waiting.result(SOON)
    closing.join(SOON)
    assert not closing.is_alive()


def test_closing_cancels_what_is_at_work(engine: EngineThread) -> None:
    begun = threading.Event()

    def work(job: Job) -> None:
        begun.set()
        assert wait_for(job.cancel)
        job.output.put(CANCELLED)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(list, engine.submit(work, threading.Event()))
        assert begun.wait(SOON)
        engine.close()
        assert asked.result(SOON) == [CANCELLED]


def test_the_callers_event_is_only_read(engine: EngineThread) -> None:
    """One for a whole app: what goes wrong or is left elsewhere is no reason to stop."""
    stop = threading.Event()

    def fail(job: Job) -> None:
        raise ImageError("no picture")

    with pytest.raises(ImageError):
        next(engine.submit(fail, stop))
    left: list[bool] = []
    ended = threading.Event()

    def endless(job: Job) -> None:
        job.output.put(Chunk("a", 1, None, None, ()))
        left.append(ended.wait(0) or wait_for(job.cancel))
        ended.set()

    stream = engine.submit(endless, stop)
    next(stream)
    stream.close()
    assert ended.wait(SOON)
    assert left == [True]
    assert not stop.is_set()
    seen: list[bool] = []
    list(engine.submit(lambda job: seen.append(job.cancel.is_set()), stop))
    assert seen == [False]


def wait_for(event: threading.Event) -> bool:
    timer = threading.Event()
    for _ in range(int(SOON / 0.01)):
        if event.is_set():
            return True
        timer.wait(0.01)
    return False


def test_who_is_cancelled_while_waiting_waits_no_longer(engine: EngineThread, busy: Callable[[], None]) -> None:
    stop = threading.Event()
    ran: list[Job] = []
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(list, engine.submit(ran.append, stop, lambda: CANCELLED))
        stop.set()
        assert asked.result(SOON) == [CANCELLED]
    both = engine.submit_many(ran.extend, stop, 2, lambda: CANCELLED)
    assert [list(stream) for stream in both] == [[CANCELLED]] * 2
    busy()
    assert list(engine.submit(finish, threading.Event())) == [LAST]
    assert ran == []


FORKED = """
import os, threading, warnings
from llava_edge.errors import UsageError
from llava_edge.runtimes.jobs import EngineThread
warnings.simplefilter("ignore")
engine, free, begun = EngineThread(lambda: None), threading.Event(), threading.Event()
def work(job):
    begun.set()
    free.wait(30)
stream = engine.submit(work, threading.Event())
threading.Thread(target=lambda: list(stream), daemon=True).start()
begun.wait(30)
waiting = engine.submit_many(lambda jobs: None, threading.Event(), 1, lambda: None)[0]
other = threading.Thread(target=engine._lock.acquire)  # it is in the middle of something, for ever in the child
other.start()
other.join()
if os.fork() == 0:
    refused = 0
    for asked in (waiting, engine.submit(work, threading.Event())):
        try:
            next(asked)
        except UsageError as error:
            refused += "forked" in str(error)
    engine.close()
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_forked_process_has_no_engine() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "2\n", done.stderr


def test_streams_that_nobody_reads_stop_the_job(engine: EngineThread) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def work(jobs: list[Job]) -> None:
        begun.set()
        if wait_for(jobs[0].cancel):
            stopped.set()

    streams = engine.submit_many(work, threading.Event(), 2, lambda: CANCELLED)
    assert begun.wait(SOON)
    del streams
    assert stopped.wait(SOON)


def test_a_stream_that_was_read_to_its_last_chunk_stops_nothing(engine: EngineThread) -> None:
    """The turn of a chat is kept behind it."""
    kept: list[bool] = []

    def work(job: Job) -> None:
        finish(job)
        kept.append(job.cancel.is_set())

    stream = engine.submit(work, threading.Event())
    assert next(stream) == LAST
    stream.close()
    assert list(stream) == []
    list(engine.submit(finish, threading.Event()))
    assert kept == [False]


@pytest.mark.parametrize("end", [LAST, UsageError("It fails.")])
def test_a_stream_read_by_several_threads_ends_for_all(engine: EngineThread, end: Chunk | UsageError) -> None:
    reading, ended = threading.Barrier(4), queue.SimpleQueue[object]()

    def work(job: Job) -> None:
        reading.wait(SOON)
        time.sleep(0.1)  # the others get on to waiting for it
        job.output.put(end)

    def read() -> None:
        reading.wait(SOON)
        try:
            ended.put(list(stream))
        except UsageError as error:
            ended.put(error)

    stream = engine.start(work)
    for _ in range(3):
        threading.Thread(target=read, daemon=True).start()
    found = [ended.get(timeout=SOON) for _ in range(3)]
    assert found.count([]) == 2
    assert ([LAST] if end is LAST else end) in found


def test_closing_a_stream_that_another_thread_reads_stops_the_job(engine: EngineThread) -> None:
    """Whatever the reader does before the one who closes it goes on."""

    class Handed(queue.SimpleQueue[Chunk | BaseException | None]):
        def put(self, *arguments: Any, **named: Any) -> None:
            super().put(*arguments, **named)
            time.sleep(0.2)

    stopped = threading.Event()

    def work(job: Job) -> None:
        if wait_for(job.cancel):
            stopped.set()

    stream = engine.start(work)
    stream._job.output = Handed()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, stream)
        time.sleep(0.1)
        stream.close()
        assert reading.result(SOON) == []
    assert stopped.wait(SOON)


def test_a_job_that_is_left_while_it_is_queued_never_runs(engine: EngineThread, busy: Callable[[], None]) -> None:
    """It would prepare its pictures, for nobody, while others wait."""
    ran = list[int]()
    (stream,) = engine.submit_many(lambda jobs: ran.append(len(jobs)), threading.Event(), 1, lambda: CANCELLED)
    stream.close()
    busy()
    engine.run(lambda job: None)
    assert not ran


def test_an_unread_stream_does_nothing(engine: EngineThread) -> None:
    ran: list[Job] = []
    engine.submit(ran.append, threading.Event()).close()
    list(engine.submit(finish, threading.Event()))
    assert ran == []


def test_a_worker_leaves_out_what_nobody_waits_for_and_ends_what_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would not wait for the latter would change what is being computed with."""
    worker, cancel, ran = Worker("one"), threading.Event(), list[str]()
    begun, free = threading.Event(), threading.Event()

    def first() -> bool:
        begun.set()
        return free.wait(SOON)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: wait_result(worker.submit(first), cancel))
        assert begun.wait(SOON)
        cancel.set()
        with pytest.raises(CancelledError):
            wait_result(worker.submit(ran.append, "cancelled"), cancel)
        with monkeypatch.context() as patch:
            patch.setattr("llava_edge.runtimes.worker.wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                wait_result(worker.submit(ran.append, "interrupted"), threading.Event())
        time.sleep(3 * POLL_SECONDS)
        free.set()
        assert running.result(SOON)
    worker.shutdown()
    assert ran == []


def test_a_worker_ends_when_it_is_shut_down_or_forgotten() -> None:
    one, other = Worker("one"), Worker("other")
    threads = [worker.submit(threading.current_thread).result(SOON) for worker in (one, other)]
    failing = one.submit(int, "none")
    one.shutdown()
    one.shutdown()
    assert isinstance(failing.exception(SOON), ValueError)
    with pytest.raises(RuntimeError, match="ended"):
        one.submit(int)
    del other
    assert not any(thread.is_alive() for thread in threads)


def joined(
    engine: EngineThread, taken: list[Job], begun: threading.Event, go: threading.Event
) -> Callable[[Job], None]:
    """What a job does that takes those that are queued when `go` is set."""

    def run(job: Job) -> None:
        begun.set()
        assert go.wait(SOON)
        while (other := engine.take()) is not None:
            assert other.claim.start()
            taken.append(other)
            finish(other)
            other.end()
        finish(job)

    return run


def test_a_job_takes_those_after_it_that_may_be_joined(engine: EngineThread) -> None:
    """Neither one that may not, nor what comes after that; nor one that nobody waits for any more."""
    taken: list[Job] = []
    begun, go, stop, never = (threading.Event() for _ in range(4))
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(list, engine.submit(joined(engine, taken, begun, go), never))
        assert begun.wait(SOON)
        cancelled = pool.submit(list, engine.submit(finish, stop, lambda: CANCELLED, id))
        wait_until(lambda: engine._jobs.qsize() == 1)
        stop.set()
        assert cancelled.result(SOON) == [CANCELLED]
        others = []
        for count, join in enumerate((id, id, None, id), 2):
            others.append(pool.submit(list, engine.submit(finish, never, join=join)))
            wait_until(lambda count=count: engine._jobs.qsize() == count)  # type: ignore[misc]
        go.set()
        assert first.result(SOON) == [LAST]
        assert [other.result(SOON) for other in others] == [[LAST]] * 4
    assert len(taken) == 2


def test_a_job_that_another_has_looked_at_can_still_be_cancelled(engine: EngineThread) -> None:
    """And then hides no longer what comes after it."""
    begun, go, looked, stop, never = (threading.Event() for _ in range(5))
    taken: list[Job | None] = []

    def look(job: Job) -> None:
        begun.set()
        assert go.wait(SOON)
        taken.append(engine.take())
        looked.set()
        assert stop.wait(SOON)
        while (other := engine.take()) is None:
            time.sleep(0.01)
        other.output.put(LAST)
        other.end()
        finish(job)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(list, engine.submit(look, never))
        assert begun.wait(SOON)
        second = pool.submit(list, engine.submit(finish, stop, lambda: CANCELLED))
        wait_until(lambda: engine._jobs.qsize() == 1)
        third = pool.submit(list, engine.submit(finish, never, join=id))
        wait_until(lambda: engine._jobs.qsize() == 2)
        go.set()
        assert looked.wait(SOON)
        stop.set()
        assert [each.result(SOON) for each in (second, third, first)] == [[CANCELLED], [LAST], [LAST]]
    assert taken == [None]


def test_streams_of_one_job_may_be_collected_while_it_is_being_cancelled(
    engine: EngineThread, busy: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A garbage collection happens anywhere, as in this lock of an event."""

    class Cycle:
        def __init__(self, stream: jobs.Stream) -> None:
            self.stream, self.itself = stream, self

    def close() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "notify_all", lambda _: gc.collect())
            streams[0].close()
        closed.put(True)

    streams = engine.submit_many(lambda jobs: None, threading.Event(), 2, lambda: CANCELLED)
    Cycle(streams.pop())
    closed: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=close, daemon=True).start()
    assert closed.get(timeout=SOON)


def test_a_failing_job_fails_those_it_has_taken(engine: EngineThread) -> None:
    begun, go, never = threading.Event(), threading.Event(), threading.Event()

    def fail(job: Job) -> None:
        begun.set()
        assert go.wait(SOON)
        assert engine.take()
        raise UsageError("It fails.")

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(list, engine.submit(fail, never))]
        assert begun.wait(SOON)
        asked.append(pool.submit(list, engine.submit(finish, never, join=id)))
        wait_until(lambda: not engine._jobs.empty())
        go.set()
        for one in asked:
            with pytest.raises(UsageError, match="It fails"):
                one.result(SOON)


def test_an_engine_closed_meanwhile_ends_although_a_job_looks_for_others(engine: EngineThread) -> None:
    """Looking finds the end of the queue, which stays there."""
    begun, found = threading.Event(), list[object]()

    def look(job: Job) -> None:
        begun.set()
        assert wait_for(job.cancel)
        found.extend((engine.take(), engine.take()))
        job.output.put(CANCELLED)

    stream = engine.start(look)
    assert begun.wait(SOON)
    engine.close()
    assert list(stream) == [CANCELLED]
    assert found == [None, None]


def test_a_job_that_waits_for_another_to_take_it_is_told_of_closing(engine: EngineThread) -> None:
    """It raises, rather than being an empty answer that was cancelled."""
    begun, found = threading.Event(), list[object]()

    def look(job: Job) -> None:
        begun.set()
        assert wait_for(job.cancel)
        found.append(engine.take())

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(list, engine.submit(look, threading.Event()))]
        assert begun.wait(SOON)
        asked.append(pool.submit(list, engine.submit(finish, threading.Event(), join=id)))
        wait_until(lambda: not engine._jobs.empty())
        engine.close()
        assert asked[0].result(SOON) == []
        with pytest.raises(UsageError, match="closed"):
            asked[1].result(SOON)
    assert found == [None]


def test_a_job_that_another_has_taken_but_not_started_is_told_of_closing(engine: EngineThread) -> None:
    """As one that waits for room beside another: its caller has cancelled nothing."""
    begun, taken = threading.Event(), list[Job]()

    def look(job: Job) -> None:
        begun.set()
        while not taken:
            taken.extend(other for other in [engine.take()] if other)
        assert wait_for(job.cancel)
        assert not taken[0].claim.start()

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(list, engine.submit(look, threading.Event(), lambda: CANCELLED))]
        assert begun.wait(SOON)
        asked.append(pool.submit(list, engine.submit(finish, threading.Event(), lambda: CANCELLED, join=id)))
        wait_until(lambda: bool(taken))
        engine.close()
        assert asked[0].result(SOON) == []
        with pytest.raises(UsageError, match="closed"):
            asked[1].result(SOON)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(int(SOON / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")
