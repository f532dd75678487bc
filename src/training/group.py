"""
The processes of one training. All of them draw the same batches and hold the same adapter; each runs its share of the
rows, and gradients, losses and requests to stop are added up, so that a step is what one process makes of it.
"""

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.common.cli import end_at_once
from src.models.architectures import decoder_layers

LOOPBACK = ("lo", "lo0")


@dataclass(frozen=True)
class Group:
    """The processes of one training, seen from one of them. One process alone adds nothing to anything."""

    rank: int = 0
    size: int = 1
    shards: bool = False
    """Whether the frozen weights are spread over the processes, which then have to run the same number of passes."""

    def share(self, n_rows: int) -> list[int]:
        """The rows of a batch that are this process's."""
        return list(range(self.rank, n_rows, self.size))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one of the processes; all have to ask."""
        return self.sums(float(flag))[0] > 0

    def most(self, number: int) -> int:
        """The largest `number` of all processes; all have to ask."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sums(self, *values: float) -> list[float]:
        """Each value's sum over all processes, float64; all have to ask."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def add_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes its sum over all processes; a process without one has zeros."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for weight, part in zip(weights, flat.split([grad.numel() for grad in grads]), strict=True):
            weight.grad = part.view_as(weight).clone()

    def take_first(self, weights: Iterable[Tensor]) -> None:
        """Every weight becomes the first process's."""
        for weight in weights if self.size > 1 else ():
            dist.broadcast(weight.data, 0)

    def seed(self, *numbers: int) -> None:
        """
        Random numbers of this process's own, the same whenever the same `numbers` are given: a training that goes on
        needs no state of theirs. One process alone keeps torch's, which its checkpoints hold.
        """
        if self.size > 1:
            torch.manual_seed(hash((*numbers, self.rank, self.size)) % 2**63)


def shard(model: nn.Module, device: torch.device) -> None:
    """
    Spread the weights that are not learned over all processes, a decoder layer at a time and the rest as one (FSDP2);
    each layer is gathered for its pass and let go of behind it. What is learned stays whole in each.
    """
    # Seconds, which only this needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    learned = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=learned)
    # The root too: a process that alone writes a checkpoint lets go of what it has gathered, and the others must have.
    fully_shard(model, mesh=mesh, ignored_params=learned, reshard_after_forward=True)
    for weight in learned:
        weight.data = weight.data.to(device)


@contextmanager
def joined(rank: int, size: int, meeting: str, shards: bool, all_here: bool = True) -> Iterator[Group]:
    """
    Within the context this process is one of `size` that meet at `meeting`, the URL of a file or of a port. all_here:
    whether they are all on this machine.
    """
    interface = next((name for _, name in socket.if_nameindex() if name in LOOPBACK), None)
    if interface and all_here:
        # Else it is the one that the machine's name leads to, which need not be reachable, and is open to others.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # It takes every group for one that its own launcher should have made.
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    end_at_once()
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    try:
        yield Group(rank, size, shards)
    finally:
        dist.destroy_process_group()
