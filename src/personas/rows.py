"""From a generated answer to its flat results row."""

from dataclasses import dataclass
from statistics import fmean

from src.models.thinking import ThinkingSpan
from src.models.types import GenerationResult
from src.personas.tasks import Task

MEASURES = ("entropy", "top_k_mass")
MEASURED_FIELDS = tuple(f"avg_{measure}{part}" for measure in MEASURES for part in ("", "_output", "_thinking"))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a row says of its question: everything known before the answer."""

    task: Task
    turn: int
    question: str
    system_prompt: str | None
    persona_applied: str
    seed: int
    model_id: str


def results_row(asked: Asked, result: GenerationResult, span: ThinkingSpan) -> dict[str, object]:
    """The row, its id first. A mean over no token is None; end-of-sequence tokens are in no mean."""
    task = asked.task
    row: dict[str, object] = {
        "id": result.id,
        "persona": task.persona.persona,
        "category": task.persona.category,
        "article": task.persona.article,
        "system_prompt": asked.system_prompt,
        "prompt_id": task.prompt.id,
        "prompt": asked.question,
        "rep_idx": task.rep_idx,
        "turn": asked.turn,
        "response": span.response,
        "thinking": span.thinking,
    }
    for measure in MEASURES:
        values = getattr(result, measure)
        row[f"avg_{measure}_thinking"] = _mean(values[: span.num_tokens])
        row[f"avg_{measure}_output"] = _mean(values[span.num_tokens :])
        row[f"avg_{measure}"] = _mean(values)
    return row | {
        "think_end_position": span.end_position,
        "num_tokens": len(result.token_ids),
        "num_thinking_tokens": span.num_tokens,
        "finish_reason": result.finish_reason,
        "truncated_thinking": span.truncated,
        "persona_applied": asked.persona_applied,
        "seed": asked.seed,
        "model_id": asked.model_id,
    }


def _mean(values: tuple[float, ...]) -> float | None:
    return fmean(values) if values else None
