"""
Many tensors from one process to another through shared memory, unpickled: the writer lays them into one file, the
reader maps it and removes its name at once. What is between the two is counted by a `Budget`.
"""

import contextlib
import errno
import functools
import math
import os
import queue
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from src.common.errors import InputError

SHARED_MEMORY = Path("/dev/shm")
NAME_SYNTAX = re.compile(r"tiller-(?P<pid>\d+)-(?P<started>\d+)-\w+", re.ASCII)
ALIGNMENT = 64
SAME_START_SECONDS = 2
POLL_SECONDS = 0.02
BYTES_PER_GB = 1e9

Descriptor = dict[str, Any]
"""What `open_segment` needs, in str, int, list and dict only: name, n_bytes, tensors: key → dtype, shape, offset."""


def write_segment(tensors: Mapping[str, Tensor]) -> Descriptor:
    """
    Copies tensors of any dtype, shape and device, once, into a new file of shared memory, for `open_segment`.
    Raises OSError with the folder, what was needed and what is free when they do not fit. No error leaves a file.
    """
    places, n_bytes = _places(tensors)
    folder = _folder()
    handle, path = tempfile.mkstemp(prefix=_prefix(os.getpid()), dir=folder)
    try:
        _allocate(handle, folder, n_bytes)
        _fill(handle, tensors, places, n_bytes)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(handle)
    return {"name": os.path.basename(path), "n_bytes": n_bytes, "tensors": places}


def open_segment(descriptor: Descriptor) -> dict[str, Tensor]:
    """
    The tensors of a segment, uncopied, by key; its name is gone afterwards, its memory once none of them is left. They
    are on the CPU, share one storage and may be written to.
    Raises ValueError for a name that is not a segment's, FileNotFoundError when it was opened, discarded or swept
    before, RuntimeError when it is not of the size described.
    """
    path, n_bytes = _path(descriptor), descriptor["n_bytes"]
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        path.unlink(missing_ok=True)
        size = os.fstat(handle).st_size
        if size != n_bytes:
            raise RuntimeError(f"{path}: holds {size} bytes; its descriptor says {n_bytes}")
        mapping = _map(handle, n_bytes)
    finally:
        os.close(handle)
    return {key: _view(mapping, place) for key, place in descriptor["tensors"].items()}


def discard_segment(descriptor: Descriptor) -> None:
    """Removes a segment that nobody will open, if it is still there. Raises ValueError as `open_segment`."""
    _path(descriptor).unlink(missing_ok=True)


def sweep_stale_segments() -> int:
    """Removes this user's segments whose writer no longer runs; returns how many."""
    n_removed = 0
    for path in _folder().glob("tiller-*"):
        # Another process may open or sweep it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found = NAME_SYNTAX.fullmatch(path.name)
            if found and path.lstat().st_uid == os.getuid() and not _runs(int(found["pid"]), int(found["started"])):
                path.unlink()
                n_removed += 1
    return n_removed


