"""Asking every prompt in every arm, batch by batch, and measuring the answers; every row is written as it is whole."""

from collections.abc import Callable, Sequence

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import Results, row_seed
from src.models.language_model import LanguageModel
from src.models.projections import Projection
from src.models.single_prompts import SinglePromptRenderer
from src.models.teacher_forcing import kl_per_token
from src.models.thinking import ThinkingReader
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult
from src.steering.arms import Task
from src.steering.measures import WordLists
from src.steering.references import References
from src.steering.rows import Measured, results_row
from src.steering.settings import SteerSettings


class Asking:
    """A loaded model with all that the tasks of a run need."""

    def __init__(
        self, config: SteerSettings, model: LanguageModel, renderer: SinglePromptRenderer,
        specs: dict[str, ResolvedSpec], projection: Projection, lists: WordLists,
    ) -> None:  # fmt: skip
        self.config = config
        self.model = model
        self.renderer = renderer
        self.specs = specs
        self.projection = projection
        self.lists = lists
        self.reader = ThinkingReader(model.tokenizer)

    def run(
        self,
        tasks: Sequence[Task],
        results: Results,
        references: References,
        on_row: Callable[[], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        """
        Ask what `results` does not hold: the unsteered arm first, since divergences are measured on its responses.

        Raises InputError when a prompt fills the context, before anything is generated.
        """
        waiting = [task for task in tasks if task.row_id not in results.rows]
        for task in waiting:
            self._refuse_too_long(task)
        # All arms of a prompt together, so that they share the unsteered pass of the comparison.
        place = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(task.prompt.id for task in tasks))}
        steered = [task for task in waiting if not task.arm.is_reference]
        steered.sort(key=lambda task: (place[task.prompt.id], task.rep_idx))
        for some in ([task for task in waiting if task.arm.is_reference], steered):
            for start in range(0, len(some), self.config.batch_size):
                for task, result, measured in self._batch(
                    some[start : start + self.config.batch_size], references, on_tokens
                ):
                    if task.arm.is_reference:
                        references.add(task.row_id, result.token_ids)
                    results.add(self._row(task, result, measured))
                    on_row()

    def _batch(
        self, tasks: Sequence[Task], references: References, on_tokens: Callable[[int], None]
    ) -> list[tuple[Task, GenerationResult, Measured]]:
        requests = {task.row_id: self._request(task) for task in tasks}
        results: dict[str, GenerationResult] = {}
        self.model.generate(
            list(requests.values()),
            on_result=lambda result: results.__setitem__(result.id, result),
            on_tokens=on_tokens,
            batch_size=self.config.batch_size,
            top_k=self.config.top_k_mass_k,
        )
        ordered = [results[task.row_id] for task in tasks]
        projections = self.projection([(requests[result.id], result) for result in ordered])
        divergences = self._divergences(tasks, requests, references)
        return [
            (task, result, Measured(kl_per_token=divergences.get(task.row_id), mean_projection=mean))
            for task, result, mean in zip(tasks, ordered, projections, strict=True)
        ]

    def _divergences(
        self, tasks: Sequence[Task], requests: dict[str, GenerationRequest], references: References
    ) -> dict[str, float]:
        """Row id → mean KL per token on the unsteered response, without those whose unsteered response is empty."""
        rows = {}
        for task in tasks:
            response = () if task.arm.is_reference else references.token_ids[task.reference_id]
            prompt = requests[task.row_id].token_ids
            if response:
                sequence = TokenSequence(
                    id=task.row_id, token_ids=(*prompt, *response), prompt_length=len(prompt)
                )  # fmt: skip
                rows[task.row_id] = (sequence, requests[task.row_id].spec)
        measured = kl_per_token(self.model, list(rows.values()))
        return {row_id: kl.mean().item() for row_id, kl in zip(rows, measured, strict=True)}

    def _request(self, task: Task) -> GenerationRequest:
        return GenerationRequest(
            id=task.row_id,
            token_ids=self.renderer.rendered(task.prompt.text).token_ids,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=row_seed(self.config.seed, task.row_id),
            interventions=self.specs[task.arm.name],
        )

    def _row(self, task: Task, result: GenerationResult, measured: Measured) -> dict[str, object]:
        prompt = self.renderer.rendered(task.prompt.text)
        asked = {
            "system_prompt": self.config.system_prompt,
            "seed": row_seed(self.config.seed, result.id),
            "model_id": self.config.model_id,
        }
        if task.arm.is_reference and result.token_ids:
            # By definition: it is compared with itself.
            measured = Measured(kl_per_token=0.0, mean_projection=measured.mean_projection)
        span = self.reader.read(result.token_ids, prompt.header)
        return results_row(task, result, span, measured, self.lists, asked)

    def _refuse_too_long(self, task: Task) -> None:
        n_tokens = len(self.renderer.rendered(task.prompt.text).token_ids)
        limit = self.model.context_length
        if limit is not None and n_tokens >= limit:
            raise InputError(
                f"{self.config.prompts_json}: prompt {task.prompt.id!r} has {n_tokens} tokens, and the model's context "
                f"is {limit}; shorten or leave out this prompt"
            )
