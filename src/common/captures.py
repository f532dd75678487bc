"""
The `captures/` folder of a run: hidden states kept from it, in shards that are each written whole.

    shard-00000.safetensors     tensors `<row id>/<layer>.<hook point>`, (rows, d_model) each
    manifest.jsonl              a line a row (`CaptureRow`), written once its shard is on disk
    manifest.json               written last: sha256 of the manifest.jsonl and of each shard
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.common.files import TEMPORARY_SUFFIX, open_atomic, sha256_file, write_json_atomic
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, write_jsonl_atomic

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_NAME = "captures"
ROWS_NAME = "manifest.jsonl"
MANIFEST_NAME = "manifest.json"
SHARD_PATTERN = "shard-*.safetensors"
SHARD_BYTES = 256 << 20
KEY_SYNTAX = re.compile(rf"(0|[1-9]\d*)\.({'|'.join(HOOK_POINTS)})")
REMEDY = "copy the folder again from where it was made, or make the captures again in another --output_dir"

Reduce = Literal["none", "mean"]
Count = Annotated[int, Field(ge=0)]


class CaptureRow(BaseModel):
    """A line of the manifest: what is kept of one row, and where."""

    # Fields are only ever added: a later version's manifest is to be readable.
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    id: str
    shard: Annotated[str, Field(pattern=r"^shard-\d{5,}\.safetensors$")]
    keys: Annotated[list[str], Field(min_length=1)]
    """`<layer>.<hook point>` each."""
    prompt_length: Count
    """Tokens of the prompt."""
    start: Count
    """Position of the first token that is captured, or that is in the mean."""
    n_positions: Count
    """How many tokens are captured, or in the mean, from `start` on."""
    reduce: Reduce
    """`none`: a tensor has n_positions rows; `mean`: one, their mean, float32."""
    dtype: str
    d_model: Count


class CaptureWriter:
    """
    Adds rows to a captures folder, new or of an earlier, perhaps killed, start of the run:

        with CaptureWriter(folder) as writer:
            for row in rows:
                if row.id not in writer.done: writer.add(row.id, tensors, prompt_length=…, …)
            writer.finish()

    Rows not yet in a shard when the process is killed are lost. Memory: a shard, three times while it is written.
    Raises InputError for a manifest that is broken or without its shards, and for shards without their manifest.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shard_bytes = shard_bytes
        if not (folder / MANIFEST_NAME).exists():
            repair_torn_tail(folder / ROWS_NAME)
        self._rows = _read_rows(folder)
        self.done: set[str] = set(self._rows)
        """Ids of the rows on disk."""
        _remove_leftovers(folder, _first_rows(self._rows))
        self._pending: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._n_bytes = 0

    def add(
        self, row_id: str, tensors: "Mapping[str, Tensor]", *, prompt_length: int, start: int, reduce: Reduce,
        n_positions: int,
    ) -> None:  # fmt: skip
        """
        Keeps a copy of one row's tensors: `<layer>.<hook point>` → (n_positions, d_model) of any float dtype, or with
        reduce "mean" float32 (1, d_model). All of a row have one shape and dtype.
        """
        assert row_id not in self.done and row_id not in self._pending, f"row {row_id!r} is captured twice"
        dtype, d_model = _check_tensors(row_id, tensors, reduce, n_positions)
        # A view would keep more alive than it shows: the whole batch, or a segment that others wait for.
        copies = {f"{row_id}/{key}": _copy(tensor) for key, tensor in tensors.items()}
        row = CaptureRow(
            id=row_id, shard=self._shard_name(), keys=list(tensors), prompt_length=prompt_length, start=start,
            n_positions=n_positions, reduce=reduce, dtype=dtype, d_model=d_model,
        )  # fmt: skip
        self._pending[row_id] = row.model_dump()
        self._tensors |= copies
        self._n_bytes += sum(copy.nbytes for copy in copies.values())
        if self._n_bytes >= self.shard_bytes:
            self._write_shard()

    def close(self) -> None:
        """Writes what has been added since the last shard as a shard of its own, then its lines of the manifest."""
        if self._pending:
            self._write_shard()

    def finish(self) -> Path:
        """Writes the last shard and both manifests whole; returns the path of manifest.json."""
        self.close()
        write_jsonl_atomic(self.folder / ROWS_NAME, self._rows.values())
        names = [ROWS_NAME, *_first_rows(self._rows)]
        entries = [{"file": name, "sha256": sha256_file(self.folder / name)} for name in names]
        write_json_atomic(self.folder / MANIFEST_NAME, {"n_rows": len(self._rows), "files": entries})
        return self.folder / MANIFEST_NAME

    def _write_shard(self) -> None:
        from safetensors.torch import save

        # From here on the manifest that an earlier start left would be of fewer shards than there are.
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        with open_atomic(self.folder / self._shard_name(), "wb") as file:
            file.write(save(self._tensors))
        # Before the lines: should they fail half way, on a full disk, then no line is written a second time.
        self._rows |= self._pending
        rows, self._pending, self._tensors, self._n_bytes = self._pending, {}, {}, 0
        with JsonlWriter(self.folder / ROWS_NAME) as writer:
            for row in rows.values():
                writer.write(row)
        self.done |= rows.keys()

    def _shard_name(self) -> str:
        # Rows come in the order of their shards, so the last one has the highest number.
        last = next(reversed(self._rows.values()), None)
        return f"shard-{0 if last is None else _number(last['shard']) + 1:05d}.safetensors"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Also when the block raised, on SIGTERM for instance: what has been added is whole.
        self.close()


