"""What tests of `src.embed_dataset` share: rows of skewed length, the command with a tiny model, and what it wrote."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.embed_dataset import EmbedDatasetConfig
from tests.tiny_embedder import WORDS


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Texts of skewed length, some twice."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=int(draw.lognormvariate(2, 0.9)) + 1)) for _ in range(count)]
    return [{"id": f"row-{n}", "text": texts[n // 2 if n % 10 == 0 else n], "n": n} for n in range(count)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(model: Path, data: Path, output_dir: Path, **settings: object) -> EmbedDatasetConfig:
    defaults = {"dataset_path": str(data), "model_id": str(model), "rows_per_shard": 64, "dtype": "float32",
                "backend": "st", "verify": 0}  # fmt: skip
    return EmbedDatasetConfig(**{**defaults, "output_dir": output_dir, **settings})


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.parquet"))}


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet")))


def vectors(table: pa.Table) -> np.ndarray:
    flat = table["embedding"].combine_chunks()
    return flat.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms
