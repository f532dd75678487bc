"""What happens after each step: its row, validation, the epoch's adapter, a checkpoint, the end."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from src.common.errors import InputError
from src.common.progress import Progress
from src.common.provenance import peak_memory_mib
from src.training.batches import Batch
from src.training.group import Group
from src.training.metrics import Metrics
from src.training.stopping import StopSignal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When things are due, in optimizer steps counted from 1."""

    steps_per_epoch: int
    epochs: int
    validate_every: int | None
    """None: at each epoch's end."""
    checkpoint_every: int
    saved_epochs: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def ends_epoch(self, step: int) -> int | None:
        """The epoch, from 0, that a step is the last of."""
        return None if step % self.steps_per_epoch else step // self.steps_per_epoch - 1

    def validates(self, step: int) -> bool:
        return step == self.total_steps or step % (self.validate_every or self.steps_per_epoch) == 0

    def checkpoints(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or self.ends_epoch(step) is not None


class Keeper(TrainerCallback):
    """Does what is due; the trainer is given once it is made."""

    def __init__(
        self, plan: Plan, group: Group, metrics: Metrics, validation: list[Batch], stop: StopSignal,
        export: Callable[[int, int], None], progress: Progress,
    ) -> None:  # fmt: skip
        """export: writes the adapter of (epoch, step)."""
        self.trainer: Any = None
        self._plan, self._group, self._validation = plan, group, validation
        self._metrics, self._stop, self._export, self._progress = metrics, stop, export, progress
        self._learning_rate = 0.0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A validation that a signal cut short before the checkpoint is made up for."""
        if self._validation and self._group.any(self._metrics.lacks_validation(self._plan.validates)):
            found = self._validated()
            if found is not None:
                self._metrics.set_validation(found)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.sampler.epoch = state.global_step // self._plan.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._began = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        step = state.global_step
        row = self._row(step)
        if self._validation and self._plan.validates(step):
            row["validation_loss"] = self._validated()
        if not math.isfinite(row["loss"]):
            raise InputError(
                f"step {step}: the loss is {row['loss']}; lower --lr, or raise --warmup_steps or --dtype's precision. "
                f"The last checkpoint is from before"
            )
        self._metrics.add(row)
        self.trainer.log({k: v for k, v in row.items() if v is not None and k != "step"})
        epoch = self._plan.ends_epoch(step)
        if epoch in self._plan.saved_epochs:
            self._export(epoch, step)
        stopping = self._group.any(bool(self._stop))
        control.should_save = self._plan.checkpoints(step) or stopping
        control.should_training_stop = control.should_training_stop or stopping
        if control.should_save:
            self._metrics.sync()
        return control

    def _row(self, step: int) -> dict[str, Any]:
        loss, tokens = self.trainer.step_log.take()
        self._progress.add_row()
        self._progress.add_tokens(tokens)
        return {
            "step": step,
            "epoch": round(step / self._plan.steps_per_epoch, 4),
            "loss": loss,
            "validation_loss": None,
            "learning_rate": self._learning_rate,
            "tokens": self._metrics.tokens + tokens,
            "tokens_per_second": tokens / max(1e-9, time.monotonic() - self._began),
            "memory_mib": used_memory_mib(self.trainer.args.device),
        }

    def _validated(self) -> float | None:
        found = self.trainer.validation_loss(self._validation, lambda: bool(self._stop))
        return None if found is None else found[0]


class Follower(TrainerCallback):
    """What a process that is not the first does of it: its part of what all do, and nothing that is written."""

    def __init__(self, plan: Plan, group: Group, validation: list[Batch]) -> None:
        self.trainer: Any = None
        self._plan, self._group, self._validation = plan, group, validation

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self._validation and self._group.any(False):
            self._validate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.sampler.epoch = state.global_step // self._plan.steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        self.trainer.step_log.take()
        if self._validation and self._plan.validates(state.global_step):
            self._validate()
        stopping = self._group.any(False)
        control.should_training_stop = control.should_training_stop or stopping
        return control

    def _validate(self) -> None:
        self.trainer.validation_loss(self._validation, lambda: False)


def used_memory_mib(device: torch.device) -> float:
    """The most memory taken so far: the device's where it is CUDA, else the process's, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_memory_mib()["process"]
