"""
The same requests on transformers and on vLLM, greedy: hidden states, tokens and their log-probabilities side by side.

transformers first: its tokens and, in one pass over prompt and answer, the states at the places that the request
captures. Then vLLM's own run, whose states are compared as far as both had the same tokens before.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.models.engine import Engine
from src.models.hooks import reading
from src.models.language_model import LanguageModel, generate_all
from src.models.steering import steered
from src.models.types import GenerationRequest, GenerationResult

TOP_K = 1
"""The likeliest token alone: its mass is the probability of the greedy token."""


@dataclass(frozen=True)
class Thresholds:
    """What the two must reach, by dtype."""

    cosine: float
    mean_absolute_error: float | None = None
    top_1_agreement: float | None = None


THRESHOLDS = {"float32": Thresholds(cosine=0.99999, mean_absolute_error=1e-4)}
HALF = Thresholds(cosine=0.999, top_1_agreement=0.98)


@dataclass(frozen=True)
class Reference:
    """A request on transformers."""

    request: GenerationRequest
    result: GenerationResult
    states: dict[str, Tensor]
    """`<layer>.<hook point>` → (prompt + answer, d_model), on the CPU."""


@dataclass(frozen=True)
class Compared:
    """One request on both."""

    id: str
    n_agreed: int
    """Tokens until the first that differs, or all."""
    n_tokens: tuple[int, int]
    """Of the answers, transformers' and vLLM's."""
    identical: bool
    log_probability: float
    """Largest difference of the natural log of the agreed tokens' probabilities; 0 without any."""
    cosine: dict[str, float]
    """`<layer>.<hook point>` → the smallest of a position."""
    absolute_error: dict[str, tuple[float, int]]
    """Likewise its sum over all numbers, and how many they are."""


def on_transformers(model: LanguageModel, requests: Sequence[GenerationRequest]) -> list[Reference]:
    """Greedy answers and their hidden states. requests: greedy, each with a capture of all positions."""
    for request in requests:
        capture = request.capture
        assert capture and not (capture.start or capture.end or capture.mean), f"{request.id}: {capture}"
        assert request.temperature == 0, f"{request.id} is not greedy"
    results = generate_all(model, [replace(request, capture=None) for request in requests], top_k=TOP_K)
    return [
        Reference(request, result, direct(model, request, result.token_ids))
        for request, result in zip(requests, results, strict=True)
    ]


def direct(model: LanguageModel, request: GenerationRequest, answer: Sequence[int]) -> dict[str, Tensor]:
    """The captured places in one uncached pass of transformers: `<layer>.<hook point>` → (prompt + answer, d_model)."""
    ids = torch.tensor([[*request.token_ids, *answer]], device=model.device)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda hidden: seen.__setitem__(name, hidden[0].to("cpu", copy=True))

    callbacks = {place: keep(f"{place[0]}.{place[1]}") for place in request.capture.places}
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with (
        torch.inference_mode(), steered(model.model, [request.spec], [request.boundary]),
        reading(model.model, callbacks),
    ):  # fmt: skip
        model.model(input_ids=ids, position_ids=positions)
    return seen


def give_memory_back() -> None:
    """What a model that nobody holds any more took, for another process or library."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_vllm(engine: Engine, references: Sequence[Reference]) -> list[Compared]:
    """The same requests on vLLM, compared one by one."""
    by_id = {reference.request.id: reference for reference in references}
    found: dict[str, Compared] = {}

    def note(result: GenerationResult) -> None:
        found[result.id] = compare(by_id[result.id], result)

    engine.generate([reference.request for reference in references], on_result=note, top_k=TOP_K)
    return [found[reference.request.id] for reference in references]


def compare(reference: Reference, result: GenerationResult) -> Compared:
    """One request on both. Raises RuntimeError where a captured place or position is missing."""
    ours, theirs = result.token_ids, reference.result.token_ids
    pairs = list(zip(ours, theirs, strict=False))
    n_agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    ends = ours == theirs and result.finish_reason == reference.result.finish_reason
    log_p = [
        abs(math.log(a) - math.log(b))
        for a, b in zip(result.top_k_mass[:n_agreed], reference.result.top_k_mass[:n_agreed], strict=True)
    ]
    cosine, error = {}, {}
    n_prompt = len(reference.request.token_ids)
    n_run = n_prompt + len(ours) - (result.finish_reason == "length")
    if result.captures.keys() != reference.states.keys():
        raise RuntimeError(f"{result.id}: captured {sorted(result.captures)}, asked {sorted(reference.states)}")
    for name, states in result.captures.items():
        if len(states) != n_run:
            raise RuntimeError(f"{result.id} at {name}: {len(states)} positions; expected {n_run}")
        n = min(n_prompt + n_agreed, n_run)
        mine, wanted = states[:n].double(), reference.states[name][:n].double()
        cosine[name] = torch.cosine_similarity(mine, wanted, dim=-1).min().item()
        error[name] = ((mine - wanted).abs().sum().item(), mine.numel())
    return Compared(
        id=result.id, n_agreed=n_agreed, n_tokens=(len(theirs), len(ours)), identical=ends,
        log_probability=max(log_p, default=0.0), cosine=cosine, absolute_error=error,
    )  # fmt: skip


def summary(compared: Sequence[Compared], dtype: str) -> dict:
    """
    All requests together, as JSON: per place the smallest cosine and the mean absolute error; how far the greedy tokens
    agree; the largest difference of an agreed token's log-probability (nats); the thresholds and what is below them.
    """
    bars = THRESHOLDS.get(dtype, HALF)
    places = {}
    for name in compared[0].cosine:
        total = sum(each.absolute_error[name][0] for each in compared)
        count = sum(each.absolute_error[name][1] for each in compared)
        places[name] = {
            "cosine_min": min((each.cosine[name] for each in compared), key=_or_lowest),
            "mean_absolute_error": total / count,
        }
    # Each row's predictions are comparable up to its first difference, which is one of them.
    n_same = sum(each.n_agreed for each in compared)
    n_parted = sum(not each.identical for each in compared)
    greedy = {
        "rows": len(compared),
        "rows_identical": len(compared) - n_parted,
        "tokens_agreed": n_same,
        "top_1_agreement": n_same / max(1, n_same + n_parted),
    }
    found = {
        "dtype": dtype,
        "places": places,
        "greedy": greedy,
        "log_probability_difference": max(each.log_probability for each in compared),
        "thresholds": {name: value for name, value in vars(bars).items() if value is not None},
    }
    failures = failed(places, greedy, bars)
    return {"passed": not failures, "failures": failures} | found


def failed(places: dict[str, dict[str, float]], greedy: dict[str, float], bars: Thresholds) -> list[str]:
    """What is below the thresholds, in words; what is no number is."""
    said = []
    for name, found in places.items():
        if not found["cosine_min"] >= bars.cosine:
            said.append(f"cosine {found['cosine_min']:.6f} at {name}, expected {bars.cosine}")
        error, bar = found["mean_absolute_error"], bars.mean_absolute_error
        if bar is not None and not error <= bar:
            said.append(f"mean absolute error {error:.2e} at {name}, expected at most {bar:.0e}")
    if bars.top_1_agreement is not None and greedy["top_1_agreement"] < bars.top_1_agreement:
        said.append(f"top-1 agreement {greedy['top_1_agreement']:.4f}, expected {bars.top_1_agreement}")
    return said


def _or_lowest(value: float) -> float:
    return -math.inf if value != value else value
