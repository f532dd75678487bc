"""The OpenAI backend against a real server on loopback, faults included."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.errors import InputError
from src.embed_dataset import EmbedDatasetConfig, main
from src.embedding.openai_encoder import INPUTS_PER_REQUEST, TOKENS_PER_REQUEST, cut_requests
from tests.embedding_server import DIM, embedding_server, vector_of


def config_of(path: Path, folder: Path, address: str, **settings: object) -> EmbedDatasetConfig:
    return EmbedDatasetConfig(
        **{"dataset_path": str(path), "output_dir": folder, "model_id": "tiny", "backend": "openai", "verify": 3,
           "base_url": address, "execute": True, "rows_per_shard": 500, **settings}
    )  # fmt: skip


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def table_of(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet")))


def test_without_execute_nothing_is_sent_and_the_cost_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["four bytes a token"] * 3 + ["other words"])
    with embedding_server() as server:
        main(config_of(path, tmp_path / "out", server.address, execute=False, price_per_million=1000.0))
        assert not server.requests
    assert not (tmp_path / "out").exists()
    # 18 and 11 bytes, the equal texts once: 4 + 3 tokens.
    assert "4 rows, 2 texts to send, about 7 tokens, 1 requests, about $0.0070" in capsys.readouterr().out


def test_with_faults_and_a_kill_every_row_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    texts = [f"text number {n}" for n in range(3000)]
    path = write_rows(tmp_path / "rows.jsonl", texts)
    with embedding_server(fault_share=0.3) as server:
        config = config_of(path, tmp_path / "out", server.address, rows_per_shard=100)
        process = multiprocessing.get_context("fork").Process(target=lambda: main(config))
        process.start()
        while process.is_alive() and len(list((tmp_path / "out").glob("shard-*.json"))) < 8:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before = len(list((tmp_path / "out").glob("shard-*.json")))
        assert 8 <= before < 30
        main(config)
        assert server.faults > 0
        # One shard may have been sent without being written, and three texts are checked once more in each run.
        assert sum(server.texts.values()) <= 3000 + 3 * 100 + 5
    table = table_of(tmp_path / "out")
    assert table["text"].to_pylist() == texts and table["row_index"].to_pylist() == list(range(3000))
    found = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert np.array_equal(found, np.array([vector_of(text) for text in texts], dtype=np.float32))
    assert set(table["n_tokens"].to_pylist()) == {None}


def test_what_the_server_refuses_is_one_line_and_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    with embedding_server() as server:
        with pytest.raises(InputError, match=r"NotFoundError.*no such model") as caught:
            main(config_of(path, tmp_path / "out", server.address, model_id="another"))
        assert "\n" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="no key in the variable OPENAI_API_KEY"):
        main(config_of(path, tmp_path / "other", None))


def test_prompts_are_sent_and_keys_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    with embedding_server() as server:
        main(config_of(path, tmp_path / "out", server.address, prompt="query: ", openai_tag="MY_KEY", truncate_dim=4))
        assert {"query: a", "query: b"} <= set(server.texts)
    assert np.array(table_of(tmp_path / "out")["embedding"].to_pylist()).shape == (2, 4)
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes()


@given(st.lists(st.integers(0, 200_000), max_size=60), st.integers(1, 60))
def test_requests_keep_both_limits_and_every_text(sizes: list[int], repeats: int) -> None:
    texts = ["x" * size for size in sizes] + ["y"] * (repeats * 50)
    ranges = cut_requests(texts)
    assert [n for part in ranges for n in range(part.start, part.stop)] == list(range(len(texts)))
    for part in ranges:
        assert 0 < part.stop - part.start <= INPUTS_PER_REQUEST
        assert part.stop - part.start == 1 or sum(len(text) + 2 for text in texts[part]) <= TOKENS_PER_REQUEST
    assert len(vector_of("x")) == DIM
