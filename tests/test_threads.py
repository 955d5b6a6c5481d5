"""runtimes/threads.py: fewer threads beside busy programs, all of them in a quiet machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llava_edge.bundle import LANGUAGE
from llava_edge.runtimes import machine, threads
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.machine import ExternalLoad
from llava_edge.runtimes.threads import MAX_BACKOFF, AdaptiveThreads, PassThreads

QUIET, BUSY = (0.0, 1.5), (0.6, 0.0)  # processors' worth of waiting, and of idleness, during a window


def decided(most: int, windows: Sequence[tuple[float, float]]) -> list[int]:
    """The number of threads after each of these windows."""
    threads, seen = AdaptiveThreads(most), []
    for waited, idle in windows:
        threads._adjust(waited, idle)
        seen.append(threads.count)
    return seen


def test_each_crowded_window_takes_a_thread_away_but_the_last() -> None:
    assert decided(4, [BUSY] * 5) == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(("elapsed", "others", "expected"), [(0.3, 0.9, 3), (0.3, 0.6, 4), (0.3, 9, 1), (0.05, 9, 4)])
def test_it_begins_with_what_others_leave(
    elapsed: float, others: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExternalLoad, "elapsed", lambda self: elapsed)
    monkeypatch.setattr(ExternalLoad, "processors", lambda self: others)
    threads = AdaptiveThreads(4)
    assert [threads.next(), threads.next()] == [expected] * 2


def test_a_process_that_may_use_fewer_processors_than_before_gets_no_more_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands of them ended it: what others had taken of the processors that are left is less."""
    taken = iter((5000.0, 2500.0))
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: next(taken))
    monkeypatch.setattr(ExternalLoad, "elapsed", lambda self: 0.3)
    assert AdaptiveThreads(4).next() == 4


