"""Presets and tuned settings: what is chosen, why, and that answers do not depend on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from processes import resident

from llava_edge import Llava, Options, gguf
from llava_edge.bundle import LANGUAGE, VISION, VISION_DATA, Bundle, ParityRow
from llava_edge.cli import cli
from llava_edge.errors import MemoryLimitError, UnavailableError
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro
from llava_edge.options import EngineOptions
from llava_edge.runtimes import bindings, language, machine, mapping, native, presets, probe, tune
from llava_edge.runtimes.loading import Loader
from llava_edge.runtimes.machine import thread_count  # before `one_thread` replaces it
from llava_edge.runtimes.native.choice import Status
from llava_edge.runtimes.picture_cache import PictureCache
from llava_edge.runtimes.vision import VisionEncoder

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
CPU = EngineOptions(device="cpu", threads=1, cache=False)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: 0.0)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is read of /proc and /sys, by path; others are empty."""
    found: dict[str, str] = {}
    monkeypatch.setattr(machine, "_read", lambda path: found.get(str(path), ""))
    return found


def four_bits(folder: Path) -> Path:
    """A language model of a quarter of a megabyte whose weights llama.cpp repacks."""
    path = folder / "q4_0.gguf"
    probe.write_model(path, "Q4_0")
    return path


# Which preset, and why.


def copied_bytes(header: gguf.Gguf) -> int:
    return sum(tensor.size for tensor in header.tensors.values() if tensor.kind == "Q4_0")


def test_auto_is_fast_where_there_is_room_and_small_where_there_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = gguf.read(four_bits(tmp_path))
    needed = presets.memory_bytes(header, 512, "f16") + copied_bytes(header)
    for free, name in ((2 * needed, "latency"), (2 * needed - 2, "memory"), (None, "latency")):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        chosen = presets.choose(EngineOptions(), header, 512)
        assert (chosen.name, chosen.copies, chosen.repack) == (name, name == "latency", name == "latency")
        assert (chosen.context, chosen.kv) == (512, "f16")
        assert f"{needed // MIB} of " in chosen.reason


def test_what_a_container_holds_of_files_is_free(files: dict[str, str]) -> None:
    files |= {
        "/proc/self/cgroup": "0::/",
        "/proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "4000000000",
        "/sys/fs/cgroup/memory.current": "3990000000",
        "/sys/fs/cgroup/memory.stat": "anon 90000000\nactive_file 1000000000\ninactive_file 2500000000\nshmem 7\n",
    }
    assert machine.available_memory() == 3_510_000_000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert machine.available_memory() == 8_192_000_000


def test_the_tightest_of_all_groups_counts(files: dict[str, str]) -> None:
    """systemd's MemoryMax limits a group within others; the first version has folders and names of its own."""
    files |= {
        "/proc/self/cgroup": "0::/user.slice/app.scope/inner",
        "/proc/meminfo": "MemAvailable: 8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "max",
        "/sys/fs/cgroup/user.slice/app.scope/memory.max": "500000000",
        "/sys/fs/cgroup/user.slice/app.scope/memory.current": "100000000",
        "/sys/fs/cgroup/user.slice/app.scope/inner/memory.max": "max",
    }
    assert machine.available_memory() == 400_000_000
    files.clear()
    files |= {
        "/proc/self/cgroup": "3:cpu,cpuacct:/\n7:memory:/docker/abc\n0::/",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "700000000",  # a container's own, whose path is the one outside
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "300000000",
        "/sys/fs/cgroup/memory/memory.stat": "active_file 5\ninactive_file 7\ntotal_active_file 50000000\n"
        "total_inactive_file 20000000\n",  # the first two without the groups within
    }
    assert machine.available_memory() == 470_000_000


