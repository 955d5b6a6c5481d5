"""`llava-edge bench`: real numbers of a tiny bundle, work counted like PyTorch counts it, ratios, files, clean ends."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import largest_file

from llava_edge import cli
from llava_edge.bench import child, records, runner
from llava_edge.bench.compare import compare, condition_differences, stages
from llava_edge.bench.messages import Answer, Failure, Sample, Task
from llava_edge.bench.page import page
from llava_edge.bench.picture import marked_copy
from llava_edge.bench.records import (
    ENCODE,
    FIRST,
    PARTS,
    PREPROCESS,
    PROJECT,
    QUESTIONS,
    SCHEMA,
    TOTAL,
    WARM,
    Configuration,
    Report,
    Run,
    read_report,
)
from llava_edge.bench.runner import MeasurementError, Plan, measure, summarize_run
from llava_edge.bench.table import comparison, table, to_csv
from llava_edge.bench.work import Work, bundle_work, initializers
from llava_edge.bundle import LANGUAGE, VISION, Bundle, Preprocessing
from llava_edge.errors import DataError, LlavaEdgeError, MissingError
from llava_edge.image import load_image, preprocess
from llava_edge.models.config import CLIP_MEAN, CLIP_STD
from llava_edge.models.micro import CONFIG
from llava_edge.options import CacheHit, Memory, PresetName, Result, Timings
from llava_edge.runtimes import native, roofline
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.native.choice import Status
from llava_edge.runtimes.roofline import Roofline

ROOT = Path(__file__).parent.parent
TOO_LONG = 100_000  # positions; the micro model was trained for 512
NEEDED = Work(4e9, 2e7, 1_000_000, 2, 64, 1000, 5_000_000, 32)
PEAKS = {"1": {"int8_ops": 8e9, "fp32_ops": 4e9, "read_bytes": 1e9}}
SETTINGS = Configuration("m", "0" * 64, "q4_k_m", "int8", "auto", 1, 0)


@pytest.fixture(scope="module")
def report(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """The micro bundle really measured, once as it is and once in a way that cannot work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_EDGE_HOME", str(tmp_path_factory.mktemp("home")))
        plan = Plan([micro_bundle], (1,), (0, TOO_LONG), device="cpu", prompt="hi", max_tokens=6, repeats=1, warmup=0)
        yield measure(replace(plan, limits=False))


def sample(milliseconds: float, cache: CacheHit = "miss", **other: Any) -> Sample:
    """What a child finds when every stage takes `milliseconds`. other: fields of all its results."""
    ms, memory = milliseconds, Memory(300, 200, 100)
    timings = Timings(ms, 2 * ms, 2 * ms, ms, 6 * ms, 3 * ms, 1000 / ms, 9 * ms, image_ms=ms, project_ms=ms)
    answer = Answer(replace(Result("", "length", "m", "cpu", 10, 20, 4, cache, timings, memory), **other), text_known=3)
    return Sample(ms, ms, 8 * ms, "cpu", 1, 40, False, True, "f16", dict.fromkeys(QUESTIONS, answer), memory)


def make_report(*milliseconds: float, peaks: dict[str, dict[str, float]] | None = None, **other: Any) -> Report:
    """A report of one configuration with these samples."""
    run = summarize_run(replace(SETTINGS, **other), NEEDED, [sample(value) for value in milliseconds], peaks or {})
    machine = {"processor": "P", "features": ["f"], "system": "s"}
    settings = {"repeats": len(milliseconds), "image": "drawn", "prompt": "<b>&"}
    return Report(SCHEMA, "2026-01-01", machine, {"llava-edge": "0"}, settings, {**(peaks or {})}, (run,))


# What is measured.


def test_stages_of_a_real_bundle_fit_into_their_whole(report: Report) -> None:
    run = report.runs[0]
    assert not run.error
    assert set(run.questions) == set(QUESTIONS)
    found = {"first": "miss", "warm": "miss", "again": "kv", "known": "kv"}
    for name, asked in run.questions.items():
        medians = {name: stage.median for name, stage in asked.stages.items()}
        assert medians["first_token"] <= medians["total"]
        assert asked.image_tokens == CONFIG.image_tokens < asked.prompt_tokens
        assert asked.cache == (found[name],)
        computed = {part for part in PARTS if medians[part] > 0}
        spared = {"first": set(), "warm": set(), "again": {PREPROCESS, ENCODE, PROJECT}, "known": {ENCODE, PROJECT}}
        assert computed == set(PARTS) - spared[name]
    warm = {name: stage.median for name, stage in run.questions[WARM].stages.items()}
    assert sum(warm[name] for name in PARTS) <= warm["first_token"] + 0.01
    cold, process = run.questions["first"].stages["first_token"].median, run.process
    assert process["start"].median > 0 < process["load"].median
    assert process["cold_first_token"].median >= process["start"].median + process["load"].median + cold
    assert run.memory["peak_rss"] > run.memory["private"] > 0 < run.memory["file"]


