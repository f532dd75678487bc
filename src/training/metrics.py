"""metrics.jsonl, one row a step, and the page that shows them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.html_report import facts, page, plot, table
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, round_fields, write_jsonl_atomic

FILE_NAME = "metrics.jsonl"
MEASURED = ("loss", "validation_loss", "tokens_per_second", "memory_mib")
Row = dict[str, Any]


class Metrics:
    """The rows of a run: those up to the checkpoint that it goes on from, and those that are added."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: rows behind it are of steps that are done again, and are dropped."""
        self.path = folder / FILE_NAME
        repair_torn_tail(self.path)
        known = [row for _, row in read_jsonl(self.path)] if self.path.exists() else []
        self.rows: list[Row] = [row for row in known if row["step"] <= step]
        assert [row["step"] for row in self.rows] == list(range(1, step + 1)), f"rows up to step {step} are missing"
        if len(self.rows) < len(known):
            write_jsonl_atomic(self.path, self.rows)
        self._writer = JsonlWriter(self.path)

    @property
    def tokens(self) -> int:
        """Tokens that were run up to the last row."""
        return self.rows[-1]["tokens"] if self.rows else 0

    def lacks_validation(self, is_due: Callable[[int], bool]) -> bool:
        """Whether a signal cut the validation of the last row's step short."""
        return bool(self.rows) and self.rows[-1]["validation_loss"] is None and is_due(self.rows[-1]["step"])

    def add(self, row: Row) -> None:
        """Append one step's row."""
        row = round_fields(row, MEASURED)
        self._writer.write(row)
        self.rows.append(row)

    def set_validation(self, loss: float) -> None:
        """The validation loss of the last row, whose validation had been cut short."""
        self.rows[-1] = round_fields(self.rows[-1] | {"validation_loss": loss}, MEASURED)
        self._writer.close()
        write_jsonl_atomic(self.path, self.rows)
        self._writer = JsonlWriter(self.path)

    def sync(self) -> None:
        """All rows so far on the disk itself: a checkpoint of a step must not be there before its row."""
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()


def loss_page(title: str, rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """A page with the losses and the learning rate by step."""
    from plotly.graph_objects import Figure, Scatter

    steps = [row["step"] for row in rows]
    validated = [row for row in rows if row["validation_loss"] is not None]
    losses = Figure(
        [
            Scatter(x=steps, y=[row["loss"] for row in rows], name="training", mode="lines"),
            Scatter(
                x=[row["step"] for row in validated], y=[row["validation_loss"] for row in validated],
                name="validation", mode="lines+markers",
            ),
        ]
    )  # fmt: skip
    losses.update_layout(xaxis_title="step", yaxis_title="loss")
    rates = Figure([Scatter(x=steps, y=[row["learning_rate"] for row in rows], mode="lines")])
    rates.update_layout(xaxis_title="step", yaxis_title="learning rate")
    return page(
        title,
        [("Loss", plot(losses)), ("Learning rate", plot(rates)), ("Settings", facts(about)), ("Steps", table(rows))],
    )
