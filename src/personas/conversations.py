"""Running the conversations: turn by turn over all tasks, every row written as soon as it is there."""

import logging
from collections.abc import Callable, Sequence

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import Results, Row, row_seed
from src.common.rows import Prompt
from src.models.chat_format import Message, PersonaRenderer, RenderedPrompt
from src.models.engine import Engine
from src.models.projections import Projection
from src.models.thinking import ThinkingReader
from src.models.types import GenerationRequest, GenerationResult
from src.personas.rows import PROJECTION, Asked, results_row
from src.personas.settings import PersonaSettings
from src.personas.tasks import Task
from src.personas.token_arrays import TokenArrays

LOGGER = logging.getLogger(__name__)


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
        renderer: PersonaRenderer, spec: ResolvedSpec | None = None, projection: Projection | None = None,
    ) -> None:  # fmt: skip
        """spec: what acts on every row. projection: what the answers are projected on."""
        self.config = config
        self.spec = spec
        self.projection = projection
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

            def note(
                result: GenerationResult, measured: Row | None = None, turn: int = turn, asked: dict = asked
            ) -> None:
                task, prompt = asked[result.id]
                if arrays:
                    arrays.add(result)
                results.add(self._row(task, turn, prompt, result) | (measured or {}))
                on_row()

            requests = []
            for row_id, (_, prompt) in asked.items():
                if self._fills_context(prompt):
                    note(unanswered(row_id), {PROJECTION: None} if self.projection else None)
                else:
                    requests.append(self._request(row_id, prompt))
            self._generate(requests, note, on_tokens)

    def _generate(
        self,
        requests: Sequence[GenerationRequest],
        note: Callable[[GenerationResult, Row], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        settings = {
            "on_tokens": on_tokens, "batch_size": self.config.batch_size, "top_k": self.config.top_k_mass_k,
        }  # fmt: skip
        if self.projection:
            # A row is whole, and written, only when its answer has been run through the model again.
            projected = lambda result, mean: note(result, {PROJECTION: mean})  # noqa: E731
            self.projection.generate(requests, on_result=projected, **settings)
        else:
            self.engine.generate(requests, on_result=note, **settings)

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
            interventions=self.spec or (),
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