def test_presets_and_fewer_positions_reach_the_process_that_measures(micro_bundle: Path) -> None:
    presets: Any = ("memory", "none")
    plan = Plan([micro_bundle], (1,), budgets=(4,), presets=presets, device="cpu", prompt="hi", max_tokens=2, repeats=1)
    found = measure(replace(plan, warmup=0, limits=False))
    memory, none = found.runs
    assert {asked.image_tokens for asked in memory.questions.values()} == {4} != {CONFIG.image_tokens}
    assert "4 image tokens, preset memory" in memory.configuration.label
    assert "preset is 'none'" in none.error
    assert {(row["budget"], row["preset"]) for row in csv.DictReader(to_csv(found).splitlines())} == {("4", "memory")}


def test_bundles_of_one_name_are_told_apart(micro_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(micro_bundle, tmp_path / "copy")
    alone = runner.configurations(Plan([copy, copy], presets=("auto", "auto")))
    assert [configuration.model for configuration, _ in alone] == ["micro"]
    both = runner.configurations(Plan([micro_bundle, copy]))
    assert [configuration.model for configuration, _ in both] == [str(micro_bundle), str(copy)]


def test_a_broken_configuration_is_reported_and_the_others_go_on(report: Report) -> None:
    good, bad = report.runs
    assert not good.error
    assert f"A context of {TOO_LONG}" in bad.error
    assert not bad.questions
    assert f"FAILED. {bad.error}" in table(report)


def test_a_child_that_dies_of_a_signal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -ILL $$\n", "utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MeasurementError, match="killed by SIGILL") as caught:
        runner._run_child(Roofline, "limits", "1")
    assert caught.value.exit_code == 69


def test_pictures_of_two_numbers_differ_in_pixels_only(tmp_path: Path) -> None:
    for suffix in ("PNG", "JPEG"):
        path = tmp_path / suffix
        Image.new("RGB", (90, 60), "red").save(path, suffix)
        first, again, other = (Image.open(io.BytesIO(marked_copy(path, number))) for number in (0, 0, 1))
        assert first.format == suffix
        assert first.size == other.size == (90, 60)
        assert first.tobytes() == again.tobytes() != other.tobytes()
    image_size = CONFIG.vision.image_size
    wide = tmp_path / "wide.png"
    Image.new("RGB", (300, 60), "red").save(wide)
    for square in ("crop", "pad"):
        spec = Preprocessing(image_size, CLIP_MEAN, CLIP_STD, square)
        shown = [preprocess(load_image(marked_copy(wide, number)), spec).tobytes() for number in range(3)]
        assert len(set(shown)) == 3
    drawn = [np.asarray(Image.open(io.BytesIO(marked_copy(None, number)))) for number in range(3)]
    assert len({picture.tobytes() for picture in drawn}) == 3


# Work and limits.


def test_operations_are_those_that_pytorch_counts(micro_checkpoint: Path, micro_bundle: Path) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from llava_edge.export.checkpoint import open_checkpoint
    from llava_edge.models.llava import from_state

    checkpoint = open_checkpoint(micro_checkpoint)
    model = from_state(checkpoint.config, checkpoint.tensors)
    side, width, positions = CONFIG.vision.image_size, CONFIG.text.hidden_size, 8

    def counted(call: Any) -> int:
        # The counter does not know the fused attention of CPUs.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call()
        return int(counter.get_total_flops())

    needed = bundle_work(Bundle.open(micro_bundle))
    features = torch.zeros(1, CONFIG.image_tokens, CONFIG.vision.hidden_size)
    pixels = torch.zeros(1, 3, side, side)
    assert needed.encode_ops == counted(lambda: model.vision_tower.vision_model(pixels))
    assert needed.project_ops * CONFIG.image_tokens == counted(lambda: model.multi_modal_projector(features))
    # PyTorch multiplies the half of the scores that is masked too, and logits of every position.
    attention = 2 * positions**2 * width * CONFIG.text.num_hidden_layers
    logits = 2 * width * CONFIG.text.vocab_size * (positions - 1)
    embeddings = torch.zeros(1, positions, width)
    language = model.language_model
    theirs = counted(lambda: language.logits(language.hidden(embeddings)[0]))
    assert needed.prefill_ops(positions) == pytest.approx(theirs - attention - logits, rel=1e-6)
    known = positions - 1
    theirs -= counted(lambda: language.logits(language.hidden(embeddings[:, 1:])[0]))
    attention -= 2 * known**2 * width * CONFIG.text.num_hidden_layers
    assert needed.prefill_ops(positions, known) == pytest.approx(theirs - attention, rel=1e-6)


