"""The trainer on the micro recipe: it learns, resumes to the same losses, and the model it writes answers."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whole
from conftest import Run
from processes import largest_file
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from llava_edge.errors import CannotCreateError, DataError, MissingError, StorageError
from llava_edge.image import load_image, preprocess
from llava_edge.models import micro
from llava_edge.models.data import load_tokenizer
from llava_edge.models.features import FeatureCache, preprocessing
from llava_edge.models.llama import Llama
from llava_edge.models.llava import from_state
from llava_edge.models.lora import add_lora, lora_modules, merge_lora
from llava_edge.models.recipe import FOLDER, Recipe, load_recipe
from llava_edge.models.run import Folders, train_recipe
from llava_edge.models.train import Step, Trainer, cosine_rate, load_stage, prepare_stage
from llava_edge.outputs import replacing
from llava_edge.prompt import Message, encode, render


def brief(*, bf16: bool, **changes: Any) -> Recipe:
    """The micro recipe in 3 steps of each stage, or 2 in bfloat16, which is slow where processors lack it.

    changes: of stage 2.
    """
    recipe = load_recipe("micro")
    batch, steps = (1, 2) if bf16 else (2, 3)
    align, instruct = (replace(stage, batch=batch, accumulate=1, epochs=1.0) for stage in recipe.stages)
    return replace(recipe, bf16=bf16, data={"pictures": steps * batch}, stages=(align, replace(instruct, **changes)))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def folders(path: Path) -> Folders:
    return Folders(path / "run", path / "data", path / "features")


class _Interrupted(Exception):
    pass


def interrupted(recipe: Recipe, out: Folders, *, after: int) -> None:
    """Train, until Ctrl-C in the step after so many."""
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        if len(steps) > after:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        train_recipe(replace(recipe, checkpoint_every=1), out, report=report)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe = brief(bf16=False)
    whole, parts = folders(tmp_path / "whole"), folders(tmp_path / "parts")
    train_recipe(recipe, whole)
    for steps in (2, 2):  # in stage 1, then in stage 2
        interrupted(recipe, parts, after=steps)
    with replacing(tmp_path / "other") as temporary:  # what a process that was killed while saving leaves
        temporary.touch()
        left_over = parts.run / temporary.name
        left_over.touch()
    train_recipe(recipe, parts)
    assert not left_over.exists()
    assert len(losses(whole.run)) == 6
    assert losses(parts.run) == losses(whole.run)
    assert (whole.run / "loss.png").stat().st_size > 1000
    mine, other = (load_file(folder.run / "model" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_stages_train_what_they_name_and_clip_is_frozen(tmp_path: Path) -> None:
    recipe = brief(bf16=False)
    out = folders(tmp_path)
    before = micro.random_tensors(seed=recipe.seed)
    interrupted(recipe, out, after=3)  # all of them in stage 1
    saved = torch.load(out.run / "checkpoint.pt", weights_only=True)["trained"]
    changed = {name for name, tensor in saved.items() if not np.array_equal(tensor.numpy(), before[name])}
    assert changed == {name for name in before if name.startswith("multi_modal_projector")}
    model = load_file(train_recipe(recipe, out) / "model.safetensors")
    changed = {name for name, tensor in model.items() if not np.array_equal(tensor.numpy(), before[name])}
    assert not any(name.startswith("vision_tower") for name in changed)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed


def test_accumulation_does_not_change_the_loss(tmp_path: Path) -> None:
    seen = []
    for accumulate in (1, 2):
        out = folders(tmp_path / str(accumulate))
        train_recipe(brief(bf16=False, accumulate=accumulate), out)
        seen.append(losses(out.run))
    np.testing.assert_allclose(seen[0], seen[1], rtol=2e-3)


def test_adapters_in_bfloat16_resume_to_the_same_losses(tmp_path: Path) -> None:
    """As `smol` is trained."""
    recipe = brief(bf16=True, trains="lora", lora_rank=4, lora_alpha=8.0)
    whole, parts = folders(tmp_path / "whole"), folders(tmp_path / "parts")
    train_recipe(recipe, whole)
    interrupted(recipe, parts, after=3)  # in stage 2
    train_recipe(recipe, parts)
    assert len(losses(whole.run)) == 4
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
        interrupted(begun, out, after=4)  # one step of stage 2
        for other in [*others, replace(begun, stages=begun.stages[:1])]:
            with pytest.raises(DataError, match="another recipe"):
                train_recipe(other, out)


def test_a_changed_recipe_is_another_one(tmp_path: Path) -> None:
    """Of the same shapes: the old result, or the old learning rate, would be taken for the new one."""
    recipe = brief(bf16=False)
    (align, _) = recipe.stages
    recipe = replace(recipe, stages=(align,))
    out = folders(tmp_path)
    interrupted(recipe, out, after=2)
    log = (out.run / "log.jsonl").read_text()
    for changes in ({"projector_learning_rate": 1.0}, {"epochs": 2.0}, {"records": "questions.json"}):
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
    interrupted(recipe, out, after=2)
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


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """The second would remove what the first is writing, and mix its steps into the log."""
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    out = folders(tmp_path)

    def train_too(step: Step) -> None:
        with pytest.raises(CannotCreateError, match="Another llava-edge is training in"):
            train_recipe(recipe, out)

    train_recipe(recipe, out, report=train_too)
    assert len(losses(out.run)) == 3


@pytest.mark.parametrize("changed", ["name", "shape"])
def test_a_run_of_another_model_is_not_gone_on_with(changed: str, tmp_path: Path) -> None:
    """As of a version whose model had other tensors. By another name they would be left out in silence."""
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1], checkpoint_every=1)
    out = folders(tmp_path)
    interrupted(recipe, out, after=2)
    saved = torch.load(out.run / "checkpoint.pt", weights_only=True)
    name = next(iter(saved["trained"]))
    tensor = saved["trained"].pop(name)
    saved["trained"] |= {"multi_modal_projector.old": tensor} if changed == "name" else {name: tensor[:-1]}
    torch.save(saved, out.run / "checkpoint.pt")
    log = (out.run / "log.jsonl").read_text()
    with pytest.raises(DataError, match="another model, perhaps of another version"):
        train_recipe(recipe, out)
    assert (out.run / "log.jsonl").read_text() == log


def test_a_log_that_was_cut_off_or_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    out, log = folders(tmp_path), tmp_path / "run" / "log.jsonl"
    interrupted(recipe, out, after=2)
    first, second, _ = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + second[:-20])
    train_recipe(recipe, out)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]
    log.unlink()
    assert (train_recipe(recipe, out) / "model.safetensors").is_file()
    assert log.read_text() == ""


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    """A loss of power leaves NUL bytes, to which the resumed run adds its lines."""
    recipe = brief(bf16=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    out, log = folders(tmp_path), tmp_path / "run" / "log.jsonl"
    interrupted(recipe, out, after=2)
    other = b'{"stage": "old", "step": 1, "loss": 1.0}'
    damaged = [b"\0" * 64, b'{"stage": "al\xff"}', b"5", b"{}", b"[" * 100_000, other]
    log.write_bytes(b"\n".join([*damaged, log.read_bytes()]))
    train_recipe(recipe, out)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    recipe, out = brief(bf16=False), folders(tmp_path)
    interrupted(recipe, out, after=2)
    for size in (1000, 0):
        os.truncate(out.run / "checkpoint.pt", size)
        with pytest.raises(DataError, match=r"checkpoint\.pt is damaged; remove it"):
            train_recipe(recipe, out)
    torch.save([1], out.run / "checkpoint.pt")
    with pytest.raises(DataError, match=r"checkpoint\.pt is damaged; remove it"):
        train_recipe(recipe, out)


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removed it, as the sentence says, would lose all that was trained."""
    recipe, out = brief(bf16=False), folders(tmp_path)
    interrupted(recipe, out, after=2)
    trainer = trainer_of(recipe, out)
    monkeypatch.setattr(torch, "load", lambda *_, **__: (tmp_path / "missing").stat())
    with pytest.raises(OSError, match="missing"):
        trainer.train()
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(1 << 50))  # bytes that no machine has
    code, _, err = run("train", "micro", "--out", out.run, "--data", out.data)
    assert (code, err.splitlines()[-1]) == (71, "llava-edge: Not enough memory.")


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
    recipe = brief(bf16=False)
    out = folders(tmp_path)
    interrupted(recipe, out, after=1)
    model = from_state(micro.CONFIG, micro.random_tensors(seed=recipe.seed))
    tokenizer = load_tokenizer(out.run / "base" / "tokenizer.json")
    moved = []
    for limit in (0.5, 1e9):
        stage = replace(recipe.stages[0], clip_norm=limit)
        data = load_stage(stage, out.data, tokenizer, micro.CONFIG.image_tokens, recipe.seed)
        trainer = Trainer(model, recipe, [data], FeatureCache(out.features, model), out.data, tmp_path / "other")
        (group,) = prepare_stage(model, recipe, stage)
        before = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        _, norm = trainer._optimizer_step(data, next(data.step_packs()), torch.optim.SGD([group]))
        after = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        moved.append(float((after - before).norm()) / group["lr"])
        assert norm > 0.5  # before it is clipped
    assert moved[0] == pytest.approx(0.5, rel=1e-3)
    assert moved[1] > 0.6


