"""LLaVA-1.6: tiles, their order and `image_newline`, against transformers' LlavaNext, from checkpoint to answer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import layouts
import numpy as np
import pytest
import torch
import whole
from hugging_face import image_features, pillow, rope_theta
from images import picture
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig, MistralForCausalLM
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_edge import Llava, anyres
from llava_edge.bench import child
from llava_edge.bench.messages import Task
from llava_edge.bundle import LANGUAGE, Bundle, Preprocessing, read_manifest, write_manifest
from llava_edge.errors import BundleError, CheckpointError, ContextOverflowError
from llava_edge.export import parity
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro, streamed
from llava_edge.models.config import LlavaConfig, from_hf, to_hf
from llava_edge.models.features import FeatureCache, preprocessing
from llava_edge.models.llava import from_state
from llava_edge.options import EngineOptions, FinishReason, Options, result_of
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message, encode, render
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.pictures import prepare
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder

Size = tuple[int, int]

REAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # of every LLaVA-1.6, (width, height)
TINY = replace(
    micro.CONFIG,  # crops of 32 x 32 with 4 x 4 patches
    square="anyres",
    grids=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)),
    merge="spatial_unpad",
    image_token_index=micro.VOCABULARY - 1,
)
SIZES = {
    "4:3": (80, 60),
    "square": (64, 64),
    "very wide": (300, 40),
    "very tall": (61, 400),
    "tiny": (10, 7),
    "odd": (101, 64),
    "a line": (500, 6),
}
IDS = [1, 5, 17, IMAGE_TOKEN_INDEX, 8, 42, 77]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.write_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint", config=TINY, seed=4)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    """What transformers loads from the folder we wrote: names, sizes and pinpoints are read by its own code."""
    model, about = LlavaNextForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> whole.Arrays:
    opened = open_checkpoint(checkpoint)
    assert opened.config == TINY
    return opened.tensors


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    export(ExportOptions(checkpoint, out, quant="f16", vision="fp32"))
    return out


@pytest.fixture(scope="module")
def llava(bundle: Path) -> Iterator[Llava]:
    with Llava.load(bundle, EngineOptions(device="cpu", threads=1)) as loaded:
        yield loaded


def image(size: Size) -> Image.Image:
    return Image.fromarray(picture(*size))


def their_pixels(config: LlavaConfig, shown: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, crops, 3, S, S) and (1, 2), the size as (height, width), by transformers' Pillow processor."""
    side = config.vision.image_size
    processor = pillow("llava_next")(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[height, width] for width, height in config.grids],
    )
    found = processor(shown, return_tensors="pt", input_data_format="channels_last")
    return found["pixel_values"], found["image_sizes"]


def shown(tensors: whole.Arrays, *sizes: Size) -> list[whole.Array]:
    """What the language model sees of pictures."""
    return whole.shown(TINY, tensors, [anyres.crops(image(size), preprocessing(TINY)) for size in sizes], sizes)


