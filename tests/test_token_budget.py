"""Pictures in fewer positions: what is chosen and merged, against plain loops, torch and transformers; in the runtime,
how many there are, what stands there, and that nothing of another budget is taken for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import picture
from PIL import Image
from towers import TOWER, clip_tower, relative, some_pixels
from transformers import CLIPVisionModel

from llava_edge import Llava, token_budget
from llava_edge.bundle import VISION, Manifest, file_entry, read_manifest, write_manifest
from llava_edge.cli import eval as cli_eval
from llava_edge.cli import execute
from llava_edge.errors import BundleError, UsageError
from llava_edge.export.clip_onnx import Precision, write_clip
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro, streamed
from llava_edge.models.clip import VisionTower
from llava_edge.models.config import LlavaConfig
from llava_edge.models.evaluate import Question
from llava_edge.models.streamed import load_part
from llava_edge.options import EngineOptions, Options, result_of
from llava_edge.prompt import Message
from llava_edge.runtimes import pictures
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.pictures import apply_token_budget, prepare
from llava_edge.runtimes.stats import RequestStats

Array = np.ndarray[Any, Any]

CPU = EngineOptions(device="cpu", threads=1, cache=False)
RED = picture(40, 32, seed=1)
BUDGET_8 = Options(max_tokens=12, image_tokens=8)


def draw(tokens: int, seed: int = 0) -> tuple[Array, Array]:
    """Features in a few directions, so that likeness matters, and attention."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((5, 12))[rng.integers(0, 5, tokens)] + 0.3 * rng.standard_normal((tokens, 12))
    return features.astype(np.float32), rng.random(tokens).astype(np.float32)


def reference_reduce(features: Array, attention: Array, count: int) -> Array:
    """What `token_budget` says about "cls", written down with lists, loops and least squares in float64."""
    places = range(len(features))
    lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    directions = [feature / length for feature, length in zip(features.astype(np.float64), lengths, strict=True)]
    chosen: list[int] = []
    spanning: list[Array] = []
    for _ in range(count):
        scores = {}
        for place in set(places) - set(chosen):
            rest = directions[place]
            if spanning:
                span = np.array(spanning).T
                rest = rest - span @ np.linalg.lstsq(span, rest)[0]
            scores[place] = attention[place] * max(rest @ rest, token_budget.SPANNED)
        chosen.append(max(sorted(scores), key=lambda place: scores[place]))
        if scores[chosen[-1]] > attention[chosen[-1]] * token_budget.SPANNED:
            spanning.append(directions[chosen[-1]])
    groups = {place: [place] for place in sorted(chosen)}
    for place in set(places) - set(chosen):
        groups[max(groups, key=lambda centre: directions[place] @ directions[centre])].append(place)
    return np.stack([np.mean([features[member] for member in group], axis=0) for group in groups.values()])


# --- the choice --------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_the_choice_is_the_one_of_plain_loops(tokens: int, count: int, seed: int) -> None:
    count = min(count, tokens)
    features, attention = draw(tokens, seed)
    found = token_budget.reduce_features(features, attention, count)
    assert found.shape == (count, 12)
    np.testing.assert_allclose(found, reference_reduce(features, attention, count), atol=1e-5)


def test_what_is_looked_at_most_is_not_shown_twice() -> None:
    """The four parts of a picture, of which one has the twelve highest attentions, all get a token of their own."""
    parts = np.repeat(np.arange(4), 12)
    features = np.eye(4, 8, dtype=np.float32)[parts] + 0.01 * draw(48)[0][:, :8]
    attention = np.linspace(1, 0.1, 48, dtype=np.float32)
    found = token_budget.reduce_features(features, attention, 4)
    means = np.stack([features[parts == part].mean(axis=0) for part in range(4)])
    np.testing.assert_allclose(found, means, atol=1e-6)


def test_rounding_errors_are_not_scaled_up_where_there_are_more_tokens_than_directions() -> None:
    rng = np.random.default_rng(0)
    features, attention = rng.standard_normal((600, 64)).astype(np.float32), rng.random(600).astype(np.float32)
    found = token_budget.reduce_features(features, attention, 500)
    unmerged = {row.tobytes() for row in features} & {row.tobytes() for row in found}
    assert len(unmerged) >= 400  # 100 others are merged into at most as many


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_patches_that_are_all_alike_stay_what_they_are(value: float) -> None:
    """Each is as like to one mean as to another, or has no direction at all: no mean may be left without a member."""
    features = np.full((49, 8), value, np.float32)
    for attention in (np.arange(49, dtype=np.float32), np.zeros(49, np.float32)):  # the second as rounding leaves it
        assert np.array_equal(token_budget.reduce_features(features, attention, 25), features[:25])


