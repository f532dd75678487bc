"""
Fetch a dataset, or a sample of it, into one Parquet file with a card of what it holds. From the repository root:
uv run -m src.download_dataset --name data/abliteration/other.jsonl --source jsonl --num_rows 50 \
    --output_dir data/experiments/fifty_prompts
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.experiment_config import RunConfigBase
from src.common.files import encode_json, safe_name, sha256_file, write_json_atomic
from src.common.run_folder import read_json
from src.common.runs import Run, start_run
from src.common.settings import require_at_least_one, setting

if TYPE_CHECKING:
    from src.embedding.tables import TableSource

LOGGER = logging.getLogger(__name__)
CARD = "card.json"
FILE_KINDS = ("jsonl", "parquet", "csv")


@dataclass(kw_only=True)
class DownloadDatasetConfig(RunConfigBase):
    """The download"""

    name: str
    """Hub id, or the path of a file or folder."""
    source: str = setting("hub", choices=("hub", "local", *FILE_KINDS))
    """hub; local: a folder that the datasets library reads; jsonl, parquet, csv: a file, or a folder of them."""
    subset: str | None = None
    """Configuration of a dataset that has several."""
    split: str | None = None
    """Split of the dataset; none is train, or the only one."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository; the newest when left out."""
    num_rows: int | None = setting(None, aliases=("num_tasks",))
    """A sample of exactly so many rows, by a hash of seed and row."""
    fraction: float = 1.0
    """A sample of about this share of the rows, by the same hash."""
    describe_only: bool = setting(False, affects_rows=False)
    """Only say what it is: fields, licence, revision, the first row. Writes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, ("num_rows",))
        if not 0 < self.fraction <= 1:
            raise InputError(f"--fraction {self.fraction}: expected a share above 0, up to 1")
        if self.num_rows is not None and self.fraction < 1:
            raise InputError("--num_rows and --fraction exclude each other; give one of them")
        asked = [name for name in ("subset", "split") if self.source in FILE_KINDS and getattr(self, name)]
        asked += ["revision"] if self.source != "hub" and self.revision else []
        if asked:
            raise InputError(f"--{asked[0]} with --source {self.source}: it has none; leave it out")
        if self.source != "hub" and not Path(self.name).exists():
            raise InputError(f"--name {self.name}: no such file or folder; --source hub takes the name of a dataset")


def main(config: DownloadDatasetConfig) -> None:
    from src.embedding.downloading import write_rows

    # 1. What there is.
    if config.describe_only:
        describe(config, open_source(config))
        return

    # 2. The rows, streamed: nothing of them is held. A start that was stopped begins anew, a finished one is kept.
    with start_run(config, "download_dataset", inputs=input_files(config)) as run:
        card = finished_card(run)
        if card:
            LOGGER.info("It is there already: %s rows", card["rows"])
            finish(run, card)
            return
        source = open_source(config)
        path = run.path(f"{safe_name(source.split)}.parquet")
        told, n_rows, n_read = write_rows(source, path, config.seed, config.num_rows, config.fraction)

        # 3. A card of what it is.
        card = {
            "name": config.name, "source": config.source, "subset": config.subset, "split": source.split,
            **{"revision": None, "licence": None}, **source.facts,
            "sampling": {"seed": config.seed, "num_rows": config.num_rows, "fraction": config.fraction},
            "rows": n_rows, "rows_in_source": n_read, "fields": told,
            "file": {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)},
        }  # fmt: skip
        write_json_atomic(run.path(CARD), card)
        finish(run, card)


def input_files(config: DownloadDatasetConfig) -> list[Path]:
    """The local files whose content decides the rows."""
    from src.embedding.tables import files_of

    return files_of(Path(config.name), config.source) if config.source in FILE_KINDS else []


def finished_card(run: Run) -> dict[str, Any] | None:
    """The card of an earlier start whose file is as it was written."""
    if not run.path(CARD).exists():
        return None
    card = read_json(run.path(CARD))
    path = run.path(card["file"]["name"])
    return card if path.exists() and sha256_file(path) == card["file"]["sha256"] else None


def finish(run: Run, card: dict[str, Any]) -> None:
    """End the run and print what was written."""
    run.finish({
        card["file"]["name"]: f"{card['rows']} of {card['rows_in_source']} rows",
        CARD: "fields, lengths, licence, revision, sha256",
    })  # fmt: skip


def open_source(config: DownloadDatasetConfig) -> "TableSource":
    """The dataset, its schema known and none of its rows read but for that. Raises InputError as its readers do."""
    from dataclasses import replace

    from src.embedding.tables import open_dataset, open_files

    if config.source in FILE_KINDS:
        return open_files(Path(config.name), config.source)
    if config.source == "local":
        return open_dataset(config.name, config.subset, config.split, None)
    from src.models.hub import dataset_facts

    commit, licence = dataset_facts(config.name, config.revision, "--name")
    source = open_dataset(config.name, config.subset, config.split, commit)
    return replace(source, facts={"revision": commit, "licence": licence})


def describe(config: DownloadDatasetConfig, source: "TableSource") -> None:
    """Print what a dataset is."""
    shown = {"split": source.split, "rows": source.rows, "revision": None, "licence": None} | source.facts
    for name, value in ({"name": config.name} | shown).items():
        print(f"{name:>10}  {'unknown' if value is None else value if isinstance(value, str) else encode_json(value)}")
    first = next((batch.slice(0, 1).to_pylist()[0] for batch in source.batches() if len(batch)), {})
    for field in source.schema:
        value = " ".join(str(first.get(field.name)).split())
        print(f"{field.name:>10}  {field.type}: {value if len(value) <= 90 else value[:89] + '…'}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main, DownloadDatasetConfig)
