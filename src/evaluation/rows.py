"""From a log of inspect-ai to the flat rows of results.jsonl."""

from collections.abc import Mapping
from typing import Any

from src.common.results import Row
from src.evaluation.cells import Cell
from src.evaluation.scorers import JUDGED, LABEL, PROBABILITY
from src.models.response_fields import MEASURED_FIELDS as RESPONSE_FIELDS

MEASURED_FIELDS = (*RESPONSE_FIELDS, "score")
"""Fields to round; probabilities stay whole: rounded ones would be tied, and the AUC another."""
LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""inspect-ai's marks: correct, partial, incorrect, no answer."""
KEPT = (*RESPONSE_FIELDS, "thinking", "num_tokens", "num_thinking_tokens", "truncated_thinking", "finish_reason")


def rows_of(log: Any, cell: Cell) -> list[Row]:
    """
    One row a sample and repeat, in the order of the task's dataset, repeats of a sample together. The response and its
    uncertainty are those of the last answer where a task asks several times.
    """
    order = {str(sample_id): i for i, sample_id in enumerate(log.eval.dataset.sample_ids or [])}
    samples = sorted(log.samples, key=lambda s: (order.get(str(s.id), len(order)), s.epoch))
    scorers = [each.name for each in log.eval.scorers or []]
    return [_row(sample, cell, scorers) for sample in samples]


def _row(sample: Any, cell: Cell, scorers: list[str]) -> Row:
    scores = sample.scores or {}
    names = [name for name in scorers if name in scores] or list(scores)
    first = scores[names[0]] if names else None
    metadata = (first.metadata or {}) if first else {}
    output = sample.output.metadata or {}
    persona = cell.persona
    return {
        "id": cell.row_id(str(sample.id), sample.epoch),
        "cell": cell.id,
        "task": cell.source.name,
        "model_id": cell.reference,
        "persona": persona.persona if persona else None,
        "category": persona.category if persona else None,
        "arm": cell.arm.name,
        "coefficient": cell.arm.coefficient,
        "sample_id": str(sample.id),
        "rep_idx": sample.epoch - 1,
        "prompt": _text(sample),
        "target": sample.target,
        "response": sample.output.completion,
        "answer": first.answer if first else None,
        "score": as_number(first.value) if first else None,
        **{f"score_{name}": as_number(scores[name].value) for name in names if len(names) > 1},
        PROBABILITY: metadata.get(PROBABILITY),
        LABEL: metadata.get(LABEL),
        JUDGED: metadata.get(JUDGED),
        **{name: output.get(name) for name in KEPT},
    }


def as_number(value: object) -> float | None:
    """A score as a number: inspect-ai's letters, numbers and truth values; None for what is none of them."""
    if isinstance(value, bool | int | float):
        return float(value) if value == value else None
    return LETTERS.get(value) if isinstance(value, str) else None


def _text(sample: Any) -> str:
    """What was asked, without what a file's header puts around it."""
    known: Mapping[str, Any] = sample.metadata or {}
    if isinstance(known.get("text"), str):
        return known["text"]
    if isinstance(sample.input, str):
        return sample.input
    return "\n\n".join(message.text for message in sample.input if message.role == "user")
