"""Checkpoints become bundles that compute what transformers computes, and wrong conversions are noticed."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from images import picture
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from pairs import in_halves
from PIL import Image
from processes import in_child
from safetensors.numpy import load_file, save_file
from towers import TOWER, clip_tower, relative, some_pixels
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HfLlavaConfig

from llava_edge.bundle import LANGUAGE, PROJECTOR, VISION, VISION_DATA, Bundle, ParityRow
from llava_edge.errors import UsageError
from llava_edge.export import clip_onnx, exporter, llm_gguf, parity, tower
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.clip_onnx import Precision, write_clip
from llava_edge.export.exporter import ExportOptions, ParityError, export
from llava_edge.export.projector import tensor_names, write_projector
from llava_edge.export.quantize import Quant, quantize
from llava_edge.export.tokenizer import read_tokenizer
from llava_edge.models import llama_gguf, micro
from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import VISION_PREFIX, vision_shapes
from llava_edge.runtimes import machine
from llava_edge.runtimes import projector as runtime_projector
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder


def run_onnx(folder: Path, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(folder / VISION, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["features"], {"pixels": pixels})[0])


@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_the_tower_computes_the_hidden_state_that_transformers_does(layer: int, feature: Any, tmp_path: Path) -> None:
    tower, tensors = clip_tower()
    config = LlavaConfig(vision=TOWER, vision_feature_layer=layer, feature=feature)
    write_clip(config, tensors, tmp_path, "fp32")
    with torch.no_grad():
        states = tower(torch.from_numpy(some_pixels(2)), output_hidden_states=True).hidden_states
    wanted = states[layer].numpy()[:, 1 if feature == "patch" else 0 :]
    ours = run_onnx(tmp_path, some_pixels(2))
    assert ours.shape == (2, config.image_tokens, 64)
    assert relative(ours, wanted) < 3e-6
    others = [state.numpy()[:, 1 if feature == "patch" else 0 :] for state in states]
    assert sum(relative(ours, other) < 1e-2 for other in others) == 1  # no other layer would have passed


@pytest.mark.filterwarnings("ignore")  # PyTorch's, about the tracer that Optimum uses
def test_the_tower_is_the_one_that_optimum_exports(tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.exporters.onnx", reason="no optimum-onnx", exc_type=ImportError)
    tower, tensors = clip_tower()
    optimum.onnx_export_from_model(tower, tmp_path / "theirs", task="feature-extraction", do_validation=False)
    theirs = onnxruntime.InferenceSession(tmp_path / "theirs" / "model.onnx")
    (wanted,) = theirs.run(["last_hidden_state"], {"pixel_values": some_pixels(2)})
    write_clip(LlavaConfig(vision=TOWER, vision_feature_layer=-1, feature="cls_patch"), tensors, tmp_path, "fp32")
    assert relative(run_onnx(tmp_path, some_pixels(2)), wanted) < 3e-6


def test_pooling_averages_neighbouring_patches(tmp_path: Path) -> None:
    tower, tensors = clip_tower()
    write_clip(LlavaConfig(vision=TOWER, image_pool=2), tensors, tmp_path, "fp32")
    with torch.no_grad():
        state = tower(torch.from_numpy(some_pixels(2)), output_hidden_states=True).hidden_states[-2][:, 1:]
        grid = state.transpose(1, 2).reshape(2, 64, 6, 6)
        wanted = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2).numpy()
    assert relative(run_onnx(tmp_path, some_pixels(2)), wanted) < 3e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_graph_is_plain_and_its_weights_can_be_mapped(precision: Precision, tmp_path: Path) -> None:
    write_clip(LlavaConfig(vision=TOWER), clip_tower()[1], tmp_path, precision)
    onnx.checker.check_model(str(tmp_path / VISION), full_check=True)
    model = onnx.load(tmp_path / VISION, load_external_data=False)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [VISION, VISION_DATA]
    size, end = (tmp_path / VISION_DATA).stat().st_size, 0
    outside = [item for item in model.graph.initializer if item.external_data]
    assert len(outside) >= 10
    for item in outside:
        place = {entry.key: entry.value for entry in item.external_data}
        assert place["location"] == VISION_DATA
        assert int(place["offset"]) >= end
        assert int(place["offset"]) % 64 == 0
        end = int(place["offset"]) + int(place["length"])
    assert end == size
    # Two of three blocks are needed for layer -2; weights of the third are nowhere.
    assert not [item.name for item in model.graph.initializer if "layers.2." in item.name]


def test_large_weights_begin_on_a_page(tmp_path: Path) -> None:
    wide = replace(TOWER, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8)
    config = LlavaConfig(vision=wide, vision_feature_layer=-1)
    tensors = {name: np.ones(shape, np.float32) for name, shape in vision_shapes(config).items()}
    write_clip(config, tensors, tmp_path, "fp32")
    graph = onnx.load(tmp_path / VISION, load_external_data=False).graph
    offsets = [
        int(item.external_data[1].value)
        for item in graph.initializer
        if np.prod(item.dims) * 4 >= clip_onnx.MAP_FROM_BYTES
    ]
    assert len(offsets) >= 3
    assert not any(offset % 4096 for offset in offsets)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 2e-2)])
def test_precisions_cost_what_they_should(precision: Precision, limit: float, tmp_path: Path) -> None:
    tensors = clip_tower()[1]
    for name in ("fp32", precision):
        (tmp_path / name).mkdir(exist_ok=True)
        write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path / name, name)
    wanted = run_onnx(tmp_path / "fp32", some_pixels())
    error = relative(run_onnx(tmp_path / precision, some_pixels()), wanted)
    assert error <= limit
    assert precision == "fp32" or error > 1e-6  # otherwise nothing was reduced


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_picture_is_encoded_the_same_alone_and_in_a_batch(precision: Precision, tmp_path: Path) -> None:
    write_clip(LlavaConfig(vision=TOWER), clip_tower()[1], tmp_path, precision)
    pixels = some_pixels(3)
    pixels[0] *= 20
    together = run_onnx(tmp_path, pixels)
    alone = np.concatenate([run_onnx(tmp_path, pixels[i : i + 1]) for i in range(3)])
    assert relative(together, alone) < 1e-5


def test_int8_takes_no_batch_in_which_pictures_would_change_each_other(tmp_path: Path) -> None:
    write_clip(LlavaConfig(vision=TOWER), clip_tower()[1], tmp_path, "int8")
    with pytest.raises(InvalidArgument, match="Got: 2 Expected: 1"):
        run_onnx(tmp_path, some_pixels(2))


def test_int8_multiplies_integers_only_and_early_blocks_can_be_finer(tmp_path: Path) -> None:
    tensors = clip_tower()[1]
    errors = []
    write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path, "fp32")
    wanted = run_onnx(tmp_path, some_pixels())
    for fine_blocks, products in ((0, 16), (1, 20), (2, 24)):
        write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path, "int8", fine_blocks)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(tmp_path / VISION, settings, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
        kinds = Counter(node.op_type for node in nodes)
        assert kinds["MatMulIntegerToFloat"] == products
        assert kinds["MatMul"] + kinds["FusedMatMul"] == 5  # of attention; no weight is multiplied in float32
        errors.append(relative(session.run(None, {"pixels": some_pixels()})[0], wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3  # what activations of 14 bits leave


@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize("bits", [7, 8])
def test_slower_products_are_asked_for_only_where_sums_would_saturate(
    saturates: bool, bits: Any, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    session = onnxruntime.InferenceSession

    def watched(path: Path, settings: Any, **kwargs: Any) -> Any:
        with suppress(RuntimeError):  # for an entry that is not there
            seen.append(settings.get_session_config_entry("session.x64quantprecision"))
        return session(path, onnxruntime.SessionOptions(), **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    flags = ["avx2"] if saturates else ["avx2", "avx512_vnni"]
    monkeypatch.setattr(machine, "processor", lambda: ("a processor", flags))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    bundle = Bundle.open(micro_bundle)
    vision = replace(bundle.manifest.vision, precision="int8", activation_bits=bits)
    VisionEncoder(Bundle(bundle.folder, replace(bundle.manifest, vision=vision)), 1, "CPUExecutionProvider")
    assert seen == (["1"] if saturates and bits == 8 else [])


@pytest.mark.parametrize("activation", [3.0, -3.0])
def test_int8_products_are_exact_with_the_largest_weights_on_this_processor(activation: float, tmp_path: Path) -> None:
    """All weights 127, all activations the largest: what overflows 16 bits first. Rearranged weights give the same.
    One output's weights are all zero, which have no scale."""
    tensors = dict(clip_tower()[1])
    for name, value in tensors.items():
        if ".layers.0.mlp.fc1.weight" in name:
            tensors[name] = np.full_like(value, 0.02)
            tensors[name][0] = 0
        if ".layers.0.layer_norm2." in name:  # its output is the same everywhere
            tensors[name] = np.full_like(value, activation if name.endswith("bias") else 0.0)
    found = []
    for precision in ("fp32", "int8"):
        write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path, precision)
        found.append(run_onnx(tmp_path, some_pixels()))
    assert relative(found[1], found[0]) < 2e-2
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / VISION, settings, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["features"], {"pixels": some_pixels()})[0], found[1])


