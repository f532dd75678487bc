"""The client's side of captures on vLLM: room for them before a request begins, their fetching when it has ended."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.common.capture_spec import Capture
from src.models.shared_segments import BYTES_PER_GB, Budget, discard_segment, open_segment
from src.models.types import GenerationRequest


@dataclass(frozen=True)
class _Running:
    name: str
    """vLLM's own name of the request."""
    capture: Capture
    prompt_length: int
    n_bytes: int


class Captures:
    """What running requests keep in the workers, and the memory that it and what was fetched may take."""

    def __init__(
        self, call: Callable[..., Any], d_model: int, dtype: torch.dtype, *, budget_gb: float, ttl: float
    ) -> None:
        """call: the engine's `collective_rpc`."""
        self._call = call
        self._d_model = d_model
        self._dtype = dtype
        self._running: dict[str, _Running] = {}
        self.budget = Budget(int(budget_gb * BYTES_PER_GB), ttl)

    def n_bytes(self, request: GenerationRequest) -> int:
        """What its capture takes at most."""
        capture = request.capture
        if capture is None:
            return 0
        if capture.mean:
            return len(capture.places) * self._d_model * torch.float32.itemsize
        n_rows = capture.n_positions(len(request.token_ids) + request.max_tokens)
        return len(capture.places) * n_rows * self._d_model * self._dtype.itemsize

    def reserve(
        self, request: GenerationRequest, *, wait: bool = True, cancelled: Callable[[], bool] = lambda: False
    ) -> bool:
        """
        Take room for what a request keeps: False where there is none now and `wait` is not set, or once `cancelled()`.
        Raises InputError when there is never room, TimeoutError when nobody takes what was kept before.
        """
        n = self.n_bytes(request)
        if n <= self.budget.limit_bytes:
            if self.budget.try_reserve(n):
                return True
            if not wait:
                return False
        return self.budget.reserve(n, cancelled)

    def give_back(self, request: GenerationRequest) -> None:
        """Undo `reserve` for a request that does not begin."""
        self.budget.release(self.n_bytes(request))

    def begin(self, request: GenerationRequest, name: str) -> None:
        """A request, for whose capture there is room, was handed to vLLM under a name of its own."""
        assert request.capture is not None, f"{request.id} keeps nothing"
        self._running[request.id] = _Running(name, request.capture, len(request.token_ids), self.n_bytes(request))

    def name(self, request_id: str) -> str:
        """vLLM's own name of a request whose states are in the workers."""
        return self._running[request_id].name

    def fetch(self, request_id: str, n_generated: int) -> dict[str, Tensor]:
        """
        `<layer>.<hook point>` → what was kept of a request that ended after `n_generated` tokens, the one that ended it
        counted. {} for a request that keeps nothing. Raises RuntimeError when a place or a position is missing; then
        nothing of the request is kept any more.
        """
        running = self._running.get(request_id)
        if running is None:
            return {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.drop, [request_id])
            n_positions = running.capture.n_positions(running.prompt_length + n_generated - 1)
            tensors = self._take(running, n_positions) if n_positions else self._nothing(running)
            expected = {f"{layer}.{hook_point}" for layer, hook_point in running.capture.places}
            if tensors.keys() != expected:
                raise RuntimeError(f"captures of {request_id} at {sorted(tensors)}; expected {sorted(expected)}")
            undo.pop_all()
        del self._running[request_id]
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.budget.tie(tensors.values(), n_bytes)
        self.budget.release(running.n_bytes - n_bytes)
        return tensors

    def drop(self, request_ids: Sequence[str]) -> None:
        """Free what was kept of requests that nobody waits for."""
        gone = [self._running.pop(request_id) for request_id in request_ids if request_id in self._running]
        if gone:
            self._call("tiller_drop", args=([each.name for each in gone],))
            self.budget.release(sum(each.n_bytes for each in gone))

    def _take(self, running: _Running, n_positions: int) -> dict[str, Tensor]:
        descriptors = self._call("tiller_take", args=(running.name, n_positions, running.capture.mean))
        waiting = [each for each in descriptors if each]
        tensors: dict[str, Tensor] = {}
        try:
            while waiting:
                tensors |= open_segment(waiting.pop())
        finally:
            for each in waiting:
                discard_segment(each)
        return tensors

    def _nothing(self, running: _Running) -> dict[str, Tensor]:
        self._call("tiller_drop", args=([running.name],))
        empty = torch.empty(0, self._d_model, dtype=self._dtype)
        return {f"{layer}.{hook_point}": empty.clone() for layer, hook_point in running.capture.places}
