"""Clients that hold a connection: slow ones, ones that never end or never read, ones that speak no HTTP."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn.config

from tests.served_embedder import Served, lives, served

H11 = "uvicorn.protocols.http.h11_impl:H11Protocol"


@pytest.fixture(scope="module", params=["auto", "h11"])
def impatient(tiny_embedder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """Half a second for a request; by uvicorn's parser in C, and by the one that is there without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", H11)
        with served(tiny_embedder, request_seconds=0.5, max_request_mb=1) as running:
            yield running


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=30)


def read_all(stream: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    try:
        while part := stream.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


START = b"POST /embed_text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW = {
    "nothing": (b"", 408),
    "half a line": (b"POST /embed", 408),
    "headers without end": (START, 408),
    "a body that does not come": (START + b"Content-Length: 100\r\n\r\n", 408),
    "half a body": (START + b'Content-Length: 100\r\n\r\n{"texts": [', 408),
    "a chunk that does not come": (START + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", 408),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_client_that_stops_in_the_middle(impatient: Served, name: str) -> None:
    sent, status = SLOW[name]
    with connected(impatient) as stream:
        stream.sendall(sent)
        assert read_all(stream).startswith(b"HTTP/1.1 %d " % status)
    assert lives(impatient)


@pytest.mark.parametrize("head", [START, START + b"Content-Length: 1000000\r\n\r\n"])
def test_200_that_send_a_byte_now_and_then_hold_up_nobody(impatient: Served, head: bytes) -> None:
    streams = [connected(impatient) for _ in range(200)]
    for stream in streams:
        stream.sendall(head)
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(0.1):
            for stream in streams:
                try:
                    stream.send(b"x")
                except OSError:
                    continue

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert lives(impatient)
        for stream in streams:
            assert read_all(stream)[:13] in (b"HTTP/1.1 408 ", b"")
    finally:
        ended.set()
        dripping.join()
        for stream in streams:
            stream.close()
    assert lives(impatient)


def test_a_kept_connection_is_not_held_with_half_a_second_request(impatient: Served) -> None:
    with connected(impatient) as stream:
        stream.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in stream.recv(65536)
        # Longer than a request may take: an idle connection is kept, half a request is not.
        time.sleep(1)
        stream.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in stream.recv(65536)
        stream.sendall(b"GET /hea")
        assert read_all(stream).startswith(b"HTTP/1.1 408 ")


MANY_TEXTS = json.dumps({"texts": ["a"] * 2048}).encode()


@contextlib.contextmanager
def unread(server: Served) -> Iterator[socket.socket]:
    """A client that asked for more than a megabyte, which the server has made, and that has a small window for it."""
    before = server.metric("tiller_inputs_total")
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        stream.settimeout(30)
        stream.connect(("127.0.0.1", httpx.URL(server.url).port))
        stream.sendall(START + b"Content-Length: %d\r\n\r\n%b" % (len(MANY_TEXTS), MANY_TEXTS))
        assert wait_for(lambda: server.metric("tiller_inputs_total") == before + 2048)
        yield stream


def wait_for(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def is_held(stream: socket.socket) -> bool:
    """Whether the server, which is in this process, has its end of the connection."""
    found = psutil.Process().net_connections(kind="tcp")
    return any(each.raddr and each.raddr.port == stream.getsockname()[1] for each in found)


def test_a_client_that_never_reads_is_let_go(impatient: Served) -> None:
    with unread(impatient) as stream:
        assert wait_for(lambda: not is_held(stream))
        # It has less than the whole: the server threw the rest away.
        assert len(read_all(stream)) < 1_000_000
    assert lives(impatient)


def test_a_client_that_reads_slowly_gets_everything(impatient: Served) -> None:
    parts, started = [], time.monotonic()
    with unread(impatient) as stream:
        while not (text := b"".join(parts)).endswith(b"]}"):
            parts.append(stream.recv(32_768))
            assert parts[-1], "it was let go"
            time.sleep(0.03)
    assert len(json.loads(text.partition(b"\r\n\r\n")[2])["embeddings"]) == 2048
    # Longer than one who reads nothing may take.
    assert time.monotonic() - started > 1


def test_a_client_that_never_reads_does_not_hold_up_the_stop(tiny_embedder: Path) -> None:
    with contextlib.ExitStack() as after:
        with served(tiny_embedder, request_seconds=0.5, stop_seconds=50) as running:
            after.enter_context(unread(running))
            started = time.monotonic()
        assert time.monotonic() - started < 40


def test_headers_without_end(impatient: Served) -> None:
    with connected(impatient) as stream:
        with contextlib.suppress(OSError):
            stream.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 10**7)
        assert read_all(stream)[:13] in (b"HTTP/1.1 431 ", b"HTTP/1.1 400 ", b"")
    assert lives(impatient)


WRONG_HTTP = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "a length that is none": START + b"Content-Length: many\r\n\r\n",
    "a negative length": START + b"Content-Length: -1\r\n\r\n",
    "a line break in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\n\n b\r\nY\r\n\r\n",
    "a chunk that is none": START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", WRONG_HTTP)
def test_what_is_no_http(impatient: Served, name: str) -> None:
    with connected(impatient) as stream:
        stream.sendall(WRONG_HTTP[name])
        answer = read_all(stream)
    assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 408 ", b"HTTP/1.1 413 ", b"HTTP/1.1 200 "), answer[:100]
    assert lives(impatient)


def test_an_upgrade_is_not_made(impatient: Served) -> None:
    with connected(impatient) as stream:
        stream.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                       b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
        assert b"200 OK" in stream.recv(65536)
    assert lives(impatient)
