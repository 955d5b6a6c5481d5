"""Cached CLIP features: CLIP is frozen, so each training picture is encoded once and never again.

A folder with `features.f16` (rows of (image_tokens, width) float16, appended) and `index.jsonl` (one key a row).
The key is the SHA-256 of the picture file and of the tower's configuration, so changed pictures are encoded anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from llava_edge.bundle import Preprocessing
from llava_edge.errors import CheckpointError
from llava_edge.image import load_image, preprocess
from llava_edge.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig
from llava_edge.models.llava import Llava


def preprocessing(config: LlavaConfig) -> Preprocessing:
    """The one preprocessing of a LLaVA, as trainer, exporter and runtime use it."""
    return Preprocessing(config.vision.image_size, CLIP_MEAN, CLIP_STD, config.square, config.grids, config.merge)


class FeatureCache:
    """Features by picture path. `ensure` fills it, `get` reads it. Raises `CheckpointError` for "anyres"."""

    def __init__(self, folder: Path, config: LlavaConfig) -> None:
        if config.square == "anyres":
            raise CheckpointError(
                "Training and eval take one crop of each picture, but this model looks at several (LLaVA-1.6); "
                "export it, and use `run` or `chat`."
            )
        self.folder, self.config = folder, config
        self.shape = (config.image_tokens, config.vision.hidden_size)
        folder.mkdir(parents=True, exist_ok=True)
        self._index_path, self._data_path = folder / "index.jsonl", folder / "features.f16"
        self._rows: dict[str, int] = {}
        self._keys: dict[Path, str] = {}
        if self._index_path.is_file():
            for row, line in enumerate(self._index_path.read_text("utf-8").splitlines()):
                self._rows[json.loads(line)] = row
        self._data: np.ndarray | None = None

    def key(self, path: Path) -> str:
        """Content key of a picture file."""
        if path not in self._keys:
            settings = json.dumps([asdict(self.config.vision), self.config.vision_feature_layer, self.config.feature,
                                   self.config.square, self.config.image_pool])  # fmt: skip
            self._keys[path] = hashlib.sha256(path.read_bytes() + settings.encode()).hexdigest()
        return self._keys[path]

    def get(self, paths: Sequence[Path]) -> torch.Tensor:
        """(n, image_tokens, width) float16 for pictures that `ensure` has seen."""
        if self._data is None:
            self._data = np.memmap(self._data_path, np.float16, "r").reshape(-1, *self.shape)
        return torch.from_numpy(self._data[[self._rows[self.key(path)] for path in paths]])

    def ensure(
        self,
        model: Llava,
        paths: Iterable[Path],
        progress: Callable[[int, int], None] | None = None,
        *,
        batch: int = 16,
        bf16: bool = True,
    ) -> None:
        """Encode the pictures that are not cached yet. `progress(done, total)` after each batch.

        bf16: with a copy of the tower in bfloat16, 4 times as fast where the processor multiplies it (AMX, AVX-512)
        and 3 % (l2) off on CLIP ViT-B/16; cast whole, because autocast casts the weights anew for every batch.
        """
        unique = {self.key(path): path for path in paths}
        todo = [path for key, path in unique.items() if key not in self._rows]
        spec = preprocessing(self.config)
        tower = model.vision_tower.vision_model
        if bf16 and todo:
            tower = copy.deepcopy(tower).to(torch.bfloat16)
        with self._data_path.open("ab") as data, self._index_path.open("a", encoding="utf-8") as index:
            data.truncate(len(self._rows) * int(np.prod(self.shape)) * 2)  # a row without its index line is dropped
            for start in range(0, len(todo), batch):
                part = todo[start : start + batch]
                pixels = torch.from_numpy(np.stack([preprocess(load_image(path), spec) for path in part]))
                with torch.inference_mode():
                    features = tower(pixels.to(torch.bfloat16) if bf16 else pixels)
                data.write(features.to(torch.float16).numpy().tobytes())
                data.flush()
                for path in part:
                    self._rows[self.key(path)] = len(self._rows)
                    index.write(json.dumps(self.key(path)) + "\n")
                index.flush()
                if progress:
                    progress(min(start + batch, len(todo)), len(todo))
        self._data = None
