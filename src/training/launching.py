"""What a launcher that has started several processes of one training, perhaps on several machines, says to each."""

import os
from dataclasses import dataclass

from src.common.errors import InputError

COUNT = "WORLD_SIZE"
NUMBERS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
ADDRESS = "MASTER_ADDR"


@dataclass(frozen=True)
class Place:
    """Which of a launcher's processes this is."""

    rank: int
    size: int
    local_rank: int
    """Among those of this machine."""
    local_size: int
    meeting: str
    """Where all find one another, as a URL."""


def from_launcher(num_processes: int) -> Place | None:
    """
    The variables of torchrun, which hpc/rank.sh sets too, or None where there is one process. They are taken out of
    the environment: accelerate would take them for its own, and share each batch a second time.

    Raises InputError where the launcher has started another number than --num_processes, or does not say enough.
    """
    count = os.environ.get(COUNT, "1")
    if count in ("", "1"):
        return None
    if count != str(num_processes):
        raise InputError(
            f"--num_processes {num_processes}: {COUNT} is {count}, so a launcher such as torchrun has started this "
            f"command so many times; give --num_processes {count}, or start it once"
        )
    lacking = [name for name in NUMBERS if not os.environ.get(name, "").isdecimal()]
    if lacking or not os.environ.get(ADDRESS):
        raise InputError(
            f"{COUNT} is {count}, but {', '.join(lacking or [ADDRESS])} is not set as torchrun sets it; start the "
            f"command by torchrun, or by srun and hpc/rank.sh"
        )
    rank, local_rank, local_size, port = (int(os.environ.pop(name)) for name in NUMBERS)
    del os.environ[COUNT]
    return Place(rank, num_processes, local_rank, local_size, f"tcp://{os.environ.pop(ADDRESS)}:{port}")
