"""
TRL's trainers with our rows: order of the data, passes of bounded size, validation over every token, checkpoints that
appear whole. What is learned, the optimizer, the schedule and resuming are theirs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from src.models.cpu_linear import frozen_linears
from src.training.batches import EpochSampler, parts
from src.training.checkpoints import Checkpoints
from src.training.group import Group, shard
from src.training.rendering import IGNORED

PASS_TOKENS = 512
"""Tokens of one pass on the CPU: enough for full speed, and few enough that no activation has to be computed twice."""


@dataclass
class StepLog:
    """What the micro-batches of the step in progress gave."""

    group: Group
    loss: list[Tensor] = field(default_factory=list)
    """Parts of the step's mean loss, which those of all processes add up to."""
    tokens: int = 0
    """Tokens that were run in all processes, padding not counted."""

    def take(self) -> tuple[float, int]:
        """Mean loss of the step and its tokens; begins the next step. All processes have to ask."""
        (loss,) = self.group.sums(sum(part.item() for part in self.loss))
        found = loss, self.tokens
        self.loss, self.tokens = [], 0
        return found


class _Kept:
    """What both trainers have of ours."""

    def __init__(
        self, *, checkpoints: Checkpoints, sampler: EpochSampler, group: Group, acting: Any = None, **rest: Any
    ) -> None:
        """acting: makes the context in which the model runs in training, as with interventions."""
        self.checkpoints, self.sampler, self.acting = checkpoints, sampler, acting or unchanged
        self.group, self.step_log, self._is_sharded = group, StepLog(group), False
        super().__init__(**rest)
        assert self._is_sharded == group.shards
        self.learned = [weight for weight in self.model.parameters() if weight.requires_grad]
        group.take_first(self.learned)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.group.shards:
            shard(model.get_base_model(), device)
            self._is_sharded = True
        else:
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self.sampler

    def _send_telemetry(self) -> None:
        """None: what is trained here is nobody else's business."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run's folder says what was done."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.write(self.state.global_step, partial(self._save_into, model))

    def _save_into(self, model: nn.Module, folder: Path) -> None:
        self._output_dir = str(folder)
        Trainer._save_checkpoint(self, model, None)
        del self._output_dir

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "_output_dir", self.args.output_dir)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        self.group.seed(self.args.seed, self.state.global_step, len(self.step_log.loss))
        loss = self._passes(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.group.add_gradients(self.learned)
        self.step_log.loss.append(loss.detach())
        self.step_log.tokens += int(inputs["n_tokens" if "n_tokens" in inputs else "attention_mask"].sum())
        return loss

    def _passes(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        with self.acting(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Only to the reporters; metrics.jsonl is written step by step."""
        self._metrics["train"].clear()
        self._metrics["eval"].clear()
        self.callback_handler.on_log(self.args, self.state, self.control, dict(logs))


