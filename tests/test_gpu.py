"""Graphics processors: what is given to them, and, where there is one (`pytest -m gpu`), that it computes the same."""

from __future__ import annotations

import ctypes
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from processes import in_child
from towers import TOWER, clip_tower, relative, some_pixels

from llava_edge import EngineOptions, Llava, Options
from llava_edge.bundle import LANGUAGE, VISION, Bundle
from llava_edge.errors import BundleError, MemoryLimitError
from llava_edge.export.clip_onnx import write_clip
from llava_edge.models.config import LlavaConfig
from llava_edge.runtimes import bindings, devices, float_graph
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.vision import VisionEncoder

SHORT = Options(max_tokens=24)
COLOURS = ("red", "green", "blue", "yellow")


@pytest.mark.parametrize("fine_blocks", [0, 1, 2])
def test_an_int8_tower_in_float_multiplies_no_integers_and_gives_what_its_weights_do(
    fine_blocks: int, tmp_path: Path
) -> None:
    tensors = clip_tower()[1]
    for name in ("fp32", "int8"):
        (tmp_path / name).mkdir()
        write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path / name, name, fine_blocks if name == "int8" else 0)
    changed = tmp_path / "int8" / "changed.onnx"
    changed.write_bytes(float_graph.to_float((tmp_path / "int8" / VISION).read_bytes()) or b"")
    assert float_graph.to_float((tmp_path / "fp32" / VISION).read_bytes()) is None
    onnx.checker.check_model(changed)
    kinds = Counter(node.op_type for node in onnx.load(changed, load_external_data=False).graph.node)
    assert kinds["MatMulInteger"] == kinds["QuantizeLinear"] == 0
    assert kinds["DequantizeLinear"] == 8 + 4 * fine_blocks  # two blocks are run, of four layers each
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    wanted, int8, found = (
        onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]).run(
            None, {"pixels": some_pixels()}
        )
        for path in (tmp_path / "fp32" / VISION, tmp_path / "int8" / VISION, changed)
    )
    for output in (0, 1):  # features, attention
        assert relative(found[output], int8[output]) < 2e-3  # what rounding activations costs
        assert relative(found[output], wanted[output]) < (1e-4 if fine_blocks == 2 else 2e-2)


