"""
Tokens a second of src.run_personas against a plain loop, same model, same tasks, same float32, in one run:
uv run python scripts/benchmarks/personas.py --output_dir data/experiments/benchmark_personas

The plain loop is what one would write on transformers: one persona a batch, `generate(output_scores=True)`, entropy
and top-k mass afterwards from the stacked scores. Each side runs in a process of its own, so that each has its own
peak memory; loading is timed apart. Both stop at an end of sequence; tokens are counted alike, without it.
"""

import argparse
import json
import resource
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


def tiller(max_tokens: int, passes: int) -> dict[str, object]:
    from src.common.model_config import ModelConfigBase
    from src.models.language_model import LanguageModel, generate_all
    from src.models.types import GenerationRequest

    model = LanguageModel.load(
        ModelConfigBase(model_id=MODEL_ID, output_dir=Path("unused"), dtype="float32", device="cpu")
    )
    prompts = [ids for batch in rendered() for ids in batch]
    requests = [GenerationRequest(id=str(i), token_ids=ids, max_tokens=max_tokens) for i, ids in enumerate(prompts)]
    seconds, cpu_seconds = [], []
    for _ in range(passes):
        started, cpu_started = time.perf_counter(), time.process_time()
        results = generate_all(model, requests)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return report([[list(r.token_ids), list(r.entropy), list(r.top_k_mass)] for r in results], seconds, cpu_seconds)


def report(rows: list[list[list]], seconds: list[float], cpu_seconds: list[float]) -> dict[str, object]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = sum(len(row[0]) for row in rows)
    return {"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "peak_mib": peak}


def measured(side: str, max_tokens: int, passes: int) -> dict:
    words = [sys.executable, __file__, "--side", side, "--max_tokens", str(max_tokens), "--passes", str(passes)]
    output = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().split("\n")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where personas_benchmark.json goes")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3, help="timed passes; the median counts")
    parser.add_argument("--side", choices=("plain", "tiller"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = plain_loop if arguments.side == "plain" else tiller
        print(json.dumps(side(arguments.max_tokens, arguments.passes)))
        return
    if not arguments.output_dir:
        parser.error("--output_dir is required")
    sides = {side: measured(side, arguments.max_tokens, arguments.passes) for side in ("plain", "tiller")}
    equal = [a[0] == b[0] for a, b in zip(sides["plain"]["rows"], sides["tiller"]["rows"], strict=True)]
    differences = [
        abs(x - y)
        for a, b, same in zip(sides["plain"]["rows"], sides["tiller"]["rows"], equal, strict=True)
        if same
        for x, y in zip(a[1], b[1], strict=True)
    ]
    print("| side | tokens | seconds (each pass) | tokens/s (median) | tokens per CPU-second (median) | peak MiB |")
    print("|---|---|---|---|---|---|")
    rates = {}
    for side, facts in sides.items():
        wall, cpu = (facts["tokens"] / median(facts[unit]) for unit in ("seconds", "cpu_seconds"))
        rates[side] = wall, cpu
        passes = ", ".join(f"{s:.1f}" for s in facts["seconds"])
        print(f"| {side} | {facts['tokens']} | {passes} | {wall:.1f} | {cpu:.1f} | {facts['peak_mib']:.0f} |")
    by_wall, by_cpu = (ours / theirs for ours, theirs in zip(rates["tiller"], rates["plain"], strict=True))
    print(
        f"ratio {by_wall:.2f} by the clock, {by_cpu:.2f} by CPU time; {sum(equal)} of {len(equal)} rows with identical "
        f"tokens; largest entropy difference in them {max(differences):.1e} nats"
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "personas_benchmark.json").write_text(json.dumps(sides))
    print(f"wrote {arguments.output_dir / 'personas_benchmark.json'}  both sides' rows and times")


if __name__ == "__main__":
    main()