class Captures:
    """What a captures folder holds; see `read_captures`."""

    def __init__(self, folder: Path, rows: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self._rows = rows
        self._open: tuple[str, Any] | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The manifest's lines in order, with the fields of `CaptureRow`."""
        return list(self._rows.values())

    def tensor(self, row_id: str, layer: int, hook_point: str = "resid_post") -> "Tensor":
        """
        (n_positions, d_model) of the row's dtype, or float32 (1, d_model) of a mean; only it is read from the disk.
        Raises InputError for a row or key that is not there, and for a shard that is missing or cannot be read.
        """
        from safetensors import SafetensorError

        row = self._row(row_id)
        key = f"{layer}.{hook_point}"
        if key not in row["keys"]:
            raise InputError(f"{self.folder}: row {row_id!r} has no {key}; it has {', '.join(row['keys'])}")
        path = self.folder / row["shard"]
        try:
            tensor = self._shard(path, row_id).get_tensor(f"{row_id}/{key}")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {key} of row {row_id!r} cannot be read ({error}); {REMEDY}") from None
        expected = (row["n_positions"] if row["reduce"] == "none" else 1, row["d_model"])
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{path}: {key} of row {row_id!r} is {tuple(tensor.shape)}, {ROWS_NAME} says {expected}; {REMEDY}"
            )
        return tensor

    def verify(self) -> None:
        """Reads every file. Raises InputError for one that is missing or has another sha256 than in manifest.json."""
        recorded = _recorded(self.folder)
        first_rows = _first_rows(self._rows)
        for name in [ROWS_NAME, *first_rows]:
            path = self.folder / name
            whose = f" (row {first_rows[name]!r} is in it)" if name in first_rows else ""
            if not path.is_file():
                raise InputError(f"{path}: no such file{whose}; {REMEDY}")
            if sha256_file(path) != recorded.get(name):
                raise InputError(f"{path}: its sha256 is not that of {MANIFEST_NAME}{whose}; {REMEDY}")

    def _row(self, row_id: str) -> dict[str, Any]:
        if row_id not in self._rows:
            some = ", ".join(map(repr, list(self._rows)[:3])) or "none"
            raise InputError(f"{self.folder}: no row {row_id!r} among its {len(self._rows)}; the first are {some}")
        return self._rows[row_id]

    def _shard(self, path: Path, row_id: str) -> Any:
        from safetensors import safe_open

        if self._open is None or self._open[0] != path.name:
            if not path.is_file():
                raise InputError(f"{path}: no such file; row {row_id!r} is in it; {REMEDY}")
            self._open = path.name, safe_open(path, "pt")
        return self._open[1]


