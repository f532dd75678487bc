"""What the embedding server's own description promises, by schemathesis: valid requests are taken, others are not."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.served_embedder import NAME, served
from tests.tiny_clip import save_tiny_clip


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory):
    """Of a server of texts and images."""
    with served(save_tiny_clip(tmp_path_factory.mktemp("clip") / "clip"), truncate=True) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
def test_the_server_does_what_its_description_says(case: schemathesis.Case) -> None:
    # A picture in base64 cannot be written as a schema: what is none is refused although it fits.
    excluded = [positive_data_acceptance] if case.path == "/embed_image" else []
    case.call_and_validate(excluded_checks=excluded, timeout=60)


def test_the_description_names_every_path(tiny_embedder: Path) -> None:
    with served(tiny_embedder) as server:
        described = server.http.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1") and {"/embed_text", "/embed_image", "/v1/embeddings"} < set(
        described["paths"]
    )
    assert {"/health", "/metrics", "/v1/models"} < set(described["paths"])
    fields = described["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    assert set(fields) == {"model", "input", "encoding_format", "user", "dimensions", "truncate"}
    assert NAME in described["info"]["title"]
