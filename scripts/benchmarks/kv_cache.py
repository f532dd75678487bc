"""
Seconds to decode with keys and values that grow in place against transformers' concatenating cache, in one run:
uv run python scripts/benchmarks/kv_cache.py
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def seconds(model, cache, n_rows: int, n_tokens: int) -> float:
    import torch

    ids = torch.full((n_rows, 32), 100)
    with torch.inference_mode():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        started = time.perf_counter()
        for _ in range(n_tokens):
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192)
    arguments = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from src.models.bundled import bundled_folder
    from src.models.kv_cache import growing_cache

    model = AutoModelForCausalLM.from_pretrained(bundled_folder("bundled:smollm2-135m"), dtype=torch.float32).eval()
    kinds = {"concatenating": lambda: DynamicCache(config=model.config), "growing": lambda: growing_cache(model.config)}
    taken = {name: seconds(model, make(), arguments.rows, arguments.tokens) for name, make in kinds.items()}
    for name, value in taken.items():
        print(f"{name}: {value:.1f} s for {arguments.rows} rows × {arguments.tokens} tokens")
    print(f"ratio {taken['concatenating'] / taken['growing']:.2f}")


if __name__ == "__main__":
    main()
