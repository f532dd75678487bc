"""Making a worker's shards: those that are there and whole are kept, the others are embedded and written."""

import logging
import re
from pathlib import Path
from typing import Any

from src.common.progress import Progress
from src.common.settings import row_fields, to_json
from src.embedding.backends import Backend
from src.embedding.loading import load_shards
from src.embedding.pipeline import run_stages
from src.embedding.reading import Source
from src.embedding.records import Shard
from src.embedding.settings import EmbedSettings
from src.embedding.shards import Layout, valid_sidecar, write_shard

LOGGER = logging.getLogger(__name__)
LEFTOVER = re.compile(r"^\.shard-(\d+)\..*\.tmp$")
RESOLVED = ("dataset_path", "subset", "model_id", "prompt_name", "revision")
"""Settings that stand in the shards by what they were resolved to, or as what they name."""


def is_own(settings: EmbedSettings, index: int) -> bool:
    """Whether this worker makes the shard."""
    return index % settings.num_workers == settings.worker_index


def stored_settings(
    settings: EmbedSettings, source: Source, content: dict[str, str], facts: dict[str, Any]
) -> dict[str, Any]:
    """What a shard's vectors depend on, by name: settings, the dataset's content, the model, what `auto` came to."""
    values = to_json(settings)
    kept = {name: values[name] for name in row_fields(settings) if name not in RESOLVED}
    return {"dataset": source.name, "content": content, "model_id": settings.model_id, **kept, **facts}


def make_shards(settings: EmbedSettings, source: Source, backend: Backend, stored: dict[str, Any]) -> None:
    """Embeds and writes. Raises what any stage raises; shards that were written by then are whole."""
    folder = settings.output_dir
    _remove_leftovers(settings)
    layout = Layout(
        dataset=source.name, split=settings.split or "", model=settings.model_id, precision=settings.precision,
        truncate_dim=settings.truncate_dim, normalize=settings.normalize, store_text=settings.store_text,
        pool_chunks=settings.pool_chunks,
    )  # fmt: skip
    facts = {"settings": stored, "run_id": settings.datetime_str, "device": backend.device}
    made, kept = [], []
    with Progress(total=_own_rows(settings, source), done=0, unit="row") as progress:

        def is_wanted(index: int) -> bool:
            sidecar = valid_sidecar(folder, index) if is_own(settings, index) else None
            if sidecar:
                kept.append(index)
                progress.add_row(sidecar["row_stop"] - sidecar["row_start"])
            return is_own(settings, index) and sidecar is None

        def write(shard: Shard) -> None:
            made.append(write_shard(folder, shard, layout, facts)["index"])
            # Batches count pieces; equal texts are fewer than their rows, chunks more.
            progress.add_row(shard.row_stop - shard.row_start - len(shard.pieces))

        def report(pieces: int, tokens: int) -> None:
            progress.add_row(pieces)
            progress.add_tokens(tokens)

        run_stages(load_shards(source, settings, backend.pieces_of, is_wanted), backend.encoders, write, report)
    LOGGER.info("%d shards made, %d were there already", len(made), len(kept))


def _own_rows(settings: EmbedSettings, source: Source) -> int | None:
    total = source.count()
    if total is None:
        return settings.num_rows if settings.num_workers == 1 else None
    total = min(total, settings.num_rows or total)
    starts = range(0, total, settings.rows_per_shard)
    return sum(min(settings.rows_per_shard, total - first) for n, first in enumerate(starts) if is_own(settings, n))


def _remove_leftovers(settings: EmbedSettings) -> None:
    """What a kill left half written of this worker's shards; another worker may be writing its own."""
    for path in Path(settings.output_dir).iterdir():
        found = LEFTOVER.match(path.name)
        if found and is_own(settings, int(found[1])):
            path.unlink(missing_ok=True)
