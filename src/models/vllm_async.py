"""The async form of the vLLM engine: one thread steps it, any number of coroutines wait for their tokens."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_engine import VLLMEngine, columns


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


@dataclass
class _Listener:
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue
    n_tokens: int = 0

    def put(self, item: Piece | BaseException) -> None:
        # The loop is gone when its program ended without waiting for the answer.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncVLLMEngine:
    """
    Many requests at once, each awaited on its own: `async with AsyncVLLMEngine(engine) as engine`. While it is open the
    engine must not be used otherwise. It does not close the engine.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)

    async def generate(self, request: GenerationRequest, top_k: int = 5) -> GenerationResult:
        """The whole response. Raises what `VLLMEngine.generate` does; cancelling drops the request."""
        result = None
        async with contextlib.aclosing(self.stream(request, top_k)) as pieces:
            async for piece in pieces:
                result = piece.result
        assert result is not None
        return result

    async def stream(self, request: GenerationRequest, top_k: int = 5) -> AsyncIterator[Piece]:
        """The response piece by piece, the last with the whole of it. Closing the iterator drops the request."""
        self._engine.check([request], top_k)
        assert request.id not in self._listeners, f"two requests are called {request.id!r}"
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())
        self._listeners[request.id] = listener
        self._commands.put(lambda: self._engine.add(request, top_k))
        try:
            while True:
                piece = await listener.outputs.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.result:
                    return
        finally:
            if self._listeners.pop(request.id, None):
                self._commands.put(lambda: self._engine.abort([request.id]))

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while self._obey():
                for output in self._engine.step() if self._engine.has_work() else ():
                    self._deliver(output)
        except BaseException as error:
            # Whoever waits must hear of it; the thread's own end would be seen by nobody.
            for listener in list(self._listeners.values()):
                listener.put(error)
            raise

    def _obey(self) -> bool:
        """Carry out what was asked meanwhile, waiting where there is nothing else to do; False at the end."""
        while not self._commands.empty() or not self._engine.has_work():
            command = self._commands.get()
            if command is None:
                self._engine.abort(list(self._listeners))
                return False
            command()
        return True

    def _deliver(self, output: Any) -> None:
        listener = self._listeners.get(output.request_id)
        if listener is None:
            return
        if output.finished:
            self._listeners.pop(output.request_id, None)
        try:
            listener.put(self._piece(output, listener))
        except ValueError as error:
            listener.put(error)

    def _piece(self, output: Any, listener: _Listener) -> Piece:
        completion = output.outputs[0]
        result = self._engine.result(output) if output.finished else None
        tokens = result.token_ids if result else tuple(completion.token_ids)
        entropy, mass = (result.entropy, result.top_k_mass) if result else columns(completion)
        start, listener.n_tokens = listener.n_tokens, len(tokens)
        return Piece(tokens[start:], tuple(entropy[start:]), tuple(mass[start:]), result)
