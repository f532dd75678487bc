"""
Tokens per CPU-second of per-request steering and capture on vLLM against the plain engine of the same kind, same model,
same prompts, same float32, in one run. A quarter of an hour, and 8 GB of memory:
OMP_NUM_THREADS=1 uv run --extra cpu python scripts/benchmarks/steering.py

--peer_python PYTHON also measures vllm-lens: another Python (at least 3.12) with vllm-lens and the same vLLM installed,
`uv pip install --no-deps vllm-lens zstandard`. Its ratios are to vLLM without it in that same environment.

The eager kind has one process, whose hooks are taken out before a plain pass. The others have three: two of the engine
without any of it, `plain` and `plain again`, and one that steers. The arms take turns, a pass each, in another order
every round; the first round is not counted. No answer ends early, so every pass computes the same number of tokens. A
ratio is taken within a round, to the mean of its two plain passes; the interval of `plain again` to `plain` is what the
same engine differs from itself. A bar is met when the median ratio reaches it, and `within noise` when that is in the
interval.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
OURS, PEER = (Path(__file__).with_name(f"steering_{name}.py") for name in ("tiller", "vllm_lens"))
RESULT = "RESULT "
"""Begins each answer of a side; whatever else it prints is not for us."""
KV_CACHE_GIB = 0.5
COEFFICIENT = 1.0
"""Of the unit vectors that are added."""
SEGMENT_BYTES = 2**30
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
"""
glibc gives large blocks back to the kernel, and pays for the pages again, unless something lies above them: luck, by
which a process was a tenth faster at everything once it had kept hidden states. So none gives any back.
"""


@dataclass(frozen=True)
class Arm:
    """One kind of pass: what is done in which process."""

    name: str
    process: str
    work: str
    bar: float | None = None
    """Least ratio to `against`."""
    against: str | None = None
    """An arm of the same kind, the two plain ones when None."""


PLAIN, AGAIN = "plain", "plain again"
APART = (Arm(PLAIN, "plain", "plain"), Arm(AGAIN, "again", "plain"))
"""Where the engine that steers cannot be without it."""
KINDS = {
    "eager": (
        Arm(PLAIN, "steering", "plain"),
        Arm(AGAIN, "steering", "plain"),
        Arm("unsteered, specs known", "steering", "nothing", 0.98),
        Arm("add at all layers", "steering", "add", 0.90),
        Arm("keep the mean, all layers", "steering", "mean", 0.90),
        Arm("keep all positions, all layers", "steering", "all", 0.75),
    ),
    "compiled": (
        *APART,
        Arm("unsteered, specs known", "steering", "nothing", 0.98),
        Arm("add at all layers", "steering", "add", 0.97),
        Arm("a spec a request, all layers", "steering", "distinct", 0.95, "add at all layers"),
    ),
    "vllm-lens": (
        *APART,
        Arm("add at all layers", "steering", "add"),
        Arm("keep all positions, all layers", "steering", "all"),
    ),
}


class Side:
    """A process that holds one engine and runs a pass when told to."""

    def __init__(self, command: list[str], job: dict[str, Any], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **MEMORY, **environment},
        )  # fmt: skip
        self._send(job)

    def result(self) -> dict[str, Any]:
        """Its next answer. Raises RuntimeError when it ended instead."""
        for line in self._process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise RuntimeError(f"{' '.join(self._process.args)} ended with {self._process.wait()}")

    def run(self, work: str) -> dict[str, Any]:
        """One pass: tokens, cpu_seconds, seconds, and what tells whether the answers are the same."""
        self._send(work)
        return self.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _send(self, message: Any) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def work_to_do(n_requests: int, max_tokens: int) -> dict[str, Any]:
    """The same for every side: prompts as token ids, and the model's folder and shape."""
    from src.models import loading
    from src.models.bundled import bundled_folder

    folder = bundled_folder(MODEL_ID)
    tokenizer, model = loading.load_tokenizer(folder), loading.load_config(folder)
    texts = [each["prompt"] for each in json.loads((ROOT / "data/personas/prompts.json").read_text())]
    # The first words differ, so that no pass finds a prompt of its own in the prefix cache.
    lines = [f"{i} {texts[i % len(texts)]} {texts[-1 - i % len(texts)]}" for i in range(n_requests)]
    return {
        "model_id": MODEL_ID, "folder": str(folder), "n_layers": model.num_hidden_layers, "d_model": model.hidden_size,
        "prompts": [tokenizer(line).input_ids for line in lines], "max_tokens": max_tokens, "coefficient": COEFFICIENT,
        "kv_cache_gib": KV_CACHE_GIB,
    }  # fmt: skip


