"""`src.embed_dataset --backend vllm`: the vectors of sentence-transformers, in processes of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.common.errors import InputError
from src.embed_dataset import EmbedDatasetConfig, main
from tests.tiny_embedder import WORDS, save_tiny_embedder


def write_texts(path: Path) -> list[str]:
    """Of skewed length, the longest longer than the model reads; two are equal."""
    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 2 + n * n % 70)) for n in range(60)]
    texts[7], texts[9] = " ".join(WORDS * 40), texts[3]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def vectors(folder: Path) -> np.ndarray:
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet")))
    return np.array(table["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_gives_what_sentence_transformers_gives(tmp_path: Path, run_module: Callable) -> None:
    from sentence_transformers import SentenceTransformer

    from src.models.bundled import bundled_folder

    texts = write_texts(tmp_path / "rows.jsonl")
    words = ["--dataset_path", str(tmp_path / "rows.jsonl"), "--model_id", "bundled:minilm", "--backend", "vllm",
             "--dtype", "float32", "--rows_per_shard", "40", "--verify", "8", "--prompt", "note: ",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = run_module("embed_dataset", *words)
    assert done.returncode == 0, done.stderr
    model = SentenceTransformer(str(bundled_folder("bundled:minilm")), device="cpu")
    wanted, found = model.encode(texts, prompt="note: "), vectors(tmp_path / "out")
    assert (found * wanted).sum(axis=1).min() >= 0.9999
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["backend"] == "vllm" and manifest["padding_share"] == 0
    assert manifest["verification"]["worker-00000-of-00001"]["least"] >= 0.9999


@pytest.mark.vllm
def test_what_vllm_cannot_pool_is_said_before_it_starts(tmp_path: Path) -> None:
    write_texts(tmp_path / "rows.jsonl")
    model = save_tiny_embedder(tmp_path / "tiny", pooling="max")
    config = EmbedDatasetConfig(
        dataset_path=str(tmp_path / "rows.jsonl"), model_id=str(model), backend="vllm", output_dir=tmp_path / "out"
    )
    with pytest.raises(InputError, match=r"pools by max; vLLM has mean, cls, lasttoken pooling .* take --backend st"):
        main(config)
