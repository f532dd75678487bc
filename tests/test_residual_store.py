import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.common.errors import InputError
from src.models.residual_store import ResidualStore, read_manifest, read_rows, read_shards
from src.models.residuals import extract
from src.models.token_sequences import TokenSequence
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"layers": (0, 1), "hook_point": "resid_post", "position": "last_prompt", "model_fingerprint": "f"}
BYTES_PER_SHARD = 1000  # four rows of 2 layers × 32


def some_sequences(n: int = 18, seed: int = 0) -> list[TokenSequence]:
    draw = random.Random(seed)
    sequences = []
    for i in range(n):
        ids = tuple(draw.randrange(5, 49000) for _ in range(draw.randrange(3, 20)))
        sequences.append(TokenSequence(id=f"s{i}", token_ids=ids, prompt_length=2))
    return sequences


def rows_of(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 32, generator=torch.Generator().manual_seed(seed))


def store_all(folder: Path, sequences: list[TokenSequence], position: str = "last_prompt") -> list[str]:
    """Extracts what is missing; returns the ids that were run."""
    ran: list[str] = []
    with ResidualStore(folder, SETTINGS | {"position": position}, bytes_per_shard=BYTES_PER_SHARD) as store:

        def keep(ids: tuple[str, ...], rows: Tensor) -> None:
            ran.extend(ids)
            store.add(ids, rows)

        extract(
            tiny_model("llama"), store.missing(sequences), layers=[0, 1], position=position, on_rows=keep,
            tokens_per_batch=30,
        )  # fmt: skip
        store.finish()
    return ran


def filled(folder: Path, n: int = 10, finish: bool = True) -> list[TokenSequence]:
    """A store with random rows, four a shard."""
    sequences = some_sequences(n)
    with ResidualStore(folder, SETTINGS, bytes_per_shard=BYTES_PER_SHARD) as store:
        for sequence, row in zip(store.missing(sequences), rows_of(n), strict=True):
            store.add([sequence.id], row[None])
        if finish:
            store.finish()
    return sequences


