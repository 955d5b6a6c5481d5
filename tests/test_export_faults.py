"""Exports that cannot succeed: one sentence, the right exit code, and nobody's files touched."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from layouts import edit_config
from processes import in_child, largest_file, with_mounts
from safetensors.numpy import load_file, save_file

from llava_edge import cli
from llava_edge.bundle import LANGUAGE, MANIFEST, VISION_DATA, Bundle, write_manifest
from llava_edge.errors import CannotCreateError, CheckpointError, MissingError, StorageError
from llava_edge.export import publish
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.export.mmproj import write_mmproj
from llava_edge.export.quantize import quantize
from llava_edge.models.recipe import FOLDER
from llava_edge.models.shapes import VISION_PREFIX
from llava_edge.runtimes import bindings, probe

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(micro_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(micro_checkpoint, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# --- checkpoints that cannot be right --------------------------------------------------------------------------

BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"text_config__hidden_size": "big"}, "hidden_size|wrong type"),
    ({"text_config__num_attention_heads": 0}, "num_attention_heads to 0"),
    ({"text_config__num_attention_heads": 3}, "multiple of its heads"),
    ({"text_config__num_key_value_heads": 3}, "multiple of its kv heads"),
    ({"text_config__vocab_size": -5}, "vocab_size to -5"),
    ({"text_config__hidden_act": "gelu"}, "hidden_act to 'gelu'"),
    ({"text_config__attention_bias": True}, "attention_bias"),
    ({"text_config__head_dim": 16}, "head_dim to 16"),
    ({"text_config__model_type": "qwen2"}, "qwen2"),
    ({"text_config__rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"text_config__rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "'linear'"),
    ({"text_config__rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "'llama3'"),
    ({"text_config__rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"text_config": None}, "text_config and vision_config"),
    ({"vision_config__hidden_act": "gelu"}, "hidden_act to 'gelu'"),
    ({"vision_config__model_type": "siglip_vision_model"}, "siglip"),
    ({"vision_config__patch_size": 64}, "at least one patch"),
    ({"vision_config__image_size": 5000}, "image_size to 5000"),
    ({"vision_feature_layer": -9}, "outside the tower"),
    ({"vision_feature_layer": [-2, -5]}, "expected one integer"),
    ({"vision_feature_layer": -2.9}, "expected one integer"),
    ({"vision_feature_layer": True}, "expected one integer"),
    ({"vision_feature_select_strategy": "mean"}, "mean"),
    ({"model_type": "vipllava"}, "vipllava"),
    ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers to 1000000000"),
    ({"vision_config__num_hidden_layers": 10**9}, "num_hidden_layers to 1000000000"),
    ({"text_config__max_position_embeddings": 2**40}, "max_position_embeddings"),
    ({"text_config__rms_norm_eps": float("inf")}, "rms_norm_eps to inf"),
    ({"text_config__rms_norm_eps": float("nan")}, "rms_norm_eps to nan"),
    ({"text_config__rope_theta": 10**400}, "rope_theta"),
    ({"llava_edge__projector_type": 5}, "wrong type"),
    ({"text_config__model_type": "mistral", "text_config__sliding_window": float("inf")}, "wrong type"),
    ({"llava_edge__projector_type": "mlp²x_gelu"}, "mlp²x_gelu"),
    ({"llava_edge__projector_type": "mlp1000000000x_gelu"}, "layers at most"),
    ({"llava_edge__image_pool": "2"}, "wrong type"),
    ({"projector_hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ({"llava_edge__projector_type": "resampler"}, "resampler"),
    ({"llava_edge__image_pool": 3}, "image_pool 3"),
    ({"llava_edge__template": "alpaca"}, "alpaca"),
    ({"llava_edge__square": "stretch"}, "stretch"),
]


@pytest.mark.parametrize(("changes", "said"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_would_give_wrong_answers_is_refused(changes: Any, said: str, checkpoint: Path) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(checkpoint)


def test_everything_that_does_not_fit_is_said_at_once(checkpoint: Path) -> None:
    def damage(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        del tensors["language_model.lm_head.weight"]
        del tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"]
        tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = np.zeros(256, np.float32)
        tensors["multi_modal_projector.linear_2.weight"] = np.zeros((256, 255), np.float32)

    edit_tensors(checkpoint, damage)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    said = ("2 missing", "lm_head", "fc1.bias", "1 unknown", "q_proj.bias", "1 of the wrong shape", "(256, 255)")
    assert [part for part in said if part not in str(caught.value)] == []


def test_a_head_that_is_said_to_be_tied_but_is_not(checkpoint: Path) -> None:
    edit_config(checkpoint, text_config__tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties the output head"):
        open_checkpoint(checkpoint)
    embeddings = "language_model.model.embed_tokens.weight"
    edit_tensors(checkpoint, lambda t: t.update({"language_model.lm_head.weight": t[embeddings].copy()}))
    assert "language_model.lm_head.weight" not in open_checkpoint(checkpoint).tensors


def test_a_head_that_is_tied_by_the_whole_models_config(checkpoint: Path) -> None:
    """transformers 5 goes by the outer of the two settings, and stores no head then."""
    edit_tensors(checkpoint, lambda tensors: tensors.__delitem__("language_model.lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"set text_config.tie_word_embeddings to true"):
        open_checkpoint(checkpoint)
    edit_config(checkpoint, tie_word_embeddings=True)
    assert open_checkpoint(checkpoint).config.text.tie_word_embeddings


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (1e6, "float16 can hold")])
def test_values_that_cannot_be_stored(value: float, said: str, checkpoint: Path, tmp_path: Path) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors[name].__setitem__((0, 0), value))
    with pytest.raises(CheckpointError, match=said) as caught:
        export(ExportOptions(checkpoint, tmp_path / "out"))
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tower_that_float16_cannot_hold(checkpoint: Path, tmp_path: Path) -> None:
    name = "encoder.layers.0.mlp.fc1.weight"
    edit_tensors(checkpoint, lambda tensors: tensors[VISION_PREFIX + name].__setitem__((0, 0), 1e6))
    with pytest.raises(CheckpointError, match=rf"{name} reaches 1e\+06, more than float16 can hold"):
        export(ExportOptions(checkpoint, tmp_path / "out", vision="fp16"))


def test_weights_that_give_no_usable_bundle(checkpoint: Path, tmp_path: Path) -> None:
    """Keys beyond the KV cache's float16."""
    name = "language_model.model.layers.0.input_layernorm.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: np.full(256, 1e9, np.float32)}))
    with pytest.raises(CheckpointError, match=rf"{checkpoint} give.*published: [\w/]+\.gguf produced .* not finite\.$"):
        export(ExportOptions(checkpoint, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tower_whose_features_exceed_float32(checkpoint: Path, tmp_path: Path) -> None:
    name = VISION_PREFIX + "encoder.layers.0.mlp.fc1.weight"
    edit_tensors(checkpoint, lambda tensors: tensors[name].__setitem__((0, 0), 1e30))
    what = "exceed float32|are not finite"  # infinity, or NaN before ONNX Runtime 1.27
    with pytest.raises(CheckpointError, match=what):
        export(ExportOptions(checkpoint, tmp_path / "out"))


def headed(header: bytes, said: int | None = None) -> bytes:
    """The beginning of a safetensors file, as long as it is or as long as it says."""
    return struct.pack("<Q", len(header) if said is None else said) + header


def placed(end: int) -> bytes:
    """A file with one tensor of four numbers that ends at a byte."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, end]}
    return headed(json.dumps({"x": entry}).encode()) + b"\0" * 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
        (b"", "not a whole safetensors"),
        (headed(b"{}", 1 << 62), "are too many for its header"),
        (headed(b"[1,2] "), "header cannot be read"),
        (headed(b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'), "header cannot be read"),
        (placed(1 << 50), "lies at bytes"),
        (placed(8), "has 8 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_damaged_weights_are_one_sentence(content: bytes, said: str, checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "preprocessor_config.json"])
def test_what_was_not_downloaded_is_said_of_any_file(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """`git lfs pull --include '*.safetensors'` leaves pointers in the place of tokenizers."""
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
    ):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is a .*{said}"):
            export(ExportOptions(checkpoint, tmp_path / "out"))


def test_weights_without_their_end_or_with_an_endless_header(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"not a whole safetensors.* Download it again"):
        open_checkpoint(checkpoint)
    path.write_bytes(headed(b"", 1 << 30))
    os.truncate(path, 1 << 31)  # zeros that take no room on the disk
    with pytest.raises(CheckpointError, match=rf"has {1 << 31} bytes, and {1 << 30} .*header\. Download it again"):
        open_checkpoint(checkpoint)


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    path, mark = checkpoint / "pytorch_model.bin", tmp_path / "it ran"
    for write in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))):
        write({"x": Bomb(mark)}, path)
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin holds posix\.mkdir besides tensors.*safetensors"
        ):
            open_checkpoint(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"args": argparse.Namespace()}, r"holds argparse\.Namespace besides tensors"),
        ([1, 2], "but it is a list"),
        ({"state_dict": {"x": torch.zeros(1)}}, r"but state_dict is a dict\. .*torch\.save\(model\.state_dict\(\)"),
        ({"x": torch.zeros(1), "step": 3}, "but step is a int"),
    ],
)
def test_a_pickle_of_more_than_tensors_says_what_to_save(state: Any, said: str, checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin .*{said}"):
        open_checkpoint(checkpoint)


def in_pickle(checkpoint: Path, **changes: torch.Tensor) -> Path:
    """The weights as PyTorch's own file instead."""
    state = {name: torch.from_numpy(value) for name, value in load_file(checkpoint / WEIGHTS).items()}
    (checkpoint / WEIGHTS).unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save({**state, **changes}, path)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_pickle_without_its_end_is_to_be_downloaded_again(share: float, zipped: bool, checkpoint: Path) -> None:
    path = in_pickle(checkpoint)
    if not zipped:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged, or no file of torch\.save \(\w.* again"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["complex64", "float8_e4m3fn", "int8", "meta", "sparse"])
def test_values_of_a_pickle_that_are_no_plain_numbers_are_refused(kind: str, checkpoint: Path) -> None:
    name = "multi_modal_projector.linear_1.bias"
    bias = torch.from_numpy(load_file(checkpoint / WEIGHTS)[name])
    odd = {"meta": bias.to("meta"), "sparse": bias.to_sparse()}
    in_pickle(checkpoint, **{name: odd[kind] if kind in odd else bias.to(getattr(torch, kind))})
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin stores {name} as torch.*; expected dense values"):
        _ = open_checkpoint(checkpoint).tensors[name]


def test_shards_that_are_missing_or_outside(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "model-00001-of-00002.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}), "utf-8")
    with pytest.raises(MissingError, match="lacks the shards model-00002"):
        open_checkpoint(checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "../checkpoint/config.json"}}), "utf-8")
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(checkpoint)
    index.write_text("[]", "utf-8")
    with pytest.raises(CheckpointError, match="JSON object"):
        open_checkpoint(checkpoint)
    for content, said in (
        ('{"weight_map": {"a"', "is not valid JSON"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "names 1 of 2 shards"),
    ):
        index.write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match=rf"index\.json {said}.* download it again"):
            open_checkpoint(checkpoint)
    index.unlink()
    with pytest.raises(
        MissingError, match=r"holds model-00001-.* but not model\.safetensors\.index\.json.*; download it"
    ):
        open_checkpoint(checkpoint)