def test_graphs_with_graphs_of_their_own_stay(tmp_path: Path) -> None:
    """What only those use would be left out."""
    write_clip(LlavaConfig(vision=TOWER), clip_tower()[1], tmp_path, "int8")
    model = onnx.load(tmp_path / VISION, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("If", ["on"], ["out"]))
    assert float_graph.to_float(model.SerializeToString()) is None


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_what_cuda_is_asked_for(
    precision: str, colours: Path, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def session(graph: Any, settings: Any, **kwargs: Any) -> Any:
        asked.update(kwargs, graph=graph, settings=settings)
        raise RuntimeError("nothing here is a GPU")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    bundle = Bundle.open(colours if precision == "int8" else micro_bundle)
    with pytest.raises(BundleError, match="nothing here is a GPU"):
        VisionEncoder(bundle, 1, "CUDAExecutionProvider", native=True)
    (provider, options), *others = asked["providers"]
    assert (provider, others) == ("CUDAExecutionProvider", [])
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    if precision == "int8":
        kinds = {node.op_type for node in onnx.load_from_string(asked["graph"]).graph.node}
        assert not kinds & {"MatMulInteger", "Linear"}
        assert asked["disabled_optimizers"] == {"ConstantFolding"}
        assert asked["settings"].get_session_config_entry("session.disable_quant_qdq") == "1"
    else:
        assert asked["graph"] == str(bundle.part(VISION))
        assert not asked["disabled_optimizers"]


@pytest.mark.parametrize("gpu_layers", [0, -1])
def test_llama_cpp_is_shown_no_gpu_unless_layers_are_for_one(
    gpu_layers: int, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, shown = bindings.library(), list[Any]()
    real = api.llama_model_load_from_file

    def load(path: bytes, settings: Any) -> Any:
        listed = settings.devices and ctypes.cast(settings.devices, ctypes.POINTER(ctypes.c_void_p))[0]
        shown.append((settings.devices is None, listed))
        return real(path, settings)

    monkeypatch.setattr(api, "llama_model_load_from_file", load)
    LanguageModel(micro_bundle / LANGUAGE, context=64, threads=1, gpu_layers=gpu_layers).close()
    assert shown == [(True, None) if gpu_layers else (False, None)]


def test_a_provider_that_starts_is_known_to() -> None:
    assert devices._provider_works("CPUExecutionProvider")


@pytest.fixture(scope="module")
def cuda() -> None:
    lacks = devices.unavailable_reason("cuda")
    if lacks:
        pytest.skip(lacks)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_features_are_those_of_the_processor(colours: Path) -> None:
    bundle = Bundle.open(colours)
    side = bundle.manifest.preprocessing.image_size
    pixels = np.random.default_rng(0).standard_normal((3, side, side), np.float32)
    wanted = VisionEncoder(bundle, 1, "CPUExecutionProvider").encode(pixels)
    found = VisionEncoder(bundle, 1, "CUDAExecutionProvider").encode(pixels)
    assert relative(found, wanted) < 1e-2  # TF32 keeps 10 bits of a factor


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_it_answers_as_the_processor_does(colours: Path) -> None:
    answers = {}
    for device in ("cpu", "cuda"):
        with Llava.load(colours, EngineOptions(device=device, cache=False)) as llava:
            assert llava.device.split()[0] == device
            answers[device] = [
                llava.ask("What colour is this?", Image.new("RGB", (48, 48), colour), SHORT).text for colour in COLOURS
            ]
    assert answers["cuda"] == answers["cpu"]
    assert len(set(answers["cpu"])) == len(COLOURS)


ANSWERS = """
import json, sys
from PIL import Image
from llava_edge import EngineOptions, Llava, Options
with Llava.load(sys.argv[1], EngineOptions(device="cuda", cache=sys.argv[2] == "kept")) as llava:
    picture, found = Image.new("RGB", (48, 48), "red"), []
    for prompt in ("What colour is this?", "Is it blue? Why?"):
        *_, last = chunks = list(llava.stream(prompt, picture, Options(max_tokens=24, top_logprobs=5)))
        chances = [token.logprob for chunk in chunks for token in chunk.chances]
        found.append([last.final.text, last.final.cache, chances])
print(json.dumps(found))
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_what_is_kept_of_a_picture_gives_the_same_bits_in_another_process(colours: Path) -> None:
    plain, first, second = (json.loads(in_child(ANSWERS, colours, kept).stdout) for kept in ("no", "kept", "kept"))
    assert [hit for _, hit, _ in plain] == ["miss", "kv"]
    assert [hit for _, hit, _ in first] == ["miss", "kv"]
    assert [hit for _, hit, _ in second] == ["kv", "kv"]
    for computed, kept, again in zip(plain, first, second, strict=True):
        assert computed[0] == kept[0] == again[0]
        assert computed[2] == kept[2] == again[2]


LOGITS = """
import sys, threading
from pathlib import Path
from llava_edge.runtimes.language import LanguageModel
model = LanguageModel(Path(sys.argv[1]), context=256, threads=1)
model.evaluate_tokens([token % 200 for token in range(128)], threading.Event())
print(model.logits().tobytes().hex())
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_processor_computes_alone_if_that_is_asked_for(colours: Path) -> None:
    hidden = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    found = [in_child(LOGITS, colours / LANGUAGE, environment=given).stdout for given in (None, hidden)]
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_context_too_large_for_it_is_refused_in_a_sentence(colours: Path) -> None:
    with pytest.raises(MemoryLimitError, match="cannot create a context"):
        LanguageModel(colours / LANGUAGE, context=1 << 30, threads=1, gpu_layers=-1)