def test_what_is_read_back_is_what_was_added(tmp_path: Path) -> None:
    sequences = filled(tmp_path)
    ids = [s.id for s in sequences]
    assert torch.equal(read_rows(tmp_path, ids), rows_of(10))
    assert torch.equal(read_rows(tmp_path, ids[::-3]), rows_of(10).flip(0)[::3])
    manifest = read_manifest(tmp_path)
    assert [shard["n_rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["settings"] == SETTINGS | {"layers": [0, 1]}
    assert [i for shard in read_shards(tmp_path) for i in shard.ids] == ids


def test_every_token_of_a_sequence_stays_with_its_id(tmp_path: Path) -> None:
    sequences = some_sequences(7)
    store_all(tmp_path, sequences, "all")
    given: dict[str, Tensor] = {}
    extract(
        tiny_model("llama"), sequences, layers=[0, 1], position="all", tokens_per_batch=30,
        on_rows=lambda ids, rows: given.update({ids[0]: rows}),
    )  # fmt: skip
    for sequence in sequences:
        rows = read_rows(tmp_path, [sequence.id])
        assert len(rows) == len(sequence.token_ids) and torch.equal(rows, given[sequence.id])
    for shard in read_shards(tmp_path):
        assert shard.offsets[0] == 0 and shard.offsets[-1] == len(shard.rows)
        assert len(shard.offsets) == len(shard.ids) + 1


def assert_resumes(folder: Path, whole: Path) -> None:
    """What a run that stopped between two shards left is kept, the rest made, and all is as if it had not stopped."""
    sequences = some_sequences()
    with pytest.raises(InputError, match=r"manifest\.json: not there; the hidden states are unfinished"):
        read_manifest(folder)
    there = {i for path in folder.glob("shard-*") for i in ids_in(path)}
    assert 0 < len(there) < len(sequences)
    ran = store_all(folder, sequences)
    assert set(ran) == {s.id for s in sequences} - there and len(ran) == len(set(ran))
    assert not list(folder.glob(".*"))
    store_all(whole, sequences)
    ids = [s.id for s in sequences]
    resumed, uninterrupted = read_rows(folder, ids), read_rows(whole, ids)
    assert ((resumed - uninterrupted).norm(dim=-1) <= 1e-5 * uninterrupted.norm(dim=-1)).all()
    assert store_all(folder, sequences) == []


def stop_after_shards(folder: Path, n_shards: int, stop: Callable[[], None]) -> None:
    """Extracts without `with`, so that nothing is written on the way out, and stops with rows not yet in a shard."""
    store = ResidualStore(folder, SETTINGS, bytes_per_shard=BYTES_PER_SHARD)

    def add(ids: tuple[str, ...], rows: Tensor) -> None:
        full = len(list(folder.glob("shard-*"))) >= n_shards
        store.add(ids, rows)
        if full:
            (folder / ".shard-00099.safetensors.x1.tmp").write_bytes(b"half")
            stop()

    extract(
        tiny_model("llama"), store.missing(some_sequences()), layers=[0, 1], position="last_prompt", on_rows=add,
        tokens_per_batch=6,
    )  # fmt: skip


@pytest.mark.parametrize("n_shards", [1, 2])
def test_stopped_between_shards_and_resumed_is_as_uninterrupted(tmp_path: Path, n_shards: int) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_after_shards(tmp_path / "stopped", n_shards, stop)
    assert_resumes(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_killed_between_shards_and_resumed_is_as_uninterrupted(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.test_residual_store import stop_after_shards; "
        "stop_after_shards(Path(sys.argv[1]), 2, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert_resumes(tmp_path / "killed", tmp_path / "whole")


def ids_in(shard: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return json.loads(file.metadata()["ids"])


def test_a_finished_store_takes_more_and_is_unfinished_until_they_are_in(tmp_path: Path) -> None:
    filled(tmp_path, 6)
    store = ResidualStore(tmp_path, SETTINGS, bytes_per_shard=BYTES_PER_SHARD)
    assert store.ids == {f"s{i}" for i in range(6)}
    added = list(store.missing(some_sequences(9)))
    assert [s.id for s in added] == ["s6", "s7", "s8"]
    store.add([s.id for s in added], rows_of(3, seed=1))
    store.flush()
    with pytest.raises(InputError, match="unfinished"):
        read_manifest(tmp_path)
    store.finish()
    expected = torch.cat([rows_of(6), rows_of(3, seed=1)])
    assert torch.equal(read_rows(tmp_path, [f"s{i}" for i in range(9)]), expected)


def test_an_exception_loses_no_row(tmp_path: Path) -> None:
    sequences = some_sequences(3)
    with pytest.raises(KeyboardInterrupt), ResidualStore(tmp_path, SETTINGS) as store:
        list(store.missing(sequences))
        store.add(["s0", "s1"], rows_of(2))
        raise KeyboardInterrupt
    assert [s.id for s in ResidualStore(tmp_path, SETTINGS).missing(sequences)] == ["s2"]


def test_a_view_of_a_batch_does_not_keep_the_batch(tmp_path: Path) -> None:
    store = ResidualStore(tmp_path, SETTINGS)
    list(store.missing(some_sequences(2)))
    batch = rows_of(2)
    store.add(["s0"], batch[:1])
    batch.zero_()
    store.finish()
    assert torch.equal(read_rows(tmp_path, ["s0"]), rows_of(2)[:1])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"position": "mean_prompt"}, "position is 'last_prompt' there and 'mean_prompt' here"),
        ({"model_fingerprint": "g"}, "model_fingerprint is 'f' there and 'g' here"),
        ({"layers": [0]}, r"layers is \[0, 1\] there and \[0\] here"),
        ({"more": 1}, "more is None there and 1 here"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, changed: dict, match: str) -> None:
    filled(tmp_path)
    with pytest.raises(InputError, match=match):
        ResidualStore(tmp_path, SETTINGS | changed)
    ResidualStore(tmp_path, SETTINGS)


@pytest.mark.parametrize("change", [{"token_ids": (5, 6, 7)}, {"prompt_length": 1}])
def test_an_id_that_stands_for_other_tokens_is_refused(tmp_path: Path, change: dict) -> None:
    sequence = filled(tmp_path)[3]
    other = TokenSequence(**{**vars(sequence), **change})
    store = ResidualStore(tmp_path, SETTINGS)
    assert list(store.missing([sequence])) == []
    with pytest.raises(InputError, match=r"sequence 's3' is there with other tokens"):
        list(store.missing([other]))


def test_changed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00001.safetensors: missing or not as manifest.json has it"):
        read_rows(tmp_path, ["s0"])
    shard.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"shard-00001.safetensors: cannot be read"):
        ResidualStore(tmp_path, SETTINGS)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00001.safetensors: missing"):
        list(read_shards(tmp_path))


def test_a_sequence_in_two_shards_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "shard-00007.safetensors").write_bytes((tmp_path / "shard-00001.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"shard-00007.safetensors: sequence 's4' is in an earlier shard too"):
        ResidualStore(tmp_path, SETTINGS)


def test_an_id_that_is_not_there_and_an_empty_store_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "full")
    with pytest.raises(InputError, match=r"no sequence 'x' in it \(1 of 2 are not\)"):
        read_rows(tmp_path / "full", ["s0", "x"])
    with pytest.raises(InputError, match="no sequence was given"):
        ResidualStore(tmp_path / "empty", SETTINGS).finish()
    with pytest.raises(InputError, match=r"manifest\.json: not there"):
        read_rows(tmp_path / "nowhere", ["s0"])


def test_rows_that_were_not_asked_for_are_a_fault_of_the_caller(tmp_path: Path) -> None:
    store = ResidualStore(tmp_path, SETTINGS)
    with pytest.raises(AssertionError, match="'s0'"):
        store.add(["s0"], rows_of(1))
    list(store.missing(some_sequences(3)))
    with pytest.raises(AssertionError, match="3 rows for 2 ids"):
        store.add(["s0", "s1"], rows_of(3))
    store.add(["s0"], rows_of(1))
    with pytest.raises(AssertionError, match="'s0'"):
        store.add(["s0"], rows_of(1))


def test_a_store_without_rows_leaves_nothing_behind(tmp_path: Path) -> None:
    """So that a model that cannot be loaded does not bind the folder to its settings."""
    with ResidualStore(tmp_path / "rows", SETTINGS) as store:
        assert len(list(store.missing(some_sequences(3)))) == 3
    assert not (tmp_path / "rows").exists()
    with pytest.raises(InputError, match="no sequence was given"):
        ResidualStore(tmp_path / "rows", SETTINGS).finish()
