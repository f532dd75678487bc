"""
Tokens a second of src.run_personas against a plain loop, same model, same tasks, same float32, in one run:
uv run python scripts/benchmarks/personas.py --output_dir data/experiments/benchmark_personas
uv run --extra cpu python scripts/benchmarks/personas.py --backend vllm --output_dir data/experiments/benchmark_vllm

With --backend vllm two sides come in: our engine on vLLM, and the same engine without uncertainty, as one would call
vLLM for the text alone. There it is 8 personas × 6 prompts, and a warm-up pass is not counted.

The plain loop is what one would write on transformers: one persona a batch, `generate(output_scores=True)`, entropy
and top-k mass afterwards from the stacked scores. Each side runs in a process of its own, so that each has its own
peak memory; loading is timed apart. Both stop at an end of sequence; tokens are counted alike, without it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PERSONAS = ["assistant", "Hamlet", "pirate", "physicist", "grandmother", "river", "robot", "poet"]
PROMPTS = [
    "What do you fear most?",
    "Tell me about the sea in winter.",
    "How would you explain 12 times 9 to a child?",
    "Describe your morning.",
    "Should one always tell the truth?",
    "How do you bake bread?",
    "What is a good life?",
    "Give advice to a young person.",
]
MODEL_ID = "bundled:smollm2-135m"
WARM_UP = 1
"""First passes that are not counted."""


def rendered() -> list[list[tuple[int, ...]]]:
    """Prompts of each persona as token ids, rendered by the same code for both sides."""
    from src.models.bundled import bundled_folder
    from src.models.chat_format import PersonaRenderer
    from src.models.loading import load_tokenizer

    renderer = PersonaRenderer(load_tokenizer(bundled_folder(MODEL_ID)), "both")
    return [
        [renderer.render([{"role": "user", "content": q}], persona, "a").token_ids for q in PROMPTS]
        for persona in PERSONAS
    ]


def plain_loop(max_tokens: int, passes: int) -> dict[str, object]:
    import torch
    from transformers import AutoModelForCausalLM

    from src.models.bundled import bundled_folder
    from src.models.generation import left_padded

    model = AutoModelForCausalLM.from_pretrained(bundled_folder(MODEL_ID), dtype=torch.float32).eval()
    batches = rendered()
    seconds, cpu_seconds = [], []
    for _ in range(passes):
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = []
        for batch in batches:
            ids, mask = left_padded(batch, 2, model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, output_scores=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
                log_p = torch.stack(output.scores).float().log_softmax(-1)
                entropy = -(log_p.exp() * log_p).nan_to_num(0).sum(-1)
                mass = log_p.exp().topk(5, -1).values.sum(-1)
            for i, sequence in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
                length = sequence.index(2) if 2 in sequence else len(sequence)
                rows.append([sequence[:length], entropy[:length, i].tolist(), mass[:length, i].tolist()])
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return report(rows, seconds, cpu_seconds)


def requests(max_tokens: int) -> list:
    from src.models.types import GenerationRequest

    prompts = [ids for batch in rendered() for ids in batch]
    return [GenerationRequest(id=str(i), token_ids=ids, max_tokens=max_tokens) for i, ids in enumerate(prompts)]


def engine(backend: str):
    from src.common.engine_config import EngineConfigBase
    from src.models.engine import load_engine

    settings = {"model_id": MODEL_ID, "dtype": "float32", "device": "cpu", "backend": backend}
    return load_engine(EngineConfigBase(output_dir=Path("unused"), **settings), 256)


def ours(backend: str, max_tokens: int, passes: int) -> dict[str, object]:
    from src.models.language_model import generate_all

    seconds, cpu_seconds = [], []
    with engine(backend) as model:
        for _ in range(passes):
            started, cpu_started = time.perf_counter(), time.process_time()
            results = generate_all(model, requests(max_tokens))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    return report([[list(r.token_ids), list(r.entropy), list(r.top_k_mass)] for r in results], seconds, cpu_seconds)


def vllm_alone(max_tokens: int, passes: int) -> dict[str, object]:
    """The same engine asked for tokens only: no log-probabilities, and vLLM's own sampler."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    seconds, cpu_seconds = [], []
    with engine("vllm") as model:
        inner = model._engine
        for _ in range(passes):
            started, cpu_started = time.perf_counter(), time.process_time()
            rows: dict[str, list] = {}
            for request in requests(max_tokens):
                params = SamplingParams(
                    temperature=0.0, max_tokens=max_tokens, stop_token_ids=[2], ignore_eos=True, detokenize=False
                )
                inner.add_request(request.id, tokens_input(list(request.token_ids)), params)
            while inner.has_unfinished_requests():
                for output in inner.step():
                    if output.finished:
                        tokens = [token for token in output.outputs[0].token_ids if token != 2]
                        rows[output.request_id] = [tokens, [0.0] * len(tokens), [0.0] * len(tokens)]
            texts = [model.decode(row[0]) for row in rows.values()]
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    assert len(texts) == len(rows)
    return report([rows[str(i)] for i in range(len(rows))], seconds, cpu_seconds)


