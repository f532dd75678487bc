"""
Make one run folder of the folders that several workers wrote. From the repository root:
uv run -m src.merge_shards --shards_dir data/experiments/first/shards --output_dir data/experiments/first

Worker k of n has the tasks k, k + n, k + 2n, …, so taking a task from each in turn gives the order of one process. A
task's rows stand together and begin with `turn` 0 (or have no `turn`, and are one). Parquet files are concatenated.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import open_atomic, write_json_atomic
from src.common.jsonl import encode_row, read_jsonl
from src.common.provenance import start_session
from src.common.run_folder import (
    CONFIG,
    DONE,
    PROVENANCE,
    comparable,
    lock_folder,
    make_folder,
    read_json,
    read_run,
    refuse_differences,
)
from src.common.runs import PINNED, Run, worker_name
from src.common.settings import setting

Row = dict[str, Any]
WORKER = re.compile(r"worker-(\d+)-of-(\d+)")


@dataclass(kw_only=True)
class MergeShardsConfig:
    """The merge"""

    shards_dir: Path
    """Folder that holds the workers' run folders, worker-00000-of-00004 and so on."""
    output_dir: Path = setting(affects_rows=False)
    """The merged run's folder; the one above shards_dir will do."""


def main(config: MergeShardsConfig) -> None:
    # 1. All workers are there, have finished, and ran the same thing.
    workers = finished_workers(config.shards_dir)
    merged_config, merged_provenance = agreed(workers)
    merged_config["config"] |= {"output_dir": str(config.output_dir), "num_workers": 1, "worker_index": 0}

    # 2. The merged run's folder, in the place of the run that one process would have made.
    with open_merged(config.output_dir, merged_config, merged_provenance) as run:
        # 3. Rows in task order, then the arrays beside them. What was computed over fewer rows goes.
        refuse_losing_rows(config.output_dir, workers)
        run.path("summary.json").unlink(missing_ok=True)
        written = {}
        for name, what in merged_files(workers).items():
            paths = [worker / name for worker in workers]
            if name.endswith(".jsonl"):
                write_interleaved(run.path(name), paths)
            else:
                write_concatenated(run.path(name), paths)
            written[name] = what
        run.finish(written)
    print("the same command with this --output_dir finds all rows done and writes what is computed over them (summary)")


def finished_workers(shards_dir: Path) -> list[Path]:
    """The workers' folders in order. Raises InputError where one is missing or has not finished."""
    found = [WORKER.fullmatch(path.name) for path in shards_dir.iterdir()] if shards_dir.is_dir() else []
    counts = sorted({int(match[2]) for match in found if match})
    if len(counts) != 1:
        told = f"workers of {' and of '.join(map(str, counts))}" if counts else "no worker-<i>-of-<n> folder"
        raise InputError(f"--shards_dir {shards_dir}: {told}; expected the folders of one number of workers")
    workers = [shards_dir / worker_name(index, counts[0]) for index in range(counts[0])]
    for index, worker in enumerate(workers):
        if not (worker / DONE).exists():
            state = "has not finished" if worker.exists() else "is missing"
            raise InputError(f"{worker}: worker {index} {state}; run it again with --worker_index {index}")
    return workers


def agreed(workers: Sequence[Path]) -> tuple[Row, Row]:
    """
    The config.json and provenance.json that the workers share, with the sessions of all.
    Raises InputError where they differ in anything that changes rows.
    """
    runs = [read_run(worker) for worker in workers]
    first_config, first_provenance = runs[0]
    for worker, (config, provenance) in zip(workers, runs, strict=True):
        refuse_differences(worker, identity(first_config, first_provenance), identity(config, provenance))
    sessions = [session for _, provenance in runs for session in provenance["sessions"]]
    return first_config, first_provenance | {"sessions": sessions}


def identity(config: Row, provenance: Row) -> Row:
    """What must be equal for two run folders to hold parts of one run."""
    fields = comparable(config["config"], dict.fromkeys(config["affects_rows"]), provenance["inputs"])
    return {"command": config["command"]} | fields | {name: provenance.get(name) for name in PINNED}


def open_merged(folder: Path, config: Row, provenance: Row) -> Run:
    """The merged run's folder, held by this process. Raises InputError where another run is in it."""
    make_folder(folder)
    lock = lock_folder(folder)
    resumed = (folder / CONFIG).exists()
    if resumed:
        refuse_differences(folder, identity(*read_run(folder)), identity(config, provenance))
    (folder / DONE).unlink(missing_ok=True)
    provenance["sessions"].append(start_session())
    write_json_atomic(folder / PROVENANCE, provenance)
    write_json_atomic(folder / CONFIG, config)
    return Run(folder, resumed, provenance, lock, handlers=[])


def refuse_losing_rows(folder: Path, workers: Sequence[Path]) -> None:
    """Raises InputError where the folder holds rows that no worker has: merging would drop them."""
    path = folder / "results.jsonl"
    if not path.exists():
        return
    merged = {row["id"] for worker in workers for _, row in read_jsonl(worker / path.name)}
    lost = [row["id"] for _, row in read_jsonl(path) if row["id"] not in merged]
    if lost:
        raise InputError(f"{path}: {len(lost)} of its rows are in no worker's folder; choose another --output_dir")


def merged_files(workers: Sequence[Path]) -> dict[str, str]:
    """name -> what it is, of each JSONL and Parquet file. Raises InputError where some workers lack one."""
    lists = [read_json(worker / DONE)["files"] for worker in workers]
    names = [name for name in dict.fromkeys(name for files in lists for name in files) if _is_rows(name)]
    for name in names:
        for worker, files in zip(workers, lists, strict=True):
            if name not in files:
                raise InputError(f"{worker}: it has no {name}, other workers have; run all with the same flags")
    return {name: lists[0][name]["what"] for name in names}


def _is_rows(name: str) -> bool:
    return name.endswith((".jsonl", ".parquet"))


def write_interleaved(path: Path, parts: Sequence[Path]) -> None:
    """
    The tasks of all parts, one of each in turn. Raises InputError for an id that is there twice, and where a part has
    more or fewer tasks than its share, so that the order cannot be known.
    """
    seen: dict[str, Path] = {}
    with open_atomic(path, "wb") as file:
        ended_at: Path | None = None
        for round_ in zip_longest(*(tasks(part) for part in parts)):
            for part, rows in zip(parts, round_, strict=True):
                if rows is None:
                    ended_at = ended_at or part
                    continue
                if ended_at is not None:
                    raise InputError(f"{ended_at}: it has fewer tasks than {part}; run all workers with the same flags")
                for row in rows:
                    if row["id"] in seen:
                        raise InputError(f"{part}: id {row['id']!r} is in {seen[row['id']]} too; expected each id once")
                    seen[row["id"]] = part
                    file.write(encode_row(row))


def tasks(path: Path) -> Iterator[list[Row]]:
    """The rows of each task of a results file: those up to the next that is no later turn."""
    rows: list[Row] = []
    for _, row in read_jsonl(path):
        if rows and not row.get("turn"):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def write_concatenated(path: Path, parts: Sequence[Path]) -> None:
    """The rows of all Parquet files, one file after the other. Raises InputError where their columns differ."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0])
    with open_atomic(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            source = pq.ParquetFile(part)
            if not source.schema_arrow.equals(schema):
                raise InputError(f"{part}: its columns differ from those of {parts[0]}; expected the same")
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group))


if __name__ == "__main__":
    run_command(main, MergeShardsConfig)
