"""Counters for Prometheus: what was embedded, in how many batches, and what waits."""

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from src.serving.metrics import HttpMetrics

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EmbeddingMetrics(HttpMetrics):
    """Of the requests and of the model."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__(paths)
        registry = self.registry
        self._inputs = Counter("tiller_inputs", "Texts and images embedded.", ("kind",), registry=registry)
        self._tokens = Counter("tiller_tokens", "Tokens embedded.", registry=registry)
        self._padded = Counter("tiller_padded_tokens", "Tokens computed, padding included.", registry=registry)
        self._compute = Counter("tiller_compute_seconds", "Seconds of the model.", registry=registry)
        self._rows = Histogram("tiller_batch_rows", "Inputs of a batch.", buckets=ROWS, registry=registry)
        self.gone = Counter("tiller_gone", "Requests whose client had gone before the answer.", registry=registry)
        self._waiting = Gauge("tiller_waiting", "Inputs that wait.", registry=registry)
        self._waiting_tokens = Gauge("tiller_waiting_tokens", "Tokens that wait.", registry=registry)

    def watch(self, waiting: Callable[[], int], tokens: Callable[[], int]) -> None:
        """What the gauges show when they are asked."""
        self._waiting.set_function(waiting)
        self._waiting_tokens.set_function(tokens)

    def note_batch(self, kind: str, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """Counts one batch."""
        self._inputs.labels(kind).inc(rows)
        self._tokens.inc(tokens)
        self._padded.inc(padded)
        self._compute.inc(seconds)
        self._rows.observe(rows)
