"""From the dataset to the questions: every row, `n_repeats` times."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.asking.settings import AskSettings
from src.common.api_asking import Asked
from src.common.api_types import Answer, Message
from src.common.errors import InputError
from src.common.results import make_id
from src.common.rows import TEXT_KEYS, Record, read_messages, read_records

MESSAGES = "messages"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question, once."""

    row_id: str
    prompt_id: str
    text: str
    """What the row calls `prompt`: the question, or the last message of a conversation."""
    messages: tuple[Message, ...]
    rep_idx: int


def read_tasks(config: AskSettings) -> list[Task]:
    """Question by question, its repeats together. Raises InputError for a row that holds no question."""
    tasks = []
    for record in read_records(config.dataset_path, config.num_tasks):
        messages = _messages(record, config.question_field)
        if config.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise InputError(f"{record.place}: it has a system message of its own; leave out --system_prompt")
            messages = ({"role": "system", "content": config.system_prompt}, *messages)
        for rep in range(config.n_repeats):
            tasks.append(
                Task(
                    row_id=make_id(record.id, rep),
                    prompt_id=record.id,
                    text=messages[-1]["content"],
                    messages=messages,
                    rep_idx=rep,
                )
            )
    return tasks


def _messages(record: Record, field: str | None) -> tuple[Message, ...]:
    if field is None:
        field = next((name for name in (MESSAGES, *TEXT_KEYS) if name in record.values), TEXT_KEYS[0])
    value = record.values.get(field)
    if not isinstance(value, list):
        return ({"role": "user", "content": record.text(field)},)
    messages = read_messages(record.place, value)
    if messages[-1]["role"] != "user":
        raise InputError(f'{record.place}: the last message is of role {messages[-1]["role"]}; expected "user"')
    return messages


def asked(tasks: Sequence[Task], config: AskSettings) -> list[Asked]:
    """The tasks as questions to an API."""
    return [Asked(id=t.row_id, messages=t.messages, parameters=config.parameters(t.rep_idx)) for t in tasks]


def results_row(task: Task, answer: Answer, config: AskSettings) -> dict[str, object]:
    """The row, its id first; a finish_reason is in the provider's own word."""
    return {
        "id": task.row_id,
        "prompt_id": task.prompt_id,
        "prompt": task.text,
        "system_prompt": config.system_prompt,
        "rep_idx": task.rep_idx,
        "response": answer.completion,
        "thinking": answer.reasoning,
        "num_tokens": answer.output_tokens,
        "num_prompt_tokens": answer.input_tokens,
        "finish_reason": answer.stop_reason,
        "answered_by": answer.model_id,
        "seed": task.rep_idx if config.send_seed else None,
        "model_id": config.model_id,
    }