def test_only_a_run_is_gone_on_with(bundle_copy: Path, tmp_path: Path) -> None:
    """Its files would be lost, or the two would be in one folder."""
    before = sorted(bundle_copy.iterdir())
    out = replace(folders(tmp_path), run=bundle_copy)
    with pytest.raises(CannotCreateError, match="is not empty and holds no training run"):
        train_recipe(brief(bf16=False), out)
    assert sorted(bundle_copy.iterdir()) == before
    assert not out.data.exists()


@pytest.mark.parametrize("name", ["000.png", "captions.json"])
def test_only_a_folder_of_its_own_data_is_written_to(name: str, tmp_path: Path) -> None:
    out = folders(tmp_path)
    out.data.mkdir()
    (out.data / name).write_text("mine")
    with pytest.raises(CannotCreateError, match="holds no data of this recipe; name a new or empty folder with --data"):
        train_recipe(brief(bf16=False), out)
    assert [(path.name, path.read_text()) for path in out.data.iterdir()] == [(name, "mine")]
    assert not out.run.exists()


def test_data_that_was_not_written_to_the_end_is_written_again(tmp_path: Path) -> None:
    out = folders(tmp_path)
    with largest_file(2000), pytest.raises(OSError, match="File too large"):
        micro.write_data(out.data, pictures=6, seed=0)
    interrupted(brief(bf16=False), out, after=0)
    assert (out.data / "questions.json").is_file()


