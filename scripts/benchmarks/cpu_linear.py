"""
Tokens a second with float32 products through oneDNN against PyTorch's own (MKL), same model and rows, in one run:
uv run python scripts/benchmarks/cpu_linear.py
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def seconds(model, n_rows: int, n_tokens: int, packed: bool) -> float:
    """CPU seconds to decode, packing included."""
    import torch

    from src.models.cpu_linear import packed_linears
    from src.models.kv_cache import growing_cache

    ids = torch.full((n_rows, 32), 100)
    cache = growing_cache(model.config)
    started = time.process_time()
    with torch.inference_mode(), packed_linears(model) if packed else nullcontext():
        for _ in range(n_tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    from src.models.bundled import bundled_folder

    model = AutoModelForCausalLM.from_pretrained(bundled_folder("bundled:smollm2-135m"), dtype=torch.float32).eval()
    seconds(model, 8, 2, packed=False)
    for n_rows in arguments.rows:
        plain, packed = (seconds(model, n_rows, arguments.tokens, packed) for packed in (False, True))
        took = f"MKL {plain:.1f}, oneDNN {packed:.1f} CPU-s"
        print(f"{n_rows} rows × {arguments.tokens} tokens: {took}, {plain / packed:.2f}×")


if __name__ == "__main__":
    main()
