"""
Rows → LoRA adapter, resumable to the bit. From the repository root:
uv run -m src.finetune --dataset_path data/finetuning/capitalization.json --prompt "Capitalize the word: {input}" \
    --model_id bundled:smollm2-135m --epochs 3 --output_dir data/experiments/capitalize
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_json_atomic, write_text_atomic
from src.common.runs import Run, start_run
from src.common.settings import to_json
from src.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from src.models.loading import ModelFiles
    from src.training.processes import Launched
    from src.training.sources import Source
    from src.training.training import Job

LOGGER = logging.getLogger(__name__)
SUMMARY, LOSS_PAGE = "summary.json", "loss.html"


@dataclass(kw_only=True)
class FinetuneConfig(FinetuneSettings):
    """Fine-tuning"""


def main(config: FinetuneConfig) -> None:
    from src.training.launching import from_launcher

    place = from_launcher(config.num_processes)
    if place is None:
        lead(config)
        return
    from src.training.processes import leading, take_part

    if place.rank:
        take_part(place, config.shard_weights)
        return
    with leading(place, config.shard_weights) as launched:
        lead(config, launched)


def lead(config: FinetuneConfig, launched: "Launched | None" = None) -> None:
    """The run, of which this process is the only one or the first."""
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.hub import check_reference, split_reference
    from src.training.rows import conversations
    from src.training.sources import open_source
    from src.training.training import check_reporter

    # 1. Everything that can be wrong without a model.
    source = open_source(config.dataset_path)
    for rows in source.splits.values():
        for _ in conversations(rows(), preferences=config.objective == "dpo"):
            pass
    check_reference(config.model_id, config.adapter_path)
    if split_reference(config.model_id, config.adapter_path)[1]:
        raise InputError("--model_id names an adapter: an adapter is trained on a model; merge the two first (--merge)")
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    check_reporter(config.report_to)

    # 2. The run folder, fresh or resumed.
    with start_run(config, "finetune", inputs=input_files(config, source)) as run:
        finetune(config, run, source, launched)


def finetune(config: FinetuneConfig, run: Run, source: "Source", launched: "Launched | None") -> None:
    """Rows as tokens, training, merging, the pages on it."""
    from src.training.checkpoints import Checkpoints
    from src.training.training import train

    # 3. The same tokens as generation sees, every row accounted for.
    job = prepare(config, run, source)
    run.record(run_name=job.name, **job.data.facts)
    say_plan(config, job)

    # 4. Training, unless an earlier start came to its end.
    if not run.path(SUMMARY).exists():
        train(job, launched)
        merge(config, run, job.files)
        write_pages(config, run, job)
        Checkpoints(run.folder, job.fingerprint).clear()

    # 5. What is there.
    run.finish(written(config))


def prepare(config: FinetuneConfig, run: Run, source: "Source") -> "Job":
    """The model's files and the rows as the trainers take them."""
    from src.models.loading import load_tokenizer, resolve
    from src.training.data import read_data
    from src.training.training import Job

    files = resolve(config)
    run.record(**files.facts)
    tokenizer = load_tokenizer(files.folder, config.trust_remote_code)
    data = read_data(config, source, files, tokenizer, run.first_started.date())
    return Job(config, run.folder, files, tokenizer, data, name_of(config, run))


def name_of(config: FinetuneConfig, run: Run) -> str:
    """--run_name, or a random one that stays the same when the run goes on."""
    from src.common.run_names import random_name
    from src.training.training import NAME_FILE

    path = run.path(NAME_FILE)
    drawn = path.read_text("utf-8").strip() if path.exists() else random_name()
    return config.run_name or drawn


def say_plan(config: FinetuneConfig, job: "Job") -> None:
    """How much there is to do, and a warm-up that takes too much of it."""
    plan, facts = job.plan, job.data.facts
    LOGGER.info(
        "%s: %d sequences of %d tokens (%d of them learned), the longest of %d; %d steps, %d an epoch",
        job.name, facts["train_sequences"], facts["train_tokens"], facts["learned_tokens"], facts["longest"],
        plan.total_steps, plan.steps_per_epoch,
    )  # fmt: skip
    if facts["validation_sequences_trained_on"]:
        print(
            f"note: {facts['validation_sequences_trained_on']} of {facts['validation_sequences']} validation sequences "
            f"are also trained on: the validation loss says less of other rows",
            file=sys.stderr,
        )
    if config.warmup_steps * 3 > plan.total_steps:
        print(
            f"note: --warmup_steps {config.warmup_steps} is more than a third of the {plan.total_steps} steps: the "
            f"learning rate is at its highest for a short time or never",
            file=sys.stderr,
        )


def merge(config: FinetuneConfig, run: Run, files: "ModelFiles") -> None:
    """Merged weights of every epoch kept."""
    from src.training.adapters import merge_epoch

    for epoch in config.saved_epochs if config.merge else []:
        merge_epoch(run.path(f"epoch_{epoch}"), config, files)


def write_pages(config: FinetuneConfig, run: Run, job: "Job") -> None:
    """loss.html and, last of all, summary.json."""
    from src.common.jsonl import read_jsonl
    from src.training.metrics import FILE_NAME, loss_page

    rows = [row for _, row in read_jsonl(run.path(FILE_NAME))]
    about = {name: value for name, value in to_json(config).items() if name != "datetime_str"}
    write_text_atomic(run.path(LOSS_PAGE), loss_page(f"{job.name}: {config.model_id}", rows, about | job.data.facts))
    last, validated = rows[-1], [row["validation_loss"] for row in rows if row["validation_loss"] is not None]
    summary = {"run_name": job.name, "steps": last["step"], "loss": last["loss"], "tokens": last["tokens"]}
    summary |= {"validation_loss": validated[-1] if validated else None, **job.data.facts}
    write_json_atomic(run.path(SUMMARY), summary)
    print(f"{job.name}: loss {rows[0]['loss']} → {last['loss']}, validation loss {summary['validation_loss']}")


def written(config: FinetuneConfig) -> dict[str, str]:
    """What the run leaves, each with a phrase."""
    files = {
        "metrics.jsonl": "losses, learning rate, tokens a second and memory of every step",
        LOSS_PAGE: "the loss curves",
        SUMMARY: "how it ended",
    }
    for epoch in config.saved_epochs:
        if config.stash_adapter_weights:
            files[f"epoch_{epoch}"] = "merged model, for --model_id"
            files[f"epoch_{epoch}/adapter"] = "adapter, for --adapter_path"
            continue
        files[f"epoch_{epoch}"] = "adapter, for --adapter_path"
        if config.merge:
            files[f"epoch_{epoch}/merged"] = "merged model, for --model_id"
    return files


def input_files(config: FinetuneConfig, source: "Source") -> list[Path]:
    """The files whose content decides the adapter."""
    from src.training.preventing import direction_files

    template = config.chat_template
    files = [Path(template)] if template and template != "plain" else []
    return [*source.files, *files, *direction_files(config.preventative_direction)]


if __name__ == "__main__":
    run_command(main, FinetuneConfig)
