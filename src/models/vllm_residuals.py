"""
Hidden states by vLLM: `src.models.residuals.extract` on the other engine. Every sequence is a request that keeps the
rows that its token position names, reduced in the workers, and that generates one token.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from src.common.capture_spec import Capture
from src.common.errors import InputError
from src.models.hooks import Location
from src.models.residual_checks import Bounds, OnRows, checked, refuse_not_finite, wanted_places
from src.models.token_sequences import TokenPosition, TokenSequence, in_windows
from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_engine import VLLMEngine

BATCHES_HELD = 64
"""Sequences of about so many of vLLM's steps are held at a time."""


def extract(
    engine: VLLMEngine,
    sequences: Iterable[TokenSequence],
    *,
    layers: Sequence[int],
    position: str,
    on_rows: OnRows,
    hook_point: str = "resid_post",
    on_tokens: Callable[[int], None] = lambda n: None,
) -> None:
    """
    What `residuals.extract` gives, equal to it up to the rounding of the model's dtype: `on_rows(ids, rows)` with
    float32 rows (1, len(layers), d_model) on the CPU, for position `all` (tokens, len(layers), d_model); always one id
    a call, as soon as its rows are there. Means are summed in float64. How many tokens are run at once was said when
    the engine was started.

    Raises InputError as it does, and when the engine keeps no hidden states. A sequence that fills the context is
    refused too: vLLM generates a token after it.
    """
    if engine.no_steering:
        raise InputError(f"vLLM keeps no hidden states: {engine.no_steering}")
    wanted = TokenPosition(position)
    places = wanted_places(layers, hook_point, engine.n_layers)
    held = BATCHES_HELD * engine._engine.vllm_config.scheduler_config.max_num_batched_tokens
    for window in in_windows(checked(sequences, wanted.n_run, _bounds(engine)), held):
        n_run = {sequence.id: wanted.n_run(sequence) for sequence in window}

        def keep(result: GenerationResult, n_run: dict[str, int] = n_run) -> None:
            n = n_run[result.id]
            # A copy, which frees what the workers gave.
            rows = torch.stack([result.captures[f"{p.layer}.{p.hook_point}"] for p in places], dim=1).float()
            expected = (n if wanted.is_all else 1, len(places), engine.d_model)
            assert rows.shape == expected, f"{result.id}: rows are {tuple(rows.shape)}, expected {expected}"
            refuse_not_finite([result.id], rows, [len(rows)], places, engine.facts["dtype"])
            on_rows((result.id,), rows)
            on_tokens(n)

        engine.generate([_request(sequence, wanted, places) for sequence in window], on_result=keep)


def _request(sequence: TokenSequence, wanted: TokenPosition, places: tuple[Location, ...]) -> GenerationRequest:
    start, end = wanted.span(sequence)
    return GenerationRequest(
        id=sequence.id,
        token_ids=sequence.token_ids[: wanted.n_run(sequence)],
        max_tokens=1,
        capture=Capture(places=places, start=start, end=end, mean=wanted.is_mean),
    )


def _bounds(engine: VLLMEngine) -> Bounds:
    context, vocabulary = engine.context_length, engine._engine.model_config.get_vocab_size()
    most = engine.room - 1
    if context and context <= engine.room:
        stated = f"vLLM, which generates one after them, takes {most} in a context of {context}; take --backend hf"
    else:
        stated = f"there is memory for {most}; raise --kv_cache_gib (CUDA: --gpu_memory_utilization)"
    return Bounds(most, f"{stated}, or cut it", vocabulary)
