"""What a request carries to the workers, in `extra_args` of vLLM's sampling parameters."""

from dataclasses import asdict, dataclass
from typing import Any

from vllm import SamplingParams

from src.common.capture_spec import Capture
from src.common.resolved_interventions import ResolvedSpec
from src.models.hooks import Location
from src.models.types import GenerationRequest
from src.models.vllm_plan import Asked

TAG = "tiller"
"""The key of `extra_args` for the sampler."""
STEERING = "tiller_steering"
"""The key for interventions and captures; plain values too."""
COLUMNS = 2
"""Log-probabilities that a tagged request asks for: the places of entropy and top-k mass."""


@dataclass(frozen=True)
class Tag:
    """What a tagged request wants of the worker; plain values, which pass through msgpack."""

    k: int
    seed: int
    temperature: float
    """As asked; vLLM raises small ones to 0.01."""


def sampling_params(request: GenerationRequest, k: int, eos_ids: frozenset[int], runner: str) -> SamplingParams:
    """
    The request in vLLM's terms: `COLUMNS` log-probabilities, flat, no text, ended by `eos_ids` alone.

    runner: "v1" draws by the request's seed with our own sampler; "v2" with vLLM's, whose Gumbel noise is a function of
    seed and position.
    """
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        # A generator on the V1 runner cannot be set back after a prompt's chunk that samples nothing.
        seed=request.seed % 2**63 if runner == "v2" and request.temperature > 0 else None,
        stop_token_ids=sorted(eos_ids),
        ignore_eos=True,
        detokenize=False,
        logprobs=COLUMNS,
        flat_logprobs=True,
        # Clean keys and values may be left for others, but the rows of a prompt must be computed to be kept.
        skip_reading_prefix_cache=keeps_prompt_rows(request),
        extra_args={TAG: {"k": k, "seed": request.seed, "temperature": request.temperature}, **_steering(request)},
    )


def steering_only(spec: ResolvedSpec | None, prompt_length: int) -> dict[str, Any] | None:
    """The `extra_args` of a request that leaves the sampler as it is."""
    if spec is None:
        return None
    return {STEERING: {"prompt_length": prompt_length, "spec": spec.fingerprint, "capture": None}}


def tag_of(params: SamplingParams | None) -> Tag | None:
    """The tag of a request, None for one of somebody else."""
    stated = (params.extra_args or {}).get(TAG) if params else None
    return Tag(**stated) if stated else None


def keeps_prompt_rows(request: GenerationRequest) -> bool:
    """Whether hidden states of prompt tokens, or what conditions read of them, are to be kept."""
    if request.spec and request.spec.conditions:
        return True
    return request.capture is not None and request.capture.start < len(request.token_ids)


def asked_of(params: SamplingParams | None) -> Asked | None:
    """What a request wants done to its hidden states, and kept of them; None for nothing."""
    stated = (params.extra_args or {}).get(STEERING) if params else None
    if stated is None:
        return None
    capture = stated["capture"] and Capture(
        **{**stated["capture"], "places": tuple(Location(*place) for place in stated["capture"]["places"])}
    )
    return Asked(stated["prompt_length"], stated["spec"], capture)


def _steering(request: GenerationRequest) -> dict[str, Any]:
    if request.spec is None and request.capture is None:
        return {}
    stated = {
        "prompt_length": request.boundary,
        "spec": request.spec.fingerprint if request.spec else None,
        "capture": asdict(request.capture) if request.capture else None,
    }
    return {STEERING: stated}
