"""One training from rows to adapters: fresh, or going on from the last checkpoint."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, SFTConfig

from src.common.errors import InputError, StopRequested
from src.common.files import write_text_atomic
from src.common.progress import Progress
from src.models.loading import ModelFiles, load_weights
from src.models.model_folder import remove_unfinished
from src.training import preventing
from src.training.adapters import Base, base_of, drop_epochs_behind, lora_config, write_adapter
from src.training.batches import Collator, EpochSampler, steps_of
from src.training.checkpoints import Checkpoints
from src.training.data import Data
from src.training.group import Group
from src.training.keeping import Follower, Keeper, Plan
from src.training.metrics import Metrics
from src.training.processes import Launched, together
from src.training.settings import FinetuneSettings
from src.training.stopping import StopSignal
from src.training.trainers import DpoTrainer, SftTrainer

LOGGER = logging.getLogger(__name__)
NAME_FILE = "run_name.txt"
"""Written when training begins, so that a run without a name keeps the one that it drew."""


@dataclass(frozen=True)
class Job:
    """Everything that a training needs."""

    config: FinetuneSettings
    folder: Path
    files: ModelFiles
    tokenizer: Any
    data: Data
    name: str

    @property
    def plan(self) -> Plan:
        config = self.config
        return Plan(
            steps_per_epoch=steps_of(len(self.data.train), config.batch_size, config.gradient_accumulation),
            epochs=config.epochs,
            validate_every=config.validate_every,
            checkpoint_every=config.checkpoint_every,
            saved_epochs=tuple(config.saved_epochs),
        )

    @property
    def fingerprint(self) -> str:
        """Of what decides every number: rows, weights, settings that are in no row of them."""
        digest = hashlib.sha256()
        for row in self.data.train:
            digest.update(json.dumps(row, sort_keys=True).encode())
        names = (
            "objective", "dpo_beta", "lora_rank", "alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora",
            "epochs", "lr", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm", "batch_size",
            "gradient_accumulation", "seed", "quantization", "preventative_direction", "num_processes",
        )  # fmt: skip
        facts = [self.files.facts["model_fingerprint"], self.files.dtype_name]
        digest.update(json.dumps([*facts, *(getattr(self.config, name) for name in names)]).encode())
        return digest.hexdigest()


def train(job: Job, launched: Launched | None = None) -> int:
    """
    Train to the end, or until a signal; returns the step that the run went on from, 0 for a fresh one. What it leaves
    in the run's folder: metrics.jsonl, an adapter for each epoch to be kept, a checkpoint of the last step. launched:
    the processes of --num_processes, where a launcher has started them all.

    Raises StopRequested after the checkpoint that a signal asks for, and InputError for a checkpoint of something else,
    a full disk, or modules that are not there.
    """
    plan, checkpoints = job.plan, Checkpoints(job.folder, job.fingerprint)
    found = checkpoints.latest()
    step, path = found or (0, None)
    remove_unfinished(job.folder)
    drop_epochs_behind(job.folder, step, plan.steps_per_epoch)
    stop, base = StopSignal(), base_of(job.config, job.files)
    metrics = Metrics(job.folder, step)
    if step == plan.total_steps and not (job.data.validation and metrics.lacks_validation(plan.validates)):
        metrics.close()
        return step
    _refuse_few_devices(job, launched.local_size if launched else job.config.num_processes)
    going_on = str(path / f"checkpoint-{step}") if path else None
    work, config = partial(follow, job, going_on), job.config
    others = launched.doing(work) if launched else together(config.num_processes, config.shard_weights, work)
    with stop.heeded(), others as group, Progress(total=plan.total_steps, done=step) as progress:
        export = _exporter(job, base, lambda: keeper.trainer)
        keeper = Keeper(plan, group, metrics, job.data.validation, stop, export, progress)
        trainer = make_trainer(job, checkpoints, group, keeper)
        if path:
            LOGGER.info("Going on from the checkpoint of step %d of %d", step, plan.total_steps)
        if group.any(bool(stop)):
            raise StopRequested(stop.name)
        write_text_atomic(job.folder / NAME_FILE, f"{job.name}\n")
        trainer.train(resume_from_checkpoint=going_on)
    metrics.close()
    if stop:
        # Also behind the last step: what is left to do then can take long.
        raise StopRequested(stop.name)
    return step


def _refuse_few_devices(job: Job, n: int) -> None:
    device = job.files.device
    there = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if device.type != "cpu" and n > there:
        raise InputError(
            f"--num_processes: {n} here, and --device {device} is {there}; take at most one process a device"
        )


def follow(job: Job, going_on: str | None, group: Group) -> None:
    """The training as a process beside the first has it: it writes nothing. going_on: the checkpoint's folder."""
    for library in (transformers, datasets):
        # What they have to say the first process says.
        library.utils.logging.set_verbosity_error()
    follower = Follower(job.plan, group, job.data.validation)
    trainer = make_trainer(job, Checkpoints(job.folder, job.fingerprint), group, follower)
    if not group.any(False):
        trainer.train(resume_from_checkpoint=going_on)


