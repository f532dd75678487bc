"""A real embedding server in a thread of this process, with what tests look at."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from src.embedding.embedder import load_embedder
from src.serve import EmbeddingServer
from src.serving.embedding_app import PATHS, EmbeddingApp
from src.serving.embedding_metrics import EmbeddingMetrics
from src.serving.embedding_worker import EmbeddingWorker
from src.serving.server import address_of, listen, make_server
from tests.tiny_embedder import WORDS

NAME = "tiny"


@dataclass
class Served:
    """A running server."""

    url: str
    embedder: Any
    worker: EmbeddingWorker
    http: httpx.Client

    def embed(self, texts: list[str], **fields: Any) -> httpx.Response:
        return self.http.post("/embed_text", json={"texts": texts, **fields})

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        lines = self.http.get("/metrics").text.split("\n")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


@contextmanager
def served(model: Path | str, embedder: Any = None, **settings: Any) -> Iterator[Served]:
    """embedder: one that is loaded already, in place of the model's."""
    config = EmbeddingServer(model_id=str(model), **{"port": 0, "model_name": NAME, "dtype": "float32", **settings})
    embedder = embedder or load_embedder(config)
    metrics, listener = EmbeddingMetrics(PATHS), listen(config)
    headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    with EmbeddingWorker(embedder, config.max_waiting, config.window_ms / 1000, metrics) as worker:
        server = make_server(EmbeddingApp(embedder, worker, metrics, config, NAME).app(), config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = address_of(listener)
        try:
            with httpx.Client(base_url=url, timeout=60, headers=headers) as http:
                yield Served(url, embedder, worker, http)
        finally:
            server.should_exit = True
            thread.join()


def lives(server: Served) -> bool:
    """Whether it still answers."""
    return server.embed(["river"]).status_code == 200 and server.http.get("/health").status_code == 200


def texts_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) + f" {seed} {n}" for n in range(count)]
