"""
Three stages that overlap: a loader reads and tokenizes, an encoder for each device embeds, a writer writes. Queues
between them hold few shards; the first exception ends all of them and is raised in the caller.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from src.embedding.encoder import Encoder, Report
from src.embedding.records import Shard

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_END = 60.0
"""A stage that waits for longer, as on a network that does not answer, ends with the process."""
SHARDS_AHEAD = 1
"""Shards that wait before the encoder and before the writer."""


class _Stopped(BaseException):
    """Another stage has failed."""


@dataclass
class _Shared:
    """What the stages have in common."""

    loaded: queue.Queue = field(default_factory=lambda: queue.Queue(SHARDS_AHEAD))
    encoded: queue.Queue = field(default_factory=lambda: queue.Queue(SHARDS_AHEAD))
    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def put(self, where: queue.Queue, item: Shard | None) -> None:
        while not self.stop.is_set():
            try:
                return where.put(item, timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Full:
                continue
        raise _Stopped

    def get(self, where: queue.Queue) -> Shard | None:
        while not self.stop.is_set():
            try:
                return where.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                continue
        raise _Stopped

    def guarded(self, stage: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                stage()
            except _Stopped:
                pass
            # Whatever it is, it must end the other stages and reach the caller.
            except BaseException as error:  # noqa: BLE001
                self.errors.append(error)
                self.stop.set()
                self.done.set()

        return run


def run_stages(
    shards: Iterable[Shard], encoders: Sequence[Encoder], write: Callable[[Shard], None], report: Report
) -> None:
    """
    Draws the shards (in a thread of their own), embeds and writes each; they may be written in another order where
    there are several encoders. Raises the first exception of any stage, and what interrupts the caller, once all have
    ended; no shard is begun after it.
    """
    shared = _Shared()

    def checked(pieces: int, tokens: int) -> None:
        if shared.stop.is_set():
            raise _Stopped
        report(pieces, tokens)

    stages = [
        lambda: _load(shared, shards, len(encoders)),
        *(lambda encoder=encoder: _encode(shared, encoder, checked) for encoder in encoders),
        lambda: _write(shared, write, len(encoders)),
    ]
    threads = [threading.Thread(target=shared.guarded(stage), daemon=True) for stage in stages]
    for thread in threads:
        thread.start()
    try:
        # A wait without an end would keep signals from being heard.
        while not shared.done.wait(SECONDS_BETWEEN_LOOKS):
            pass
    finally:
        shared.stop.set()
        for thread in threads:
            thread.join(SECONDS_TO_END)
    if shared.errors:
        raise shared.errors[0]


def _load(shared: _Shared, shards: Iterable[Shard], n_encoders: int) -> None:
    waited, started = 0.0, time.perf_counter()
    for shard in shards:
        loaded = time.perf_counter()
        shard.seconds["load"] = _stage(loaded - started, waited)
        shared.put(shared.loaded, shard)
        started = time.perf_counter()
        waited = started - loaded
    for _ in range(n_encoders):
        shared.put(shared.loaded, None)


def _encode(shared: _Shared, encoder: Encoder, report: Report) -> None:
    while True:
        asked = time.perf_counter()
        shard = shared.get(shared.loaded)
        if shard is None:
            break
        started = time.perf_counter()
        encoder.encode(shard, report)
        shard.seconds["encode"] = _stage(time.perf_counter() - started, started - asked)
        shared.put(shared.encoded, shard)
    shared.put(shared.encoded, None)


def _write(shared: _Shared, write: Callable[[Shard], None], n_encoders: int) -> None:
    ended = 0
    while ended < n_encoders:
        asked = time.perf_counter()
        shard = shared.get(shared.encoded)
        if shard is None:
            ended += 1
            continue
        # How long the writing took is known, and added, only when it is done.
        shard.seconds["write"] = _stage(0.0, time.perf_counter() - asked)
        write(shard)
    shared.done.set()


def _stage(busy: float, idle: float) -> dict[str, float]:
    return {"busy": round(busy, 4), "idle": round(idle, 4)}
