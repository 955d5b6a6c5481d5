"""Pairs made for llama.cpp become bundles that answer as the checkpoint behind them, and bad pairs are refused."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from pairs import in_halves, published, write_mmproj

from llava_edge import Llava, Options
from llava_edge.bundle import LANGUAGE, PROJECTOR, VISION, VISION_DATA, Bundle
from llava_edge.cli import cli
from llava_edge.errors import CannotCreateError, CheckpointError, LlavaEdgeError, StorageError
from llava_edge.export import gguf_pair, llm_gguf
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.exporter import ExportOptions, ParityError, export
from llava_edge.export.gguf_pair import open_pair
from llava_edge.export.mmproj import check_mmproj
from llava_edge.export.mmproj import write_mmproj as write_ours
from llava_edge.export.quantize import quantize
from llava_edge.export.tensors import StoredTensor
from llava_edge.export.tokenizer import read_tokenizer
from llava_edge.gguf import read as read_header
from llava_edge.models import llama_gguf, micro
from llava_edge.models.config import CLIP_MEAN, CLIP_STD
from llava_edge.runtimes.language import LanguageModel

Array = np.ndarray[Any, Any]

CONFIG = micro.CONFIG
BLOCKS = CONFIG.vision_blocks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro checkpoint whose weights float16 holds exactly, so that a pair made of it loses nothing."""
    tensors = in_halves(micro.random_tensors())
    return micro.write_checkpoint(tmp_path_factory.mktemp("pairs") / "checkpoint", tensors=tensors)


@pytest.fixture(scope="module")
def direct(source: Path) -> Path:
    """`source` exported as usual, in float16. Its language.gguf is also the language file of the pairs."""
    out = source.parent / "direct"
    export(ExportOptions(source, out, quant="f16", vision="fp32"))
    return out


@pytest.fixture(scope="module")
def weights(source: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return load_file(source / "model.safetensors")


@pytest.fixture
def pair(direct: Path, weights: dict[str, Array], tmp_path: Path) -> tuple[Path, Path]:
    """A language file and the newest kind of mmproj, the test's own."""
    language = Path(shutil.copyfile(direct / LANGUAGE, tmp_path / "model.gguf"))
    fields = {"projector_type": "mlp"}
    return language, write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(weights, BLOCKS, False), fields=fields)


def command(*words: Any) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, words)])


def answer(bundle: Path, tokens: int = 24) -> str:
    with Llava.load(bundle) as llava:
        return llava.ask("What?", micro.draw("red", np.random.default_rng(0)), Options(max_tokens=tokens)).text


# --- what was published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("fields", [{}, {"projector_type": "mlp"}])
def test_every_kind_of_file_gives_the_checkpoint_back(
    swapped: bool, fields: dict[str, str], source: Path, direct: Path, weights: dict[str, Array], tmp_path: Path
) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(weights, BLOCKS, swapped), fields=fields)
    found, wanted = open_pair(direct / LANGUAGE, mmproj, "chatml"), open_checkpoint(source)
    assert set(found.tensors) == set(wanted.tensors)
    for name in wanted.tensors:
        assert found.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(found.tensors[name], wanted.tensors[name], err_msg=name)
    assert found.config.text == CONFIG.text
    assert found.config.vision == replace(CONFIG.vision, num_hidden_layers=BLOCKS)
    assert (found.config.vision_blocks, found.config.image_tokens) == (BLOCKS, CONFIG.image_tokens)
    assert (found.config.projector_type, found.config.feature, found.config.square) == ("mlp2x_gelu", "patch", "pad")
    assert any("--square crop" in note for note in found.notes)
    cropped = open_pair(direct / LANGUAGE, mmproj, "chatml", "crop")
    assert cropped.config == replace(found.config, square="crop")
    assert not any("--square" in note for note in cropped.notes)


def assert_published_statistics(found: object) -> None:
    """GGUF stores float32, and so does pixel arithmetic."""
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray((CLIP_MEAN, CLIP_STD), np.float32))


