"""The captures folder: what is read is what was added, whatever was killed in between."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.captures import CaptureWriter, read_captures
from src.common.errors import InputError
from src.common.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("0.resid_pre", "14.resid_post")
ROW_BYTES = 2 * 3 * 8 * 2  # two keys of 3 × 8 in bfloat16


def row_of(i: int, n_positions: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(i)
    return {key: torch.randn(n_positions, 8, generator=draw).bfloat16() for key in KEYS}


def add(writer: CaptureWriter, i: int) -> None:
    writer.add(f"r{i}", row_of(i), prompt_length=2, start=0, reduce="none", n_positions=3)


def fill(folder: Path, n: int = 5, finish: bool = True) -> list[int]:
    """Rows 0 to n − 1, two a shard; returns those that were not there yet."""
    missing = []
    with CaptureWriter(folder, shard_bytes=2 * ROW_BYTES) as writer:
        missing = [i for i in range(n) if f"r{i}" not in writer.done]
        for i in missing:
            add(writer, i)
        if finish:
            writer.finish()
    return missing


def assert_whole(folder: Path, n: int = 5) -> None:
    captures = read_captures(folder)
    assert sorted(row["id"] for row in captures.rows) == sorted(f"r{i}" for i in range(n))
    for i in range(n):
        for key, tensor in row_of(i).items():
            layer, hook_point = key.split(".")
            found = captures.tensor(f"r{i}", int(layer), hook_point)
            assert found.dtype == torch.bfloat16 and torch.equal(found, tensor)
    captures.verify()
    assert not list(folder.glob(".*"))


def test_what_is_read_is_what_was_added(tmp_path: Path) -> None:
    folder = tmp_path / "captures"
    fill(folder)
    assert_whole(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "manifest.jsonl", *(f"shard-{i:05d}.safetensors" for i in range(3))
    ]  # fmt: skip
    assert read_captures(folder).rows[4] == {
        "id": "r4", "shard": "shard-00002.safetensors", "keys": list(KEYS), "prompt_length": 2, "start": 0,
        "n_positions": 3, "reduce": "none", "dtype": "bfloat16", "d_model": 8,
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["n_rows"] == 5
    assert {each["file"]: each["sha256"] for each in manifest["files"]} == {
        path.name: sha256_file(path) for path in folder.iterdir() if path.name != "manifest.json"
    }


IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.dictionaries(IDS, st.tuples(st.integers(0, 4), st.booleans()), max_size=6),
    shard_bytes=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_rows_come_back_from_any_shards(lengths: dict, shard_bytes: int, dtype: torch.dtype) -> None:
    added = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with CaptureWriter(folder, shard_bytes) as writer:
            for row_id, (n, is_mean) in lengths.items():
                tensor = torch.randn(1 if is_mean else n, 4).to(torch.float32 if is_mean else dtype)
                added[row_id] = tensor
                writer.add(
                    row_id, {"3.mlp_out": tensor}, prompt_length=1, start=0, n_positions=n + is_mean,
                    reduce="mean" if is_mean else "none",
                )  # fmt: skip
            writer.finish()
        captures = read_captures(folder)
        captures.verify()
        assert [row["id"] for row in captures.rows] == list(added)
        assert CaptureWriter(folder).done == set(added)
        for row_id, tensor in added.items():
            found = captures.tensor(row_id, 3, "mlp_out")
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_a_row_is_in_the_manifest_once_its_shard_is_on_disk(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path, shard_bytes=2 * ROW_BYTES) as writer:
        add(writer, 0)
        assert not writer.done and not list(tmp_path.iterdir())
        add(writer, 1)
        add(writer, 2)
        assert writer.done == {"r0", "r1"}
        running = read_captures(tmp_path)
        assert [row["id"] for row in running.rows] == ["r0", "r1"]
        assert torch.equal(running.tensor("r1", 14), row_of(1)["14.resid_post"])
        with pytest.raises(InputError, match=r"manifest\.json: no such file, the run is unfinished"):
            running.verify()
    assert [row["id"] for row in read_captures(tmp_path).rows] == ["r0", "r1", "r2"]


def test_a_later_change_of_what_was_added_changes_nothing(tmp_path: Path) -> None:
    batch = torch.zeros(10, 8)
    with CaptureWriter(tmp_path) as writer:
        writer.add("a", {"0.resid_post": batch[2:4]}, prompt_length=3, start=0, reduce="none", n_positions=2)
        batch += 1
        assert sum(tensor.untyped_storage().nbytes() for tensor in writer._tensors.values()) == 2 * 8 * 4
    assert read_captures(tmp_path).tensor("a", 0).tolist() == torch.zeros(2, 8).tolist()


def test_a_finished_folder_takes_more_and_is_unfinished_until_they_are_in(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert fill(tmp_path, 3) == []
    assert_whole(tmp_path, 3)
    assert fill(tmp_path, 6, finish=False) == [3, 4, 5]
    assert not (tmp_path / "manifest.json").exists()
    assert fill(tmp_path, 6) == []
    assert_whole(tmp_path, 6)


def test_no_rows_are_no_error(tmp_path: Path) -> None:
    assert fill(tmp_path, 0) == []
    assert read_captures(tmp_path).rows == []
    read_captures(tmp_path).verify()


def test_an_exception_loses_no_row(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CaptureWriter(tmp_path) as writer:
        add(writer, 0)
        raise KeyboardInterrupt
    assert CaptureWriter(tmp_path).done == {"r0"}


KILLED = """
import os, signal, sys
from pathlib import Path
from src.common.captures import CaptureWriter
from tests.test_captures import ROW_BYTES, add
folder = Path(sys.argv[1])
writer = CaptureWriter(folder, shard_bytes=2 * ROW_BYTES)
for i in range(3):
    add(writer, i)
