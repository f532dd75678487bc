"""
The full figures of src.ask: 500 questions with a fifth of faults, a second run from the cache, 1,000 cached questions,
20 equal ones at once, two servers of one name. About two minutes on one CPU core:
uv run python scripts/acceptance/asking.py --output_dir data/experiments/acceptance_asking
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def ask(url: str, path: Path, folder: Path, *words: str) -> tuple[int, float, str]:
    """Exit code, seconds of the whole process, what it said."""
    command = [sys.executable, "-m", "src.ask", "--dataset_path", str(path), "--model_id", "openai:m"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--openai_base_url", url, "--output_dir", str(folder), *words],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    return done.returncode, time.perf_counter() - started, done.stderr.strip().split("\n")[-1]


def dataset(folder: Path, n: int) -> Path:
    path = folder / f"questions_{n}.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"question {i}"}) + "\n" for i in range(n)))
    return path


def n_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def faults(folder: Path) -> None:
    from tests.fault_server import a_fifth, serve

    path, run = dataset(folder, 500), folder / "faults"
    with serve(a_fifth) as server:
        words = ("--max_attempts", "2", "--request_timeout", "15")
        code, seconds, said = ask(server.url, path, run, *words)
        faulty = sum(a_fifth(f"question {i}", 1) is not None for i in range(500))
        ids = [json.loads(line)["id"] for name in ("results", "failures") for line in (run / f"{name}.jsonl").open()]
        print(
            f"500 questions, {faulty} of them met a fault: exit code {code}, {n_rows(run / 'results.jsonl')} rows, "
            f"{n_rows(run / 'failures.jsonl')} failures, {len(ids) - len(set(ids))} told twice, "
            f"{len(server.requests)} requests, {seconds:.1f} s\n  {said}"
        )
        server.fault = lambda question, attempt: None
        before = len(server.requests)
        code, seconds, _ = ask(server.url, path, run, *words)
        print(
            f"again: exit code {code}, {n_rows(run / 'results.jsonl')} rows, {len(server.requests) - before} requests"
        )
        before = len(server.requests)
        code, seconds, _ = ask(server.url, path, folder / "cached", "--cache_dir", str(run / "cache"))
        print(f"another run with that cache: exit code {code}, {len(server.requests) - before} requests")


def replay(folder: Path) -> None:
    from tests.fault_server import serve

    path = dataset(folder, 1000)
    with serve() as server:
        _, seconds, _ = ask(server.url, path, folder / "first")
        print(f"1,000 questions, no fault: {seconds:.1f} s, {len(server.requests)} requests")
        cache = ("--cache_dir", str(folder / "first" / "cache"))
        times = sorted(ask(server.url, path, folder / f"replay_{i}", *cache)[1] for i in range(5))
        print(
            f"1,000 cached questions: median {times[2]:.2f} s [{times[0]:.2f} … {times[4]:.2f}] of five processes, "
            f"{len(server.requests) - 1000} requests"
        )
    helps = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "src.ask", "--help"], cwd=ROOT, capture_output=True, check=True)
        helps.append(time.perf_counter() - started)
    print(f"--help: median {sorted(helps)[2]:.2f} s [{min(helps):.2f} … {max(helps):.2f}]")


def shared(folder: Path) -> None:
    from src.common.experiment_config import ExperimentConfigBase
    from src.common.safetytooling_wrappers import ask_single_question
    from tests.fault_server import serve

    async def together(config: ExperimentConfigBase) -> set[str]:
        calls = (ask_single_question(config.api, "openai:m", "the same") for _ in range(20))
        answers = {answer for (answer,) in await asyncio.gather(*calls)}
        await config.api.close()
        return answers

    with serve(name="one") as one, serve(name="two") as two:
        for server in (one, two):
            server.delay = 0.2
            answers = asyncio.run(together(ExperimentConfigBase(output_dir=folder, openai_base_url=server.url)))
            print(f"20 equal questions at once to server {server.name}: {len(server.requests)} request, {answers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True)
    faults(folder)
    replay(folder)
    shared(folder)


if __name__ == "__main__":
    main()
