"""A server on loopback that speaks the part of the OpenAI protocol for embeddings, and can be made to fail."""

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

DIM = 8


def vector_of(text: str) -> list[float]:
    """A vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=DIM).astype(np.float32).tolist()


class Seen:
    """What the server was asked, and how it is to answer."""

    def __init__(self, fault_share: float) -> None:
        self.address = ""
        self.fault_share = fault_share
        self.requests: list[int] = []
        self.bytes: list[int] = []
        self.texts: Counter = Counter()
        self.faults = 0
        self.lock = threading.Lock()
        self.draw = random.Random(0)


@contextmanager
def embedding_server(fault_share: float = 0.0) -> Iterator[Seen]:
    """Yields what it sees. Faults: 429 with Retry-After, 500, and connections that end without an answer."""
    seen = Seen(fault_share)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                fault = seen.draw.choice((429, 500, 0)) if seen.draw.random() < seen.fault_share else None
                seen.faults += fault is not None
            if fault == 0:
                self.close_connection = True
            elif fault is not None:
                self.send(fault, {"error": {"message": "busy", "type": "busy"}}, {"Retry-After": "0.01"})
            elif asked["model"] != "tiny":
                self.send(404, {"error": {"message": "no such model", "type": "invalid_request_error"}}, {})
            else:
                self.answer(asked["input"])

        def answer(self, texts: list[str]) -> None:
            with seen.lock:
                seen.requests.append(len(texts))
                seen.bytes.append(sum(len(text.encode()) for text in texts))
                seen.texts.update(texts)
            # In another order than asked: the index says which is which.
            data = [{"object": "embedding", "index": n, "embedding": vector_of(text)} for n, text in enumerate(texts)]
            usage = {"prompt_tokens": sum(len(text.split()) for text in texts), "total_tokens": 0}
            self.send(200, {"object": "list", "data": data[::-1], "model": "tiny", "usage": usage}, {})

        def send(self, code: int, body: dict, headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    seen.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
