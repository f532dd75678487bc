"""
The side of scripts/benchmarks/steering.py that runs vllm-lens, or vLLM without it, in an environment of their own; so
nothing of this repository is imported. Reads a job, then the work of each pass from stdin, as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

RESULT = "RESULT "


def engine(job: dict[str, Any]) -> LLM:
    return LLM(
        model=job["folder"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=512,
        max_num_seqs=len(job["prompts"]), kv_cache_memory_bytes=int(job["kv_cache_gib"] * 2**30),
        disable_log_stats=True, generation_config="vllm",
    )  # fmt: skip


def steering(job: dict[str, Any]) -> Any:
    """The vectors of spec 0 of steering.py."""
    from vllm_lens import SteeringVector

    vectors = np.random.default_rng(0).normal(size=(job["n_layers"], job["d_model"]))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    layers = list(range(job["n_layers"]))
    return SteeringVector(activations=torch.from_numpy(vectors), layer_indices=layers, scale=job["coefficient"])


def asked(job: dict[str, Any], work: str) -> Callable[[], SamplingParams]:
    """Makes the parameters of one request; vllm-lens takes from them what it has read."""
    extra: dict[str, Any] = {}
    if work == "add":
        extra = {"apply_steering_vectors": [steering(job)]}
    elif work == "all":
        extra = {"output_residual_stream": list(range(job["n_layers"]))}
    return lambda: SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, extra_args=dict(extra)
    )


def timed(llm: LLM, job: dict[str, Any], work: str) -> dict[str, Any]:
    """One pass."""
    make = asked(job, work)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    params = [make() for _ in prompts]
    llm.reset_prefix_cache()
    began, cpu_began = time.perf_counter(), cpu_seconds()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    kept = [output.activations["residual_stream"] for output in outputs] if work == "all" else []
    for states, ids in zip(kept, job["prompts"], strict=False):
        assert states.shape[:2] == (job["n_layers"], len(ids) + job["max_tokens"] - 1), states.shape
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": sum(map(len, answers)),
        "answers": answers,
    }


def cpu_seconds() -> float:
    """User and system time of this process and its children so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    llm = engine(job)
    print(RESULT + "{}", flush=True)
    for line in sys.stdin:
        print(RESULT + json.dumps(timed(llm, job, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
