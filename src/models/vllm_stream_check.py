"""
The self-test of where the residual stream is. vLLM's layers pass on two tensors; in most models the next norm adds
them, in some the first is already the sum. The names do not tell, so it is tried: a rewriting that leaves the stream
what it was must leave the next token's distribution what it was.
"""

import math
from typing import Any

import numpy as np

from src.common.errors import CheckFailed
from src.common.resolved_interventions import ResolvedOperation, ResolvedSpec
from src.models.vllm_check import TEXT, all_log_probabilities

TOLERANCE = {"float32": 1e-5}
HALF_TOLERANCE = 0.05
"""
Divergence in nats; a wrong reading of the stream gives several. Not a largest difference: two right passes in bfloat16
are up to 0.7 nats apart in a log-probability of an unlikely token, and 0.001 in divergence.
"""
LEAST = -30.0
"""Log-probabilities below it are not compared."""
MOVED = 0.5
"""Divergence in nats by which a distribution is another one; models with random weights get nowhere near it."""
LEAST_MOVED = {"float32": 1e-4}
HALF_LEAST_MOVED = 0.05
"""Divergence in nats below which a change could be rounding."""
SAME_SHARE = 0.05
"""Of the divergence that interventions make: how far two right engines may be apart under them."""
READINGS = {"sum": True, "first": False}
"""Reading → whether the parts are to be added."""


def find_stream(loaded: Any) -> str | None:
    """
    Tell the workers how to read the residual stream. Returns why interventions and captures are not possible, None when
    they are.
    """
    call = loaded._engine.collective_rpc
    problems = [problem for problem in call("tiller_problem") if problem]
    if problems:
        return problems[0]
    ids = loaded.tokenizer(TEXT).input_ids[: max(1, loaded.room - 1)]
    plain = _next_token(loaded, ids)
    bar = TOLERANCE.get(str(loaded.facts["dtype"]), HALF_TOLERANCE)
    for reading, adds in READINGS.items():
        call("tiller_rewrite", args=(reading,))
        try:
            rewritten = _next_token(loaded, ids)
        finally:
            runs = call("tiller_rewrite", args=(None,))
        if not all(runs):
            return "vLLM's layers of this model run no hooks, or do not pass on one row a token"
        if _divergence(plain, rewritten) <= bar:
            return _read_as(loaded, adds)
    return "vLLM's layers of this model pass on the residual stream in a form that is not known"


def _read_as(loaded: Any, adds: bool) -> str | None:
    if loaded._states.declared and not adds:
        return "compiled, hidden states of this model cannot be told apart; --enforce_eager can"
    loaded._engine.collective_rpc("tiller_read_as", args=(adds,))
    return None


def check_compiled(loaded: Any) -> None:
    """
    Whether what was declared acts in the compiled model: a vector added everywhere must move the next token's
    distribution, and as it does where the model runs as it was written. Raises CheckFailed.
    """
    places = [*loaded._states.declared.adding, *loaded._states.declared.acting]
    ids = loaded.tokenizer(TEXT).input_ids[: max(1, loaded.room - 1)]
    plain = _next_token(loaded, ids)
    vector = np.random.default_rng(0).normal(size=loaded.d_model)
    direction = (vector / np.linalg.norm(vector)).astype(np.float32)
    for coefficient in (10.0, 100.0, 1000.0, 10000.0):
        fields = {"op": "add", "direction": direction, "coefficient": coefficient}
        steering = ResolvedSpec(
            operations=tuple(ResolvedOperation(layer=layer, hook_point=point, **fields) for layer, point in places)
        )
        compiled = _next_token(loaded, ids, steering)
        loaded._engine.collective_rpc("tiller_run_uncompiled", args=(True,))
        try:
            written = _next_token(loaded, ids, steering)
        finally:
            loaded._engine.collective_rpc("tiller_run_uncompiled", args=(False,))
        moved = _divergence(plain, written)
        if moved > MOVED:
            break
    least = LEAST_MOVED.get(str(loaded.facts["dtype"]), HALF_LEAST_MOVED)
    if not (moved >= least and _divergence(written, compiled) <= SAME_SHARE * moved):
        raise CheckFailed(
            f"in the compiled model interventions do not act as they should: they move the next token's distribution "
            f"by {_divergence(plain, compiled):.2g} nats and, run as it was written, by {moved:.2g} (the two are "
            f"{_divergence(written, compiled):.2g} apart); take --enforce_eager, and report vLLM's version"
        )


def _divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """KL(p ‖ q) in nats of two lists of log-probabilities; infinite where one is empty, as of logits that are NaN."""
    if not p or not q:
        return math.inf
    return sum(math.exp(value) * (value - q.get(token, LEAST)) for token, value in p.items())


def _next_token(loaded: Any, ids: list[int], steering: ResolvedSpec | None = None) -> dict[int, float]:
    completion = all_log_probabilities(loaded, ids, 1, steering=steering)
    found = zip(completion.logprobs.token_ids, completion.logprobs.logprobs, strict=True)
    return {token: value for token, value in found if value > LEAST}
