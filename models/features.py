"""Cache of CLIP features on disk: CLIP is frozen, so each training picture is encoded only once.

One folder per tower, named by the SHA-256 of its weights and settings, with `features.f16` (rows of (image_tokens,
width) float16, appended) and `index.jsonl` (one key per row, the SHA-256 of the picture file). So changed pictures are
encoded again, and towers never share features.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from llava_edge.bundle import Preprocessing
from llava_edge.errors import CheckpointError
from llava_edge.image import load_image, preprocess
from llava_edge.locks import lock_file
from llava_edge.models.clip import VisionTower
from llava_edge.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig
from llava_edge.models.llava import Llava
from llava_edge.outputs import check_space

BATCH = 16  # pictures encoded at once


def preprocessing(config: LlavaConfig) -> Preprocessing:
    """The preprocessing of a checkpoint without an image processor, such as ours; the exporter gives it the same."""
    return Preprocessing(config.vision.image_size, CLIP_MEAN, CLIP_STD, config.square, config.grids, config.merge)


def check_single_crop(config: LlavaConfig) -> None:
    """Raises `CheckpointError` for "anyres"."""
    if config.square == "anyres":
        raise CheckpointError(
            "Training and eval use one crop per picture, but this model needs several (LLaVA-1.6); "
            "export it, and use `run` or `chat`."
        )


class FeatureCache:
    """Features of a model's tower by picture path. `ensure` fills it, `get` reads it; processes may share a folder.

    bf16: use a copy of the tower in bfloat16, 4 times as fast where the processor supports it (AMX, AVX-512) and
        3 % (l2) off on CLIP ViT-B/16; cast as a whole, because autocast casts the weights again for every batch.
    log: called when another process has to be waited for.
    Raises `CheckpointError` for "anyres".
    """

    def __init__(
        self, folder: Path, model: Llava, *, bf16: bool = True, log: Callable[[str], object] = lambda line: None
    ) -> None:
        config = model.config
        check_single_crop(config)
        self.config, self.bf16, self._log = config, bf16, log
        self.shape = (config.image_tokens, config.vision.hidden_size)
        self._tower = model.vision_tower.vision_model
        self.folder = folder / _identity(self._tower, config, bf16)[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index_path, self._data_path = self.folder / "index.jsonl", self.folder / "features.f16"
        self._keys: dict[Path, str] = {}
        self._data: np.ndarray | None = None
        self._rows = self._read_index()

    def key(self, path: Path) -> str:
        """SHA-256 of a picture file, computed once."""
        if path not in self._keys:
            self._keys[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._keys[path]

    def get(self, paths: Sequence[Path]) -> torch.Tensor:
        """(n, image_tokens, width) float16 for pictures that `ensure` has encoded."""
        if self._data is None:  # complete rows only: another process may be writing the next one
            self._data = np.memmap(self._data_path, np.float16, "r", shape=(len(self._rows), *self.shape))
        return torch.from_numpy(self._data[[self._rows[self.key(path)] for path in paths]])

    def ensure(self, paths: Iterable[Path], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Encode the pictures that are not cached yet. `progress(done, total)` after each batch.

        Waits while another process does so in the same folder.
        """
        unique = {self.key(path): path for path in paths}
        with (
            (self.folder / "lock").open("w") as lock,
            self._data_path.open("ab") as data,
            self._index_path.open("a", encoding="utf-8") as index,
        ):
            self._acquire(lock)
            self._rows = self._read_index()  # other processes may have added rows
            # Drop a partial row or line, left by a process that was killed.
            data.truncate(len(self._rows) * self._row_bytes())
            index.truncate(sum(len(_line(key)) for key in self._rows))
            missing = [path for key, path in unique.items() if key not in self._rows]
            check_space(self.folder, len(missing) * self._row_bytes(), "The cache of CLIP features")
            tower = copy.deepcopy(self._tower).to(torch.bfloat16) if self.bf16 and missing else self._tower
            spec = preprocessing(self.config)
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                pixels = torch.from_numpy(np.stack([preprocess(load_image(path), spec) for path in batch]))
                with torch.inference_mode():
                    features = tower(pixels.to(torch.bfloat16) if self.bf16 else pixels)
                data.write(features.to(torch.float16).numpy().tobytes())
                data.flush()
                for path in batch:
                    self._rows[self.key(path)] = len(self._rows)
                    index.write(_line(self.key(path)))
                index.flush()
                progress(min(start + BATCH, len(missing)), len(missing))
        self._data = None

    def _acquire(self, lock: TextIO) -> None:
        try:
            lock_file(lock, wait=False)
        except BlockingIOError:
            self._log(f"another run is computing these features; waiting for it to finish with {self.folder}")
            lock_file(lock, wait=True)

    def _read_index(self) -> dict[str, int]:
        """Row number by key, of complete rows with a complete line, up to the first that is damaged."""
        if not (self._index_path.is_file() and self._data_path.is_file()):
            return {}
        lines = self._index_path.read_bytes().split(b"\n")[:-1]
        rows = self._data_path.stat().st_size // self._row_bytes()
        whole = takewhile(re.compile(rb'"[0-9a-f]{64}"').fullmatch, lines[:rows])
        return {json.loads(line): row for row, line in enumerate(whole)}

    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * 2


def _line(key: str) -> str:
    return json.dumps(key) + "\n"


def _identity(tower: VisionTower, config: LlavaConfig, bf16: bool) -> str:
    """Hash of everything that features depend on, except the picture."""
    settings = [asdict(config.vision), config.vision_feature_layer, config.feature, config.square, config.image_pool,
                bf16]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
