"""The spread of embeddings by group: identities of the trace, intervals that hold, and shards that are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import InputError
from src.common.jsonl import read_jsonl
from src.embedding.row_fields import read_results
from src.embedding.shards_reading import open_embeddings
from src.embedding.variance import variance_rows
from src.embedding_variance import EmbeddingVarianceConfig, main
from src.ops.covariance_trace import ClusterSums, covariance_trace, trace_interval, within_cluster_trace
from tests.embedding_shards import unit_vectors, write_shards


def persona_rows(n: int, n_personas: int = 3, n_prompts: int = 5) -> list[dict]:
    return [
        {
            "id": f"row{i}",
            "text": f"text {i}",
            "metadata": {"persona": f"p{i % n_personas}", "category": "c", "prompt_id": str(i // 3 % n_prompts)},
        }
        for i in range(n)
    ]


def sums_of(rows: np.ndarray, clusters: list, origin: float = 0.0) -> ClusterSums:
    names = list(dict.fromkeys(clusters))
    parts = [rows[[c == name for c in clusters]].astype(np.float64) - origin for name in names]
    return ClusterSums(
        np.array([len(p) for p in parts]), np.stack([p.sum(0) for p in parts]), np.array([(p * p).sum() for p in parts])
    )


def groups_of(folder: Path, **settings) -> dict[tuple[str, str], dict]:
    rows = variance_rows(
        open_embeddings(folder), settings.get("results"), settings.get("group_by", ["persona", "category"]),
        settings.get("cluster_by", "prompt_id"), settings.get("seed", 42),
    )  # fmt: skip
    return {(row["grouping"], row["group"]): row for row in rows}


def test_the_trace_is_numpys_and_half_the_mean_squared_distance() -> None:
    rows = np.random.default_rng(1).normal(size=(12, 7))
    sums = sums_of(rows, list(range(12)))
    assert covariance_trace(sums) == pytest.approx(np.trace(np.cov(rows.T)), rel=1e-12)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    assert covariance_trace(sums) == pytest.approx(distances.sum() / (12 * 11) / 2, rel=1e-12)
    assert covariance_trace(sums_of(rows[:1], [0])) is None and trace_interval(sums_of(rows[:3], [0, 0, 0]), 0) is None


def test_within_clusters_only_what_repeats_differ_by_counts() -> None:
    generator = np.random.default_rng(2)
    prompts = np.repeat(generator.normal(size=(6, 4)) * 10, 3, axis=0)
    clusters = [i // 3 for i in range(18)]
    assert within_cluster_trace(sums_of(prompts, clusters)) == pytest.approx(0.0, abs=1e-9)
    noisy = prompts + generator.normal(size=prompts.shape)
    expected = np.mean([np.trace(np.cov(noisy[i : i + 3].T)) for i in range(0, 18, 3)])
    assert within_cluster_trace(sums_of(noisy, clusters)) == pytest.approx(expected, rel=1e-9)
    assert within_cluster_trace(sums_of(noisy, list(range(18)))) is None


@pytest.mark.parametrize("n_clusters, per_cluster, dim", [(12, 1, 64), (20, 1, 64), (20, 3, 8), (86, 1, 384)])
def test_the_interval_holds_the_true_trace_as_often_as_it_says(n_clusters: int, per_cluster: int, dim: int) -> None:
    # Plain percentiles, whose resamples repeat rows and so spread too little, hold it in 0.1 % to 80 % of these.
    generator, held, truth = np.random.default_rng(3), 0, []
    intervals = []
    for trial in range(100):
        shared = np.repeat(generator.normal(size=(n_clusters, dim)), per_cluster, axis=0)
        rows = shared + 0.5 * generator.normal(size=shared.shape)
        sums = sums_of(rows, [i // per_cluster for i in range(len(rows))])
        intervals.append(trace_interval(sums, trial, 400))
        truth.append(covariance_trace(sums))
    held = np.mean([low <= np.mean(truth) <= high for low, high in intervals])
    assert held >= 0.87, held


def test_repeating_every_row_of_a_cluster_widens_nothing() -> None:
    # Copies are no new prompts: the interval of clusters stays, relative to the trace, where that of rows would shrink.
    rows = np.random.default_rng(4).normal(size=(10, 5))
    once, often = sums_of(rows, list(range(10))), sums_of(np.repeat(rows, 50, axis=0), [i // 50 for i in range(500)])
    width = [np.diff(trace_interval(sums, 0))[0] / covariance_trace(sums) for sums in (once, often)]
    assert width[1] == pytest.approx(width[0], rel=0.05)
    as_rows = trace_interval(sums_of(np.repeat(rows, 50, axis=0), list(range(500))), 0)
    assert np.diff(as_rows)[0] < 0.5 * width[1] * covariance_trace(often)


def test_groups_are_those_of_the_metadata_whatever_the_shards(tmp_path: Path) -> None:
    vectors, rows = unit_vectors(90, 16), persona_rows(90)
    one = groups_of(write_shards(tmp_path / "one", vectors, rows))
    three = groups_of(write_shards(tmp_path / "three", vectors, rows, cuts=[17, 18]))
    assert one == three
    for name in ("p0", "p1", "p2"):
        members = vectors[[row["metadata"]["persona"] == name for row in rows]].astype(np.float64)
        found = one["persona", name]
        assert (found["n"], found["n_clusters"]) == (30, 5)
        assert found["trace"] == pytest.approx(np.trace(np.cov(members.T)), rel=1e-9)
        assert found["ci_low"] < found["trace"] < found["ci_high"]
    assert one["overall", "overall"]["trace"] == one["category", "c"]["trace"]


def test_a_far_offset_costs_no_digits(tmp_path: Path) -> None:
    vectors = (unit_vectors(40, 8) * 1e-3 + 1.0).astype(np.float32)
    found = groups_of(write_shards(tmp_path / "e", vectors, persona_rows(40)), group_by=[])["overall", "overall"]
    assert found["trace"] == pytest.approx(np.trace(np.cov(vectors.astype(np.float64).T)), rel=1e-9)


def test_small_groups_and_missing_vectors_stay_in_the_table(tmp_path: Path) -> None:
    rows = persona_rows(10)
    rows[9]["metadata"]["persona"] = "alone"
    results = tmp_path / "results.jsonl"
    more = [
        {"id": "gone", "persona": "unanswered", "prompt_id": "0"},
        {"id": "lost", "persona": "p0", "prompt_id": "1"},
    ]
    lines = [{"id": row["id"], **row["metadata"]} for row in rows] + more
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = write_shards(tmp_path / "e", unit_vectors(10, 4), rows)
    found = groups_of(folder, results=read_results(results), group_by=["persona"])
    assert found["persona", "alone"]["n"] == 1 and found["persona", "alone"]["trace"] is None
    assert found["persona", "unanswered"]["n"] == 0 and found["persona", "unanswered"]["n_without_embedding"] == 1
    assert (
        found["persona", "p0"]["n_without_embedding"] == 1 and found["overall", "overall"]["n_without_embedding"] == 2
    )


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda e: (e / "manifest.json").unlink(), ["manifest.json", "not finished"]),
        (lambda e: change(e / "manifest.json", complete=False), ["manifest.json", "not complete"]),
        (lambda e: change(e / "manifest.json", shards=[]), ["manifest.json", "lists no shards"]),
        (lambda e: (e / "shard-00001.json").unlink(), ["shard-00001.json", "not there"]),
        (lambda e: (e / "shard-00001.parquet").unlink(), ["lists 2 shards and 1"]),
        (lambda e: change(e / "shard-00001.json", sha256="0" * 64), ["shard-00001.parquet", "sha256"]),
        (lambda e: change(e / "shard-00001.json", rows=7), ["shard-00001.parquet", "rows"]),
        (lambda e: change(e / "shard-00001.json", norm_min=3.0, norm_max=5.0), ["one is normalised"]),
        (lambda e: change(e / "shard-00001.json", dim=5), ["sidecar says 5"]),
        (lambda e: flip_byte(e / "shard-00000.parquet"), ["shard-00000.parquet", "src.embed_dataset"]),
        (lambda e: replace(e, 1, unit_vectors(5, 6)), ["shard-00001.parquet", "dim 6", "has 4"]),
        (lambda e: replace(e, 1, unit_vectors(5, 4), precision="float16"), ["precision float16", "float32"]),
        (lambda e: replace(e, 1, unit_vectors(5, 4), model="other"), ["2 models", "'other'"]),
        (lambda e: replace(e, 1, np.full((5, 4), np.nan)), ["norms from nan"]),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, spoil: Callable, words: list[str]) -> None:
    folder = write_shards(tmp_path / "e", unit_vectors(10, 4), persona_rows(10), cuts=[5])
    spoil(folder)
    with pytest.raises(InputError) as caught:
        open_embeddings(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def change(path: Path, **facts: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(bytes(data))


def replace(folder: Path, number: int, vectors: np.ndarray, precision: str = "float32", model: str = "bundled:minilm"):
    """Another shard in place of one, with the sidecar that belongs to it."""
    other = write_shards(folder.parent / "other", vectors, persona_rows(len(vectors)), (), precision, model)
    for suffix in (".parquet", ".json"):
        (other / f"shard-00000{suffix}").rename(folder / f"shard-{number:05d}{suffix}")


def test_nan_zero_chunks_and_codes_are_refused(tmp_path: Path) -> None:
    rows = persona_rows(6)
    zero = unit_vectors(6, 4)
    folder = write_shards(tmp_path / "zero", zero, rows)
    zero[4] = 0.0
    replace(folder, 0, zero)
    change(folder / "shard-00000.json", norm_min=0.5)
    with pytest.raises(InputError, match="row 4 is zero"):
        groups_of(folder)
    chunks = write_shards(tmp_path / "chunks", unit_vectors(6, 4), [*rows[:5], rows[4] | {"chunk_index": 1}])
    with pytest.raises(InputError, match="chunks"):
        groups_of(chunks)
    codes = write_shards(tmp_path / "codes", unit_vectors(6, 4) * 127, rows, precision="int8")
    with pytest.raises(InputError, match="int8"):
        groups_of(codes)
    with pytest.raises(InputError, match=r"no field 'prompt'; expected some of: .*category"):
        groups_of(write_shards(tmp_path / "plain", unit_vectors(6, 4), rows), cluster_by="prompt")
    assert groups_of(tmp_path / "plain", cluster_by="id", group_by=["persona+category"])["persona+category", "p0 + c"]


def test_the_command_writes_rows_a_summary_and_a_table_and_resumes(tmp_path: Path, run_module: Callable) -> None:
    folder = write_shards(tmp_path / "e", unit_vectors(30, 8), persona_rows(30))
    words = ["--embeddings_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    done = run_module("embedding_variance", *words)
    assert done.returncode == 0, done.stderr
    assert "Trace of the covariance by persona" in done.stdout and "p2" in done.stdout
    first = (tmp_path / "out" / "results.jsonl").read_bytes()
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "results.jsonl")]
    assert [row["group"] for row in rows] == ["p0", "p1", "p2", "c", "overall"]
    config = EmbeddingVarianceConfig(embeddings_dir=folder, output_dir=tmp_path / "out")
    main(config)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == first
    replace(folder, 0, unit_vectors(30, 8, seed=9))
    with pytest.raises(InputError, match="holds another run"):
        main(config)


def test_bad_words_answer_in_one_line(tmp_path: Path, run_module: Callable) -> None:
    words = ["--embeddings_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")]
    done = run_module("embedding_variance", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "src.embed_dataset" in done.stderr
    assert not (tmp_path / "out").exists()