class SftTrainer(_Kept, SFTTrainer):
    """Learns the labels of its rows."""

    # The loss is divided by the learned tokens of the whole step, whichever model it is.
    loss_is_scaled_for_ga = True

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.model_accepts_loss_kwargs = True

    def _passes(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        assert num_items_in_batch is not None, "each pass is divided by the step's tokens"
        losses = []
        for part in self._parts(inputs):
            is_small = self.args.device.type == "cpu" and part["input_ids"].numel() <= 2 * PASS_TOKENS
            with checkpointing(model, not is_small), frozen_linears(model):
                losses.append(super()._passes(model, part, num_items_in_batch))
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)

    def _parts(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This process's rows of a batch, in passes; of sharded weights as many as every other process has."""
        rows = self.group.share(len(inputs["input_ids"]))
        own = {name: value[rows] for name, value in inputs.items()} if self.group.size > 1 else inputs
        # A device of its own holds whole batches, and would only wait between smaller ones.
        found = parts(own, PASS_TOKENS) if self.args.device.type == "cpu" else [own] if rows else []
        if self.group.shards:
            found += [idle(inputs)] * (self.group.most(len(found)) - len(found))
        return found

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """
        −Σ ln p(label) over the learned tokens / their number in the whole step, float32. Logits are computed at learned
        places only; auxiliary losses of mixtures of experts are left out.
        """
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORED
        # PEFT's wrapper calls the model's forward past the hooks of whatever acts on it or gathers its weights, and
        # accelerate puts the number format of passes on the wrapper.
        net = self.accelerator.unwrap_model(model).get_base_model()
        with only_at(net, learned), self.accelerator.autocast():
            logits = net(
                **{k: v for k, v in inputs.items() if k not in ("labels", "n_tokens")}, use_cache=False
            ).logits[0]
        loss = cross_entropy(logits.float(), labels[learned], reduction="sum")
        return loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def validation_loss(self, rows: Sequence[dict[str, Any]], should_stop: Any) -> tuple[float, int] | None:
        """
        Mean −ln p over all learned tokens of all rows, in nats, and their number; None when `should_stop()` came true
        in between. Without dropout, and without a trace in any random state.
        """
        total, count = 0.0, 0
        self.model.eval()
        try:
            for batch in validation_batches(rows, self.args.per_device_eval_batch_size):
                if self.group.any(should_stop()):
                    return None
                inputs = self._prepare_inputs(self.data_collator(batch))
                for part in self._parts(inputs):
                    with frozen_linears(self.model):
                        loss = self.compute_loss(self.model, part, num_items_in_batch=1)
                    total += loss.item()
                    count += int((part["labels"] != IGNORED).sum())
        finally:
            self.model.train()
        total, count = self.group.sums(total, count)
        return total / count, int(count)


class DpoTrainer(_Kept, DPOTrainer):
    """Learns to prefer the chosen answers (Rafailov et al. 2023), the adapter switched off being the reference."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        # TRL switches all dropout off; the adapter's is asked for, and is not in the reference.
        for name, module in self.model.named_modules():
            if "lora_dropout" in name and isinstance(module, nn.Dropout):
                module.p = self.model.peft_config["default"].lora_dropout

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # Our rows have prompt_ids, chosen_ids and rejected_ids already.
        return dataset

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This process's part of the batch's mean loss."""
        n_pairs = len(inputs["input_ids"]) // 2
        # Where there is no pair left for this process, another's goes in for nothing.
        rows = self.group.share(n_pairs) or [0]
        weight = len(self.group.share(n_pairs)) / n_pairs
        # The chosen answers first, then the rejected ones.
        both = [*rows, *(n_pairs + row for row in rows)]
        own = {name: value[both] for name, value in inputs.items()} if self.group.size > 1 else inputs
        return super().compute_loss(model, own, num_items_in_batch=num_items_in_batch) * weight

    @torch.no_grad()
    def validation_loss(self, rows: Sequence[dict[str, Any]], should_stop: Any) -> tuple[float, int] | None:
        """Mean loss of a preference, and how many there are; else as SftTrainer's."""
        total = 0.0
        size = self.args.per_device_eval_batch_size
        self.model.eval()
        try:
            for start in range(0, len(rows), size):
                if self.group.any(should_stop()):
                    return None
                batch = list(rows[start : start + size])
                inputs = self._prepare_inputs(self.data_collator(batch))
                total += self.compute_loss(self.model, inputs).item() * len(batch)
        finally:
            self.model.train()
        return self.group.sums(total)[0] / len(rows), len(rows)


def idle(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pass of which nothing is learned: two tokens of the batch's first row, and no label."""
    part = {name: value[:1, :2] for name, value in inputs.items() if value.dim() == 2}
    return part | {"labels": torch.full_like(part["labels"], IGNORED)}


def validation_batches(rows: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """All rows, those of like length together; the last batch may be short."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def unchanged(inputs: dict[str, Tensor]) -> Any:
    """The context in which nothing acts on the model."""
    return nullcontext()


@contextmanager
def only_at(model: nn.Module, learned: Tensor) -> Iterator[None]:
    """
    Within the context the model's logits are those behind the places of `learned`, bool (rows, columns − 1): shape (1,
    their number, vocabulary). All else that the model does to logits it does to these.
    """
    calls = []

    def compact(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(args[0].shape)
        return (args[0][:, :-1][learned][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(compact)
    try:
        yield
    finally:
        handle.remove()
    assert len(calls) == 1, f"the unembedding ran {len(calls)} times in one pass"


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within the context activations are computed again in the backward pass, or kept, as `wanted`."""
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is True]
    for module in modules:
        module.gradient_checkpointing = wanted
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