def test_a_pair_becomes_the_bundle_that_its_checkpoint_becomes(
    direct: Path, weights: dict[str, Array], tmp_path: Path
) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(weights, BLOCKS, swapped=True))
    out = tmp_path / "out"
    result = command(direct / LANGUAGE, out, "--mmproj", mmproj, "--template", "chatml", "--vision", "fp32")
    assert result.exit_code == 0, result.output
    for part in (VISION, VISION_DATA, LANGUAGE):
        assert (out / part).read_bytes() == (direct / part).read_bytes(), part
    manifest, wanted = Bundle.open(out).manifest, Bundle.open(direct).manifest
    assert manifest.language == wanted.language
    assert_published_statistics((manifest.preprocessing.mean, manifest.preprocessing.std))
    assert replace(manifest.preprocessing, mean=CLIP_MEAN, std=CLIP_STD) == wanted.preprocessing
    stages = {"pixels", "clip fp32", "attention fp32", "projector", "embeddings", "logits f16", "greedy f16"}
    assert {row.stage for row in manifest.parity} == stages
    assert all(row.passed for row in manifest.parity)
    assert [(entry.part, entry.source) for entry in manifest.provenance] == [
        ("language", LANGUAGE),
        ("vision and projector", "mmproj.gguf"),
    ]
    assert answer(out) == answer(direct)
    again = CliRunner().invoke(cli, ["verify", str(out), "--against", str(direct / LANGUAGE), "--mmproj", str(mmproj)])
    assert again.exit_code == 0, again.output
    for said in ("chatml", "padded", "does not name a CLIP layer"):
        assert said in result.stderr