SIDES = {
    "plain": plain_loop,
    "tiller": lambda max_tokens, passes: ours("hf", max_tokens, passes),
    "tiller on vLLM": lambda max_tokens, passes: ours("vllm", max_tokens, passes),
    "vLLM, text only": vllm_alone,
}


def report(rows: list[list[list]], seconds: list[float], cpu_seconds: list[float]) -> dict[str, object]:
    from src.common.provenance import peak_memory_mib

    seconds, cpu_seconds = seconds[WARM_UP:], cpu_seconds[WARM_UP:]
    peak = peak_memory_mib()["process"]
    tokens = sum(len(row[0]) for row in rows)
    return {"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "peak_mib": peak}


def measured(side: str, max_tokens: int, passes: int) -> dict:
    words = [sys.executable, __file__, "--side", side, "--max_tokens", str(max_tokens), "--passes", str(passes)]
    words += ["--prompts", str(len(PROMPTS))]
    output = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().split("\n")[-1])


def compare(sides: dict[str, dict], ours: str, other: str) -> None:
    """Print how `ours` relates to `other`, and whether they gave the same."""
    by_wall, by_cpu = (
        (sides[ours]["tokens"] / median(sides[ours][unit])) / (sides[other]["tokens"] / median(sides[other][unit]))
        for unit in ("seconds", "cpu_seconds")
    )
    pairs = list(zip(sides[ours]["rows"], sides[other]["rows"], strict=True))
    equal = [(a, b) for a, b in pairs if a[0] == b[0]]
    line = f"{ours} / {other}: {by_wall:.2f} by the clock, {by_cpu:.2f} by CPU time; "
    line += f"{len(equal)} of {len(pairs)} rows with identical tokens"
    if other != "vLLM, text only":
        difference = max(abs(x - y) for a, b in equal for x, y in zip(a[1], b[1], strict=True))
        line += f"; largest entropy difference in them {difference:.1e} nats"
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where personas_benchmark.json goes")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5, help="timed passes; the median counts")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    del PROMPTS[arguments.prompts or (8 if arguments.backend == "hf" else 6) :]
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.max_tokens, arguments.passes + WARM_UP)))
        return
    if not arguments.output_dir:
        parser.error("--output_dir is required")
    names = list(SIDES) if arguments.backend == "vllm" else ["plain", "tiller"]
    sides = {side: measured(side, arguments.max_tokens, arguments.passes) for side in names}
    print("| side | tokens | seconds (each pass) | tokens/s (median) | tokens per CPU-second (median) | peak MiB |")
    print("|---|---|---|---|---|---|")
    for side, facts in sides.items():
        wall, cpu = (facts["tokens"] / median(facts[unit]) for unit in ("seconds", "cpu_seconds"))
        passes = ", ".join(f"{s:.1f}" for s in facts["seconds"])
        print(f"| {side} | {facts['tokens']} | {passes} | {wall:.1f} | {cpu:.1f} | {facts['peak_mib']:.0f} |")
    compared = "tiller on vLLM" if arguments.backend == "vllm" else "tiller"
    for other in (name for name in names if name != compared):
        compare(sides, compared, other)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "personas_benchmark.json").write_text(json.dumps(sides))
    print(f"wrote {arguments.output_dir / 'personas_benchmark.json'}  every side's rows and times")


if __name__ == "__main__":
    main()
