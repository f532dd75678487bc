"""src.serve embeddings under load and at its end: who has gone, who asks for much, what fails, and SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from src.common.errors import InputError
from src.embedding.embedder import TextEmbedder, load_embedder
from src.serve import EmbeddingServer
from tests.conftest import ROOT, module_command
from tests.served_embedder import served, texts_of
from tests.tiny_embedder import WORDS


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


class Gated(TextEmbedder):
    """The real embedder, which waits at a gate and notes what it is given."""

    def __init__(self, embedder: TextEmbedder) -> None:
        vars(self).update(vars(embedder))
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.seen: list[list[tuple[int, ...]]] = []
        self.error: Exception | None = None

    def embed(self, kind: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        self.seen.append([tuple(each.tolist()) for each in inputs])
        self.entered.release()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return super().embed(kind, inputs)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.pieces_of([text])[0].token_ids.tolist())

    def has_seen(self, text: str) -> bool:
        return any(self.tokens(text) in batch for batch in self.seen)


@pytest.fixture
def gated(tiny_embedder: Path) -> Gated:
    config = EmbeddingServer(model_id=str(tiny_embedder), dtype="float32", tokens_per_batch=64)
    return Gated(load_embedder(config))


def posted(url: str, texts: list[str], pool: ThreadPoolExecutor, **fields):
    body = {"texts": texts, **fields}
    return pool.submit(lambda: httpx.post(f"{url}/embed_text", json=body, timeout=60))


def test_who_has_gone_is_not_computed(tiny_embedder: Path, gated: Gated) -> None:
    with served(tiny_embedder, gated) as running, ThreadPoolExecutor() as pool:
        first = posted(running.url, ["river"], pool)
        assert gated.entered.acquire(timeout=60)
        body = json.dumps({"texts": ["stone gone", "quiet gone"]}).encode()
        with socket.create_connection(("127.0.0.1", httpx.URL(running.url).port)) as leaver:
            leaver.sendall(b"POST /embed_text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
            wait_for(lambda: running.metric("tiller_waiting") == 2)
        wait_for(lambda: running.metric("tiller_waiting") == 0)
        last = posted(running.url, ["lantern"], pool)
        wait_for(lambda: running.metric("tiller_waiting") == 1)
        gated.gate.set()
        assert [first.result().status_code, last.result().status_code] == [200, 200]
        assert gated.has_seen("lantern") and not gated.has_seen("stone gone") and not gated.has_seen("quiet gone")
        assert running.metric("tiller_gone_total") == 1 and running.metric("tiller_inputs_total") == 2


def test_a_full_queue_answers_429_and_keeps_what_it_took(tiny_embedder: Path, gated: Gated) -> None:
    with served(tiny_embedder, gated, max_waiting=4, max_texts=4) as running, ThreadPoolExecutor() as pool:
        taken = [posted(running.url, ["river"], pool)]
        assert gated.entered.acquire(timeout=60)
        taken += [posted(running.url, [word], pool) for word in WORDS[:3]]
        wait_for(lambda: running.metric("tiller_waiting") == 3)
        full = running.embed(["one", "two"])
        assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 60
        assert full.json()["error"]["type"] == "rate_limit_error" and "3 inputs wait" in full.text
        taken.append(posted(running.url, ["one"], pool))
        wait_for(lambda: running.metric("tiller_waiting") == 4)
        assert running.embed(["two"]).status_code == 429
        assert running.embed(list("12345")).status_code == 400
        assert running.http.get("/health").status_code == 200
        gated.gate.set()
        assert [each.result().status_code for each in taken] == [200] * 5
        assert running.embed(["two"]).status_code == 200


def test_a_bulk_request_does_not_hold_up_others(tiny_embedder: Path, gated: Gated) -> None:
    with served(tiny_embedder, gated) as running, ThreadPoolExecutor() as pool:
        bulk = posted(running.url, texts_of(5, 200), pool)
        assert gated.entered.acquire(timeout=60)
        small = [posted(running.url, [f"lantern {n}"], pool, user=f"user {n}") for n in range(4)]
        wait_for(lambda: running.metric("tiller_waiting") == 204 - len(gated.seen[0]))
        gated.gate.set()
        assert [each.result().status_code for each in (bulk, *small)] == [200] * 5
        early = {tokens for batch in gated.seen[:8] for tokens in batch}
        assert {gated.tokens(f"lantern {n}") for n in range(4)} <= early and len(gated.seen) > 30


def test_a_model_that_fails_fails_for_its_batch_alone(
    tiny_embedder: Path, gated: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    gated.gate.set()
    with served(tiny_embedder, gated) as running:
        gated.error = RuntimeError("out of memory")
        answer = running.embed(["river", "stone"])
        assert answer.status_code == 500 and "RuntimeError" in answer.text and "out of memory" not in answer.text
        assert "out of memory" in caplog.text and answer.headers["x-request-id"] in caplog.text
        gated.error = None
        assert running.embed(["river"]).status_code == 200


def test_numbers_that_are_none_are_an_error(tiny_embedder: Path, gated: Gated) -> None:
    gated.gate.set()
    with served(tiny_embedder, gated) as running:
        weights = gated._encoder._transformer.model.embeddings.word_embeddings.weight.data
        token = gated.tokens("copper")[1]
        kept = weights[token].clone()
        weights[token] = float("nan")
        assert "infinite or undefined" in running.embed(["copper"]).text
        weights[token] = kept
        assert running.embed(["copper"]).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_is_told_to_everybody(tiny_embedder: Path, gated: Gated) -> None:
    gated.gate.set()
    with served(tiny_embedder, gated) as running:
        gated.batch = lambda lengths: [1 / 0]
        assert running.embed(["river"]).status_code == 500
        assert running.http.get("/health").status_code == 503
        assert running.embed(["river"]).status_code == 503


def test_settings_that_do_not_do(tiny_embedder: Path) -> None:
    for wrong, said in [
        ({"port": 70000}, "0 to 65535"), ({"host": "0.0.0.0"}, "add --api_key"), ({"api_key": "short"}, "8 or more"),
        ({"api_key": "with blanks in it"}, "without blanks"), ({"window_ms": float("nan")}, "window_ms"),
        ({"max_texts": 9, "max_waiting": 8}, "1 to --max_waiting"), ({"prompt": "a", "prompt_name": "b"}, "exclude"),
        ({"max_request_mb": 0}, "positive"), ({"tokens_per_batch": 0}, "at least 1"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            EmbeddingServer(model_id=str(tiny_embedder), **wrong)


# The process


def test_sigterm_answers_what_was_taken_and_frees_the_port(tiny_embedder: Path) -> None:
    command = module_command("serve", ["embeddings", "--model_id", tiny_embedder, "--port", "0", "--dtype", "float32"])
    environment = os.environ | {"TILLER_API_KEY": "planted-0123456789", "TILLER_TRUNCATE": "true"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    line = process.stdout.readline()
    assert line.startswith("serving at http://127.0.0.1:"), (line, process.stderr.read())
    url, headers = line.split()[-1], {"authorization": "Bearer planted-0123456789"}
    again = subprocess.run([*module_command("serve", ["embeddings", "--model_id", tiny_embedder]), "--port",
                            url.rsplit(":")[-1]], cwd=ROOT, text=True, capture_output=True, timeout=300)  # fmt: skip
    assert again.returncode == 2 and "Address already in use" in again.stderr and again.stderr.count("\n") == 1
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=url, headers=headers, timeout=120) as http:
        body = {"texts": ["river stone " * 40] * 1000}
        started = [pool.submit(http.post, "/embed_text", json=body) for _ in range(2)]
        waiting = lambda: float(http.get("/metrics").text.split("\ntiller_waiting ")[1].split("\n")[0])  # noqa: E731
        wait_for(lambda: waiting() > 100)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        # As a scheduler does it.
        process.send_signal(signal.SIGTERM)
        answers = [each.result() for each in started]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all(len(answer.json()["embeddings"]) == 1000 for answer in answers)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "planted" not in output + errors and "Traceback" not in errors
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rsplit(":")[-1])))