def test_the_tightest_quota_of_all_groups_counts(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    files |= {
        "/proc/self/cgroup": "0::/user.slice/app.scope/inner",
        "/sys/fs/cgroup/user.slice/cpu.max": "600000 100000",
        "/sys/fs/cgroup/user.slice/app.scope/cpu.max": "150000 100000",
        "/sys/fs/cgroup/user.slice/app.scope/inner/cpu.max": "max 100000",
    }
    monkeypatch.setattr(machine, "allowed_cpus", lambda: set(range(8)))
    assert thread_count() == (1, "the CPU quota of this process is 1.5 processors")
    files.clear()
    files |= {
        "/proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n7:memory:/docker/abc",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert thread_count()[0] == 3
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1"  # none
    assert thread_count()[0] == 8


def test_clips_second_copy_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read(four_bits(tmp_path))
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 30)
    assert presets.choose(EngineOptions(), header, 512).name == "latency"
    assert presets.choose(EngineOptions(), header, 512, vision_copy_bytes=1 << 29).name == "memory"
    assert presets.choose(EngineOptions(preset="memory"), header, 512, vision_copy_bytes=1 << 31).name == "memory"
    said = f"{tmp_path} with a context of 512 needs about 2048 MiB of memory, but 1024 MiB are available. Use --preset"
    with pytest.raises(MemoryLimitError, match=re.escape(said)):
        presets.choose(EngineOptions(preset="latency"), header, 512, vision_copy_bytes=1 << 31)


def test_memory_means_a_small_context_too_unless_told_otherwise(tmp_path: Path) -> None:
    header = gguf.read(four_bits(tmp_path))
    small = EngineOptions(preset="memory")
    usual = presets.choose(small, header, 8192)
    assert (usual.reason, usual.repack, usual.context, usual.kv) == ("asked for", False, 2048, "q8_0")
    assert presets.choose(small, header, 8192, tiles=True).context == 4096
    assert presets.choose(small, header, 1000).context == 1000
    told = presets.choose(replace(small, context=3000, kv="f16"), header, 8192)
    assert (told.context, told.kv) == (3000, "f16")
    fast = presets.choose(EngineOptions(preset="latency"), header, 8192)
    assert (fast.repack, fast.context, fast.kv) == (True, 4096, "f16")
    assert not presets.choose(EngineOptions(preset="latency"), header, 8192, gpu_layers=-1).repack


def test_weights_are_copied_only_where_that_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read(four_bits(tmp_path))
    for features, kinds, repack in (
        ("avx2", "Q4_0", True),
        ("avx2", "Q4_K", False),
        ("avx2 avx512f", "Q4_K", True),
        ("asimd", "Q4_K", True),
        ("avx2", "IQ4_NL", True),
        ("avx2", "Q4_0 Q4_0 Q4_K", True),
        ("avx2", "IQ4_NL IQ4_NL Q4_K", True),
        ("avx2", "Q4_0 Q4_K Q4_K", False),
        ("avx2 avx512f", "Q8_0", False),
        ("avx2 avx512f", "Q4_1", False),
        ("avx2 avx512f amx_int8", "Q4_1", True),
    ):
        monkeypatch.setattr(machine, "processor", lambda features=features: ("a processor", features.split()))
        pairs = zip(header.tensors.items(), cycle(kinds.split()), strict=False)
        file = replace(header, tensors={name: replace(tensor, kind=kind) for (name, tensor), kind in pairs})
        assert presets.choose(EngineOptions(preset="latency"), file, 512).repack == repack


def test_what_cannot_fit_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read(four_bits(tmp_path))
    context = presets.memory_bytes(header, 512, "f16")
    monkeypatch.setattr(machine, "available_memory", lambda: context + 1)
    assert presets.choose(EngineOptions(preset="memory", kv="f16"), header, 512).name == "memory"
    with pytest.raises(MemoryLimitError, match="--preset memory"):
        presets.choose(EngineOptions(preset="latency"), header, 512)
    with pytest.raises(MemoryLimitError, match="Use a smaller --context"):
        presets.choose(EngineOptions(preset="memory", kv="f16"), header, 600)


def test_a_draft_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read(four_bits(tmp_path))
    memory = EngineOptions(preset="memory")
    with_draft = replace(memory, draft=header.path)
    draft = presets.memory_bytes(header, 128, "f16")  # whatever the type of the other one
    two = presets.memory_bytes(header, 128, "q8_0") + draft
    monkeypatch.setattr(machine, "available_memory", lambda: two - 1)
    assert presets.choose(memory, header, 128).name == "memory"
    with pytest.raises(MemoryLimitError, match="Use a smaller --context"):
        presets.choose(with_draft, header, 128)
    monkeypatch.setattr(machine, "available_memory", lambda: two)
    assert presets.choose(with_draft, header, 128).name == "memory"
    for layers, needed in ((0, 2 * draft + 2 * copied_bytes(header)), (-1, 2 * draft)):
        for free, name in ((2 * needed, "latency"), (2 * needed - 2, "memory")):
            monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
            chosen = presets.choose(replace(with_draft, preset="auto"), header, 128, gpu_layers=layers)
            assert chosen.name == name


def test_address_space_is_needed_for_files_and_threads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, options = gguf.read(four_bits(tmp_path)), EngineOptions(preset="memory", kv="f16", threads=2)
    left = presets.memory_bytes(header, 512, "f16") + presets.WORKING_BYTES + 2 * presets.STACK_BYTES + (1 << 30)
    monkeypatch.setattr(machine, "address_space", lambda: left)
    assert presets.choose(options, header, 512, mapped_bytes=1 << 30)
    for threads, mapped in ((3, 1 << 30), (2, (1 << 30) + 1)):
        with pytest.raises(MemoryLimitError, match=f" only {left >> 20} MiB are left to this process"):
            presets.choose(replace(options, threads=threads), header, 512, mapped_bytes=mapped)


def test_keys_and_values_of_8_bits_take_little_more_than_half(tmp_path: Path) -> None:
    header = gguf.read(four_bits(tmp_path))
    assert presets.memory_bytes(header, 512, "f16") == 2 * 512 * 256 * 2
    probe.write_model(tmp_path / "grouped.gguf", "Q4_0", kv_heads=2)  # of four heads for queries
    assert presets.memory_bytes(gguf.read(tmp_path / "grouped.gguf"), 512, "f16") == 512 * 256 * 2
    assert presets.memory_bytes(header, 512, "q8_0") / presets.memory_bytes(header, 512, "f16") == 34 / 64


def test_run_says_which_preset_and_why(micro_bundle: Path) -> None:
    arguments = ["run", "--model", str(micro_bundle), "--prompt", "Hi", "--max-tokens", "2"]
    asked = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--preset", "memory"])
    assert asked.exit_code == 0
    assert "preset: memory (asked for)" in asked.stderr
    usual = CliRunner().invoke(cli, [*arguments, "--verbose"]).stderr
    assert re.search(r"preset: (latency|memory) \(repacked weights and context take up to \d+ of", usual)


# What the language model then does.


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("repack", [True, False])
def test_weights_are_not_held_twice(repack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = four_bits(tmp_path)
    held = resident(path)
    assert held == 0
    model = language.LanguageModel(path, context=64, threads=1, repack=repack)
    after = resident(path)
    model.close()
    assert after >= path.stat().st_size // 2 if not repack else after == 0
    monkeypatch.setattr(mapping, "release_pages", lambda path: None)  # without it they would be
    model = language.LanguageModel(path, context=64, threads=1, repack=repack)
    assert resident(path) >= path.stat().st_size // 2
    model.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_preset_decides_for_the_language_model_and_its_draft(micro_checkpoint: Path, tmp_path: Path) -> None:
    export(ExportOptions(micro_checkpoint, tmp_path / "bundle", quant="q4_0", vision="fp32", force_publish=True))
    files = [tmp_path / "bundle" / LANGUAGE, tmp_path / "draft.gguf"]
    shutil.copy(*files)
    fast = replace(CPU, preset="latency", draft=files[1])
    for options, mapped in ((fast, False), (replace(fast, preset="memory"), True)):
        with Llava.load(tmp_path / "bundle", options):
            assert [resident(path) >= path.stat().st_size // 2 for path in files] == [mapped] * 2


def test_rows_have_the_same_bits_only_where_our_kernels_compute_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = four_bits(tmp_path)
    all_ours = Status("of this test", "", (("Q4_0", "avx2", 16),), ("Q4_0",), attention=True, few_attention=True)
    mapped = replace(all_ours, mapped=("Q4_0",))
    for status, kv, same in (
        (mapped, "f16", True),
        (all_ours, "f16", False),  # repacked
        (mapped, "q8_0", True),
        (replace(mapped, few_rows=()), "f16", False),
        (replace(mapped, few_attention=False), "f16", False),
    ):
        monkeypatch.setattr(native, "activate", lambda status=status: status)
        model = language.LanguageModel(path, context=64, threads=1, kv=kv)  # type: ignore[arg-type]
        model.close()
        assert model.batch_invariant == same


def test_what_may_change_bits_is_part_of_what_saved_states_are_kept_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = four_bits(tmp_path)

    def identity(**change: Any) -> list[object]:
        with language.LanguageModel(path, **{"context": 64, "threads": 1, "repack": False, **change}) as model:
            return model.identity

    changes: list[dict[str, Any]] = [{"threads": 2}, {"context": 32}, {"batch": 64}, {"kv": "q8_0"}, {"repack": True}]
    found = [identity(), *(identity(**change) for change in changes)]
    for module, name, value in (
        (native, "activate", Status("of this test", few_rows=("Q4_0",), library="of a hash")),
        (machine, "processor", ("another", [])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda value=value: value)
            found.append(identity())
    assert all(one != other for one, other in combinations(found, 2))
    assert identity() == found[0]


def test_keys_and_values_of_8_bits_are_used_and_answers_stay_close(micro_bundle: Path) -> None:
    states, sizes = [], []
    for kv in ("f16", "q8_0"):
        model = language.LanguageModel(micro_bundle / LANGUAGE, context=512, threads=1, kv=kv)
        model.evaluate_tokens([7 + i % 50 for i in range(200)], threading.Event())
        states.append(model.logits().copy())
        sizes.append(len(model.save_state(200) or b""))
        model.close()
    assert sizes[1] < 0.6 * sizes[0]
    difference = np.linalg.norm(states[1] - states[0]) / np.linalg.norm(states[0])
    assert 0 < difference < 0.05


def test_answers_are_the_same_with_both_presets(micro_bundle: Path) -> None:
    """The micro model has nothing to repack; with the same context both presets compute the same."""
    texts = set()
    for preset in ("latency", "memory"):
        with Llava.load(micro_bundle, replace(CPU, preset=preset, kv="f16")) as llava:
            assert llava.preset == f"{preset} (asked for)"
            texts.add(llava.ask("Hi", options=Options(max_tokens=12)).text)
    assert len(texts) == 1


def test_a_picture_of_more_positions_than_usual_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass reads all weights again."""
    vision = replace(micro.CONFIG.vision, image_size=23 * micro.CONFIG.vision.patch_size)
    config = replace(micro.CONFIG, vision=vision, text=replace(micro.CONFIG.text, max_position_embeddings=1024))
    micro.write_checkpoint(tmp_path / "checkpoint", config=config)
    export(ExportOptions(tmp_path / "checkpoint", tmp_path / "bundle", quant="f16", vision="fp32", force_publish=True))
    sizes = list[int]()
    with Llava.load(tmp_path / "bundle", CPU) as llava:
        library = llava._engine.model.language.library
        decode = library.llama_decode

        def noted(context: Any, batch: Any) -> int:
            sizes.append(batch.n_tokens)
            return int(decode(context, batch))

        monkeypatch.setattr(library, "llama_decode", noted)
        llava.ask("Hi", Image.new("RGB", (40, 30)), Options(max_tokens=1))
    assert max(sizes) == 23**2 > language.BATCH


# The vision tower's settings.


def test_what_was_measured_is_kept_used_and_shown(
    micro_bundle: Path, isolated_home: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(micro_bundle)
    assert tune.load(bundle) == []
    found = tune.measure(bundle)
    assert found == tune.load(bundle)
    assert (found[0].threads, found[0].prepack) == (machine.thread_count()[0], False)
    assert any(item.prepack for item in found)
    assert all(item.load_ms > 0 and item.encode_ms > 0 for item in found)
    [path] = (isolated_home / "tune").iterdir()
    fastest = tune.Setting(3, True, 1.0, 1.0)
    path.write_text(json.dumps([vars(found[0]), vars(fastest)]), "utf-8")
    for preset, threads, prepack in (("latency", 3, True), ("memory", found[0].threads, False)):
        options = replace(CPU, threads=0, preset=preset)  # type: ignore[arg-type]
        setting = Loader(bundle, options, PictureCache(None), ExitStack()).vision_setting()
        assert (setting.threads, setting.prepack) == (threads, prepack)
    shown = CliRunner().invoke(cli, ["doctor", "--json", "--model", str(micro_bundle)])
    vision = [item["text"] for item in json.loads(shown.stdout)["findings"] if item["subject"] == "vision"]
    assert f"latency uses {fastest}" in vision
    assert f"memory uses {found[0]}" in vision


def test_clips_second_copy_counts_where_one_was_measured_to_pay(
    micro_bundle: Path, isolated_home: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(micro_bundle)
    usual, copied = tune.measure(bundle)[0], tune.Setting(1, True)
    [path] = (isolated_home / "tune").iterdir()
    header = gguf.read(bundle.part(LANGUAGE))
    context = presets.memory_bytes(header, header.number("llama.context_length"), "f16")
    copy = sum(bundle.manifest.files[name].size for name in (VISION, VISION_DATA))
    for settings, needed in ([usual], context), ([usual, copied], context + copy):
        path.write_text(json.dumps([vars(setting) for setting in settings]), "utf-8")
        for free, name in ((2 * needed, "latency"), (2 * needed - 2, "memory")):
            monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
            with Llava.load(micro_bundle, replace(CPU, threads=0)) as llava:
                assert llava.preset.startswith(name)


def test_threads_that_were_asked_for_stay(micro_bundle: Path, quiet: None) -> None:
    bundle = Bundle.open(micro_bundle)
    tune.measure(bundle)
    assert Loader(bundle, replace(CPU, threads=5), PictureCache(None), ExitStack()).vision_setting().threads == 5


class Clock:
    """Stands still, but for what is said to be the time that CLIP takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.features_of_copies = 0.0, 1.0
        opened = set[tuple[int, bool]]()
        usual_init, usual_encode = VisionEncoder.__init__, VisionEncoder.encode

        def init(
            encoder: Any, bundle: Bundle, threads: int = 0, *args: Any, prepack: bool = False, **more: Any
        ) -> None:
            usual_init(encoder, bundle, 1, *args, prepack=prepack, **more)
            encoder.threads, encoder.copies = threads, prepack
            encoder.delay = (threads, prepack) not in opened  # the first time everything takes longer
            opened.add((threads, prepack))
            self.now += 0.04 / max(threads, 1) + encoder.delay  # 0: the reference's

        def encode(encoder: Any, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            first = not hasattr(encoder, "warm")
            encoder.warm = True
            self.now += 0.02 + 0.001 * encoder.threads + first + encoder.delay
            return usual_encode(encoder, pixels) * (self.features_of_copies if encoder.copies else 1.0)

        monkeypatch.setattr(VisionEncoder, "__init__", init)
        monkeypatch.setattr(VisionEncoder, "encode", encode)
        monkeypatch.setattr(tune, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("precision", "limits", "kept"),
    [
        ("fp32", {}, False),
        ("int8", {}, True),
        ("fp32", {"clip fp32": 0.2}, True),
        ("int8", {"clip fp32": 0.2, "clip int8": 1e-3}, False),
    ],
)
def test_other_features_are_left_out(
    precision: Any, limits: dict[str, float], kept: bool, micro_bundle: Path, quiet: None, clock: Clock
) -> None:
    """Features of copied weights are 1 % off."""
    bundle = Bundle.open(micro_bundle)
    clock.features_of_copies = 1.01
    rows = [ParityRow(stage, "relative", 0.0, limit, 0.0, 0.0, True) for stage, limit in limits.items()]
    vision = replace(bundle.manifest.vision, precision=precision)
    found = tune.measure(Bundle(bundle.folder, replace(bundle.manifest, vision=vision, parity=rows)))
    assert any(item.prepack for item in found) == kept


def test_the_best_times_of_the_threads_that_encode_fastest_are_found(
    micro_bundle: Path, quiet: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "thread_count", lambda: (4, "of this test"))
    found = tune.measure(Bundle.open(micro_bundle))
    times = [(item.threads, item.prepack, item.native, round(item.load_ms), round(item.encode_ms)) for item in found]
    assert times == [(4, False, False, 10, 24), (2, False, False, 20, 22), (2, True, False, 20, 22)]


def test_what_was_measured_elsewhere_or_of_another_tower_is_not_used(
    micro_bundle: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(micro_bundle)
    found = tune.measure(bundle)
    for module, name, value in (
        (machine, "processor", ("another", ["avx2"])),
        (machine, "thread_count", (7, "of another container")),
        (bindings, "version", "0.0"),
        (native, "operator_library", Path("other.so")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, value=value: value)
            assert tune.load(bundle) == []
    for name in (VISION, VISION_DATA):
        files = {**bundle.manifest.files, name: replace(bundle.manifest.files[name], sha256="0" * 64)}
        assert tune.load(Bundle(bundle.folder, replace(bundle.manifest, files=files))) == []
    assert tune.load(bundle) == found


@pytest.mark.parametrize("home", ["/dev/null/home", "~no such user/home"])
def test_what_cannot_be_stored_is_told_all_the_same(
    home: str, micro_bundle: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", home)
    assert tune.measure(Bundle.open(micro_bundle))
    assert tune.load(Bundle.open(micro_bundle)) == []


def test_a_busy_machine_and_a_damaged_note_decide_nothing(
    micro_bundle: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(micro_bundle)
    clock = iter((0.0, 1e6))
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: next(clock))
    with pytest.raises(UnavailableError, match="Other programs"):
        tune.measure(bundle)
    assert tune.load(bundle) == []
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: 0.0)
    tune.measure(bundle)
    [path] = (isolated_home / "tune").iterdir()
    right = {"threads": 1, "prepack": False, "encode_ms": 1.0, "load_ms": 1.0}
    wrong = [json.dumps([{**right, key: "x"}]) for key in right]
    for text in ("", "{}", "[1]", "null", "[" * 100_000, *wrong):
        path.write_text(text)
        assert tune.load(bundle) == []


def test_only_a_clear_gain_leaves_the_usual_setting() -> None:
    usual, close = tune.Setting(2, False, 50, 100), tune.Setting(1, False, 50, 98)
    better = tune.Setting(2, True, 60, 70)
    assert tune.choose([usual, close], copies=True) == usual
    assert tune.choose([usual, close, better], copies=True) == better
    assert tune.choose([usual, close, better], copies=False) == usual
    assert tune.choose([usual, tune.Setting(2, True, 300, 20)], copies=True) == usual
    assert tune.choose([], copies=True) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_of_others_is_not_our_own() -> None:
    before = machine.external_cpu_seconds()
    assert before > 0
    sum(i * i for i in range(2_000_000))
    assert machine.external_cpu_seconds() - before >= -0.05


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep RLIMIT_AS")
def test_too_little_address_space_is_said_before_an_engine_dies_of_it(micro_bundle: Path) -> None:
    """In steps of 100 MB from where Python itself starts up to where an answer comes."""
    import resource

    command = [sys.executable, "-m", "llava_edge", "run", "--model", str(micro_bundle), "--device", "cpu"]
    command += ["--threads", "1", "--no-cache", "--prompt", "hello", "--max-tokens", "2"]
    codes, said = [], ""
    for limit in range(300_000_000, 2_000_000_000, 100_000_000):
        limited = partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=limited)
        codes.append(done.returncode)
        if done.returncode == 0:
            break
        said = done.stderr
        assert (done.returncode, said.count("\n")) == (71, 1), said
    assert codes[-1] == 0
    assert "ulimit -v" in said