def test_outliers_among_the_activations_do_not_blur_the_rest(tmp_path: Path) -> None:
    """One channel 200 times larger than the others takes the whole range of a single int8 term, but not of two."""
    tensors = dict(clip_tower()[1])
    for norm in ("layer_norm1", "layer_norm2"):
        name = f"{VISION_PREFIX}encoder.layers.0.{norm}.weight"
        tensors[name] = tensors[name] * np.where(np.arange(64) == 5, np.float32(200), np.float32(1))
    for number in range(2):  # weights that int8 holds exactly, so that only activations are rounded
        for linear in ("mlp.fc1", "mlp.fc2", "self_attn.out_proj", *(f"self_attn.{kind}_proj" for kind in "qkv")):
            name = f"{VISION_PREFIX}encoder.layers.{number}.{linear}.weight"
            values, scale = clip_onnx.quantize_columns(tensors[name].T)
            tensors[name] = (values * scale).T
    outputs = []
    for precision in ("fp32", "int8"):
        write_clip(LlavaConfig(vision=TOWER), tensors, tmp_path, precision)
        outputs.append(run_onnx(tmp_path, some_pixels()))
    assert relative(outputs[1], outputs[0]) < 1e-2


# --- whole checkpoints -----------------------------------------------------------------------------------------


