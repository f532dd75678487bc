"""The async form of the vLLM engine: one thread steps it, any number of coroutines wait for their tokens."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Self

from src.models.async_pieces import Listener, Piece, whole
from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_engine import VLLMEngine
from src.models.vllm_outputs import columns


class AsyncVLLMEngine:
    """
    Many requests at once, each awaited on its own: `async with AsyncVLLMEngine(engine) as engine`. While it is open the
    engine must not be used otherwise. It does not close the engine.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.ended: BaseException | None = RuntimeError("the engine is not open: use it in an `async with` block")
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)

    async def generate(self, request: GenerationRequest, top_k: int = 5) -> GenerationResult:
        """The whole response. Raises what `VLLMEngine.generate` does; cancelling drops the request."""
        return await whole(self.stream(request, top_k))

    async def stream(self, request: GenerationRequest, top_k: int = 5) -> AsyncIterator[Piece]:
        """
        The response piece by piece, the last with the whole of it. Closing the iterator drops the request. Raises what
        `VLLMEngine.generate` does, and RuntimeError when the engine is not open or failed.
        """
        self._engine.check([request], top_k)
        # A name of its own, since the caller may use an id again while the thread still has the first.
        name = f"{request.id}#{next(self._numbers)}"
        listener = Listener(request)
        await self._reserve(request)
        with self._lock:
            if self.ended:
                self._engine.give_back(request)
                raise RuntimeError(f"the engine takes no requests: {self.ended}") from self.ended
            self._listeners[name] = listener
            self._commands.put(lambda: self._add(name, request, top_k))
        try:
            async for piece in listener.read():
                yield piece
        finally:
            if self._listeners.pop(name, None):
                self._commands.put(lambda: self._engine.abort([name]))

    async def __aenter__(self) -> Self:
        self.ended = None
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _reserve(self, request: GenerationRequest) -> None:
        """Wait, in a thread of its own, for room for what a request keeps."""
        if request.capture is None or self._engine.reserve(request, wait=False):
            return
        gone = threading.Event()
        waiting = asyncio.ensure_future(
            asyncio.to_thread(self._engine.reserve, request, cancelled=lambda: gone.is_set() or bool(self.ended))
        )
        try:
            if not await asyncio.shield(waiting):
                raise RuntimeError(f"the engine takes no requests: {self.ended}") from self.ended
        except asyncio.CancelledError:
            gone.set()
            # Not awaited here, where a second cancelling would lose what it gives.
            waiting.add_done_callback(lambda done: self._unwanted(done, request))
            raise

    def _unwanted(self, done: asyncio.Future[bool], request: GenerationRequest) -> None:
        if not done.cancelled() and not done.exception() and done.result():
            self._engine.give_back(request)

    def _add(self, name: str, request: GenerationRequest, top_k: int) -> None:
        if name not in self._listeners:
            self._engine.give_back(request)
            return
        try:
            self._engine.add(replace(request, id=name), top_k)
        except (ValueError, RuntimeError) as error:
            # Of this request alone: no room in a compiled engine's tables, or vLLM's own refusal.
            self._refuse(name, error)

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
            self.ended = reason
            waiting, self._listeners = self._listeners, {}
        for listener in waiting.values():
            listener.put(RuntimeError(f"the engine ended before the answer: {reason}"))
        # What was asked after the end was: rooms are to be given back.
        while not self._commands.empty():
            command = self._commands.get()
            if command:
                command()
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
        try:
            piece = self._piece(output, listener)
        except (ValueError, RuntimeError, OSError) as error:
            # Of this request alone: logits that are not numbers, vLLM's own reason for ending it, full shared memory.
            self._refuse(output.request_id, error)
            return
        if output.finished:
            self._listeners.pop(output.request_id, None)
        listener.put(piece)

    def _refuse(self, name: str, error: Exception) -> None:
        """One request is over with an error, and nothing of it is to stay."""
        listener = self._listeners.pop(name, None)
        self._engine.abort([name])
        if listener:
            listener.put(error)

    def _piece(self, output: Any, listener: Listener) -> Piece:
        completion = output.outputs[0]
        result = replace(self._engine.result(output), id=listener.request.id) if output.finished else None
        tokens = result.token_ids if result else tuple(completion.token_ids)
        entropy, mass = (result.entropy, result.top_k_mass) if result else columns(completion)
        start, listener.n_tokens = listener.n_tokens, len(tokens)
        return Piece(tokens[start:], tuple(entropy[start:]), tuple(mass[start:]), result)
