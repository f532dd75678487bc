"""Which rows run together, in which order, and as which tensors."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from src.training.rendering import IGNORED

GROUPED = 50
"""Steps whose rows are sorted by length among themselves: less padding, and still mixed."""
Batch = dict[str, Any]


class EpochSampler(Sampler[int]):
    """
    Every row once an epoch: at random, in the order in which transformers' Trainer has them with the same seed, or with
    `grouped` rows of like length in one step. The order is a function of seed and epoch alone, so that a run that goes
    on in the middle of an epoch goes on with the same rows.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int, grouped: bool) -> None:
        """step_size: rows a step."""
        self.epoch = 0
        self._lengths, self._step_size, self._seed, self._grouped = lengths, step_size, seed, grouped

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        if not self._grouped:
            yield from order
            return
        size = GROUPED * self._step_size
        steps = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=lambda i: -self._lengths[i])
            # The short step, if there is one, comes last: of the shortest rows, as nothing is left to fill it.
            steps += [group[i : i + self._step_size] for i in range(0, len(group), self._step_size)]
        whole = [step for step in steps if len(step) == self._step_size]
        rest = [step for step in steps if len(step) < self._step_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        yield from (i for step in [*shuffled, *rest] for i in step)


def steps_of(n_rows: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps an epoch: the last batch may be short, the last step of fewer batches."""
    return math.ceil(math.ceil(n_rows / batch_size) / accumulation)


def packs(lengths: Sequence[int], size: int) -> list[list[int]]:
    """
    Indices in packs of at most `size` tokens, by best fit, longest first (within 22 % of the fewest possible: Johnson
    1974). The same lengths give the same packs.
    """
    room: list[tuple[int, int]] = []
    """Free tokens of each pack and its index, in order."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[i] <= size, f"{lengths[i]} tokens in packs of {size}"
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            room.append((size, len(found)))
            found.append([])
        free, pack = room.pop(at)
        found[pack].append(i)
        insort(room, (free - lengths[i], pack))
    return found


def packed(rows: Sequence[Batch]) -> Batch:
    """Rows one after another; the positions of each begin at 0, which is how attention tells them apart."""
    return {
        "input_ids": [i for row in rows for i in row["input_ids"]],
        "labels": [i for row in rows for i in row["labels"]],
        "position_ids": [i for row in rows for i in range(len(row["input_ids"]))],
    }


class Collator:
    """
    Rows as tensors, padded on the right: input_ids, labels and attention_mask, all int64 (rows, longest). Packs have
    position_ids in place of a mask, which would hide where their rows begin, and n_tokens, int64 (rows,).
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], longest, self._pad_id),
            "labels": _padded([row["labels"] for row in rows], longest, IGNORED),
        }
        if "position_ids" in rows[0]:
            # Padding is one more sequence of its own.
            positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
            n_tokens = torch.tensor([len(row["input_ids"]) for row in rows])
            return batch | {"position_ids": torch.tensor(positions), "n_tokens": n_tokens}
        mask = [[1] * len(row["input_ids"]) for row in rows]
        return batch | {"attention_mask": _padded(mask, longest, 0)}


def _padded(rows: Sequence[Sequence[int]], longest: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def parts(batch: dict[str, Tensor], n_tokens: int) -> list[dict[str, Tensor]]:
    """
    The rows of a batch in parts of about `n_tokens` tokens with their padding, each cut to its longest row; at least
    one row a part, and none of less than half the longest. The sum of the losses of all parts is the batch's.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        counts = batch["n_tokens"].tolist()
        tables = {name: value for name, value in batch.items() if name != "n_tokens"}
        return [{name: value[i : i + 1, :n] for name, value in tables.items()} for i, n in enumerate(counts)]
    lengths = mask.sum(dim=1).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        longest = lengths[found[-1][0]] if found else 0
        # Padding a row to twice its length costs more than one more pass.
        if found and 2 * lengths[i] >= longest and (len(found[-1]) + 1) * longest <= n_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return [{name: value[rows, : lengths[rows[0]]] for name, value in batch.items()} for rows in found]
