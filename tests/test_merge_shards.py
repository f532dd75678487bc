"""Merged workers are what one process would have written, or the merge is refused."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.experiment_config import WorkerConfigBase
from src.common.files import sha256_file
from src.common.jsonl import JsonlWriter, read_jsonl
from src.common.runs import run_folder, start_run
from src.merge_shards import MergeShardsConfig, main

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Config(WorkerConfigBase):
    temperature: float = 0.0


def rows_of(turns: list[int]) -> list[list[dict]]:
    """For each task as many rows as it has turns, lone tasks without a turn."""
    return [
        [{"id": f"{task}-{turn}", "task": task} | ({"turn": turn} if count > 1 else {}) for turn in range(count)]
        for task, count in enumerate(turns)
    ]


def work(config: Config, turns: list[int], fingerprint: str = "f", finish: bool = True, arrays: bool = True) -> None:
    """What a command with workers does with its share."""
    with start_run(config, "probe") as run:
        run.record(model_fingerprint=fingerprint)
        files = {"results.jsonl": "one row a response"}
        own = [row for rows in config.own_tasks(rows_of(turns)) for row in rows]
        with JsonlWriter(run.path("results.jsonl")) as writer:
            for row in own:
                writer.write(row)
        if arrays:
            table = pa.table({"id": pa.array([row["id"] for row in own], pa.string())})
            pq.write_table(table, run.path("tokens.parquet"))
            files["tokens.parquet"] = "arrays"
        if finish:
            run.finish(files)


def workers(folder: Path, count: int, turns: list[int]) -> list[Config]:
    configs = [Config(output_dir=folder, num_workers=count, worker_index=index) for index in range(count)]
    for config in configs:
        work(config, turns)
    return configs


def merge(folder: Path, output_dir: Path | None = None) -> Path:
    main(MergeShardsConfig(shards_dir=folder / "shards", output_dir=output_dir or folder))
    return output_dir or folder


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.integers(1, 3), max_size=9), count=st.integers(1, 4))
def test_merged_is_what_one_process_writes(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int], count: int
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    if count == 1:
        # num_workers 1 writes no shards; a single worker's folder is still a complete set.
        shard = folder / "shards" / "worker-00000-of-00001"
        work(Config(output_dir=shard), turns)
    else:
        workers(folder, count, turns)
    merge(folder)
    merged = [row for _, row in read_jsonl(folder / "results.jsonl")]
    assert merged == [row for rows in rows_of(turns) for row in rows]
    ids = pq.read_table(folder / "tokens.parquet")["id"].to_pylist()
    assert sorted(ids) == sorted(row["id"] for row in merged)


def test_the_merged_folder_is_the_run_of_one_process(tmp_path: Path) -> None:
    turns = [1] * 5
    workers(tmp_path / "run", 2, turns)
    merge(tmp_path / "run")
    work(Config(output_dir=tmp_path / "one"), turns, arrays=False)
    merged, one = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "one"))
    for config in (merged, one):
        config["config"].pop("datetime_str")
        config["config"].pop("output_dir")
    assert merged == one
    done = json.loads((tmp_path / "run" / "DONE").read_text())["files"]
    assert done["results.jsonl"]["sha256"] == sha256_file(tmp_path / "one" / "results.jsonl")
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert len(provenance["sessions"]) == 3 and provenance["model_fingerprint"] == "f"
    with start_run(Config(output_dir=tmp_path / "run"), "probe") as run:
        assert run.resumed


def test_a_second_merge_is_the_first(tmp_path: Path) -> None:
    workers(tmp_path / "run", 2, [1, 2, 1])
    first = (merge(tmp_path / "run") / "results.jsonl").read_bytes()
    assert (merge(tmp_path / "run") / "results.jsonl").read_bytes() == first
    assert (merge(tmp_path / "run", tmp_path / "elsewhere") / "results.jsonl").read_bytes() == first


def test_a_missing_and_an_unfinished_worker_are_named(tmp_path: Path) -> None:
    configs = workers(tmp_path / "run", 3, [1] * 6)
    done = run_folder(configs[1]) / "DONE"
    done.unlink()
    with pytest.raises(InputError, match="worker 1 has not finished"):
        merge(tmp_path / "run")
    os.rename(run_folder(configs[2]), tmp_path / "away")
    done.touch()
    with pytest.raises(InputError, match="worker 2 is missing"):
        merge(tmp_path / "run")
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_no_workers_and_two_sets_of_workers_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no worker-"):
            main(MergeShardsConfig(shards_dir=folder, output_dir=tmp_path / "out"))
    workers(tmp_path / "run", 2, [1] * 4)
    workers(tmp_path / "run", 3, [1] * 4)
    with pytest.raises(InputError, match="workers of 2 and of 3"):
        merge(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"temperature": 0.7}, "temperature was 0.0, is now 0.7"),
        ({"fingerprint": "g"}, 'model_fingerprint was "f", is now "g"'),
        ({"turns": [1] * 9}, "fewer tasks"),
        ({"turns": []}, "fewer tasks"),
        ({"arrays": False}, "no tokens.parquet"),
    ],
)
def test_workers_that_ran_something_else_are_refused(tmp_path: Path, changes: dict, told: str) -> None:
    base = Config(output_dir=tmp_path / "run", num_workers=2)
    work(base, [1] * 5)
    other = replace(base, worker_index=1, temperature=changes.pop("temperature", 0.0))
    work(other, **({"turns": [1] * 5} | changes))
    with pytest.raises(InputError, match=told):
        merge(tmp_path / "run")
    assert not (tmp_path / "run" / "DONE").exists()


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    configs = workers(tmp_path / "run", 2, [1] * 2)
    path = run_folder(configs[1]) / "results.jsonl"
    path.write_bytes((run_folder(configs[0]) / "results.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"id '0-0' is in .*worker-00000"):
        merge(tmp_path / "run")


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    workers(tmp_path / "run", 2, [1] * 2)
    work(Config(output_dir=tmp_path / "other", temperature=0.7), [1])
    before = (tmp_path / "other" / "results.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"temperature was 0\.7, is now 0\.0"):
        merge(tmp_path / "run", tmp_path / "other")
    assert (tmp_path / "other" / "results.jsonl").read_bytes() == before


def test_the_command(tmp_path: Path) -> None:
    workers(tmp_path / "run", 2, [1] * 3)
    command = [sys.executable, "-m", "src.merge_shards", "--shards_dir", str(tmp_path / "run" / "shards")]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path / 'run' / 'results.jsonl'}" in done.stdout
    assert (tmp_path / "run" / "DONE").exists()


def test_rows_that_no_worker_has_are_never_dropped(tmp_path: Path) -> None:
    work(Config(output_dir=tmp_path), [1, 1, 1, 1])
    before = (tmp_path / "results.jsonl").read_bytes()
    workers(tmp_path, 2, [1, 1])
    with pytest.raises(InputError, match="2 of its rows are in no worker's folder"):
        merge(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
