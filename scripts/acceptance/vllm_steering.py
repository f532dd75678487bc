"""
Fourteen requests of seven kinds (plain, a vector at one layer and at two, ablation, caps at two layers, from the last
prompt token on, under a condition) in one batch on vLLM, prompts in chunks of 64 tokens, against the same in
transformers with hooks: answers, and hidden states at every position of the layers that are acted on and the last. Ten
minutes:
uv run --extra cpu python scripts/acceptance/vllm_steering.py
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small village where everyone knew each other, and in it a baker who rose before the "
    "sun did and who sang while the dough was rising, so that all the neighbours knew what bread there would be. "
    "One day the oven would not be lit, and nobody in the whole village could say why that was so.",
    "def f(x):",
    "In 1492 the weather was",
)
MIN_COSINE, MAX_ERROR, MAX_ENTROPY_ERROR, MAX_GATE_ERROR = 0.99999, 1e-4, 1e-3, 1e-3


@dataclass
class Part:
    """One engine to be compared."""

    config: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    keeps: bool = True
    """Whether it can keep hidden states."""
    max_tokens: int = 16


CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 14}
PARTS = {
    "one batch": Part(engine_args=CHUNKS),
    "preempted": Part(
        engine_args=CHUNKS | {"num_gpu_blocks_override": 12, "block_size": 32, "enable_prefix_caching": False},
        # Long enough that requests outgrow the blocks they begin with.
        max_tokens=40,
    ),
    "three devices": Part({"tensor_parallel_size": 3}, CHUNKS, {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"}),
    "two devices": Part({"tensor_parallel_size": 2}, CHUNKS, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "two stages": Part({"pipeline_parallel_size": 2}, CHUNKS, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "compiled": Part({"compiled": True}, CHUNKS, keeps=False),
    "bfloat16": Part({"dtype": "bfloat16"}, CHUNKS),
}


def tiny_qwen3(folder: Path) -> Path:
    """A random Qwen3 of four layers with the bundled model's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from src.models.bundled import bundled_folder
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(bundled_folder("bundled:smollm2-135m"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=192, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def requests_for(model: Any, n_tokens: int) -> list:
    """The requests for a model of any depth and width; vectors as long as its hidden states are at each layer."""
    import numpy as np
    import torch

    from src.common.capture_spec import Capture
    from src.common.interventions import Window
    from src.common.resolved_interventions import ResolvedOperation, ResolvedSpec
    from src.models.architectures import decoder_layers
    from src.models.hooks import reading
    from src.models.types import GenerationRequest

    ids = [tuple(model.tokenizer(text).input_ids) for text in TEXTS]
    n_layers = len(decoder_layers(model.model))
    early, middle, late = (round(n_layers * share) for share in (0.27, 0.4, 0.67))
    norms: dict[int, float] = {}

    def note(layer: int):
        return lambda hidden: norms.__setitem__(layer, hidden[0, 1:].norm(dim=-1).median().item())

    places = sorted({early, middle, late, n_layers - 1})
    with torch.inference_mode(), reading(model.model, {(layer, "resid_post"): note(layer) for layer in places}):
        model.model(torch.tensor([ids[1]]))
    d_model = model.model.config.get_text_config(decoder=True).hidden_size

    def act(op: str, layer: int, seed: int, **numbers: Any) -> ResolvedOperation:
        vector = np.random.default_rng(seed).normal(size=d_model)
        scaled = {name: value * norms[layer] if op != "ablate" else value for name, value in numbers.items()
                  if not isinstance(value, Window)}  # fmt: skip
        windows = {name: value for name, value in numbers.items() if isinstance(value, Window)}
        direction = (vector / np.linalg.norm(vector)).astype(np.float32)
        return ResolvedOperation(layer=layer, hook_point="resid_post", op=op, direction=direction, **scaled, **windows)

    kinds: list[tuple] = [
        (),
        (act("add", early, 1, coefficient=0.6),),
        (act("add", early, 1, coefficient=0.4), act("add", late, 2, coefficient=0.6)),
        (act("ablate", middle, 3, coefficient=1.0),),
        (act("cap", early, 4, lo=-0.01, hi=0.01), act("cap", middle, 5, hi=0.0)),
        (act("add", middle, 6, coefficient=1.0, positions=Window(start=-1)),),
        (
            replace(
                act("add", late, 7, coefficient=0.8), condition=above_zero(early, act("ablate", early, 8).direction)
            ),
        ),
    ]
    capture = Capture(places=tuple((layer, "resid_post") for layer in places))
    return [
        GenerationRequest(
            id=f"{i:02d}", token_ids=ids[i % 4], max_tokens=n_tokens, capture=capture,
            interventions=ResolvedSpec(operations=kinds[i % 7]) if kinds[i % 7] else (),
        )
        for i in range(14)
    ]  # fmt: skip


def above_zero(layer: int, direction: Any) -> Any:
    """A condition that about half of all tokens meet."""
    from src.common.resolved_interventions import ResolvedCondition

    return ResolvedCondition(layer=layer, hook_point="resid_post", direction=direction, above=0.0, below=None)


def compare(part: Part, model_id: str) -> dict[str, Any]:
    """One engine against transformers."""
    from src.common.engine_config import EngineConfigBase
    from src.models.language_model import LanguageModel, generate_all
    from src.models.vllm_compiled import declare
    from src.models.vllm_engine import VLLMEngine

    settings = {"model_id": model_id, "output_dir": Path("unused"), "dtype": "float32", "device": "cpu"}
    config = EngineConfigBase(**(settings | {"max_model_len": 256, "kv_cache_gib": 0.25} | part.config))
    model = LanguageModel.load(config)
    requests = requests_for(model, part.max_tokens)
    expected = generate_all(model, [replace(r, capture=None) for r in requests])
    specs = [request.spec for request in requests if request.spec]
    declared = declare(specs) if config.compiled else None
    preempted: list[int] = []
    with VLLMEngine.load(config, declared=declared, **part.engine_args) as engine:
        scheduler = engine._engine.engine_core.engine_core.scheduler
        plain = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (preempted.append(1), plain(request, *a, **k))
        asked = requests if part.keeps else [replace(r, capture=None) for r in requests]
        results = generate_all(engine, asked)
    found = {
        "rows": len(results),
        "identical": sum(a.token_ids == b.token_ids for a, b in zip(results, expected, strict=True)),
        "distinct": len({r.token_ids for r in expected}),
        "preemptions": len(preempted),
        "entropy_error": largest(
            abs(x - y)
            for a, b in zip(results, expected, strict=True)
            if a.token_ids == b.token_ids
            for x, y in zip(a.entropy, b.entropy, strict=True)
        ),
        "gate_error": largest(
            abs(x - y) / max(map(abs, ours))
            for a, b in zip(results, expected, strict=True)
            if a.token_ids == b.token_ids
            for ours, theirs in zip(a.gates, b.gates, strict=True)
            for x, y in zip(ours, theirs, strict=True)
        ),
    }
    return found | (states_of(model, requests, results) if part.keeps else {})


def largest(values: Iterable[float]) -> float:
    """NaN for none: in bfloat16 no answer may be the same to its end."""
    return max(values, default=math.nan)


def states_of(model: Any, requests: list, results: list) -> dict[str, Any]:
    """Captures against a forward pass of transformers over the same tokens: layer → [least cosine, mean error]."""
    import torch

    from src.models.parity import direct

    found: dict[str, list[float]] = {}
    for request, result in zip(requests, results, strict=True):
        expected = direct(model, request, result.token_ids)
        n = len(request.token_ids) + len(result.token_ids) - (result.finish_reason == "length")
        for name, states in result.captures.items():
            assert len(states) == n, f"{request.id} at {name}: {len(states)} rows, expected {n}"
            ours, theirs = states.float(), expected[name][:n].float()
            cosine = torch.cosine_similarity(ours, theirs, dim=-1).min().item()
            error = (ours - theirs).abs().mean().item()
            worst = found.setdefault(name, [1.0, 0.0])
            found[name] = [min(worst[0], cosine), max(worst[1], error)]
    return {"states": found}


def is_right(name: str, found: dict[str, Any]) -> bool:
    """Whether a part meets the bars; bfloat16 is only reported."""
    if name == "bfloat16":
        return True
    right = found["identical"] == found["rows"] and found["entropy_error"] <= MAX_ENTROPY_ERROR
    right = right and found["gate_error"] <= MAX_GATE_ERROR
    right = right and (name != "preempted" or found["preemptions"] > 0)
    return right and all(
        cosine >= MIN_COSINE and error <= MAX_ERROR for cosine, error in found.get("states", {}).values()
    )


def row_of(name: str, found: dict[str, Any]) -> str:
    states = found.get("states", {})
    cells = "; ".join(f"{layer.split('.')[0]}: {c:.7f} / {e:.1e}" for layer, (c, e) in states.items()) or "not kept"
    verdict = "yes" if is_right(name, found) else "NO"
    return (
        f"| {name} | {found['identical']} of {found['rows']} | {found['entropy_error']:.1e} | {cells} | "
        f"{found['preemptions']} | {verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="bundled:smollm2-135m", help="or `tiny_qwen3`, made on the way")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[p for p in PARTS if p != "two devices"])
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        with tempfile.TemporaryDirectory() as folder:
            model_id = str(tiny_qwen3(Path(folder))) if arguments.model_id == "tiny_qwen3" else arguments.model_id
            print(json.dumps(compare(PARTS[arguments.here], model_id)))
        return
    print("| engine | rows identical | largest ΔH (nats) | layer: least cosine / mean error | preemptions | right |")
    print("|---|---|---|---|---|---|")
    right = True
    for name in arguments.parts:
        # Each in a process of its own: two engines share vLLM's global state.
        command = [sys.executable, __file__, "--here", name, "--model_id", arguments.model_id]
        process = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, **PARTS[name].environment},
        )  # fmt: skip
        if process.returncode:
            sys.exit(f"{name}:\n{process.stderr[-3000:]}")
        found = json.loads(process.stdout.strip().splitlines()[-1])
        right = right and is_right(name, found)
        print(row_of(name, found), flush=True)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