@pytest.mark.parametrize("size", [200_000, 8_000_000])
def test_a_full_disk_is_one_sentence(size: int, tmp_path: Path) -> None:
    """When weights are written, or all that is trained and what AdamW knows of it."""
    with largest_file(size), pytest.raises(StorageError, match=r"could not be written: .*as when the disk is full"):
        train_recipe(brief(bf16=False), folders(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_a_full_disk_is_named_by_what_is_on_it(tmp_path: Path) -> None:
    """There are two folders, --out and --data."""
    recipe, out = brief(bf16=False), folders(tmp_path)
    interrupted(recipe, out, after=0)
    trainer = trainer_of(recipe, out)
    for path in (out.run / "log.jsonl", out.data / "questions.json"):
        path.unlink()
        path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"log\.jsonl could not be written: No space left on device"):
        trainer._log(Step("align", 1, 1, 1.0, 1.0, 1.0, 1.0, 0.0))
    with pytest.raises(StorageError, match="data could not be written: No space left on device"):
        train_recipe(recipe, out)


def test_too_small_a_disk_is_noticed_before_pictures_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match="The trained model needs"):
        train_recipe(brief(bf16=False), folders(tmp_path), encoding=lambda *_: pytest.fail("a picture was encoded"))
    monkeypatch.setattr("llava_edge.models.run.check_space", lambda *_: None)
    with pytest.raises(StorageError, match="The cache of CLIP features needs"):
        train_recipe(brief(bf16=False), folders(tmp_path))


