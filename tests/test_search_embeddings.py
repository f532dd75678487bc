"""Nearest rows and pairs: equal to brute force in float64 whatever the shards, ties by id, exact at the margin."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import InputError
from src.common.jsonl import read_jsonl
from src.embedding import searching
from src.embedding.searching import Query, find_pairs, search, search_rows
from src.embedding.shards_reading import open_embeddings
from src.ops.top_rows import DECIMALS, TopRows, exact_cosines, rounding_bound, unit_rows
from src.search_embeddings import SearchEmbeddingsConfig, main
from tests.embedding_shards import unit_vectors, write_shards

TEXTS = [
    "The ship was caught in a storm off the coast.", "A gale drove the sailing boat onto the rocks.",
    "Bread needs flour, water, salt and time.", "Knead the dough until it is smooth.",
    "The court adjourned until Monday.", "The judge postponed the hearing.",
    "The ship was caught in a storm off the coast.", "Photosynthesis turns light into sugar.",
]  # fmt: skip


def rows_of(n: int) -> list[dict]:
    # Ids whose order is not that of the rows.
    return [{"id": f"{(i * 7919) % 1000:03d}-{i}", "text": f"text {i}", "metadata": {"n": i}} for i in range(n)]


def repeated_vectors(n: int, n_distinct: int, dim: int) -> np.ndarray:
    """Many equal rows, in several lengths: cosines tie often."""
    chosen = np.random.default_rng(5).integers(n_distinct, size=n)
    return (unit_vectors(n_distinct, dim, seed=6)[chosen] * (1 + chosen[:, None] % 3)).astype(np.float32)


def brute_force(vectors: np.ndarray, query: np.ndarray, ids: list[str], k: int) -> list[tuple[float, str]]:
    wide = vectors.astype(np.float64)
    cosines = wide @ query.astype(np.float64) / np.linalg.norm(wide, axis=1) / np.linalg.norm(query.astype(np.float64))
    return sorted((-round(float(c), DECIMALS), row_id) for c, row_id in zip(cosines, ids, strict=True))[:k]


@pytest.mark.parametrize("cuts", [(), (1,), (100, 100, 350)])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_the_nearest_rows_are_those_of_brute_force_with_ties_by_id(tmp_path: Path, cuts: tuple, k: int) -> None:
    vectors, rows, queries = repeated_vectors(400, 40, 24), rows_of(400), unit_vectors(3, 24, seed=7)
    embeddings = open_embeddings(write_shards(tmp_path / "e", vectors, rows, cuts))
    ids = [row["id"] for row in rows]
    for query, found in zip(queries, search(embeddings, queries, k), strict=True):
        told = [(-each.cosine, each.key[0]) for each in found]
        assert told == brute_force(vectors, query, ids, k)
        assert [ids[each.place] for each in found] == [each.key[0] for each in found]


def test_rows_that_float32_cannot_tell_apart_are_in_their_exact_order() -> None:
    # Cosines that differ by 4e-9, below half a unit of float32 at 1; rounding of the product would shuffle them.
    angles = np.sqrt(2 * (1 + np.arange(64)) * 4e-9)
    wide = np.stack([np.cos(angles), np.sin(angles), np.full(64, 1e-3)], axis=1)
    vectors, order = wide.astype(np.float32), np.random.default_rng(8).permutation(64)
    query = np.array([[1.0, 0.0, 1e-3]], dtype=np.float32)
    top = TopRows(query, 10)
    for start in range(0, 64, 16):
        top.add(vectors[order[start : start + 16]], [(int(i),) for i in order[start : start + 16]], start)
    exact = exact_cosines(vectors, np.broadcast_to(query, vectors.shape))
    expected = sorted(range(64), key=lambda i: (-exact[i], i))[:10]
    assert [found.key[0] for found in top.best()[0]] == expected


@pytest.mark.parametrize("dim", [2, 384, 4096])
def test_the_rounding_of_the_fast_product_stays_within_its_bound(dim: int) -> None:
    rows = np.random.default_rng(dim).normal(size=(200, dim)).astype(np.float32) * 37
    approximate = unit_rows(rows) @ unit_rows(rows).T
    wide = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(approximate - wide @ wide.T).max() <= rounding_bound(dim)


def test_a_row_is_nearest_to_itself_in_every_precision(tmp_path: Path) -> None:
    vectors = unit_vectors(300, 256)
    for precision, factor in (("float32", 1), ("float16", 1), ("int8", 300), ("binary", 1)):
        folder = write_shards(tmp_path / precision, vectors * factor, rows_of(300), [128], precision)
        best = search(open_embeddings(folder), vectors[:20], 1)
        assert [found[0].place for found in best] == list(range(20)), precision


def test_bits_are_signs_and_their_cosine_counts_agreements(tmp_path: Path) -> None:
    vectors = unit_vectors(5, 19)
    folder = write_shards(tmp_path / "bits", vectors, rows_of(5), precision="binary")
    block = next(open_embeddings(folder).blocks())
    assert np.array_equal(block.vectors, np.where(vectors > 0, 1.0, -1.0))
    pairs = {frozenset((r["row_index_a"], r["row_index_b"])): r["cosine"] for r in all_pairs(folder, -1.0)}
    agree = (np.sign(vectors[0]) == np.sign(vectors[1])).sum()
    assert pairs[frozenset((0, 1))] == pytest.approx((2 * agree - 19) / 19)


def all_pairs(folder: Path, least: float, most: int = 10**6) -> list[dict]:
    return find_pairs(open_embeddings(folder), least, most).rows


@pytest.mark.parametrize("least", [0.2, 0.999, 1.0])
def test_pairs_are_those_of_brute_force_whatever_is_held(
    tmp_path: Path, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, rows = repeated_vectors(150, 60, 16), rows_of(150)
    folder = write_shards(tmp_path / "e", vectors, rows, [40, 41, 90])
    wide = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    near = np.triu(np.round(wide @ wide.T, DECIMALS) >= least, 1)
    expected = {frozenset((rows[i]["id"], rows[j]["id"])) for i, j in zip(*np.nonzero(near), strict=True)}
    whole = all_pairs(folder, least)
    assert {frozenset((row["row_id_a"], row["row_id_b"])) for row in whole} == expected and len(whole) == len(expected)
    assert all(row["row_id_a"] < row["row_id_b"] for row in whole)
    # Held in small parts, with later rows streaming by.
    monkeypatch.setattr(searching, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(searching, "NUMBERS_AT_ONCE", 16 * 32)
    monkeypatch.setattr(searching, "TILE", 8)
    assert all_pairs(folder, least) == whole
    few = find_pairs(open_embeddings(folder), least, 5)
    assert few.n_pairs == len(expected) and few.rows == whole[:5]


def test_result_rows_hold_what_the_shards_know(tmp_path: Path) -> None:
    rows = rows_of(4)
    for row in rows:
        del row["text"]
    embeddings = open_embeddings(write_shards(tmp_path / "e", unit_vectors(4, 8), rows, [2]))
    found = search_rows(embeddings, [Query("q", None)], search(embeddings, unit_vectors(1, 8), 2))
    assert [row["rank"] for row in found] == [1, 2] and "text" not in found[0]
    assert found[0]["row_id"] == rows[0]["id"] and found[0]["metadata"] == {"n": 0} and found[0]["cosine"] == 1.0


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of real embeddings."""
    from sentence_transformers import SentenceTransformer

    from src.models.bundled import bundled_folder

    vectors = SentenceTransformer(str(bundled_folder("bundled:minilm")), device="cpu").encode(TEXTS)
    rows = [{"id": f"t{i}", "text": text, "metadata": {}} for i, text in enumerate(TEXTS)]
    return write_shards(tmp_path_factory.mktemp("minilm") / "e", vectors, rows, [5])