@pytest.mark.parametrize("preset", ["latency", "memory"])
def test_what_is_counted_as_known_is_not_evaluated(
    preset: PresetName, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counting(real: Any) -> Any:
        def evaluate(self: LanguageModel, rows: Any, *rest: Any) -> None:
            evaluated.append(len(rows))
            real(self, rows, *rest)

        return evaluate

    for name in ("evaluate_tokens", "evaluate_embeddings"):
        monkeypatch.setattr(LanguageModel, name, counting(getattr(LanguageModel, name)))
    pictures = {}
    for number, question in enumerate((FIRST, WARM)):
        path = tmp_path / f"{question}.jpg"
        path.write_bytes(marked_copy(None, number))
        pictures[question] = str(path)
    cache = str(tmp_path / "cache")
    found = child.measure_answers(Task(str(micro_bundle), cache, 1, 0, "cpu", preset, "hi", 1, 0, pictures))
    first, warm = (found.answers[name] for name in (FIRST, WARM))
    assert first.text_known == 0 < warm.text_known
    assert sum(evaluated) == 2 * warm.result.prompt_tokens - warm.text_known
    assert found.kv == ("q8_0" if preset == "memory" else "f16")


def test_bytes_of_a_token_are_those_of_the_file(micro_bundle: Path) -> None:
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(micro_bundle / LANGUAGE).tensors}
    needed = bundle_work(Bundle.open(micro_bundle))
    assert "output.weight" in tensors
    assert needed.token_bytes(0) == sum(tensors.values()) - tensors["token_embd.weight"]
    text = CONFIG.text
    one_more = needed.token_bytes(11) - needed.token_bytes(10)
    assert one_more == 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // 4)


def test_constants_are_read_as_onnx_reads_them(micro_bundle: Path) -> None:
    import onnx

    graph = onnx.load(micro_bundle / VISION, load_external_data=False).graph
    assert initializers(micro_bundle / VISION) == {item.name: tuple(item.dims) for item in graph.initializer}


def test_a_damaged_graph_is_no_crash(micro_bundle: Path, tmp_path: Path) -> None:
    data = (micro_bundle / VISION).read_bytes()
    for end in range(1, len(data), 997):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(LlavaEdgeError, match="not an ONNX file"):
            initializers(tmp_path / "cut")


def test_limits_are_measured_with_products_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SHAPE", (6, 32, 200))
    monkeypatch.setattr(roofline, "SECONDS", 0.001)
    monkeypatch.setattr(roofline, "MAX_BYTES", 1 << 20)
    numbers = np.random.default_rng(0)
    weights = numbers.integers(-127, 128, (32, 200), np.int8)
    rows = numbers.integers(0, roofline.MAX_UINT8 + 1, (6, 32), np.uint8)
    session = roofline._session("MatMulInteger", roofline._UINT8, roofline._INT8, roofline._INT32, weights, 1)
    assert np.array_equal(session.run(None, {"a": rows})[0], rows.astype(np.int32) @ weights.astype(np.int32))
    assert roofline._native_int8_rate(1) == 0  # none is built in the tests' home
    found = roofline.measure(1)
    assert min(asdict(found).values()) > 0
    monkeypatch.setattr(roofline, "_native_int8_rate", lambda threads: 1e15)
    assert roofline.measure(1).int8_ops == 1e15


