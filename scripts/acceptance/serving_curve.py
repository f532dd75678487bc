"""The part of serving.py (beside this file) that follows the server's memory over many small requests."""

import asyncio
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def curve(folder: Path, thousands: int, server: Callable[..., AbstractContextManager[Any]]) -> bool:
    """
    A model of two layers and small requests, each of another user: what every request left behind would show. server:
    starts one.
    """
    from tests.tiny_embedder import save_tiny_embedder

    shutil.rmtree(folder / "tiny", ignore_errors=True)
    with server(model_id=save_tiny_embedder(folder / "tiny"), dtype="float32") as ours:
        seen = [ours.mib()]
        for number in range(thousands):
            # New connections each time.
            asyncio.run(ask_small(ours.url, number, 1000))
            seen.append(ours.mib())
    print(f"curve: MiB at the start and after each 1,000 requests: {' '.join(f'{each:.1f}' for each in seen)}")
    grown = seen[-1] / seen[2 * len(seen) // 3] - 1
    print(f"  the last third: {grown:+.2%}")
    return grown < 0.005


async def ask_small(url: str, number: int, count: int) -> None:
    """Texts of 1 to 8 words by 16 clients, one in 20 of them refused."""
    import httpx

    left, draw = iter(range(count)), random.Random(number)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600, verify=False) as http:
            for each in left:
                text = f"{number} {each}" + " river" * draw.randint(0, 6)
                answer = await http.post("/embed_text", json={"texts": [text, *[" "] * (each % 20 == 0)], "user": text})
                assert answer.status_code == (400 if each % 20 == 0 else 200), answer.text

    await asyncio.gather(*(client() for _ in range(16)))
