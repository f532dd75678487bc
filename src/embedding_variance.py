"""
How far the embeddings of each group's rows spread: the trace of their covariance, with 95 % intervals from a bootstrap
over prompts. From the repository root:
uv run -m src.embedding_variance --embeddings_dir data/experiments/embedded_responses \
    --output_dir data/experiments/spread
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.experiment_config import RunConfigBase
from src.common.files import write_json_atomic
from src.common.jsonl import round_fields, write_jsonl_atomic
from src.common.results import FILE_NAME
from src.common.runs import start_run
from src.common.settings import setting

ROWS_AT_EACH_END = 15


@dataclass(kw_only=True)
class EmbeddingVarianceConfig(RunConfigBase):
    """The spread"""

    embeddings_dir: Path
    """A folder of src.embed_dataset: the embedded responses of a persona run, say."""
    results_path: Path | None = None
    """The JSONL that was embedded, where the shards do not hold its fields. Its rows without a vector are counted."""
    group_by: list[str] = setting(default_factory=lambda: ["persona", "category"])
    """Fields to group by; `persona+turn` groups by both at once."""
    cluster_by: str = "prompt_id"
    """Rows that share this field are resampled together; id where all rows are independent."""
    verify: bool = setting(True, affects_rows=False)
    """Compare every shard with its sha256 first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.group_by)) < len(self.group_by):
            raise InputError(f"--group_by: {' '.join(self.group_by)}; expected each field once")


def main(config: EmbeddingVarianceConfig) -> None:
    from rich.console import Console

    from src.embedding.row_fields import read_results
    from src.embedding.shards_reading import open_embeddings
    from src.embedding.variance import MEASURED, variance_rows

    # 1. The shards, and the fields of the rows that were embedded.
    embeddings = open_embeddings(config.embeddings_dir, config.verify)
    results = read_results(config.results_path) if config.results_path else None

    # 2. One pass over them; a table row a group.
    inputs = [*embeddings.inputs, *([config.results_path] if config.results_path else [])]
    with start_run(config, "embedding_variance", inputs=inputs) as run:
        rows = variance_rows(embeddings, results, config.group_by, config.cluster_by, config.seed)
        rows = [round_fields(row, MEASURED) for row in rows]

        # 3. Files and the table.
        write_jsonl_atomic(run.path(FILE_NAME), rows)
        write_json_atomic(run.path("summary.json"), summary(rows))
        print_table(rows, config, Console(file=sys.stdout))
        run.record(embedding_model=embeddings.model, dim=embeddings.dim, precision=embeddings.precision)
        run.finish({FILE_NAME: "one row a group: trace, interval, spread within a prompt", "summary.json": "the same"})


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """grouping → group → {"covariance_trace": {…}}, as src.view shows it."""
    told: dict[str, Any] = {}
    for row in rows:
        numbers = {name: value for name, value in row.items() if name not in ("id", "grouping", "group")}
        told.setdefault(row["grouping"], {})[row["group"]] = {"covariance_trace": numbers}
    return told


def print_table(rows: Sequence[dict[str, Any]], config: EmbeddingVarianceConfig, console: Any) -> None:
    """A table a grouping, the widest spread first; of a long one its two ends."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for grouping in dict.fromkeys(row["grouping"] for row in rows):
        members = [row for row in rows if row["grouping"] == grouping]
        members.sort(key=lambda row: -1.0 if row["trace"] is None else row["trace"], reverse=True)
        table = Table(title=f"Trace of the covariance by {grouping} [95 % interval over {config.cluster_by}]",
                      title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
        table.add_column(grouping, no_wrap=True, overflow="ellipsis", min_width=16)
        for column in ("rows", "clusters", "no vector", "trace", f"within {config.cluster_by}"):
            table.add_column(column, justify="right", no_wrap=True)
        n_left_out = max(0, len(members) - 2 * ROWS_AT_EACH_END)
        for i, row in enumerate(members):
            if n_left_out and i == ROWS_AT_EACH_END:
                table.add_row(f"… {n_left_out} more", *["…"] * 5)
            if not ROWS_AT_EACH_END <= i < ROWS_AT_EACH_END + n_left_out:
                counts = [str(row[name]) for name in ("n", "n_clusters", "n_without_embedding")]
                table.add_row(Text(row["group"]), *counts, _interval(row), _shown(row["within_cluster_trace"]))
        console.print(table)


def _interval(row: dict[str, Any]) -> str:
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return f"{_shown(row['trace'])}{interval}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    run_command(main, EmbeddingVarianceConfig)
