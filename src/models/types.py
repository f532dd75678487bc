"""Requests and results of generation, the same for every engine. No torch here: captures are held as opaque values."""

from dataclasses import dataclass, field
from typing import Any

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
    capture: Any | None = None
    """Which hidden states to keep, or None."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"request {self.id!r} has no prompt tokens")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.id!r}: max_tokens is {self.max_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"request {self.id!r}: temperature is {self.temperature}; it must be 0 or more")
        if not isinstance(self.interventions, ResolvedSpec) and self.interventions != ():
            raise ValueError(f"request {self.id!r}: interventions are {self.interventions!r}; expected a resolved spec")

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
    """`stop` (an end-of-sequence token), `length` (max_tokens or the context's end) or `context` (no room to begin)."""
    captures: dict[str, Any] = field(default_factory=dict)
    """Hidden states that were asked for, by name."""
