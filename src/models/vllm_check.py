"""The self-test at start: the uncertainty that comes out of the engine against a direct computation."""

import math
from collections.abc import Sequence
from typing import Any

from src.common.errors import CheckFailed, InputError
from src.common.resolved_interventions import ResolvedSpec
from src.models.types import GenerationRequest

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time there was"
N_TOKENS = 2
KS = (5, 1, 9)
TOLERANCE = {"float32": (1e-3, 1e-4)}
"""Largest difference of entropy (nats) and of mass, by dtype."""
HALF_TOLERANCE = (0.15, 0.05)
"""Logits of bfloat16 lie up to 0.06 apart, and those of one token come out of products of another shape here."""


def check_columns(loaded: Any) -> None:
    """
    Compare entropy and top-k mass of a few tokens with those of vLLM's full list of log-probabilities, which takes
    another way through the engine. Raises CheckFailed when they differ, InputError when the logits are not numbers.
    """
    ids = tuple(loaded.tokenizer(TEXT).input_ids)[: max(1, loaded.room - N_TOKENS)]
    # In one batch, so that a row that got its mate's measures is found out.
    requests = [
        GenerationRequest(id=f"check-{k}", token_ids=ids[: max(1, len(ids) // part)], max_tokens=N_TOKENS)
        for part, k in enumerate(KS, start=1)
    ]
    for request, k in zip(requests, KS, strict=True):
        loaded.add(request, k)
    ours = finish_all(loaded)
    for request, k in zip(requests, KS, strict=True):
        direct = all_log_probabilities(loaded, request.token_ids, N_TOKENS)
        compare(ours[request.id], direct, k, str(loaded.facts["dtype"]))


def compare(ours: Any, direct: Any, k: int, dtype: str) -> None:
    """Raises CheckFailed, or InputError, unless two completions of one prompt have the same measures."""
    bars = TOLERANCE.get(dtype, HALF_TOLERANCE)
    for i, (token, other) in enumerate(zip(ours.token_ids, direct.token_ids, strict=False)):
        measured, expected = _columns(ours, i), _direct(direct, i, k)
        if expected[0] != expected[0]:
            raise InputError(
                f"the model's logits are not numbers (dtype {dtype}); try --dtype float32, and check the weights"
            )
        # Negated, so that a NaN fails too.
        if not all(abs(a - b) <= bar for a, b, bar in zip(measured, expected, bars, strict=True)):
            raise CheckFailed(
                f"vLLM's uncertainty is wrong: at token {i} of the self-test entropy and top-{k} mass are "
                f"{measured[0]:.5f} and {measured[1]:.5f}, and computed directly {expected[0]:.5f} and "
                f"{expected[1]:.5f} (bars {bars[0]}, {bars[1]}); take --backend hf, and report vLLM's version"
            )
        if token != other:
            # From here on the two are answers to different prompts; in half precision near ties may part.
            return


def distribution(loaded: Any, text: str, *, adapted: bool = True) -> dict[int, float]:
    """Log-probability of every token after `text`, by vLLM's own list. `adapted=False` leaves the adapter out."""
    ids = loaded.tokenizer(text).input_ids[: max(1, loaded.room - 1)]
    completion = all_log_probabilities(loaded, ids, 1, adapted=adapted)
    return dict(zip(completion.logprobs.token_ids, completion.logprobs.logprobs, strict=True))


def all_log_probabilities(
    loaded: Any,
    token_ids: Sequence[int],
    max_tokens: int,
    *,
    adapted: bool = True,
    steering: ResolvedSpec | None = None,
) -> Any:
    """vLLM's greedy completion of a prompt with the log-probabilities of the whole vocabulary at each token."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    from src.models.vllm_tag import steering_only

    name = "all-log-probabilities"
    if steering:
        loaded._states.specs.take(name, steering, len(token_ids), len(token_ids) + max_tokens)
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=-1, flat_logprobs=True,
        extra_args=steering_only(steering, len(token_ids)),
    )  # fmt: skip
    # What is read from the cache was computed in another shape, which rounds differently.
    loaded._engine.reset_prefix_cache()
    lora = loaded._lora if adapted else None
    loaded._engine.add_request(name, tokens_input(list(token_ids)), params, lora_request=lora)
    completion = finish_all(loaded)[name]
    loaded._states.specs.leave(name)
    return completion


def finish_all(loaded: Any) -> dict[str, Any]:
    """Step until every request has ended; vLLM's completion of each."""
    finished = {}
    while loaded.has_work():
        finished |= {output.request_id: output.outputs[0] for output in loaded.step() if output.finished}
    return finished


def _columns(completion: Any, index: int) -> tuple[float, float]:
    start = completion.logprobs.start_indices[index]
    values = completion.logprobs.logprobs
    # Columns that are not there fail the comparison.
    return (values[start + 1], values[start + 2]) if start + 2 < len(values) else (math.nan, math.nan)


def _direct(completion: Any, index: int, k: int) -> tuple[float, float]:
    """Entropy and top-k mass from the log-probabilities of the whole vocabulary, in float64."""
    start, end = completion.logprobs.start_indices[index], completion.logprobs.end_indices[index]
    # The first is the token's own, which the list holds once more.
    values = completion.logprobs.logprobs[start + 1 : end]
    terms = [math.exp(v) * v for v in values if v != -math.inf]
    return -math.fsum(terms), math.fsum(math.exp(v) for v in sorted(values)[-k:])