def test_the_micro_recipe_learns_its_colours(trained_micro: Path) -> None:
    config = micro.CONFIG
    tensors = load_arrays(trained_micro / "model.safetensors")
    tokenizer = load_tokenizer(trained_micro / "tokenizer.json")
    prompt = encode(
        render(config.template, [Message("user", micro.QUESTION, 1)]),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.token_to_id,
    )
    rng = np.random.default_rng(99)
    for colour in micro.COLOURS:
        pixels = preprocess(load_image(micro.draw(colour, rng)), preprocessing(config))
        shown = whole.shown(config, tensors, [pixels[None]])
        answer = whole.greedy(config, tensors, prompt, shown, 8, tokenizer.token_to_id("<|im_end|>"))
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
        plain = model.hidden(embeds)
        add_lora(model, rank=4, alpha=8.0, seed=1)
        assert len(lora_modules(model)) == 7 * micro.CONFIG.text.num_hidden_layers
        torch.testing.assert_close(model.hidden(embeds), plain)
        for adapter in lora_modules(model).values():
            adapter.lora_B.normal_(std=0.05)
        adapted = model.hidden(embeds)
        assert float((adapted - plain).abs().max()) > 1e-2
        merge_lora(model)
        assert not lora_modules(model)
        torch.testing.assert_close(model.hidden(embeds), adapted, rtol=1e-4, atol=1e-4)


def test_recipes_are_strict(tmp_path: Path) -> None:
    assert load_recipe("smol").stages[1].trains == "lora"
    with pytest.raises(MissingError, match="micro, smol"):
        load_recipe("huge")
    bad = tmp_path / "bad.toml"
    bad.write_text('name = "x"\nspeed = 3\n[[stage]]\n')
    with pytest.raises(DataError, match=r"bad\.toml"):
        load_recipe(str(bad))


