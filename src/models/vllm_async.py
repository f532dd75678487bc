"""The async form of the vLLM engine: one thread steps it, any number of coroutines wait for their tokens."""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
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


class _Listener:
    """Where the pieces of one stream go."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self.n_tokens = 0
        self._loop = asyncio.get_running_loop()

    def put(self, item: Piece | BaseException) -> None:
        # The loop is gone when its program ended without waiting for the answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class AsyncVLLMEngine:
    """
    Many requests at once, each awaited on its own: `async with AsyncVLLMEngine(engine) as engine`. While it is open the
    engine must not be used otherwise. It does not close the engine.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ended: BaseException | None = RuntimeError("the engine is not open: use it in an `async with` block")
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
        """
        The response piece by piece, the last with the whole of it. Closing the iterator drops the request. Raises what
        `VLLMEngine.generate` does, and RuntimeError when the engine is not open or failed.
        """
        self._engine.check([request], top_k)
        # A name of its own, since the caller may use an id again while the thread still has the first.
        name = f"{request.id}#{next(self._numbers)}"
        listener = _Listener(request)
        with self._lock:
            if self._ended:
                raise RuntimeError(f"the engine takes no requests: {self._ended}") from self._ended
            self._listeners[name] = listener
            self._commands.put(lambda: self._add(name, top_k))
        try:
            while True:
                piece = await listener.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.result:
                    return
        finally:
            if self._listeners.pop(name, None):
                self._commands.put(lambda: self._engine.abort([name]))

    async def __aenter__(self) -> Self:
        self._ended = None
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _add(self, name: str, top_k: int) -> None:
        listener = self._listeners.get(name)
        if listener:
            self._engine.add(replace(listener.request, id=name), top_k)

    def _run(self) -> None:
        reason: BaseException = RuntimeError("it was closed")
        try:
            while self._obey():
                if self._engine.has_work():
                    for output in self._engine.step():
                        self._deliver(output)
        except BaseException as error:
            reason = error
            raise
        finally:
            self._end(reason)

    def _end(self, reason: BaseException) -> None:
        """Whoever waits, or comes later, must hear of the end; the thread's own would be seen by nobody."""
        with self._lock:
            self._ended = reason
            waiting, self._listeners = self._listeners, {}
        for listener in waiting.values():
            listener.put(RuntimeError(f"the engine ended before the answer: {reason}"))
        self._engine.abort(list(waiting))

    def _obey(self) -> bool:
        """Carry out what was asked meanwhile, waiting where there is nothing else to do; False at the end."""
        while not self._commands.empty() or not self._engine.has_work():
            command = self._commands.get()
            if command is None:
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
        except (ValueError, RuntimeError) as error:
            # Of this request alone: logits that are not numbers, or vLLM's own reason for ending it.
            listener.put(error)

    def _piece(self, output: Any, listener: _Listener) -> Piece:
        completion = output.outputs[0]
        result = replace(self._engine.result(output), id=listener.request.id) if output.finished else None
        tokens = result.token_ids if result else tuple(completion.token_ids)
        entropy, mass = (result.entropy, result.top_k_mass) if result else columns(completion)
        start, listener.n_tokens = listener.n_tokens, len(tokens)
        return Piece(tokens[start:], tuple(entropy[start:]), tuple(mass[start:]), result)
