"""
Hidden states in files: a folder of safetensors shards, each written whole, and a manifest written last.

    settings.json               what the rows are (layers, hook point, token position, model); a folder holds one kind
    shard-00000.safetensors     rows float32 (rows, layers, d_model); offsets int64 (sequences + 1): sequence i has the
                                rows offsets[i] to offsets[i + 1]; metadata: ids, and digests of the sequences' tokens
    manifest.json               the shards in order, with sequences, rows and sha256 of each
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from src.common.errors import InputError
from src.common.files import TEMPORARY_SUFFIX, open_atomic, sha256_file, write_json_atomic
from src.models.token_sequences import TokenSequence

SETTINGS_NAME = "settings.json"
MANIFEST_NAME = "manifest.json"
SHARD_PATTERN = "shard-*.safetensors"
BYTES_PER_SHARD = 64 << 20


class Shard(NamedTuple):
    """What one file holds."""

    ids: tuple[str, ...]
    rows: Tensor
    """float32 (rows, layers, d_model)."""
    offsets: tuple[int, ...]
    """Sequence i has the rows offsets[i] to offsets[i + 1]."""


class ResidualStore:
    """
    Keeps rows as `extract` gives them, and goes on where an earlier, perhaps killed, run of the same kind ended:

        with ResidualStore(folder, {"layers": layers, "position": "last_prompt", …}) as store:
            extract(model, store.missing(sequences), …, on_rows=store.add)
            store.finish()

    Rows not yet in a shard when the process is killed are lost and made again; memory holds one shard at most. The
    folder is made with the first shard.
    settings: JSON values that say what the rows are, model fingerprint, hook point and whatever else they depend on.
    Raises InputError for a folder with rows of other settings and for a shard that cannot be read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, bytes_per_shard: int = BYTES_PER_SHARD) -> None:
        self.folder = folder
        self.bytes_per_shard = bytes_per_shard
        # Through JSON, so that a tuple equals the list that it is read back as.
        self._settings = json.loads(json.dumps(settings, allow_nan=False))
        _refuse_other_settings(folder / SETTINGS_NAME, self._settings)
        self._digests: dict[str, str] = {}
        for path in _shard_paths(folder):
            digests = json.loads(_metadata(path)["digests"])
            twice = self._digests.keys() & digests.keys()
            if twice:
                raise InputError(f"{path}: sequence {min(twice)!r} is in an earlier shard too; remove one of the two")
            self._digests |= digests
        # What a killed run left of a shard that it was writing.
        for path in folder.glob(f".{SHARD_PATTERN}.*{TEMPORARY_SUFFIX}"):
            path.unlink()
        self._asked: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._parts: list[Tensor] = []
        self._n_bytes = 0

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the sequences in the shards."""
        return frozenset(self._digests)

    def missing(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """
        Those of `sequences` that are not in the shards, one by one, for `extract`. Raises InputError for one whose
        tokens differ from those that its id stands for there.
        """
        for sequence in sequences:
            digest = _digest(sequence)
            if sequence.id not in self._digests:
                self._asked[sequence.id] = digest
                yield sequence
            elif self._digests[sequence.id] != digest:
                raise InputError(
                    f"{self.folder}: sequence {sequence.id!r} is there with other tokens; take another folder, or "
                    f"remove this one to make its rows again"
                )

    def add(self, ids: Sequence[str], rows: Tensor) -> None:
        """
        Keep `rows` float32 (n, layers, d_model), one for each of the `ids`, or any number for a single one.

        Only for sequences that `missing` gave, each once.
        """
        assert rows.dtype == torch.float32 and rows.dim() == 3, f"rows are {rows.dtype} {tuple(rows.shape)}"
        assert len(ids) in (1, len(rows)), f"{len(rows)} rows for {len(ids)} ids"
        unknown = [i for i in ids if i not in self._asked or i in self._counts]
        assert not unknown, f"rows of {unknown[0]!r}, which `missing` did not give, or which are there"
        self._counts |= dict.fromkeys(ids, 1) if len(ids) == len(rows) else {ids[0]: len(rows)}
        # A view of a batch would keep the whole batch.
        self._parts.append(rows.clone())
        self._n_bytes += rows.nbytes
        if self._n_bytes >= self.bytes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last shard as a shard of its own."""
        if not self._counts:
            return
        if not (self.folder / SETTINGS_NAME).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.folder / SETTINGS_NAME, self._settings)
        # From here on the manifest that an earlier run left would be of fewer shards than there are.
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        digests = {i: self._asked[i] for i in self._counts}
        offsets = torch.tensor([0, *self._counts.values()]).cumsum(0)
        metadata = {"ids": json.dumps(list(digests)), "digests": json.dumps(digests)}
        content = save({"rows": torch.cat(self._parts), "offsets": offsets}, metadata)
        number = max((int(path.stem.removeprefix("shard-")) for path in _shard_paths(self.folder)), default=-1) + 1
        with open_atomic(self.folder / f"shard-{number:05d}.safetensors", "wb") as file:
            file.write(content)
        self._digests |= digests
        for i in digests:
            del self._asked[i]
        self._counts, self._parts, self._n_bytes = {}, [], 0

    def finish(self) -> Path:
        """Write the last shard and the manifest; returns its path. Raises InputError when there are no rows at all."""
        self.flush()
        entries = [_entry(path) for path in _shard_paths(self.folder)]
        if not entries:
            raise InputError(f"{self.folder}: no sequence was given, so there are no hidden states to keep")
        write_json_atomic(self.folder / MANIFEST_NAME, {"settings": self._settings, "shards": entries})
        return self.folder / MANIFEST_NAME

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Also when the block raised, on SIGTERM for instance: what has been added is whole.
        self.flush()


