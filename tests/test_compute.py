"""Several language models in one process: they take turns in one thread, and none waits for what it no longer wants."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import in_child

from llava_edge.bundle import LANGUAGE
from llava_edge.runtimes import CancelledError, compute, worker
from llava_edge.runtimes.language import LanguageModel

NEVER = threading.Event()
SOON = 30


def load(bundle: Path) -> LanguageModel:
    return LanguageModel(bundle / LANGUAGE, context=64, threads=2)


@pytest.fixture
def busy() -> Iterator[threading.Event]:
    """Another model computes until this is set."""
    begun, free = threading.Event(), threading.Event()
    kept = compute.shared_worker()
    kept.submit(begun.set)
    kept.submit(free.wait, SOON)
    assert begun.wait(SOON)
    yield free
    free.set()
    kept.submit(int).result(SOON)


def test_models_compute_in_one_thread(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of OpenMP's for each would let none of their threads spin: tokens then took up to four times as long."""
    with load(micro_bundle) as one, load(micro_bundle) as other:
        decode, seen = one.library.llama_decode, []

        def noted(*arguments: object) -> int:
            seen.append(threading.current_thread().name)
            status: int = decode(*arguments)
            return status

        monkeypatch.setattr(one.library, "llama_decode", noted)
        for tokens in ([5, 6], [7]):
            one.evaluate_tokens(tokens, NEVER)
            other.evaluate_tokens(tokens, NEVER)
        assert np.array_equal(one.logits(), other.logits())
    assert seen == ["llama.cpp"] * 4
    assert len({one._thread, other._thread}) == 1


def test_cancelling_does_not_wait_for_another_model(micro_bundle: Path, busy: threading.Event) -> None:
    cancel, ended = threading.Event(), []

    def ask(language: LanguageModel) -> None:
        try:
            language.evaluate_tokens([5, 6, 7], cancel)
        except CancelledError:
            ended.append("cancelled")

    with load(micro_bundle) as language:
        asking = threading.Thread(target=ask, args=(language,))
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()
        cancel.set()
        asking.join(SOON)
        assert ended == ["cancelled"]
        assert language.cached_keys == []
        busy.set()
        language.evaluate_tokens([5], NEVER)
        assert language.cached_keys == [5]


def test_closing_does_not_wait_for_another_model(micro_bundle: Path, busy: threading.Event) -> None:
    language = load(micro_bundle)
    closing = threading.Thread(target=language.close)
    closing.start()
    closing.join(SOON / 2)
    assert not closing.is_alive()
    assert not busy.is_set()


def test_a_model_is_not_freed_while_it_computes(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C has left the call."""
    language, begun, free = load(micro_bundle), threading.Event(), threading.Event()
    decode = language.library.llama_decode

    def slowly(*arguments: object) -> int:
        begun.set()
        free.wait(SOON)
        status: int = decode(*arguments)
        return status

    def interrupted(*_: object) -> None:
        begun.wait(SOON)
        raise KeyboardInterrupt

    monkeypatch.setattr(language.library, "llama_decode", slowly)
    monkeypatch.setattr(worker, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        language.evaluate_tokens([5], NEVER)
    closing = threading.Thread(target=language.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    free.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert language.context is None


def test_a_model_may_be_closed_in_the_thread_it_computes_in(micro_bundle: Path) -> None:
    """Where a collection closes one that somebody left in the middle of a `with`."""
    language = load(micro_bundle)
    language.evaluate_tokens([5], NEVER)
    assert language._thread is not None
    language._thread.submit(language.close).result(SOON)
    assert language.context is None


FORKED = """
import os, signal, sys, threading, warnings
from pathlib import Path
from llava_edge.runtimes.language import LanguageModel
warnings.simplefilter("ignore")

def load():
    return LanguageModel(Path(sys.argv[1]), context=64, threads=1)

language = load()
language.evaluate_tokens([5], threading.Event())
if os.fork() == 0:
    signal.alarm(30)  # seconds until it ends, if it hangs
    fresh = load()  # while the other one is still there, whose thread is not
    language.close()
    fresh.evaluate_tokens([5, 6], threading.Event())
    os._exit(len(fresh.cached_keys))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_forked_process_computes_in_a_thread_of_its_own(micro_bundle: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(micro_bundle / LANGUAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "2\n", done.stderr


MEANWHILE = """
import os, signal, sys, threading, warnings
from llava_edge import EngineOptions, Llava, Options
from llava_edge.image import PILLOW_LOCK
from llava_edge.runtimes import bindings, compute, stderr_capture
from PIL import Image
warnings.simplefilter("ignore")
locks = [PILLOW_LOCK, bindings._lock, compute._lock, stderr_capture._lock]
for lock in locks:
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
if os.fork() == 0:
    signal.alarm(30)  # seconds until it ends, if it hangs
    with Llava.load(sys.argv[1], EngineOptions(threads=1, cache=False), device="cpu") as llava:
        llava.ask("hi", Image.new("RGB", (8, 8)), Options(max_tokens=1, grammar='root ::= "a"+'))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_process_forked_while_others_are_at_work_can_load_a_model(micro_bundle: Path) -> None:
    """Whatever lock they have at that moment."""
    assert in_child(MEANWHILE, micro_bundle).stdout == "0\n"


def test_the_thread_ends_with_the_last_model_that_has_it(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_current", None)  # which other tests may have
    one, other = load(micro_bundle), load(micro_bundle)
    thread = compute.shared_worker().submit(threading.current_thread).result(SOON)
    one.close()
    assert thread.is_alive()
    other.close()
    assert not thread.is_alive()
    assert compute.shared_worker().submit(threading.current_thread).result(SOON) is not thread
