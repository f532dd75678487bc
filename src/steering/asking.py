"""Asking every prompt in every arm, and measuring the answers; every row is written as soon as it is whole."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import Results, row_seed
from src.models.arms import Arm, specs_of
from src.models.engine import Engine, refuse_idle
from src.models.projections import Projection, one_place, projection_onto
from src.models.single_prompts import SinglePromptRenderer
from src.models.thinking import ThinkingReader
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult
from src.steering.kept import Kept
from src.steering.measures import WordLists
from src.steering.references import References
from src.steering.rows import Measured, results_row
from src.steering.settings import SteerSettings
from src.steering.tasks import Task


def asking_on(
    engine: Engine, config: SteerSettings, arms: Sequence[Arm], lists: WordLists, today: date, kept: Kept | None = None
) -> "Asking":
    """
    All that the tasks of a run need, on a loaded engine. today: for chat templates with a date. Raises InputError for
    interventions, a projection or a chat template that does not fit the model.
    """
    specs = specs_of(arms, engine, config.seed, config.allow_model_mismatch)
    projection = projection_onto(config, engine) or Projection(
        engine, one_place(engine, config.entries()[0], config.allow_model_mismatch)
    )
    renderer = SinglePromptRenderer(
        engine.tokenizer, today, raw=config.raw_prompts, system_prompt=config.system_prompt,
        chat_template=config.chat_template, thinking=config.thinking_mode,
    )  # fmt: skip
    return Asking(config, engine, renderer, specs, projection, lists, kept)


class Asking:
    """A loaded model with all that the tasks of a run need."""

    def __init__(
        self, config: SteerSettings, engine: Engine, renderer: SinglePromptRenderer, specs: dict[str, ResolvedSpec],
        projection: Projection, lists: WordLists, kept: Kept | None = None,
    ) -> None:  # fmt: skip
        """kept: where hidden states go, on vLLM."""
        self.config = config
        self.engine = engine
        self.renderer = renderer
        self.specs = specs
        self.projection = projection
        self.lists = lists
        self.kept = kept
        self.reader = ThinkingReader(engine.tokenizer)

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

        Raises InputError when a prompt fills the context, and when an intervention can act on none of its positions,
        before anything is generated.
        """
        waiting = [task for task in tasks if task.row_id not in results.rows]
        for task in waiting:
            self._refuse_too_long(task)
            refuse_idle(self.request(task))
        # All arms of a prompt together, so that they share the unsteered pass of the comparison.
        place = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(task.prompt.id for task in tasks))}
        steered = [task for task in waiting if not task.arm.is_reference]
        steered.sort(key=lambda task: (place[task.prompt.id], task.rep_idx))
        at_once = self.config.batch_size * self.engine.batches_at_once
        try:
            for some in ([task for task in waiting if task.arm.is_reference], steered):
                for start in range(0, len(some), at_once):
                    self._ask(some[start : start + at_once], results, references, on_row, on_tokens)
                    self._flush()
        finally:
            # Also on SIGTERM: rows without their captures would be asked again.
            self._flush()

    def request(self, task: Task) -> GenerationRequest:
        """What a task asks of the engine."""
        return GenerationRequest(
            id=task.row_id,
            token_ids=self.renderer.rendered(task.prompt.text).token_ids,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=row_seed(self.config.seed, task.row_id),
            interventions=self.specs[task.arm.name],
        )

    def _ask(
        self, tasks: Sequence[Task], results: Results, references: References, on_row: Callable[[], None],
        on_tokens: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Divergences first, since they wait for no answer; then every row as soon as its answer is measured."""
        by_id = {task.row_id: task for task in tasks}
        requests = {task.row_id: self._capturing(self.request(task)) for task in tasks}
        divergences = self._divergences(tasks, requests, references)

        def note(result: GenerationResult, mean: float | None) -> None:
            task = by_id[result.id]
            if task.arm.is_reference:
                references.add(task.row_id, result.token_ids)
            measured = Measured(kl_per_token=divergences.get(task.row_id), mean_projection=mean)
            results.add(self._row(task, result, measured))
            if self.kept:
                self.kept.add(requests[result.id], result)
            on_row()

        self.projection.generate(
            list(requests.values()), on_result=note, on_tokens=on_tokens, batch_size=self.config.batch_size,
            top_k=self.config.top_k_mass_k,
        )  # fmt: skip

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
        measured = self.engine.kl_per_token(list(rows.values()))
        return {row_id: kl.mean().item() for row_id, kl in zip(rows, measured, strict=True)}

    def _capturing(self, request: GenerationRequest) -> GenerationRequest:
        if self.kept is None:
            return request
        return replace(request, capture=self.kept.of(len(request.token_ids), self.engine.n_layers))

    def _flush(self) -> None:
        if self.kept:
            self.kept.flush()

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
        limit = self.engine.context_length
        if limit is not None and n_tokens >= limit:
            raise InputError(
                f"{self.config.prompts_json}: prompt {task.prompt.id!r} has {n_tokens} tokens, and the model's context "
                f"is {limit}; shorten or leave out this prompt"
            )
