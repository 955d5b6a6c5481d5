"""The trainer on the micro recipe: it learns, resumes to the same losses, and the model it writes answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_edge.errors import DataError, MissingError
from llava_edge.image import load_image, preprocess
from llava_edge.models import micro
from llava_edge.models.config import load_config
from llava_edge.models.data import load_tokenizer
from llava_edge.models.features import FeatureCache, preprocessing
from llava_edge.models.llama import Llama
from llava_edge.models.llava import from_state
from llava_edge.models.lora import add_lora, lora_modules, merge_lora
from llava_edge.models.recipe import FOLDER, Recipe, load_recipe
from llava_edge.models.run import Folders, train_recipe
from llava_edge.models.train import Trainer, cosine_rate, load_stage, prepare_stage
from llava_edge.prompt import Message, encode, render


def short(recipe: Recipe, steps: int) -> Recipe:
    """The recipe on 24 pictures in batches of 4: six steps of stage 1 and `steps` of stage 2."""
    align, instruct = (replace(stage, batch=4) for stage in recipe.stages)
    return replace(recipe, data={"pictures": 24}, stages=(align, replace(instruct, epochs=steps * 4 / 24)))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def folders(path: Path) -> Folders:
    return Folders(path / "run", path / "data", path / "features")


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe = short(load_recipe("micro"), 6)
    whole, parts = folders(tmp_path / "whole"), folders(tmp_path / "parts")
    train_recipe(recipe, whole)
    for steps in (3, 5, None):  # stops in stage 1, then in stage 2
        train_recipe(recipe, parts, stop_after=steps)
    assert len(losses(whole.run)) == 12
    assert losses(parts.run) == losses(whole.run)
    assert (whole.run / "loss.png").stat().st_size > 1000
    mine, other = (load_file(folder.run / "model" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_stages_train_what_they_name_and_clip_is_frozen(tmp_path: Path) -> None:
    recipe = short(load_recipe("micro"), 2)
    out = folders(tmp_path)
    before = micro.random_tensors(seed=recipe.seed)
    train_recipe(recipe, out, stop_after=3)  # all of them in stage 1
    saved = torch.load(out.run / "checkpoint.pt", weights_only=True)["trained"]
    changed = {name for name, tensor in saved.items() if not np.array_equal(tensor.numpy(), before[name])}
    assert changed == {name for name in before if name.startswith("multi_modal_projector")}
    model = load_file(train_recipe(recipe, out) / "model.safetensors")
    changed = {name for name, tensor in model.items() if not np.array_equal(tensor.numpy(), before[name])}
    assert not any(name.startswith("vision_tower") for name in changed)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed


def test_accumulation_does_not_change_the_loss(tmp_path: Path) -> None:
    recipe = short(load_recipe("micro"), 3)
    align, instruct = recipe.stages
    seen = []
    for accumulate in (1, 4):
        out = folders(tmp_path / str(accumulate))
        train_recipe(replace(recipe, stages=(align, replace(instruct, accumulate=accumulate))), out)
        seen.append(losses(out.run))
    np.testing.assert_allclose(seen[0], seen[1], rtol=2e-3)


def brief(*, bf16: bool, **changes: Any) -> Recipe:
    """The micro recipe on few pictures, because bfloat16 is slow on processors without it; `changes` of stage 2."""
    recipe = load_recipe("micro")
    align, instruct = (replace(stage, batch=2, accumulate=1, epochs=1.0) for stage in recipe.stages)
    return replace(recipe, bf16=bf16, data={"pictures": 6}, stages=(align, replace(instruct, **changes)))


def test_adapters_in_bfloat16_resume_to_the_same_losses(tmp_path: Path) -> None:
    """As `smol` is trained."""
    recipe = brief(bf16=True, trains="lora", lora_rank=4, lora_alpha=8.0)
    whole, parts = folders(tmp_path / "whole"), folders(tmp_path / "parts")
    train_recipe(recipe, whole)
    for steps in (4, None):  # stops in stage 2
        train_recipe(recipe, parts, stop_after=steps)
    assert len(losses(whole.run)) == 6
    assert losses(parts.run) == losses(whole.run)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    before = torch.from_numpy(micro.random_tensors(seed=recipe.seed)[name]).to(torch.bfloat16).float()
    update = load_file(whole.run / "model" / "model.safetensors")[name] - before
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 4


def test_a_run_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    whole = brief(bf16=False)
    wide, narrow = (brief(bf16=False, trains="lora", lora_rank=rank, lora_alpha=8.0) for rank in (4, 2))
    for number, (begun, others) in enumerate([(whole, [wide]), (wide, [whole, narrow])]):
        out = folders(tmp_path / str(number))
        train_recipe(begun, out, stop_after=4)  # one step of stage 2
        for other in [*others, replace(begun, stages=begun.stages[:1])]:
            with pytest.raises(DataError, match="another recipe"):
                train_recipe(other, out)


def test_a_changed_recipe_is_another_one(tmp_path: Path) -> None:
    """Of the same shapes: the old result, or the old learning rate, would be taken for the new one."""
    recipe = brief(bf16=False)
    (align, _) = recipe.stages
    recipe = replace(recipe, stages=(align,))
    out = folders(tmp_path)
    train_recipe(recipe, out, stop_after=2)
    log = (out.run / "log.jsonl").read_text()
    for changes in (
        {"projector_learning_rate": 1.0},
        {"epochs": 2.0},
        {"records": "questions.json"},
    ):
        with pytest.raises(DataError, match="another recipe"):
            train_recipe(replace(recipe, stages=(replace(align, **changes),)), out)
    with pytest.raises(DataError, match="another recipe"):
        train_recipe(replace(recipe, seed=1), out)
    assert (out.run / "log.jsonl").read_text() == log
    train_recipe(replace(recipe, name="same", checkpoint_every=1), out)
    assert len(losses(out.run)) == 3


def test_changed_data_and_runs_that_do_not_say_what_they_trained_are_not_gone_on_with(tmp_path: Path) -> None:
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    out = folders(tmp_path)
    train_recipe(recipe, out, stop_after=2)
    trainer = trainer_of(recipe, out)
    captions = json.loads((out.data / "captions.json").read_text())
    captions[0]["conversations"][1]["value"] = "It is green."
    (out.data / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(DataError, match="other data"):
        trainer_of(recipe, out).train()
    saved = torch.load(out.run / "checkpoint.pt", weights_only=True)
    del saved["recipe"]
    torch.save(saved, out.run / "checkpoint.pt")
    with pytest.raises(DataError, match="another recipe"):
        trainer.train()


def test_a_log_that_was_cut_off_or_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    out, log = folders(tmp_path), tmp_path / "run" / "log.jsonl"
    train_recipe(recipe, out, stop_after=2)
    log.write_bytes(log.read_bytes()[:-20])
    train_recipe(recipe, out)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]
    log.unlink()
    assert (train_recipe(recipe, out) / "model.safetensors").is_file()
    assert log.read_text() == ""


def trainer_of(recipe: Recipe, out: Folders) -> Trainer:
    """On the data that lies there, as `train_recipe` would write it anew."""
    model = from_state(micro.CONFIG, micro.random_tensors(seed=recipe.seed))
    tokenizer = load_tokenizer(out.run / "base" / "tokenizer.json")
    stages = [load_stage(stage, out.data, tokenizer, micro.CONFIG.image_tokens, recipe.seed) for stage in recipe.stages]
    return Trainer(model, recipe, stages, FeatureCache(out.features, model), out.data, out.run)


def test_weights_that_are_trained_whole_stay_in_float32(tmp_path: Path) -> None:
    """bfloat16 has steps of 1 in 128 to 256: what an update at LLaVA's rates adds would be rounded away."""
    recipe = brief(bf16=True, learning_rate=2e-5)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    before = torch.from_numpy(micro.random_tensors(seed=recipe.seed)[name])
    change = load_file(train_recipe(recipe, folders(tmp_path)) / "model.safetensors")[name] - before
    assert float(change.abs().max()) < 1e-4
    assert float((change != 0).float().mean()) > 0.99


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    """With plain gradient descent the step's length is rate x norm."""
    recipe = load_recipe("micro")
    out = folders(tmp_path)
    train_recipe(recipe, out, stop_after=1)
    model = from_state(micro.CONFIG, micro.random_tensors(seed=recipe.seed))
    tokenizer = load_tokenizer(out.run / "base" / "tokenizer.json")
    moved = []
    for limit in (0.5, 1e9):
        stage = replace(recipe.stages[0], clip_norm=limit)
        data = load_stage(stage, out.data, tokenizer, micro.CONFIG.image_tokens, recipe.seed)
        trainer = Trainer(model, recipe, [data], FeatureCache(out.features, model), out.data, tmp_path / "other")
        (group,) = prepare_stage(model, recipe, stage)
        before = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        _, norm = trainer._optimise(data, next(data.step_packs()), torch.optim.SGD([group]))
        after = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        moved.append(float((after - before).norm()) / group["lr"])
        assert norm > 0.5  # before it is clipped
    assert moved[0] == pytest.approx(0.5, rel=1e-3)
    assert moved[1] > 0.6


