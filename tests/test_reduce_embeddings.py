"""Maps of embeddings: clusters that are there are found, the page is whole and safe, and settings that do not fit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import InputError
from src.common.jsonl import read_jsonl
from src.common.row_hash import choose_rows, is_chosen
from src.embedding.reducing import clusters_of, load_points, reduce, trust
from src.embedding.shards_reading import open_embeddings
from src.reduce_embeddings import ReduceEmbeddingsConfig, main
from tests.embedding_shards import unit_vectors, write_shards

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1"> <b>&amp;'
CHROMIUM = Path("/usr/bin/chromium")


def groups(n: int, n_groups: int = 3, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, group of each) in well separated groups of unequal sizes."""
    centres = unit_vectors(n_groups, dim, seed=3)
    members = np.minimum(np.arange(n) % (n_groups + 1), n_groups - 1)
    noise = np.random.default_rng(4).normal(size=(n, dim)) * 0.03
    return ((centres[members] + noise) * 2).astype(np.float32), members


def rows_of(members: np.ndarray) -> list[dict]:
    return [
        {
            "id": f"r{i}",
            "text": f"text {i} {HOSTILE}",
            "metadata": {"group": f"g{g}", "length": i / 2, "cluster": "own"},
        }
        for i, g in enumerate(members)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors, members = groups(80)
    return write_shards(tmp_path_factory.mktemp("reduce") / "e", vectors, rows_of(members), [33])


def agree(clusters: list[int | None], members: np.ndarray) -> bool:
    """Whether both part the rows in the same way."""
    pairs = set(zip(clusters, members.tolist(), strict=True))
    return len(pairs) == len(set(clusters)) == len(set(members.tolist()))


@pytest.mark.parametrize("method", ["pca", "tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_neighbours_stay_neighbours_and_the_seed_decides(method: str) -> None:
    vectors, members = groups(60)
    settings = {"seed": 1, "n_neighbors": 8, "min_dist": 0.1, "perplexity": 8.0}
    coordinates, told = reduce(vectors, method, **settings)
    assert coordinates.shape == (60, 2) and np.isfinite(coordinates).all()
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1) + np.eye(60) * 1e9
    assert (members[distances.argmin(axis=1)] == members).mean() > 0.95
    again, _ = reduce(vectors, method, **settings)
    assert np.array_equal(coordinates, again)
    assert trust(vectors, coordinates, 0) > 0.8
    shuffled = np.random.default_rng(0).permutation(coordinates)
    assert trust(vectors, shuffled, 0) < 0.65
    assert (told == {}) == (method == "umap")


def test_principal_components_hold_the_variance_they_say() -> None:
    vectors, _ = groups(60)
    coordinates, told = reduce(vectors, "pca", 0, 15, 0.1, 30.0)
    total = vectors.astype(np.float64).var(axis=0, ddof=1).sum()
    shares = coordinates.var(axis=0, ddof=1) / total
    assert shares == pytest.approx([told["variance_share_1"], told["variance_share_2"]], rel=1e-6)
    assert np.corrcoef(coordinates.T)[0, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_clusters_are_found_and_named_by_size(method: str) -> None:
    vectors, members = groups(80)
    clusters = clusters_of(vectors, method, 3, 5, 0)
    assert agree(clusters, members)
    sizes = [clusters.count(cluster) for cluster in range(3)]
    assert sizes == sorted(sizes, reverse=True)
    assert clusters_of(vectors, "none", 3, 5, 0) == [None] * 80
    with pytest.raises(InputError, match="2 different vectors"):
        clusters_of(np.repeat(vectors[:2], 5, axis=0), "kmeans", 3, 5, 0)


def test_cosine_sees_directions_alone(tmp_path: Path) -> None:
    vectors, members = groups(40)
    longer = vectors * np.random.default_rng(1).uniform(1, 9, size=(40, 1)).astype(np.float32)
    one, other = (
        load_points(open_embeddings(write_shards(tmp_path / name, each, rows_of(members))), None, None, 0, "cosine")
        for name, each in (("one", vectors), ("other", longer))
    )
    assert np.allclose(one.vectors, other.vectors, atol=1e-6)
    assert np.allclose(np.linalg.norm(one.vectors, axis=1), 1, atol=1e-6)


def test_a_sample_is_the_same_rows_whatever_the_shards(tmp_path: Path) -> None:
    vectors, members = groups(50)
    whole = load_points(
        open_embeddings(write_shards(tmp_path / "1", vectors, rows_of(members))), None, 20, 7, "euclidean"
    )
    cut = load_points(
        open_embeddings(write_shards(tmp_path / "2", vectors, rows_of(members), [9, 10])), None, 20, 7, "euclidean"
    )
    assert whole.ids == cut.ids == [f"r{i}" for i in choose_rows(7, 50, 20)]
    assert np.array_equal(whole.vectors, vectors[choose_rows(7, 50, 20)]) and np.array_equal(whole.vectors, cut.vectors)


def test_samples_by_hash_nest_and_are_even() -> None:
    assert set(choose_rows(1, 1000, 50)) < set(choose_rows(1, 1000, 200)) and choose_rows(1, 9, 9) == list(range(9))
    tenth, half = ([i for i in range(20_000) if is_chosen(3, i, share)] for share in (0.1, 0.5))
    assert set(tenth) < set(half) and abs(len(tenth) - 2000) < 200 and abs(len(half) - 10_000) < 400


def test_the_command_writes_rows_a_summary_and_a_page(folder: Path, tmp_path: Path, run_module: Callable) -> None:
    words = ["--embeddings_dir", str(folder), "--method", "pca", "--num_clusters", "3", "--max_points", "30",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = run_module("reduce_embeddings", *words)
    assert done.returncode == 0, done.stderr
    assert "shows 30 of 80 rows" in done.stderr and str(tmp_path / "out" / "report.html") in done.stdout
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "results.jsonl")]
    assert agree([row["cluster"] for row in rows], groups(80)[1]) and rows[5]["metadata"]["length"] == 2.5
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["map"]["rows"] == 80 and sum(summary["clusters"].values()) == 80
    assert summary["map"]["trustworthiness"] > 0.7


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"method": "umap", "n_neighbors": 80}, "--n_neighbors 80"),
        ({"method": "tsne", "perplexity": 80.0}, "--perplexity 80"),
        ({"num_clusters": 81}, "--num_clusters 81"),
        ({"num_rows": 81}, "has 80"),
        ({"num_rows": 3}, "at least 4"),
        ({"color_by": "grup"}, "expected one of: cluster, chunk_index, group, length"),
        ({"results_path": "other"}, "'r0' is not in --results_path"),
    ],
)
def test_settings_that_the_rows_do_not_bear(folder: Path, tmp_path: Path, settings: dict, told: str) -> None:
    if "results_path" in settings:
        settings["results_path"] = tmp_path / "results.jsonl"
        settings["results_path"].write_text('{"id": "r1"}\n')
    with pytest.raises(InputError, match=told):
        main(ReduceEmbeddingsConfig(embeddings_dir=folder, output_dir=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_euclidean_distances_of_codes_are_refused(tmp_path: Path) -> None:
    vectors, members = groups(20)
    codes = open_embeddings(write_shards(tmp_path / "e", vectors * 40, rows_of(members), precision="int8"))
    with pytest.raises(InputError, match="--metric cosine"):
        load_points(codes, None, None, 0, "euclidean")


@pytest.fixture
def browser_page(folder: Path, tmp_path: Path) -> Iterator:
    """The page of a map in a real browser, with the errors that it had."""
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    main(ReduceEmbeddingsConfig(embeddings_dir=folder, method="pca", num_clusters=3, output_dir=tmp_path / "out"))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto((tmp_path / "out" / "report.html").as_uri())
        page.wait_for_function("document.querySelector('.plot').data?.length")
        yield page
        browser.close()


def test_the_page_colours_filters_and_stays_safe(browser_page) -> None:
    page = browser_page

    def drawn() -> dict[str, int]:
        return page.evaluate(
            "Object.fromEntries(document.querySelector('.plot').data.map((t) => [t.name, t.x.length]))"
        )

    assert page.errors == [] and "taken" not in page.title() and page.locator("img").count() == 0
    assert sorted(drawn().values(), reverse=True) == [40, 20, 20] and set(drawn()) == {"0", "1", "2"}
    page.select_option("[name=color]", "group")
    assert drawn() == {"g0": 20, "g1": 20, "g2": 40}
    colours = page.evaluate("document.querySelector('.plot').data.map((t) => t.marker.color)")
    assert len(set(colours)) == 3
    page.select_option("[name=column]", "group")
    page.select_option("[name=value]", "=g1")
    assert drawn() == {"g1": 20} and page.inner_text(".scatter .count") == "20 of 80"
    page.select_option("[name=column]", "")
    page.fill(".scatter input", "R1 g2")
    ids = {f"r{i}" for i, g in enumerate(groups(80)[1]) if g == 2 and f"r{i}".startswith("r1")}
    assert drawn() == {"g2": len(ids)}
    page.fill(".scatter input", "")
    # More values than colours: a scale.
    page.select_option("[name=color]", "length")
    assert page.evaluate("document.querySelector('.plot').data[0].marker.showscale") and drawn() == {"length": 80}
    page.evaluate("Plotly.Fx.hover(document.querySelector('.plot'), [{curveNumber: 0, pointNumber: 7}])")
    page.wait_for_selector(".hoverlayer text")
    hover = page.text_content(".hoverlayer")
    assert "group: g2" in hover and "</script>" in hover and "&amp;" in hover
    assert page.locator("img").count() == 0 and page.errors == []
