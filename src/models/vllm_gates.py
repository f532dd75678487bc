"""What the conditions of a vLLM worker's requests read, until it is fetched: one projection a position."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Values:
    next_position: int = 0
    """What is computed again after a preemption is not kept twice."""
    pieces: list[Tensor] = field(default_factory=list)


class GateStore:
    """Projections by request and by the number of the condition within its spec."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, _Values]] = {}

    def add(self, request_id: str, number: int, position: int, p: Tensor) -> None:
        """p float32 (n,): what was read from `position` on. Raises RuntimeError when positions before it lack."""
        values = self._values.setdefault(request_id, {}).setdefault(number, _Values())
        if position > values.next_position:
            raise RuntimeError(f"a condition of {request_id} lacks positions {values.next_position} to {position}")
        new = p[values.next_position - position :]
        values.next_position += len(new)
        values.pieces.append(new)

    def take(self, request_id: str, n_positions: int) -> dict[int, list[float]]:
        """Number of a condition → its projections at the first `n_positions` positions; and forget the request."""
        found = {}
        for number, values in self._values.pop(request_id, {}).items():
            if values.next_position < n_positions:
                raise RuntimeError(
                    f"a condition of {request_id} was read at {values.next_position} positions; expected {n_positions}"
                )
            found[number] = torch.cat(values.pieces)[:n_positions].tolist()
        return found

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self._values.pop(request_id, None)

    @property
    def request_ids(self) -> list[str]:
        """The requests of which something is kept."""
        return list(self._values)