def read_shards(folder: Path) -> Iterator[Shard]:
    """
    The shards of a finished store in order, one at a time.

    Raises InputError for a folder without a manifest and for a shard that is missing or was changed.
    """
    for entry in read_manifest(folder)["shards"]:
        path = folder / entry["file"]
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise InputError(f"{path}: missing or not as {MANIFEST_NAME} has it; make the hidden states again")
        with safe_open(path, "pt") as file:
            ids = json.loads(file.metadata()["ids"])
            yield Shard(tuple(ids), file.get_tensor("rows"), tuple(file.get_tensor("offsets").tolist()))


def read_rows(folder: Path, ids: Sequence[str]) -> Tensor:
    """
    The rows of `ids` in their order, float32 (rows, layers, d_model); one a sequence unless the position was `all`.

    Memory: these rows and one shard. Raises InputError as `read_shards`, and for an id that is not in the store.
    """
    parts: dict[str, Tensor] = {}
    wanted = set(ids)
    for shard in read_shards(folder):
        for i, start, end in zip(shard.ids, shard.offsets, shard.offsets[1:], strict=False):
            if i in wanted:
                parts[i] = shard.rows[start:end].clone()
    absent = [i for i in ids if i not in parts]
    if absent:
        raise InputError(f"{folder}: no sequence {absent[0]!r} in it ({len(absent)} of {len(ids)} are not)")
    return torch.cat([parts[i] for i in ids])


class LayerReader:
    """
    The rows of a finished store one layer at a time, so that memory holds one layer's rows whatever the number of
    layers. For stores with one row a sequence. Raises InputError as `read_shards`.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        for entry, shard in zip(read_manifest(folder)["shards"], read_shards(folder), strict=True):
            assert len(shard.rows) == len(shard.ids), f"{folder}: {len(shard.rows)} rows of {len(shard.ids)} sequences"
            self._places |= {each: (folder / entry["file"], i) for i, each in enumerate(shard.ids)}

    def rows(self, ids: Sequence[str], column: int) -> Tensor:
        """float32 (len(ids), 1, d_model) of the `column`-th layer of the store, in the order of `ids`."""
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for target, each in enumerate(ids):
            path, source = self._places[each]
            by_file.setdefault(path, []).append((target, source))
        rows: Tensor | None = None
        for path, pairs in by_file.items():
            with safe_open(path, "pt") as file:
                part = file.get_slice("rows")[:, column : column + 1]
            targets, sources = torch.tensor(pairs).T
            rows = part.new_full((len(ids), *part.shape[1:]), torch.nan) if rows is None else rows
            rows[targets] = part[sources]
        assert rows is not None, "rows of no ids"
        return rows


def read_manifest(folder: Path) -> dict[str, Any]:
    """`settings` as given and `shards`: file, sequences, rows, sha256 each. Raises InputError when there is none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{path}: not there; the hidden states are unfinished, or this is no folder of them")
    return json.loads(path.read_text(encoding="utf-8"))


def _refuse_other_settings(path: Path, given: dict[str, Any]) -> None:
    if not path.exists():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in sorted({*stored, *given}) if stored.get(key) != given.get(key)]
    if differing:
        told = "; ".join(f"{key} is {stored.get(key)!r} there and {given.get(key)!r} here" for key in differing)
        raise InputError(f"{path.parent}: holds other hidden states: {told}; take another folder")


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(SHARD_PATTERN), key=lambda path: (len(path.name), path.name))


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and its rows are made again") from error


def _entry(path: Path) -> dict[str, Any]:
    n_sequences = len(json.loads(_metadata(path)["ids"]))
    with safe_open(path, "pt") as file:
        n_rows = file.get_slice("rows").get_shape()[0]
    return {"file": path.name, "n_sequences": n_sequences, "n_rows": n_rows, "sha256": sha256_file(path)}


def _digest(sequence: TokenSequence) -> str:
    span = [] if sequence.text_span is None else [list(sequence.text_span)]
    content = json.dumps([sequence.prompt_length, *sequence.token_ids, *span])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
