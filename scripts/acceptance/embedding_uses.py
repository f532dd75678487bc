"""
What searching a large folder of embeddings costs, and that it is exact: shards of random float32 vectors with planted
near-duplicates. About 3 minutes on two CPU cores, and 1.5 kB of disk a row:
uv run python scripts/acceptance/embedding_uses.py --output_dir data/experiments/acceptance_embedding_uses
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from src.common.files import sha256_file  # noqa: E402

DIM, ROWS_A_SHARD, N_PLANTED = 384, 8192, 50


def vectors_of(start: int, count: int) -> np.ndarray:
    """Unit vectors float32 (count, DIM); each of the first N_PLANTED of a shard is nearly one of the shard's end."""
    drawn = np.random.default_rng(start).normal(size=(count, DIM))
    noise = np.random.default_rng(start + 1).normal(size=(N_PLANTED, DIM)) * 0.01
    drawn[:N_PLANTED] = drawn[count - N_PLANTED :] + noise
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def write_folder(folder: Path, n_rows: int) -> None:
    """Shards as src.embed_dataset writes them, one in memory at a time."""
    folder.mkdir(parents=True)
    listed = []
    for number, start in enumerate(range(0, n_rows, ROWS_A_SHARD)):
        vectors = vectors_of(start, min(ROWS_A_SHARD, n_rows - start))
        ids = [f"row{start + i:08d}" for i in range(len(vectors))]
        table = pa.table({
            "id": ids, "chunk_index": pa.array([0] * len(ids), pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM),
            "model": ["random"] * len(ids),
        })  # fmt: skip
        path = folder / f"shard-{number:05d}.parquet"
        split = {"embedding.list.element": "BYTE_STREAM_SPLIT"}
        pq.write_table(table, path, compression="zstd", column_encoding=split, use_dictionary=["model"])
        sidecar = {"shard": path.name, "rows": len(ids), "sha256": sha256_file(path), "dim": DIM}
        sidecar |= {"precision": "float32", "norm_min": 1.0, "norm_max": 1.0}
        path.with_suffix(".json").write_text(json.dumps(sidecar))
        listed.append(sidecar)
    (folder / "manifest.json").write_text(json.dumps({"complete": True, "settings": {}, "shards": listed}))


def run(output_dir: Path, *words: str) -> dict:
    """The session of one src.search_embeddings run."""
    command = [sys.executable, "-m", "src.search_embeddings", *words, "--output_dir", str(output_dir)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((output_dir / "provenance.json").read_text())["sessions"][-1]


def told(session: dict) -> str:
    return f"{session['seconds']:.1f} s, peak {session['peak_memory_mib']['process']:.0f} MiB"


def check_exact(folder: Path, queries: np.ndarray, n_rows: int, results: Path) -> None:
    """The ten nearest rows of every query are those of a product in float64."""
    products = np.concatenate([
        vectors_of(start, min(ROWS_A_SHARD, n_rows - start)).astype(np.float64) @ queries.T.astype(np.float64)
        for start in range(0, n_rows, ROWS_A_SHARD)
    ])  # fmt: skip
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    for number in range(len(queries)):
        expected = [f"row{i:08d}" for i in np.argsort(-products[:, number], kind="stable")[:10]]
        found = [row["row_id"] for row in rows if row["query_id"] == f"row{number:08d}"]
        assert found == expected, (number, found, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", type=int, default=[20_000, 200_000])
    parser.add_argument("--pairs_up_to", type=int, default=20_000, help="rows up to which all pairs are compared")
    parser.add_argument("--engines", nargs="+", default=["numpy"], choices=["numpy", "faiss"])
    arguments = parser.parse_args()
    write_folder(arguments.output_dir / "queries", 100)
    queries = vectors_of(0, 100)
    for n_rows in arguments.rows:
        folder = arguments.output_dir / f"rows_{n_rows}"
        write_folder(folder, n_rows)
        for engine in arguments.engines:
            out = arguments.output_dir / f"search_{n_rows}_{engine}"
            session = run(out, "--embeddings_dir", str(folder), "--query_embeddings_dir",
                          str(arguments.output_dir / "queries"), "--engine", engine)  # fmt: skip
            check_exact(folder, queries, n_rows, out / "results.jsonl")
            print(f"100 queries, {n_rows} rows, {engine}: {told(session)}, all as in float64", flush=True)
        if n_rows <= arguments.pairs_up_to:
            out = arguments.output_dir / f"pairs_{n_rows}"
            session = run(out, "--embeddings_dir", str(folder), "--pairs", "--min_cosine", "0.9")
            found = json.loads((out / "summary.json").read_text())["pairs"]["n_pairs"]
            expected = N_PLANTED * -(-n_rows // ROWS_A_SHARD)
            print(f"pairs of {n_rows} rows: {told(session)}, {found} found, {expected} planted", flush=True)


if __name__ == "__main__":
    main()
