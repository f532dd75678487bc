"""
What a model makes of given tokens, steered and not: divergence of the next-token distributions, projections.

Every token of prompt and response is run at once, each row under its own spec, padded and placed as in generation.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.models.cpu_linear import packed_linears
from src.models.devices import halved, is_out_of_memory
from src.models.generation import left_padded, needs_equal_lengths
from src.models.hooks import Location, reading
from src.models.shared_prefix import SharedPrefix
from src.models.steering import steered
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult
from src.ops.divergence import divergence
from src.ops.interventions import projection

if TYPE_CHECKING:
    from src.models.language_model import LanguageModel

TOKENS_PER_BATCH = 2048
MAX_LOGITS = 1 << 25
"""Logits of one pass that are held at a time; two passes are compared."""

OnProjected = Callable[[GenerationResult, float | None], None]
"""Gets an answer and its mean projection, None for an answer without tokens."""
ForcedRow = tuple[TokenSequence, ResolvedSpec | None]
"""Tokens to run, and what acts on them; None and specs without operations leave them as they are."""


def kl_per_token(
    model: "LanguageModel", rows: Sequence[ForcedRow], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Tensor]:
    """
    For each row, at each token t of its response, in nats: float64 (response tokens,), ≥ 0, on the CPU.

        KL(P ‖ Q) = Σ_x P(x | tokens before t)·(ln P(x | …) − ln Q(x | …)),   P unsteered, Q steered

    On a response that was drawn from P, the sum over tokens estimates KL of whole responses without bias (chain rule:
    Cover and Thomas 2006, theorem 2.5.3); with the arguments exchanged it would not. Log-probabilities in float32 of
    untempered logits, summed in float64. The place behind the last token, where an end would be, does not count.
    Both passes have the same rows in the same places, so that a spec that changes nothing gives exactly 0. Rows of
    equal tokens share the unsteered pass. Raises InputError for an empty response, logits that are not finite, memory
    that does not suffice for one sequence, and what `steered` raises.
    """
    found: list[Tensor | None] = [None] * len(rows)
    groups: dict[tuple, list[int]] = {}
    for i, (sequence, spec) in enumerate(rows):
        n_tokens = n_response(sequence)
        if spec is None or not spec.operations:
            found[i] = torch.zeros(n_tokens, dtype=torch.float64)
        else:
            groups.setdefault((sequence.token_ids, sequence.prompt_length), []).append(i)
    members = list(groups.values())
    vocabulary = model.model.get_output_embeddings().weight.shape[0]

    def fits(batch: Sequence[int]) -> bool:
        longest = max(n_response(rows[members[g][0]][0]) for g in batch) + 1
        return len(batch) * longest * vocabulary <= MAX_LOGITS

    def run(batch: Sequence[int]) -> None:
        sequences = [rows[members[g][0]][0] for g in batch]
        kept = max(map(n_response, sequences)) + 1
        plain = response_logits(model, sequences, [None] * len(batch), kept)
        for turn in range(max(len(members[g]) for g in batch)):
            acting = [members[g][turn] if turn < len(members[g]) else None for g in batch]
            specs = [None if i is None else rows[i][1] for i in acting]
            for i, p, q in zip(acting, plain, response_logits(model, sequences, specs, kept), strict=True):
                if i is not None:
                    n = n_response(rows[i][0])
                    found[i] = checked_divergence(divergence(p[-n - 1 : -1], q[-n - 1 : -1]), rows[i][0].id)

    with torch.inference_mode(), packed_linears(model.model):
        lengths = [len(rows[group[0]][0].token_ids) for group in members]
        in_batches(model, lengths, run, tokens_per_batch, fits)
    return found


def mean_projections(
    model: "LanguageModel",
    rows: Sequence[ForcedRow],
    place: Location,
    direction: np.ndarray,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[float]:
    """
    For each row, the mean over all tokens of its response of ⟨h, direction⟩, h being what leaves `place` under the
    row's spec, after any intervention there. direction: unit, float32 (d_model,). Projections in float32, their mean in
    float64. The last token counts too, though in generation it never flows through the model. Raises as `kl_per_token`.
    """
    found: list[float | None] = [None] * len(rows)
    for sequence, _ in rows:
        n_response(sequence)
    unit = torch.from_numpy(np.array(direction, dtype=np.float32))

    def run(batch: Sequence[int]) -> None:
        sequences, specs = [rows[i][0] for i in batch], [rows[i][1] for i in batch]
        projected: list[Tensor] = []

        def note(hidden: Tensor) -> None:
            projected[:] = [projection(hidden, unit.to(hidden.device)).cpu()]

        _forward(model, sequences, specs, 1, {place: note})
        for i, sequence, values in zip(batch, sequences, projected[0], strict=True):
            found[i] = values[-n_response(sequence) :].double().mean().item()
            if not np.isfinite(found[i]):
                raise InputError(not_finite(sequence.id, "hidden states"))

    with torch.inference_mode(), packed_linears(model.model):
        in_batches(model, [len(sequence.token_ids) for sequence, _ in rows], run, tokens_per_batch)
    return found


def generate_projected(
    model: "LanguageModel",
    requests: Sequence[GenerationRequest],
    place: Location,
    direction: np.ndarray,
    *,
    on_result: OnProjected,
    on_tokens: Callable[[int], None],
    batch_size: int,
    top_k: int,
) -> None:
    """
    `model.generate` with the mean projection of each answer beside it, as `mean_projections` gives it under the
    request's own interventions; None for an answer without tokens. Batch by batch: an answer is passed on once it has
    been run through the model again.
    """
    longest_first = sorted(requests, key=lambda r: -len(r.token_ids))
    for start in range(0, len(longest_first), batch_size):
        batch = {request.id: request for request in longest_first[start : start + batch_size]}
        results: list[GenerationResult] = []
        model.generate(
            list(batch.values()), on_result=results.append, on_tokens=on_tokens, batch_size=batch_size, top_k=top_k
        )
        rows = {r.id: (answered(batch[r.id], r), batch[r.id].spec) for r in results if r.token_ids}
        means = dict(zip(rows, mean_projections(model, list(rows.values()), place, direction), strict=True))
        for result in results:
            on_result(result, means.get(result.id))


def answered(request: GenerationRequest, result: GenerationResult) -> TokenSequence:
    """A request's prompt and its answer."""
    return TokenSequence(
        id=result.id, token_ids=(*request.token_ids, *result.token_ids), prompt_length=len(request.token_ids)
    )


