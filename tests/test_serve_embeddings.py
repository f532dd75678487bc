"""src.serve embeddings: what is answered is what the text gets alone, by the library itself; and the client's side."""

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from src.common.errors import InputError
from src.embedding.client import AsyncEmbeddingClient, EmbeddingClient, Hit, at_least, rank, similarity
from tests.served_embedder import NAME, Served, served, texts_of
from tests.tiny_clip import picture, save_tiny_clip


@pytest.fixture(scope="module")
def server(tiny_embedder: Path) -> Iterator[Served]:
    with served(tiny_embedder, tokens_per_batch=256) as running:
        yield running


@pytest.fixture(scope="module")
def library(tiny_embedder: Path):
    """The same model by sentence-transformers itself."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_embedder), device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(save_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")) as running:
        yield running


def test_vectors_are_the_library_s_own_whatever_shares_the_batch(server: Served, library) -> None:
    texts = [*texts_of(1, 120), "x", "漢字 und Umlaute äöü", "🦜" * 20, "tab\tnew\nline\x00nul"]
    answer = server.embed(texts).json()
    wanted = library.encode(texts)
    assert np.abs(np.array(answer["embeddings"]) - wanted).max() < 1e-5
    assert answer["n_tokens"] == [len(library.tokenizer(text)["input_ids"]) for text in texts]
    assert answer["truncated"] == [False] * len(texts) and answer["model"] == NAME


def test_64_clients_at_once_each_get_their_own(server: Served, library) -> None:
    """Skewed lengths, one to five texts a request, both paths: none lost, none mixed up."""
    before = server.metric("tiller_inputs_total")
    jobs = [texts_of(100 + n, 1 + n % 5) for n in range(256)]

    def ask(number: int) -> np.ndarray:
        if number % 2:
            return np.array(http.post("/embed_text", json={"texts": jobs[number]}).json()["embeddings"])
        body = {"model": NAME, "input": jobs[number], "encoding_format": "base64"}
        data = http.post("/v1/embeddings", json=body).json()["data"]
        assert [each["index"] for each in data] == list(range(len(jobs[number])))
        return np.array([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data])

    limits = httpx.Limits(max_connections=64)
    with ThreadPoolExecutor(64) as pool, httpx.Client(base_url=server.url, timeout=300, limits=limits) as http:
        found = list(pool.map(ask, range(len(jobs))))
    wanted = library.encode([text for each in jobs for text in each])
    assert np.abs(np.concatenate(found) - wanted).max() < 1e-5
    assert server.metric("tiller_inputs_total") - before == sum(map(len, jobs))
    # They shared batches, which is what the server is for.
    assert server.metric("tiller_batch_rows_count") < server.metric("tiller_inputs_total") * 0.7


def test_the_official_client(server: Served, library) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    texts = texts_of(2, 3)
    wanted = library.encode(texts)
    by_default = client.embeddings.create(model=NAME, input=texts)
    assert [each.index for each in by_default.data] == [0, 1, 2] and by_default.model == NAME
    counts = sum(len(library.tokenizer(text)["input_ids"]) for text in texts)
    assert (by_default.usage.prompt_tokens, by_default.usage.total_tokens) == (counts, counts)
    for form in ("float", "base64"):
        found = client.embeddings.create(model=NAME, input=texts, encoding_format=form).data
        vectors = [
            np.frombuffer(base64.b64decode(e.embedding), "<f4") if form == "base64" else e.embedding for e in found
        ]
        assert np.abs(np.array(vectors) - wanted).max() < 1e-5
    one = client.embeddings.create(model=NAME, input=texts[0], dimensions=8, user="me").data[0].embedding
    assert np.allclose(one, wanted[0][:8] / np.linalg.norm(wanted[0][:8]), atol=1e-5)
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.embeddings.create(model="text-embedding-3-large", input="a")
    with pytest.raises(openai.BadRequestError, match="not blank"):
        client.embeddings.create(model=NAME, input="")


def test_token_ids_are_taken_as_they_are(server: Served, library) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    texts = texts_of(3, 2)
    ids = [library.tokenizer(text)["input_ids"] for text in texts]
    found = client.embeddings.create(model=NAME, input=ids)
    assert np.abs(np.array([each.embedding for each in found.data]) - library.encode(texts)).max() < 1e-5
    assert found.usage.prompt_tokens == sum(map(len, ids))
    one = client.embeddings.create(model=NAME, input=ids[0]).data
    assert len(one) == 1 and np.allclose(one[0].embedding, found.data[0].embedding, atol=1e-5)
    whole = server.http.post("/v1/embeddings", json={"model": NAME, "input": [float(each) for each in ids[0]]})
    assert np.allclose(whole.json()["data"][0]["embedding"], found.data[0].embedding, atol=1e-5)
    for wrong in ([[]], [-1], [10**9], [10**400], [[1], "a"], [[1], [2.5]], [True], [[1] * 65]):
        body = json.dumps({"model": NAME, "input": wrong})
        answer = server.http.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (wrong, answer.text)


def test_a_text_that_is_too_long_is_refused_or_said_to_be_cut(server: Served, tiny_embedder: Path, library) -> None:
    long = "river " * 100
    refused = server.embed(["a", long])
    assert refused.status_code == 400 and "text 1 has more than the 64 tokens" in refused.text
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    cut = server.embed(["a", long], truncate=True).json()
    assert cut["truncated"] == [False, True] and cut["n_tokens"][1] == 64
    assert np.allclose(cut["embeddings"][1], library.encode(long), atol=1e-5)
    with served(tiny_embedder, truncate=True) as cutting:
        assert cutting.embed([long]).json()["truncated"] == [True]
        assert cutting.embed([long], truncate=False).status_code == 400


def test_a_prompt_goes_before_texts_and_excludes_token_ids(tiny_embedder: Path, library) -> None:
    with served(tiny_embedder, prompt="query: ") as prompted:
        found = prompted.embed(["river stone"]).json()
        assert np.allclose(found["embeddings"][0], library.encode("query: river stone"), atol=1e-5)
        answer = prompted.http.post("/v1/embeddings", json={"model": NAME, "input": [5, 6]})
        assert answer.status_code == 400 and not prompted.http.get("/health").json()["takes"]["token_ids"]


def test_health_and_metrics_say_what_is_served(server: Served) -> None:
    health = server.http.get("/health").json()
    assert (health["status"], health["model"], health["dim"], health["dtype"]) == ("ok", NAME, 32, "float32")
    assert len(health["model_fingerprint"]) == 64 and health["takes"] == {"images": False, "token_ids": True}
    before = {name: server.metric(f"tiller_{name}_total") for name in ("inputs", "tokens", "padded_tokens")}
    n_tokens = sum(server.embed(texts_of(4, 7)).json()["n_tokens"])
    gained = {name: server.metric(f"tiller_{name}_total") - value for name, value in before.items()}
    assert (gained["inputs"], gained["tokens"]) == (7, n_tokens) and gained["padded_tokens"] >= n_tokens
    server.http.get("/" + "x" * 50)
    text = server.http.get("/metrics")
    assert 'path="other"' in text.text and "xxxxx" not in text.text
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert server.metric("tiller_waiting") == 0 == server.metric("tiller_waiting_tokens")


async def test_the_clients(server: Served, clip: Served, library, tmp_path: Path) -> None:

    texts = texts_of(6, 600)
    wanted = library.encode(texts)
    cosines = wanted @ wanted[3]
    path = tmp_path / "a.png"
    path.write_bytes(picture(0))

    def sync() -> list:
        with EmbeddingClient(server.url) as client, EmbeddingClient(clip.url, dimensions=4) as pictures:
            assert client.model is None and client.embed([]).shape == (0, 0)
            return [
                client.embed(texts), client.similarity(texts[:2], texts[:5]), client.rank(texts[3], texts, 4),
                client.filter(texts[3], texts, 0.9), pictures.embed_images([path, picture(1)]), pictures.embed(["a"]),
            ]  # fmt: skip

    async with (
        AsyncEmbeddingClient(server.url + "/v1/") as client,
        AsyncEmbeddingClient(clip.url, dimensions=4) as clips,
    ):
        together = [
            await client.embed(texts), await client.similarity(texts[:2], texts[:5]),
            await client.rank(texts[3], texts, 4), await client.filter(texts[3], texts, 0.9),
            await clips.embed_images([path, picture(1)]), await clips.embed(["a"]),
        ]  # fmt: skip
    for vectors, matrix, ranked, near, images, cut in (await asyncio.to_thread(sync), together):
        assert vectors.dtype == np.float32 and np.abs(vectors - wanted).max() < 1e-5
        assert np.abs(matrix - wanted[:2] @ wanted[:5].T).max() < 1e-5
        assert [hit.index for hit in ranked] == np.argsort(-cosines, kind="stable")[:4].tolist()
        assert ranked[0].index == 3 and abs(ranked[0].cosine - 1) < 1e-5
        assert {hit.index for hit in near} == set(np.flatnonzero(cosines >= 0.9)) and isinstance(near[0], Hit)
        assert images.shape == (2, 4) and cut.shape == (1, 4)
    with pytest.raises(openai.BadRequestError, match="64 tokens"), EmbeddingClient(server.url) as client:
        client.embed(["river " * 100])
    with EmbeddingClient(server.url, truncate=True) as client:
        assert client.embed(["river " * 100]).shape == (1, 32)

    for wrong in (lambda: similarity(np.zeros((1, 3)), np.ones((1, 3))), lambda: rank(np.ones(3), np.zeros((2, 3))),
                  lambda: at_least(np.full(3, np.nan), np.ones((2, 3)), 0.5)):  # fmt: skip
        with pytest.raises(InputError, match="no direction"):
            wrong()
    assert rank(np.ones(3), np.empty((0, 3))) == []
