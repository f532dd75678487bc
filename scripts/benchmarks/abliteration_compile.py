"""
CPU seconds of a trial's forced pass, of decoding and of one norm, with compiled norms (--compile) against without, in
turns:
uv run python scripts/benchmarks/abliteration_compile.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def works(arguments: argparse.Namespace, model, edited_layer: int) -> dict[str, Callable[[], object]]:
    """What is timed: a pass over all given answers and greedy answers under one edit, and calls of one norm."""
    import torch

    from src.abliteration.forcing import Forced, force
    from src.models.architectures import final_norm
    from src.models.language_model import generate_all
    from src.models.residual_writers import residual_writers
    from src.models.types import GenerationRequest
    from src.models.weight_editor import editing
    from src.ops.weight_edits import WeightEdit

    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (arguments.prompts, 17 + arguments.tokens), generator=draws).tolist()
    forced = [Forced(str(i), tuple(each[:17]), tuple(each[17:])) for i, each in enumerate(ids)]
    writers = residual_writers(model.model)
    writer = next(each for each in writers if (each.layer, each.component) == (edited_layer, "mlp"))
    d, n = writer.writer.weight.shape
    u = torch.randn(d, 1, generator=draws)
    edit = WeightEdit(u=u / u.norm(), a=0.01 * torch.randn(1, n, generator=draws))

    def answers() -> object:
        requests = [
            GenerationRequest(id=each.id, token_ids=each.prompt, max_tokens=arguments.tokens) for each in forced
        ]
        with editing(model.model, writers, [{writer.name: edit}]):
            return generate_all(model, requests, batch_size=arguments.prompts)

    norm = final_norm(model.model)
    short, long = (torch.randn(arguments.prompts, n_tokens, d, generator=draws) for n_tokens in (1, len(ids[0])))

    return {
        "300 norms of a step": lambda: repeat(norm, short),
        "300 norms of a pass": lambda: repeat(norm, long),
        "forced pass": lambda: force(model, writers, [{writer.name: edit}], forced, lambda trial, i, logits: None),
        "decoding": answers,
    }


def repeat(norm: Callable, x: object) -> None:
    # Results that were kept would be timed as fresh memory.
    for _ in range(300):
        norm(x)


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    from src.common.model_config import ModelSettings
    from src.models.compiling import compiled_norms
    from src.models.cpu_linear import packed_linears
    from src.models.language_model import LanguageModel

    model = LanguageModel.load(ModelSettings(model_id="bundled:smollm2-135m", device="cpu"))
    found: dict[tuple[str, bool], list[float]] = {}
    with torch.inference_mode(), packed_linears(model.model):
        some = works(arguments, model, edited_layer=model.n_layers // 2)
        with compiled_norms(model.model) as n_norms:
            print(f"{n_norms} norms")
        for name, work in some.items():
            for round_number in range(arguments.rounds + 1):
                for is_compiled in (False, True) if round_number % 2 else (True, False):
                    with compiled_norms(model.model) if is_compiled else nullcontext():
                        taken = cpu_seconds(work)
                    # The first round is warm-up.
                    if round_number:
                        found.setdefault((name, is_compiled), []).append(taken)
            plain, compiled = found[name, False], found[name, True]
            ratios = [one / other for one, other in zip(compiled, plain, strict=True)]
            both = f"plain {statistics.median(plain):.2f}, compiled {statistics.median(compiled):.2f} CPU-s"
            print(f"{name}: {both}; ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
