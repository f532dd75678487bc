"""Datasets to Parquet: every value as it was, samples that depend on seed and row alone, memory that stays flat."""

import csv
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.row_hash import choose_rows, is_chosen
from src.download_dataset import DownloadDatasetConfig, main
from src.embedding import tables
from src.embedding.downloading import Smallest
from tests.conftest import ROOT, module_command
from tests.hub_server import COMMIT, hub_server

MIXED = [
    {"id": "a", "n": 1, "text": "Grüße\n", "tags": ["x"], "about": {"k": 1}},
    {"id": "b", "n": 2.5, "text": None, "tags": [], "about": {"j": "q"}, "late": True},
    {"id": "c", "text": "", "about": None, "empty": []},
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def download(name: Path, out: Path, **settings) -> tuple[list[dict], dict]:
    main(DownloadDatasetConfig(name=str(name), output_dir=out, **settings))
    card = json.loads((out / "card.json").read_text())
    path = out / card["file"]["name"]
    assert card["file"]["sha256"] == sha256_file(path) and card["file"]["bytes"] == path.stat().st_size
    rows = pq.read_table(path).to_pylist()
    assert card["rows"] == len(rows)
    return rows, card


def numbered(n: int) -> list[dict]:
    return [{"id": f"r{i}", "text": f"row {i}", "n": i} for i in range(n)]


@pytest.mark.parametrize("rows_at_once", [1, 256])
def test_every_value_of_jsonl_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", rows_at_once)
    rows, card = download(write_jsonl(tmp_path / "m.jsonl", MIXED), tmp_path / "out", source="jsonl")
    names = ["id", "n", "text", "tags", "about", "late", "empty"]
    assert [list(row) for row in rows] == [names] * 3
    for row, given in zip(rows, MIXED, strict=True):
        for name in names:
            if name == "about" and given["about"]:
                assert row["about"] == {"k": None, "j": None} | given["about"]
            else:
                assert row[name] == given.get(name), name
    assert card["fields"]["text"] == {"type": "string", "nulls": 1, "characters": {"min": 0, "mean": 3.0, "max": 6}}
    assert card["fields"]["n"] == {"type": "double", "nulls": 1, "value": {"min": 1.0, "mean": 1.75, "max": 2.5}}
    assert card["fields"]["tags"]["items"] == {"min": 0, "mean": 0.5, "max": 1}
    assert card["rows_in_source"] == 3 and card["licence"] is None and str(tmp_path / "m.jsonl") in card["files"]


def test_cells_of_csv_stay_text(tmp_path: Path) -> None:
    cells = [["007", "NA", 'a,b\n"c"'], ["1e5", "", "é"]]
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["code", "flag", "text"], *cells])
    rows, _ = download(tmp_path / "c.csv", tmp_path / "out", source="csv")
    assert [list(row.values()) for row in rows] == cells


