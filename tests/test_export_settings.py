"""What a checkpoint's small files say, in all their spellings, and what is refused because it would be passed over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hugging_face
import layouts
import numpy as np
import pytest
from conftest import Run
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from llava_edge.bundle import Bundle, Preprocessing
from llava_edge.errors import CannotCreateError, CheckpointError, UsageError
from llava_edge.export import chat_template
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.image import preprocess
from llava_edge.models import micro
from llava_edge.models.config import CLIP_MEAN, CLIP_STD, from_hf, to_hf


@pytest.fixture
def checkpoint(micro_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(micro_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("vision_feature_layer", [-2], -2),
        ("text_config__eos_token_id", [2, 7], 2),
        *(("text_config__rope_scaling", {key: "default"}, None) for key in ("type", "rope_type")),
    ],
)
def test_the_same_in_other_words(name: str, value: Any, same: Any, checkpoint: Path) -> None:
    layouts.edit_config(checkpoint, **{name: same})
    expected = open_checkpoint(checkpoint).config
    layouts.edit_config(checkpoint, **{name: value})
    assert open_checkpoint(checkpoint).config == expected


def test_null_is_what_transformers_takes_for_left_out() -> None:
    raw = to_hf(micro.CONFIG)
    raw["text_config"]["num_key_value_heads"] = None
    assert from_hf(raw).text.num_key_value_heads == LlamaConfig(**raw["text_config"]).num_key_value_heads
    raw["text_config"]["rms_norm_eps"] = None  # transformers 4 computes with None then, and 5.24 refuses it
    assert from_hf(raw).text.rms_norm_eps == LlamaConfig().rms_norm_eps


# --- how pixels are normalised ---------------------------------------------------------------------------------

OTHER = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}
SEEN = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {**OTHER, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3}),
        ("processor_config.json", {"image_processor": OTHER, "processor_class": "LlavaProcessor"}),
    ],
)
def test_mean_and_deviation_are_the_processors(file: str, content: dict[str, Any], checkpoint: Path) -> None:
    assert open_checkpoint(checkpoint).normalisation == (CLIP_MEAN, CLIP_STD)
    (checkpoint / file).write_text(json.dumps(content))
    assert open_checkpoint(checkpoint).normalisation == SEEN


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_rescale": False}, "do_rescale to False"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"rescale_factor": 1 / 256}, "rescale_factor"),
        ({"resample": 2}, "resample to 2"),
        ({"image_mean": [123.675, 116.28, 103.53]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_std": [float("nan"), 1, 1]}, "image_std"),
        ({"image_mean": 0.5}, "three numbers"),
        ({"image_mean": [10**400, 0.5, 0.5]}, "three numbers"),
        ({"image_mean": [0.5, 0.5]}, "three numbers"),
    ],
)
def test_other_pixels_than_llavas_are_refused(change: dict[str, Any], said: str, checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({**OTHER, **change}))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(checkpoint)


# --- the size of pixels ----------------------------------------------------------------------------------------

S = micro.CONFIG.vision.image_size
EDGE, FIXED = {"shortest_edge": S}, {"height": S, "width": S}


def clip_processor(checkpoint: Path, **settings: Any) -> Any:
    """transformers' processor, saved beside the checkpoint as it saves itself."""
    processor = hugging_face.pillow("clip")(**{"size": EDGE, "crop_size": FIXED, **settings})
    processor.save_pretrained(checkpoint)
    for name, value in settings.items():  # in other words than it was given
        path = checkpoint / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    return processor