def hf_model(tie: bool = False) -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    config = HfLlavaConfig(
        text_config=LlamaConfig(
            vocab_size=288,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tie,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(**vars(TOWER)),
        image_token_index=287,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie,
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.05))
    if tie:
        model.tie_weights()
    return model


def save_hf(model: LlavaForConditionalGeneration, folder: Path, **settings: Any) -> Path:
    """transformers' own writer, plus our tokenizer and template."""
    model.save_pretrained(folder, **settings)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    raw["llava_edge"] = {"template": "chatml"}
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(micro.tokenizer_json()), "utf-8")
    return folder


@pytest.mark.parametrize("tie", [False, True])
def test_an_exported_transformers_model_answers_like_transformers(tie: bool, tmp_path: Path) -> None:
    model = hf_model(tie)
    out = tmp_path / "bundle"
    manifest = export(ExportOptions(save_hf(model, tmp_path / "hf"), out, quant="f16", vision="fp32"))
    assert all(row.passed for row in manifest.parity)
    bundle = Bundle.open(out)
    before, after, pixels = [1, 20, 30, 40], [50, 60, 70], some_pixels()
    ids = torch.tensor([before + [287] * manifest.vision.image_tokens + after])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=torch.from_numpy(pixels)).logits[0, -1].numpy()
    embeds = Projector(bundle).project(VisionEncoder(bundle, 1, "CPUExecutionProvider").encode(pixels[0]))
    ours = engine_logits(out / LANGUAGE, before, embeds, after)
    assert float(ours @ wanted / np.linalg.norm(ours) / np.linalg.norm(wanted)) > 0.9999
    assert ours.argmax() == wanted.argmax()
    reversed_patches = engine_logits(out / LANGUAGE, before, embeds[::-1].copy(), after)
    assert relative(reversed_patches, wanted) > 5 * relative(ours, wanted)  # the comparison sees the picture


