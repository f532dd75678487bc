"""
The side of scripts/benchmarks/steering.py that runs our engine: KIND ("eager" or "compiled") and PROCESS ("steering"
for one that is to steer). Reads a job, then the work of each pass from stdin, as JSON.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULT = "RESULT "
SPARE_SLOTS = 8
"""Of the check at the start, which are not given back at once."""


def engine(kind: str, process: str, job: dict[str, Any], specs: list[Any]) -> Any:
    from src.common.engine_config import EngineConfigBase
    from src.models.vllm_compiled import declare
    from src.models.vllm_engine import VLLMEngine

    config = EngineConfigBase(
        output_dir=Path("unused"), model_id=job["model_id"], dtype="float32", device="cpu", compiled=kind == "compiled",
        max_model_len=512, kv_cache_gib=job["kv_cache_gib"],
    )  # fmt: skip
    declares = kind == "compiled" and process == "steering"
    declared = declare(specs, slots=len(job["prompts"]) + SPARE_SLOTS) if declares else None
    loaded = VLLMEngine.load(config, batch_size=len(job["prompts"]), declared=declared)
    # Nothing ends an answer.
    loaded.eos_ids = frozenset()
    return loaded


def spec(job: dict[str, Any], seed: int) -> Any:
    """Vectors of one length added at every layer, to every position; steering_vllm_lens.py adds those of seed 0."""
    import numpy as np

    from src.common.resolved_interventions import ResolvedOperation, ResolvedSpec

    vectors = np.random.default_rng(seed).normal(size=(job["n_layers"], job["d_model"]))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    added = partial(ResolvedOperation, hook_point="resid_post", op="add", coefficient=job["coefficient"])
    return ResolvedSpec(operations=tuple(added(layer=i, direction=vector) for i, vector in enumerate(vectors)))


def requests(job: dict[str, Any], specs: list[Any], work: str) -> list[Any]:
    """What a pass asks for."""
    from src.common.capture_spec import Capture
    from src.models.types import GenerationRequest

    keeps = work in ("mean", "all")
    places = tuple((layer, "resid_post") for layer in range(job["n_layers"]))
    capture = Capture(places=places, mean=work == "mean") if keeps else None
    asked = {"add": specs[:1] * len(specs), "distinct": specs}.get(work, [()] * len(specs))
    return [
        GenerationRequest(
            id=str(i), token_ids=tuple(ids), max_tokens=job["max_tokens"], capture=capture,
            interventions=asked[i],
        )
        for i, ids in enumerate(job["prompts"])
    ]  # fmt: skip


def timed(loaded: Any, asked: Sequence[Any]) -> dict[str, Any]:
    """One pass. Hidden states are let go of as they come."""
    rows: dict[str, tuple[int, ...]] = {}
    loaded._engine.reset_prefix_cache()
    began, cpu_began = time.perf_counter(), cpu_seconds()
    loaded.generate(asked, on_result=lambda result: rows.__setitem__(result.id, result.token_ids))
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": cpu_seconds() - cpu_began,
        "tokens": sum(map(len, rows.values())),
        "answers": [list(rows[request.id]) for request in asked],
    }


def take_out_hooks(loaded: Any) -> None:
    """As before the first request that steered or kept; the next one sets them anew. A compiled engine has none."""
    steering = loaded._engine.engine_core.engine_core.model_executor.driver_worker.worker.tiller_steering
    for handle in steering._hooks.values():
        handle.remove()
    steering._hooks.clear()


def set_hooks(loaded: Any, asked: Sequence[Any]) -> None:
    """Have a request of these set its hooks, for those that follow."""
    loaded.generate([replace(asked[0], max_tokens=1)], on_result=lambda result: None)


def cpu_seconds() -> float:
    """User and system time of this process and its children so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def main() -> None:
    kind, process = sys.argv[1:]
    job = json.loads(sys.stdin.readline())
    specs = [spec(job, seed) for seed in range(len(job["prompts"]))]
    with engine(kind, process, job, specs) as loaded:
        print(RESULT + "{}", flush=True)
        for line in sys.stdin:
            work = json.loads(line)
            if work == "plain":
                take_out_hooks(loaded)
            elif kind == "eager":
                set_hooks(loaded, requests(job, specs, "add"))
            print(RESULT + json.dumps(timed(loaded, requests(job, specs, work))), flush=True)


if __name__ == "__main__":
    main()