def captured(model: "LanguageModel", request: GenerationRequest, result: GenerationResult) -> dict[str, Tensor]:
    """
    The hidden states that `request.capture` keeps of a finished answer, as `GenerationResult.captures` has them: prompt
    and answer are run once more under the request's own interventions. Raises InputError when memory does not suffice,
    for hidden states that are not finite, and for a layer that the model lacks.
    """
    capture = request.capture
    assert capture is not None, f"{request.id} keeps nothing"
    # The last token was generated and not run, unless the one that ended the answer came behind it.
    ids = (*request.token_ids, *result.token_ids)
    sequence = TokenSequence(
        id=request.id, token_ids=ids if result.finish_reason == "stop" else ids[:-1], prompt_length=request.boundary
    )
    found: dict[str, Tensor] = {}

    def note(place: Location, hidden: Tensor) -> None:
        rows = hidden[0, capture.start : capture.end]
        if not rows.isfinite().all():
            raise InputError(not_finite(sequence.id, "hidden states"))
        kept = rows.float().mean(dim=0, keepdim=True) if capture.mean else rows.clone()
        found[f"{place.layer}.{place.hook_point}"] = kept.cpu()

    def run(batch: Sequence[int]) -> None:
        _forward(model, [sequence], [request.spec], 1, {place: partial(note, place) for place in places})

    places = [Location(*place) for place in capture.places]
    with torch.inference_mode(), packed_linears(model.model):
        in_batches(model, [len(sequence.token_ids)], run, len(sequence.token_ids))
    return found


