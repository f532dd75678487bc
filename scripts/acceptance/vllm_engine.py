"""
The vLLM engine against the transformers engine: the same answers and the same uncertainty, also when prompts are taken
in chunks and when the cache is so small that requests are preempted. A few minutes:
uv run --extra cpu python scripts/acceptance/vllm_engine.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
VARIANTS = {
    "transformers": None,
    "vLLM": {},
    "vLLM, chunks of 64 tokens": {"max_num_batched_tokens": 64, "max_num_seqs": 64},
    "vLLM, a cache of 12 × 32 tokens": {
        "num_gpu_blocks_override": 12,
        "block_size": 32,
        "enable_prefix_caching": False,
    },
}


def requests(temperature: float) -> list:
    """8 personas × 6 prompts, 64 tokens each."""
    from src.common.rows import read_personas, read_prompts
    from src.models.bundled import bundled_folder
    from src.models.chat_format import PersonaRenderer
    from src.models.loading import load_tokenizer
    from src.models.types import GenerationRequest

    renderer = PersonaRenderer(load_tokenizer(bundled_folder(MODEL_ID)), "both")
    rendered = [
        renderer.render([{"role": "user", "content": prompt.text}], persona.persona, persona.article).token_ids
        for persona in read_personas(ROOT / "data/personas/personae.json")[:8]
        for prompt in read_prompts(ROOT / "data/personas/prompts.json", 6)
    ]
    return [
        GenerationRequest(id=str(i), token_ids=ids, max_tokens=64, temperature=temperature, seed=i)
        for i, ids in enumerate(rendered)
    ]


def answers(name: str) -> dict:
    """What one variant gives, greedy and drawn at temperature 1."""
    from src.common.engine_config import EngineConfigBase
    from src.models.language_model import LanguageModel, generate_all

    settings = {"model_id": MODEL_ID, "output_dir": Path("unused"), "dtype": "float32", "device": "cpu"}
    config = EngineConfigBase(**settings, max_model_len=256, kv_cache_gib=0.5)
    preempted = []
    if VARIANTS[name] is None:
        engine = LanguageModel.load(config)
    else:
        from src.models.vllm_engine import VLLMEngine

        engine = VLLMEngine.load(config, **VARIANTS[name])
        scheduler = engine._engine.engine_core.engine_core.scheduler
        plain = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (preempted.append(1), plain(request, *a, **k))
    with engine:
        results = {kind: generate_all(engine, requests(t)) for kind, t in (("greedy", 0.0), ("drawn", 1.0))}
    rows = {kind: [[r.token_ids, r.entropy, r.top_k_mass] for r in of_kind] for kind, of_kind in results.items()}
    return {"rows": rows, "preemptions": len(preempted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(answers(arguments.variant)))
        return
    gave = {}
    for name in VARIANTS:
        # Each in a process of its own: two engines share vLLM's global state.
        command = [sys.executable, __file__, "--variant", name]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        gave[name] = json.loads(output.strip().splitlines()[-1])
    print("| engine | tokens | rows identical: greedy | drawn | largest |ΔH| (nats) | largest |Δmass| | preemptions |")
    print("|---|---|---|---|---|---|---|")
    for name, given in list(gave.items())[1:]:
        pairs = {k: list(zip(given["rows"][k], gave["transformers"]["rows"][k], strict=True)) for k in given["rows"]}
        same = {kind: sum(a[0] == b[0] for a, b in of_kind) for kind, of_kind in pairs.items()}
        equal = [pair for of_kind in pairs.values() for pair in of_kind if pair[0][0] == pair[1][0]]
        largest = [max(abs(x - y) for a, b in equal for x, y in zip(a[i], b[i], strict=True)) for i in (1, 2)]
        tokens = sum(len(a[0]) for a, _ in equal)
        print(
            f"| {name} | {tokens} | {same['greedy']} of {len(pairs['greedy'])} | {same['drawn']} of "
            f"{len(pairs['drawn'])} | {largest[0]:.1e} | {largest[1]:.1e} | {given['preemptions']} |"
        )


if __name__ == "__main__":
    main()
