"""The cells of an evaluation: tasks × models × personas × arms, and which of them are done."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.common.results import Results, Row, make_id
from src.common.rows import Persona
from src.evaluation.sources import Source
from src.models.arms import Arm

FILE_NAME = "cells.jsonl"
LOGS = "evals"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task on one model under one arm as one persona."""

    source: Source
    reference: str
    persona: Persona | None
    arm: Arm

    @property
    def id(self) -> str:
        persona = self.persona
        who = (persona.persona, persona.category, persona.article) if persona else ("", "", "")
        return make_id("cell", self.source.word, self.reference, *who, self.arm.name)

    def row_id(self, sample_id: str, epoch: int) -> str:
        """16 hex digits that name the row of a sample and repeat, the same in every run."""
        return make_id(self.id, sample_id, epoch)

    @property
    def log_name(self) -> str:
        """The name of its `.eval` file."""
        model = Path(self.reference.rpartition("+")[2]).name or self.reference
        words = [self.source.name, model, self.persona.persona if self.persona else "", self.arm.name]
        # Letters of any script, but none that a shell, a URL or another file system reads as more.
        return "_".join([*(re.sub(r"[^\w.+-]+", "_", word) for word in words if word), self.id]) + ".eval"


def build_cells(
    sources: Sequence[Source], references: Sequence[str], personas: Sequence[Persona | None], arms: Sequence[Arm]
) -> list[Cell]:
    """Every combination; task by task, then model by model, persona by persona, arm by arm."""
    return [
        Cell(source=source, reference=reference, persona=persona, arm=arm)
        for source in sources
        for reference in references
        for persona in personas
        for arm in arms
    ]


class DoneCells(Results):
    """cells.jsonl: the cells whose rows are whole, each with its number of samples and its log."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        """limit: first samples of each task that are wanted, None for all."""
        super().__init__(folder, name=FILE_NAME)
        self._limit = limit

    def has(self, cell: Cell) -> bool:
        """Whether the cell is done as it is wanted now."""
        row = self.rows.get(cell.id)
        return row is not None and row["limit"] == self._limit

    def note(self, cell: Cell, n_rows: int, scorer: str) -> None:
        self.drop([cell.id])
        self.add({
            "id": cell.id, "task": cell.source.name, "model_id": cell.reference,
            "persona": cell.persona.persona if cell.persona else None, "arm": cell.arm.name, "limit": self._limit,
            "n_rows": n_rows, "scorer": scorer, "log": f"{LOGS}/{cell.log_name}",
        })  # fmt: skip


def drop_unfinished(results: Results, done: DoneCells, cells: Iterable[Cell]) -> None:
    """Forget the rows of cells that are not done: they are made again, from the answers that are there."""
    open_ids = {cell.id for cell in cells if not done.has(cell)}
    known = set(done.rows) - open_ids
    results.drop([row_id for row_id, row in results.rows.items() if row["cell"] not in known])


def ordered(rows: Iterable[Row], cells: Sequence[Cell]) -> list[str]:
    """Row ids, cell by cell."""
    place = {cell.id: i for i, cell in enumerate(cells)}
    listed = sorted((row for row in rows if row["cell"] in place), key=lambda row: place[str(row["cell"])])
    return [str(row["id"]) for row in listed]
