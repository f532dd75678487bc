"""
The processes that train together with this one: started here, and ended with it, or started by a launcher (torchrun, or
srun by way of hpc/rank.sh), perhaps on several machines that share the run's folder. The first alone writes.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from src.common.errors import InputError, StopRequested
from src.training.group import Group, joined
from src.training.launching import Place

SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
SECONDS_TO_END = 60.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def together(size: int, shards: bool, work: Callable[[Group], None]) -> Iterator[Group]:
    """
    Within the context this process is the first of `size`, and each of the others does `work`, which must be picklable,
    to its end. Raises RuntimeError where one of them ended before.

    The others do not hear signals: what to do about one the first decides for all. They end with it, also by a kill.
    """
    if size == 1:
        yield Group()
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="tiller-") as folder:
        others = _started(size, shards, work, Path(folder))
        try:
            _await(others, Path(folder))
            torch.set_num_threads(max(1, threads // size))
            with joined(0, size, _meeting(Path(folder)), shards) as group:
                yield group
                for process in others:
                    process.join(SECONDS_TO_END)
        except RuntimeError as error:
            # The lost connection can be noticed before the end that it comes from.
            connection.wait([process.sentinel for process in others], timeout=2)
            _name_lost(others, error)
            raise
        finally:
            torch.set_num_threads(threads)
            for process in others:
                process.kill()
                process.join()


def _started(size: int, shards: bool, work: Callable[[Group], None], folder: Path) -> list[BaseProcess]:
    # Before signals are blocked: it would unblock them.
    resource_tracker.ensure_running()
    # A process is born with the signals blocked that are so here; those that come meanwhile are not lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        context = get_context("spawn")
        others = [
            context.Process(
                target=_other, args=(rank, size, shards, work, folder, torch.get_num_threads()), daemon=True
            )
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return others


def _other(rank: int, size: int, shards: bool, work: Callable[[Group], None], folder: Path, threads: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_device(rank, size)
    torch.set_num_threads(max(1, threads // size))
    (folder / f"ready-{rank}").touch()
    with joined(rank, size, _meeting(folder), shards) as group:
        try:
            work(group)
        except InputError:
            # The first process has found the same, and says it.
            sys.exit(2)


def _meeting(folder: Path) -> str:
    return (folder / "meeting").absolute().as_uri()


def _take_device(rank: int, size: int) -> None:
    """One device each: every library then takes the right one without being told."""
    if VISIBLE in os.environ or torch.cuda.device_count() > 1:
        visible = os.environ.get(VISIBLE, ",".join(map(str, range(size)))).split(",")
        os.environ[VISIBLE] = visible[rank]


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _await(others: list[BaseProcess], folder: Path) -> None:
    waiting = list(enumerate(others, start=1))
    while waiting:
        waiting = [(rank, process) for rank, process in waiting if not (folder / f"ready-{rank}").exists()]
        _name_lost([process for _, process in waiting], None)
        time.sleep(0.02)


def _name_lost(others: list[BaseProcess], error: RuntimeError | None) -> None:
    """Raises RuntimeError where one has ended otherwise than well, which is the reason of `error`."""
    for process in others:
        if process.exitcode:
            raise RuntimeError(
                f"a process of --num_processes ended with exit code {process.exitcode}, of a negative one the signal "
                f"(-9: killed, often for want of memory); the same command goes on from the last checkpoint"
            ) from error


class Launched:
    """All processes that a launcher has started, seen from the first. The others wait to be told what to do."""

    def __init__(self, place: Place, group: Group) -> None:
        self.local_size = place.local_size
        self._group, self._waiting = group, True

    @contextmanager
    def doing(self, work: Callable[[Group], None]) -> Iterator[Group]:
        """Within the context every other process does `work`, which must be picklable, and ends with exit code 0."""
        self.tell(work)
        try:
            yield self._group
        except StopRequested:
            # Agreed with them; the first one's exit code is to be the only one that is not 0.
            self._group.any(True)
            raise
        self._group.any(True)

    def tell(self, work: Callable[[Group], None] | None) -> None:
        """Only the first time; None sends them home."""
        if self._waiting:
            self._waiting = False
            _told(work)


@contextmanager
def leading(place: Place, shards: bool) -> Iterator[Launched]:
    """Within the context this process is the first of all that a launcher has started."""
    with joined(0, place.size, place.meeting, shards, place.local_size == place.size) as group:
        launched = Launched(place, group)
        try:
            yield launched
        finally:
            launched.tell(None)


def take_part(place: Place, shards: bool) -> None:
    """
    What every other process that a launcher has started does: what the first one tells it, to its end. It hears no
    signals: what to do about one the first decides for all.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _take_device(place.local_rank, place.local_size)
    with joined(place.rank, place.size, place.meeting, shards, place.local_size == place.size) as group:
        work = _told(None)
        if work:
            work(group)
            group.any(True)


def _told(work: Callable[[Group], None] | None) -> Callable[[Group], None] | None:
    """In every process what the first one gives. It is pickled: processes of one training trust one another."""
    found = [work]
    dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]
