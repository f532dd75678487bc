"""Counters for Prometheus: what a server was asked and how it answered."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"


class HttpMetrics:
    """Of the requests. Paths and methods that nobody serves are counted together: their number has no end."""

    def __init__(self, paths: frozenset[str]) -> None:
        self.registry = CollectorRegistry()
        self._paths = paths
        self._requests = Counter(
            "tiller_requests", "Requests answered; status 0 is a client that had gone.", ("path", "method", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "tiller_request_seconds", "Seconds from a request's headers to the end of its answer.", ("path",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge("tiller_requests_in_flight", "Requests without an answer.", registry=self.registry)

    def note(self, path: str, method: str, status: int, seconds: float) -> None:
        """Counts one request."""
        path = path if path in self._paths else OTHER
        self._requests.labels(path, method if method in METHODS else OTHER, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Everything in the registry, in Prometheus' text format."""
        return generate_latest(self.registry)