STAGE_1, STAGE_2 = "stage 'align' has ", "stage 'instruct' has "
BAD_SETTINGS: list[tuple[str, str, str]] = [  # a line's beginning in smol.toml, what stands there instead, what is said
    ('parts = "smol"', 'parts = "mikro"', "parts = 'mikro'; expected one of 'micro', 'smol'."),
    ('trains = "lora"', 'trains = "LoRA"', STAGE_2 + "trains = 'LoRA'; expected one of 'projector', 'lora', 'full'."),
    ('trains = "lora"', 'trains = "full"', "stage 'instruct': trains = 'full' would be lost"),
    ("lora_rank = 16\n", "", "stage 'instruct': trains = 'lora' needs a lora_rank of 1 or more, not 0."),
    ("lora_rank = 16", "lora_rank = -1", STAGE_2 + "lora_rank = -1; expected an integer from 0 to 1024."),
    ("lora_rank = 16", "lora_rank = 1.5", STAGE_2 + "lora_rank = 1.5; expected an integer"),
    ("lora_alpha = 32.0\n", "", "needs a lora_alpha above 0, not 0."),
    ("lora_alpha = 32.0", "lora_alpha = -32", STAGE_2 + "lora_alpha = -32; expected a number from 0 to 65536."),
    ("learning_rate = 1e-3", "learning_rate = 0.0", "trains = 'lora' needs a learning_rate above 0, not 0."),
    ("learning_rate = 1e-3", "learning_rate = nan", STAGE_2 + "learning_rate = nan; expected a number from 0 to 1."),
    ("learning_rate = 1e-3", "learning_rate = 1e3", STAGE_2 + "learning_rate = 1000.0; expected a number from 0 to 1."),
    (
        "learning_rate = 0.0",
        "learning_rate = -1e-3",
        STAGE_1 + "learning_rate = -0.001; expected a number from 0 to 1.",
    ),
    (
        "projector_learning_rate = 2e-3",
        "projector_learning_rate = 0",
        "rate = 0; expected a number above 0 and up to 1.",
    ),
    (
        "projector_learning_rate = 2e-3",
        "projector_learning_rate = nan",
        "projector_learning_rate = nan; expected a number above 0",
    ),
    ("batch = 32", "batch = 0", STAGE_1 + "batch = 0; expected an integer from 1 to 65536."),
    ("batch = 32", "batch = 1.5", STAGE_1 + "batch = 1.5; expected an integer"),
    ("batch = 32", "batch = true", STAGE_1 + "batch = True; expected an integer"),
    ("batch = 32", 'batch = "32"', STAGE_1 + "batch = '32'; expected an integer"),
    ("batch = 32", "batch = 1_000_000_000", STAGE_1 + "batch = 1000000000; expected an integer"),
    ("batch = 32", "batch = 32\naccumulate = 0", STAGE_1 + "accumulate = 0; expected an integer"),
    ("epochs = 0.35", "epochs = 0", STAGE_1 + "epochs = 0; expected a number above 0 and up to 10000."),
    ("epochs = 0.35", "epochs = inf", STAGE_1 + "epochs = inf; expected a number above 0"),
    ("epochs = 0.35", f"epochs = 1{'0' * 400}", STAGE_1 + "epochs = 1000"),
    ("epochs = 0.35", f"epochs = 1{'0' * 5000}", "is not a training recipe"),
    ("epochs = 0.35", "epochs = []", STAGE_1 + "epochs = []; expected a number above 0"),
    ("max_length = 128", "max_length = 0", STAGE_2 + "max_length = 0; expected an integer"),
    ("batch = 32", "warmup_ratio = -0.1\nbatch = 32", STAGE_1 + "warmup_ratio = -0.1; expected a number from 0 to 1."),
    ("batch = 32", "clip_norm = 0\nbatch = 32", STAGE_1 + "clip_norm = 0; expected a number above 0"),
    ("seed = 0", "seed = -1", "it has seed = -1; expected an integer from 0 to 4294967295."),
    ("seed = 0", "seed = 4294967296", "seed = 4294967296; expected an integer"),
    ("checkpoint_every = 50", "checkpoint_every = 0", "checkpoint_every = 0; expected an integer from 1"),
    ("bf16 = true", 'bf16 = "no"', "bf16 = 'no'; expected true or false."),
    ('name = "smol"', "name = 5", "name = 5; expected a string in quotes."),
    ("per_picture = 4", "per_picture = 0", "[data] has per_picture = 0; expected an integer from 1"),
    ("multi_turn = 0.15", "multi_turn = 15", "[data] has multi_turn = 15; expected a number from 0 to 1."),
    ("easy-vqa = 1.25", "easy-vqa = -1", "[data] has rounds.easy-vqa = -1; expected a number from 0 to 1000."),
    ("easy-vqa = 1.25", "easy-vqa = nan", "[data] has rounds.easy-vqa = nan; expected a number"),
    (
        "easy-vqa = 1.25",
        "easyvqa = 1",
        "[data] has 'easyvqa' in rounds; expected one of 'grocery', 'clothing', 'objects'",
    ),
    ("[data.rounds]", "[data.round]", "[data] has unknown fields ['round']"),
    ('name = "instruct"', 'name = "align"', "two stages are called 'align'"),
    ('template = "chatml"', 'template = "chatlm"', STAGE_2 + "template = 'chatlm'; expected one of vicuna_v1, "),
    ("[[stage]]", "[[stages]]", "it has no [[stage]] tables"),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD_SETTINGS, ids=lambda value: str(value)[:30])
def test_settings_that_cannot_be_meant_are_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = (FOLDER / "smol.toml").read_text("utf-8")
    assert f"\n{old}" in text
    path = tmp_path / "x.toml"
    path.write_text(text.replace(f"\n{old}", f"\n{new}"), "utf-8")
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("pictures = 36", "pictures = 0", "[data] has pictures = 0; expected an integer from 1 to 65536."),
        ("[data]\npictures = 36\n", "data = 96\n", "it has data = 96; expected a table of named values."),
        ("[[stage]]", "[stage]", "it has no [[stage]] tables"),
    ],
)
def test_the_same_of_micro(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = (FOLDER / "micro.toml").read_text("utf-8").partition('[[stage]]\nname = "instruct"')[0]
    (tmp_path / "x.toml").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(DataError, match=re.escape(said)):
        load_recipe(str(tmp_path / "x.toml"))


@pytest.mark.parametrize(("length", "lost"), [(1, "pictures"), (12, "every answer")])
def test_packs_too_short_for_what_is_trained_are_refused(length: int, lost: str, tmp_path: Path) -> None:
    """A picture that was cut off ended the run with a traceback, and answers that were cut off trained nothing."""
    recipe = brief(bf16=False, max_length=length)
    with pytest.raises(DataError, match=f"'instruct' has max_length = {length}, which cuts off {lost}"):
        train_recipe(recipe, folders(tmp_path))
    assert not (tmp_path / "features").exists()