class Budget:
    """
    Bytes that may be in flight between writer and reader. Thread safe; `release` may be called from anywhere, also by
    the garbage collector in a thread that is inside another of these methods.
    """

    def __init__(self, limit_bytes: int, ttl_seconds: float) -> None:
        assert limit_bytes >= 0 and ttl_seconds > 0, f"limit_bytes {limit_bytes}, ttl_seconds {ttl_seconds}"
        self.limit_bytes = limit_bytes
        self.ttl_seconds = ttl_seconds
        self._in_flight = 0
        self._released_at = time.monotonic()
        # A finaliser can run while its own thread holds the lock. So it only leaves a note here, which SimpleQueue
        # allows at any moment; the count itself changes under the lock alone, which is not re-entrant.
        self._released: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._condition = threading.Condition(threading.Lock())

    @property
    def in_flight(self) -> int:
        """Bytes reserved and not yet released."""
        with self._condition:
            self._settle()
            return self._in_flight

    def reserve(self, n: int, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """
        Waits until n bytes fit and takes them: True; or, once `cancelled()`, takes none: False.
        Raises InputError at once when n is more than the limit, TimeoutError after ttl_seconds without any release.
        """
        if n > self.limit_bytes:
            raise InputError(
                f"--capture_budget_gb: one request keeps {n / BYTES_PER_GB:.3g} GB of hidden states, the budget is "
                f"{self.limit_bytes / BYTES_PER_GB:.3g} GB; raise it to {math.ceil(n / BYTES_PER_GB * 100) / 100} or "
                f"more, or capture fewer layers or positions"
            )
        began = time.monotonic()
        while not cancelled():
            if self.try_reserve(n):
                return True
            self._wait_for_release(began, n)
        return False

    def try_reserve(self, n: int) -> bool:
        """Takes n bytes if they fit now."""
        assert n >= 0, f"{n} bytes to reserve"
        with self._condition:
            self._settle()
            fits = self._in_flight + n <= self.limit_bytes
            self._in_flight += n if fits else 0
            return fits

    def release(self, n: int) -> None:
        """Gives n reserved bytes back and wakes those who wait."""
        assert n >= 0, f"{n} bytes to release"
        self._released.put(n)
        # Whoever holds the lock now sees the note at the latest POLL_SECONDS later.
        if self._condition.acquire(blocking=False):
            try:
                self._condition.notify_all()
            finally:
                self._condition.release()

    def tie(self, tensors: Iterable[Tensor], n: int) -> None:
        """
        Releases n bytes once the memory of the last of the tensors is free: views, slices and NumPy arrays of them
        count, for it is their storages that are watched. At once when there are no tensors.
        """
        token = _Token()
        weakref.finalize(token, self.release, n).atexit = False
        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        for storage in storages.values():
            # Each storage holds the token until it is freed, so the token goes with the last of them.
            weakref.finalize(storage, _let_go, token).atexit = False

    def _wait_for_release(self, began: float, n: int) -> None:
        with self._condition:
            self._settle()
            if self._in_flight + n <= self.limit_bytes:
                return
            idle = time.monotonic() - max(began, self._released_at)
            if idle >= self.ttl_seconds:
                raise TimeoutError(
                    f"nobody took the captures: {self._in_flight / BYTES_PER_GB:.3g} GB of hidden states wait, none "
                    f"released for {idle:.0f} s, and {n / BYTES_PER_GB:.3g} GB more do not fit into "
                    f"--capture_budget_gb; let go of each result's tensors once they are used, or raise --capture_ttl "
                    f"({self.ttl_seconds:g} s)"
                )
            self._condition.wait(min(POLL_SECONDS, self.ttl_seconds - idle))

    def _settle(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._in_flight -= self._released.get_nowait()
                self._released_at = time.monotonic()
        assert self._in_flight >= 0, f"{-self._in_flight} bytes more were released than reserved"


class _Token:
    """Lives as long as something refers to it."""


def _let_go(token: _Token) -> None:
    """Holding the token until now was the point."""


def _folder() -> Path:
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


# /proc/stat, from which psutil takes a part, costs milliseconds on a large machine.
@functools.lru_cache(maxsize=1)
def _prefix(pid: int) -> str:
    return f"tiller-{pid}-{_started(pid)}-"


def _path(descriptor: Descriptor) -> Path:
    name = descriptor["name"]
    if not isinstance(name, str) or not NAME_SYNTAX.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a segment; expected tiller-<pid>-<start>-<random>")
    return _folder() / name


def _started(pid: int) -> int:
    """When a process started, in seconds since the machine did: against the clock it would move when that is set."""
    return round(psutil.Process(pid).create_time() - psutil.boot_time())


def _runs(pid: int, started: int) -> bool:
    try:
        is_same = abs(_started(pid) - started) <= SAME_START_SECONDS
        # A killed process that its parent has not waited for is still listed.
        return is_same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], int]:
    """Key → dtype, shape, offset; and the bytes of all of them, at least one aligned block: no file maps empty."""
    places, end = {}, 0
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        places[key] = {"dtype": dtype, "shape": list(tensor.shape), "offset": end}
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
    return places, max(end, ALIGNMENT)


def _allocate(handle: int, folder: Path, n_bytes: int) -> None:
    # Writing to mapped memory that cannot be had kills the process (SIGBUS), so it is had before.
    try:
        if shutil.disk_usage(folder).free < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, n_bytes)
        else:
            os.ftruncate(handle, n_bytes)  # macOS
    except OSError as error:
        free = shutil.disk_usage(folder).free
        told = f"{folder}: {error.strerror}: {n_bytes} bytes needed for captured hidden states, {free} are free"
        raise OSError(error.errno, told) from error


def _fill(handle: int, tensors: Mapping[str, Tensor], places: dict[str, dict[str, Any]], n_bytes: int) -> None:
    mapping: Tensor | None = None
    for key, tensor in tensors.items():
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            _write(handle, tensor, places[key]["offset"])
        else:
            mapping = _map(handle, n_bytes) if mapping is None else mapping
            _view(mapping, places[key]).copy_(tensor.detach())


def _write(handle: int, tensor: Tensor, offset: int) -> None:
    # 1.4 times as fast as a copy into mapped memory, each page of which the kernel first faults in and zeroes.
    rest = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    while rest:
        n_written = os.pwrite(handle, rest, offset)
        rest, offset = rest[n_written:], offset + n_written


def _map(handle: int, n_bytes: int) -> Tensor:
    """uint8 (n_bytes,): the file itself. Unlike Python's mmap it keeps no file descriptor, of which there are few."""
    return torch.from_file(f"/dev/fd/{handle}", shared=True, size=n_bytes, dtype=torch.uint8, device="cpu")


def _view(mapping: Tensor, place: dict[str, Any]) -> Tensor:
    dtype, shape, offset = getattr(torch, place["dtype"]), place["shape"], place["offset"]
    end = offset + math.prod(shape) * dtype.itemsize
    if not 0 <= offset <= end <= len(mapping):
        raise RuntimeError(f"a tensor {place} ends after its segment, which has {len(mapping)} bytes")
    return mapping[offset:end].view(dtype).view(shape)