def make_trainer(
    job: Job, checkpoints: Checkpoints, group: Group, keeper: Keeper | Follower
) -> SftTrainer | DpoTrainer:
    """The trainer with model, adapter and rows; the keeper is given it."""
    config = job.config
    # Weights that are to be spread need not fit on one device.
    device = torch.device("cpu") if group.shards else job.files.device
    model = load_weights(job.files.folder, config, device, job.files.dtype)
    is_dpo = config.objective == "dpo"
    rows_a_step = config.batch_size * config.gradient_accumulation
    sampler = EpochSampler(job.data.lengths, rows_a_step, config.seed, config.group_by_length)
    rest = {"data_collator": Collator(pad_id(job.tokenizer))} if not is_dpo else {}
    acting_on = preventing.acting_on(config, job.files)
    with _without_pad_changes(job.tokenizer):
        trainer = keeper.trainer = (DpoTrainer if is_dpo else SftTrainer)(
            checkpoints=checkpoints,
            sampler=sampler,
            group=group,
            acting=acting_on(model) if acting_on else None,
            model=model,
            args=arguments(job),
            train_dataset=Dataset.from_list(job.data.train),
            processing_class=job.tokenizer,
            peft_config=lora_config(config, model),
            callbacks=[keeper],
            **rest,
        )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    for weight in trainer.learned:
        # TRL keeps adapters of quantized models in bfloat16, where small updates are lost.
        weight.data = weight.data.float()
    _refuse_leaking_packs(trainer, job)
    return trainer


def arguments(job: Job) -> SFTConfig | DPOConfig:
    """TRL's arguments; when to save, log and validate is the Keeper's."""
    config, device = job.config, job.files.device.type
    half = job.files.dtype if device == "cuda" else None
    common = {
        "output_dir": str(job.folder),
        "run_name": job.name,
        "num_train_epochs": config.epochs,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_checkpointing": config.gradient_checkpointing and not config.preventative_direction,
        "bf16": half == torch.bfloat16,
        "fp16": half == torch.float16,
        "use_cpu": device == "cpu",
        "seed": config.seed % 2**32,
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": config.report_to,
        "disable_tqdm": True,
    }
    if config.objective == "dpo":
        made = DPOConfig(**common, beta=config.dpo_beta)
    else:
        made = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
    # One process uses one device: with several in sight transformers would split each batch over all.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def check_reporter(name: str) -> None:
    """Raises InputError when what --report_to names is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--report_to {name}: the package {name} is not installed; uv add {name}, or leave it out")


def pad_id(tokenizer: Any) -> int:
    """What fills short rows up; nothing sees it."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


@contextmanager
def _without_pad_changes(tokenizer: Any) -> Any:
    # TRL gives a tokenizer without one a padding token, and saves it so.
    before = tokenizer.pad_token
    yield
    tokenizer.pad_token = before


def _exporter(job: Job, base: Base, trainer: Callable[[], Any]) -> Callable[[int, int], None]:
    def export(epoch: int, step: int) -> None:
        about = {"run_name": job.name, "epoch": epoch, "step": step, "dataset": str(job.config.dataset_path)}
        with trainer().checkpoints.naming_full_disk(step):
            write_adapter(job.folder / f"epoch_{epoch}", trainer().model, base, about)

    return export


@torch.no_grad()
def _refuse_leaking_packs(trainer: Any, job: Job) -> None:
    """Raises InputError when rows in one pack see one another in this model."""
    if not job.config.packing:
        return
    row = next((row for row in job.data.train if row["position_ids"].count(0) > 1), None)
    if row is None:
        return
    start = row["position_ids"].index(0, 1)
    ids = torch.tensor([row["input_ids"]], device=job.files.device)
    places = torch.tensor([row["position_ids"]], device=job.files.device)
    net = trainer.model.eval().get_base_model()
    whole = net(input_ids=ids, position_ids=places, use_cache=False).logits[0, start:]
    alone = net(input_ids=ids[:, start:], position_ids=places[:, start:], use_cache=False).logits[0]
    trainer.model.train()
    apart = (whole - alone).abs().max().item()
    bound = 1e-2 if job.files.dtype == torch.float32 else 1.0
    if not apart <= bound:
        raise InputError(
            f"--packing: rows in one sequence see one another in this model (logits differ by {apart:.2g}); leave it "
            f"out"
        )