def without_square(checkpoint: Path) -> None:
    """As a checkpoint that transformers wrote: only its processor may say how pictures become square."""
    raw = json.loads((checkpoint / "config.json").read_text())
    del raw["llava_edge"]["square"]
    (checkpoint / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("settings", [{}, {"size": S, "crop_size": S}, {"do_center_crop": False}])
@pytest.mark.parametrize("fixed", [False, True])
def test_padded_pictures_become_the_processors_pixels(settings: dict[str, Any], fixed: bool, checkpoint: Path) -> None:
    """LLaVA pads before it calls the processor, so that a fixed size squeezes nothing."""
    processor = clip_processor(checkpoint, **{**settings, **({"size": FIXED} if fixed else {})})
    opened = open_checkpoint(checkpoint)
    spec = Preprocessing(S, *opened.normalisation, opened.config.square, (), "flat")
    picture = Image.effect_noise((70, 43), 60).convert("RGB")
    padded = Image.new("RGB", (70, 70), tuple(int(255 * value) for value in spec.mean))
    padded.paste(picture, (0, 13))
    expected = processor(padded, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    assert np.array_equal(preprocess(picture, spec), expected)


@pytest.mark.parametrize("settings", [{}, {"do_center_crop": False}])
def test_a_processor_that_squeezes_pictures_is_refused(settings: dict[str, Any], checkpoint: Path) -> None:
    without_square(checkpoint)
    processor = clip_processor(checkpoint, size=FIXED, **settings)
    wide = Image.linear_gradient("L").rotate(90).resize((200, 100)).convert("RGB")
    squeezed, whole = (processor(image, return_tensors="np")["pixel_values"] for image in (wide, wide.resize((S, S))))
    assert squeezed == pytest.approx(whole, abs=0.1)  # transformers does squeeze
    with pytest.raises(CheckpointError, match=rf"squeezes pictures to {S} x {S} pixels.*\"shortest_edge\": {S}"):
        open_checkpoint(checkpoint)
    clip_processor(checkpoint)
    assert open_checkpoint(checkpoint).config.square == "pad"


def test_a_processor_that_pads_first_squeezes_nothing(checkpoint: Path) -> None:
    without_square(checkpoint)
    hugging_face.pillow("llava")(size=FIXED, crop_size=FIXED, do_pad=True).save_pretrained(checkpoint)
    assert open_checkpoint(checkpoint).config.square == "pad"


def test_a_fine_tune_on_cropped_pictures_can_be_said_to_be_one(checkpoint: Path) -> None:
    """With transformers, whose processor crops, and which writes the same files as for padded ones."""
    without_square(checkpoint)
    processor = clip_processor(checkpoint)
    wide = Image.effect_noise((70, 43), 60).convert("RGB")
    expected = processor(wide, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    padded, cropped = open_checkpoint(checkpoint), open_checkpoint(checkpoint, square="crop")
    spec = Preprocessing(S, *cropped.normalisation, cropped.config.square, (), "flat")
    assert np.array_equal(preprocess(wide, spec), expected)
    assert (padded.config.square, cropped.config) == ("pad", replace(padded.config, square="crop"))
    assert "--square crop" in padded.notes[-1]
    assert not any("--square" in note for note in cropped.notes)


def test_how_pictures_are_said_to_be_made_square_overrides_what_a_checkpoint_says(tmp_path: Path) -> None:
    folder, clip = original(tmp_path, inside=False)
    assert open_checkpoint(folder, vision_tower=clip).config.square == "pad"
    assert open_checkpoint(folder, vision_tower=clip, square="crop").config.square == "crop"


def test_a_fixed_size_squeezes_nothing_that_is_said_to_be_padded(checkpoint: Path) -> None:
    without_square(checkpoint)
    clip_processor(checkpoint, size=FIXED)
    assert open_checkpoint(checkpoint, square="pad").config.square == "pad"
    with pytest.raises(CheckpointError, match="squeezes pictures"):
        open_checkpoint(checkpoint, square="crop")


def test_tiles_are_neither_padded_nor_cropped(checkpoint: Path) -> None:
    layouts.edit_config(checkpoint, model_type="llava_next")
    with pytest.raises(UsageError, match=r"config\.json is of a LLaVA that sees pictures in tiles.*omit --square"):
        open_checkpoint(checkpoint, square="pad")


def test_a_bundle_of_cropped_pictures_agrees_with_its_checkpoint(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    code, _, err = run("export", checkpoint, out, "--quant", "f16", "--vision", "fp32", "--square", "crop")
    assert code == 0, err
    manifest = Bundle.open(out).manifest
    assert manifest.preprocessing.square == "crop"
    assert [row.max_abs for row in manifest.parity if row.stage == "pixels"] == [0]
    code, _, err = run("verify", out, "--against", checkpoint)
    assert code == 65
    assert f"{out} does not agree with {checkpoint} in: pixels." in err
    assert run("verify", out, "--against", checkpoint, "--square", "crop")[0] == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": {"shortest_edge": 2 * S}}, "sets size to"),
        ({"size": {"height": S, "width": 2 * S}}, "sets size to"),
        ({"size": 2 * S, "crop_size": S}, "sets size to"),
        ({"crop_size": {"height": S, "width": S // 2}}, "sets crop_size to"),
    ],
)
def test_pixels_of_another_size_are_refused(settings: dict[str, Any], said: str, checkpoint: Path) -> None:
    """Resized to more than is cropped, a padded picture loses its edges."""
    clip_processor(checkpoint, **settings)
    with pytest.raises(CheckpointError, match=f"{said}.* only {S} pixels"):
        open_checkpoint(checkpoint)


# --- what a chat template says about the prompt layout ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{{ message['role'].upper() + ': ' }}", "vicuna_v1"),
        ("{% for m in messages %}USER: {{ m }} ASSISTANT:{% endfor %}", "vicuna_v1"),
        ("{{ '<|user|>\n' + message['content'] + '<|end|>' }}", None),
        ("{{ '[INST] ' + message['content'] + ' [/INST]' }}", None),
        ("{{ '<|im_start|>' + message['role'] }}", None),
        ("{{ messages }}", "vicuna_v1"),
    ],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_of_another_layout_is_not_passed_over(
    text: str, found: str | None, file: str, checkpoint: Path
) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    del raw["llava_edge"]["template"]
    (checkpoint / "config.json").write_text(json.dumps(raw))
    whole = [{"name": "default", "template": text}] if file == "tokenizer_config.json" else text
    (checkpoint / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": whole}))
    if found:
        assert open_checkpoint(checkpoint).config.template == found
        return
    with pytest.raises(CheckpointError, match="chat template"):
        open_checkpoint(checkpoint)
    assert open_checkpoint(checkpoint, template="chatml").config.template == "chatml"


def test_a_chat_template_shows_what_was_guessed_wrong(checkpoint: Path) -> None:
    """As BakLLaVA's or a LLaVA with other sizes."""
    assert chat_template.resolve_template("USER: x ASSISTANT:", "mistral_instruct", checkpoint) == "vicuna_v1"
    assert chat_template.resolve_template("[INST] x", "mistral_instruct", checkpoint) == "mistral_instruct"


def test_a_template_that_is_not_ours_is_the_options_fault(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="'llama3' is not known"):
        open_checkpoint(checkpoint, template="llama3")


# --- originals -------------------------------------------------------------------------------------------------


def original(tmp_path: Path, *, inside: bool, **extra: Any) -> tuple[Path, Path]:
    """An original checkpoint, and its CLIP in a folder of its own. Heads of 64, as OpenAI's towers have."""
    config = micro.CONFIG
    tensors = micro.random_tensors(config, seed=2)
    kept = {name: value for name, value in tensors.items() if inside or not layouts.is_vision(name)}
    stored = {layouts.original_name(name): value for name, value in kept.items()}
    folder = layouts.write(tmp_path / "original", layouts.original_config(config, **extra), stored)
    return folder, layouts.write_clip(tmp_path / "clip", tensors)


def test_an_original_has_the_processor_of_its_clip(tmp_path: Path) -> None:
    folder, clip = original(tmp_path, inside=False)
    (clip / "preprocessor_config.json").write_text(json.dumps(OTHER))
    assert open_checkpoint(folder, vision_tower=clip).normalisation == SEEN


@pytest.mark.parametrize("size", [336, 224])
def test_a_clip_of_another_size_than_the_named_one_is_refused(size: int, tmp_path: Path) -> None:
    named = "openai/clip-vit-large-patch14" + ("-336" if size == 336 else "")
    folder, clip = original(tmp_path, inside=False, mm_vision_tower=named)
    with pytest.raises(UsageError, match=f"{named}, for pictures of {size} pixels"):
        open_checkpoint(folder, vision_tower=clip)


def test_a_tower_inside_is_described_by_the_folder_that_is_given(tmp_path: Path) -> None:
    folder, clip = original(tmp_path, inside=True, mm_vision_tower="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    with pytest.raises(UsageError, match=r"laion.*--vision-tower FOLDER"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, vision_tower=clip).config.vision == micro.CONFIG.vision
    raw = json.loads((clip / "config.json").read_text())
    raw["vision_config"]["hidden_act"] = "gelu"
    (clip / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="hidden_act to 'gelu'"):
        open_checkpoint(folder, vision_tower=clip)


def test_a_tower_inside_that_is_wider_than_openais_needs_its_config(tmp_path: Path) -> None:
    """As of LLaVA on MetaCLIP or DFN: 1280 are 16 heads of 80, not 20 of 64, and no shape tells."""
    folder, _ = original(tmp_path, inside=True, mm_vision_tower="facebook/metaclip-h14-fullcc2.5b")
    open_checkpoint(folder)
    path = folder / "model.safetensors"
    tensors, name = load_file(path), "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
    save_file({**tensors, name: np.zeros((1280, 3, 8, 8), np.float32)}, path)
    with pytest.raises(UsageError, match=r"metaclip-h14.* heads .*--vision-tower FOLDER"):
        open_checkpoint(folder)


def test_what_tiles_need_is_not_read_without_tiles(tmp_path: Path) -> None:
    """A fine-tune of LLaVA-1.6 with whole pictures: LLaVA looks at the merge and the newline only for tiles."""
    folder, clip = original(tmp_path, inside=False, mm_patch_merge_type="spatial_unpad")
    config = open_checkpoint(folder, vision_tower=clip).config
    assert (config.square, config.merge) == ("pad", "flat")


@pytest.mark.parametrize(
    "change",
    [
        {"mm_projector_type": 5},
        {"mm_vision_select_feature": ["patch"]},
        {"tokenizer_model_max_length": "2048"},
        {"image_aspect_ratio": ["pad"]},
        {"vocab_size": "32003", "mm_use_im_start_end": True},
        {"architectures": {"0": "x"}},
        {"architectures": [["x"]]},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    folder, clip = original(tmp_path, inside=False, **change)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder, vision_tower=clip)


# --- names -----------------------------------------------------------------------------------------------------


def test_folders_may_have_any_name(micro_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(micro_checkpoint, tmp_path / "my\u00a0model"))
    manifest = export(ExportOptions(checkpoint, tmp_path / "o\tut", quant="f16", vision="fp32"))
    assert (manifest.name, manifest.provenance[0].source) == ("o?ut", "my?model")


def test_names_that_nothing_could_show(micro_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected printable characters"):
        ExportOptions(micro_checkpoint, tmp_path / "out", name="a\tb")
    with pytest.raises(CannotCreateError, match="UTF-8"):
        export(ExportOptions(micro_checkpoint, tmp_path / "b\udcfcndel"))
    assert list(tmp_path.iterdir()) == []


def test_an_mmproj_is_not_put_into_the_bundle(micro_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportOptions(micro_checkpoint, out, quant="f16", vision="fp32"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for inside in (out, out / "mmproj.gguf", out / "projector.gguf"):
        with pytest.raises(CannotCreateError):
            export(ExportOptions(micro_checkpoint, out, force=True, emit_mmproj=inside))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