@pytest.mark.parametrize(("side", "fields"), [(24, 12), (24, 8), (6, 3), (5, 5), (4, 1)])
def test_pooling_whole_fields_is_torchs(side: int, fields: int) -> None:
    features, attention = draw(side**2)
    grid = torch.from_numpy(features).T.reshape(1, 12, side, side)
    wanted = torch.nn.functional.avg_pool2d(grid, side // fields)[0].flatten(1).T
    found = token_budget.reduce_features(features, attention, fields**2, "pool")
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_pooling_shares_out_patches_on_a_border() -> None:
    """Against 7 x 7 patches painted large enough to be cut up evenly."""
    features, attention = draw(49)
    large = features.reshape(7, 7, -1).repeat(5, axis=0).repeat(5, axis=1)
    wanted = large.reshape(5, 7, 5, 7, -1).mean(axis=(1, 3)).reshape(25, -1)
    found = token_budget.reduce_features(features, attention, 25, "pool")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("tokens", "count"), [(49, 24), (50, 25)])
def test_pooling_needs_squares(tokens: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"not {tokens} to {count} tokens"):
        token_budget.reduce_features(*draw(tokens), count, "pool")


def test_the_lot_is_drawn_by_its_seed() -> None:
    features, attention = draw(49)
    first, again, other = (token_budget.reduce_features(features, attention, 9, "random", seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    rows = [features.tolist().index(row) for row in first.tolist()]
    assert rows == sorted(set(rows))


# --- the attention -----------------------------------------------------------------------------------------------


def their_attention(tower: CLIPVisionModel, config: LlavaConfig) -> list[Array]:
    """The class token's row of every block, (1, image_tokens), as transformers has it."""
    with torch.no_grad():
        found = tower(torch.from_numpy(some_pixels()), output_attentions=True).attentions
    rows = [block.mean(1)[:, 0, 1 if config.feature == "patch" else 0 :] for block in found]
    if config.image_pool > 1:
        grids = [row.reshape(1, 1, config.vision.grid, config.vision.grid) for row in rows]
        rows = [torch.nn.functional.avg_pool2d(grid, config.image_pool).flatten(1) for grid in grids]
    return [row.numpy() for row in rows]


def outputs(folder: Path, *names: str, file: str = VISION) -> list[Array]:
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    return cast("list[Array]", session.run(list(names), {"pixels": some_pixels()}))


CHOICES = {
    "LLaVA-1.5": LlavaConfig(vision=TOWER),
    "last layer": LlavaConfig(vision=TOWER, vision_feature_layer=-1),
    "class token kept": LlavaConfig(vision=TOWER, feature="cls_patch"),
    "pooled": LlavaConfig(vision=TOWER, image_pool=2),
}


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES.keys())
def test_the_attention_is_transformers_of_the_block_behind_the_features(config: LlavaConfig, tmp_path: Path) -> None:
    tower, tensors = clip_tower()
    write_clip(config, tensors, tmp_path, "fp32")
    theirs = their_attention(tower, config)
    [found] = outputs(tmp_path, "attention")
    assert found.shape == (1, config.image_tokens)
    errors = [relative(found, row) for row in theirs]
    assert errors[config.vision_blocks - 1] < 1e-5
    assert sum(error < 0.02 for error in errors) == 1  # no other block would have passed
    ours = load_part(lambda: VisionTower(config), tensors, "vision_tower.vision_model.")
    features, row = ours.forward_with_attention(torch.from_numpy(some_pixels()))
    assert torch.equal(features, ours(torch.from_numpy(some_pixels())))
    assert relative(row.numpy(), theirs[config.vision_blocks - 1]) < 1e-5


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 2e-3), ("int8", 5e-2)])
def test_the_attention_in_other_precisions(precision: Precision, limit: float, tmp_path: Path) -> None:
    tower, tensors = clip_tower()
    write_clip(CHOICES["LLaVA-1.5"], tensors, tmp_path, precision)
    [found] = outputs(tmp_path, "attention")
    assert 1e-6 < relative(found, their_attention(tower, CHOICES["LLaVA-1.5"])[1]) <= limit


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_features_are_the_same_bit_for_bit_in_a_graph_without_attention(precision: Precision, tmp_path: Path) -> None:
    write_clip(CHOICES["LLaVA-1.5"], clip_tower()[1], tmp_path, precision)
    model = onnx.load(tmp_path / VISION, load_external_data=False)
    before = len(model.graph.node)
    del model.graph.output[1:]
    alive, kept = {"features"}, []
    for node in reversed(model.graph.node):
        if alive & set(node.output):
            kept.append(node)
            alive |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    onnx.save(model, tmp_path / "plain.onnx")
    assert before - 16 < len(kept) < before
    [plain] = outputs(tmp_path, "features", file="plain.onnx")
    assert np.array_equal(outputs(tmp_path, "features")[0], plain)
    assert np.array_equal(outputs(tmp_path, "features", "attention")[0], plain)


