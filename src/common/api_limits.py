"""Bounds on how much is asked: so many requests and so many tokens in any minute."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

WINDOW = 60.0


class RateLimit:
    """
    At most `per_minute` units in any 60 seconds, exactly: what was taken is remembered until it is a minute old. Those
    who wait are served in the order of their coming. An amount above the limit waits for an empty minute.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.per_minute = per_minute
        self._clock, self._sleep = clock, sleep
        self._taken: deque[list[float]] = deque()
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> list[float]:
        """Waits until `amount` more fits, and takes it. Returns what `correct` wants."""
        async with self._turn:
            while (wait := self._seconds_until(amount)) > 0:
                await self._sleep(wait)
            entry = [self._clock(), amount]
            self._taken.append(entry)
            return entry

    def correct(self, entry: list[float], amount: float) -> None:
        """Puts the amount that it turned out to be in the place of the one that was taken."""
        entry[1] = amount

    def _seconds_until(self, amount: float) -> float:
        now = self._clock()
        while self._taken and now - self._taken[0][0] >= WINDOW:
            self._taken.popleft()
        over = sum(taken for _, taken in self._taken) + amount - self.per_minute
        freed = now
        for moment, taken in self._taken:
            if over <= 0:
                break
            over -= taken
            freed = moment + WINDOW
        return max(0.0, freed - now)
