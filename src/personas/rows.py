"""From a generated answer to its flat results row."""

from dataclasses import dataclass
from statistics import fmean

from src.models.types import GenerationResult
from src.personas.tasks import Task

MEASURES = ("entropy", "top_k_mass")


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


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Where the answer begins within the generated tokens."""

    num_tokens: int
    """Leading tokens that are thinking, its end token included."""
    end_position: int | None
    """Index of the token that ends the thinking; None when there is none."""
    truncated: bool
    """Whether max_tokens cut the thinking off, so that there is no answer."""
    thinking_text: str | None
    response_text: str


def results_row(asked: Asked, result: GenerationResult, thinking: Thinking) -> dict[str, object]:
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
        "response": thinking.response_text,
        "thinking": thinking.thinking_text,
    }
    for measure in MEASURES:
        values = getattr(result, measure)
        row[f"avg_{measure}_thinking"] = _mean(values[: thinking.num_tokens])
        row[f"avg_{measure}_output"] = _mean(values[thinking.num_tokens :])
        row[f"avg_{measure}"] = _mean(values)
    return row | {
        "think_end_position": thinking.end_position,
        "num_tokens": len(result.token_ids),
        "num_thinking_tokens": thinking.num_tokens,
        "finish_reason": result.finish_reason,
        "truncated_thinking": thinking.truncated,
        "persona_applied": asked.persona_applied,
        "seed": asked.seed,
        "model_id": asked.model_id,
    }


def _mean(values: tuple[float, ...]) -> float | None:
    return fmean(values) if values else None