def measured(kind: str, job: dict[str, Any], rounds: int, peer_python: str | None) -> dict[str, list[dict]]:
    """Arm → what each counted round gave."""
    arms = KINDS[kind]
    found: dict[str, list[dict]] = {arm.name: [] for arm in arms}
    with ExitStack() as stack:
        processes = dict.fromkeys(arm.process for arm in arms)
        sides = {process: stack.enter_context(side(kind, process, job, peer_python)) for process in processes}
        for each in sides.values():
            each.result()
        for number in range(rounds + 1):
            for arm in random.Random(number).sample(arms, len(arms)):
                result = sides[arm.process].run(arm.work)
                if number:
                    found[arm.name].append(result)
                print(f"{kind}, {arm.name}: {result['cpu_seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def side(kind: str, process: str, job: dict[str, Any], peer_python: str | None) -> Side:
    if kind != "vllm-lens":
        return Side([sys.executable, str(OURS), kind, process], job, {})
    # Without this vllm-lens is in every engine of its environment.
    absent = {} if process == "steering" else {"VLLM_LENS_DISABLE": "1"}
    return Side([peer_python, str(PEER)], job, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **absent})


def ratios(found: dict[str, list[dict]], arm: Arm) -> list[float]:
    """Of each round: the CPU time of what it is compared with over its own, per token."""
    cost = {name: [each["cpu_seconds"] / each["tokens"] for each in passes] for name, passes in found.items()}
    plain, again = cost[PLAIN], cost[AGAIN]
    if arm.name == AGAIN:
        base: Iterable[float] = plain
    elif arm.against:
        base = cost[arm.against]
    else:
        base = [(a + b) / 2 for a, b in zip(plain, again, strict=True)]
    return [a / b for a, b in zip(base, cost[arm.name], strict=True)]


def verdict(ratio: float, bar: float | None, noise: Sequence[float]) -> str:
    if bar is None:
        return ""
    if ratio >= bar:
        return "yes"
    return "within noise" if min(noise) <= ratio <= max(noise) else "NO"


def print_kind(kind: str, found: dict[str, list[dict]]) -> None:
    noise = ratios(found, next(arm for arm in KINDS[kind] if arm.name == AGAIN))
    for arm in KINDS[kind]:
        passes = found[arm.name]
        speed = median(each["tokens"] / each["cpu_seconds"] for each in passes)
        own = [] if arm.name == PLAIN else ratios(found, arm)
        shown = f"{median(own):.3f} [{min(own):.3f} … {max(own):.3f}]" if own else ""
        bar = f"{arm.bar:.2f}{f' of {arm.against!r}' if arm.against else ''}" if arm.bar else ""
        met = verdict(median(own), arm.bar, noise) if own else ""
        print(f"| {kind} | {arm.name} | {passes[0]['tokens']} | {speed:.0f} | {shown} | {bar} | {met} |", flush=True)


def same_answers(found: dict[str, dict[str, list[dict]]]) -> None:
    """Print how many of the answers of two kinds under the same work are the same."""
    for kind in [kind for kind in found if kind != "eager"] if "eager" in found else []:
        for name in (PLAIN, "add at all layers"):
            ours, theirs = (found[each][name][0]["answers"] for each in ("eager", kind))
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            print(f"{kind}, {name}: {same} of {len(ours)} answers are those of our eager engine")


def transport(rounds: int, n_bytes: int) -> list[float]:
    """GB/s of one tensor of `n_bytes` through shared memory: written, opened, every page read."""
    import torch

    from src.models.shared_segments import open_segment, write_segment

    tensor = torch.ones(n_bytes // 4, dtype=torch.float32)
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        opened = open_segment(write_segment({"states": tensor}))["states"]
        speeds.append(n_bytes / (time.perf_counter() - began) / 1e9)
        assert opened[::1024].sum().item() == len(opened) // 1024
        del opened
    return speeds


def machine() -> str:
    import torch
    import vllm

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    return f"{cpu}, {os.cpu_count()} CPUs, torch {torch.__version__}, vLLM {vllm.__version__}, {MODEL_ID}, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer_python", help="the Python of an environment with vllm-lens and vLLM")
    arguments = parser.parse_args()
    job = work_to_do(arguments.requests, arguments.max_tokens)
    print(f"{machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    print(
        f"{arguments.requests} requests, {sum(map(len, job['prompts']))} tokens of prompts, {arguments.max_tokens} of "
        f"each answer, {arguments.rounds} rounds\n"
    )
    print("| engine | arm | tokens | tokens per CPU-second | ratio [least … most] | bar | met |")
    print("|---|---|---|---|---|---|---|", flush=True)
    found = {}
    for kind in arguments.kinds:
        if kind != "vllm-lens" or arguments.peer_python:
            found[kind] = measured(kind, job, arguments.rounds, arguments.peer_python)
            print_kind(kind, found[kind])
    print()
    if "vllm-lens" not in found:
        print("vllm-lens is left out: no --peer_python")
    same_answers(found)
    speeds = transport(arguments.rounds, SEGMENT_BYTES)
    met = "yes" if median(speeds) >= 2 else "NO"
    print(f"capture transport: {median(speeds):.2f} GB/s [{min(speeds):.2f} … {max(speeds):.2f}], bar 2, met: {met}")


if __name__ == "__main__":
    main()