(folder / ".shard-00001.safetensors.x1.tmp").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_resumed_is_as_uninterrupted(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert fill(tmp_path / "killed") == [2, 3, 4]
    assert_whole(tmp_path / "killed")
    fill(tmp_path / "whole")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("killed", "whole")]
    assert contents[0] == contents[1]


def test_a_manifest_cut_at_any_byte_is_resumed(tmp_path: Path) -> None:
    """As a kill between a shard and its lines, or within a line, leaves it: the last shard's lines may be cut."""
    fill(tmp_path / "whole", 4, finish=False)
    lines = (tmp_path / "whole" / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    whole, first_shard = b"".join(lines), len(b"".join(lines[:2]))
    for cut in range(first_shard, len(whole) + 1, 7):
        folder = tmp_path / str(cut)
        folder.mkdir()
        for path in (tmp_path / "whole").glob("shard-*"):
            os.link(path, folder / path.name)
        (folder / "manifest.jsonl").write_bytes(whole[:cut])
        # The closing brace is one byte before the newline.
        n_kept = 2 + sum(len(b"".join(lines[: n + 1])) - 1 <= cut for n in (2, 3))
        missing = fill(folder)
        assert missing == list(range(n_kept, 5)), cut
        assert_whole(folder)


def test_one_shard_without_lines_is_removed_and_more_are_not(tmp_path: Path) -> None:
    fill(tmp_path, 2, finish=False)
    orphans = [tmp_path / f"shard-{i:05d}.safetensors" for i in (1, 2)]
    orphans[0].write_bytes(b"x")
    assert CaptureWriter(tmp_path).done == {"r0", "r1"} and not orphans[0].exists()
    for path in orphans:
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"shard-00001\.safetensors: .*manifest\.jsonl has no line of it"):
        CaptureWriter(tmp_path)
    assert all(path.exists() for path in orphans)


