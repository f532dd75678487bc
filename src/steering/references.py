"""references.jsonl: the unsteered responses as token ids."""

from pathlib import Path

from src.common.errors import InputError
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, write_jsonl_atomic
from src.common.results import Results
from src.models.arms import UNSTEERED

REFERENCES = "references.jsonl"


class References:
    """Token ids of the unsteered responses, on which divergences are measured: what text cannot give back exactly."""

    def __init__(self, folder: Path, results: Results) -> None:
        """Those of an earlier start. Raises InputError where one of its unsteered rows has none."""
        path = folder / REFERENCES
        repair_torn_tail(path)
        # A kill may have fallen between a reference and its row, which is then asked again.
        kept = [row for _, row in read_jsonl(path) if row["id"] in results.rows] if path.exists() else []
        self.token_ids: dict[str, tuple[int, ...]] = {str(row["id"]): tuple(row["token_ids"]) for row in kept}
        for row_id, row in results.rows.items():
            if row["arm"] == UNSTEERED and row_id not in self.token_ids:
                raise InputError(f"{path}: has no token ids of row {row_id}; choose another --output_dir")
        write_jsonl_atomic(path, kept)
        self._writer = JsonlWriter(path)

    def add(self, row_id: str, token_ids: tuple[int, ...]) -> None:
        """To be called before the row is written."""
        self._writer.write({"id": row_id, "token_ids": list(token_ids)})
        self.token_ids[row_id] = token_ids

    def close(self) -> None:
        self._writer.close()
