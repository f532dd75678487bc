"""An embedding server, from a model to the end of the process."""

import socket

from src.serving.embedding_app import PATHS, EmbeddingApp
from src.serving.embedding_metrics import EmbeddingMetrics
from src.serving.embedding_types import Embedder
from src.serving.embedding_worker import EmbeddingWorker
from src.serving.server import run_server
from src.serving.settings import EmbeddingServerSettings


def serve(embedder: Embedder, settings: EmbeddingServerSettings, name: str, listener: socket.socket) -> None:
    """Serves until a signal comes; then answers what it took. name: what requests call the model."""
    metrics = EmbeddingMetrics(PATHS)
    with EmbeddingWorker(embedder, settings.max_waiting, settings.window_ms / 1000, metrics) as worker:
        run_server(EmbeddingApp(embedder, worker, metrics, settings, name).app(), listener, settings)
