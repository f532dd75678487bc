"""
A dataset's texts to vectors: streamed, in shards that a kill does not lose. From the repository root:
uv run -m src.embed_dataset --dataset_path data/abliteration/other.jsonl --text_field prompt --model_id bundled:minilm \
    --output_dir data/experiments/embedded
"""

import logging
import os
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.cli import run_command
from src.common.errors import CheckFailed, InputError
from src.common.runs import Run, start_run, worker_name
from src.embedding.settings import EmbedSettings

if TYPE_CHECKING:
    from src.embedding.reading import Source

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EmbedDatasetConfig(EmbedSettings):
    """Embedding a dataset"""


def main(config: EmbedDatasetConfig) -> None:
    from src.embedding.loading import first_text_field
    from src.embedding.manifest import FILES
    from src.embedding.pushing import require_token
    from src.embedding.reading import find_source
    from src.models.hub import check_reference

    # 1. Everything that can be wrong without a model.
    source = find_source(config.dataset_path, config.subset, config.split, config.dataset_revision)
    if source.folder and config.output_dir.resolve().is_relative_to(source.folder.resolve()):
        raise InputError(f"--output_dir {config.output_dir}: it lies in the dataset's folder; choose one outside")
    config = replace(config, text_field=first_text_field(source, config))
    if config.backend != "openai":
        check_reference(config.model_id)
    if config.push_to_hub:
        require_token(config.push_to_hub)
    if config.backend == "openai" and not config.execute:
        print_plan(config, source)
        return

    # 2. The run folder, fresh or resumed; shards stand in --output_dir itself, whichever worker makes them.
    with start_run(config, "embed_dataset", may_hold=FILES) as run:
        embed(config, run, source)


def embed(config: EmbedDatasetConfig, run: Run, source: "Source") -> None:
    """Embed the shards that are not there yet, check random rows, and say what there is."""
    from src.embedding.backends import load_backend
    from src.embedding.making import is_own, make_shards, stored_settings
    from src.embedding.manifest import MANIFEST, refuse_other_settings, sidecars_of, write_manifest
    from src.embedding.pushing import push_shards
    from src.embedding.shards import shard_name
    from src.embedding.verification import verify_shards

    # 3. The model, and what vectors depend on: shards of other settings are refused.
    content = source.content()
    with closing(load_backend(config)) as backend:
        settings = stored_settings(config, source, content, backend.facts)
        refuse_other_settings(config.output_dir, settings)
        run.record(backend=backend.facts["backend"], dtype=backend.facts["dtype"], device=backend.device)
        run.record(model_fingerprint=backend.facts["model_fingerprint"], dataset=content)

        # 4. The shards that are missing or damaged.
        make_shards(config, source, backend, settings)
    own = [each for each in sidecars_of(config.output_dir) if is_own(config, each["index"])]
    worker = worker_name(config.worker_index, config.num_workers)

    # 5. Random rows once more, one by one, in float32.
    verification = None
    if config.verify and own:
        pieces_of, load_reference = backend.pieces_of, backend.reference
        del backend
        try:
            verification = verify_shards(config.output_dir, own, source, config, pieces_of, load_reference())
        except CheckFailed as failure:
            # Another worker's manifest must not call the whole complete.
            write_manifest(config.output_dir, config.datetime_str, worker, {"failed": str(failure)})
            raise
        LOGGER.info("Checked %(rows)d rows one by one: least agreement %(least)s", verification)
        run.record(verification=verification)

    # 6. The manifest, the upload, and what was written.
    if not own and config.num_workers > 1:
        run.finish({})
        return
    manifest = write_manifest(config.output_dir, config.datetime_str, worker, verification)
    if not manifest["rows"] and manifest["complete"]:
        raise InputError(f"--dataset_path {config.dataset_path}: no row with a text is left to embed")
    if config.push_to_hub and manifest["complete"]:
        push_shards(config.output_dir, config.push_to_hub, config.public)
    to = Path(os.path.relpath(config.output_dir, run.folder))
    files = {str(to / f"{shard_name(own[0]['index'])}.parquet"): f"and {len(own) - 1} more shards: a row a text"}
    state = "complete" if manifest["complete"] else "other workers' shards are still to come"
    if manifest["truncated"]:
        most = manifest["settings"]["max_length"]
        print(f"note: {manifest['truncated']} texts are longer than {most} tokens and were cut off", file=sys.stderr)
    run.finish(files | {str(to / MANIFEST): f"{manifest['rows']} rows, {manifest['dim']} dimensions; {state}"})


def print_plan(config: EmbedDatasetConfig, source: "Source") -> None:
    """What --execute would send, without a request and without a folder."""
    from src.embedding.loading import load_shards
    from src.embedding.making import is_own
    from src.embedding.openai_encoder import RequestPlan, whole_texts

    plan, rows = RequestPlan(), 0
    for shard in load_shards(source, config, whole_texts, lambda index: is_own(config, index)):
        plan, rows = plan.plus(shard.texts, config.prompt or ""), rows + len(shard.rows)
    cost = plan.cost(config)
    price = "price unknown (--price_per_million)" if cost is None else f"about ${cost:.4f}"
    print(f"{rows} rows, {plan.texts} texts to send, about {plan.tokens} tokens, {plan.requests} requests, {price}")
    print("nothing was sent; --execute sends it")


if __name__ == "__main__":
    run_command(main, EmbedDatasetConfig)