def test_a_finished_folder_without_its_lines_loses_no_shard(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(InputError, match="has no line of it"):
        CaptureWriter(tmp_path)
    assert (tmp_path / "shard-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("row_id", "layer", "hook_point", "told"),
    [
        ("r9", 14, "resid_post", r"no row 'r9' among its 5; the first are 'r0', 'r1', 'r2'"),
        ("r1", 13, "resid_post", r"row 'r1' has no 13\.resid_post; it has 0\.resid_pre, 14\.resid_post"),
        ("r1", 14, "resid", r"row 'r1' has no 14\.resid; it has"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, row_id: str, layer: int, hook_point: str, told: str) -> None:
    fill(tmp_path)
    with pytest.raises(InputError, match=told):
        read_captures(tmp_path).tensor(row_id, layer, hook_point)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    captures = read_captures(tmp_path)
    assert torch.equal(captures.tensor("r1", 14), row_of(1)["14.resid_post"])
    told = r"shard-00001\.safetensors: no such file.*row '{}' is in it.*again in another --output_dir"
    with pytest.raises(InputError, match=told.format("r3")):
        captures.tensor("r3", 14)
    for act in (captures.verify, lambda: CaptureWriter(tmp_path)):
        with pytest.raises(InputError, match=told.format("r2")):
            act()


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    shard, lines = tmp_path / "shard-00001.safetensors", tmp_path / "manifest.jsonl"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(InputError, match=r"shard-00001\.safetensors: its sha256 .*row 'r2' is in it.*again in another"):
        read_captures(tmp_path).verify()
    shard.write_bytes(before)
    read_captures(tmp_path).verify()
    lines.write_bytes(lines.read_bytes().replace(b'"prompt_length": 2', b'"prompt_length": 1', 1))
    with pytest.raises(InputError, match=r"manifest\.jsonl: its sha256 is not that of manifest\.json"):
        read_captures(tmp_path).verify()


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_a_shard_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    fill(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors: 14\.resid_post of row 'r1' cannot be read"):
        read_captures(tmp_path).tensor("r1", 14)


def test_a_manifest_of_other_shards_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path)
    lines = tmp_path / "manifest.jsonl"
    before = lines.read_text()
    lines.write_text(before.replace('"n_positions": 3', '"n_positions": 4'))
    with pytest.raises(InputError, match=r"row 'r1' is \(3, 8\), manifest\.jsonl says \(4, 8\)"):
        read_captures(tmp_path).tensor("r1", 14)
    lines.write_text(before.replace("shard-00001", "shard-00000"))
    with pytest.raises(InputError, match="row 'r3' cannot be read"):
        read_captures(tmp_path).tensor("r3", 14)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda line: line.replace("shard-00000", "../shard-00000"), r"manifest\.jsonl:1: shard: "),
        (lambda line: line.replace('"start": 0', '"start": -1'), r"manifest\.jsonl:1: start: "),
        (lambda line: line.replace('"reduce": "none"', '"reduce": "max"'), r"manifest\.jsonl:1: reduce: "),
        (lambda line: line.replace('"d_model": 8', '"d_model": "8"'), r"manifest\.jsonl:1: d_model: "),
        (lambda line: line.replace('"id": "r0", ', ""), r"manifest\.jsonl:1: id: "),
        (lambda line: line + line, r"manifest\.jsonl:2: row 'r0' is there twice"),
        (lambda line: line[:-9], r"manifest\.jsonl:1: "),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, change: object, told: str) -> None:
    fill(tmp_path, 1)
    lines = tmp_path / "manifest.jsonl"
    lines.write_text(change(lines.read_text()))
    for act in (read_captures, CaptureWriter):
        with pytest.raises(InputError, match=told):
            act(tmp_path)


def test_fields_that_a_later_version_adds_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 1, finish=False)
    lines = tmp_path / "manifest.jsonl"
    lines.write_text(lines.read_text().replace('"start": 0', '"start": 0, "later": [1]'))
    fill(tmp_path, 3)
    assert_whole(tmp_path, 3)
    assert read_captures(tmp_path).rows[0]["later"] == [1]


def test_another_folder_is_told_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.jsonl; expected the captures folder of a run"):
        read_captures(tmp_path)
    fill(tmp_path / "captures", 1)
    with pytest.raises(InputError, match="its captures folder has one: give that"):
        read_captures(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "reduce", "n_positions", "told"),
    [
        ({}, "none", 3, "no tensors"),
        ({"0.resid_post": torch.zeros(3, 8)}, "none", 4, r"tensors \(3, 8\) of 4 positions"),
        ({"0.resid_post": torch.zeros(3, 8)}, "mean", 3, r"tensors \(3, 8\) of 3 positions"),
        ({"0.resid_post": torch.zeros(1, 8)}, "mean", 0, "mean of 0 positions"),
        ({"0.resid_post": torch.zeros(1, 8).half()}, "mean", 3, "float16, reduce mean"),
        ({"0.resid_post": torch.zeros(3)}, "none", 3, r"tensors \(3,\)"),
        ({"0.resid_post": torch.zeros(3, 8).int()}, "none", 3, "int32"),
        ({"0.resid": torch.zeros(3, 8)}, "none", 3, "keys"),
        ({"01.resid_post": torch.zeros(3, 8)}, "none", 3, "keys"),
        ({"0.resid_post": torch.zeros(3, 8)}, "last", 3, "reduce is 'last'"),
        ({"0.resid_post": torch.zeros(3, 8), "1.resid_post": torch.zeros(2, 8)}, "none", 3, "differ in dtype or shape"),
        ({"0.resid_post": torch.zeros(3, 8), "1.attn_out": torch.zeros(3, 8).half()}, "none", 3, "differ in dtype"),
    ],
)
def test_tensors_that_do_not_fit_their_row_are_a_defect(
    tmp_path: Path, tensors: dict, reduce: str, n_positions: int, told: str
) -> None:
    with CaptureWriter(tmp_path) as writer:
        with pytest.raises(AssertionError, match=told):
            writer.add("a", tensors, prompt_length=1, start=0, reduce=reduce, n_positions=n_positions)
        add(writer, 0)
        with pytest.raises(AssertionError, match="row 'r0' is captured twice"):
            add(writer, 0)
    assert [row["id"] for row in read_captures(tmp_path).rows] == ["r0"]


def test_lines_that_could_not_be_written_are_healed_by_finish(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path) as writer:
        add(writer, 0)
        # A folder in the manifest's place stands for a disk that is full by then.
        (tmp_path / "manifest.jsonl").mkdir()
        with pytest.raises(IsADirectoryError):
            writer.close()
        (tmp_path / "manifest.jsonl").rmdir()
        add(writer, 1)
        writer.finish()
    assert_whole(tmp_path, 2)


def test_the_module_needs_no_torch() -> None:
    code = "import sys, src.common.captures; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
