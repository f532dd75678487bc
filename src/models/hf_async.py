"""The async form of a model on transformers: one thread decodes together what waits, then what has come meanwhile."""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Self

import torch

from src.common.errors import InputError
from src.models.async_pieces import Listener, Piece, whole
from src.models.cpu_linear import packed_linears
from src.models.engine import fitted, refuse_unsupported
from src.models.generation import Row, needs_equal_lengths
from src.models.language_model import LanguageModel, rows_that_fit
from src.models.streaming import stoppable_steps
from src.models.teacher_forcing import captured
from src.models.types import GenerationRequest, GenerationResult

WINDOW_SECONDS = 0.005
"""How long the first of a batch waits for mates."""


class _Waiting(Listener):
    """A stream, and what its request is called among others."""

    def __init__(self, name: str, request: GenerationRequest, top_k: int) -> None:
        super().__init__(replace(request, id=name))
        self.own_id = request.id
        self.top_k = top_k
        self.is_wanted = True
        """Until it has its last piece or its error, or nobody reads it any more."""


class AsyncLanguageModel:
    """
    Many requests at once, each awaited on its own: `async with AsyncLanguageModel(model) as engine`. While it is open
    the model must not be used otherwise. Requests that wait are decoded together, the longest waiting first; those that
    come meanwhile wait for that batch's end.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 8) -> None:
        """batch_size: rows decoded at once at most; an answer does not depend on it."""
        self._model = model
        self._batch_size = batch_size
        self._equal_lengths = needs_equal_lengths(model.model)
        self._asked: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting: list[_Waiting] = []
        self._decoding: dict[str, _Waiting] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._is_closing = False
        self.ended: BaseException | None = RuntimeError("the model is not open: use it in an `async with` block")
        self._thread = threading.Thread(target=self._run, name="hf-steps", daemon=True)

    async def generate(self, request: GenerationRequest, top_k: int = 5) -> GenerationResult:
        """The whole response. Raises what `stream` does; cancelling drops the request."""
        return await whole(self.stream(request, top_k))

    async def stream(self, request: GenerationRequest, top_k: int = 5) -> AsyncIterator[Piece]:
        """
        The response piece by piece, the last with the whole of it. Closing the iterator drops the request. Raises what
        `LanguageModel.generate` does, and RuntimeError when the model is not open or its thread ended.
        """
        self._check(request, top_k)
        # A name of its own, since the caller may use an id again while the thread still has the first.
        request = fitted(request, self._model.context_length)
        listener = _Waiting(f"{request.id}#{next(self._numbers)}", request, top_k)
        with self._lock:
            if self.ended:
                raise RuntimeError(f"the model takes no requests: {self.ended}") from self.ended
            self._asked.put(listener)
        try:
            async for piece in listener.read():
                yield piece
        finally:
            listener.is_wanted = False

    async def __aenter__(self) -> Self:
        self.ended = None
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._is_closing = True
        self._asked.put(None)
        await asyncio.to_thread(self._thread.join)

    def _check(self, request: GenerationRequest, top_k: int) -> None:
        vocabulary = self._model.model.get_input_embeddings().weight.shape[0]
        if not 1 <= top_k <= vocabulary:
            raise InputError(f"top-k mass of {top_k} tokens: expected 1 to the vocabulary's {vocabulary}")
        refuse_unsupported([request], self._model.context_length)
        stray = next((token for token in request.token_ids if not 0 <= token < vocabulary), None)
        if stray is not None:
            raise InputError(f"request {request.id!r}: token {stray} is outside the vocabulary of {vocabulary}")

    def _run(self) -> None:
        reason: BaseException = RuntimeError("it was closed")
        try:
            # No weight changes, so that they are packed once for all answers.
            with torch.inference_mode(), packed_linears(self._model.model):
                while batch := self._next_batch():
                    self._answer(batch)
        except BaseException as error:
            reason = error
            raise
        finally:
            self._end(reason)

    def _next_batch(self) -> list[_Waiting]:
        """Those that are decoded together next; none at the end."""
        while not self._is_closing:
            self._gather()
            self._waiting = [each for each in self._waiting if each.is_wanted]
            if self._waiting and not self._is_closing:
                return self._mates()
        return []

    def _gather(self) -> None:
        """Wait for a request where there is none, then a moment for mates."""
        with contextlib.suppress(queue.Empty):
            while len(self._waiting) < self._batch_size:
                item = self._asked.get(timeout=WINDOW_SECONDS if self._waiting else None)
                if item is None:
                    return
                self._waiting.append(item)

    def _mates(self) -> list[_Waiting]:
        """The longest waiting, and those behind it that go along and that there is memory for; they leave the queue."""
        first = self._waiting[0]
        alike = [each for each in self._waiting if self._go_together(first, each)][: self._batch_size]
        while len(alike) > rows_that_fit(self._model, [each.request for each in alike]):
            alike.pop()
        self._waiting = [each for each in self._waiting if each not in alike]
        return alike

    def _go_together(self, first: _Waiting, other: _Waiting) -> bool:
        lengths = {len(first.request.token_ids), len(other.request.token_ids)}
        return first.top_k == other.top_k and (len(lengths) == 1 or not self._equal_lengths)

    def _answer(self, batch: list[_Waiting]) -> None:
        self._decoding = {each.request.id: each for each in batch}
        try:
            # The interventions of the batch are off the model when it is run once more for what is kept.
            for listener, result in self._decode(batch):
                if listener.is_wanted:
                    self._finish(listener, result)
        except (InputError, RuntimeError) as error:
            # No memory, logits that are not numbers, interventions that did not act: of one of them, as it may be.
            if len(batch) == 1:
                self._refuse(batch[0], error)
            for each in batch if len(batch) > 1 else ():
                if each.is_wanted:
                    self._answer([each])
        if not self._is_closing:
            self._decoding = {}

    def _decode(self, batch: list[_Waiting]) -> list[tuple[_Waiting, GenerationResult]]:
        """Decode a batch; returns the answers of which hidden states are still to be kept."""
        rest = []
        steps = stoppable_steps(
            self._model,
            [each.request for each in batch],
            should_stop=lambda: self._is_closing or not any(each.is_wanted for each in batch),
            is_wanted=lambda name: self._decoding[name].is_wanted,
            top_k=batch[0].top_k,
        )
        with contextlib.closing(steps):
            for taking_part, ended in steps:
                reasons = {row.request.id: reason for row, reason in ended}
                for row in taking_part:
                    listener, reason = self._decoding[row.request.id], reasons.get(row.request.id)
                    result = self._model.result(row, reason) if reason else None
                    if result and listener.request.capture:
                        rest.append((listener, result))
                        result = None
                    self._pass_on(listener, row, result)
        return rest

    def _pass_on(self, listener: _Waiting, row: Row, result: GenerationResult | None) -> None:
        # After a mate's error an answer is made once more, alone; what was passed on then is not passed on again.
        new = slice(listener.n_tokens, None)
        listener.n_tokens = max(listener.n_tokens, len(row.tokens))
        if result is None and not row.tokens[new]:
            return
        named = replace(result, id=listener.own_id) if result else None
        listener.put(Piece(tuple(row.tokens[new]), tuple(row.entropy[new]), tuple(row.top_k_mass[new]), named))
        if result:
            listener.is_wanted = False

    def _finish(self, listener: _Waiting, result: GenerationResult) -> None:
        """The last piece of an answer whose tokens were all passed on: with what is kept of it."""
        try:
            captures = captured(self._model, listener.request, result)
        except (InputError, RuntimeError) as error:
            self._refuse(listener, error)
            return
        listener.put(Piece((), (), (), replace(result, id=listener.own_id, captures=captures)))
        listener.is_wanted = False

    def _refuse(self, listener: _Waiting, error: Exception) -> None:
        if listener.is_wanted:
            listener.is_wanted = False
            listener.put(error)

    def _end(self, reason: BaseException) -> None:
        """Whoever waits, or comes later, must hear of the end; the thread's own would be seen by nobody."""
        with self._lock:
            self.ended = reason
        left = [*self._decoding.values(), *self._waiting]
        while not self._asked.empty():
            left += [item for item in [self._asked.get()] if item]
        for each in left:
            self._refuse(each, RuntimeError(f"the model ended before the answer: {reason}"))
