"""Which rows of a dataset a sample holds: decided by a hash of seed and row, the same on every machine."""

import hashlib
import heapq

HASHES = 2**64


def row_hash(seed: int, row_index: int) -> int:
    """A number that looks drawn evenly from 0 … 2⁶⁴ − 1, from the seed and the row's index from 0."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row_index}".encode(), digest_size=8).digest())


def is_chosen(seed: int, row_index: int, fraction: float) -> bool:
    """Whether a sample of this fraction holds the row; a larger fraction's sample holds all of a smaller one's."""
    return fraction >= 1 or row_hash(seed, row_index) < fraction * HASHES


def choose_rows(seed: int, n_rows: int, count: int) -> list[int]:
    """The `count` rows of `n_rows` with the smallest hashes, in their own order; memory grows with `count` alone."""
    return sorted(heapq.nsmallest(count, range(n_rows), key=lambda index: (row_hash(seed, index), index)))
