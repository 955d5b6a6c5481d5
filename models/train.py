"""The trainer: LLaVA's two stages on cached CLIP features.

    stage 1  the projector alone, on captions
    stage 2  projector + language model, whole or through low-rank adapters, on conversations

A run folder holds checkpoint.pt (a resumed run gives the same losses), log.jsonl (one line per step), loss.png and, at
the end, model/ (a Hugging Face LLaVA folder) and delta.safetensors. CLIP stays frozen.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from llava_edge.errors import DataError, is_out_of_memory
from llava_edge.models.data import Batch, Pack, Sample, collate, modality_length_order, pack, read_records, tokenize
from llava_edge.models.features import FeatureCache
from llava_edge.models.llava import Llava
from llava_edge.models.lora import LoraLinear, add_lora
from llava_edge.models.recipe import Recipe, Stage
from llava_edge.outputs import remove_left_over, replacing, storage_errors
from llava_edge.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class Step:
    """Result of one optimiser step; also a line of log.jsonl."""

    stage: str
    step: int  # from 1
    steps: int  # in this stage
    loss: float  # mean over trained tokens
    learning_rate: float
    grad_norm: float
    packs_per_s: float
    seconds_left: float  # in this stage


Report = Callable[[Step], None]

_NOT_IN_IDENTITY = ("name", "checkpoint_every", "compile")  # settings that may change when a run is resumed


def cosine_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor on the peak rate at 0-based `step`: linear warmup, then cosine to 0 (LLaVA's schedule)."""
    warmup = max(1, math.ceil(steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def prepare_stage(model: Llava, recipe: Recipe, stage: Stage) -> list[dict[str, Any]]:
    """Freeze and unfreeze parameters for a stage; return AdamW's parameter groups.

    bf16: frozen weights are kept in bfloat16, unless a later stage trains them in full: a relative update of 1/1000 is
    below the precision of its 8-bit significand, so weights have to be trained in float32.
    """
    model.requires_grad_(False)
    if stage.trains == "lora" and not any(isinstance(m, LoraLinear) for m in model.modules()):
        add_lora(model.language_model, stage.lora_rank, stage.lora_alpha, recipe.seed)
    groups = [_parameter_group(model.multi_modal_projector, stage.projector_learning_rate)]
    if stage.trains == "full":
        groups.append(_parameter_group(model.language_model, stage.learning_rate))
    elif stage.trains == "lora":
        adapters = nn.ParameterList(
            parameter for name, parameter in model.language_model.named_parameters() if ".lora_" in name
        )
        groups.append(_parameter_group(adapters, stage.learning_rate))
    if recipe.compile:
        for layer in model.language_model.model.layers:
            layer.compile(dynamic=True)  # per stage, because a stage replaces modules inside
    if recipe.bf16 and all(each.trains != "full" for each in recipe.stages):
        for module in model.language_model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | LoraLinear) and not module.weight.requires_grad:
                module.weight = nn.Parameter(module.weight.to(torch.bfloat16), False)
    return groups


def _parameter_group(module: nn.Module, rate: float) -> dict[str, Any]:
    module.requires_grad_(True)
    return {"params": list(module.parameters()), "lr": rate, "peak": rate}


class StageData:
    """A stage's packs and the order in which its steps use them, which depends only on the seed."""

    def __init__(self, stage: Stage, packs: Sequence[Pack], image_tokens: int, seed: int) -> None:
        self.stage, self.packs, self.image_tokens, self.seed = stage, packs, image_tokens, seed
        self.steps = max(1, int(len(packs) * stage.epochs) // stage.batch)

    def step_packs(self) -> Iterator[list[Pack]]:
        """The packs of each step."""
        lengths = [item.length(self.image_tokens) * (1 if item.image else -1) for item in self.packs]
        order: list[int] = []
        epoch = 0
        for step in range(self.steps):
            while len(order) < (step + 1) * self.stage.batch:
                order += modality_length_order(lengths, self.stage.batch, random.Random(self.seed * 1000 + epoch))
                epoch += 1
            yield [self.packs[i] for i in order[step * self.stage.batch : (step + 1) * self.stage.batch]]

    def micro_batches(self, packs: Sequence[Pack]) -> list[Batch]:
        """Split one step's packs into `accumulate` batches."""
        size = math.ceil(len(packs) / self.stage.accumulate)
        return [collate(packs[i : i + size], self.image_tokens) for i in range(0, len(packs), size)]


def load_stage(stage: Stage, data: Path, tokenizer: Tokenizer, image_tokens: int, seed: int) -> StageData:
    """Read, tokenize and pack a stage's records."""
    records = read_records(data / stage.records)
    samples = [tokenize(record, stage.template, tokenizer, stage.max_length) for record in records]
    _check_lengths(samples, stage)
    return StageData(stage, pack(samples, stage.max_length), image_tokens, seed)


def _check_lengths(samples: Sequence[Sample], stage: Stage) -> None:
    """Raise `DataError` if truncation removes a picture, or everything to be trained on."""
    without_image = [sample for sample in samples if sample.image and IMAGE_TOKEN_INDEX not in sample.ids[:-1]]
    if without_image or all(label == IGNORE_INDEX for sample in samples for label in sample.labels):
        raise DataError(
            f"Stage {stage.name!r} has max_length = {stage.max_length}, which cuts off "
            f"{'pictures' if without_image else 'every answer'} of {stage.records}; increase it."
        )


def answer_logits(model: Llava, batch: Batch, features: Tensor | None) -> Tensor:
    """Logits (n, vocab) of the answers' tokens, row by row. Only their positions go through the head."""
    language = model.language_model
    embeds = language.model.embed_tokens(batch.tokens).float()
    if features is not None:
        images = model.multi_modal_projector(features.float()).float()
        embeds = embeds.masked_scatter(batch.is_image[..., None], images)
    states = language.hidden(embeds, positions=batch.positions, mask=batch.mask)
    return language.logits(states[batch.labels != IGNORE_INDEX])


def batch_loss(model: Llava, batch: Batch, features: Tensor | None) -> Tensor:
    """Sum of cross-entropy over the answers' tokens."""
    targets = batch.labels[batch.labels != IGNORE_INDEX]
    return F.cross_entropy(answer_logits(model, batch, features).float(), targets, reduction="sum")


class Trainer:
    """Runs the stages of a recipe on a model, with checkpoints in `run`."""

    def __init__(
        self, model: Llava, recipe: Recipe, stages: Sequence[StageData], features: FeatureCache, data: Path, run: Path
    ) -> None:
        self.model, self.recipe, self.stages = model, recipe, stages
        self.features, self.data, self.run_folder = features, data, run
        run.mkdir(parents=True, exist_ok=True)
        self._identity = _identity(recipe, stages)

    def train(self, report: Report = lambda step: None) -> None:
        """Train from the last checkpoint, or from the start.

        Raises `DataError` if the checkpoint belongs to another recipe, other data or another model. More epochs make
        another recipe, too, because the learning-rate schedule spans all of them.
        """
        saved = self._load_checkpoint()
        for number, data in enumerate(self.stages):
            groups = prepare_stage(self.model, self.recipe, data.stage)
            if saved and number < saved["stage"]:
                continue
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            first = 0
            if saved and number == saved["stage"]:
                self._restore(saved["trained"])
                optimizer.load_state_dict(saved["optimizer"])
                first = saved["step"]
                self._trim_log(data.stage.name, first)
            self._run_stage(number, data, optimizer, first, report)

    def _run_stage(
        self, number: int, data: StageData, optimizer: torch.optim.Optimizer, first: int, report: Report
    ) -> None:
        """Run one stage from 0-based step `first`."""
        start = time.monotonic()
        for step, packs in enumerate(data.step_packs()):
            if step < first:
                continue
            factor = cosine_rate(step, data.steps, data.stage.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss, norm = self._optimizer_step(data, packs, optimizer)
            steps_per_s = (step + 1 - first) / (time.monotonic() - start)
            rate = max(group["lr"] for group in optimizer.param_groups)
            result = Step(data.stage.name, step + 1, data.steps, loss, rate, norm, steps_per_s * len(packs),
                          (data.steps - step - 1) / steps_per_s)  # fmt: skip
            self._log(result)
            report(result)
            if (step + 1) % self.recipe.checkpoint_every == 0 or step + 1 == data.steps:
                self._save_checkpoint(number, step + 1, optimizer)

    def _optimizer_step(
        self, data: StageData, packs: Sequence[Pack], optimizer: torch.optim.Optimizer
    ) -> tuple[float, float]:
        """One optimiser step: clipped gradients of the mean loss over all answer tokens of the step."""
        batches = data.micro_batches(packs)
        count = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            features = self.features.get([self.data / image for image in batch.images]) if batch.images else None
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                loss = batch_loss(self.model, batch, features)
            (loss / max(count, 1)).backward()
            total += float(loss.detach())
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, data.stage.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / max(count, 1), norm

    def _trained_state(self) -> dict[str, Tensor]:
        """All tensors that any stage trains."""
        state = self.model.state_dict()
        full = any(data.stage.trains == "full" for data in self.stages)
        prefixes = ("multi_modal_projector.", "language_model.") if full else ("multi_modal_projector.",)
        return {name: tensor for name, tensor in state.items() if name.startswith(prefixes) or ".lora_" in name}

    def _restore(self, trained: dict[str, Tensor]) -> None:
        """Put trained tensors in. Raises `DataError` if they are those of another model, as of another version."""
        if _shapes(trained) != _shapes(self._trained_state()):
            raise DataError(
                f"{self.run_folder} holds a run of another model, perhaps of another version of llava-edge, which "
                "cannot be resumed; choose another --out or remove it."
            )
        self.model.load_state_dict(trained, strict=False)

    def _save_checkpoint(self, stage: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        path = self.run_folder / "checkpoint.pt"
        saved = {"recipe": self._identity, "stage": stage, "step": step, "trained": self._trained_state(),
                 "optimizer": optimizer.state_dict()}  # fmt: skip
        with storage_errors(path, RuntimeError), replacing(path) as temporary:
            torch.save(saved, temporary)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        remove_left_over(self.run_folder)  # each as large as a checkpoint
        path = self.run_folder / "checkpoint.pt"
        if not path.is_file():
            (self.run_folder / "log.jsonl").unlink(missing_ok=True)
            return None
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
            recipe = saved.get("recipe")
        except OSError:
            raise
        except Exception as error:  # torch raises a dozen types for a bad file, which may also hold something else
            if is_out_of_memory(error):
                raise
            raise DataError(f"{path} is damaged; remove it to train from the start.") from error
        if recipe != self._identity:
            raise DataError(
                f"{self.run_folder} holds a run of another recipe or of other data, which cannot be resumed; "
                "choose another --out or remove it."
            )
        return saved

    def _log(self, step: Step) -> None:
        path = self.run_folder / "log.jsonl"
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            row = {"stage": step.stage, "step": step.step, "loss": round(step.loss, 5),
                   "learning_rate": float(f"{step.learning_rate:.4g}"), "grad_norm": float(f"{step.grad_norm:.4g}"),
                   "packs_per_s": round(step.packs_per_s, 2)}  # fmt: skip
            file.write(json.dumps(row) + "\n")

    def _trim_log(self, stage: str, step: int) -> None:
        """Drop lines after the checkpoint, so that a resumed run logs each step once."""
        path = self.run_folder / "log.jsonl"
        order = [data.stage.name for data in self.stages]
        rows = _read_log(path)
        reached = order[: order.index(stage)]
        kept = [row for row in rows if row["stage"] in reached or (row["stage"] == stage and row["step"] <= step)]
        with storage_errors(path), replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _identity(recipe: Recipe, stages: Sequence[StageData]) -> str:
    """Hash of everything that the steps depend on: all packs, and the recipe except `_NOT_IN_IDENTITY`."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in _NOT_IN_IDENTITY}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for data in stages:
        for item in data.packs:
            digest.update(json.dumps([item.image, item.prefix, item.branches]).encode())
    return digest.hexdigest()


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines; none without a file. A killed run or a full disk may leave a partial last line, and a
    loss of power NUL bytes, to which a resumed run adds."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if _is_row(row)]


def _is_row(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    return all(isinstance(row.get(key), kind) for key, kind in (("stage", str), ("step", int), ("loss", float)))


def plot_losses(log: Path, picture: Path) -> None:
    """Plot log.jsonl as loss.png, one panel per stage, raw and smoothed; nothing for an empty log."""
    from matplotlib.figure import Figure

    rows = _read_log(log)
    if not rows:
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    width = 5 * len(stages)
    figure = Figure(figsize=(width, 3.4))
    figure.subplots_adjust(left=1.2 / width, right=1 - 0.2 / width, bottom=0.15, wspace=0.35)  # "tight" draws twice
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, stage in zip(axes, stages, strict=True):
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        smooth = list(accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss))
        axis.plot(range(1, len(losses) + 1), losses, alpha=0.25, linewidth=0.7)
        axis.plot(range(1, len(losses) + 1), smooth)
        axis.set(title=f"stage: {stage}", xlabel="step", ylabel="loss (mean over trained tokens)", yscale="log")
    figure.savefig(picture, dpi=90)