def test_what_any_text_can_become_is_made_a_control_token(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As in files of LLaVA-1.6-34B, where llama.cpp takes a typed `<|im_start|>` for the prompt layout's."""
    language = Path(shutil.copy(pair[0], tmp_path / "user-defined.gguf"))
    file = read_header(language)
    ids = [file.items("tokenizer.ggml.tokens").index(name) for name in ("<|im_start|>", "<|im_end|>")]
    with language.open("r+b") as written:
        for token in ids:
            written.seek(file.metadata["tokenizer.ggml.token_type"].offset + 4 * token)
            written.write(struct.pack("<i", 4))
    typed = "a<|im_start|>b"
    assert ids[0] in tokenized(language, typed)
    done = command(language, tmp_path / "out", "--mmproj", pair[1], "--template", "chatml", "--vision", "fp32")
    assert done.exit_code == 0, done.output
    assert "2 tokens of the prompt layout" in done.stderr
    assert (tmp_path / "out" / LANGUAGE).read_bytes() == pair[0].read_bytes()
    assert ids[0] not in tokenized(tmp_path / "out" / LANGUAGE, typed)


def tokenized(language: Path, text: str) -> list[int]:
    model = LanguageModel(language, context=64, threads=1)
    try:
        return model.vocabulary.tokenize(text)
    finally:
        model.close()


def test_files_that_are_read_are_not_written_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """--force is for what an earlier export wrote."""
    language, mmproj = pair
    before = language.read_bytes(), mmproj.read_bytes()
    (tmp_path / "link.gguf").symlink_to(mmproj)
    for target in (language, mmproj, tmp_path / "link.gguf"):
        done = command(language, tmp_path / "out", "--mmproj", mmproj, "--template", "chatml", "--force",
                       "--emit-mmproj", target)  # fmt: skip
        assert isinstance(done.exception, CannotCreateError), done.output
        assert "is also given for something else" in str(done.exception)
    assert (language.read_bytes(), mmproj.read_bytes()) == before


def test_nothing_but_a_picture_encoder_is_written_over(source: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """--force or not: neither a file of the checkpoint, nor another model, nor a folder."""
    (tmp_path / "folder").mkdir()
    for target, why in (
        (source / "config.json", "is not a picture encoder for llama.cpp"),
        (pair[0], "is not a picture encoder for llama.cpp"),
        (tmp_path / "folder", "it is a folder"),
    ):
        before = target.read_bytes() if target.is_file() else None
        for force in ((), ("--force",)):
            done = command(source, tmp_path / "out", *force, "--emit-mmproj", target)
            assert isinstance(done.exception, CannotCreateError), done.output
            assert why in str(done.exception)
        assert (target.read_bytes() if target.is_file() else None) == before


def test_a_quantized_pair_of_a_trained_model_still_answers(trained_micro: Path, tmp_path: Path) -> None:
    export(ExportOptions(trained_micro, tmp_path / "direct", quant="f16", vision="fp32"))
    quantize(tmp_path / "direct" / LANGUAGE, tmp_path / "model.gguf", "q8_0", 1)
    tensors = published(open_checkpoint(trained_micro).tensors, BLOCKS, swapped=True)
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, tensors, kind="Q8_0")
    out = tmp_path / "out"
    manifest = export(ExportOptions(tmp_path / "model.gguf", out, vision="fp32", mmproj=mmproj, template="chatml"))
    assert manifest.language.quantization == "q8_0"
    assert (out / LANGUAGE).read_bytes() == (tmp_path / "model.gguf").read_bytes()
    rows = {row.stage: row for row in manifest.parity}
    assert 0.999 < rows["logits q8_0"].value < 0.9999999  # activations are rounded to 8 bits, and nothing else
    with Llava.load(out) as llava:
        for colour in micro.COLOURS:
            picture = micro.draw(colour, np.random.default_rng(9), (60, 60))
            assert llava.ask(micro.QUESTION, picture).text == colour


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F32"])
def test_a_quantized_mmproj_is_read_to_its_precision(
    kind: str, direct: Path, weights: dict[str, Array], tmp_path: Path
) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(weights, BLOCKS, False), kind=kind)
    tensors = open_pair(direct / LANGUAGE, mmproj, "chatml").tensors
    limit = {"Q4_0": 0.12, "Q8_0": 0.01, "F32": 0.0}[kind]
    for name in ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "multi_modal_projector.linear_2.weight"):
        error = np.linalg.norm(tensors[name] - weights[name]) / np.linalg.norm(weights[name])
        assert limit / 10 <= error <= limit


def test_what_llava_never_reads_is_left_out(direct: Path, weights: dict[str, Array], tmp_path: Path) -> None:
    """All three blocks and the last norm are stored; the file names the layer."""
    tensors = published(weights, 3, False) | {"v.post_ln.weight": np.ones(64), "v.post_ln.bias": np.ones(64)}
    fields = {"vision.block_count": 3, "vision.feature_layer": [2]}
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, tensors, fields=fields)
    found = open_pair(direct / LANGUAGE, mmproj, "chatml")
    assert (found.config.vision_feature_layer, found.config.vision_blocks) == (2, 2)
    assert set(found.tensors) == {name for name in weights if "encoder.layers.2." not in name and "post_l" not in name}
    assert "CLIP layer" not in " ".join(found.notes)


def test_pixels_are_normalised_as_the_file_says(pair: tuple[Path, Path], weights: dict[str, Array]) -> None:
    fields = {"vision.image_mean": [0.5, 0.25, 0.125], "vision.image_std": [0.5, 1.0, 2.0]}
    write_mmproj(pair[1], CONFIG, published(weights, BLOCKS, False), fields=fields)
    assert open_pair(*pair, "chatml").normalisation == ((0.5, 0.25, 0.125), (0.5, 1.0, 2.0))


def test_one_projector_layer_is_llava_v1(direct: Path, weights: dict[str, Array], tmp_path: Path) -> None:
    tensors = {name: array for name, array in published(weights, BLOCKS, True).items() if "mm.2" not in name}
    found = open_pair(direct / LANGUAGE, write_mmproj(tmp_path / "mmproj.gguf", CONFIG, tensors), "chatml")
    assert (found.config.projector_type, found.config.square) == ("linear", "crop")
    assert found.config.after_control == "prefix"  # its tokenizer_config.json has no `legacy`
    assert any("one projector layer" in note for note in found.notes)