def engine_logits(path: Path, before: list[int], embeds: np.ndarray[Any, Any], after: list[int]) -> Any:
    never = threading.Event()
    with closing(LanguageModel(path, context=128, threads=1)) as engine:
        engine.evaluate_tokens(before, never)
        engine.evaluate_embeddings(embeds, [("picture", i) for i in range(len(embeds))], never)
        engine.evaluate_tokens(after, never)
        return engine.logits().copy()


def rename(tensors: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Classic names -> those of newer transformers, as its own conversion tables have them."""
    if scheme == "classic":
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        )
        if name.startswith(("vision_tower", "multi_modal_projector")):
            name = f"model.{name}"
        renamed[name.replace("vision_tower.vision_model.", "vision_tower.") if scheme == "v5" else name] = value
    return renamed


@pytest.mark.parametrize("scheme", ["classic", "4.52", "v5"])
@pytest.mark.parametrize("form", ["single", "sharded", "pickle", "bfloat16"])
def test_every_layout_reads_as_the_same_tensors(scheme: str, form: str, micro_checkpoint: Path, tmp_path: Path) -> None:
    classic = load_file(micro_checkpoint / "model.safetensors")
    stored = rename(classic, scheme)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((micro_checkpoint / name).read_bytes())
    if form == "single":
        save_file(stored, tmp_path / "model.safetensors")
    elif form == "sharded":
        write_shards(stored, tmp_path)
    elif form == "pickle":
        torch.save({name: torch.from_numpy(value) for name, value in stored.items()}, tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file as save_torch

        classic = {name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in classic.items()}
        halves = {name: torch.from_numpy(value).bfloat16() for name, value in rename(classic, scheme).items()}
        save_torch(halves, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path).tensors
    assert set(tensors) < set(classic)  # the tower's unused end is left out
    for name in tensors:
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], classic[name]), name


def write_shards(tensors: Mapping[str, Any], folder: Path) -> None:
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), "utf-8")


def test_what_transformers_writes_today_is_read(tmp_path: Path) -> None:
    model = hf_model()
    tensors = open_checkpoint(save_hf(model, tmp_path / "one")).tensors
    sharded = open_checkpoint(save_hf(model, tmp_path / "many", max_shard_size="100KB")).tensors
    state = model.state_dict()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    for found in (tensors, sharded):
        assert np.array_equal(found[name], state["model.language_model.layers.1.mlp.down_proj.weight"].numpy())


@pytest.mark.parametrize("quant", ["q4_k_m", "q4_0", "q5_k_m", "q8_0", "f16"])
def test_each_quantization_is_what_it_says(quant: Quant, micro_checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(ExportOptions(micro_checkpoint, tmp_path / "out", quant=quant, vision="int8"))
    assert manifest.language.quantization == quant
    assert (manifest.vision.precision, manifest.vision.activation_bits) == ("int8", 7)
    stored = {item.name: item.tensor_type.name for item in GGUFReader(tmp_path / "out" / LANGUAGE).tensors}
    wanted = {"q4_k_m": "Q4_K", "q4_0": "Q4_0", "q5_k_m": "Q5_K", "q8_0": "Q8_0", "f16": "F16"}[quant]
    assert stored["blk.0.attn_q.weight"] == wanted
    assert stored["output.weight"] == {"q8_0": "Q8_0", "f16": "F16"}.get(quant, "Q6_K")
    assert stored["blk.0.attn_norm.weight"] == stored["output_norm.weight"] == "F32"
    assert len(stored) == 2 * 9 + 3
    rows = {row.stage: row.value for row in manifest.parity}
    languages = {f"{row} {kind}" for row in ("logits", "greedy") for kind in ("f16", quant)}
    assert {"pixels", "clip fp32", "clip int8", "attention int8", "projector", "embeddings"} | languages == set(rows)
    assert rows["clip fp32"] < rows["clip int8"]
    Bundle.open(tmp_path / "out").verify()


def test_q4_k_m_keeps_six_bits_in_the_layers_llama_cpp_says(tmp_path: Path) -> None:
    """Of 7B: value and down projection of half of the layers, as in its published files."""
    from gguf import GGUFReader

    layers, fine = 32, {*range(4), *range(6, 28, 3), *range(28, 32)}
    text = replace(micro.CONFIG.text, num_hidden_layers=layers, intermediate_size=256, num_key_value_heads=4)
    folder = micro.write_checkpoint(tmp_path / "checkpoint", config=replace(micro.CONFIG, text=text))
    checkpoint = open_checkpoint(folder)
    llm_gguf.write_language(checkpoint, read_tokenizer(folder, checkpoint.config), tmp_path / "f16.gguf", "test")
    quantize(tmp_path / "f16.gguf", tmp_path / "q.gguf", "q4_k_m")
    kinds = {item.name: item.tensor_type.name for item in GGUFReader(tmp_path / "q.gguf").tensors}
    for name in ("attn_v", "ffn_down"):
        assert {n for n in range(layers) if kinds[f"blk.{n}.{name}.weight"] == "Q6_K"} == fine
    assert Counter(kinds.values()) == {
        "Q6_K": 2 * len(fine) + 1, "Q4_K": 7 * layers + 1 - 2 * len(fine), "F32": 2 * layers + 1
    }  # fmt: skip


def test_the_fields_of_the_language_file(micro_checkpoint: Path, micro_bundle: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(micro_bundle / LANGUAGE).fields
    text = micro.CONFIG.text
    wanted = {
        "general.architecture": "llama",
        "llama.block_count": text.num_hidden_layers,
        "llama.context_length": text.max_position_embeddings,
        "llama.attention.head_count_kv": text.num_key_value_heads,
        "llama.rope.dimension_count": text.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(text.rms_norm_eps)
    assert fields["llama.rope.freq_base"].contents() == pytest.approx(text.rope_theta)


def test_the_permutation_undoes_what_the_importer_does() -> None:
    weight = np.arange(24 * 3).reshape(24, 3)
    assert np.array_equal(llama_gguf.unpermute(llama_gguf.permute(weight, 3), 3), weight)
    # One head of 8 rows: halves 0..3 and 4..7 become neighbours.
    assert llama_gguf.permute(weight[:8], 1)[:, 0].tolist() == weight[[0, 4, 1, 5, 2, 6, 3, 7], 0].tolist()


# --- negative controls: each classic mistake, made on purpose, must stop the export ------------------------------


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = clip_onnx._tower
    monkeypatch.setattr(
        clip_onnx, "_tower", lambda graph, config, *rest: right(graph, replace(config, vision_feature_layer=-3), *rest)
    )


def erf_gelu_in_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    right = clip_onnx._Graph.scalar
    monkeypatch.setattr(clip_onnx._Graph, "scalar", lambda self, value: right(self, 1.6 if value == 1.702 else value))


def class_token_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts at the class token and ends one patch early: right in shape, wrong in content."""
    right = clip_onnx._Graph.node

    def node(self: Any, op: str, *inputs: str, **attributes: Any) -> str:
        if op == "Slice":
            inputs = (inputs[0], self.ints(0), self.ints(-1), inputs[3])
        return right(self, op, *inputs, **attributes)

    monkeypatch.setattr(clip_onnx._Graph, "node", node)


def values_taken_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    right = clip_onnx._class_attention

    def attention(graph: Any, *rest: Any) -> str:
        with monkeypatch.context() as patch:
            index = graph.index
            patch.setattr(graph, "index", lambda value: index(2 if value == 1 else value))
            return right(graph, *rest)

    monkeypatch.setattr(clip_onnx, "_class_attention", attention)


def test_biases_of_a_projector_are_never_rounded(tmp_path: Path) -> None:
    """They may be float32 beside weights that float16 holds exactly."""
    tensors = micro.random_tensors()
    weights = {
        name: tensors[name].astype(np.float16).astype(np.float32) for name in tensor_names(micro.CONFIG).values()
    }
    biases = {name: value + np.float32(1e-5) for name, value in tensors.items() if name.endswith(".bias")}
    precise = weights | {name: biases[name] for name in weights if name in biases}
    assert write_projector(micro.CONFIG, precise, tmp_path / PROJECTOR, "micro") == "f16"
    read = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / PROJECTOR).tensors}
    assert all(np.array_equal(read[name], precise[source]) for name, source in tensor_names(micro.CONFIG).items())


