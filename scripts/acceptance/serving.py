"""
The full figures of src.serve embeddings: 64 clients, each answer checked, throughput against a server that embeds one
text at a time and against src.embed_dataset, overload, memory under load. Rounds that are done are kept:
uv run python scripts/acceptance/serving.py --only embeddings --output_dir data/experiments/acceptance_serving
"""

import argparse
import asyncio
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from serving_curve import curve  # noqa: E402

from src.common.jsonl import read_jsonl  # noqa: E402

MODEL = "bundled:minilm"
WARM_TEXTS = 4000
BARS = {
    "float32": {"one_at_a_time": 0.95, "embed_dataset": 0.85},
    "bfloat16": {"one_at_a_time": 1.4, "embed_dataset": 0.85},
}


class Server:
    """`python -m src.serve embeddings` in a process of its own."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.url, self.process = url, psutil.Process(process.pid)

    def cpu(self) -> float:
        """CPU seconds so far, user and system."""
        return sum(self.process.cpu_times()[:2])

    def mib(self) -> float:
        """Resident memory now."""
        return self.process.memory_info().rss / 2**20


@contextmanager
def server(**settings: object) -> Iterator[Server]:
    settings = {"model_id": MODEL, "backend": "st", "port": 0} | settings
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "src.serve", "embeddings"]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        line = process.stdout.readline()
        assert line, f"the server did not start: {' '.join(command)}"
        yield Server(process, line.split()[-1])
    finally:
        process.terminate()
        assert process.wait(120) == 0, "the server did not stop as it should"


def texts_of(number: int, count: int) -> list[str]:
    """Distinct texts of skewed length: lognormal(3.6, 0.8) tokens, 8 to 256, mean 48."""
    from tests.tiny_embedder import WORDS

    draw = random.Random(number)
    lengths = [int(min(256, max(8, draw.lognormvariate(3.6, 0.8)))) for _ in range(count)]
    return [f"{' '.join(draw.choices(WORDS, k=max(1, n - 8)))} {number} {i}" for i, n in enumerate(lengths)]


async def ask_all(url: str, texts: Sequence[str], clients: int) -> tuple[np.ndarray, list[float], Counter]:
    """A request a text, `clients` at a time: (vectors, seconds of each, statuses); 429 is asked again."""
    import httpx

    vectors: list[Any] = [None] * len(texts)
    seconds, statuses, left = [], Counter(), iter(range(len(texts)))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600, verify=False) as http:
            for number in left:
                body = {"model": MODEL, "input": texts[number], "encoding_format": "base64"}
                while True:
                    started = time.perf_counter()
                    answer = await http.post("/v1/embeddings", json=body)
                    statuses[answer.status_code] += 1
                    if answer.status_code != 429:
                        break
                    await asyncio.sleep(float(answer.headers["retry-after"]) * random.uniform(0.5, 1))
                answer.raise_for_status()
                seconds.append(time.perf_counter() - started)
                (found,) = answer.json()["data"]
                vectors[number] = np.frombuffer(base64.b64decode(found["embedding"]), "<f4")

    await asyncio.gather(*(client() for _ in range(clients)))
    return np.array(vectors), seconds, statuses


class Dataset:
    """src.embed_dataset in this process, from the loaded model on."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype, self.backend = folder / "dataset", dtype, None

    def run(self, texts: Sequence[str]) -> tuple[float, float]:
        """(CPU seconds, seconds) of reading, embedding and writing the texts."""
        from src.embed_dataset import EmbedDatasetConfig
        from src.embedding.backends import load_backend
        from src.embedding.making import make_shards, stored_settings
        from src.embedding.reading import find_source

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        data = self.folder / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (target := self.folder / "shards").mkdir()
        config = EmbedDatasetConfig(
            dataset_path=str(data), output_dir=target, model_id=MODEL, text_field="text", dtype=self.dtype, backend="st"
        )
        self.backend = self.backend or load_backend(config)
        started, wall = time.process_time(), time.perf_counter()
        source = find_source(str(data), None, None)
        stored = stored_settings(config, source, source.content(), self.backend.facts)
        make_shards(config, source, self.backend, stored)
        return time.process_time() - started, time.perf_counter() - wall


def load_round(number: int, count: int, dtype: str, arms: dict[str, Server], dataset: Dataset) -> dict[str, Any]:
    """The same texts by both servers and the command, in an order that turns with the rounds."""
    texts, row, vectors = texts_of(number, count), {"round": number, "dtype": dtype, "texts": count}, {}
    names = [*arms, "embed_dataset"]
    for name in names[number % 3 :] + names[: number % 3]:
        if name == "embed_dataset":
            cpu, wall = dataset.run(texts)
        else:
            before, started = arms[name].cpu(), time.perf_counter()
            vectors[name], seconds, _ = asyncio.run(ask_all(arms[name].url, texts, 64))
            cpu, wall = arms[name].cpu() - before, time.perf_counter() - started
            row[name + "_seconds"] = [round(each, 4) for each in seconds]
        row[name] = {"cpu": round(cpu, 3), "wall": round(wall, 3)}
    ours, alone = vectors["batched"], vectors["one_at_a_time"]
    cosines = (ours @ alone.T) / np.linalg.norm(ours, axis=1)[:, None] / np.linalg.norm(alone, axis=1)
    own = np.diag(cosines)
    return row | {"least_cosine": float(own.min()), "mixed_up": int((cosines.argmax(axis=1) != np.arange(count)).sum())}


