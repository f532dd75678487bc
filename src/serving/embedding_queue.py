"""
What waits to be embedded, in fair order: one input of each client in turn, and within a turn whoever came first. A new
client joins the next turn, so that every turn ends and nobody waits for ever. No threads and no clock of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

POOL_BATCHES = 4
"""Of how many batches' tokens at the head of the queue a batch is chosen: more make less padding, and let who asks for
much at once fill the batches of others."""


@dataclass(eq=False, kw_only=True)
class Job:
    """The inputs of one request."""

    client: str
    kind: str
    inputs: Sequence[np.ndarray]
    lengths: Sequence[int]
    arrived: float
    """Seconds on the clock of whoever uses the queue."""
    weight: int = 1
    """What an input counts in `most`; images are larger than texts."""
    vectors: np.ndarray | None = None
    left: int = 0
    """Inputs without a vector."""
    finish: Callable[[Exception | None], None] | None = None
    """Called once, by the thread that computes: with None when all vectors are there, or with why they are not."""


class Waiting(NamedTuple):
    """One input in the queue, ordered by its turn and, within it, by when it came."""

    turn: int
    number: int
    job: Job
    position: int

    @property
    def length(self) -> int:
        return self.job.lengths[self.position]


class QueueFull(Exception):
    """More would wait than may."""


class FairQueue:
    """Inputs of together a weight of at most `most`."""

    def __init__(self, most: int, tokens_per_batch: int) -> None:
        self._most, self._pool_tokens = most, POOL_BATCHES * tokens_per_batch
        self._waiting: list[Waiting] = []
        self._turn = self._number = 0
        self._last_turns: dict[str, int] = {}
        self._of_client: Counter[str] = Counter()
        self.weight = self.tokens = 0
        """Of what waits."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    @property
    def oldest(self) -> float:
        """When the head of the queue arrived."""
        return self._waiting[0].job.arrived

    def has_room(self, count: int, weight: int = 1) -> bool:
        """Whether so many more inputs may wait."""
        return self.weight + count * weight <= self._most

    def add(self, job: Job) -> None:
        """Raises QueueFull where not all of the job's inputs have room; then none is added."""
        if not self.has_room(len(job.inputs), job.weight):
            raise QueueFull
        first = max(self._turn, self._last_turns.get(job.client, 0)) + 1
        for position in range(len(job.inputs)):
            self._number += 1
            self._waiting.append(Waiting(first + position, self._number, job, position))
        self._last_turns[job.client] = first + len(job.inputs) - 1
        self._of_client[job.client] += len(job.inputs)
        self.weight += len(job.inputs) * job.weight
        self.tokens += sum(job.lengths)
        self._waiting.sort()

    def take(self, choose: Callable[[Sequence[int]], list[int]]) -> list[Waiting]:
        """
        The head of the queue and the inputs that `choose` takes with it (indices, 0 among them) out of those behind it
        that are of its kind. The queue must not be empty.
        """
        head = self._waiting[0]
        self._turn = head.turn
        pool = self._pool(head.job.kind)
        taken = [pool[index] for index in choose([each.length for each in pool])]
        assert head in taken, "the longest-waiting input is in every batch"
        self._drop({id(each) for each in taken})
        return taken

    def _pool(self, kind: str) -> list[Waiting]:
        pool, tokens = [], 0
        for each in self._waiting:
            if tokens >= self._pool_tokens:
                break
            if each.job.kind == kind:
                pool.append(each)
                tokens += each.length
        return pool

    def remove(self, job: Job) -> None:
        """What of the job still waits is forgotten."""
        self._drop({id(each) for each in self._waiting if each.job is job})
        still = [each.turn for each in self._waiting if each.job.client == job.client]
        if still:
            # Turns that were given to what is gone are not held against the client.
            self._last_turns[job.client] = max(still)

    def _drop(self, gone: set[int]) -> None:
        kept = []
        for each in self._waiting:
            if id(each) not in gone:
                kept.append(each)
                continue
            self.weight -= each.job.weight
            self.tokens -= each.length
            self._of_client[each.job.client] -= 1
            if not self._of_client[each.job.client]:
                del self._of_client[each.job.client], self._last_turns[each.job.client]
        self._waiting = kept
