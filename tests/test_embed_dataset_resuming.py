"""`src.embed_dataset` over several starts and processes: killed, damaged, shared, of other settings, checked."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from src.common.errors import CheckFailed, InputError
from src.common.files import sha256_file
from src.embed_dataset import main
from src.embedding.shards_reading import open_embeddings
from tests.embed_runs import config_of, make_rows, shard_bytes, write_jsonl


def test_damaged_shards_are_found_and_made_again(embed: Callable) -> None:
    folder = embed()
    before = shard_bytes(folder)
    names = sorted(before)
    (folder / names[0]).write_bytes(before[names[0]][:-100])
    flipped = bytearray(before[names[1]])
    flipped[len(flipped) // 2] ^= 1
    (folder / names[1]).write_bytes(flipped)
    (folder / names[2]).with_suffix(".json").unlink()
    (folder / names[3]).with_suffix(".json").write_text('{"shard"')
    (folder / names[4]).unlink()
    (folder / ".shard-00001.parquet.abc.tmp").write_bytes(b"half")
    assert shard_bytes(embed()) == before
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    assert not list(folder.glob("*.tmp"))


def forked(action: Callable[[], None]) -> multiprocessing.Process:
    """A child that has everything imported already."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    return process


def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(
    embed: Callable, tiny_embedder: Path, embed_rows: Path, tmp_path: Path
) -> None:
    wanted = shard_bytes(embed(rows_per_shard=16))
    config = config_of(tiny_embedder, embed_rows, tmp_path / "killed", rows_per_shard=16)
    draw, killed, marks = random.Random(1), 0, [1, 5, 9]
    for wanted_shards in marks:
        process = forked(lambda: main(config))
        while process.is_alive() and len(list((tmp_path / "killed").glob("shard-*.parquet"))) < wanted_shards:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2, "the kills came too late to interrupt anything"
    main(config)
    assert shard_bytes(tmp_path / "killed") == wanted
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_four_workers_are_one(embed: Callable) -> None:
    one = embed()
    for index in (2, 0, 3, 1):
        folder = embed("four", num_workers=4, worker_index=index, verify=2)
        complete = json.loads((folder / "manifest.json").read_text())["complete"]
        assert complete == (index == 1)
    assert shard_bytes(folder) == shard_bytes(one)
    first, second = (json.loads((each / "manifest.json").read_text()) for each in (one, folder))
    assert first["settings"] == second["settings"] and first["rows"] == second["rows"]
    assert len(second["verification"]) == 4
    # One process may finish what several began.
    (folder / "shard-00002.json").unlink()
    assert shard_bytes(embed("four")) == shard_bytes(one)


def test_two_devices_are_one(embed: Callable) -> None:
    assert shard_bytes(embed("two", devices="cpu,cpu")) == shard_bytes(embed())


def test_a_folder_of_other_settings_is_refused(embed: Callable, tmp_path: Path) -> None:
    embed()
    with pytest.raises(InputError, match="max_length was null, is now 20"):
        embed(max_length=20)
    # Workers keep their settings apart from the shards: there the sidecars refuse.
    with pytest.raises(InputError, match="max_length was 64, is now 20"):
        embed(max_length=20, num_workers=2, worker_index=1)
    changed = write_jsonl(tmp_path / "rows.jsonl", make_rows(300, seed=5))
    with pytest.raises(InputError, match="content was"):
        embed(dataset_path=str(changed), num_workers=2, worker_index=1)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_torn(
    embed: Callable, tiny_embedder: Path, embed_rows: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_embedder, embed_rows, tmp_path / "full", rows_per_shard=150)

    def run_with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            main(config)
        except InputError as error:
            (tmp_path / "said").write_text(str(error))
            os._exit(2)

    process = forked(run_with_little_room)
    process.join(60)
    assert process.exitcode == 2
    assert "make room, and the same command goes on" in (tmp_path / "said").read_text()
    assert not [path for path in (tmp_path / "full").iterdir() if "shard-" in path.name]
    main(config)
    assert shard_bytes(tmp_path / "full") == shard_bytes(embed(rows_per_shard=150))


def test_verification_finds_vectors_at_the_wrong_rows(embed: Callable) -> None:
    folder = embed(verify=0)
    path = folder / "shard-00002.parquet"
    table = pq.read_table(path)
    turned = table.set_column(10, "embedding", table["embedding"].take([*list(range(1, len(table))), 0]))
    pq.write_table(turned, path)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(CheckFailed, match=r"shard-00002.parquet: its vector agrees"):
        embed(verify=100)
    # Of several workers one finds it: the other's manifest does not call the whole complete.
    for index in (0, 1):
        with pytest.raises(CheckFailed) if index == 0 else nullcontext():
            embed(num_workers=2, worker_index=index, verify=100)
    with pytest.raises(InputError, match=r"checked and are wrong: row .* its vector agrees"):
        open_embeddings(folder)
    path.unlink()
    embed(num_workers=2, worker_index=0, verify=100)
    assert open_embeddings(folder).rows == 300
