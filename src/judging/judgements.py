"""From rows and rubrics to the judge's questions, and from its answers to rows of judgements."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.common.api_asking import Asked
from src.common.api_types import Answer
from src.common.errors import InputError
from src.common.jsonl import encode_row, round_measured
from src.common.results import make_id
from src.common.rows import Record
from src.common.rubrics import (
    PROBABILITIES,
    Reading,
    Rubric,
    judge_prompt,
    read_reply,
    read_rubric,
    reading_parameters,
)
from src.judging.settings import JudgeSettings

MEASURED_FIELDS = ("mass",)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row under one rubric, once."""

    row_id: str
    record: Record
    rubric: Rubric
    rep_idx: int
    prompt: str


def read_rubrics(config: JudgeSettings) -> list[Rubric]:
    """Raises InputError for one that is none, and for two of one name."""
    rubrics = [read_rubric(path) for path in config.rubrics]
    names = [rubric.name for rubric in rubrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--rubrics: two are named {twice!r}, which is the column they write; expected each name once")
    return rubrics


def build_tasks(records: Sequence[Record], rubrics: Sequence[Rubric], config: JudgeSettings) -> list[Task]:
    """Row by row, rubric by rubric, the repeats together. Raises InputError where a rubric does not fit a row."""
    tasks = []
    for record in records:
        _refuse_unwritable(record)
        for rubric in rubrics:
            _refuse_taken(record, rubric)
            prompt = judge_prompt(rubric, record.values | config.filled, record.place)
            for rep in range(config.n_repeats):
                name = make_id(rubric.name, record.id, rep)
                tasks.append(Task(row_id=name, record=record, rubric=rubric, rep_idx=rep, prompt=prompt))
    return tasks


def columns_of(rubric: Rubric) -> tuple[str, ...]:
    """The columns that a rubric adds to a row."""
    return rubric.name, f"{rubric.name}_repeats", f"{rubric.name}_mass", f"{rubric.name}_read_from"


def _refuse_unwritable(record: Record) -> None:
    try:
        encode_row(record.values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{record.place}: {error}; expected columns that JSON can hold") from None


def _refuse_taken(record: Record, rubric: Rubric) -> None:
    taken = [name for name in columns_of(rubric) if name in record.values]
    if taken:
        raise InputError(f"{record.place}: it has a column {taken[0]!r} already; rename the rubric in its file")


def asked(tasks: Sequence[Task], config: JudgeSettings, provider: str) -> list[Asked]:
    """The tasks as questions to an API; log-probabilities are asked for where its protocol has them."""
    offered = config.api_backend == "inspect" and config.score_from != "text"
    return [
        Asked(
            id=task.row_id,
            messages=({"role": "user", "content": task.prompt},),
            parameters=config.parameters(task.rep_idx) | (reading_parameters(task.rubric, provider) if offered else {}),
        )
        for task in tasks
    ]


def judgement_row(task: Task, answer: Answer, config: JudgeSettings) -> dict[str, object]:
    """The row of one judgement: what the judge wrote and what that means."""
    reading = _read(task.rubric, answer, config)
    return {
        "id": task.row_id,
        "row_id": task.record.id,
        "rubric": task.rubric.name,
        "rep_idx": task.rep_idx,
        "score": reading.value if isinstance(reading.value, str) else round_measured(reading.value),
        "mass": reading.mass,
        "read_from": reading.read_from,
        "judgement": answer.completion,
        "finish_reason": answer.stop_reason,
        "num_tokens": answer.output_tokens,
        "answered_by": answer.model_id,
        "seed": task.rep_idx if config.send_seed else None,
    }


def _read(rubric: Rubric, answer: Answer, config: JudgeSettings) -> Reading:
    reading = read_reply(rubric, answer, config.min_mass)
    if rubric.kind == PROBABILITIES and config.score_from == PROBABILITIES and reading.read_from == "text":
        return Reading(None, None, PROBABILITIES)
    return reading