def test_the_micro_recipe_learns_its_colours(trained_micro: Path) -> None:
    config = load_config(trained_micro)
    model = from_state(config, load_file(trained_micro / "model.safetensors"))
    tokenizer = load_tokenizer(trained_micro / "tokenizer.json")
    prompt = encode(
        render(config.template, [Message("user", micro.QUESTION, 1)]),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.token_to_id,
    )
    rng = np.random.default_rng(99)
    for colour in micro.COLOURS:
        pixels = preprocess(load_image(micro.draw(colour, rng)), preprocessing(config))
        features = model.encode_image(torch.from_numpy(pixels)[None])
        answer = model.generate_greedy(prompt, features, 8, [tokenizer.token_to_id("<|im_end|>")])
        assert tokenizer.decode(answer) == colour


def test_schedule_warms_up_then_falls_as_a_cosine() -> None:
    rates = [cosine_rate(step, 100, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.001


def test_adapters_start_at_zero_and_merge_to_the_same_function() -> None:
    torch.manual_seed(0)
    model = Llama(micro.CONFIG.text).eval()
    embeds = torch.randn(1, 5, micro.CONFIG.text.hidden_size)
    with torch.no_grad():
        plain, _ = model.hidden(embeds)
        add_lora(model, rank=4, alpha=8.0, seed=1)
        assert len(lora_modules(model)) == 7 * micro.CONFIG.text.num_hidden_layers
        torch.testing.assert_close(model.hidden(embeds)[0], plain)
        for adapter in lora_modules(model).values():
            adapter.lora_B.normal_(std=0.05)
        adapted, _ = model.hidden(embeds)
        assert float((adapted - plain).abs().max()) > 1e-2
        merge_lora(model)
        assert not lora_modules(model)
        torch.testing.assert_close(model.hidden(embeds)[0], adapted, rtol=1e-4, atol=1e-4)


def test_recipes_are_strict(tmp_path: Path) -> None:
    assert load_recipe("smol").stages[1].trains == "lora"
    with pytest.raises(MissingError, match="micro, smol"):
        load_recipe("huge")
    bad = tmp_path / "bad.toml"
    bad.write_text('name = "x"\nspeed = 3\n[[stage]]\n')
    with pytest.raises(DataError, match=r"bad\.toml"):
        load_recipe(str(bad))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('parts = "smol"', 'parts = "mikro"', "parts = 'mikro'; it is one of 'micro', 'smol'"),
        ('trains = "lora"', 'trains = "LoRA"', "trains = 'LoRA'; it is one of 'projector', 'lora', 'full'"),
        ("lora_rank = 16\n", "", "stage 'instruct': trains = 'lora' needs a lora_rank"),
        ("lora_rank = 16", "lora_rank = -1", "needs a lora_rank of 1 or more, not -1"),
        ("lora_rank = 16", "lora_rank = 1.5", "needs a lora_rank of 1 or more, not 1.5"),
        ('trains = "lora"', 'trains = "full"', "stage 'instruct': trains = 'full' would be lost"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = (FOLDER / "smol.toml").read_text("utf-8")
    assert old in text
    (tmp_path / "x.toml").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(DataError, match=said):
        load_recipe(str(tmp_path / "x.toml"))