def load(folder: Path, rounds: int, count: int) -> bool:
    """None lost, none mixed up, and what a text costs."""
    path = folder / "rounds.jsonl"

    def rows_of(dtype: str) -> list[dict[str, Any]]:
        rows = [row for _, row in read_jsonl(path)] if path.exists() else []
        return [row for row in rows if row["dtype"] == dtype]

    for dtype in BARS:
        done = {row["round"] for row in rows_of(dtype)}
        missing = [number for number in range(rounds) if number not in done]
        if not missing:
            continue
        with server(dtype=dtype) as ours, server(dtype=dtype, tokens_per_batch=1) as one:
            arms, dataset = {"batched": ours, "one_at_a_time": one}, Dataset(folder, dtype)
            for warm in arms.values():
                asyncio.run(ask_all(warm.url, texts_of(-1, 50), 8))
            dataset.run(texts_of(-1, 50))
            for number in missing:
                row = load_round(number, count, dtype, arms, dataset)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    met = [report(dtype, rows_of(dtype)) for dtype in BARS]
    return all(met)


def report(dtype: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Prints a dtype's figures and says whether the bars are met, by CPU seconds."""
    n = sum(row["texts"] for row in rows)
    latency = np.concatenate([row["batched_seconds"] for row in rows])
    least, mixed = min(row["least_cosine"] for row in rows), sum(row["mixed_up"] for row in rows)
    print(f"\n{dtype}: {n} requests in {len(rows)} rounds, {len(latency)} answered, {mixed} mixed up")
    print(f"  least cosine with the answer alone {least:.6f}; seconds: p50 {np.median(latency):.3f}, "
          f"p99 {np.quantile(latency, 0.99):.3f}")  # fmt: skip
    total = {
        name: {unit: sum(row[name][unit] for row in rows) for unit in ("cpu", "wall")}
        for name in ("batched", "one_at_a_time", "embed_dataset")
    }
    met = mixed == 0 and len(latency) == n
    for name, spent in total.items():
        ratio = {unit: spent[unit] / total["batched"][unit] for unit in spent}
        bar = BARS[dtype].get(name)
        met &= bar is None or ratio["cpu"] >= bar
        told = f" (bar {bar})" if bar else ""
        print(f"  {name}: {n / spent['cpu']:.1f} texts a CPU second, {n / spent['wall']:.1f} a second; batched is "
              f"{ratio['cpu']:.3f}× by CPU, {ratio['wall']:.3f}× by the clock{told}")  # fmt: skip
    return met


def overload(folder: Path, count: int) -> bool:
    """64 clients at a server where 8 texts may wait: refused with 429 and Retry-After, asked again, all answered."""
    texts = texts_of(10_000, count)
    with server(dtype="float32", max_waiting=8, max_texts=8) as small:
        vectors, _, statuses = asyncio.run(ask_all(small.url, texts, 64))
    right = len(vectors) == count and np.isfinite(vectors).all() and set(statuses) == {200, 429}
    print(f"overload: {count} texts by 64 clients, 8 may wait: {dict(statuses)}, all answered in the end: {right}")
    return right and statuses[200] == count


async def mixed_load(url: str, seconds: float, pause: float, look: Any) -> Counter:
    """Single texts, bulks, bad requests and clients that leave, one after another; `look` every 10 s."""
    import httpx

    draw, end, counts, next_look = random.Random(0), time.monotonic() + seconds, Counter(), 0.0
    texts = texts_of(20_000, 2000)
    while time.monotonic() < end:
        if time.monotonic() >= next_look:
            look()
            next_look = time.monotonic() + 10
        kind = draw.choices(("one", "bulk", "bad", "leaver"), (80, 4, 8, 8))[0]
        async with httpx.AsyncClient(base_url=url, timeout=0.002 if kind == "leaver" else 600, verify=False) as http:
            size = 40 if kind == "bulk" else 1
            body = {"texts": [*draw.sample(texts, size), *([3] if kind == "bad" else [])]}
            try:
                counts[kind, (await http.post("/embed_text", json=body)).status_code] += 1
            except httpx.TimeoutException:
                counts[kind, "gone"] += 1
        await asyncio.sleep(pause)
    return counts


def memory(folder: Path, minutes: float, pause: float) -> bool:
    """Resident memory of the server every 10 s, by thirds of the time."""
    seen: list[float] = []
    with server(dtype="float32") as ours:
        # oneDNN keeps kernels for each size of batch, up to 1,024: what grows is filled first, by much load at once.
        asyncio.run(ask_all(ours.url, texts_of(30_000, WARM_TEXTS), 64))
        asyncio.run(mixed_load(ours.url, 30, pause / 4, lambda: None))
        counts = asyncio.run(mixed_load(ours.url, 60 * minutes, pause, lambda: seen.append(ours.mib())))
    thirds = [float(np.median(part)) for part in np.array_split(seen, 3)]
    growth = thirds[2] / thirds[0] - 1
    print(f"memory: {minutes:g} minutes, {sum(counts.values())} requests {dict(counts)}; median MiB by thirds "
          f"{', '.join(f'{each:.1f}' for each in thirds)}: {growth:+.2%}, peak {max(seen):.1f}")  # fmt: skip
    return growth < 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["embeddings"], choices=["embeddings"])
    parser.add_argument("--checks", nargs="+", default=["load", "overload", "curve", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=1000, help="of a round")
    parser.add_argument("--thousands", type=int, default=40, help="requests of the memory curve")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between requests of the memory check")
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    checks = {
        "load": lambda: load(given.output_dir, given.rounds, given.texts),
        "overload": lambda: overload(given.output_dir, 300),
        "curve": lambda: curve(given.output_dir, given.thousands, server),
        "memory": lambda: memory(given.output_dir, given.minutes, given.pause),
    }
    met = {name: checks[name]() for name in given.checks}
    print("\n" + ", ".join(f"{name}: {'met' if is_met else 'NOT met'}" for name, is_met in met.items()))
    sys.exit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
