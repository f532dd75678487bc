"""The fields of a results row that a response fills, the same in every command that generates."""

from statistics import fmean
from typing import TYPE_CHECKING

from src.models.types import GenerationResult

if TYPE_CHECKING:
    from src.models.thinking import ThinkingSpan

MEASURES = ("entropy", "top_k_mass")
MEASURED_FIELDS = tuple(f"avg_{measure}{part}" for measure in MEASURES for part in ("", "_output", "_thinking"))


def response_fields(result: GenerationResult, span: "ThinkingSpan") -> dict[str, object]:
    """
    From `response` to `truncated_thinking`: texts, means over thinking, answer and both, counts, how it ended.

    Entropies in nats, masses as probabilities. A mean over no token is None; end-of-sequence tokens are in no mean.
    """
    fields: dict[str, object] = {"response": span.response, "thinking": span.thinking}
    for measure in MEASURES:
        values = getattr(result, measure)
        fields[f"avg_{measure}_thinking"] = _mean(values[: span.num_tokens])
        fields[f"avg_{measure}_output"] = _mean(values[span.num_tokens :])
        fields[f"avg_{measure}"] = _mean(values)
    return fields | {
        "think_end_position": span.end_position,
        "num_tokens": len(result.token_ids),
        "num_thinking_tokens": span.num_tokens,
        "finish_reason": result.finish_reason,
        "truncated_thinking": span.truncated,
    }


def _mean(values: tuple[float, ...]) -> float | None:
    return fmean(values) if values else None
