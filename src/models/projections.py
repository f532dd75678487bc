"""Answers projected on a direction: --project_onto of the commands that generate."""

from collections.abc import Sequence

from src.common.intervention_config import InterventionConfigBase, naming
from src.common.interventions import Entry
from src.common.resolved_interventions import ResolvedOperation
from src.models.hooks import Location
from src.models.language_model import LanguageModel
from src.models.teacher_forcing import mean_projections
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult

Answer = tuple[GenerationRequest, GenerationResult]


class Projection:
    """A direction, and the place in a model where answers are projected on it."""

    def __init__(self, model: LanguageModel, onto: ResolvedOperation) -> None:
        """onto: its layer, hook point and direction are taken, what it does is not."""
        self.model = model
        self.place = Location(onto.layer, onto.hook_point)
        self.direction = onto.direction

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """
        The mean projection of each answer, as `mean_projections` defines it, under the request's own interventions;
        None for an answer without tokens.
        """
        rows = {
            result.id: (_sequence(request, result), request.spec) for request, result in answers if result.token_ids
        }
        means = mean_projections(self.model, list(rows.values()), self.place, self.direction)
        return [dict(zip(rows, means, strict=True)).get(result.id) for _, result in answers]


def projection_onto(config: InterventionConfigBase, model: LanguageModel) -> Projection | None:
    """
    What --project_onto names, None without it. Raises InputError for directions of another model and for a layer that
    has none.
    """
    wanted = config.projection_entry()
    if wanted is None:
        return None
    with naming(f"--project_onto {config.project_onto}"):
        return Projection(model, one_place(model, wanted, config.allow_model_mismatch))


def one_place(model: LanguageModel, entry: Entry, allow_model_mismatch: bool) -> ResolvedOperation:
    """The last layer that an entry acts on, with its direction there. Raises InputError as `LanguageModel.resolve`."""
    # As a plain ablation, so that a coefficient of 0 does not leave it out.
    plain = Entry(
        directions_path=entry.directions_path, k_index=entry.k_index, source_layer=entry.source_layer,
        layers=entry.layers, hook_point=entry.hook_point, op="ablate",
    )  # fmt: skip
    return model.resolve([plain], allow_model_mismatch).operations[-1]


def _sequence(request: GenerationRequest, result: GenerationResult) -> TokenSequence:
    return TokenSequence(
        id=result.id, token_ids=(*request.token_ids, *result.token_ids), prompt_length=len(request.token_ids)
    )