def tanh_gelu_in_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    def gelu(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)

    monkeypatch.setattr(runtime_projector, "gelu", gelu)


def no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_gguf, "permute", lambda weight, heads: weight)


def cropped_instead_of_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporter._preprocessing
    monkeypatch.setattr(exporter, "_preprocessing", lambda checkpoint: replace(right(checkpoint), square="crop"))


@pytest.mark.parametrize(
    ("mistake", "stage"),
    [
        (cropped_instead_of_padded, "pixels"),
        (wrong_layer, "clip fp32"),
        (erf_gelu_in_clip, "clip fp32"),
        (class_token_kept, "clip fp32"),
        (values_taken_for_keys, "attention fp32"),
        (tanh_gelu_in_projector, "projector"),
        (no_permutation, "logits f16"),
    ],
)
def test_a_wrong_conversion_is_not_published(
    mistake: Any, stage: str, micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    options = ExportOptions(micro_checkpoint, tmp_path / "out", quant="f16", vision="fp32")
    with pytest.raises(ParityError, match=stage) as caught:
        export(options)
    assert list(tmp_path.iterdir()) == []
    failed = {row.stage for row in caught.value.rows if not row.passed}
    # Each stage gets the reference's input, so the fault is named where it is; some rows show what comes of it.
    follows = {"embeddings", "greedy f16"} | ({"attention fp32"} if stage == "clip fp32" else set())
    assert failed - follows == {stage}
    assert caught.value.rows[-1].stage == stage  # worst last


def test_a_wrong_conversion_is_published_where_that_is_forced(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_permutation(monkeypatch)
    options = ExportOptions(micro_checkpoint, tmp_path / "out", quant="f16", vision="fp32", force_publish=True)
    manifest = export(options)
    assert not manifest.parity[-1].passed
    assert Bundle.open(tmp_path / "out").manifest == manifest


def test_a_file_that_does_not_hold_its_source_is_not_published(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.errors import CheckpointError

    names = llama_gguf.tensor_names
    right = llm_gguf.write_language

    def swapped(*arguments: Any) -> None:
        gate, up = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
        with monkeypatch.context() as patch:
            patch.setattr(llm_gguf, "tensor_names", lambda c: {**names(c), gate: names(c)[up], up: names(c)[gate]})
            right(*arguments)

    monkeypatch.setattr("llava_edge.export.exporter.write_language", swapped)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_(gate|up)\.weight as F16 is off by 1\.4"):
        export(ExportOptions(micro_checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_greedy_answers_are_the_references_and_eight_bits_nearly_so(tmp_path: Path) -> None:
    """64 tokens behind a picture, 12 models. llama.cpp rounds activations to float16, so that where a random model's
    two best tokens are within 0.5 % of the logits' spread either may win; everywhere else float16 gives the same. How
    many such places there are depends on the processor's kernels: of 768 tokens 7 are let pass."""
    image = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32) * 0.5
    agreements: dict[str, list[float]] = {"f16": [], "q8_0": []}
    for seed in range(12):
        checkpoint = open_checkpoint(
            micro.write_checkpoint(tmp_path / str(seed), tensors=in_halves(micro.random_tensors(seed=seed)))
        )
        files = {kind: tmp_path / f"{seed}-{kind}.gguf" for kind in ("q8_0", "f16")}
        vocabulary = read_tokenizer(checkpoint.tokenizer, checkpoint.config)
        llm_gguf.write_language(checkpoint, vocabulary, files["f16"], "micro")
        quantize(files["f16"], files["q8_0"], "q8_0")
        manifest = exporter._manifest(ExportOptions(tmp_path, tmp_path), checkpoint, "micro")
        rows = {row.stage: row for row in parity._language_rows(files, checkpoint, Bundle(tmp_path, manifest), image)}
        assert rows["logits f16"].value >= 0.9999
        assert rows["greedy f16"].relative < 0.005
        for kind, values in agreements.items():
            values.append(rows[f"greedy {kind}"].value)
    assert np.mean(agreements["f16"]) >= 0.99
    assert np.mean(agreements["q8_0"]) >= 0.95


def test_the_worst_picture_and_position_decide() -> None:
    """One of several that is off is not lost in a mean, nor behind one that is right."""
    right = [np.ones((4, 3), np.float32)] * 3
    for number in range(3):
        ours = [item + 0.1 * (number == n) for n, item in enumerate(right)]
        assert not parity._relative_row("clip", ours, right, 1e-2).passed
        logits = np.eye(3, dtype=np.float32)
        turned = logits.copy()
        turned[number] = logits[number - 1]
        assert not parity._logits_row("f16", 0.5, turned, logits).passed
    assert parity._relative_row("clip", right, right, 1e-2).passed
    assert parity._logits_row("f16", 0.5, logits, logits).passed


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_shows_stages_and_the_worst_row_last(micro_checkpoint: Path, tmp_path: Path) -> None:
    from llava_edge.cli import cli

    out = tmp_path / "a bundle"
    result = CliRunner().invoke(cli, ["export", str(micro_checkpoint), str(out), "--quant", "Q4_0", "--json"])
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["name"] == "a bundle"
    assert manifest["language"]["quantization"] == "q4_0"
    lines = result.stderr.splitlines()
    assert [line for line in lines if "quantizing to q4_0" in line]
    assert lines[-1].endswith(f"Try: llava-edge run --model '{out}' --image photo.jpg")
    rows = [ParityRow(**row) for row in manifest["parity"]]
    assert [line.split("  ")[0] for line in lines[-1 - len(rows) : -1]] == [row.stage for row in rows]
    assert strain(rows[-1]) == max(map(strain, rows))


def strain(row: ParityRow) -> float:
    return row.value / (row.limit or 1) if row.measure in ("max_abs", "relative") else (1 - row.value) / (1 - row.limit)


def test_without_torch_the_bundle_is_made_and_says_so(micro_checkpoint: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from llava_edge.cli import main; main(['export', *sys.argv[1:]])"
    assert "torch is not installed" in in_child(code, micro_checkpoint, tmp_path / "out").stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.parity == []
    assert (tmp_path / "out" / PROJECTOR).is_file()


def test_a_known_parity_table_is_taken_only_for_identical_files(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `models pull` does where torch is missing."""
    options = ExportOptions(micro_checkpoint, tmp_path / "a", name="micro", quant="q8_0", vision="fp32")
    known_manifest = export(options)
    assert known_manifest.parity
    monkeypatch.setattr("llava_edge.export.parity.unavailable_reason", lambda: "torch is not installed.")
    again = export(replace(options, out=tmp_path / "b", known_manifest=known_manifest))
    assert again.parity == known_manifest.parity
    other = export(replace(options, out=tmp_path / "c", quant="q4_0", known_manifest=known_manifest))
    assert other.parity == []


def test_the_number_of_finer_blocks_can_be_given_and_is_found(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "INT8_TARGET", 0.0)  # nothing is enough, so all of both are finer
    monkeypatch.setattr(parity, "unavailable_reason", lambda: "of no interest here")
    files = []
    for blocks in (0, 2, None):
        out = tmp_path / str(blocks)
        manifest = export(ExportOptions(micro_checkpoint, out, fine_blocks=blocks))
        files.append(manifest.files[VISION_DATA])
    assert files[0].size < files[1].size
    assert files[1] == files[2]


def test_the_picture_with_the_largest_error_decides_how_many_blocks_are_finer(
    micro_checkpoint: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    checkpoint, manifest = open_checkpoint(micro_checkpoint), Bundle.open(micro_bundle).manifest
    manifest = replace(manifest, vision=replace(manifest.vision, precision="int8", activation_bits=7))
    (tmp_path / "scratch").mkdir()

    def error(*seeds: int) -> float:
        said: list[str] = []
        shown = [Image.fromarray(picture(seed=seed)) for seed in seeds]
        bundle, scratch = Bundle(tmp_path, manifest), tmp_path / "scratch"
        tower.write_tower(bundle, checkpoint, None, shown, scratch, lambda stage, share: said.append(stage))
        return float(said[1].partition(" 0 of 2 blocks finer: error ")[2])

    errors = [error(1), error(2)]
    assert errors[0] != errors[1]
    assert error(1, 2) == max(errors)


def test_an_unknown_precision_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        ExportOptions(tmp_path, tmp_path, quant="q3")  # type: ignore[arg-type]
