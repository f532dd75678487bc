"""The chat server's side of HTTP: OpenAI's chat completions and completions, models, directions, the playground."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from src.common.errors import InputError
from src.models.async_pieces import AsyncEngine
from src.models.engine import Engine
from src.models.thinking import ThinkingReader
from src.serving.bodies import read_json
from src.serving.chat_answers import Choice, News, Protocol, merged
from src.serving.chat_bodies import ChatBody, CompletionBody, DirectionsBody
from src.serving.chat_directions import Conflict, DirectionsRegister, Outside, Unknown
from src.serving.chat_metrics import ChatMetrics
from src.serving.chat_openapi import CHAT, COMPLETIONS, DIRECTIONS, MODELS
from src.serving.chat_prompts import Asked, Prompts
from src.serving.errors import ApiError, error_body
from src.serving.gone import unless_gone
from src.serving.settings import ChatServerSettings

PLAYGROUND = Path(__file__).parent / "playground.html"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'"
)
STATUS = ((Outside, 403), (Unknown, 404), (Conflict, 409), (InputError, 400))
SECONDS_TO_RETRY = "1"


class ChatHandlers:
    """What is done for each path."""

    def __init__(
        self, config: ChatServerSettings, name: str, engine: Engine, asynchronous: AsyncEngine,
        register: DirectionsRegister, metrics: ChatMetrics,
    ) -> None:  # fmt: skip
        """name: what requests call the model. engine: the one that `asynchronous` steps; only asked for its facts."""
        self._config, self._name, self._engine, self._async = config, name, engine, asynchronous
        self._register = register
        self._prompts = Prompts(config, engine, register)
        self._reader = ThinkingReader(engine.tokenizer)
        self._metrics = metrics
        self._n_running = 0

    def routes(self) -> list[Route]:
        return [
            Route("/", self.playground),
            Route(CHAT, self.chat, methods=["POST"]),
            Route(COMPLETIONS, self.completions, methods=["POST"]),
            Route(MODELS, self.models),
            Route(f"{MODELS}/{{name:path}}", self.model),
            Route(DIRECTIONS, self.directions, methods=["GET", "POST"]),
        ]

    def health(self) -> dict[str, Any]:
        """Raises ApiError when nothing can be answered any more."""
        if self._async.ended is not None:
            raise ApiError(503, f"the model takes no requests: {self._async.ended}", code="engine_ended")
        return {"status": "ok", "model": self._name, "running": self._n_running}

    async def playground(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return FileResponse(PLAYGROUND, media_type="text/html; charset=utf-8", headers=headers)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._refuse_other(request.path_params["name"])
        return JSONResponse(self._described())

    async def directions(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._added(request)
        return JSONResponse({"object": "list", "data": [each.described() for each in self._register.everything()]})

    async def _added(self, request: Request) -> Response:
        body = await read_json(request, DirectionsBody)
        added = await asyncio.to_thread(_answered, lambda: self._register.register(body.name, body.path))
        return JSONResponse(added.described())

    async def chat(self, request: Request) -> Response:
        body = await read_json(request, ChatBody)
        return await self._answer(request, body, "chatcmpl", lambda name: self._prompts.of_chat(body, name))

    async def completions(self, request: Request) -> Response:
        body = await read_json(request, CompletionBody)
        return await self._answer(request, body, "cmpl", lambda name: self._prompts.of_completion(body, name))

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, prefix: str, prepare: Callable[[str], Asked]
    ) -> Response:
        self._refuse_other(body.model)
        name = f"{prefix}-{uuid.uuid4().hex}"
        asked = await asyncio.to_thread(_answered, lambda: prepare(name))
        protocol = Protocol(name, self._name, asked, uncertainty=body.uncertainty, captures=body.capture is not None)
        choices = [Choice(i, asked, self._engine.decode, self._reader, body.stops) for i in range(len(asked.requests))]
        answer = self._news(asked, choices)
        if not body.stream:
            await unless_gone(request, _to_the_end(answer))
            return JSONResponse(protocol.body(choices))
        # The first piece before the head, so that what cannot be answered has its status.
        first = await unless_gone(request, _first(answer))
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(protocol, choices, first, answer, usage), media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )  # fmt: skip

    async def _news(self, asked: Asked, choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, News]]:
        """(choice, what is new of it) until all are over. Raises ApiError."""
        n, steered = len(choices), "yes" if asked.requests[0].spec else "no"
        if self._n_running + n > self._config.max_requests:
            busy = f"{self._n_running} answers are being made or wait, and {self._config.max_requests} are the most"
            raise ApiError(429, busy, code="overloaded", headers={"Retry-After": SECONDS_TO_RETRY})
        self._count(n)
        pieces = merged(self._async, asked.requests, self._config.top_k_mass_k, lambda i: choices[i].is_over)
        try:
            async with aclosing(pieces):
                async for i, piece in pieces:
                    news = choices[i].add(piece)
                    self._metrics.tokens.labels(steered).inc(len(news.tokens))
                    if choices[i].is_over:
                        self._metrics.answers.labels(choices[i].finish_reason).inc()
                    yield choices[i], news
        except InputError as error:
            raise _refusal(error) from error
        except (RuntimeError, TimeoutError, OSError) as error:
            raise ApiError(500, f"the model could not answer: {error}", code="engine_error") from error
        finally:
            self._count(-n)

    def _count(self, n: int) -> None:
        self._n_running += n
        self._metrics.running.set(self._n_running)

    def _refuse_other(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"the model {name[:200]!r} is not here; it is {self._name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _described(self) -> dict[str, Any]:
        facts = {key: value for key, value in self._engine.facts.items() if value is not None}
        return {
            "id": self._name, "object": "model", "created": 0, "owned_by": "tiller",
            "tiller": {
                **facts, "n_layers": self._engine.n_layers, "context_length": self._engine.context_length,
                "max_tokens": self._config.max_tokens, "top_k_mass_k": self._config.top_k_mass_k,
            },
        }  # fmt: skip


def _answered(make: Callable[[], Any]) -> Any:
    """What `make` returns. Raises ApiError for an InputError."""
    try:
        return make()
    except InputError as error:
        raise _refusal(error) from error


def _refusal(error: InputError) -> ApiError:
    status = next(status for kind, status in STATUS if isinstance(error, kind))
    return ApiError(status, str(error), param=None, code=None)


async def _first(answer: AsyncIterator[tuple[Choice, News]]) -> tuple[Choice, News]:
    try:
        return await anext(answer)
    except BaseException:
        await answer.aclose()
        raise


async def _to_the_end(answer: AsyncIterator[tuple[Choice, News]]) -> None:
    async with aclosing(answer):
        async for _ in answer:
            pass


async def _events(
    protocol: Protocol,
    choices: Sequence[Choice],
    first: tuple[Choice, News],
    answer: AsyncIterator[tuple[Choice, News]],
    usage: bool,
) -> AsyncIterator[bytes]:
    """The chunks of a streamed answer as server-sent events; an error after the first piece is the last."""
    async with aclosing(answer):
        yield _event(protocol.opening(choices))
        try:
            for chunk in _chunks(protocol, *first):
                yield _event(chunk)
            async for news in answer:
                for chunk in _chunks(protocol, *news):
                    yield _event(chunk)
        except ApiError as error:
            yield _event(error_body(error))
            return
        if usage:
            yield _event(protocol.usage_chunk(choices))
        yield b"data: [DONE]\n\n"


def _chunks(protocol: Protocol, choice: Choice, news: News) -> list[dict[str, Any]]:
    chunk = protocol.chunk(choice, news)
    return [*([chunk] if chunk else []), *([protocol.closing(choice)] if choice.is_over else [])]


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()
