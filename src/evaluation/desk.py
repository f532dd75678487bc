"""
Where the event loop of inspect-ai meets the engine. inspect-ai runs in a thread of its own and asks one call at a time;
the main thread gathers calls into batches, so that signals, and what vLLM ties to a thread, stay where they belong.
"""

import asyncio
import contextlib
import queue
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any, Protocol

from src.common.errors import InputError
from src.common.results import Row
from src.evaluation.calls import Answers, Call

SECONDS_OF_QUIET = 0.05
"""A batch is complete when no further call came for so long."""
SECONDS_TO_STOP = 20.0


class Stopped(RuntimeError):
    """What a waiting call gets when the run ends before its answer."""


class Server(Protocol):
    """Who answers: `Serving`."""

    def prepare(self) -> None: ...

    def answer(self, calls: Sequence[Call], on_row: Callable[[Row], None]) -> None: ...


Waiting = tuple[asyncio.AbstractEventLoop, asyncio.Future]


class Desk:
    """Takes calls on one side, and has them answered on the other."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._open()

    def _open(self) -> None:
        # Anew for each job: what a job that was given up still sends must not reach the next one.
        self._queue: queue.SimpleQueue[tuple[Call, Waiting] | InputError | None] = queue.SimpleQueue()
        self._waiting: dict[str, list[Waiting]] = {}
        self._batch: dict[str, Call] = {}
        self._stopped = False

    async def ask(self, call: Call) -> Row:
        """The answer to a call, from an earlier start where there is one. Raises Stopped."""
        known = self._answers.rows.get(call.id)
        if known is not None:
            return known
        if self._stopped:
            raise Stopped("the evaluation was stopped")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._queue.put((call, (loop, future)))
        # It may have come behind what `_stop` took out of the queue.
        if self._stopped:
            raise Stopped("the evaluation was stopped")
        return await future

    def refuse(self, error: InputError) -> None:
        """End the evaluation: something in it cannot be asked."""
        self._queue.put(error)

    def run(self, job: Callable[[], Any], server: Server) -> Any:
        """
        What `job` returns, which runs in a thread of its own and asks this desk. Raises what the server raises, the
        error given to `refuse`, and what the job raises.
        """
        outcome: dict[str, Any] = {}
        self._open()
        own = self._queue

        def work() -> None:
            try:
                outcome["result"] = job()
            except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
                outcome["error"] = error
            finally:
                own.put(None)

        # A daemon, so that a task that hangs cannot keep a stopped run from ending.
        thread = Thread(target=work, name="inspect-ai", daemon=True)
        thread.start()
        try:
            self._serve(server)
        except BaseException:
            self._stop()
            thread.join(SECONDS_TO_STOP)
            raise
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    def _serve(self, server: Server) -> None:
        while True:
            if self._take(self._queue.get()):
                return
            server.prepare()
            batch = self._gather()
            server.answer(list(batch.values()), self._deliver)

    def _take(self, item: tuple[Call, Waiting] | InputError | None) -> bool:
        """Whether the job has ended. Raises what was given to `refuse`."""
        if isinstance(item, InputError):
            raise item
        if item is None:
            assert not self._waiting, f"{len(self._waiting)} calls nobody waits for"
            return True
        call, waiting = item
        self._batch[call.id] = call
        self._waiting.setdefault(call.id, []).append(waiting)
        return False

    def _gather(self) -> dict[str, Call]:
        while True:
            try:
                item = self._queue.get(timeout=SECONDS_OF_QUIET)
            except queue.Empty:
                break
            if item is None:
                # The job ended though calls wait: it gave them up.
                self._waiting.clear()
                self._batch.clear()
                self._queue.put(None)
                return {}
            self._take(item)
        batch, self._batch = self._batch, {}
        return batch

    def _deliver(self, row: Row) -> None:
        row = self._answers.keep(row)
        for loop, future in self._waiting.pop(str(row["id"]), ()):
            self._set(loop, future, row)

    def _set(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future, row: Row | None) -> None:
        def settle() -> None:
            if future.done():
                return
            if row is None:
                future.set_exception(Stopped("the evaluation was stopped"))
            else:
                future.set_result(row)

        # The loop is gone where the job was given up.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    def _stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, tuple):
                    self._waiting.setdefault(item[0].id, []).append(item[1])
        for waiting in self._waiting.values():
            for loop, future in waiting:
                self._set(loop, future, None)
        self._waiting.clear()
