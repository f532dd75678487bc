"""What clients do wrong: an answer of the right status, the server lives, and others are served meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.served_embedder import Served, lives, served

JSON = {"content-type": "application/json"}
KEY = "planted-0123456789"


@pytest.fixture(scope="module")
def server(tiny_embedder: Path) -> Iterator[Served]:
    with served(tiny_embedder, max_request_mb=1) as running:
        yield running


MANY = b",".join([b"-1"] * 90_000)
BODIES = {
    "nothing": b"",
    "no JSON": b"texts=river",
    "half of it": b'{"texts": ["river"',
    "two of them": b'{"texts": ["a"]}{"texts": ["a"]}',
    "a number": b"3",
    "null": b"null",
    "a list": b"[]",
    "another field": b'{"text": "river"}',
    "a field too many": b'{"texts": ["a"], "model": "tiny", "input": "a", "images": ["aaaa"], "temperature": 1}',
    "no UTF-8": b'{"texts": ["\xff\xfe"], "model": "tiny", "input": "\xff\xfe", "images": ["\xff"]}',
    "UTF-16": '{"texts": ["river"]}'.encode("utf-16"),
    "half a pair": b'{"texts": ["\\ud800"], "input": "\\ud800", "images": ["\\ud800"], "model": "tiny"}',
    "deep": b'{"texts": ' + b"[" * 50_000,
    "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "null within": b'{"texts": [null], "input": [null], "images": [null], "model": "tiny"}',
    "numbers": b'{"texts": [1], "input": 1, "images": [1], "model": "tiny"}',
    "blank": b'{"texts": ["  "], "input": "\\n", "images": [""], "model": "tiny"}',
    "none": b'{"texts": [], "input": [], "images": [], "model": "tiny"}',
    "NaN": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "dimensions": NaN}',
    "an infinite number": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "dimensions": 1e999}',
    "no dimensions": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "dimensions": 0}',
    "more dimensions": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "dimensions": 33}',
    "a huge number": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "dimensions": '
    + b"9" * 5000 + b"}",
    "a long name": b'{"texts": ["a"], "input": "a", "images": ["aaaa"], "model": "tiny", "user": "%b"}' % (b"u" * 300),
    "many fields": b"{" + b",".join(b'"f%d": 1' % n for n in range(50_000)) + b"}",
    "many wrong items": b'{"texts": [%b], "input": [%b], "images": [%b], "model": "tiny"}' % ((MANY,) * 3),
    "a field with a long name": b'{"' + b"f" * 100_000 + b'": 1}',
    "an object": b'{"texts": {"0": "a"}, "input": {"0": "a"}, "images": {"0": "a"}, "model": "tiny"}',
}  # fmt: skip
PATHS = ("/embed_text", "/v1/embeddings", "/embed_image")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request(server: Served, path: str, name: str) -> None:
    answer = server.http.post(path, content=BODIES[name], headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) < 2000
    assert set(error) == {"message", "type", "param", "code"}


REQUESTS = [
    ("GET", "/embed_text", {}, 405),
    ("PUT", "/v1/embeddings", {}, 405),
    ("POST", "/health", {}, 405),
    ("DELETE", "/metrics", {}, 405),
    ("GET", "/", {}, 404),
    ("GET", "/embed_text/", {}, 404),
    ("GET", "/../../etc/passwd", {}, 404),
    ("GET", "/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}, 404),
    ("GET", "/%ff%00", {}, 404),
    ("GET", "/" + "x" * 5000, {}, 404),
    ("POST", "/embed_text", {"content-type": "text/plain"}, 415),
    ("POST", "/embed_text", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("POST", "/embed_text", {"content-type": ""}, 415),
    ("GET", "/health", {"host": "evil.example"}, 403),
    ("GET", "/health", {"host": "127.0.0.1.evil.example:8080"}, 403),
    ("GET", "/health", {"host": "[::1"}, 403),
    ("GET", "/health", {"host": "localhost:1"}, 200),
    ("GET", "/health", {"authorization": "Bearer whoever"}, 200),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), REQUESTS)
def test_a_request_that_is_out_of_place(server: Served, method: str, path: str, headers: dict, status: int) -> None:
    answer = server.http.request(
        method, path, headers=headers, content=b'{"texts": ["a"]}' if method != "GET" else None
    )
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["message"]
    assert answer.headers["content-type"] == "application/json" and len(answer.headers["x-request-id"]) == 32


KEYS = [
    ({}, 401),
    ({"authorization": KEY}, 401),
    ({"authorization": "Bearer"}, 401),
    ({"authorization": f"Bearer {KEY}x"}, 401),
    ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
    ({"authorization": f"Basic {KEY}"}, 401),
    ({"authorization": "Bearer \xe9\xff".encode("latin-1")}, 401),
    ({"authorization": f"Bearer {KEY}"}, 200),
    ({"authorization": f"bearer {KEY}", "host": "proxy.example"}, 200),
]


def test_a_wrong_key(tiny_embedder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(tiny_embedder, api_key=KEY) as running, httpx.Client(base_url=running.url) as http:
        for headers, status in KEYS:
            for path in ("/metrics", "/openapi.json", "/v1/models"):
                assert http.get(path, headers=headers).status_code == status, (path, headers)
            answer = http.post("/embed_text", json={"texts": ["a"]}, headers=headers)
            assert answer.status_code == status and KEY not in answer.text
        assert http.get("/metrics").headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
    assert KEY not in caplog.text


@pytest.mark.parametrize("is_chunked", [False, True])
def test_100_megabytes(server: Served, is_chunked: bool) -> None:
    part = b" " * 1_000_000
    content = (part for _ in range(100)) if is_chunked else part * 100
    answer = server.http.post("/embed_text", content=content, headers=JSON)
    assert answer.status_code == 413 and "1000000 bytes" in answer.text
    # The connection is not lost by it.
    assert lives(server)


def test_the_size_that_is_allowed_is(server: Served) -> None:
    body = json.dumps({"texts": ["a"]}).encode()
    assert server.http.post("/embed_text", content=body + b" " * (10**6 - len(body)), headers=JSON).status_code == 200
    assert (
        server.http.post("/embed_text", content=body + b" " * (10**6 - len(body) + 1), headers=JSON).status_code == 413
    )