def test_pictures_of_224_pixels_are_cropped(direct: Path, tmp_path: Path) -> None:
    """As LLaVA v1's were, whose tower has that size."""
    config = replace(CONFIG, vision=replace(CONFIG.vision, image_size=224, patch_size=56))
    tensors = published(micro.random_tensors(config), BLOCKS, swapped=True)
    found = open_pair(direct / LANGUAGE, write_mmproj(tmp_path / "mmproj.gguf", config, tensors), "chatml")
    assert (found.config.projector_type, found.config.square) == ("mlp2x_gelu", "crop")


TILED = replace(CONFIG, square="anyres", grids=((32, 64), (64, 32), (64, 64), (96, 32)), merge="spatial_unpad")
TILING = {
    "projector_type": "mlp",
    "vision.image_grid_pinpoints": [side for grid in TILED.grids for side in grid],
    "vision.image_aspect_ratio": "anyres",
    "vision.mm_patch_merge_type": "spatial_unpad",
}


def test_a_pair_of_llava_1_6_tiles_as_its_checkpoint_does(tmp_path: Path) -> None:
    tensors = in_halves(micro.random_tensors(TILED))
    source, direct, out = tmp_path / "checkpoint", tmp_path / "direct", tmp_path / "out"
    micro.write_checkpoint(source, config=TILED, tensors=tensors)
    wanted = export(ExportOptions(source, direct, quant="f16", vision="fp32"))
    stored = published(tensors, BLOCKS, True)
    for newline in ("model.image_newline", "v.image_newline"):
        named = stored | {newline: tensors["image_newline"]}
        mmproj = write_mmproj(tmp_path / "mmproj.gguf", TILED, named, fields=TILING)
        opened = open_pair(direct / LANGUAGE, mmproj, "chatml").tensors
        assert np.array_equal(opened["image_newline"], tensors["image_newline"])
    found = export(ExportOptions(direct / LANGUAGE, out, vision="fp32", mmproj=mmproj, template="chatml"))
    for part in (VISION, VISION_DATA, LANGUAGE):
        assert (out / part).read_bytes() == (direct / part).read_bytes(), part
    assert replace(found.preprocessing, mean=CLIP_MEAN, std=CLIP_STD) == wanted.preprocessing
    assert all(row.passed for row in found.parity)
    assert "arrangement" in {row.stage for row in found.parity}
    assert answer(out) == answer(direct)


def test_the_language_model_suggests_the_prompt_layout() -> None:
    text = CONFIG.text
    cases = {
        "mistral_instruct": replace(
            text, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, rope_theta=1e6
        ),
        "chatml_direct": replace(text, hidden_size=7168, intermediate_size=20480, num_key_value_heads=8),
        "vicuna_v1": replace(text, hidden_size=4096, intermediate_size=11008, num_key_value_heads=32),
    }
    assert [gguf_pair._guess_template(sizes, ()) for sizes in cases.values()] == list(cases)
    bakllava = replace(cases["mistral_instruct"], rope_theta=10000.0)  # the first Mistral, with a window
    assert gguf_pair._guess_template(bakllava, ()) == "vicuna_v1"
    assert gguf_pair._guess_template(bakllava, ((672, 336),)) == "mistral_instruct"  # LLaVA-1.6


