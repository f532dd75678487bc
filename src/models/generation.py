"""
Token-by-token generation with uncertainty, in batches whose rows do not influence one another.

Padding is on the left with explicit position ids; each row draws from its own generator; a row that ends leaves the
batch at once, so nothing is computed, measured or counted after its end.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.kv_cache import growing_cache, keep_rows
from src.models.steering import steered
from src.models.types import GenerationRequest
from src.ops.metrics import token_uncertainty
from src.ops.sampling import next_tokens

ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
ROPE_OF_THE_LONGEST = {"longrope", "dynamic"}
"""Rotary embeddings whose frequencies transformers chooses for a whole batch by its longest row."""


class NoNumbers(InputError):
    """The model's logits are not numbers."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


@dataclass
class Row:
    """One request on its way."""

    request: GenerationRequest
    draws: random.Random
    tokens: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    top_k_mass: list[float] = field(default_factory=list)
    gates: tuple[tuple[float, ...], ...] = ()

    @property
    def token_limit(self) -> int:
        return self.request.max_tokens


def needs_equal_lengths(model: nn.Module) -> bool:
    """
    Whether batch mates would reach the numbers: the model mixes tokens otherwise than by masked attention (state space,
    convolution, linear attention), takes no position ids, or has rotary embeddings that depend on the longest row. Its
    batches hold prompts of one length.
    """
    config = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None) or []
    recurrent = any(kind not in ATTENTION_LAYER_TYPES for kind in layer_types)
    recurrent = recurrent or ROPE_OF_THE_LONGEST & rope_types(getattr(config, "rope_parameters", None) or {})
    return bool(recurrent) or "position_ids" not in inspect.signature(model.forward).parameters


def rope_types(parameters: dict) -> set[str]:
    """The kinds of rotary embedding of a model, whose parameters may be nested per layer type."""
    nested = [rope_types(value) for value in parameters.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type"))}.union(*nested)


class Batch:
    """Requests decoded together. `step` runs the model once for all rows that have not ended."""

    def __init__(self, model: nn.Module, requests: Sequence[GenerationRequest], pad_id: int, k: int) -> None:
        device = model.get_input_embeddings().weight.device
        self.model = model
        self.k = k
        self.rows = [Row(request, random.Random(request.seed)) for request in requests]
        self.next_ids, self.mask = left_padded([r.token_ids for r in requests], pad_id, device)
        self.positions = (self.mask.cumsum(dim=-1) - 1).clamp_min(0)
        self.temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device)
        self.cache = growing_cache(model.config)
        accepted = inspect.signature(model.forward).parameters
        # Mamba's `cache_params`: such a model takes the argument below, ignores it, and forgets what it has read.
        if "past_key_values" not in accepted:
            raise InputError(f"{model.config.model_type} models take no past_key_values: they cannot generate here")
        # Logits at every prompt position would take prompt length × vocabulary; only the last position's are read.
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.takes_positions = "position_ids" in accepted

    @torch.inference_mode()
    def step(self, eos_ids: frozenset[int]) -> list[tuple[Row, str]]:
        """Add one token to every row; returns the rows that ended, each with its finish reason, and drops them."""
        logits = self._logits()
        uniforms = torch.tensor([row.draws.random() for row in self.rows], dtype=torch.float64)
        tokens = next_tokens(logits, self.temperatures, uniforms.to(_draw_dtype(logits)).to(logits.device))
        measured = token_uncertainty(logits, self.k)
        # Two transfers a step for all rows, never one a row: each makes the host wait for the device.
        ids = tokens.cpu().tolist()
        entropy, mass = torch.stack([measured.entropy, measured.top_k_mass]).cpu().tolist()
        ended, kept = [], []
        for i, row in enumerate(self.rows):
            reason = self._append(row, ids[i], entropy[i], mass[i], eos_ids)
            if reason:
                ended.append((row, reason))
            else:
                kept.append(i)
        self._advance(tokens, kept)
        return ended

    def _logits(self) -> Tensor:
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        output = self.model(
            input_ids=self.next_ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **self.extra,
        )
        return output.logits[:, -1]

    def _append(self, row: Row, token: int, entropy: float, mass: float, eos_ids: frozenset[int]) -> str | None:
        if entropy != entropy:
            raise NoNumbers(
                row.request.id,
                f"request {row.request.id!r}: the model's logits are not numbers at generated token {len(row.tokens)} "
                f"(dtype {self.model.dtype}); try --dtype float32, and check the weights",
            )
        if token in eos_ids:
            return "stop"
        row.tokens.append(token)
        row.entropy.append(entropy)
        row.top_k_mass.append(mass)
        return "length" if len(row.tokens) >= row.token_limit else None

    def _advance(self, tokens: Tensor, kept: list[int]) -> None:
        self.next_ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.keep(kept)

    def keep(self, kept: list[int]) -> None:
        """From the next step on the batch is of the rows `kept` alone, numbers of its present ones."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if kept:
            index = torch.tensor(kept, device=self.next_ids.device)
            self.next_ids, self.positions, self.mask = self.next_ids[index], self.positions[index], self.mask[index]
            self.temperatures = self.temperatures[index]
            keep_rows(self.cache, index)


def _draw_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both int64 (rows, longest); the mask is 0 on the padding, which stands on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def decode_batch(
    model: nn.Module,
    requests: Sequence[GenerationRequest],
    *,
    eos_ids: frozenset[int],
    pad_id: int,
    k: int,
    on_row: Callable[[Row, str], None],
    on_tokens: Callable[[int], None],
) -> None:
    """
    Decode `requests` together; `on_row(row, finish_reason)` as each ends, `on_tokens(n)` after every step.

    Raises what `decode_steps` raises.
    """
    # Closed on every way out: a step left hanging would leave its interventions on the model.
    with closing(decode_steps(model, requests, eos_ids=eos_ids, pad_id=pad_id, k=k)) as steps:
        for rows, ended in steps:
            on_tokens(len(rows) - sum(reason == "stop" for _, reason in ended))
            for row, reason in ended:
                on_row(row, reason)


def decode_steps(
    model: nn.Module,
    requests: Sequence[GenerationRequest],
    *,
    eos_ids: frozenset[int],
    pad_id: int,
    k: int,
    is_wanted: Callable[[str], bool] = lambda request_id: True,
) -> Iterator[tuple[list[Row], list[tuple[Row, str]]]]:
    """
    Decode `requests` together, each under its own interventions, a token a step; yields after each step the rows that
    took part in it, and those that ended with it, each with its finish reason. Without interventions no hook is set.

    is_wanted: asked by request id after each step; a row that is not leaves the batch without having ended. The
    interventions stay on the model until the iterator ends or is closed. Raises InputError when the logits hold
    NaN, for a model that takes no past_key_values, and what `steered` raises.
    """
    specs, lengths = [r.spec for r in requests], [r.boundary for r in requests]
    batch = Batch(model, requests, pad_id, k)
    with steered(model, specs, lengths) as steering:
        while batch.rows:
            before = batch.rows
            ended = batch.step(eos_ids)
            if ended:
                gone = {id(row) for row, _ in ended}
                for i, row in enumerate(before):
                    if id(row) in gone:
                        row.gates = steering.gates(i)
                steering.keep([i for i, row in enumerate(before) if id(row) not in gone])
            yield before, ended
            wanted = [i for i, row in enumerate(batch.rows) if is_wanted(row.request.id)]
            if len(wanted) < len(batch.rows):
                batch.keep(wanted)
                steering.keep(wanted)
