"""Cached CLIP features: each tower has its own, and processes that share a folder do not spoil each other's."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import TextIO

import numpy as np
import pytest
import torch

from llava_edge import cli
from llava_edge.image import load_image, preprocess
from llava_edge.models import micro
from llava_edge.models.features import FeatureCache, preprocessing
from llava_edge.models.llava import Llava, from_state


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue", "white")]
    for path in paths:
        micro.draw(path.stem, rng).save(path)
    return paths


def model(seed: int) -> Llava:
    return from_state(micro.CONFIG, micro.random_tensors(seed=seed))


def encoded(model: Llava, paths: Sequence[Path]) -> torch.Tensor:
    """Without a cache."""
    pixels = np.stack([preprocess(load_image(path), preprocessing(model.config)) for path in paths])
    features: torch.Tensor = model.vision_tower.vision_model(torch.from_numpy(pixels))
    return features.to(torch.float16)


def right(cache: FeatureCache, model: Llava, paths: Sequence[Path]) -> bool:
    return torch.allclose(cache.get(paths), encoded(model, paths), atol=1e-2, rtol=1e-2)


def test_another_tower_is_not_given_the_features_of_the_first(pictures: list[Path], tmp_path: Path) -> None:
    for seed in (1, 2):
        cache = FeatureCache(tmp_path / "features", model(seed), bf16=False)
        cache.ensure(pictures)
        assert right(cache, model(seed), pictures)
    exact = cache.get(pictures)
    rounded = FeatureCache(tmp_path / "features", model(2))
    rounded.ensure(pictures)
    assert not torch.equal(rounded.get(pictures), exact)


def test_a_known_picture_is_not_encoded_again(pictures: list[Path], tmp_path: Path) -> None:
    FeatureCache(tmp_path / "features", model(1), bf16=False).ensure(pictures[:3])
    again = FeatureCache(tmp_path / "features", model(1), bf16=False)
    totals = []
    again.ensure(pictures, progress=lambda done, total: totals.append(total))
    assert totals == [1]
    assert right(again, model(1), pictures)


def test_runs_that_share_a_folder_keep_each_others_features(pictures: list[Path], tmp_path: Path) -> None:
    one, other = (FeatureCache(tmp_path / "features", model(1), bf16=False) for _ in range(2))
    one.ensure(pictures[:2])
    other.ensure(pictures[1:])  # it was opened when there was nothing yet
    for cache in (one, other, FeatureCache(tmp_path / "features", model(1), bf16=False)):
        cache.ensure(pictures)
        assert right(cache, model(1), pictures)


def test_one_run_at_a_time_adds_features(pictures: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", model(1), bf16=False)
    refused = []

    def try_to_lock(done: int, total: int) -> None:
        with (cache.folder / "lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(done)

    cache.ensure(pictures, progress=try_to_lock)
    assert refused == [4]


def test_who_has_to_wait_is_told_once(pictures: list[Path], tmp_path: Path) -> None:
    said: Queue[str] = Queue()
    cache = FeatureCache(tmp_path / "features", model(1), bf16=False, log=said.put)
    cache.ensure(pictures[:1])
    assert said.empty()
    waiting = threading.Thread(target=cache.ensure, args=(pictures,))
    with (cache.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        assert str(cache.folder) in said.get(timeout=60)
        assert waiting.is_alive()
    waiting.join(60)
    assert said.empty()
    assert right(cache, model(1), pictures)


def test_a_second_training_says_on_stderr_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another --out and the same --data, until whoever reads that presses Ctrl-C."""

    def taken(file: TextIO, kind: int) -> None:
        if "features" in Path(file.name).parts:
            raise BlockingIOError if kind & fcntl.LOCK_NB else KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", taken)
    assert cli.execute(["train", "micro", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "data")]) == 130
    assert "\nllava-edge: another run is computing these features; waiting" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["index.jsonl", "features.f16"])
def test_what_a_killed_run_left_half_written_is_encoded_again(file: str, pictures: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", model(1), bf16=False)
    cache.ensure(pictures[:3])
    path = cache.folder / file
    path.write_bytes(path.read_bytes()[:-10])
    for paths in (pictures[:2], pictures, pictures):  # at last what the one before wrote is read
        cache = FeatureCache(tmp_path / "features", model(1), bf16=False)
        cache.ensure(paths)
        assert right(cache, model(1), paths)


@pytest.mark.parametrize("damage", [b"\0" * 67, b"{{{\n", b"[]\n", b'"\xff"\n'])
def test_features_behind_a_damaged_line_are_encoded_again(damage: bytes, pictures: list[Path], tmp_path: Path) -> None:
    """As a loss of power may leave it."""
    cache = FeatureCache(tmp_path / "features", model(1), bf16=False)
    cache.ensure(pictures)
    index = cache.folder / "index.jsonl"
    first, _, rest = index.read_bytes().split(b"\n", 2)
    index.write_bytes(first + b"\n" + damage + rest)
    encoded: list[int] = []
    for _ in range(2):  # the second reads what the first wrote
        cache = FeatureCache(tmp_path / "features", model(1), bf16=False)
        cache.ensure(pictures, progress=lambda done, total: encoded.append(total))
        assert encoded == [len(pictures) - 1]
        assert right(cache, model(1), pictures)