def test_every_mistral_has_the_legacy_tokenizer(tmp_path: Path) -> None:
    """BakLLaVA too, whose prompt layout is LLaVA-1.5's: `USER` after `</s>` begins with a space."""
    text = replace(CONFIG.text, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    found = []
    for width in (512, 14336):
        config = replace(CONFIG, text=replace(text, intermediate_size=width))
        folder = tmp_path / str(width)
        folder.mkdir()
        checkpoint = open_checkpoint(micro.write_checkpoint(folder, config=config))
        llm_gguf.write_language(checkpoint, read_tokenizer(folder, config), folder / "model.gguf", "test")
        stored = published(dict(checkpoint.tensors), BLOCKS, swapped=True)
        mmproj = write_mmproj(folder / "mmproj.gguf", config, stored)
        found.append(open_pair(folder / "model.gguf", mmproj, "chatml").config.after_control)
    assert found == ["bare", "prefix"]


# --- negative controls -----------------------------------------------------------------------------------------


def test_swapped_names_read_as_they_stand_do_not_fit(
    direct: Path, weights: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(weights, BLOCKS, True))
    monkeypatch.setattr(gguf_pair, "_has_swapped_ffn", lambda file: False)
    with pytest.raises(CheckpointError, match=r"wrong shape \(v\.blk\.0\.ffn_up\.weight \(64, 128\)"):
        open_pair(direct / LANGUAGE, mmproj, "chatml")


def test_rows_of_q_and_k_in_the_wrong_order_fail_parity(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((llama_gguf, "unpermute"), (llm_gguf, "permute")):  # both, so that reading back agrees
        monkeypatch.setattr(module, name, lambda weight, heads: weight)
    quantize(pair[0], tmp_path / "q4_0.gguf", "q4_0", 1)
    for file in (pair[0], tmp_path / "q4_0.gguf"):
        with pytest.raises(ParityError, match="logits"):
            export(ExportOptions(file, tmp_path / "out", vision="fp32", mmproj=pair[1], template="chatml"))
    assert not (tmp_path / "out").exists()


# --- pairs that cannot be right --------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_gelu": True}, "GELU"),
    ({"use_silu": True}, "SiLU"),
    ({"projector_type": "ldp"}, "'ldp'"),
    ({"vision.feature_layer": [1, 2]}, "LLaVA reads one"),
    ({"vision.feature_layer": [7]}, "from 0 to 2"),
    ({"vision.image_std": [0.0, 1.0, 1.0]}, "not positive"),
    ({"vision.image_mean": None}, "three numbers"),
    ({"vision.block_count": None}, "block_count"),
    ({"vision.block_count": 5}, r"missing \(v\.blk\.2"),
    ({"vision.attention.head_count": 5}, "5 heads"),
    ({"vision.attention.layer_norm_epsilon": None}, "layer_norm_epsilon"),
    ({"vision.image_grid_pinpoints": [336, 672]}, r"1\.6, but not whole: 2 numbers .*no image_newline"),
    ({"vision.image_size": 64}, r"wrong shape \(v\.position_embd"),
]


@pytest.mark.parametrize(("fields", "said"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_a_tower_that_is_not_llavas_is_refused(
    fields: dict[str, Any], said: str, pair: tuple[Path, Path], weights: dict[str, Array]
) -> None:
    write_mmproj(pair[1], CONFIG, published(weights, BLOCKS, False), fields=fields)
    with pytest.raises(LlavaEdgeError, match=said) as caught:
        open_pair(*pair, "chatml")
    assert "\n" not in str(caught.value)


BAD_TENSORS: list[tuple[Callable[[dict[str, Array]], Any], str]] = [
    (lambda tensors: tensors.pop("v.blk.1.ln2.bias"), r"1 missing \(v\.blk\.1\.ln2\.bias"),
    (lambda tensors: tensors.pop("mm.0.weight"), r"missing \(mm\.0\.weight"),
    (lambda tensors: tensors.update({"mm.3.weight": np.ones((256, 256))}), r"unknown \(mm\.3\.weight"),
    (lambda tensors: tensors.update({"t.blk.0.ln1.bias": np.ones(64)}), r"unknown \(t\.blk"),
    (lambda tensors: tensors.update({"model.image_newline": np.ones(256)}), r"1\.6, but not whole: 0 numbers"),
    (lambda tensors: tensors.update({"mm.2.weight": np.ones((512, 256))}), "width of 512, the language model has 256"),
    (lambda tensors: tensors.update({"v.class_embd": np.ones(65)}), r"wrong shape \(v\.class_embd \(65,\)"),
]


@pytest.mark.parametrize(("change", "said"), BAD_TENSORS, ids=[said[-30:] for _, said in BAD_TENSORS])
def test_tensors_that_are_not_llavas_are_refused(
    change: Callable[[dict[str, Array]], Any], said: str, pair: tuple[Path, Path], weights: dict[str, Array]
) -> None:
    tensors = published(weights, BLOCKS, False)
    change(tensors)
    write_mmproj(pair[1], CONFIG, tensors)
    with pytest.raises(LlavaEdgeError, match=said):
        open_pair(*pair, "chatml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision.image_grid_pinpoints": [32, 64, 64]}, "3 numbers"),
        ({"vision.image_grid_pinpoints": [32, 50]}, "32 x 50 pixels is not"),
        ({"vision.mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
    ],
    ids=str,
)
def test_tiles_that_are_not_llavas_are_refused(
    change: dict[str, Any], said: str, pair: tuple[Path, Path], weights: dict[str, Array]
) -> None:
    stored = published(weights, BLOCKS, False) | {"model.image_newline": np.ones(256, np.float32)}
    write_mmproj(pair[1], TILED, stored, fields={**TILING, **change})
    with pytest.raises(CheckpointError, match=said):
        open_pair(*pair, "chatml")


def test_mixed_up_files_are_one_sentence(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    language, mmproj = pair
    (tmp_path / "text.gguf").write_text("<html>not found</html>", "utf-8")
    (tmp_path / "short.gguf").write_bytes(mmproj.read_bytes()[:-500])
    (tmp_path / "half.gguf").write_bytes(language.read_bytes()[: language.stat().st_size // 2])
    out = tmp_path / "out"
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        ((mmproj, out, "--mmproj", language), 65, "is a picture encoder, not a language model"),
        ((language, out, "--mmproj", language), 65, "holds no picture encoder"),
        ((language, out), 2, "--mmproj"),
        ((language, out, "--mmproj", tmp_path / "text.gguf"), 65, "web page"),
        ((tmp_path / "text.gguf", out, "--mmproj", mmproj), 65, "web page"),
        ((language, out, "--mmproj", tmp_path / "short.gguf"), 65, "truncated"),
        ((tmp_path / "half.gguf", out, "--mmproj", mmproj), 65, "truncated"),
        ((language, out, "--mmproj", tmp_path / "none.gguf"), 66, "does not exist"),
        ((language, out, "--mmproj", mmproj), 65, "needs the special tokens <s>, </s>"),
        ((language, out, "--mmproj", mmproj, "--template", "nonsense"), 2, "vicuna_v1"),
        ((language, out, "--mmproj", mmproj, "--quant", "q4_0"), 2, "omit --quant"),
        ((source, out, "--mmproj", tmp_path / "new.gguf", "--quant", "q4_0"), 2, "--emit-mmproj"),
    ]
    for words, code, said in cases:
        result = command(*words)
        assert isinstance(result.exception, LlavaEdgeError), result.output
        assert (result.exception.exit_code, said in str(result.exception)) == (code, True), result.exception
        assert "\n" not in str(result.exception)
    assert not out.exists()


def test_a_language_file_with_more_than_a_llama_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    reader = gguf.GGUFReader(pair[0])
    cases: list[tuple[dict[str, Array], dict[str, Any], str]] = [
        ({"mm.0.bias": np.ones(4, np.float32)}, {}, r"mm\.0\.bias"),
        ({"rope_freqs.weight": np.ones(32, np.float32)}, {}, "rotary"),
        ({}, {"llama.rope.scaling.type": "yarn"}, "rotary"),
        ({}, {"llama.rope.dimension_count": 32}, "rotary"),
        ({}, {"llama.feed_forward_length": 768}, r"ffn_gate\.weight"),
        ({}, {"general.architecture": "qwen2"}, "qwen2"),
    ]
    for extra, changed, said in cases:
        copy_language(reader, tmp_path / "changed.gguf", extra, changed)
        with pytest.raises(LlavaEdgeError, match=said):
            open_pair(tmp_path / "changed.gguf", pair[1], "chatml")
    copy_language(reader, tmp_path / "changed.gguf", {}, {"general.file_type": 1024})
    kept = open_pair(tmp_path / "changed.gguf", pair[1], "chatml").language_file
    assert kept is not None
    assert kept.quantization == "gguf"


def copy_language(reader: gguf.GGUFReader, path: Path, extra: dict[str, Array], changed: dict[str, Any]) -> None:
    """The same file with more tensors and other fields."""
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} | changed
    writer: Any = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(name, value)
    for item in reader.tensors:
        writer.add_tensor(item.name, np.array(item.data), raw_dtype=item.tensor_type)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- written by us ---------------------------------------------------------------------------------------------


def test_an_emitted_mmproj_is_read_back_as_the_same_tensors(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    common = ("--quant", "f16", "--vision", "fp32", "--emit-mmproj", path)
    result = command(source, tmp_path / "bundle", *common)
    assert result.exit_code == 0, result.output
    found = open_pair(tmp_path / "bundle" / LANGUAGE, path, "chatml")
    wanted = open_checkpoint(source)
    assert set(found.tensors) == set(wanted.tensors)
    for name in wanted.tensors:
        np.testing.assert_array_equal(found.tensors[name], wanted.tensors[name], err_msg=name)
    assert_published_statistics(found.normalisation)
    assert found.config.vision_feature_layer == BLOCKS
    names = {item.name for item in gguf.GGUFReader(path).tensors}
    assert names == set(published(wanted.tensors, BLOCKS, swapped=False))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "mmproj.gguf"]
    before = path.read_bytes()
    again = command(source, tmp_path / "other", *common)
    assert isinstance(again.exception, CannotCreateError)
    assert path.read_bytes() == before
    assert not (tmp_path / "other").exists()
    assert command(source, tmp_path / "bundle", *common, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"projector_type": "linear"}, "linear"),
        ({"image_pool": 2}, "averages"),
        ({"square": "anyres"}, "tiles"),
        ({"feature": "cls_patch"}, "class"),
    ],
)
def test_what_an_mmproj_cannot_say_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        check_mmproj(replace(CONFIG, **change), tmp_path / "mmproj.gguf", False)


