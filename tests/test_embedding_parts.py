"""The parts of embedding on their own: batches, the pipeline, streams of rows."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.embedding.batching import compiled_width, plan_batches, plan_compiled_batches
from src.embedding.pipeline import run_stages
from src.embedding.reading import find_source
from src.embedding.records import Shard
from src.embedding.tokenizing import PieceTokenizer

lengths_of_pieces = st.lists(st.integers(1, 600), max_size=200)


@given(lengths_of_pieces, st.integers(1, 3000))
def test_batches_hold_every_piece_once_within_the_budget(lengths: list[int], budget: int) -> None:
    for plan in (plan_batches, plan_compiled_batches):
        batches = plan(np.array(lengths, dtype=np.int64), budget)
        assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= budget
            if plan is plan_compiled_batches:
                assert len({compiled_width(lengths[i]) for i in batch}) == 1


def test_batches_of_many_shards_have_few_sizes() -> None:
    # Kernels are kept for every size: what is ever new makes memory grow with the dataset.
    draw, budget = np.random.default_rng(0), 1024
    rows_of_width: dict[int, set[int]] = {}
    for _ in range(60):
        lengths = draw.integers(5, 21, draw.integers(1500, 2500))
        for batch in plan_batches(lengths, budget):
            rows_of_width.setdefault(int(lengths[batch].max()), set()).add(len(batch))
    for width, rows in rows_of_width.items():
        most = budget // width
        # What fits and three quarters of it, else halves.
        assert len(rows) <= 1 + most.bit_length() and max(rows) <= most, (width, rows)


def test_little_of_a_large_shard_is_padding() -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(3.6, 0.8, 2000), 8, 256).astype(int)
    for budget in (1024, 2048):
        computed = sum(len(batch) * lengths[batch].max() for batch in plan_batches(lengths, budget))
        assert 1 - lengths.sum() / computed <= 0.035


def empty_shards(count: int) -> Iterator[Shard]:
    for index in range(count):
        yield Shard(index=index, row_start=0, row_stop=0, is_last=False, rows=[], bad_rows=0, sampled_out=0)


class Passing:
    dim = 1

    def encode(self, shard: Shard, report) -> None:
        report(0, 0)


def failing_at(index: int) -> Iterator[Shard]:
    yield from empty_shards(index)
    raise InputError("the loader")


class Failing(Passing):
    def encode(self, shard: Shard, report) -> None:
        if shard.index == 2:
            raise InputError("the encoder")


def write_until_two(shard: Shard) -> None:
    if shard.index == 2:
        raise InputError("the writer")


@pytest.mark.parametrize("stage", ["the loader", "the encoder", "the writer"])
@pytest.mark.parametrize("encoders", [1, 3])
def test_the_first_exception_ends_all_stages_and_reaches_the_caller(stage: str, encoders: int) -> None:
    shards = failing_at(2) if stage == "the loader" else empty_shards(10**9)
    kind = Failing if stage == "the encoder" else Passing
    write = write_until_two if stage == "the writer" else lambda shard: None
    with pytest.raises(InputError, match=stage):
        run_stages(shards, [kind() for _ in range(encoders)], write, lambda pieces, tokens: None)
    assert threading.active_count() < 20


def test_every_shard_goes_through_and_few_wait() -> None:
    drawn, written, most = [], [], []

    def counted() -> Iterator[Shard]:
        for shard in empty_shards(50):
            drawn.append(shard.index)
            most.append(len(drawn) - len(written))
            yield shard

    def write(shard: Shard) -> None:
        time.sleep(0.002)
        written.append(shard.index)

    run_stages(counted(), [Passing()], write, lambda pieces, tokens: None)
    assert written == list(range(50))
    # One in each stage's hands and one in each queue.
    assert max(most) <= 6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12), st.integers(1, 30))
def test_taking_and_skipping_is_slicing(tmp_path: Path, steps: list[tuple[bool, int]], group: int) -> None:
    rows = [{"text": f"row {n}"} for n in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=group)
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    for name in ("rows.jsonl", "rows.parquet", "rows.csv"):
        source = find_source(str(tmp_path / name), None, None)
        stream, position = source.open(), 0
        for takes, count in steps:
            wanted = rows[position : position + count]
            if takes:
                assert [row.value for row in stream.take(count)] == wanted
            else:
                assert stream.skip(count) == len(wanted)
            position += len(wanted)
            assert stream.is_at_end() == (position == len(rows))
        assert source.count() in (90, None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["é", "日本", "x", "abc ", "  ", "\n", "the ", "1234", "🙂", "ing"]), max_size=80))
def test_no_chunk_is_cut_off_and_no_character_is_lost(byte_chunks: PieceTokenizer, words: list[str]) -> None:
    # Byte-level tokens may be parts of a character: a chunk by itself can have more of them than within its text.
    text = "".join(words)
    pieces = byte_chunks.pieces([text, "short"])
    assert [piece.chunk_index for piece in pieces] == [*range(len(pieces) - 1), 0]
    assert all(len(piece.token_ids) <= 16 and not piece.truncated for piece in pieces)
    covered = {place for piece in pieces[:-1] for place in range(piece.start, piece.stop)}
    assert all(place in covered or character.isspace() for place, character in enumerate(text))


@pytest.fixture(scope="module")
def byte_chunks(bundled_folder: Path) -> PieceTokenizer:
    """Chunks of 16 tokens, which is also all that the model takes."""
    from transformers import AutoTokenizer

    return PieceTokenizer(AutoTokenizer.from_pretrained(bundled_folder), "", 16, 16, 3)


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "card.json").write_text("{}")
    assert [path.name for path in find_source(str(tmp_path), None, None).files] == ["a.csv"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r"\.csv and \.jsonl; name one"):
        find_source(str(tmp_path), None, None)


def test_a_csv_that_is_not_utf_8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"fine\n" * 5000 + b"caf\xe9\n")
    stream = find_source(str(tmp_path / "a.csv"), None, None).open()
    with pytest.raises(InputError, match=r"a.csv:5002: byte 0xe9 is not UTF-8"):
        while stream.take(1000):
            pass
