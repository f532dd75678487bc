"""
Tokens a second and peak memory of src.models.residuals and src.models.vllm_residuals against
`output_hidden_states=True`, same model, same prompts, same float32, in one run:
OMP_NUM_THREADS=1 uv run --extra cpu python scripts/benchmarks/residuals.py

- `plain` is the usual loop: batches of 16 in the order given, padded on the left, a forward pass with
  `output_hidden_states=True`, the rows taken from what it returns.
- `careful` is the same loop with everything one can ask of it: sorted by length, batches of our token budget,
  `logits_to_keep=1`, no cache.
- `tiller` is `extract` with its defaults.
- `tiller on vLLM` is its like on vLLM in eager mode, with its defaults; left out where vLLM is not installed.

Each side and token position has a process of its own, so that each has its own peak memory. The sides take turns, a
pass each, `--passes` times; medians count. The prompts are data/personas' prompts and personas in the bundled model's
chat format. The last layer is left out of the comparison of rows: what transformers returns for it is after the final
norm.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
ON_VLLM = "tiller on vLLM"
SIDES = ("plain", "careful", "tiller", ON_VLLM)
POSITIONS = ("last_prompt", "mean_prompt")
PLAIN_BATCH_SIZE = 16
KV_CACHE_GIB = 0.5


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


def by_extract(extract: Callable[..., None], prompts: list[tuple[int, ...]], position: str):
    """Rows in the prompts' order, float32 (prompts, layers, d_model)."""
    import torch

    from src.models.token_sequences import TokenSequence

    rows = {}
    sequences = [TokenSequence(id=str(i), token_ids=p, prompt_length=len(p)) for i, p in enumerate(prompts)]
    extract(
        sequences=sequences, layers=range(30), position=position,
        on_rows=lambda ids, batch: rows.update(zip(ids, batch, strict=True)),
    )  # fmt: skip
    return torch.stack([rows[str(i)] for i in range(len(prompts))])


def reader(side: str, position: str) -> Callable[[list[tuple[int, ...]]], object]:
    """A loaded model: prompts → rows."""
    from functools import partial

    if side == ON_VLLM:
        from src.common.engine_config import EngineConfigBase
        from src.models import vllm_residuals
        from src.models.vllm_engine import VLLMEngine

        config = EngineConfigBase(
            model_id=MODEL_ID, output_dir=Path("unused"), dtype="float32", device="cpu", kv_cache_gib=KV_CACHE_GIB
        )
        engine = VLLMEngine.load(config)
        return lambda prompts: by_extract(partial(vllm_residuals.extract, engine), prompts, position)
    import torch
    from transformers import AutoModelForCausalLM

    from src.models import residuals
    from src.models.bundled import bundled_folder

    model = AutoModelForCausalLM.from_pretrained(bundled_folder(MODEL_ID), dtype=torch.float32).eval()
    if side == "tiller":
        return lambda prompts: by_extract(partial(residuals.extract, model), prompts, position)
    return lambda prompts: by_hidden_states(model, prompts, position, careful=side == "careful")


def run_side(side: str, position: str, n_prompts: int, rows_path: Path) -> None:
    """A pass for each line on stdin, its figures as a line on stdout; the last pass' rows go to a file."""
    import torch

    from src.common.provenance import peak_memory_mib

    prompts, read = rendered(n_prompts), reader(side, position)
    read(prompts[:1])
    loaded = peak_memory_mib()["process"]
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = read(prompts)
        facts = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "tokens": sum(map(len, prompts)),
            "loaded_mib": loaded,
            "peak_mib": peak_memory_mib()["process"],
        }
        torch.save(rows, rows_path)
        print(json.dumps(facts), flush=True)


class Side:
    """A side's process, its model loaded."""

    def __init__(self, side: str, position: str, n_prompts: int, rows_path: Path) -> None:
        words = [sys.executable, __file__, "--side", side, "--positions", position, "--prompts", str(n_prompts)]
        words += ["--rows_path", str(rows_path)]
        self.rows_path = rows_path
        self.passes: list[dict[str, float]] = []
        self._process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.passes.append(self._answer())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def each(self, unit: str) -> list[float]:
        """Tokens per second, or per CPU-second, of each pass."""
        return [facts["tokens"] / facts[unit] for facts in self.passes]

    def _answer(self) -> dict[str, float]:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"a side ended with {self._process.wait()}")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().split("\n") if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def report(position: str, sides: dict[str, Side], rows: dict) -> None:
    """One markdown row a side; ratios are of one round's passes. Rows differ by a share of their norm."""
    for name, side in sides.items():
        wall, cpu = (median(side.each(unit)) for unit in ("seconds", "cpu_seconds"))
        shown = []
        for other in ("plain", "careful", "tiller"):
            ratios = [a / b for a, b in zip(side.each("cpu_seconds"), sides[other].each("cpu_seconds"), strict=True)]
            shown.append(f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        last = side.passes[-1]
        difference = (rows[name] - rows["tiller"])[:, :-1].norm(dim=-1) / rows["tiller"][:, :-1].norm(dim=-1)
        print(
            f"| {position} | {name} | {wall:.0f} | {cpu:.0f} | {' | '.join(shown)} | {last['peak_mib']:.0f} "
            f"| {last['peak_mib'] - last['loaded_mib']:.0f} | {difference.max():.0e} |",
            flush=True,
        )


def measure(position: str, names: list[str], n_prompts: int, n_passes: int) -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(name, position, n_prompts, Path(folder) / f"{i}.pt") for i, name in enumerate(names)}
        for _ in range(n_passes):
            for name, side in sides.items():
                side.run()
                rate = side.each("cpu_seconds")[-1]
                print(f"{position}, {name}: {rate:.0f} tokens per CPU-second", file=sys.stderr, flush=True)
        for side in sides.values():
            side.end()
        report(position, sides, {name: torch.load(side.rows_path, weights_only=True) for name, side in sides.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=POSITIONS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows_path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.positions[0], arguments.prompts, arguments.rows_path)
        return
    import torch

    from src.models.engine import vllm_is_installed

    names = [name for name in SIDES if name != ON_VLLM or vllm_is_installed()]
    print(
        f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {MODEL_ID}, float32, all layers"
    )
    print(f"{arguments.prompts} prompts, {arguments.passes} passes\n")
    print(
        "| position | side | tokens/s | tokens per CPU-second | CPU time: times plain | times careful | times tiller "
        "| peak MiB | of it above the loaded model | rows differ from tiller's by |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for position in arguments.positions:
        measure(position, names, arguments.prompts, arguments.passes)


if __name__ == "__main__":
    main()
