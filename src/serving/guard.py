"""What every request passes before the application: who asks, how much, how fast. Plain ASGI, so that streams pass."""

import asyncio
import hmac
import logging
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from src.serving.errors import ApiError, error_response
from src.serving.metrics import HttpMetrics
from src.serving.settings import LOOPBACK, ServerSettings

LOGGER = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
MEGABYTE = 10**6


class Guard:
    """
    Answers 401 without the key, 403 to a name that a page elsewhere gave this machine, 408 and 413 for what comes too
    slowly or is too much. Counts every request, and names it by `x-request-id` in the answer and in the log.
    """

    def __init__(self, app: App, settings: ServerSettings, metrics: HttpMetrics, open_paths: frozenset[str]) -> None:
        """open_paths: those that need no key."""
        self._app, self._metrics, self._open_paths = app, metrics, open_paths
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._checks_host = settings.api_key is None and settings.host in LOOPBACK
        self._most_bytes = int(settings.max_request_mb * MEGABYTE)
        self._seconds = settings.request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id, status, started = uuid.uuid4().hex, 0, time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                self.refuse(scope)
                await self._app(scope, self._limited(receive), noting)
            except ApiError as error:
                await error_response(error)(scope, receive, noting)
            finally:
                self._metrics.note(scope["path"], scope["method"], status, time.perf_counter() - started)

    def refuse(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not to be read."""
        headers = dict(reversed(scope["headers"]))
        if self._checks_host and b"host" in headers and _hostname(headers[b"host"]) not in LOOPBACK:
            raise ApiError(403, "the Host header names another machine; ask at 127.0.0.1 or localhost")
        if self._key is not None and scope["path"] not in self._open_paths:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                told = {"www-authenticate": "Bearer"}
                raise ApiError(401, "no or a wrong key; send Authorization: Bearer KEY", headers=told)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most_bytes:
            raise self._too_much()

    def _too_much(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._most_bytes} bytes; split it, or see --max_request_mb")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that raises ApiError; after the body it waits for as long as the client stays."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        left, is_whole = self._most_bytes, False

        async def limited() -> Message:
            nonlocal left, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                told = {"connection": "close"}
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", headers=told) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_much()
            is_whole = not message.get("more_body", False)
            return message

        return limited


def _hostname(host: bytes) -> str | None:
    try:
        return urllib.parse.urlsplit(f"//{host.decode('latin-1')}").hostname
    except ValueError:
        return None
