"""Counters of a chat server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class ChatMetrics:
    """What was generated, and what is being."""

    def __init__(self) -> None:
        self.running = Gauge("tiller_answers_running", "Answers that are made or wait.", registry=None)
        self.tokens = Counter("tiller_generated_tokens", "Tokens of answers.", ("steered",), registry=None)
        self.answers = Counter("tiller_answers", "Answers by how they ended.", ("finish_reason",), registry=None)

    def show_in(self, registry: CollectorRegistry) -> None:
        """From now on they are among what the registry shows."""
        for each in (self.running, self.tokens, self.answers):
            registry.register(each)
