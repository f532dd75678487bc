"""
The full figures of src.run_personas: kills and resumes, Ctrl-C, number formats, memory, answers to bad input. About 10
minutes; with --backend vllm each start takes up to a minute more:
uv run python scripts/acceptance/run_personas.py --output_dir data/experiments/acceptance_personas
uv run --extra cpu python scripts/acceptance/run_personas.py --backend vllm --only kills ctrl_c --output_dir …
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
BACKEND = ["--backend", "hf"]


def words(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "src.run_personas", "--prompts_json", "data/personas/prompts.json",
        "--personae_json", "data/personas/personae.json", "--model_id", MODEL_ID, "--output_dir", str(folder),
        "--num_tasks", "3", "--num_personae", "8", "--max_tokens", "24", "--batch_size", "6", *BACKEND, *more,
    ]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n") if line]


def kills(folder: Path, n_kills: int, seed: int) -> None:
    """kill −9 at random moments, then resume: the same rows, none twice. What finishes first begins anew."""
    started = time.monotonic()
    run(words(folder / "whole", "--token_arrays"))
    whole_seconds = time.monotonic() - started
    draw = random.Random(seed)
    counts: list[list[int]] = [[]]
    while sum(map(len, counts)) < n_kills:
        target = folder / f"killed_{len(counts)}"
        process = subprocess.Popen(
            words(target, "--token_arrays"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(0, whole_seconds))
            counts.append([])
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            path = target / "results.jsonl"
            counts[-1].append(path.read_bytes().count(b"\n") if path.exists() else 0)
    run(words(folder / f"killed_{len(counts)}", "--token_arrays"))
    whole = rows(folder / "whole")
    for number, rows_at_kill in enumerate(counts, start=1):
        killed = rows(folder / f"killed_{number}")
        same_ids = [r["id"] for r in whole] == [r["id"] for r in killed]
        same_texts = sum(a["response"] == b["response"] for a, b in zip(whole, killed, strict=True))
        largest = max(
            abs((a["avg_entropy"] or 0) - (b["avg_entropy"] or 0)) for a, b in zip(whole, killed, strict=True)
        )
        print(
            f"kills: run {number}, rows at each kill {rows_at_kill}; resumed: ids and order equal {same_ids}, "
            f"{same_texts} of {len(whole)} responses equal, largest difference of avg_entropy {largest:.1e}"
        )


def ctrl_c(folder: Path) -> None:
    """Seconds from Ctrl-C to the end, once while the engine starts and once in the middle of generation."""
    import psutil

    for moment, n_rows in (("start", 0), ("generation", 2)):
        target = folder / f"ctrl_c_{moment}"
        process = subprocess.Popen(
            words(target, "--max_tokens", "400"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
        )  # fmt: skip
        started, path = time.monotonic(), target / "results.jsonl"
        while (time.monotonic() - started < 15) if not n_rows else (not path.exists() or len(rows(target)) < n_rows):
            time.sleep(0.05)
        pressed = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        code = process.wait()
        seconds = time.monotonic() - pressed
        left = [p.pid for p in psutil.process_iter() if _session_of(p.pid) == process.pid]
        print(f"ctrl-c during {moment}: ended after {seconds:.1f} s with exit code {code}, processes left: {left}")


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def formats() -> None:
    """bfloat16 against float32 on the same tokens, and how often the greedy tokens agree."""
    import torch

    from src.common.model_config import ModelConfigBase
    from src.common.rows import read_personas, read_prompts
    from src.models.chat_format import PersonaRenderer
    from src.models.language_model import LanguageModel, generate_all
    from src.models.types import GenerationRequest
    from src.ops.metrics import token_uncertainty

    def load(dtype: str) -> LanguageModel:
        return LanguageModel.load(ModelConfigBase(model_id=MODEL_ID, output_dir=Path("unused"), dtype=dtype))

    full, half = load("float32"), load("bfloat16")
    renderer = PersonaRenderer(full.tokenizer)
    prompts = read_prompts(ROOT / "data/personas/prompts.json")[:6]
    personas = read_personas(ROOT / "data/personas/personae.json")[:6]
    chats = [
        renderer.render([{"role": "user", "content": p.text}], x.persona, x.article) for p in prompts for x in personas
    ]
    requests = [GenerationRequest(id=str(i), token_ids=c.token_ids, max_tokens=48) for i, c in enumerate(chats)]
    differences, agree = [], []
    for request, result in zip(requests, generate_all(full, requests), strict=True):
        ids = torch.tensor([[*request.token_ids, *result.token_ids]])
        with torch.no_grad():
            logits = half.model(ids).logits[0, len(request.token_ids) - 1 : -1]
        differences += (token_uncertainty(logits).entropy - torch.tensor(result.entropy)).tolist()
        agree += (logits.argmax(-1) == torch.tensor(result.token_ids)).tolist()
    size = torch.tensor(differences)
    print(
        f"bfloat16 against float32 on {len(size)} equal tokens: |ΔH| mean {size.abs().mean():.4f}, largest "
        f"{size.abs().max():.3f}, bias {size.mean():.4f} nats; likeliest token agrees {sum(agree) / len(agree):.3f}"
    )


def memory(folder: Path) -> None:
    """Peak memory of 64 rows at 64 and at 384 tokens; the scores of all would be 4.8 GB then."""
    for n_tokens in ("64", "384"):
        target = folder / f"memory_{n_tokens}"
        more = ["--num_tasks", "8", "--num_personae", "8", "--batch_size", "256", "--max_tokens", n_tokens]
        run([*words(target), *more])
        session = json.loads((target / "provenance.json").read_text())["sessions"][-1]
        longest = max(r["num_tokens"] for r in rows(target))
        peak = session["peak_memory_mib"]["process"]
        print(f"memory: --max_tokens {n_tokens} (longest answer {longest}): {peak:.0f} MiB")


def answers(folder: Path) -> None:
    """Seconds to --help, a typo and a wrong path; the median of five."""
    good = words(folder / "answers")
    cases = {
        "--help": [*good[:3], "--help"],
        "typo": [*good, "--max_token", "3"],
        "wrong path": [*good, "--prompts_json", "nowhere.json"],
    }
    for name, command in cases.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            seconds.append(time.perf_counter() - started)
        print(
            f"answers: {name} in {sorted(seconds)[2]:.2f} s, exit code {done.returncode}: {done.stderr.strip()[:150]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=("answers", "kills", "ctrl_c", "formats", "memory"))
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    arguments = parser.parse_args()
    BACKEND[1] = arguments.backend
    steps = {
        "answers": lambda: answers(arguments.output_dir),
        "kills": lambda: kills(arguments.output_dir, arguments.kills, arguments.seed),
        "ctrl_c": lambda: ctrl_c(arguments.output_dir),
        "formats": formats,
        "memory": lambda: memory(arguments.output_dir),
    }
    for name in arguments.only or steps:
        steps[name]()


if __name__ == "__main__":
    main()