def read_captures(folder: Path) -> Captures:
    """
    The captures of a run, finished or still running, whose rows on disk so far are given then; folder: its `captures/`.
    Raises InputError when there is no manifest, and for a line of it that is broken or of a row that was there before.
    """
    if not (folder / ROWS_NAME).is_file():
        inside = (folder / FOLDER_NAME / ROWS_NAME).is_file()
        remedy = f"its {FOLDER_NAME} folder has one: give that" if inside else "expected the captures folder of a run"
        raise InputError(f"{folder}: has no {ROWS_NAME}; {remedy}")
    return Captures(folder, _read_rows(folder))


def _read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / ROWS_NAME
    rows: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return rows
    is_finished = (folder / MANIFEST_NAME).exists()
    for number, row in read_jsonl(path, in_progress=not is_finished):
        try:
            CaptureRow.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}:{number}: {field}: {first['msg']}; expected a line as Tiller writes it") from None
        if row["id"] in rows:
            raise InputError(f"{path}:{number}: row {row['id']!r} is there twice; expected each id once")
        rows[row["id"]] = row
    return rows


def _first_rows(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Shard → the id of its first row, in the order of the rows."""
    first: dict[str, str] = {}
    for row_id, row in rows.items():
        first.setdefault(row["shard"], row_id)
    return first


def _remove_leftovers(folder: Path, shards: dict[str, str]) -> None:
    """shards: those that have rows in the manifest → their first row."""
    for name, row_id in shards.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; row {row_id!r} is in it; {REMEDY}")
    orphans = sorted(path for path in folder.glob(SHARD_PATTERN) if path.name not in shards)
    # A kill leaves one at most, and no manifest.json: more means that lines were lost, and then nothing is deleted.
    if len(orphans) > 1 or (orphans and (folder / MANIFEST_NAME).exists()):
        raise InputError(f"{orphans[0]}: {folder / ROWS_NAME} has no line of it; {REMEDY}")
    for path in [*orphans, *folder.glob(f".*{TEMPORARY_SUFFIX}")]:
        path.unlink()


def _recorded(folder: Path) -> dict[str, str]:
    """File → sha256, as manifest.json has them."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file, the run is unfinished; give its command again, and it goes on")
    return {entry["file"]: entry["sha256"] for entry in json.loads(path.read_text(encoding="utf-8"))["files"]}


def _check_tensors(row_id: str, tensors: "Mapping[str, Tensor]", reduce: Reduce, n_positions: int) -> tuple[str, int]:
    """The dtype and d_model that all of them have."""
    assert tensors, f"row {row_id!r}: no tensors"
    assert reduce in ("none", "mean"), f"row {row_id!r}: reduce is {reduce!r}"
    assert n_positions >= (reduce == "mean"), f"row {row_id!r}: {reduce} of {n_positions} positions"
    kinds = {key: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in tensors.items()}
    dtype, shape = next(iter(kinds.values()))
    assert len(set(kinds.values())) == 1, f"row {row_id!r}: its tensors differ in dtype or shape: {kinds}"
    assert all(KEY_SYNTAX.fullmatch(key) for key in kinds), f"row {row_id!r}: keys {list(kinds)}"
    n_rows = n_positions if reduce == "none" else 1
    assert len(shape) == 2 and shape[0] == n_rows, f"row {row_id!r}: tensors {shape} of {n_positions} positions"
    assert "float" in dtype and (reduce == "none" or dtype == "float32"), f"row {row_id!r}: {dtype}, reduce {reduce}"
    return dtype, shape[1]


def _copy(tensor: "Tensor") -> "Tensor":
    import torch

    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _number(shard: str) -> int:
    return int(shard.removeprefix("shard-").removesuffix(".safetensors"))