def test_a_text_finds_what_means_the_same(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    queries = ["a vessel in a tempest", "baking a loaf", TEXTS[0]]
    out = tmp_path / "out"
    main(SearchEmbeddingsConfig(embeddings_dir=minilm, query=queries, top_k=3, output_dir=out))
    shown = capsys.readouterr().out
    found = [row for _, row in read_jsonl(out / "results.jsonl")]
    best = {(row["query_id"], row["rank"]): row["row_id"] for row in found}
    assert {best["0", rank] for rank in (1, 2, 3)} == {"t0", "t1", "t6"}
    assert {best["1", rank] for rank in (1, 2)} == {"t2", "t3"}
    # Its own text twice, at cosine 1, the smaller id first.
    assert (best["2", 1], best["2", 2]) == ("t0", "t6") and found[6]["cosine"] == 1.0
    assert "a vessel in a tempest" in shown and str(out / "results.jsonl") in shown


def test_queries_from_a_file_and_from_shards_find_the_same(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"id": f"t{i}", "prompt": text} for i, text in enumerate(TEXTS)]))
    main(SearchEmbeddingsConfig(embeddings_dir=minilm, query_path=tmp_path / "q.json", output_dir=tmp_path / "file"))
    main(SearchEmbeddingsConfig(embeddings_dir=minilm, query_embeddings_dir=minilm, output_dir=tmp_path / "shards"))
    by_file, by_shards = ((tmp_path / name / "results.jsonl").read_text() for name in ("file", "shards"))
    assert by_file == by_shards and by_file.count("\n") == len(TEXTS) ** 2
    if importlib.util.find_spec("faiss"):
        main(SearchEmbeddingsConfig(embeddings_dir=minilm, query_embeddings_dir=minilm, engine="faiss",
                                    output_dir=tmp_path / "faiss"))  # fmt: skip
        assert (tmp_path / "faiss" / "results.jsonl").read_text() == by_file


