"""Running the conversations: turn by turn over all tasks, every row written as soon as it is there."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from src.common.errors import InputError
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, round_fields, write_jsonl_atomic
from src.common.rows import Prompt
from src.models.chat_format import Message, PersonaRenderer, RenderedPrompt
from src.models.thinking import ThinkingReader
from src.models.types import GenerationRequest, GenerationResult
from src.personas.rows import MEASURED_FIELDS, Asked, results_row
from src.personas.settings import PersonaSettings
from src.personas.tasks import Task, row_seed
from src.personas.token_arrays import TokenArrays

LOGGER = logging.getLogger(__name__)
Row = dict[str, object]
FILE_NAME = "results.jsonl"


class Engine(Protocol):
    """What generates: transformers or vLLM."""

    context_length: int | None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None],
        on_tokens: Callable[[int], None],
        batch_size: int,
        top_k: int,
    ) -> None: ...


class Results:
    """The rows of a run: those that an earlier start left, and those that this one adds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        repair_torn_tail(self.path)
        self.rows: dict[str, Row] = {}
        if self.path.exists():
            for number, row in read_jsonl(self.path):
                if row.get("id") in self.rows or "id" not in row:
                    raise InputError(f"{self.path}:{number}: a row without an id or twice; expected each id once")
                self.rows[str(row["id"])] = row
        self._writer = JsonlWriter(self.path)

    def add(self, row: Row) -> None:
        row = round_fields(row, MEASURED_FIELDS)
        self._writer.write(row)
        self.rows[str(row["id"])] = row

    def finish(self, order: Sequence[str]) -> None:
        """Rewrite the file in the order of `order`; rows of an earlier, larger call come after."""
        self._writer.close()
        listed = dict.fromkeys(order)
        self.rows = {key: self.rows[key] for key in [*listed, *(k for k in self.rows if k not in listed)]}
        write_jsonl_atomic(self.path, self.rows.values())


def all_row_ids(tasks: Sequence[Task], follow_ups: Sequence[Prompt]) -> list[str]:
    """Ids of all rows in task order, the turns of a conversation together."""
    return [task.row_id(turn) for task in tasks for turn in range(len(follow_ups) + 1)]


class Conversations:
    """All tasks of a run with what is needed to ask them."""

    def __init__(
        self, config: PersonaSettings, tasks: Sequence[Task], follow_ups: Sequence[Prompt], engine: Engine,
        renderer: PersonaRenderer,
    ) -> None:  # fmt: skip
        self.config = config
        self.tasks = tasks
        self.follow_ups = follow_ups
        self.engine = engine
        self.renderer = renderer
        self.reader = ThinkingReader(renderer.tokenizer)

    def run(
        self,
        results: Results,
        arrays: TokenArrays | None,
        on_row: Callable[[], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        """
        Ask everything that `results` does not hold yet.

        Raises InputError when a prompt fills the model's context; nothing of its turn is generated then.
        """
        for turn in range(len(self.follow_ups) + 1):
            open_tasks = [task for task in self.tasks if task.row_id(turn) not in results.rows]
            prompts = [self._rendered(task, turn, results) for task in open_tasks]
            requests = [self._request(task, turn, prompt) for task, prompt in zip(open_tasks, prompts, strict=True)]
            asked = dict(zip((r.id for r in requests), zip(open_tasks, prompts, strict=True), strict=True))

            def note(result: GenerationResult, turn: int = turn, asked: dict = asked) -> None:
                task, prompt = asked[result.id]
                if arrays:
                    arrays.add(result)
                results.add(self._row(task, turn, prompt, result))
                on_row()

            self.engine.generate(
                requests,
                on_result=note,
                on_tokens=on_tokens,
                batch_size=self.config.batch_size,
                top_k=self.config.top_k_mass_k,
            )

    def _question(self, task: Task, turn: int) -> str:
        return task.prompt.text if turn == 0 else self.follow_ups[turn - 1].text

    def _rendered(self, task: Task, turn: int, results: Results) -> RenderedPrompt:
        messages: list[Message] = []
        for earlier in range(turn):
            answer = str(results.rows[task.row_id(earlier)]["response"])
            messages += [
                {"role": "user", "content": self._question(task, earlier)},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": self._question(task, turn)})
        prompt = self.renderer.render(messages, task.persona.persona, task.persona.article)
        limit = self.engine.context_length
        if limit and len(prompt.token_ids) >= limit:
            raise InputError(
                f"{self.config.prompts_json}: prompt {task.prompt.id!r} as {task.persona.persona!r}, turn {turn}: "
                f"{len(prompt.token_ids)} tokens, and the model's context is {limit}; shorten or leave out this prompt"
            )
        return prompt

    def _request(self, task: Task, turn: int, prompt: RenderedPrompt) -> GenerationRequest:
        row_id = task.row_id(turn)
        return GenerationRequest(
            id=row_id,
            token_ids=prompt.token_ids,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=row_seed(self.config.seed, row_id),
        )

    def _row(self, task: Task, turn: int, prompt: RenderedPrompt, result: GenerationResult) -> Row:
        asked = Asked(
            task=task,
            turn=turn,
            question=self._question(task, turn),
            system_prompt=prompt.system_prompt,
            persona_applied=prompt.persona_applied,
            seed=row_seed(self.config.seed, result.id),
            model_id=self.config.model_id,
        )
        return results_row(asked, result, self.reader.read(result.token_ids, prompt.header))
