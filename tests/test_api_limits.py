"""Rates: no minute holds more than it may, whatever is asked and in whatever amounts."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.api_limits import WINDOW, RateLimit


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 30)), min_size=1, max_size=30),
    st.integers(10, 60),
)
def test_no_minute_holds_more_than_the_limit(calls: list[tuple[int, float]], per_minute: int) -> None:
    now, taken = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds

    async def run() -> None:
        nonlocal now
        limit = RateLimit(per_minute, clock=lambda: now, sleep=sleep)
        for amount, pause in calls:
            await limit.take(amount)
            taken.append((now, amount))
            now += pause

    asyncio.run(run())
    for start, _ in taken:
        window = [amount for moment, amount in taken if start <= moment < start + WINDOW - 1e-6]
        # An amount above the limit has the minute for itself.
        assert sum(window) <= per_minute or len(window) == 1


def test_what_fits_does_not_wait_and_a_correction_frees_room() -> None:
    slept: list[float] = []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    async def run() -> None:
        limit = RateLimit(10, clock=lambda: now, sleep=sleep)
        entry = await limit.take(10)
        limit.correct(entry, 4)
        await limit.take(6)
        assert slept == []
        await limit.take(1)
        assert slept == [WINDOW]

    asyncio.run(run())
