"""What vLLM does to the process around it, within bounds: its noise, its settings, its workers and shared memory."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

LOGGER = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")


def stop(engine: Any) -> None:
    """End an engine, its workers and their shared memory, which a worker that is killed on a busy machine leaves."""
    segments: list[Path] = []
    try:
        segments = segments_of(engine)
    finally:
        engine.engine_core.shutdown()
        for segment in segments:
            segment.unlink(missing_ok=True)


def segments_of(engine: Any) -> list[Path]:
    """The shared memory of the collectives of an engine's workers on the CPU; none on CUDA, and of one worker."""
    names = {name for name in engine.collective_rpc("tiller_shared_memory") if name}
    return [path for path in SHARED_MEMORY.glob("*") if any(path.name.startswith(f"{name}-") for name in names)]


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """When starting ends early, also by Ctrl-C: end the workers begun in it, and remove what only they have mapped."""
    segments, children = set(_segments()), set(psutil.Process().children(recursive=True))
    try:
        yield
    except BaseException:
        begun = [c for c in psutil.Process().children(recursive=True) if c not in children]
        for child in begun:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(begun, timeout=5)
        mapped = _mapped()
        for segment in set(_segments()) - segments:
            if str(segment) not in mapped:
                segment.unlink(missing_ok=True)
        raise


def _segments() -> list[Path]:
    return list(SHARED_MEMORY.glob("vllm_dist_*"))


def _mapped() -> str:
    """Every process's memory map that may be read, one after the other."""
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps.append(process.read_text(errors="replace"))
    return "\n".join(maps)


@contextlib.contextmanager
def kept_as_they_are() -> Iterator[None]:
    """vLLM's CPU worker forbids changing the number of threads in the whole process: here it stays allowed."""
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads


@contextlib.contextmanager
def out_of_sight(package: str) -> Iterator[None]:
    """
    Keep a package's loaded modules from code that looks through all of them: vLLM's kernel dispatcher asks every object
    of every module for its attributes, and llvmlite's (loaded by numba, so by UMAP) raises then.
    """
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


@contextlib.contextmanager
def quiet(engine_log: bool) -> Iterator[None]:
    """
    Without `engine_log`, what vLLM's libraries write to stdout and stderr is kept from the terminal, also what comes
    from C++ and from child processes; it becomes debug records.
    """
    if engine_log:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as noise:
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(noise.fileno(), 1)
            os.dup2(noise.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            noise.seek(0)
            for line in noise.read().decode(errors="replace").splitlines():
                LOGGER.debug("vLLM: %s", line)
