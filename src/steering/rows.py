"""From a generated response to its flat results row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.models.response_fields import MEASURED_FIELDS as RESPONSE_FIELDS
from src.models.response_fields import response_fields
from src.models.types import GenerationResult
from src.ops.repetition import distinct_n
from src.steering.measures import WordLists, count_words
from src.steering.tasks import Task

if TYPE_CHECKING:
    from src.models.thinking import ThinkingSpan

MEASURED_FIELDS = (*RESPONSE_FIELDS, "kl_per_token", "mean_projection", "distinct_1", "distinct_2")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the response's tokens gave when they were run through the model once more."""

    kl_per_token: float | None
    """Nats, the mean over the tokens of the unsteered response; None when that is empty."""
    mean_projection: float | None
    """None for an empty response."""


def results_row(
    task: Task,
    result: GenerationResult,
    span: "ThinkingSpan",
    measured: Measured,
    lists: WordLists,
    asked: dict[str, object],
) -> dict[str, object]:
    """The row, its id first. asked: the fields that all rows of the run share, and the seed."""
    answer = result.token_ids[span.num_tokens :]
    return {
        "id": result.id,
        "arm": task.arm.name,
        "coefficient": task.arm.coefficient,
        "control": task.arm.is_control,
        "prompt_id": task.prompt.id,
        "prompt": task.prompt.text,
        "rep_idx": task.rep_idx,
        **response_fields(result, span),
        "kl_per_token": measured.kl_per_token,
        "mean_projection": measured.mean_projection,
        "distinct_1": distinct_n(answer, 1),
        "distinct_2": distinct_n(answer, 2),
        **count_words(span.response, lists),
        **asked,
    }
