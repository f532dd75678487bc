"""Running the conversations: turn by turn over all tasks, every row written as soon as it is there."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from src.common.errors import InputError
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, round_fields, write_jsonl_atomic
from src.common.rows import Prompt
from src.models.chat_format import Message, PersonaRenderer, RenderedPrompt
from src.models.engine import Engine
from src.models.thinking import ThinkingReader
from src.models.types import GenerationRequest, GenerationResult
from src.personas.rows import MEASURED_FIELDS, Asked, results_row
from src.personas.settings import PersonaSettings
from src.personas.tasks import Task, row_seed
from src.personas.token_arrays import TokenArrays

LOGGER = logging.getLogger(__name__)
Row = dict[str, object]
FILE_NAME = "results.jsonl"


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

    def refuse_other_prompts(self, tasks: Sequence[Task]) -> None:
        """Raises InputError where a row answers another prompt than its task asks: their source has changed."""
        for task in tasks:
            row = self.rows.get(task.row_id(0))
            if row is not None and row["prompt"] != task.prompt.text:
                raise InputError(
                    f"{self.path}: the row of prompt {task.prompt.id!r} answers {str(row['prompt'])[:60]!r}, "
                    f"and the prompt is now {task.prompt.text[:60]!r}; choose another --output_dir"
                )

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


def unanswered(row_id: str) -> GenerationResult:
    """The result of a turn for which the context has no room."""
    return GenerationResult(id=row_id, token_ids=(), text="", entropy=(), top_k_mass=(), finish_reason="context")


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

        A conversation that has grown to the model's context gets a row without an answer, its finish_reason `context`.
        Raises InputError when a prompt alone fills it; nothing is generated then.
        """
        for turn in range(len(self.follow_ups) + 1):
            open_tasks = [task for task in self.tasks if task.row_id(turn) not in results.rows]
            asked = {task.row_id(turn): (task, self._rendered(task, turn, results)) for task in open_tasks}

            def note(result: GenerationResult, turn: int = turn, asked: dict = asked) -> None:
                task, prompt = asked[result.id]
                if arrays:
                    arrays.add(result)
                results.add(self._row(task, turn, prompt, result))
                on_row()

            requests = []
            for row_id, (_, prompt) in asked.items():
                if self._fills_context(prompt):
                    note(unanswered(row_id))
                else:
                    requests.append(self._request(row_id, prompt))
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
        if turn == 0 and self._fills_context(prompt):
            raise InputError(
                f"{self.config.prompts_json}: prompt {task.prompt.id!r} as {task.persona.persona!r} has "
                f"{len(prompt.token_ids)} tokens, and the model's context is {self.engine.context_length}; "
                f"shorten or leave out this prompt"
            )
        return prompt

    def _fills_context(self, prompt: RenderedPrompt) -> bool:
        limit = self.engine.context_length
        return limit is not None and len(prompt.token_ids) >= limit

    def _request(self, row_id: str, prompt: RenderedPrompt) -> GenerationRequest:
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