def test_two_naming_schemes_in_one_folder(checkpoint: Path) -> None:
    name = "language_model.model.norm.weight"
    edit_tensors(checkpoint, lambda t: t.update({"model.language_model.norm.weight": t[name]}))
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(checkpoint)


def test_folders_that_are_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(MissingError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(MissingError, match="holds no weights"):
        open_checkpoint(checkpoint)


def test_a_tower_without_weights_is_not_published(checkpoint: Path, tmp_path: Path) -> None:
    """It would agree with PyTorch."""
    edit_tensors(checkpoint, lambda t: t.update({name: t[name] * 0 for name in t if name.startswith("vision_")}))
    with pytest.raises(CheckpointError, match="same number everywhere"):
        export(ExportOptions(checkpoint, tmp_path / "out", quant="f16", vision="fp32"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# --- targets ---------------------------------------------------------------------------------------------------


def test_only_a_bundle_is_ever_replaced(micro_checkpoint: Path, bundle_copy: Path, tmp_path: Path) -> None:
    options = ExportOptions(micro_checkpoint, bundle_copy, quant="f16", vision="fp32")
    before = Bundle.open(bundle_copy).manifest.identity
    with pytest.raises(CannotCreateError, match="--force"):
        export(options)
    (bundle_copy / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(CannotCreateError, match=r"notes\.txt"):
        export(replace(options, force=True))
    (bundle_copy / "notes.txt").unlink()
    assert Bundle.open(bundle_copy).manifest.identity == before
    folder, file, link = tmp_path / "photos", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(b"x")
    file.write_bytes(b"x")
    link.symlink_to(folder)
    for target in (folder, file, link, tmp_path / "link" / "one.jpg" / "deep"):
        with pytest.raises(CannotCreateError):
            export(replace(options, out=target, force=True))
    assert (folder / "one.jpg").read_bytes() == b"x"
    export(replace(options, force=True))
    assert Bundle.open(bundle_copy).manifest.language.quantization == "f16"
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_an_empty_folder_and_new_parents_are_fine(micro_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        export(ExportOptions(micro_checkpoint, out, quant="f16", vision="fp32"))
        Bundle.open(out).verify()


KILLED = """
import os, sys
from pathlib import Path
from llava_edge.export import publish
publish._exchange_atomically = lambda temp, out: False
rename = Path.rename
def cut(self, target):
    if ".tmp-" in str(self):  # the second of two renames
        os._exit(1)
    return rename(self, target)
with publish.staging(Path(sys.argv[1])) as temp:
    (temp / "file").write_text("new")
    if sys.argv[2:]:
        Path.rename = cut
        publish.publish(temp, Path(sys.argv[1]), force=True)
    os._exit(1)
"""


def killed_export(out: Path, *when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), *when], check=False, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")


def test_left_folders_of_dead_exports_go_and_everything_else_stays(tmp_path: Path) -> None:
    """Names tell nothing: those here are like the ones of our folders, and dates are like numbers of processes."""
    mine = [tmp_path / name for name in ("out.tmp-notes", "out.tmp-41949995", "out.old-20240101", "out.tmp-")]
    for folder in mine:
        folder.mkdir()
        (folder / "thesis.txt").write_bytes(b"x")
    mine.append(tmp_path / "out.tmp-empty")
    mine[-1].mkdir()
    killed_export(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == len(mine) + 1
    with publish.staging(tmp_path / "out") as live:
        assert len(list(tmp_path.iterdir())) == len(mine) + 1
        with publish.staging(tmp_path / "out") as temp:
            assert live.is_dir()
            assert temp.is_dir()
        assert live.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    assert all((folder / "thesis.txt").is_file() for folder in mine[:-1])


def test_the_checkpoint_of_a_killed_pull_is_removed_by_the_next_one(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from llava_edge.export.pull import pull
from llava_edge.models import smol
smol.write_checkpoint = lambda folder, *_, **__: (folder.mkdir(), os._exit(1) if sys.argv[2:] else sys.exit(2))
pull(Path(sys.argv[1]), print)
"""
    environment = {**os.environ, "LLAVA_EDGE_HOME": str(tmp_path)}
    for killed, left in ((["killed"], 1), ([], 0)):
        command = [sys.executable, "-c", code, str(tmp_path / "out"), *killed]
        assert subprocess.run(command, check=False, env=environment).returncode == 2 - left
        assert len(list((tmp_path / "parts").iterdir())) == left


def test_an_interruption_between_two_renames_is_undone_at_once(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(bundle_copy).manifest
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == bundle_copy and self.name == "bundle":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(publish, "_exchange_atomically", lambda temp, out: False)
    monkeypatch.setattr(Path, "rename", interrupted)

    def replaced() -> None:
        with publish.staging(bundle_copy) as temp:
            (temp / "file").write_text("new")
            publish.publish(temp, bundle_copy, force=True)

    with pytest.raises(KeyboardInterrupt):
        replaced()
    assert Bundle.open(bundle_copy).manifest == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EACCES])
def test_a_file_system_without_locks_is_enough(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody can tell dead exports' folders from those at work: they stay."""

    def unknown(file: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    killed_export(tmp_path / "out")
    monkeypatch.setattr("llava_edge.locks.fcntl.flock", unknown)
    with publish.staging(tmp_path / "out") as temp:
        assert len(list(tmp_path.iterdir())) == 2
        (temp / "file").write_text("new")
        publish.publish(temp, tmp_path / "out", force=False)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_nothing_is_enough(
    code: int, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(file: int) -> None:
        raise OSError(code, os.strerror(code))

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", unknown)
    with publish.staging(out) as temp:
        write_manifest(temp, Bundle.open(micro_bundle).manifest)
        publish.publish(temp, out, force=False)
    assert [path.name for path in out.iterdir()] == [MANIFEST]


def test_a_checkpoint_that_no_address_space_is_left_for(
    micro_checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are whole, so the sentence must not be about them."""

    def full(path: Path, *_: object) -> np.ndarray[Any, Any]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(np, "memmap", full)
    code, _, err = run("export", micro_checkpoint, tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (71, "llava-edge: Not enough memory.")


def test_a_bundle_that_has_its_name_is_not_said_to_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then a disk that fails is an error, and the old bundle stays."""
    out, fails = tmp_path / "out", list[Path]()

    def failing(file: int) -> None:
        if os.fstat(file).st_ino == fails[0].stat().st_ino:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with publish.staging(out) as temp:
        fails[:] = [temp]
        with pytest.raises(OSError, match="Input/output error"):
            publish.publish(temp, out, force=False)
        assert not out.exists()
        fails[:] = [tmp_path]
        publish.publish(temp, out, force=False)
    assert out.is_dir()


def test_a_swap_that_was_cut_between_two_renames_is_undone(bundle_copy: Path) -> None:
    before = Bundle.open(bundle_copy).manifest
    killed_export(bundle_copy, "between two renames")
    assert not bundle_copy.exists()
    with publish.staging(bundle_copy):
        assert Bundle.open(bundle_copy).manifest == before


@pytest.mark.parametrize("at_once", [True, False])
def test_replacing_swaps_whole_folders(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:  # a file system without exchange
        monkeypatch.setattr(publish, "_exchange_atomically", lambda temp, out: False)
    out, temp = tmp_path / "out", tmp_path / "temp"
    for folder in (out, temp):
        folder.mkdir()
        (folder / "who").write_text(folder.name, "utf-8")
    publish.publish(temp, out, force=True)
    assert (out / "who").read_text("utf-8") == "temp"
    assert (temp / "who").read_text("utf-8") == "out"
    assert len(list(tmp_path.iterdir())) == 2


OVERLAY = """
import errno, sys
from pathlib import Path
from llava_edge.export import publish
out, moved = Path(sys.argv[1]), Path(sys.argv[2])
try:
    out.rename(moved)
except OSError as error:
    assert error.errno == errno.EXDEV
else:  # this kernel's overlays rename folders
    moved.rename(out)
with publish.staging(out) as temp:
    (temp / "who").write_text("new")
    publish.publish(temp, out, force=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="overlays are Linux's")
def test_a_bundle_in_the_image_of_a_container_is_replaced(bundle_copy: Path, tmp_path: Path) -> None:
    """There it is in the lower layer of an overlay, whose folders cannot be renamed."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    bundle_copy.rename(tmp_path / "lower" / "out")
    mount = "mount -t overlay o -o lowerdir=lower,upperdir=upper,workdir=work merged"
    arguments = (tmp_path / "merged" / "out", tmp_path / "merged" / "moved")
    done = with_mounts(mount, sys.executable, "-c", OVERLAY, *arguments, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "upper").iterdir()] == ["out"]
    assert (tmp_path / "upper" / "out" / "who").read_text() == "new"


@pytest.mark.parametrize("content", ["", "thesis.txt"])
def test_an_interrupted_exchange_by_a_copy_is_undone_unless_the_folder_is_used(
    content: str, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(bundle_copy).manifest
    rename, rmtree = Path.rename, shutil.rmtree

    def fixed(self: Path, target: Path) -> Path:
        if self == bundle_copy:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    def interrupted(path: Path, **options: Any) -> None:
        if path != bundle_copy:
            return rmtree(path, **options)
        (bundle_copy / LANGUAGE).unlink()
        if content:
            (bundle_copy / content).write_text("x")
        raise KeyboardInterrupt

    def replaced() -> None:
        with publish.staging(bundle_copy) as temp:
            (temp / "file").write_text("new")
            publish.publish(temp, bundle_copy, force=True)

    monkeypatch.setattr(publish, "_exchange_atomically", lambda temp, out: False)
    monkeypatch.setattr(Path, "rename", fixed)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replaced()
    if content:
        assert (bundle_copy / content).exists()
        (old,) = bundle_copy.parent.glob("*.tmp-*/old")
        assert Bundle.open(old).manifest == before
    else:
        assert Bundle.open(bundle_copy).manifest == before
        assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_of_two_exports_to_one_name_the_slower_replaces_nothing(
    micro_checkpoint: Path, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster one publishes after the slower one has looked for the last time."""
    before, out, check = Bundle.open(bundle_copy).manifest.identity, tmp_path / "out", publish.check_target

    def check_and_lose(target: Path, force: bool) -> None:
        check(target, force)
        if any(tmp_path.glob("out.tmp-*")):
            bundle_copy.rename(out)

    monkeypatch.setattr(publish, "check_target", check_and_lose)
    with pytest.raises(StorageError, match="not empty"):
        export(ExportOptions(micro_checkpoint, out, quant="f16", vision="fp32"))
    assert Bundle.open(out).manifest.identity == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_takes_no_picture_encoder_is_noticed_first(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the old file in it may be written: the new one is made beside it."""
    mmproj = tmp_path / "mmproj.gguf"
    write_mmproj(open_checkpoint(micro_checkpoint), mmproj, "old")
    options = ExportOptions(micro_checkpoint, tmp_path / "out", force=True, emit_mmproj=mmproj)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"^A picture encoder for llama\.cpp needs"):
        export(options)
    monkeypatch.setattr("llava_edge.export.mmproj.write_problem", lambda folder: "Permission denied")
    with pytest.raises(CannotCreateError, match=r"folder takes no files \(Permission denied\)"):
        export(options)
    assert list(tmp_path.iterdir()) == [mmproj]


# --- faults while writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "reason"), [(3_000, "File too large"), (0, "No usable temporary directory found")])
def test_a_full_disk_is_not_taken_for_a_broken_build(size: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # looked for again, by writing a file
    said = f"llama_cpp could not be tested in a temporary folder: {reason}"
    with largest_file(size), pytest.raises(StorageError, match=said):
        probe.check("llama_cpp")


@pytest.mark.parametrize("size", [3_000, 100_000, 320_000, 1_500_000])
def test_a_write_that_fails_keeps_the_old_bundle(
    size: int, micro_checkpoint: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limits fall into vision.onnx, its data, the projector and the float16 language file."""
    before = Bundle.open(bundle_copy).manifest
    probe.require_working_build()  # remembered, so that the export does not write its test files
    command = ["export", str(micro_checkpoint), str(bundle_copy), "--force", "--quant", "q4_0", "--vision", "fp32"]
    with largest_file(size):
        assert cli.execute(command) == StorageError.exit_code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("llava-edge: ")
    assert "File too large" in said or "as when the disk is full" in said
    assert Bundle.open(bundle_copy).manifest == before
    Bundle.open(bundle_copy).verify()
    assert [path for path in bundle_copy.parent.iterdir() if ".tmp-" in path.name] == []


def test_a_quantizer_that_cannot_write_says_why(
    float16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bindings.library().llama_log_set(bindings._callbacks[0], None)  # which llama_cpp takes, where a test imported it
    with largest_file(100_000), pytest.raises(StorageError, match=r"^llama\.cpp could not write.*MiB are free"):
        quantize(float16, tmp_path / "quantized", "q4_0")
    assert capfd.readouterr().err == ""


EXPORTS = """
import os, sys
sys.modules["torch"] = None  # parity would only make the run longer
from pathlib import Path
import onnx, gguf, onnxruntime, llama_cpp.llama_cpp
from llava_edge.export.exporter import ExportOptions, export
options = ExportOptions(Path(sys.argv[1]), Path(sys.argv[2]), quant="f16", vision="fp32", force=True)
for _ in sys.stdin:
    if (child := os.fork()) == 0:
        export(options)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_killed_at_any_moment_there_is_one_whole_bundle(micro_checkpoint: Path, bundle_copy: Path) -> None:
    before, whole, killed = Bundle.open(bundle_copy).manifest, 0.0, 0
    moments = np.random.default_rng(0)
    command = [sys.executable, "-c", EXPORTS, str(micro_checkpoint), str(bundle_copy)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    ) as exports:
        assert exports.stdin
        assert exports.stdout
        for attempt in range(6):
            exports.stdin.write("\n")
            child, start = int(exports.stdout.readline()), time.monotonic()
            if attempt:
                time.sleep(float(moments.uniform(0, whole)))
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            killed += int(exports.stdout.readline()) == -signal.SIGKILL
            if not attempt:  # undisturbed, to know how long it takes
                whole = time.monotonic() - start
            bundle = Bundle.open(bundle_copy)
            bundle.verify()
            assert bundle.manifest != before
            assert len([path for path in bundle_copy.parent.iterdir() if ".tmp-" in path.name]) <= 1
    assert killed >= 3
    export(ExportOptions(micro_checkpoint, bundle_copy, quant="f16", vision="fp32", force=True))
    assert [path for path in bundle_copy.parent.iterdir() if ".tmp-" in path.name] == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_export_leaves_nothing_behind(kind: signal.Signals, micro_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llava_edge", "export", str(micro_checkpoint), str(out)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    while "projector" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(kind)
    rest = child.stderr.read()
    assert child.wait(60) == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
    child.stderr.close()


def test_exit_codes_of_the_command(micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for source, out, kind in (
        (tmp_path / "nowhere", tmp_path / "out", MissingError),
        (micro_checkpoint, tmp_path / "file", CannotCreateError),
        (micro_checkpoint, tmp_path / "file" / "out", CannotCreateError),
    ):
        assert cli.execute(["export", str(source), str(out)]) == kind.exit_code
        assert capsys.readouterr().out == ""


def test_nothing_has_its_name_before_it_is_on_disk(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power leaves what was flushed: the files before the bundle has its name, then the name."""
    out, mmproj = tmp_path / "out", tmp_path / "mmproj.gguf"
    flushed, fsync = dict[int, tuple[bool, bool]](), os.fsync

    def watched(file: int) -> None:
        fsync(file)
        flushed[os.fstat(file).st_ino] = mmproj.exists(), out.exists()

    monkeypatch.setattr(os, "fsync", watched)
    export(ExportOptions(micro_checkpoint, out, quant="f16", vision="fp32", emit_mmproj=mmproj))
    assert flushed[mmproj.stat().st_ino] == (False, False)
    assert {path.name for path in out.iterdir()} == {MANIFEST, "vision.onnx", VISION_DATA, "projector.gguf", LANGUAGE}
    assert {flushed.get(path.stat().st_ino) for path in (out, *out.iterdir())} == {(True, False)}
    assert flushed[tmp_path.stat().st_ino] == (True, True)


BROKEN_TORCH = "raise ImportError('libtorch_cpu.so: failed to map segment from shared object', name='_C')"


def test_a_torch_that_cannot_be_loaded_is_not_called_missing(micro_checkpoint: Path, tmp_path: Path) -> None:
    """As with too little memory for it; installing it again would not help."""
    (tmp_path / "torch.py").write_text(BROKEN_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command, code in (
        (["export", micro_checkpoint, tmp_path / "out"], 0),
        (["export", micro_checkpoint, tmp_path / "other", "--imatrix"], 69),
        (["verify", tmp_path / "out", "--against", micro_checkpoint], 69),
        (["train", "micro", "--out", tmp_path / "run", "--data", tmp_path / "data"], 69),
    ):
        script = "import sys; from llava_edge.cli import execute; print(execute(sys.argv[1:]))"
        done = in_child(script, *map(str, command), environment=environment)
        assert done.stdout.splitlines()[-1] == str(code)
        assert "cannot be loaded: libtorch_cpu.so: failed to map segment from shared object." in done.stderr
        assert "not installed" not in done.stderr
        assert "_C" not in done.stderr


NO_MACHINE_CODE = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, since Linux 6.3
    sys.exit(print("unsupported"))
from llava_edge.cli import execute
print(execute(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_torch_computes_where_no_machine_code_may_be_made(micro_checkpoint: Path, tmp_path: Path) -> None:
    """As in a service with MemoryDenyWriteExecute: oneDNN, which makes some, could not create a primitive."""
    recipe = tmp_path / "brief.toml"
    recipe.write_text((FOLDER / "micro.toml").read_text().replace("epochs = 8", "epochs = 0.3"))
    for command in (
        ["export", micro_checkpoint, tmp_path / "out", "--imatrix"],
        ["train", recipe, "--out", tmp_path / "run", "--data", tmp_path / "data"],
    ):
        done = in_child(NO_MACHINE_CODE, *map(str, command))
        if "unsupported" in done.stdout:
            pytest.skip("this kernel cannot forbid it")
        assert done.stdout.splitlines()[-1] == "0", done.stderr
