"""What vLLM kept of a request against the same interventions in transformers, for tests."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from src.models.language_model import LanguageModel
from src.models.parity import direct
from src.models.types import GenerationRequest, GenerationResult

MIN_COSINE = 0.99999
MAX_RELATIVE = 2e-3
"""Rounding grows from layer to layer; a token under another operation differs by more than a tenth."""


@contextlib.contextmanager
def chunks_of(engine: Any, n_tokens: int) -> Iterator[None]:
    """At most so many tokens in a step."""
    scheduler = engine._engine.engine_core.engine_core.scheduler
    plain, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, n_tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = plain


def assert_same_states(hf: LanguageModel, request: GenerationRequest, result: GenerationResult) -> float:
    """
    Every captured row equals transformers' own, and as many are there as there should be. Returns the largest mean
    absolute error of a place.
    """
    largest = 0.0
    expected = direct(hf, request, result.token_ids)
    n_computed = len(request.token_ids) + len(result.token_ids) - (result.finish_reason == "length")
    assert result.captures.keys() == expected.keys()
    for name, got in result.captures.items():
        capture = request.capture
        wanted = expected[name][capture.start : capture.end][: capture.n_positions(n_computed)].float()
        if capture.mean:
            wanted = wanted.double().mean(dim=0, keepdim=True).float()
        assert got.shape == wanted.shape, f"{request.id} at {name}: {got.shape}, expected {wanted.shape}"
        if len(wanted):
            cosine = torch.cosine_similarity(got.float(), wanted, dim=-1).min().item()
            relative = ((got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
            assert cosine >= MIN_COSINE and relative <= MAX_RELATIVE, (request.id, name, cosine, relative)
            largest = max(largest, (got.float() - wanted).abs().mean().item())
    return largest
