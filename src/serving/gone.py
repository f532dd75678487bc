"""Work for a client, given up when the client goes."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from src.serving.errors import ApiError

Result = TypeVar("Result")
GONE = 499
"""What the log calls a client that went before its answer, as nginx does."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """
    What `work` returns; it is cancelled, and ended before this ends, when the client goes. The request's body must have
    been read. Raises ApiError when the client has gone, and what `work` raises.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(GONE, "the client has gone")
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
