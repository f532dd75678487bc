"""The engine behind the desk: loaded when the first call comes, its adapters changed as the calls ask for them."""

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from src.common.progress import Progress
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import Row
from src.common.runs import Run
from src.evaluation.calls import Call
from src.evaluation.settings import EvaluateSettings
from src.models.adapter_switching import Sharing
from src.models.arms import Arm, specs_of
from src.models.chat_format import with_chat_template
from src.models.engine import Engine, load_engine, refuse_idle
from src.models.hub import adapter_folder, split_reference
from src.models.intervention_check import refuse_unfit
from src.models.response_fields import response_fields
from src.models.thinking import ThinkingReader
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult

LOGGER = logging.getLogger(__name__)


class Serving:
    """One engine for all references of a `Sharing`. Use it in a `with` block."""

    def __init__(
        self, config: EvaluateSettings, run: Run, sharing: Sharing, arms: Sequence[Arm], *, weighs: bool,
        progress: Progress,
    ) -> None:  # fmt: skip
        """weighs: whether log-probabilities of given answers will be asked."""
        self._config, self._run, self._sharing, self._arms = config, run, sharing, arms
        self._keeps = weighs or any(arm.entries for arm in arms)
        self._progress = progress
        self._engine: Engine | None = None
        self._reader: ThinkingReader | None = None
        self._specs: dict[str, dict[str, ResolvedSpec]] = {}

    def prepare(self) -> None:
        """Load the model. Raises what `load_engine` raises, and InputError for interventions that do not fit it."""
        if self._engine is not None:
            return
        switches = bool(self._sharing.adapters)
        reference = self._sharing.base if switches else self._sharing.references[0]
        one = self._config.of_model(reference, adapter=not switches)
        refuse_unfit(one)
        self._engine = load_engine(one, self._config.batch_size, keeps=self._keeps, adapters=self._sharing.adapters)
        with_chat_template(self._engine.tokenizer, self._config.chat_template)
        self._reader = ThinkingReader(self._engine.tokenizer)
        self._run.record(**{f"engine of {reference}": self._engine.facts})

    def answer(self, calls: Sequence[Call], on_row: Callable[[Row], None]) -> None:
        """Answer calls, in no fixed order. Raises what the engine raises."""
        for reference in self._sharing.references:
            some = [call for call in calls if call.reference == reference]
            if some:
                self._turn_to(reference)
                weighed = [call for call in some if call.options]
                self._refuse_idle(weighed)
                self._write([call for call in some if not call.options], on_row)
                self._weigh(weighed, on_row)

    def close(self) -> None:
        """Free the model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = self._reader = None
            # The next model may need the room.
            gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _turn_to(self, reference: str) -> None:
        if self._sharing.adapters:
            self._engine.use_adapter(_adapter_of(reference))
        if reference not in self._specs:
            self._specs[reference] = specs_of(
                self._arms, self._engine, self._config.seed, self._config.allow_model_mismatch
            )

    def _write(self, calls: Sequence[Call], on_row: Callable[[Row], None]) -> None:
        by_id = {call.id: call for call in calls}

        def note(result: GenerationResult) -> None:
            span = self._reader.read(result.token_ids, by_id[result.id].header)
            on_row({"id": result.id, "token_ids": list(result.token_ids), **response_fields(result, span)})
            self._progress.add_row()

        requests = [
            GenerationRequest(
                id=call.id, token_ids=call.token_ids, max_tokens=call.max_tokens, temperature=call.temperature,
                seed=call.seed, interventions=self._spec(call) or (),
            )
            for call in calls
        ]  # fmt: skip
        if requests:
            self._engine.generate(
                requests, on_result=note, on_tokens=self._progress.add_tokens, batch_size=self._config.batch_size,
                top_k=self._config.top_k_mass_k,
            )  # fmt: skip

    def _weigh(self, calls: Sequence[Call], on_row: Callable[[Row], None]) -> None:
        # Not all at once: what is done is on the disk should the run be stopped.
        for start in range(0, len(calls), self._config.batch_size):
            some = calls[start : start + self._config.batch_size]
            rows = [
                (
                    TokenSequence(id=call.id, token_ids=(*call.token_ids, *option), prompt_length=len(call.token_ids)),
                    spec,
                )
                for call in some
                for spec in [self._spec(call)]
                for option in call.options
            ]
            sums = iter([float(values.sum()) for values in self._engine.log_probabilities(rows)])
            for call in some:
                on_row({"id": call.id, "log_probabilities": [next(sums) for _ in call.options]})
                self._progress.add_row()

    def _refuse_idle(self, calls: Sequence[Call]) -> None:
        """Of options that are given the engine refuses nothing."""
        for call in calls:
            longest, spec = max(map(len, call.options)), self._spec(call) or ()
            refuse_idle(GenerationRequest(id=call.id, token_ids=call.token_ids, max_tokens=longest, interventions=spec))

    def _spec(self, call: Call) -> ResolvedSpec | None:
        spec = self._specs[call.reference][call.arm]
        return spec if spec.operations else None


def _adapter_of(reference: str) -> Path | None:
    _, adapter = split_reference(reference)
    return adapter_folder(adapter) if adapter else None


def facts_of(formats: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each reference what the run is pinned to: fact → reference → value."""
    names = ("model_fingerprint", "adapter_fingerprint", "format_fingerprint", "dtype")
    return {name: {reference: each.facts[name] for reference, each in formats.items()} for name in names}
