"""Many questions at once, each with an id: what has an answer is handed on as it comes, what has none is told."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.api_client import ApiClient
from src.common.api_types import Answer, ApiFailure, Message
from src.common.jsonl import JsonlWriter, write_jsonl_atomic
from src.common.safetytooling_wrappers import api_call
from src.common.secrets import withhold

if TYPE_CHECKING:
    from safetytooling.apis import InferenceAPI

LOGGER = logging.getLogger(__name__)
FAILURES = "failures.jsonl"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question and the id of the row that its answer makes."""

    id: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]


OnAnswer = Callable[[Asked, Answer], None]


class Failures:
    """failures.jsonl: the questions without an answer, each with the reason; absent where there are none."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FAILURES
        self.rows: dict[str, dict[str, Any]] = {}
        # Those of an earlier start are asked again.
        self.path.unlink(missing_ok=True)

    def add(self, asked: Asked, reason: str, status: int | None, attempts: int) -> None:
        """One more, on disk at once."""
        row = {"id": asked.id, "reason": withhold(reason), "status": status, "attempts": attempts}
        row["question"] = asked.messages[-1]["content"]
        self.rows[asked.id] = row
        with JsonlWriter(self.path) as file:
            file.write(row)

    def finish(self, order: Iterable[str]) -> None:
        """Puts them in the order of the questions."""
        self.rows = {key: self.rows[key] for key in order if key in self.rows}
        if self.rows:
            write_jsonl_atomic(self.path, self.rows.values())


async def ask_all(
    api: "ApiClient | InferenceAPI", model_id: str, asked: Sequence[Asked], on_answer: OnAnswer, failures: Failures
) -> None:
    """
    Asks everything at once, as far as the bounds of `api` allow. `on_answer` is called in the order of the answers'
    coming. A question without an answer goes to `failures` and hinders no other.
    """

    async def ask_one(each: Asked) -> None:
        try:
            answers = await api_call(api, model_id, each.messages, **each.parameters)
        except ApiFailure as failure:
            failures.add(each, failure.reason, failure.status, failure.attempts)
        else:
            on_answer(each, _ours(answers[0]))

    try:
        async with asyncio.TaskGroup() as group:
            for each in asked:
                group.create_task(ask_one(each))
    except ExceptionGroup as group:
        # Whatever is no failure of one question stops the run, as itself.
        raise group.exceptions[0] from None
    finally:
        if isinstance(api, ApiClient):
            await api.close()


def _ours(answer: Any) -> Answer:
    if isinstance(answer, Answer):
        return answer
    usage = answer.usage
    return Answer(
        completion=answer.completion,
        stop_reason=str(answer.stop_reason),
        model_id=answer.model_id,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
    )