def test_a_folder_of_files_is_their_rows_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"n": 0.5, "more": "m"}])
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"n": 1}])
    rows, card = download(tmp_path / "in", tmp_path / "out", source="jsonl")
    assert rows == [{"n": 1.0, "more": None}, {"n": 0.5, "more": "m"}] and len(card["files"]) == 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 1,000 rows of text in each format."""
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("sources")
    rows = [{"id": f"r{i}", "text": f"row {i}"} for i in range(1000)]
    write_jsonl(folder / "rows.jsonl", rows)
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *(row.values() for row in rows)])
    (folder / "local").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=70)
    pq.write_table(pa.Table.from_pylist(rows), folder / "local" / "train.parquet")
    return {kind: folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")} | {"local": folder / "local"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "local"])
def test_a_sample_is_those_of_the_smallest_hashes_whatever_it_is_read_from(
    sources: dict, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [f"r{i}" for i in choose_rows(5, 1000, 100)]
    rows, card = download(sources[kind], tmp_path / "one", source=kind, num_rows=100, seed=5)
    assert [row["id"] for row in rows] == expected and card["rows_in_source"] == 1000
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 17)
    download(sources[kind], tmp_path / "two", source=kind, num_rows=100, seed=5)
    files = [(tmp_path / name / card["file"]["name"]).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    share, _ = download(sources[kind], tmp_path / "share", source=kind, fraction=0.1, seed=5)
    assert [row["id"] for row in share] == [f"r{i}" for i in range(1000) if is_chosen(5, i, 0.1)]
    everything, _ = download(sources[kind], tmp_path / "all", source=kind)
    assert [row["id"] for row in everything] == [f"r{i}" for i in range(1000)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_seed_is_another_sample_and_few_rows_are_put_aside() -> None:
    assert choose_rows(1, 1000, 100) != choose_rows(2, 1000, 100)
    smallest = Smallest(1, 100)
    put_aside = sum(smallest.offer(i) for i in range(20_000))
    assert sorted(smallest.chosen()) == choose_rows(1, 20_000, 100)
    assert put_aside == pytest.approx(100 * (1 + math.log(200)), rel=0.15)


def test_the_folder_is_a_dataset_for_others(sources: dict, tmp_path: Path) -> None:
    from datasets import load_dataset

    download(sources["jsonl"], tmp_path / "out", source="jsonl", num_rows=10)
    assert len(load_dataset(str(tmp_path / "out"), streaming=False, cache_dir=str(tmp_path / "cache"))["train"]) == 10


def test_what_is_there_is_kept_and_what_was_damaged_is_made_again(sources: dict, tmp_path: Path) -> None:
    download(sources["jsonl"], tmp_path / "out", source="jsonl")
    path = tmp_path / "out" / "train.parquet"
    first, made = path.read_bytes(), path.stat().st_mtime_ns
    download(sources["jsonl"], tmp_path / "out", source="jsonl")
    assert path.stat().st_mtime_ns == made
    path.write_bytes(first[:-9])
    download(sources["jsonl"], tmp_path / "out", source="jsonl")
    assert path.read_bytes() == first
    with pytest.raises(InputError, match="seed was 42, is now 1"):
        download(sources["jsonl"], tmp_path / "out", source="jsonl", seed=1)


@pytest.mark.parametrize(
    "lines, told",
    [
        (['{"n": 1}', '{"n": "one"}'], r"rows.jsonl:2: n: .*'one'"),
        (['{"n": 1}'] * 256 + ['{"n": "one"}'], r"rows.jsonl:257 or soon after: .*n.*; expected one type a field"),
        (['{"n": 0.5}', '{"n": 1152921504606846977}'], r"rows.jsonl:2: n: .*1152921504606846977"),
        (['{"n": 0.5}'] * 256 + ['{"n": 1152921504606846977}'], r"rows.jsonl:257: n: .*1152921504606846977"),
        (['{"n": 1}', '{"n": 1'], r"rows.jsonl:2"),
        (['{"n": "\\ud800"}'], r"rows.jsonl:1: n: .*surrogates"),
        (['{"n": {}}'], r"train.parquet: .*leave such a field out"),
        ([], r"no rows would be in it"),
    ],
)
def test_rows_that_do_not_go_in_are_named(tmp_path: Path, lines: list[str], told: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=told):
        download(tmp_path / "rows.jsonl", tmp_path / "out", source="jsonl")
    assert not (tmp_path / "out" / "train.parquet").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"num_rows": 1001}, "it has 1000 rows"),
        ({"num_rows": 0}, "--num_rows 0"),
        ({"fraction": 1.5}, "--fraction 1.5"),
        ({"num_rows": 5, "fraction": 0.5}, "exclude each other"),
        ({"split": "train"}, "--split with --source jsonl"),
        ({"source": "local", "revision": "v1"}, "--revision with --source local"),
        ({"source": "local", "name": "nowhere"}, "no such file or folder"),
        ({"source": "csv", "name": "."}, "no .csv file"),
    ],
)
def test_wrong_settings_are_refused(sources: dict, tmp_path: Path, settings: dict, told: str) -> None:
    (tmp_path / "empty").mkdir()
    settings = {"name": sources["jsonl"], "source": "jsonl"} | settings
    if settings["name"] == ".":
        settings["name"] = tmp_path / "empty"
    with pytest.raises(InputError, match=told):
        download(out=tmp_path / "out", **settings)


def test_a_split_that_is_not_there_is_refused(sources: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'dev'; expected one of: train"):
        download(sources["local"], tmp_path / "out", source="local", split="dev")


def test_types_that_drift_in_a_stream_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"n": 1}])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"n": 2.5}])
    with pytest.raises(InputError, match=r"or one soon after: .*2.5.* truncated"):
        download(tmp_path / "in", tmp_path / "out", source="local")
    (tmp_path / "in" / "b.jsonl").write_text('{"n": 2')
    with pytest.raises(InputError, match="or one soon after: JSON parse error"):
        download(tmp_path / "in", tmp_path / "out", source="local")


def test_describe_only_writes_nothing(sources: dict, tmp_path: Path, run_module: Callable) -> None:
    words = ["--name", str(sources["parquet"]), "--source", "parquet", "--output_dir", str(tmp_path / "out")]
    done = run_module("download_dataset", *words, "--describe_only")
    assert done.returncode == 0, done.stderr
    assert "1000" in done.stdout and "text  string: row 0" in done.stdout and "licence  unknown" in done.stdout
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, run_module: Callable) -> None:
    peaks = []
    for name, n_rows in (("few", 2_000), ("many", 60_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(n_rows):
                file.write(json.dumps({"id": i, "text": os.urandom(1024).hex()}) + "\n")
        done = run_module("download_dataset", "--name", str(tmp_path / f"{name}.jsonl"), "--source", "jsonl",
                          "--num_rows", "1000", "--output_dir", str(tmp_path / name))  # fmt: skip
        assert done.returncode == 0, done.stderr
        provenance = json.loads((tmp_path / name / "provenance.json").read_text())
        peaks.append(provenance["sessions"][-1]["peak_memory_mib"]["process"])
    # The larger file is 120 MB.
    assert peaks[1] - peaks[0] < 40, peaks


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"id": i, "text": f"text {i} " * 30} for i in range(40_000)])
    words = ["--name", str(source), "--source", "jsonl", "--num_rows", "20000", "--output_dir"]
    download(source, tmp_path / "whole", source="jsonl", num_rows=20_000)
    process = subprocess.Popen(module_command("download_dataset", [*words, str(tmp_path / "out")]), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    spool = tmp_path / "out" / ".spool.tmp"
    while process.poll() is None and not spool.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert spool.exists() and not (tmp_path / "out" / "train.parquet").exists()
    download(source, tmp_path / "out", source="jsonl", num_rows=20_000)
    files = [(tmp_path / name / "train.parquet").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1] and not list((tmp_path / "out").glob(".*.tmp"))


def test_whole_numbers_beyond_those_that_floats_hold_stay_what_they_are(tmp_path: Path) -> None:
    # As the ids of posts and messages are.
    rows = [{"id": 1234567890123456789 + n} for n in range(5)]
    download(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", source="jsonl")
    assert pq.read_table(tmp_path / "out" / "train.parquet").to_pylist() == rows
    told = json.loads((tmp_path / "out" / "card.json").read_text())["fields"]["id"]["value"]
    assert (told["min"], told["max"]) == (rows[0]["id"], rows[-1]["id"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a hub with a dataset of 300 rows and one that is gated."""
    root = tmp_path_factory.mktemp("hub")
    (root / "someone" / "poems").mkdir(parents=True)
    write_jsonl(root / "someone" / "poems" / "train.jsonl", numbered(300))
    (root / "someone" / "poems" / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "someone" / "locked").mkdir()
    (root / "someone" / "locked" / "GATED").touch()
    with hub_server(root) as address:
        yield {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "TILLER_CACHE_DIR": str(root / "cache")}


def test_a_dataset_of_the_hub_is_sampled_with_its_commit_and_licence(hub: dict, tmp_path: Path, run_module) -> None:
    words = ["--name", "someone/poems", "--num_rows", "20", "--seed", "3", "--output_dir", str(tmp_path / "out")]
    done = run_module("download_dataset", *words, **hub)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert rows == [numbered(300)[i] for i in choose_rows(3, 300, 20)]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["revision"], card["licence"], card["rows_in_source"]) == (COMMIT, "mit", 300)


@pytest.mark.parametrize(
    "name, more, told",
    [
        ("someone/locked", [], "this dataset is gated"),
        ("someone/nothing", [], "no such dataset on the hub"),
        ("someone/poems", ["--revision", "v9"], "no revision 'v9'"),
        ("not a name", [], "not a hub id"),
    ],
)
def test_what_the_hub_does_not_give_is_said(hub: dict, tmp_path: Path, run_module, name, more, told) -> None:
    done = run_module("download_dataset", "--name", name, "--output_dir", str(tmp_path / "out"), *more, **hub)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