def test_a_share_is_work_by_time_and_limit() -> None:
    asked = make_report(1000, 3000, 2000, peaks=PEAKS).runs[0].questions[WARM].stages
    assert asked["encode"].median == 2000
    assert asked["encode"].share == pytest.approx(4e9 / 2 / 8e9)
    assert asked["project"].share == pytest.approx(2e7 * 40 / 2 / 4e9)
    assert asked["prefill"].share == pytest.approx(NEEDED.prefill_ops(20, 3) / 2 / 8e9)
    assert asked["decode"].share == pytest.approx(NEEDED.token_bytes(22) / 2 / 1e9)
    assert asked["image"].share is None
    ours = summarize_run(SETTINGS, NEEDED, [replace(sample(2000), integer_projector=True)], PEAKS).questions[WARM]
    assert ours.stages["project"].limit == "int8_ops"
    small = summarize_run(SETTINGS, NEEDED, [replace(sample(2000), kv="q8_0")], PEAKS).questions[WARM].stages["decode"]
    keys = NEEDED.token_bytes(22) - NEEDED.token_bytes(0)
    assert small.share == pytest.approx((NEEDED.token_bytes(0) + keys * 34 / 64) / 2 / 1e9)


def test_accepted_tokens_take_no_pass_of_their_own() -> None:
    drafted = sample(2000, accepted_tokens=2)
    stage = summarize_run(SETTINGS, NEEDED, [drafted], PEAKS).questions[WARM].stages["decode"]
    assert stage.share == pytest.approx(NEEDED.token_bytes(22) / 3 / 2 / 1e9)
    drafted = sample(2000, accepted_tokens=2, finish_reason="stop")  # by a fourth token after the first
    stage = summarize_run(SETTINGS, NEEDED, [drafted], PEAKS).questions[WARM].stages["decode"]
    assert stage.share == pytest.approx(NEEDED.token_bytes(22) / 2 / 2 / 1e9)


def test_float_parts_are_compared_with_the_float_limit() -> None:
    found = replace(sample(1000), integer_prefill=False)
    configuration = replace(SETTINGS, vision="fp16", quantization="f16")
    asked = summarize_run(configuration, NEEDED, [found], PEAKS).questions[WARM].stages
    assert (asked["encode"].limit, asked["prefill"].limit) == ("fp32_ops", "fp32_ops")
    assert asked["encode"].share == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "integers"), [("F16", True), ("Q4_K", False)])
def test_float16_weights_that_our_kernels_multiply_have_the_limit_of_integers(
    kind: str, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "activate", lambda: Status("", "", ((kind, "avx2", 32),)))
    assert child._has_f16_kernel() is integers
    found = replace(sample(1000), integer_prefill=child._has_f16_kernel())
    stage = (
        summarize_run(replace(SETTINGS, quantization="f16"), NEEDED, [found], PEAKS).questions[WARM].stages["prefill"]
    )
    assert stage.limit == ("int8_ops" if integers else "fp32_ops")


def test_what_a_cache_spared_has_no_share() -> None:
    run = summarize_run(SETTINGS, NEEDED, [sample(1, "miss"), sample(1, "kv")], PEAKS)
    asked = run.questions[WARM]
    assert asked.cache == ("miss", "kv")
    assert all(asked.stages[name].share is None for name in ("encode", "project", "prefill"))
    assert asked.stages["decode"].share is not None


def test_without_limits_or_on_another_device_there_are_no_shares() -> None:
    graphics = replace(sample(1), device="cuda")
    for run in (summarize_run(SETTINGS, NEEDED, [sample(1)], {}), summarize_run(SETTINGS, NEEDED, [graphics], PEAKS)):
        assert all(stage.share is None for _, stage in stages(run))


