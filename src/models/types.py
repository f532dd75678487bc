"""Requests and results of generation, the same for every engine. No torch here: tensors are held as opaque values."""

from dataclasses import dataclass, field
from typing import Any

from src.common.capture_spec import Capture
from src.common.resolved_interventions import ResolvedSpec


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to continue."""

    id: str
    """Names the request; unique within a run."""
    token_ids: tuple[int, ...]
    """The whole prompt, special tokens included; never retokenized."""
    max_tokens: int
    """Upper bound on generated tokens, end-of-sequence token not counted against the text but against this bound."""
    temperature: float = 0.0
    """0 is greedy; otherwise tokens are drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Seed of this request's own generator, so that its tokens do not depend on its batch mates."""
    interventions: ResolvedSpec | tuple[()] = ()
    """What is done to the hidden states of this request only; () for nothing."""
    capture: Capture | None = None
    """Which hidden states to keep, or None."""
    prompt_length: int | None = None
    """Where `generated` begins for the interventions, when `token_ids` holds an answer too; None: after the last."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"request {self.id!r} has no prompt tokens")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.id!r}: max_tokens is {self.max_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"request {self.id!r}: temperature is {self.temperature}; it must be 0 or more")
        if self.prompt_length is not None and not 1 <= self.prompt_length <= len(self.token_ids):
            raise ValueError(
                f"request {self.id!r}: prompt_length is {self.prompt_length}; expected 1 to {len(self.token_ids)}"
            )
        if not isinstance(self.interventions, ResolvedSpec) and self.interventions != ():
            raise ValueError(f"request {self.id!r}: interventions are {self.interventions!r}; expected a resolved spec")

    @property
    def boundary(self) -> int:
        """The position at which, for the interventions, the answer begins."""
        return len(self.token_ids) if self.prompt_length is None else self.prompt_length

    @property
    def spec(self) -> ResolvedSpec | None:
        """The interventions, None when there is nothing to do."""
        is_idle = not isinstance(self.interventions, ResolvedSpec) or not self.interventions.operations
        return None if is_idle else self.interventions


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one request gave. The end-of-sequence token is in none of the fields."""

    id: str
    """The request's id."""
    token_ids: tuple[int, ...]
    """Generated tokens without the end-of-sequence token."""
    text: str
    """The tokens decoded, special tokens left out."""
    entropy: tuple[float, ...]
    """Per generated token: entropy of the full-vocabulary distribution, in nats."""
    top_k_mass: tuple[float, ...]
    """Per generated token: probability of the k likeliest tokens together."""
    finish_reason: str
    """`stop` (an end-of-sequence token), `length` (max_tokens or the context's end), `context` (no room to begin) or
    `interrupted` (somebody stopped it)."""
    captures: dict[str, Any] = field(default_factory=dict)
    """`<layer>.<hook point>` → the hidden states that were asked for: (positions, d_model) in the model's dtype, or for
    a mean (1, d_model) in float32. All positions that went through the model are prompt + generated − 1, the
    end-of-sequence token counted."""
    gates: tuple[tuple[float, ...], ...] = ()
    """For each of the interventions' conditions, in their order: the projection that was read at every position that
    went through the model, whether or not an operation was to act there."""
