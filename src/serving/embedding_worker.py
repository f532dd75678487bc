"""The one thread that computes: it takes batches off the queue and hands vectors to those who wait."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence

import numpy as np

from src.serving.embedding_metrics import EmbeddingMetrics
from src.serving.embedding_queue import FairQueue, Job, QueueFull, Waiting
from src.serving.embedding_types import Embedder
from src.serving.errors import ApiError

LOGGER = logging.getLogger(__name__)
MOST_RETRY_SECONDS = 60
SMOOTHING = 0.2


class NotFinite(ValueError):
    """A vector with infinite or undefined numbers."""


class EmbeddingWorker:
    """Use it in a `with` block, within which the thread runs; leaving it computes what still waits."""

    def __init__(self, embedder: Embedder, most: int, window: float, metrics: EmbeddingMetrics) -> None:
        """most: inputs that may wait. window: seconds that the first of a batch waits for others."""
        self._embedder, self._window, self._metrics = embedder, window, metrics
        self._queue = FairQueue(most, embedder.facts["tokens_per_batch"])
        self._changed = threading.Condition()
        self._stops = self._ended = False
        self._rate = 0.0
        self._thread = threading.Thread(target=self._run, name="embedding", daemon=True)
        metrics.watch(lambda: len(self._queue), lambda: self._queue.tokens)

    def __enter__(self) -> "EmbeddingWorker":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether inputs are computed."""
        return not self._ended

    def refuse_full(self, count: int, weight: int = 1) -> None:
        """Raises ApiError (429) where so many more inputs have no room."""
        with self._changed:
            if not self._queue.has_room(count, weight):
                raise self._full()

    async def vectors(self, job: Job) -> np.ndarray:
        """
        (n, dim) float32 of the job's inputs, in their order. Raises ApiError: 429 where there is no room, 500 where the
        model fails. When the caller is cancelled, what is not being computed yet is not computed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        job.vectors, job.left = np.empty((len(job.inputs), self._embedder.dim), np.float32), len(job.inputs)

        def finish(error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, job, error)

        job.finish = finish
        with self._changed:
            if not self.is_alive:
                raise ApiError(503, "the thread that embeds has ended; the server's log says why")
            try:
                self._queue.add(job)
            except QueueFull:
                raise self._full() from None
            self._changed.notify()
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                with self._changed:
                    self._queue.remove(job)

    def _full(self) -> ApiError:
        seconds = self._queue.tokens / self._rate if self._rate else 1.0
        told = {"retry-after": str(min(MOST_RETRY_SECONDS, max(1, math.ceil(seconds))))}
        return ApiError(429, f"{len(self._queue)} inputs wait already; ask again later", code="full", headers=told)

    def _run(self) -> None:
        try:
            with self._embedder.computing():
                while batch := self._next():
                    self._compute(batch)
        finally:
            # Nobody is to wait for a thread that has failed.
            with self._changed:
                self._ended = True
                left = {each.job for each in self._queue}
            self._fail(left, RuntimeError("the thread that embeds has ended"))

    def _next(self) -> list[Waiting]:
        """The next batch, once there is one; nothing when the server stops and all is done."""
        with self._changed:
            while True:
                if not self._queue:
                    if self._stops:
                        return []
                    self._changed.wait()
                    continue
                left = self._queue.oldest + self._window - time.monotonic()
                if left <= 0 or self._stops or self._is_filled():
                    return self._queue.take(self._embedder.batch)
                self._changed.wait(left)

    def _is_filled(self) -> bool:
        return self._queue.tokens >= self._embedder.facts["tokens_per_batch"]

    def _compute(self, batch: Sequence[Waiting]) -> None:
        started = time.perf_counter()
        lengths = [each.length for each in batch]
        try:
            inputs = [each.job.inputs[each.position] for each in batch]
            vectors = self._embedder.embed(batch[0].job.kind, inputs)
            assert vectors.shape == (len(batch), self._embedder.dim), vectors.shape
        # Whatever it is, it must reach those who wait, and the next batch may be all right.
        except Exception as error:
            LOGGER.exception("a batch of %d %ss of %d tokens failed", len(batch), batch[0].job.kind, sum(lengths))
            self._fail({each.job for each in batch}, error)
            return
        seconds = time.perf_counter() - started
        self._rate += SMOOTHING * (sum(lengths) / max(seconds, 1e-6) - self._rate)
        computed = self._embedder.computed_tokens(batch[0].job.kind, lengths)
        self._metrics.note_batch(batch[0].job.kind, len(batch), sum(lengths), computed, seconds)
        self._deliver(batch, vectors)

    def _deliver(self, batch: Sequence[Waiting], vectors: np.ndarray) -> None:
        is_finite = np.isfinite(vectors).all(axis=1)
        failed = {each.job for each, is_right in zip(batch, is_finite, strict=True) if not is_right}
        if failed:
            LOGGER.error("%d of %d vectors hold infinite or undefined numbers", (~is_finite).sum(), len(batch))
            self._fail(failed, NotFinite("the model made infinite or undefined numbers"))
        for each, vector in zip(batch, vectors, strict=True):
            job = each.job
            job.vectors[each.position] = vector
            job.left -= 1
            if not job.left and job not in failed:
                job.finish(None)

    def _fail(self, jobs: set[Job], error: Exception) -> None:
        for job in jobs:
            with self._changed:
                self._queue.remove(job)
            job.finish(error)


def _settle(future: asyncio.Future, job: Job, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        why = str(error) if isinstance(error, NotFinite) else f"the model failed ({type(error).__name__})"
        future.set_exception(ApiError(500, f"{why}; the server's log says more"))
    else:
        future.set_result(job.vectors)
