"""
A dataset from one format into another, row by row, with a card of what it holds. From the repository root:
uv run -m src.convert_dataset --dataset_path data/finetuning/capitalization.json --to parquet \
    --output_dir data/experiments/capitalization_parquet
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from src.common.cli import run_command
from src.common.experiment_config import RunConfigBase
from src.common.files import write_json_atomic
from src.common.runs import Run, start_run
from src.common.settings import require_at_least_one, setting

LOGGER = logging.getLogger(__name__)
CARD = "card.json"
FORMATS = ("instruct_json", "chat_json", "chat_jsonl", "prompt_jsonl", "parquet", "arrow")


@dataclass(kw_only=True)
class ConvertDatasetConfig(RunConfigBase):
    """Converting a dataset"""

    dataset_path: Path = setting()
    """The rows, in any format that src.finetune reads."""
    to: str = setting(choices=FORMATS)
    """instruct_json: one file of train / validation / test lists of input and output; chat_json, chat_jsonl, parquet,
    arrow: a file a split, of messages; prompt_jsonl: a file a split, of prompt and completion."""
    num_tasks: int | None = None
    """Only the first N rows of each split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, ("num_tasks",))


def main(config: ConvertDatasetConfig) -> None:
    from src.training.converting import is_preference
    from src.training.sources import open_source

    # 1. What there is; a wrong path answers here.
    source = open_source(config.dataset_path)
    preferences = is_preference(source)

    # 2. The run folder.
    with start_run(config, "convert_dataset", inputs=source.files) as run:
        convert(config, run, source, preferences)


def convert(config: ConvertDatasetConfig, run: Run, source, preferences: bool) -> None:
    """Every row of every split, as it is read; then the card."""
    from src.training.converting import Counts, write_splits

    # 3. The rows.
    counts = {name: Counts() for name in source.splits}
    files = write_splits(run.folder, config.to, source, counts, preferences, config.num_tasks)

    # 4. The card.
    card = {"from": str(config.dataset_path), "format": config.to, "splits": {k: v.card() for k, v in counts.items()}}
    write_json_atomic(run.path(CARD), card)
    for name, count in counts.items():
        print(f"{name}: {count.rows} rows, {count.messages} messages, {count.characters} characters")
    run.finish({**dict.fromkeys(files, "the rows"), CARD: "counts, lengths and a preview of each split"})


if __name__ == "__main__":
    run_command(main, ConvertDatasetConfig)