def test_a_tower_without_blocks_has_no_attention(tmp_path: Path) -> None:
    write_clip(LlavaConfig(vision=TOWER, vision_feature_layer=0), clip_tower()[1], tmp_path, "fp32")
    assert [item.name for item in onnx.load(tmp_path / VISION, load_external_data=False).graph.output] == ["features"]


# --- the runtime -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(micro_bundle: Path) -> Iterator[Llava]:
    with Llava.load(micro_bundle, CPU) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llava]:
    """A LLaVA-1.6: crops of 4 x 4 patches, rows of tiles that end in a newline."""
    config = replace(micro.CONFIG, square="anyres", grids=((64, 32), (64, 64)), merge="spatial_unpad")
    folder = tmp_path_factory.mktemp("tiled")
    micro.write_checkpoint(folder / "checkpoint", config=config)
    export(ExportOptions(folder / "checkpoint", folder / "bundle", quant="f16", vision="fp32"))
    with Llava.load(folder / "bundle", CPU) as loaded:
        yield loaded


def embedded(llava: Llava, options: Options) -> Array:
    engine = llava._engine
    shown = apply_token_budget(prepare(RED, llava.bundle.manifest), options, llava.bundle.manifest)
    job = cast(Job, SimpleNamespace(cancel=threading.Event()))
    return np.asarray(engine.model.embedder.submit(shown, RequestStats(0), job).result())


def in_torch(checkpoint: Path, llava: Llava, count: int) -> Array:
    """The same positions from the checkpoint in PyTorch, chosen by plain loops."""
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    features, attention = streamed.image_features_with_attention(
        micro.CONFIG, tensors, [prepare(RED, llava.bundle.manifest).crops]
    )
    return streamed.project(micro.CONFIG, tensors, [reference_reduce(features[0][0], attention[0][0], count)])[0]


@pytest.mark.parametrize("count", [1, 8, 15, 16])
def test_the_language_model_gets_what_pytorch_chooses(count: int, llava: Llava, micro_checkpoint: Path) -> None:
    found = embedded(llava, Options(image_tokens=count))
    assert found.shape == (count, micro.CONFIG.text.hidden_size)
    np.testing.assert_allclose(found, in_torch(micro_checkpoint, llava, count), atol=1e-4)


def test_positions_are_counted_and_the_rest_is_no_different(llava: Llava) -> None:
    whole = llava.ask("?", RED, Options(max_tokens=8))
    assert whole.image_tokens == 16
    for count in (1, 7, 16):
        result = llava.ask("?", RED, Options(max_tokens=8, image_tokens=count))
        assert result.image_tokens == count
        assert whole.prompt_tokens - result.prompt_tokens == 16 - count
    assert llava.ask("?", [RED, RED], BUDGET_8).image_tokens == 16
    assert llava.ask("?", options=BUDGET_8).image_tokens == 0
    assert np.array_equal(embedded(llava, Options(image_tokens=16)), embedded(llava, Options()))
    assert llava.ask("?", RED, Options(max_tokens=8, image_tokens=16)).text == whole.text


def logits_after(llava: Llava, options: Options, *, reuse: bool) -> Array:
    if not reuse:
        llava._engine.model.language.truncate(0)
    for _ in llava._engine.generate([Message("user", "?", 1)], [RED], replace(options, max_tokens=1), reuse=reuse):
        pass
    return llava._engine.model.language.logits().copy()


OTHERS = [Options(), Options(image_tokens=15), Options(image_tokens=8, image_token_method="random")]


def stale_error(llava: Llava, options: Options, before: Options) -> float:
    """How far the logits after what another budget left in the KV cache are from those of a fresh start, relatively."""
    fresh = logits_after(llava, options, reuse=False)
    logits_after(llava, before, reuse=False)
    return relative(logits_after(llava, options, reuse=True), fresh)


@pytest.mark.parametrize("before", OTHERS, ids=["all", "15", "random"])
def test_nothing_that_another_budget_left_is_taken_for_this_one(before: Options, llava: Llava) -> None:
    assert stale_error(llava, BUDGET_8, before) < 0.02
    assert stale_error(llava, before, BUDGET_8) < 0.02


