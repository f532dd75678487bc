"""
K adapters of one base model: one evaluation with one engine against one evaluation each. From the repository root:
uv run python scripts/benchmarks/evaluating.py --n_adapters 4 --backend hf --output_dir data/experiments/bench
Prints the seconds of both, of the wall and of the CPU, imports and loading included, and whether the rows are the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL = "bundled:smollm2-135m"


class Seconds(NamedTuple):
    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_adapters", type=int, default=4)
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--num_tasks", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    references = [f"{MODEL}+{path}" for path in write_adapters(options.output_dir / "adapters", options.n_adapters)]

    together = timed(options, references, options.output_dir / "together")
    alone = [timed(options, [each], options.output_dir / f"alone-{i}") for i, each in enumerate(references)]
    same = rows_of(options.output_dir / "together") == [
        row for i in range(len(references)) for row in rows_of(options.output_dir / f"alone-{i}")
    ]
    print(
        json.dumps(
            {
                "backend": options.backend,
                "n_adapters": options.n_adapters,
                "samples_each": options.num_tasks,
                **told("wall", together.wall, sum(each.wall for each in alone)),
                **told("cpu", together.cpu, sum(each.cpu for each in alone)),
                "same_rows": same,
            }
        )
    )
    sys.exit(0 if same else 1)


def told(kind: str, together: float, alone: float) -> dict[str, float]:
    return {
        f"one_engine_{kind}_seconds": round(together, 1),
        f"one_job_each_{kind}_seconds": round(alone, 1),
        f"{kind}_ratio": round(alone / together, 2),
    }


def write_adapters(folder: Path, n: int) -> list[Path]:
    """Random adapters of the bundled model, small enough that it still speaks."""
    from src.models.bundled import bundled_folder
    from tests.tiny_adapters import write_adapter

    base = bundled_folder(MODEL)
    return [write_adapter(base, folder / f"adapter-{i}", seed=i, size=0.01, r=8) for i in range(n)]


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended; they do not depend on what else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(options: argparse.Namespace, references: list[str], folder: Path) -> Seconds:
    """One evaluation as a user starts it, imports and loading included."""
    words = [sys.executable, "-m", "src.evaluate", "--model_id", *references, "--backend", options.backend]
    words += ["--device", "cpu", "--tasks", "data/evals/capitalization.jsonl", "--num_tasks", str(options.num_tasks)]
    words += ["--output_dir", str(folder), *(["--kv_cache_gib", "0.5"] if options.backend == "vllm" else [])]
    started, used = time.perf_counter(), cpu_seconds()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return Seconds(time.perf_counter() - started, cpu_seconds() - used)


def rows_of(folder: Path) -> list[tuple]:
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [(row["id"], row["response"], row["score"]) for row in map(json.loads, lines)]


if __name__ == "__main__":
    main()
