"""What tests have several processes do; apart from them, so that a process imports little."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from src.training.group import Group
from src.training.processes import together


def add_up(group: Group, folder: Path) -> None:
    """Everything that a group does, on numbers that differ between its processes."""
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1, 3))]
    if group.rank == 0:
        weights[0].grad = torch.tensor([1.0, 2.0])
    weights[1].grad = torch.full((1, 3), float(group.rank + 1))
    group.add_gradients(weights)
    learned = torch.tensor([float(group.rank)])
    group.take_first([learned])
    group.seed(3, 4)
    found = [
        [weight.grad.tolist() for weight in weights],
        learned.tolist(),
        group.sums(1.5 * group.rank, 1.0),
        [group.any(group.rank == 1), group.any(False), group.most(group.rank)],
        group.share(5),
        torch.rand(1).item(),
    ]
    (folder / str(group.rank)).write_text(json.dumps(found))


def main(folder: Path) -> None:
    with together(2, False, partial(add_up, folder=folder)) as group:
        add_up(group, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