def n_response(sequence: TokenSequence) -> int:
    """Tokens of its response. Raises InputError when there are none."""
    n_tokens = len(sequence.token_ids) - sequence.prompt_length
    if not n_tokens:
        raise InputError(f"sequence {sequence.id!r} has no response token, so nothing is measured on it; leave it out")
    return n_tokens


def _forward(
    model: "LanguageModel",
    sequences: Sequence[TokenSequence],
    specs: Sequence[ResolvedSpec | None],
    n_kept: int,
    callbacks: dict[Location, Callable[[Tensor], object]],
) -> Tensor:
    """Logits of the last `n_kept` columns or more, (rows, columns, vocabulary); each row ends in the last column."""
    net = model.model
    with steered(net, specs, [s.prompt_length for s in sequences]), reading(net, callbacks):
        return _run(model, [s.token_ids for s in sequences], n_kept)


def _run(
    model: "LanguageModel", token_ids: Sequence[Sequence[int]], n_kept: int, cache: DynamicCache | None = None
) -> Tensor:
    """As `_forward`, of tokens that stand behind those of `cache`, if there is one."""
    pad_id = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else 0
    ids, mask = left_padded(token_ids, pad_id, model.device)
    before = cache.get_seq_length() if cache is not None else 0
    mask = torch.cat([mask.new_ones(len(mask), before), mask], dim=1)
    accepted = inspect.signature(model.model.forward).parameters
    extra = {"logits_to_keep": n_kept} if "logits_to_keep" in accepted else {}
    if "position_ids" in accepted:
        extra["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp_min(0)[:, before:]
    if cache is not None:
        extra["past_key_values"] = cache
    return model.model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **extra).logits


def response_logits(
    model: "LanguageModel", sequences: Sequence[TokenSequence], specs: Sequence[ResolvedSpec | None], n_kept: int
) -> Tensor:
    """Logits (rows, n_kept, vocabulary) of the last `n_kept` places; every row's last token is in the last one."""
    return _forward(model, sequences, specs, n_kept, {})[:, -n_kept:]


def logits_behind(
    model: "LanguageModel", sequences: Sequence[TokenSequence], prefix: SharedPrefix, rows: Sequence[int], n_kept: int
) -> Tensor:
    """
    `response_logits` without interventions, of sequences that begin with `prefix`, each with the row of it that `rows`
    names; `n_kept` is at most the longest one's tokens behind the prefix.
    """
    behind = [s.token_ids[prefix.n_tokens :] for s in sequences]
    return _run(model, behind, n_kept, prefix.cache(torch.tensor(rows, device=model.device)))[:, -n_kept:]


def checked_divergence(per_token: Tensor, name: str) -> Tensor:
    """The divergence of each token as it came out. Raises InputError where it is not finite."""
    if not per_token.isfinite().all():
        raise InputError(not_finite(name, "logits"))
    return per_token


def not_finite(name: str, what: str) -> str:
    """What is said of a sequence that gave no numbers."""
    return f"sequence {name!r}: its {what} are not finite; try a smaller coefficient, or --dtype float32"


def in_batches(
    model: "LanguageModel",
    lengths: Sequence[int],
    run: Callable[[Sequence[int]], None],
    tokens_per_batch: int,
    fits: Callable[[Sequence[int]], bool] = lambda batch: True,
) -> None:
    """`run` on lists of indices, longest first, within the budget and `fits`; halved when memory runs out."""
    equal_lengths = needs_equal_lengths(model.model)
    queue = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while queue:
        batch = queue[:1]
        for i in queue[1:]:
            is_other = equal_lengths and lengths[i] != lengths[batch[0]]
            too_many = (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch
            if is_other or too_many or not fits([*batch, i]):
                break
            batch.append(i)
        if _has_memory(partial(run, batch)):
            del queue[: len(batch)]
            continue
        if len(batch) == 1:
            raise InputError(f"out of memory with one sequence of {lengths[batch[0]]} tokens; lower --max_tokens")
        tokens_per_batch = lengths[batch[0]] * halved(len(batch), "sequences", model.device)


def _has_memory(run: Callable[[], None]) -> bool:
    """Whether `run` went through; returning leaves no traceback that holds the batch's tensors."""
    try:
        run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
