"""The hidden states that a vLLM worker keeps for its requests until they are fetched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from src.models.hooks import Location
from src.models.vllm_hidden import Hidden
from src.models.vllm_means import Means
from src.models.vllm_plan import Kept


@dataclass
class Rows:
    """What is kept at one location for one request."""

    next_position: int
    """Up to here rows are there; what is computed again after a preemption is not kept twice."""
    pieces: list[Tensor] = field(default_factory=list)
    """Each (n, d_model) in the model's dtype."""
    n_positions: int = 0

    def add(self, new: Tensor) -> None:
        self.next_position += len(new)
        self.n_positions += len(new)
        # `new` may be a part of what the whole step computed, which must not stay for it.
        self.pieces.append(new.clone())

    def first(self, n_positions: int) -> Tensor | None:
        """The first `n_positions` rows; None when there are not so many, or too many."""
        extra = self.n_positions - n_positions
        return torch.cat(self.pieces)[:n_positions] if extra in (0, 1) and n_positions else None


class CaptureStore:
    """Rows and means by request and location."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[Location, Rows]] = {}
        self._means = Means()

    def keep(self, place: Location, kept: Sequence[Kept], hidden: Hidden) -> None:
        """Keep the rows of this step that are wanted at a location."""
        self._means.keep(place, kept, hidden)
        asked = [each for each in kept if not each.capture.mean and place in each.capture.places]
        for each, new in zip(asked, _rows_of(asked, hidden), strict=True):
            mine = self._rows.setdefault(each.request_id, {})
            rows = mine.get(place) or mine.setdefault(place, Rows(each.capture.start))
            n_known = rows.next_position - each.position
            if n_known < 0:
                raise RuntimeError(
                    f"a capture of {each.request_id} at {place} lacks positions {rows.next_position} to {each.position}"
                )
            if n_known < len(new):
                rows.add(new[n_known:] if n_known else new)

    def take(self, request_id: str, n_positions: int, mean: bool) -> dict[str, Tensor]:
        """
        What was kept of a request, `<layer>.<hook point>` → (n_positions, d_model) in the model's dtype, or the mean
        (1, d_model) in float32; and forget it. Rows beyond `n_positions`, of a step too many, are cut. Raises
        RuntimeError when there are fewer.
        """
        found = self.look(request_id, n_positions, mean)
        self.drop(request_id)
        return found

    def look(self, request_id: str, n_positions: int, mean: bool) -> dict[str, Tensor]:
        """`take` without forgetting."""
        places = self._means.look(request_id, n_positions) if mean else self._all(request_id, n_positions)
        return {f"{place.layer}.{place.hook_point}": tensor for place, tensor in places.items()}

    def drop(self, request_id: str) -> None:
        """Forget what was kept of a request that nobody waits for."""
        self._rows.pop(request_id, None)
        self._means.drop(request_id)

    @property
    def request_ids(self) -> list[str]:
        """The requests of which something is kept."""
        return [*self._rows, *self._means.request_ids]

    def _all(self, request_id: str, n_positions: int) -> dict[Location, Tensor]:
        found = {}
        for place, rows in self._rows.get(request_id, {}).items():
            tensor = rows.first(n_positions)
            if tensor is None:
                raise RuntimeError(
                    f"a capture of {request_id} at {place} has {rows.n_positions} positions; expected {n_positions}"
                )
            found[place] = tensor
        return found


def _rows_of(asked: Sequence[Kept], hidden: Hidden) -> Sequence[Tensor]:
    """The rows of each, (n, d_model): read all at once where they lie side by side, as when all requests ask."""
    if all(before.end == after.start for before, after in pairwise(asked)) and asked:
        return hidden[asked[0].start : asked[-1].end].split([each.end - each.start for each in asked])
    return [hidden[each.start : each.end] for each in asked]