def test_the_check_for_a_stale_kv_cache_notices_a_key_without_the_budget(
    llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pictures.apply_token_budget

    def wrong(shown: pictures.Picture, options: Options, manifest: Manifest) -> pictures.Picture:
        return replace(right(shown, options, manifest), key=shown.key)

    monkeypatch.setattr("llava_edge.runtimes.requests.apply_token_budget", wrong)
    assert stale_error(llava, BUDGET_8, OTHERS[2]) > 0.05


def test_a_room_that_is_too_small_for_all_holds_a_budget(micro_bundle: Path) -> None:
    with Llava.load(micro_bundle, replace(CPU, context=40)) as small:
        assert small.ask("?", [RED, RED], replace(BUDGET_8, max_tokens=1, image_tokens=4)).image_tokens == 8
        (many,) = small.ask_many(["?"], [RED, RED], replace(BUDGET_8, max_tokens=1, image_tokens=4))
        assert result_of(many).image_tokens == 8


@pytest.mark.parametrize("count", [1, 16, 30, 47, 53])
def test_tiles_have_one_budget_together(count: int, tiled: Llava) -> None:
    wide = picture(64, 32)
    assert len(prepare(wide, tiled.bundle.manifest).rows) == 16 + 4 * 9  # two tiles, four rows with their newlines
    result = tiled.ask("?", wide, Options(max_tokens=1, image_tokens=count))
    assert result.image_tokens == min(count, 52)


def test_tiles_are_chosen_among_without_newlines_and_padding(tiled: Llava) -> None:
    manifest = tiled.bundle.manifest
    shown = prepare(picture(40, 33), manifest)  # padded left and right
    budget = apply_token_budget(shown, Options(image_tokens=10), manifest).budget
    assert budget is not None
    newline = len(shown.crops) * 16
    assert budget.rows.tolist() == [row for row in shown.rows.tolist() if row != newline]
    assert len(budget.rows) < newline


# --- what cannot be had ------------------------------------------------------------------------------------------


def test_more_than_there_are(micro_bundle: Path, llava: Llava, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="image_tokens is 17, but in micro a picture takes 16"):
        llava.ask("?", RED, Options(image_tokens=17))
    command = ["run", "--model", str(micro_bundle), "--image", "none.png", "--device", "cpu", "--image-tokens"]
    assert execute([*command, "17"]) == 2  # before the picture is looked for
    assert "1 to 16, or 0 for all" in capsys.readouterr().err
    assert execute([*command, "16"]) == 66
    assert execute([*command, "-1"]) == 2


def test_an_unknown_method() -> None:
    with pytest.raises(UsageError, match="image_token_method is 'best'; expected one of cls, pool, random"):
        Options(image_token_method=cast(Any, "best"))


def test_a_bundle_without_attention_has_to_be_exported_again(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    assert manifest.vision.attention
    write_manifest(bundle_copy, replace(manifest, vision=replace(manifest.vision, attention=False)))
    with Llava.load(bundle_copy, CPU) as old:
        assert old.ask("?", RED, Options(max_tokens=2)).image_tokens == 16
        with pytest.raises(UsageError, match=r"image_tokens is 8, but micro was exported without.*export or pull"):
            old.ask("?", RED, BUDGET_8)


def test_a_graph_without_the_attention_that_its_manifest_promises(bundle_copy: Path) -> None:
    model = onnx.load(bundle_copy / VISION, load_external_data=False)
    del model.graph.output[1:]
    (bundle_copy / VISION).write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle_copy)
    files = manifest.files | {VISION: file_entry(bundle_copy / VISION)}
    write_manifest(bundle_copy, replace(manifest, files=files))
    with pytest.raises(BundleError, match=r"expected attention \(batch, 16\)"):
        Llava.load(bundle_copy, CPU)


# --- the loss table ----------------------------------------------------------------------------------------------


def test_a_bundle_is_judged_once_for_each_budget_and_method(micro_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "red.png")
    variants = cli_eval._variants((0, 9, 4), ("cls", "pool"))
    with Llava.load(micro_bundle) as loaded:
        answers = {
            ending: loaded.ask("?", tmp_path / "red.png", replace(options, max_tokens=32)).text
            for ending, options in variants.items()
        }
    sets = {ending: [Question("red.png", "?", answer)] for ending, answer in answers.items()}
    scores = cli_eval._judge_bundle(str(micro_bundle), tmp_path, sets, variants, lambda label: lambda done, total: None)
    name = f"{micro_bundle}, q8_0 + fp32"
    assert [score.name for score in scores[:: len(sets)]] == [
        name, f"{name}, cls 9", f"{name}, cls 4", f"{name}, pool 9", f"{name}, pool 4",
    ]  # fmt: skip
    right = {(score.name.removeprefix(name), score.set) for score in scores if score.right}
    assert {(ending, ending) for ending in variants} <= right
    assert len(set(answers.values())) > 1


def test_without_budgets_a_bundle_is_judged_whole() -> None:
    assert list(cli_eval._variants((), ("cls",))) == [""]
    assert list(cli_eval._variants((9,), ("cls",))) == [", cls 9"]
