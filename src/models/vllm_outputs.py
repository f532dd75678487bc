"""What vLLM says of a request, in our terms."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from src.common.errors import InputError


@dataclass(frozen=True)
class Written:
    """The answer to a request, as `GenerationResult` has it."""

    token_ids: tuple[int, ...]
    entropy: tuple[float, ...]
    top_k_mass: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


def written_by(output: Any, eos_ids: Collection[int], dtype: str) -> Written:
    """A finished RequestOutput, its end-of-sequence token left out. Raises InputError when logits were not numbers."""
    completion = output.outputs[0]
    entropy, mass = columns(completion)
    tokens = tuple(completion.token_ids)
    assert len(entropy) == len(tokens), f"{output.request_id}: {len(entropy)} measures of {len(tokens)} tokens"
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id!r} with {completion.finish_reason!r}")
    for index, value in enumerate(entropy):
        if value != value:
            raise InputError(
                f"request {output.request_id!r}: the model's logits are not numbers at generated token {index} "
                f"(dtype {dtype}); try --dtype float32, and check the weights"
            )
    ended = bool(tokens) and tokens[-1] in eos_ids
    n_tokens = len(tokens) - ended
    return Written(tokens[:n_tokens], tuple(entropy[:n_tokens]), tuple(mass[:n_tokens]), "stop" if ended else "length")


def columns(completion: Any) -> tuple[list[float], list[float]]:
    """Entropy and top-k mass of each token, from the places of two log-probabilities behind the token's own."""
    values, starts = completion.logprobs.logprobs, completion.logprobs.start_indices
    return [values[start + 1] for start in starts], [values[start + 2] for start in starts]
