"""Answers piece by piece: from the one thread that makes them to any number of coroutines that wait for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, Self

from src.models.engine import Engine
from src.models.types import GenerationRequest, GenerationResult


@dataclass(frozen=True)
class Piece:
    """What one step added to a response; the end-of-sequence token is left out."""

    token_ids: tuple[int, ...]
    entropy: tuple[float, ...]
    """Nats, one a token."""
    top_k_mass: tuple[float, ...]
    result: GenerationResult | None
    """The whole response, with the last piece only."""

    @property
    def finish_reason(self) -> str | None:
        return self.result.finish_reason if self.result else None


class AsyncEngine(Protocol):
    """Many requests at once, each awaited on its own: `AsyncVLLMEngine`, and `AsyncLanguageModel` on transformers."""

    ended: BaseException | None
    """Why it takes no requests; None while it does."""

    def stream(self, request: GenerationRequest, top_k: int = ...) -> AsyncIterator[Piece]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...


class Listener:
    """Where the pieces of one stream go. Made in the coroutine that reads them."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.n_tokens = 0
        """How many tokens were passed on."""
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, item: Piece | BaseException) -> None:
        """Pass on a piece, or the error that ended the answer; from any thread."""
        # The loop is gone when its program ended without waiting for the answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)

    async def read(self) -> AsyncIterator[Piece]:
        """The pieces up to the last. Raises the error that was put."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.result:
                return


async def whole(pieces: AsyncIterator[Piece]) -> GenerationResult:
    """The response that a stream ends with."""
    result = None
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            result = piece.result
    assert result is not None, "a stream ended without its result"
    return result


def async_form(engine: Engine, batch_size: int) -> AsyncEngine:
    """What steps the engine for many coroutines. batch_size: rows decoded at once on transformers; vLLM has its own."""
    from src.models.language_model import LanguageModel

    if isinstance(engine, LanguageModel):
        from src.models.hf_async import AsyncLanguageModel

        return AsyncLanguageModel(engine, batch_size)
    from src.models.vllm_async import AsyncVLLMEngine

    return AsyncVLLMEngine(engine)