def test_texts_of_small_models_are_left_to_threads_that_do_not_wait(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(language.library, "llama_set_n_threads", lambda context, one, many: used.append(many))
    chosen = PassThreads(5, vary=True, all_ours=False)
    monkeypatch.setattr(language, "_threads", chosen)
    monkeypatch.setattr(chosen._adaptive, "next", lambda: 3)
    never = threading.Event()
    language.truncate(0)
    language.evaluate_tokens([5] * 20, never)
    monkeypatch.setattr(threads, "SMALL_PRODUCT", 20 * language.hidden_size**2)
    language.evaluate_tokens([5] * 20, never)
    language.evaluate_tokens([5], never)
    language.evaluate_embeddings(np.zeros((19, language.hidden_size), np.float32), [("", i) for i in range(19)], never)
    language.truncate(0)
    assert used == [3, 5, 3, 3]


def test_all_threads_compute_while_nobody_waits() -> None:
    assert decided(4, [QUIET, (0.1, 0.0), QUIET]) == [4, 4, 4]


def test_a_thread_comes_back_when_a_processor_is_idle() -> None:
    assert decided(2, [BUSY, QUIET, QUIET])[-1] == 2


def test_calm_is_counted_anew_after_crowding() -> None:
    assert decided(3, [BUSY, QUIET, BUSY, *[QUIET] * 4])[-2:] == [1, 2]


def test_no_thread_comes_back_while_no_processor_is_idle() -> None:
    assert decided(2, [BUSY, *[(0.0, 0.1)] * 200])[-1] == 1


def test_a_thread_that_never_works_out_is_tried_ever_more_seldom() -> None:
    threads, tried = AdaptiveThreads(2), []
    for window in range(400):
        before = threads.count
        threads._adjust(*(BUSY if threads.count == 2 else QUIET))  # idle again as soon as one computes alone
        if threads.count > before:
            tried.append(window)
    gaps = [after - before for before, after in pairwise(tried)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == MAX_BACKOFF + 1


def test_after_calm_times_a_thread_comes_back_soon() -> None:
    windows = [*[BUSY, *[QUIET] * MAX_BACKOFF] * 8, *[QUIET] * 3 * MAX_BACKOFF, BUSY, QUIET, QUIET]
    assert decided(2, windows)[-1] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long threads waited")
def test_waiting_and_idleness_are_linuxs_numbers() -> None:
    own = os.sched_getaffinity(0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        one = {min(own)}
        os.sched_setaffinity(busy.pid, one)
        os.sched_setaffinity(0, one)  # this thread alone, beside the busy program
        threads = AdaptiveThreads(2)
        before, end = threads._read_counters(), time.monotonic() + 1
        while time.monotonic() < end:
            pass
        after = threads._read_counters()
    finally:
        os.sched_setaffinity(0, own)
        busy.kill()
        busy.wait()
    if before is None or after is None:
        pytest.skip("this kernel does not count how long threads waited")
    passed, waited, idle = (b - a for a, b in zip(before, after, strict=True))
    assert passed == pytest.approx(1, abs=0.5)
    assert waited > 0.15
    assert idle < 0.3


def test_where_nothing_is_told_the_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptiveThreads, "_read_counters", lambda self: None)
    threads = AdaptiveThreads(3)
    assert [threads.next() for _ in range(3)] == [3, 3, 3]


def test_only_whole_windows_of_tokens_count(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the time before a picture or a text, which threads of our own read that wait for each other."""
    now, used, never = [0.0], list[int](), threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(AdaptiveThreads, "_read_counters", lambda self: (now[0], 0.9 * now[0], 0.0))  # always crowded
    monkeypatch.setattr(language.library, "llama_set_n_threads", lambda context, one, many: used.append(many))
    monkeypatch.setattr(language, "_threads", PassThreads(5, vary=True, all_ours=False))
    monkeypatch.setattr(threads, "SMALL_PRODUCT", 20 * language.hidden_size**2)
    picture = np.zeros((1, language.hidden_size), np.float32)
    language.truncate(0)
    for seconds in (0.0, 0.05, 0.05, 0.05, 0.05):
        now[0] += seconds
        language.evaluate_tokens([5], never)
    now[0] += 5
    language.evaluate_embeddings(picture, [("", 0)], never)
    now[0] += 0.2
    language.evaluate_tokens([5], never)
    now[0] += 5
    language.evaluate_tokens([5] * 20, never)
    language.evaluate_tokens([5], never)
    now[0] += 0.2
    language.evaluate_tokens([5], never)
    language.truncate(0)
    assert used == [5, 5, 4, 4, 3, 3, 2, 5, 2, 1]


@pytest.mark.parametrize(
    ("vary", "all_ours", "others", "expected"),
    [
        (False, False, 9.0, [(4, 0), (4, 0), (4, 0)]),
        (True, False, 9.0, [(1, 1), (1, 1), (4, 4)]),
        (True, True, 0.0, [(1, 4), (4, 4), (4, 4)]),  # of norms, few are computed sooner by one thread
    ],
)
def test_which_passes_follow_the_load(
    vary: bool, all_ours: bool, others: float, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExternalLoad, "elapsed", lambda self: 0.3)
    monkeypatch.setattr(ExternalLoad, "processors", lambda self: others)
    monkeypatch.setattr(AdaptiveThreads, "_read_counters", lambda self: None)
    chosen = PassThreads(4, vary=vary, all_ours=all_ours)
    passes = ((2, threads.SMALL_ROWS // 2), (1, threads.SMALL_ROWS + 1), (1 << 12, threads.SMALL_ROWS))
    assert [chosen.choose(positions, width) for positions, width in passes] == expected


def test_what_other_programs_do_changes_no_bits(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own attention, which computes here, splits float16 keys by the number of threads."""
    monkeypatch.setattr(ExternalLoad, "elapsed", lambda self: 0.3)
    monkeypatch.setattr(ExternalLoad, "processors", lambda self: 9.0)
    used = list[tuple[int, int]]()
    with LanguageModel(micro_bundle / LANGUAGE, context=64, threads=4) as language:
        monkeypatch.setattr(language.library, "llama_set_n_threads", lambda _, one, many: used.append((one, many)))
        language.evaluate_tokens([5], threading.Event())
    assert used == [(4, 4)]
