"""Batches of at most so many tokens, padding included, out of pieces sorted by their true length."""

import math
from collections.abc import Sequence

import numpy as np

WIDTHS = tuple(range(16, 129, 16)) + tuple(range(160, 513, 32)) + tuple(range(640, 2049, 128))
"""The widths that compiled batches are padded to; longer ones to the next multiple of 1,024."""
MOST_PADDING = 0.9
"""Length of the shortest piece of a batch, as a share of its width, from where on padding costs more than batches."""
BATCHES_COST = 160
"""A piece of a batch may be padded by this part of the batch's tokens whatever its length: on a CPU (1,024) by 6."""
WIDTH_STEP = 4
"""Batches that differ all the time have multiples of so many tokens, padding included: oneDNN makes kernels for every
number of tokens of a batch, 3 ms and 2 MB for a small model, and keeps 1,024 of them."""
ROW_STEP = 16
"""The same of batches without padding, at least; longer ones have steps of a quarter of the power of two below them, so
that 20 sizes reach 1,024, and a model's kernels for them fit into what the server lets oneDNN keep."""


def plan_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """
    lengths: (n,) tokens of each piece. Returns arrays of indices that together hold each index once, the longest pieces
    first, so that what does not fit in memory fails at once. rows × longest length ≤ tokens_per_batch, except that a
    longer piece is a batch of its own; a batch that is filled to a quarter ends before a piece that would be padded by
    more than a tenth. A length has few numbers of rows, whatever the others are (`stepped_rows`). Equal lengths keep
    their order: the same lengths give the same batches.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    falling = lengths[order].astype(np.int64)
    batches, start = [], 0
    while start < len(order):
        width = max(1, int(falling[start]))
        most = max(1, tokens_per_batch // width)
        least = -(-tokens_per_batch // (4 * width))
        similar = int(np.searchsorted(-falling[start:], -MOST_PADDING * width, side="right"))
        rows = stepped_rows(min(most, max(similar, least), len(order) - start), most)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def stepped_rows(rows: int, most: int) -> int:
    """
    The largest of these numbers of rows that is at most `rows`: what fits in a batch (`most`), three quarters of it, a
    half, a quarter, an eighth and so on. Were any number taken, batches would be of ever new sizes, and oneDNN and
    PyTorch each keep 1,024 kernels for theirs: memory grew by 8 MB a shard.
    """
    quarters = [most * count // 4 for count in (4, 3, 2, 1)]
    smaller = [most >> halvings for halvings in range(3, most.bit_length())]
    return next(size for size in quarters + smaller if 0 < size <= rows)


def stepped_width(length: int, rows: int, most: int | None) -> int:
    """
    The least width from this length on with which the rows have a multiple of WIDTH_STEP tokens, but never more than
    `most`, what the model reads (None if unknown).
    """
    step = WIDTH_STEP // math.gcd(rows, WIDTH_STEP)
    wide = -(-length // step) * step
    return wide if most is not None and wide <= most else length


def stepped_tokens(n_tokens: int) -> int:
    """What a row of so many tokens without padding is filled up to, for the same reason."""
    step = max(ROW_STEP, 1 << max(0, (n_tokens - 1).bit_length() - 3))
    return -(-n_tokens // step) * step


def batch_without_padding(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """
    lengths: tokens of the pieces that wait, not empty. Returns the indices of one batch: the first piece, and of the
    others, in their order, each for which there is still room.
    """
    taken, left = [0], tokens_per_batch - lengths[0]
    for index in range(1, len(lengths)):
        if lengths[index] <= left:
            taken.append(index)
            left -= lengths[index]
    return taken


def compiled_width(length: int) -> int:
    """The width that a compiled batch with this longest piece is padded to."""
    return next((width for width in WIDTHS if width >= length), -(-length // 1024) * 1024)


def plan_compiled_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """As `plan_batches`, with no batch across two widths: each width has one number of rows, its last batch fewer."""
    widths = np.array([compiled_width(int(length)) for length in lengths], dtype=np.int64)
    batches = []
    for width in sorted(set(widths.tolist()), reverse=True):
        of_width, most = np.flatnonzero(widths == width), max(1, tokens_per_batch // width)
        batches += [of_width[first : first + most] for first in range(0, len(of_width), most)]
    return batches


def batch_of_first(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """
    lengths: tokens of the pieces that wait, not empty. Returns the indices of one batch: the first piece, and of the
    others those most like it in length: none is padded by more than a tenth, or than what a batch of its own would
    cost. It grows by the neighbour in length that adds less padding.
    """
    cheap = tokens_per_batch // BATCHES_COST
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [max(1, lengths[index]) for index in order]
    low = high = order.index(0)

    def fits(first: int, last: int) -> bool:
        padding = sizes[last] - sizes[first]
        is_cheap = padding <= cheap or sizes[first] >= MOST_PADDING * sizes[last]
        return is_cheap and sizes[last] * (last - first + 1) <= tokens_per_batch

    while True:
        # (padding that it adds, first, last) of both ways to grow.
        ways = []
        if low > 0 and fits(low - 1, high):
            ways.append((sizes[high] - sizes[low - 1], low - 1, high))
        if high + 1 < len(order) and fits(low, high + 1):
            ways.append(((sizes[high + 1] - sizes[high]) * (high - low + 1), low, high + 1))
        if not ways:
            return order[low : high + 1]
        _, low, high = min(ways)