def test_a_failed_write_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail() -> Array:
        raise OSError(28, "No space left on device")

    checkpoint = open_checkpoint(source)
    checkpoint.tensors._stored["multi_modal_projector.linear_2.bias"] = StoredTensor((256,), fail)
    with pytest.raises(StorageError, match="No space left"):
        write_ours(checkpoint, tmp_path / "mmproj.gguf", "micro")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_projector_of_a_pair_keeps_every_bit(
    pair: tuple[Path, Path], weights: dict[str, Array], tmp_path: Path, kind: str
) -> None:
    """In float16 where that changes nothing."""
    name = "multi_modal_projector.linear_2.weight"
    finer = weights | ({name: weights[name] * np.float32(1 + 2**-20)} if kind == "F32" else {})
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", CONFIG, published(finer, BLOCKS, False), kind=kind)
    manifest = export(ExportOptions(pair[0], tmp_path / "out", mmproj=mmproj, template="chatml"))
    before, after = (
        {item.name: item for item in gguf.GGUFReader(path).tensors if item.name.startswith("mm.")}
        for path in (mmproj, tmp_path / "out" / PROJECTOR)
    )
    assert before.keys() == after.keys()
    for name, item in after.items():
        assert item.tensor_type.name == (kind if name.endswith(".weight") else "F32")
        assert (item.data == before[name].data).all()
    assert manifest.projector.precision == kind.lower()
