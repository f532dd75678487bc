"""Runs a coroutine as a command does: a stop signal cancels it, it tidies up, and the command stops as any other."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from src.common.cli import STOP_SIGNALS
from src.common.errors import StopRequested

Result = TypeVar("Result")


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """
    `asyncio.run`, but a signal that stops commands cancels `work` and then raises StopRequested here. An exception
    raised in a signal handler would land in whichever task happens to run, and stop that one alone.
    """
    stopped: list[int] = []

    async def guarded() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            if not stopped:
                stopped.append(number)
                task.cancel()

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            return await work
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if stopped:
            raise StopRequested(signal.Signals(stopped[0]).name) from None
        raise
