"""Listening and stopping: uvicorn, with limits on slow clients, that answers what it took before it ends."""

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from src.common.errors import InputError
from src.serving.guard import App
from src.serving.settings import ServerSettings

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KEEP_ALIVE_SECONDS = 30
"""Longer than clients keep a connection, so that none is closed just when a client uses it again."""
BACKLOG = 2048
HEADER_BYTES = 65_536
LATE, LARGE = b"408 Request Timeout", b"431 Request Header Fields Too Large"


def listen(settings: ServerSettings) -> socket.socket:
    """
    A socket that listens at the address; who connects is answered when `run_server` runs. Raises InputError where the
    address is taken: call it before anything slow.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        # A server that has just ended leaves its port waiting for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections have it too. Else who asks and never reads holds an answer, and the stop, for ever.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * settings.request_seconds))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        place = f"--host {settings.host} --port {settings.port}"
        raise InputError(f"{place}: {error.strerror or error}; choose another") from error
    listener.set_inheritable(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """As http://127.0.0.1:8080."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: App, settings: ServerSettings) -> uvicorn.Server:
    """A server that is not running yet; `should_exit = True` stops it from any thread."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", ws="none", proxy_headers=False, server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=math.ceil(settings.stop_seconds),
    )  # fmt: skip
    config.load()
    config.http_protocol_class = _timed(config.http_protocol_class, settings.request_seconds)
    return _Server(config)


def run_server(app: App, listener: socket.socket, settings: ServerSettings) -> None:
    """
    Serves until SIGTERM, SIGUSR1 or Ctrl-C; then takes nothing new, answers what it took, and returns with those
    signals ignored, for a scheduler may send them twice. Raises KeyboardInterrupt after Ctrl-C.
    """
    server = make_server(app, settings)
    print(f"serving at {address_of(listener)}", flush=True)
    server.run(sockets=[listener])
    if server.was_interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """uvicorn raises its signals again when it has stopped, which would make of a stop that went well an error."""

    was_interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main:
            for number in SIGNALS:
                signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            if is_main:
                self.was_interrupted = signal.SIGINT in self._captured_signals
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)


def _timed(base: type[asyncio.Protocol], seconds: float) -> type[asyncio.Protocol]:
    """
    The protocol, which itself waits without end for a request's headers and takes any number of them; here a connection
    that has no request under way must bring the headers of one within the seconds, counted from its first byte.
    """

    class Timed(base):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None
        _n_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look(0)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look(len(data))

        def connection_lost(self, error: Exception | None) -> None:
            self._rest()
            super().connection_lost(error)

        def _waits(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _look(self, n_bytes: int) -> None:
            if not self._waits():
                return self._rest()
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self._refuse, LATE)
            # What still comes of a body that was refused is no header.
            if self.cycle is None or not self.cycle.more_body:
                self._n_bytes += n_bytes
            if self._n_bytes > HEADER_BYTES:
                self._refuse(LARGE)

        def _rest(self) -> None:
            self._n_bytes = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: bytes) -> None:
            self._rest()
            if self._waits() and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
                self.transport.close()

    return Timed
