"""
Tokens a second and peak memory of src.models.residuals against `output_hidden_states=True`, same model, same prompts,
same float32, in one run:
uv run python scripts/benchmarks/residuals.py

- `plain` is the usual loop: batches of 16 in the order given, padded on the left, a forward pass with
  `output_hidden_states=True`, the rows taken from what it returns.
- `careful` is the same loop with everything one can ask of it: sorted by length, batches of our token budget,
  `logits_to_keep=1`, no cache.
- `tiller` is `extract` with its defaults.

Each side and token position runs in a process of its own, so that each has its own peak memory. The prompts are
data/personas' prompts and personas in the bundled model's chat format. The last layer is left out of the comparison of
rows: what transformers returns for it is after the final norm.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
SIDES = ("plain", "careful", "tiller")
POSITIONS = ("last_prompt", "mean_prompt")
PLAIN_BATCH_SIZE = 16


def rendered(n: int) -> list[tuple[int, ...]]:
    """`n` prompts as token ids, personas and questions in turn."""
    from src.common.rows import read_personas, read_prompts
    from src.models.bundled import bundled_folder
    from src.models.chat_format import PersonaRenderer
    from src.models.loading import load_tokenizer

    prompts = read_prompts(ROOT / "data/personas/prompts.json")
    personas = read_personas(ROOT / "data/personas/personae.json")
    renderer = PersonaRenderer(load_tokenizer(bundled_folder(MODEL_ID)), "both")
    # Another persona each time the questions begin anew.
    pairs = [(prompts[i % len(prompts)], personas[(i + i // len(prompts)) % len(personas)]) for i in range(n)]
    return [renderer.render(prompt.text, p.persona, p.article).token_ids for prompt, p in pairs]


def by_hidden_states(model, prompts: list[tuple[int, ...]], position: str, careful: bool):
    """Rows in the prompts' order, float32 (prompts, layers, d_model)."""
    import torch

    from src.models.generation import left_padded
    from src.models.residuals import TOKENS_PER_BATCH

    rows, extra = {}, {"logits_to_keep": 1, "use_cache": False} if careful else {}
    queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if careful else list(range(len(prompts)))
    while queue:
        n_rows = max(1, TOKENS_PER_BATCH // len(prompts[queue[0]])) if careful else PLAIN_BATCH_SIZE
        batch, queue = queue[:n_rows], queue[n_rows:]
        ids, mask = left_padded([prompts[i] for i in batch], 2, model.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, **extra
            )
            states = output.hidden_states[1:]
            if position == "last_prompt":
                taken = torch.stack([h[:, -1] for h in states], dim=1)
            else:
                weights = (mask / mask.sum(1, keepdim=True))[:, :, None]
                taken = torch.stack([(h * weights).sum(1) for h in states], dim=1)
        rows |= dict(zip(batch, taken, strict=True))
    return torch.stack([rows[i] for i in range(len(prompts))])


def by_hooks(model, prompts: list[tuple[int, ...]], position: str):
    """Rows in the prompts' order, float32 (prompts, layers, d_model)."""
    import torch

    from src.models.residuals import extract
    from src.models.token_sequences import TokenSequence

    rows = {}
    sequences = [TokenSequence(id=str(i), token_ids=p, prompt_length=len(p)) for i, p in enumerate(prompts)]
    extract(
        model, sequences, layers=range(30), position=position,
        on_rows=lambda ids, batch: rows.update(zip(ids, batch, strict=True)),
    )  # fmt: skip
    return torch.stack([rows[str(i)] for i in range(len(prompts))])


def run_side(side: str, position: str, n_prompts: int, rows_path: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from src.models.bundled import bundled_folder

    model = AutoModelForCausalLM.from_pretrained(bundled_folder(MODEL_ID), dtype=torch.float32).eval()
    prompts = rendered(n_prompts)
    with torch.no_grad():
        model(input_ids=torch.tensor([prompts[0]]))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu_started = time.perf_counter(), time.process_time()
    rows = by_hooks(model, prompts, position) if side == "tiller" else by_hidden_states(
        model, prompts, position, careful=side == "careful"
    )  # fmt: skip
    facts = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "tokens": sum(map(len, prompts)),
        "loaded_mib": loaded,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
    }
    torch.save(rows, rows_path)
    return facts


def measured(side: str, position: str, n_prompts: int, rows_path: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--side", side, "--positions", position, "--prompts", str(n_prompts)]
    words += ["--rows_path", str(rows_path)]
    output = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().split("\n")[-1])


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().split("\n") if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def report(position: str, sides: dict[str, dict[str, float]], rows: dict) -> None:
    """One markdown row a side, then how far the rows are apart, as a share of their norm, all layers but the last."""
    ours = sides["tiller"]
    for side, facts in sides.items():
        wall, cpu = (facts["tokens"] / facts[unit] for unit in ("seconds", "cpu_seconds"))
        by_wall, by_cpu = (facts[unit] / ours[unit] for unit in ("seconds", "cpu_seconds"))
        difference = (rows[side] - rows["tiller"])[:, :-1].norm(dim=-1) / rows["tiller"][:, :-1].norm(dim=-1)
        print(
            f"| {position} | {side} | {wall:.0f} | {cpu:.0f} | {by_wall:.2f} | {by_cpu:.2f} | {facts['peak_mib']:.0f} "
            f"| {facts['peak_mib'] - facts['loaded_mib']:.0f} | {difference.max():.0e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=POSITIONS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows_path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.positions[0], arguments.prompts, arguments.rows_path)))
        return
    import torch

    print(
        f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {MODEL_ID}, float32, all layers"
    )
    print(f"{arguments.prompts} prompts\n")
    print(
        "| position | side | tokens/s | tokens per CPU-second | tiller is faster by: clock | CPU time | peak MiB "
        "| of it above the loaded model | rows differ from tiller's by |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for position in arguments.positions:
        with tempfile.TemporaryDirectory() as folder:
            paths = {side: Path(folder) / f"{side}.pt" for side in SIDES}
            sides = {side: measured(side, position, arguments.prompts, path) for side, path in paths.items()}
            report(position, sides, {side: torch.load(path, weights_only=True) for side, path in paths.items()})


if __name__ == "__main__":
    main()