def test_a_query_that_the_model_cannot_read_whole_is_refused(minilm: Path, tmp_path: Path) -> None:
    config = SearchEmbeddingsConfig(embeddings_dir=minilm, query=["word " * 400], output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="402 tokens and the model reads"):
        main(config)


def test_a_knn_that_returns_too_few_rows_of_a_tie_loses_none(tmp_path: Path) -> None:
    # What faiss does: the k largest only, of many equal ones those that come first.
    def knn(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        products = queries @ rows.T
        places = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(products, places, axis=1), places

    vectors, queries = repeated_vectors(600, 5, 8), unit_vectors(4, 8, seed=7)
    embeddings = open_embeddings(write_shards(tmp_path / "e", vectors, rows_of(600), [300]))
    assert search(embeddings, queries, 9, knn) == search(embeddings, queries, 9)


def test_the_command_writes_and_counts_pairs(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture, run_module: Callable
) -> None:
    done = run_module("search_embeddings", "--embeddings_dir", str(minilm), "--pairs", "--min_cosine", "0.5",
                      "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0 and TEXTS[0] in done.stdout, done.stderr
    pairs = [row for _, row in read_jsonl(tmp_path / "out" / "pairs.jsonl")]
    assert (pairs[0]["row_id_a"], pairs[0]["row_id_b"], pairs[0]["cosine"]) == ("t0", "t6", 1.0)
    assert {frozenset((p["row_id_a"], p["row_id_b"])) for p in pairs} >= {frozenset(("t4", "t5"))}
    main(
        SearchEmbeddingsConfig(
            embeddings_dir=minilm, pairs=True, min_cosine=0.5, max_pairs=1, output_dir=tmp_path / "1"
        )
    )
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["pairs"]["n_pairs"] == len(pairs) > 1
    assert f"{len(pairs)} pairs of 8 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        ({}, "none of them; expected one of"),
        ({"query": ["a"], "pairs": True}, "--query and --pairs"),
        ({"query": [" "]}, "an empty text"),
        ({"query": ["a"], "top_k": 0}, "--top_k 0"),
        ({"pairs": True, "min_cosine": 1.5}, "--min_cosine 1.5"),
    ],
)
def test_wrong_words_are_refused(tmp_path: Path, words: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        SearchEmbeddingsConfig(embeddings_dir=tmp_path, output_dir=tmp_path / "out", **words)


def test_a_model_that_is_served_and_one_of_another_dimension_are_refused(tmp_path: Path) -> None:
    served = write_shards(tmp_path / "served", unit_vectors(3, 8), rows_of(3), model="served-1",
                          settings={"backend": "openai"})  # fmt: skip
    with pytest.raises(InputError, match="query_embeddings_dir"):
        main(SearchEmbeddingsConfig(embeddings_dir=served, query=["a"], output_dir=tmp_path / "a"))
    changed = write_shards(tmp_path / "changed", unit_vectors(3, 384), rows_of(3),
                           settings={"model_fingerprint": "0" * 64})  # fmt: skip
    with pytest.raises(InputError, match="another model than the bundled:minilm"):
        main(SearchEmbeddingsConfig(embeddings_dir=changed, query=["a"], output_dir=tmp_path / "d"))
    narrow = write_shards(tmp_path / "narrow", unit_vectors(3, 8), rows_of(3))
    with pytest.raises(InputError, match=r"vectors of 384 numbers, .* holds 8"):
        main(SearchEmbeddingsConfig(embeddings_dir=narrow, query=["a"], output_dir=tmp_path / "b"))
    with pytest.raises(InputError, match="model served-1, the rows have bundled:minilm"):
        main(SearchEmbeddingsConfig(embeddings_dir=narrow, query_embeddings_dir=served, output_dir=tmp_path / "c"))


def test_queries_of_other_weights_under_one_name_are_refused(tmp_path: Path) -> None:
    def shards(name: str, model: str, fingerprint: str) -> Path:
        settings = {"model_fingerprint": fingerprint * 64}
        return write_shards(tmp_path / name, unit_vectors(3, 8), rows_of(3), model=model, settings=settings)

    rows, others = shards("rows", "tuned", "a"), shards("others", "tuned", "b")
    with pytest.raises(InputError, match=r"another model tuned .* \(fingerprint bbbbbbbbbbbb, theirs aaaaaaaaaaaa\)"):
        main(SearchEmbeddingsConfig(embeddings_dir=rows, query_embeddings_dir=others, output_dir=tmp_path / "a"))
    same = shards("same", "/models/tuned", "a")
    main(SearchEmbeddingsConfig(embeddings_dir=rows, query_embeddings_dir=same, output_dir=tmp_path / "b"))
