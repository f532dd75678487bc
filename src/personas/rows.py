"""From a generated answer to its flat results row."""

from dataclasses import dataclass

from src.models.response_fields import MEASURED_FIELDS as RESPONSE_FIELDS
from src.models.response_fields import response_fields
from src.models.thinking import ThinkingSpan
from src.models.types import GenerationResult
from src.personas.tasks import Task

PROJECTION = "mean_projection"
MEASURED_FIELDS = (*RESPONSE_FIELDS, PROJECTION)


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
    """The row, its id first."""
    task = asked.task
    return {
        "id": result.id,
        "persona": task.persona.persona,
        "category": task.persona.category,
        "article": task.persona.article,
        "system_prompt": asked.system_prompt,
        "prompt_id": task.prompt.id,
        "prompt": asked.question,
        "rep_idx": task.rep_idx,
        "turn": asked.turn,
        **response_fields(result, span),
        "persona_applied": asked.persona_applied,
        "seed": asked.seed,
        "model_id": asked.model_id,
    }