# --- pixels, positions, logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_crops_are_those_of_transformers_to_the_bit(size: Size) -> None:
    wanted = their_pixels(TINY, image(size))[0][0].numpy()
    found = anyres.crops(image(size), preprocessing(TINY))
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_embeddings_arrangement_logits_and_greedy_tokens_equal_transformers(
    size: Size, theirs: Any, ours: whole.Arrays
) -> None:
    pixels, sizes = their_pixels(TINY, image(size))
    with torch.no_grad():
        wanted = image_features(theirs, pixels, sizes)[0]
        expanded = [[TINY.image_token_index] * len(wanted) if i == IMAGE_TOKEN_INDEX else [i] for i in IDS]
        ids = torch.tensor([[token for group in expanded for token in group]])
        logits = theirs(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits[0]
        answer = theirs.generate(
            input_ids=ids, pixel_values=pixels, image_sizes=sizes, max_new_tokens=16, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    seen = shown(ours, size)
    assert seen[0].shape == wanted.shape
    assert np.abs(seen[0] - wanted.numpy()).max() <= 1e-5
    crops = streamed.image_features(TINY, ours, [anyres.crops(image(size), preprocessing(TINY))])
    rows = anyres.layout(size, preprocessing(TINY), TINY.image_tokens)
    arranged = anyres.arrange(streamed.project(TINY, ours, crops)[0], ours["image_newline"], rows)
    assert np.abs(arranged - wanted.numpy()).max() <= 1e-5
    assert np.abs(whole.logits(TINY, ours, IDS, seen) - logits.numpy()).max() <= 1e-4
    assert whole.greedy(TINY, ours, IDS, seen, 16) == answer[0, ids.shape[1] :].tolist()


def test_a_second_name_of_the_newline_is_read(theirs: Any, tmp_path: Path, checkpoint: Path) -> None:
    """As transformers has it in memory since 4.52, and writes it from version 5 on."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    wanted = tensors.pop("image_newline")
    save_file({**tensors, "model.image_newline": wanted}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert np.array_equal(open_checkpoint(tmp_path).tensors["image_newline"], wanted)
    theirs.save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    assert np.array_equal(saved.tensors["image_newline"], wanted)
    assert saved.config.grids == TINY.grids


# --- the arithmetic at LLaVA-1.6's own sizes ---------------------------------------------------------------------


def real(merge: Any = "spatial_unpad") -> Preprocessing:
    return Preprocessing(336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "anyres", REAL, merge)


@pytest.mark.parametrize(
    ("size", "grid", "positions"),
    [
        ((640, 480), (672, 672), 576 + 36 * 49),
        ((672, 672), (672, 672), 576 + 48 * 49),
        ((2000, 500), (1008, 336), 576 + 18 * 73),
        ((500, 2000), (336, 1008), 576 + 72 * 19),
        ((100, 100), (336, 672), 576 + 24 * 25),  # both narrow grids are as good: the first
        ((16384, 1), (336, 672), 576),  # less than a row of patches: nothing is left of the tiles
    ],
)
def test_grid_and_positions(size: Size, grid: Size, positions: int) -> None:
    assert anyres.best_grid(size, REAL) == grid
    assert len(anyres.layout(size, real(), 576)) == positions
    tiles = grid[0] * grid[1] // 336**2
    assert len(anyres.layout(size, real("flat"), 576)) == 576 * (1 + tiles)


def test_positions_equal_transformers_but_for_its_rounding() -> None:
    """Its processor counts without tensors. Where it differs, a side is whole but for the last digit of a double."""
    rng = np.random.default_rng(0)
    sizes = [*map(tuple, rng.integers(1, 1500, (1500, 2)).tolist()), (47, 1128), (88, 99)]
    differing = []
    for width, height in sizes:
        grid = anyres.best_grid((width, height), REAL)
        columns, rows = grid[0] // 336, grid[1] // 336
        counts = LlavaNextProcessor._get_unpadded_features(cast(Any, None), height, width, 24, 24, rows, columns)
        if 576 + sum(counts) != len(anyres.layout((width, height), real(), 576)):
            differing.append((width, height))
            exact = width * 24 * rows / height, height * 24 * columns / width
            assert min(abs(side - round(side)) for side in exact) < 1e-9
    assert {(47, 1128), (88, 99)} <= set(differing)
    assert len(differing) < 8


def test_of_any_grids_in_any_order_transformers_takes_the_same() -> None:
    """The published ones begin with the smallest, so that a first and a least wasteful one are the same."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        grids = tuple((336 * int(across), 336 * int(down)) for across, down in rng.integers(1, 4, (4, 2)))
        width, height = map(int, rng.integers(1, 1500, 2))
        theirs = select_best_resolution((height, width), [(down, across) for across, down in grids])
        assert anyres.best_grid((width, height), grids) == (theirs[1], theirs[0])


def test_which_of_two_equal_grids_depends_on_the_order_they_are_stored_in() -> None:
    """transformers' default pinpoints are LLaVA's numbers, but read as (height, width)."""
    published = LlavaNextConfig().image_grid_pinpoints
    assert published == [list(grid) for grid in REAL]
    config = from_hf({"model_type": "llava_next", "text_config": {}, "vision_config": {}})
    assert config.grids == tuple((width, height) for height, width in published)
    assert anyres.best_grid((100, 100), config.grids) == (672, 336) != anyres.best_grid((100, 100), REAL)
    assert config.merge == "spatial_unpad"
    assert config.square == "anyres"


# --- mistakes ----------------------------------------------------------------------------------------------------


def newline_dropped(rows: Any) -> Any:
    return rows[rows < rows.max()]


def newline_once(rows: Any) -> Any:
    return np.append(newline_dropped(rows), rows.max())


def base_last(rows: Any) -> Any:
    return np.concatenate([rows[TINY.image_tokens :], rows[: TINY.image_tokens]])


def tiles_by_column(rows: Any) -> Any:
    """The second and third of four tiles exchanged."""
    tile, n = rows // TINY.image_tokens, TINY.image_tokens
    return np.where(tile == 2, rows + n, np.where(tile == 3, rows - n, rows))


def failing(checkpoint: Path, bundle: Path) -> set[str]:
    """Rows of the parity table, measured anew, that would keep a bundle from being published."""
    opened = Bundle.open(bundle)
    rows = parity.measure(opened, open_checkpoint(checkpoint), opened.part(LANGUAGE))
    return {row.stage for row in rows if not row.passed}


MISTAKES: list[Callable[[Any], Any]] = [newline_dropped, newline_once, base_last, tiles_by_column]


@pytest.mark.parametrize("mistake", [*MISTAKES, "unpad skipped"], ids=lambda item: getattr(item, "__name__", item))
def test_parity_notices_a_wrong_order(
    mistake: Any, checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake == "unpad skipped":
        monkeypatch.setattr(anyres, "_unpad", lambda places, size: places)
    else:
        right = anyres.layout
        monkeypatch.setattr(anyres, "layout", lambda *arguments: mistake(right(*arguments)))
    assert failing(checkpoint, bundle) == {"arrangement"}


@pytest.mark.parametrize("mistake", ["corner", "grey", "squeezed"])
def test_parity_notices_wrong_tiles(
    mistake: str, checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def canvas(shown: Image.Image, grid: Size) -> Image.Image:
        if mistake == "squeezed":
            return shown.resize(grid, Image.Resampling.BICUBIC)
        scale = min(grid[0] / shown.width, grid[1] / shown.height)
        inner = shown.resize((int(shown.width * scale), int(shown.height * scale)), Image.Resampling.BICUBIC)
        corner = (0, 0) if mistake == "corner" else ((grid[0] - inner.width) // 2, (grid[1] - inner.height) // 2)
        whole = Image.new("RGB", grid, "grey" if mistake == "grey" else "black")
        whole.paste(inner, corner)
        return whole

    monkeypatch.setattr(anyres, "_canvas", canvas)
    assert failing(checkpoint, bundle) == {"pixels"}


# --- the bundle and its engine -----------------------------------------------------------------------------------


def test_the_bundle_says_how_pictures_are_seen(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.preprocessing.square == "anyres"
    assert manifest.preprocessing.grids == TINY.grids
    assert manifest.preprocessing.merge == "spatial_unpad"
    assert manifest.vision.image_tokens == 16  # of one crop
    assert {row.stage for row in manifest.parity} >= {"pixels", "arrangement"}
    assert all(row.passed for row in manifest.parity)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_the_engine_answers_as_pytorch_does(
    size: Size, llava: Llava, ours: whole.Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    take = Answer.add_token

    def watched(self: Answer, token: int) -> FinishReason | None:
        sampled.append(token)
        return take(self, token)

    monkeypatch.setattr(Answer, "add_token", watched)
    result = llava.ask("What is it?", image(size), Options(max_tokens=16))
    language = llava._engine.model.language
    pieces = render(TINY.template, [Message("user", "What is it?", 1)])
    ids = encode(pieces, language.vocabulary.tokenize, language.vocabulary.control_id)
    seen = shown(ours, size)
    assert sampled == whole.greedy(TINY, ours, ids, seen, 16)
    assert result.image_tokens == len(seen[0]) == result.prompt_tokens - len(ids) + 1


def test_the_context_is_checked_with_each_pictures_own_positions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(bundle).manifest
    counts = [len(prepare(image(size), manifest).rows) for size in ((80, 60), (300, 40))]
    assert counts[0] != counts[1]
    monkeypatch.setattr(VisionEncoder, "encode", lambda *_: pytest.fail("encoded before the positions were counted"))
    said = rf"2 images: {sum(counts)}, text: \d+\).*context has 100"
    options = EngineOptions(device="cpu", threads=1, context=100)
    with Llava.load(bundle, options) as small, pytest.raises(ContextOverflowError, match=said):
        small.ask("?", [image((80, 60)), image((300, 40))])


def test_a_stop_between_two_tiles(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, encoded = threading.Event(), []
    encode_crop = VisionEncoder.encode

    def encode_then_stop(self: VisionEncoder, *arguments: Any) -> Any:
        encoded.append(encode_crop(self, *arguments))
        if len(encoded) == 2:
            cancel.set()
        return encoded[-1]

    monkeypatch.setattr(VisionEncoder, "encode", encode_then_stop)
    assert result_of(llava.stream("?", image((81, 60)), cancel=cancel)).finish_reason == "cancelled"
    assert len(encoded) == 2  # of five


def test_a_turn_reuses_the_tiles_of_the_turn_before(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    llava.ask("hello", options=Options(max_tokens=1))
    chat = llava.chat(options=Options(max_tokens=2))
    assert [chunk.final.image_tokens for chunk in chat.say("What?", image((80, 60))) if chunk.final] == [16 + 6 * 9]
    monkeypatch.setattr(VisionEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert list(chat.say("And?"))[-1].final is not None


def test_pictures_that_differ_only_in_their_padding_have_other_keys(bundle: Path) -> None:
    """Black on black: the crops are the same, what is cut off is not."""
    manifest = Bundle.open(bundle).manifest
    square, wide = (prepare(Image.new("RGB", size), manifest) for size in ((64, 64), (80, 60)))
    assert np.array_equal(square.crops, wide.crops)
    assert len(square.rows) != len(wide.rows)
    assert square.key != wide.key
    assert prepare(Image.new("RGB", (80, 60)), manifest).key == wide.key


BAD_PIXELS: list[tuple[dict[str, Any], str]] = [
    ({"grids": ()}, "at least one grid"),
    ({"grids": ((33, 64),)}, "33 x 64 pixels is not"),
    ({"grids": ((32, 65),)}, "32 x 65 pixels is not"),
    ({"grids": ((0, 64),)}, "0 x 64"),
    ({"grids": ((32 * 37, 32),)}, "1 to 36 tiles"),
    ({"square": "pad"}, "need square anyres"),
    ({"merge": "flat"}, "projector.gguf has the tensors"),
]


@pytest.mark.parametrize(("change", "said"), BAD_PIXELS, ids=lambda value: str(value)[:30])
def test_a_manifest_that_cannot_be_right(change: dict[str, Any], said: str, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, preprocessing=replace(manifest.preprocessing, **change)))
    with pytest.raises(BundleError, match=said):
        Llava.load(folder, EngineOptions(device="cpu", threads=1))


def test_flat_merging_from_checkpoint_to_answer(tmp_path: Path) -> None:
    config = replace(TINY, merge="flat", image_pool=2)
    assert from_hf(to_hf(config)) == config
    folder = micro.write_checkpoint(tmp_path / "checkpoint", config=config)
    manifest = export(ExportOptions(folder, tmp_path / "out", quant="f16", vision="fp32"))
    assert all(row.passed for row in manifest.parity)
    with Llava.load(tmp_path / "out", EngineOptions(device="cpu", threads=1)) as loaded:
        assert loaded.ask("?", image((80, 60)), Options(max_tokens=2)).image_tokens == 5 * 4


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_mistral_without_window_is_a_llama(tmp_path: Path) -> None:
    """As llava-hf/llava-v1.6-mistral-7b-hf: sizes that it leaves out are Mistral's."""
    raw = to_hf(TINY)
    text = {key: value for key, value in raw["text_config"].items() if key not in ("model_type", "architectures")}
    mistral = MistralConfig(**text, sliding_window=None, head_dim=None)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config=mistral,
            vision_config=raw["vision_config"],
            image_grid_pinpoints=raw["image_grid_pinpoints"],
            image_token_index=TINY.image_token_index,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert replace(opened.config, template=TINY.template) == TINY
    size = (80, 60)
    pixels, sizes = their_pixels(TINY, image(size))
    with torch.no_grad():
        count = len(image_features(model, pixels, sizes)[0])
        ids = torch.tensor([[1, 5, *[TINY.image_token_index] * count, 8]])
        wanted = model(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits[0]
    seen = whole.shown(opened.config, opened.tensors, [pixels[0].numpy()], [size])
    found = whole.logits(opened.config, opened.tensors, [1, 5, IMAGE_TOKEN_INDEX, 8], seen)
    assert np.abs(found - wanted.numpy()).max() <= 1e-4


@pytest.mark.parametrize("as_text", [True, False])
def test_an_original_on_mistral_is_the_same_model(as_text: bool, tmp_path: Path) -> None:
    """As liuhaotian/llava-v1.6-mistral-7b: CLIP inside, grids (width, height), "sliding_window": null."""
    config = replace(TINY, vision=replace(TINY.vision, hidden_size=128, num_attention_heads=2))
    tensors = micro.random_tensors(config, seed=2)
    grids = [list(grid) for grid in config.grids]
    raw = layouts.original_config(
        config,
        architectures=["LlavaMistralForCausalLM"],
        model_type="llava_mistral",
        sliding_window=None,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=str(grids) if as_text else grids,
        mm_patch_merge_type="spatial_unpad",
    )
    stored = {layouts.original_name(name): value for name, value in tensors.items()}
    assert "model.image_newline" in stored
    folder = layouts.write(tmp_path / "model", raw, stored)
    opened = open_checkpoint(folder)
    assert opened.config == replace(config, template="mistral_instruct", image_token_index=micro.VOCABULARY)
    for name in opened.tensors:
        assert np.array_equal(opened.tensors[name], tensors[name]), name
    manifest = export(ExportOptions(folder, tmp_path / "out", quant="f16", vision="fp32", template="chatml"))
    assert all(row.passed for row in manifest.parity)
    (folder / "config.json").write_text(json.dumps({**raw, "sliding_window": 100}), "utf-8")
    assert open_checkpoint(folder).config.text.max_position_embeddings == 100


def test_up_to_its_window_a_mistral_sees_everything() -> None:
    """So that a context as long as that makes a LLaMA of it."""
    ids = torch.tensor([[1, 5, 7, 9, 11, 13, 15, 17, 19, 21]])
    text = dict(to_hf(TINY)["text_config"])
    del text["model_type"], text["architectures"]
    logits = []
    for window in (6, None):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**text, sliding_window=window, head_dim=None)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[0])
    different = (logits[0] - logits[1]).abs().amax(1) > 1e-4
    assert different.tolist() == [False] * 6 + [True] * 4


def test_what_a_mistral_leaves_out() -> None:
    raw = {"model_type": "llava_next", "vision_config": {}, "text_config": {"model_type": "mistral"}}
    wanted = MistralConfig()
    assert from_hf(raw).text.max_position_embeddings == wanted.sliding_window == 4096
    text = from_hf({**raw, "text_config": {"model_type": "mistral", "sliding_window": None}}).text
    for name in vars(text):
        expected = rope_theta(wanted) if name == "rope_theta" else getattr(wanted, name)
        assert getattr(text, name) == expected, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_grid_pinpoints": [[32, 50]]}, "50 x 32 pixels is not"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "wrong type"),
        ({"image_grid_pinpoints": [32, 64]}, "wrong type"),
        ({"model_type": "llava"}, "at least one grid"),
        ({"vision_feature_select_strategy": "full"}, "a square number of embeddings per crop, not 17"),
        ({"llava_edge": {"template": "chatml", "merge": "spatial"}}, "merge to 'spatial'"),
        ({"llava_edge": {"template": "chatml", "merge": "flat"}}, "unknown .image_newline"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tiling_that_would_give_wrong_answers_is_refused(
    changes: dict[str, Any], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    raw = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}), "utf-8")
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_training_on_tiles_is_refused(tmp_path: Path) -> None:
    model = from_state(TINY, micro.random_tensors(TINY))
    with pytest.raises(CheckpointError, match="one crop per picture"):
        FeatureCache(tmp_path, model)


@pytest.mark.parametrize("budget", [0, 20])
def test_bench_counts_the_rows_that_are_projected(
    budget: int, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is cut off behind the projector, and a budget's means are made before it."""
    projected: list[int] = []

    def project(self: Projector, rows: Any, real: Any = Projector.project) -> Any:
        projected.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(Projector, "project", project)
    image((90, 40)).save(tmp_path / "wide.png")
    pictures = {"first": str(tmp_path / "wide.png")}
    task = Task(str(bundle), str(tmp_path / "cache"), 1, 0, "cpu", "auto", "hi", 1, budget, pictures)
    found = child.measure_answers(task)
    assert found.projected == sum(projected) != 0
    assert (found.projected == found.answers["first"].result.image_tokens) == bool(budget)