def test_limits_that_cannot_be_measured_are_said_to_be_missing(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little memory for them, say. Where one of several repeats has them, they are known."""
    broken = "Its process ran out of <memory>."
    seen: list[int] = []

    def run_child(kind: type[Any], *task: str) -> Any:
        if kind is not Roofline:
            return sample(1)
        seen.append(int(task[-1]))
        if seen[-1] == 1 or seen.count(2) == 1:
            raise MeasurementError(Failure(broken, 71))
        return Roofline(2, **PEAKS["1"])

    monkeypatch.setattr(runner, "_run_child", run_child)
    plan = Plan([micro_bundle], (1, 2), device="cpu", prompt="hi", max_tokens=2, repeats=2, warmup=0)
    found = measure(plan)
    assert (found.limits["1"], found.limits_errors) == (None, {"1": broken})
    assert found.limits["2"] == PEAKS["1"]
    assert f"limits with threads=1: not measured. {broken}" in table(found)
    assert "limits with threads=2: products" in table(found)
    assert "threads=1 were not measured. Its process ran out of &lt;memory&gt;." in page({"now": found})
    (tmp_path / "now.json").write_text(found.to_json(), "utf-8")
    assert read_report(tmp_path / "now.json") == found
    assert json.loads(found.to_json())["limits"]["1"] is None


# Ratios.


@pytest.mark.parametrize(
    ("old", "new", "ratio", "verdict"),
    [
        ((10, 20, 20, 30), (10, 20, 20, 30), 1.0, "no difference beyond the spread"),
        ((30, 40, 40, 50), (15, 20, 20, 25), 2.0, "faster"),
        ((15, 20, 20, 25), (30, 40, 40, 50), 0.5, "slower"),
        ((20, 40, 40, 50), (15, 20, 20, 25), 2.0, "no difference beyond the spread"),
        ((40,), (20,), 2.0, "too few repeats to tell: both sides need 4"),
        ((30, 40, 40, 50), (15, 20, 25), 2.0, "too few repeats to tell: both sides need 4"),
    ],
)
def test_ratios_are_of_medians_and_sure_only_beyond_the_spread(
    old: tuple[float, ...], new: tuple[float, ...], ratio: float, verdict: str
) -> None:
    ratios = compare(make_report(*old), make_report(*new))
    assert {(item.question, item.stage) for item in ratios} == {key for key, _ in stages(make_report(1).runs[0])}
    for item in ratios:
        assert item.ratio == pytest.approx(ratio)
        assert item.verdict == verdict
        assert [item.low, item.high] == pytest.approx([old[0] / new[-1], old[-1] / new[0]])
    assert f"{ratio:6.2f} x" in comparison(ratios, "old.json")


def test_answers_that_differ_in_length_are_no_faster_in_total() -> None:
    old, new = make_report(10, 11, 12, 13), make_report(5, 6, 7, 8)
    longer = {name: replace(question, completion_tokens=9) for name, question in old.runs[0].questions.items()}
    old = replace(old, runs=(replace(old.runs[0], questions=old.runs[0].questions | {WARM: longer[WARM]}),))
    compared = {(item.question, item.stage) for item in compare(old, new)}
    assert (WARM, TOTAL) not in compared
    assert {(FIRST, TOTAL), (WARM, "decode")} <= compared
    note = "tokens answered, m q4_k_m + int8, 1 thread, warm: 9 then, 4 now"
    assert condition_differences(old, new) == [note]
    assert note in page({"this run": new, "old.json": old})


def test_only_the_same_configuration_is_compared() -> None:
    assert compare(make_report(1), make_report(1, identity="1" * 64))
    other: dict[str, Any] = {"threads": 2, "context": 64, "image_tokens": 9, "model": "n"}
    other |= {"quantization": "q4_0", "vision": "fp32"}
    for name, value in other.items():
        assert not compare(make_report(1), make_report(1, **{name: value})), name
    assert "nothing to compare" in comparison([], "old.json")


# Files.


def test_json_comes_back_as_it_was(report: Report, tmp_path: Path) -> None:
    (tmp_path / "now.json").write_text("noise before\n" + report.to_json() + "\n", "utf-8")
    assert read_report(tmp_path / "now.json") == report
    raw = json.loads(report.to_json())
    assert raw["schema"] == records.SCHEMA
    assert set(raw["runs"][0]["questions"]["warm"]["stages"]) == {*PARTS, "first_token", "decode", "total"}
    assert raw["versions"].keys() >= {"llava-edge", "python", "llama-cpp-python", "onnxruntime"}
    assert raw["machine"]["processor"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "hello", "[]", "{}", "null", "[" * 100_000),
        f'{{"schema": {SCHEMA}}}',
        f'{{"schema": {SCHEMA}, "runs": [1]}}',
        json.dumps({**asdict(make_report(1)), "settings": ["hi"]}),
        make_report(1).to_json().replace('"median": 1', '"median": "fast"'),
        make_report(1).to_json().replace('"warm"', '"hot"'),
        make_report(1).to_json().replace('"first_token"', '"last_token"'),
        make_report(1, peaks=PEAKS).to_json().replace('"limit": "int8_ops"', '"limit": "int4_ops"'),
    ],
    ids=lambda text: text[:20],
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, "utf-8")
    with pytest.raises(DataError, match=r"does not end with the JSON line of 'llava-edge bench'; [^(]*$"):
        read_report(tmp_path / "x.json")


def test_another_schema_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**asdict(make_report(1)), "schema": 1}), "utf-8")
    with pytest.raises(DataError, match="schema 1"):
        read_report(tmp_path / "x.json")
    with pytest.raises(MissingError):
        read_report(tmp_path / "none.json")
    with pytest.raises(MissingError, match=r"cannot be read.*expected"):
        read_report(tmp_path)


def test_csv_has_every_number(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    known = dict(stages(report.runs[0]))
    assert len(rows) == len(known)
    for row in rows:
        stage = known[row["question"], row["stage"]]
        found = tuple(float(row[name]) for name in ("median_ms", "low_ms", "high_ms"))
        assert found == (stage.median, stage.low, stage.high)
        assert row["model"] == "micro"


class Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_stands_alone_and_has_the_numbers() -> None:
    new, old = make_report(11, 12, 13, peaks=PEAKS), make_report(24)
    text = page({"this run": new, "<old>.json": old})
    tags = Tags()
    tags.feed(text)
    names = [tag for tag, _ in tags.found]
    assert not {"script", "link", "img", "iframe", "object", "b"} & set(names)
    assert not any({"src", "href", "onload"} & set(attributes) for _, attributes in tags.found)
    assert not any(word in text for word in ("http", "@import", "url(", "<old>"))
    assert "prefers-color-scheme: dark" in text
    assert names.count("svg") == 3
    # Two runs: five parts and the rest, one token, private and file-backed memory.
    assert names.count("rect") == 2 * (len(PARTS) + 1 + 1 + 2)
    for _, found in stages(new.runs[0]):
        assert f">{found.median:.1f}<" in text
    assert ">2.00<" in text  # 24 / 12, times faster


def test_the_page_can_be_heard() -> None:
    text = page({"this run": make_report(10), "<old>.json": make_report(30)})
    tags = Tags()
    tags.feed(text)
    names = [str(attributes.get("aria-label")) for tag, attributes in tags.found if tag == "svg"]
    assert [name.partition(";")[0] for name in names] == re.findall(r"<h2>(.*)</h2>\n.*\n<svg", text)
    assert all(": " in bar for name in names for bar in name.split("; ")[1:])
    assert "; <old>.json: " in names[0]
    assert ", project 30.0, " in names[0]
    assert "<th></th>" not in text
    assert [tag for tag, _ in tags.found].count("main") == 1


def test_bars_are_as_long_as_their_numbers() -> None:
    tags = Tags()
    tags.feed(page({"new": make_report(10), "old": make_report(30)}))
    wide = [float(attributes["width"] or 0) for tag, attributes in tags.found if tag == "rect"]
    assert wide[len(PARTS) + 1] == pytest.approx(3 * wide[0], abs=0.2)


def test_long_labels_are_not_cut_off() -> None:
    tags = Tags()
    tags.feed(page({"long " * 15: make_report(10)}))
    texts = [attributes for tag, attributes in tags.found if tag == "text"]
    assert all("text-anchor" not in attributes and float(attributes["x"] or -1) >= 0 for attributes in texts)
    assert [attributes["x"] for attributes in texts[::2]] == ["0"] * 3  # room for 150 characters


def test_a_page_of_failures_says_why() -> None:
    failed = replace(make_report(1), runs=(Run(SETTINGS, "It <broke>."),))
    assert "It &lt;broke&gt;." in page({"this run": failed})


# The command.


def execute(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.execute(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_run_child", lambda *task: pytest.fail("a process was started"))


ONCE = ("--repeats", "1", "--warmup", "0", "--no-limits", "--threads", "1", "--prompt", "hi", "--max-tokens", "2")


def test_when_nothing_works_the_json_is_there_and_the_code_is_that_of_the_error(
    micro_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("--prompt", "where " * 600)
    code, out, err = execute(capsys, "--model", micro_bundle, *ONCE, *prompt)
    assert code == 2
    assert "positions" in json.loads(out.splitlines()[-1])["runs"][0]["error"]
    assert "Nothing could be measured. The prompt needs" in err


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("setting", [("--context", str(TOO_LONG)), ("--image-tokens", "9999")])
def test_what_the_model_refuses_is_said_as_run_says_it_before_anything_runs(
    setting: tuple[str, str], micro_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.execute(["run", "--model", str(micro_bundle), "--prompt", "hi", *setting]) == 2
    said = capsys.readouterr().err
    assert execute(capsys, "--model", micro_bundle, *setting) == (2, "", said)


def test_a_sweep_of_which_some_fail_says_so(
    report: Report, micro_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure", lambda plan, on_step: report)
    code, out, err = execute(capsys, "--model", micro_bundle, "--context", f"0,{TOO_LONG}")
    assert code == 0
    assert [bool(run["error"]) for run in json.loads(out.splitlines()[-1])["runs"]] == [False, True]
    assert err.endswith("llava-edge: 1 of 2 configurations failed; the table says why.\n")


# The command again, with numbers that are there already.


@pytest.fixture
def measured(report: Report, monkeypatch: pytest.MonkeyPatch) -> Report:
    """What every measurement of the command gives; it takes no time."""
    found = replace(report, runs=report.runs[:1])
    monkeypatch.setattr(runner, "measure", lambda plan, on_step: found)
    return found


AS_MEASURED = ("--threads", "1", "--prompt", "hi", "--max-tokens", "6")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_cannot_be_written_costs_no_measurement(
    measured: Report, micro_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_file = tmp_path / "page.html"
    code, out, err = execute(capsys, "--model", micro_bundle, "--csv", "/dev/full", "--html", page_file)
    assert code == 74
    assert out == measured.to_json() + "\n"
    assert "/dev/full cannot be written: No space left" in err
    assert page_file.read_text("utf-8").startswith("<!doctype html>")


def test_an_earlier_file_outlives_a_disk_that_is_full(
    measured: Report, micro_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_file = tmp_path / "page.html"
    page_file.write_text("of last week")
    with largest_file(100):
        code, out, err = execute(capsys, "--model", micro_bundle, "--html", page_file)
    assert (code, out) == (74, measured.to_json() + "\n")
    assert f"{page_file} cannot be written: File too large" in err
    assert page_file.read_text() == "of last week"


def test_a_full_disk_for_its_pictures_is_named(micro_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(100):
        code, _, err = execute(capsys, "--model", micro_bundle, "--no-limits", *AS_MEASURED)
    assert code == 74
    assert re.search(r"llava-edge: \S+/one\.png could not be written: File too large\.\n$", err)


def test_a_page_can_name_files_that_are_not_utf_8(measured: Report, micro_bundle: Path, tmp_path: Path) -> None:
    page_file, old = tmp_path / "page.html", tmp_path / os.fsdecode(b"caf\xe9.json")
    try:
        old.write_text(measured.to_json(), "utf-8")
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    command = ("--model", micro_bundle, *AS_MEASURED, "--compare", old, "--html", page_file)
    assert cli.execute(["bench", *map(str, command)]) == 0
    assert "caf?.json" in page_file.read_text("utf-8")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompt": "what?"}, "prompt 'what?' then, 'hi' now"),
        ({"image": "a.jpg"}, "picture 'a.jpg' then, 'drawn' now"),
        ({"max_tokens": 99}, "max-tokens 99 then, 6 now"),
    ],
)
def test_other_questions_are_not_compared(
    changed: dict[str, Any], says: str, report: Report, micro_bundle: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    old = tmp_path / "old.json"
    old.write_text(replace(report, settings=report.settings | changed).to_json(), "utf-8")
    code, out, err = execute(capsys, "--model", micro_bundle, *AS_MEASURED, "--compare", old)
    assert (code, out) == (2, "")
    assert says in err


def test_a_comparison_says_what_else_changed(
    measured: Report, micro_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, old, other = (tmp_path / name for name in ("same.json", "old.json", "other.json"))
    same.write_text(measured.to_json(), "utf-8")
    machine, versions = measured.machine | {"processor": "i486"}, measured.versions | {"onnxruntime": "0.1"}
    old.write_text(replace(measured, machine=machine, versions=versions).to_json(), "utf-8")
    other.write_text(replace(make_report(1), settings={}).to_json(), "utf-8")
    command = ("--model", micro_bundle, *AS_MEASURED, "--compare")
    code, _, err = execute(capsys, *command, same)
    assert (code, " then, " in err, "nothing to compare" in err) == (0, False, False), err
    _, _, err = execute(capsys, *command, old)
    assert f"processor: i486 then, {measured.machine['processor']} now" in err
    assert f"onnxruntime: 0.1 then, {measured.versions['onnxruntime']} now" in err
    _, _, err = execute(capsys, *command, other)
    assert err.startswith(f"llava-edge: {other} has none of this run's configurations")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--threads", "1,x"), 2),
        (("--threads", "-1"), 2),
        (("--context", "-5"), 2),
        (("--image-tokens", "-5"), 2),
        (("--repeats", "0"), 2),
        (("--repeats", "1001"), 2),
        (("--warmup", f"{1 << 64}"), 2),
        (("--prompt", " "), 2),
        (("--csv", "nowhere/x.csv"), 73),
        (("--html", "."), 73),
        (("--html", "a", "--csv", "./a"), 73),
        (("--compare", "a.json", "--csv", "a.json"), 73),
        (("--image", "a.jpg", "--html", "a.jpg"), 73),
        (("--html", "{bundle}/vision.onnx"), 73),
        (("--csv", "{loop}"), 73),
        (("--compare", "none.json"), 66),
        (("--compare", "/"), 66),
        (("--image", " "), 2),
        (("--image", "none.jpg"), 66),
        (("--model", "none"), 66),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    arguments: tuple[str, ...], code: int, micro_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    named = [word.format(bundle=micro_bundle, loop=tmp_path / "loop") for word in arguments]
    found, out, err = execute(capsys, "--model", micro_bundle, *named)
    assert (found, out) == (code, "")
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see the child")
def test_ctrl_c_ends_the_child_too(micro_bundle: Path) -> None:
    command = [sys.executable, "-m", "llava_edge", "bench", "--model", str(micro_bundle), "--repeats", "99"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*command, "--no-limits"], cwd=ROOT, stdout=pipe, stderr=pipe)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text("utf-8") != "")
    child = children.read_text("utf-8").split()[0]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"")
    wait_until(lambda: not is_running(child))


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def is_running(process: str) -> bool:
    """Whether it is there and no zombie, which is what a killed orphan may stay for whoever adopts it."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The scripts of benchmarks/.


@pytest.fixture(scope="module")
def interleave() -> Any:
    spec = importlib.util.spec_from_file_location("interleave", ROOT / "benchmarks" / "interleave.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_take_turns_and_the_broken_ones_are_left_out(interleave: Any, capfd: pytest.CaptureFixture[str]) -> None:
    alive = "import sys\nprint('a log line'); print('ready', flush=True)\n"
    alive += "for _ in sys.stdin: print('{\"ms\": %d}', flush=True)"
    peers = {"ours": alive % 5, "slow": alive % 10, "broken": "raise SystemExit('no such engine')"}
    samples = interleave.run_persistent({name: [sys.executable, "-c", code] for name, code in peers.items()}, repeats=3)
    assert samples == {"ours": [{"ms": 5}] * 3, "slow": [{"ms": 10}] * 3}
    rows = interleave.report(samples, "ours")
    assert rows["slow"]["times"] == 2.0
    out, err = capfd.readouterr()
    assert "broken failed: no such engine" in err
    assert json.loads(out.splitlines()[-1])["peers"]["slow"]["median"] == 10


def test_without_ours_there_is_no_comparison(interleave: Any) -> None:
    with pytest.raises(SystemExit, match="ours failed, so there is nothing to compare"):
        interleave.report({"slow": [{"ms": 10}]}, "ours")


def test_new_processes_are_timed_from_their_start(interleave: Any) -> None:
    code = "import json, time; time.sleep(0.05); print(json.dumps({'at': time.monotonic()}))"
    own = "print('{\"load_ms\": 1}')"
    peers = {"it": [sys.executable, "-c", code], "its own times": [sys.executable, "-c", own], "bad": ["false"]}
    found = interleave.run_fresh(peers, repeats=2, warmup=0)
    assert list(found) == ["it", "its own times"]
    assert all(50 < item["ms"] < 60_000 for item in found["it"])
    assert found["its own times"] == [{"load_ms": 1}] * 2


def test_times_better_turns_with_what_is_better(interleave: Any) -> None:
    pairs = [(20.0, 10.0), (18.0, 12.0), (30.0, 10.0)]
    assert interleave.ratios(pairs, False) == (2.0, 1.5, 3.0)
    assert interleave.ratios(pairs, True) == (0.5, pytest.approx(1 / 3), pytest.approx(2 / 3))
