"""Answers projected on a direction: --project_onto of the commands that generate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from src.common.intervention_config import InterventionConfigBase, naming
from src.common.interventions import Entry
from src.common.resolved_interventions import ResolvedOperation
from src.models.engine import Engine
from src.models.hooks import Location
from src.models.types import GenerationRequest

if TYPE_CHECKING:
    from src.models.teacher_forcing import OnProjected


class Projection:
    """A direction, and the place in a model where answers are projected on it."""

    def __init__(self, engine: Engine, onto: ResolvedOperation) -> None:
        """onto: its layer, hook point and direction are taken, what it does is not."""
        self.engine = engine
        self.place = Location(onto.layer, onto.hook_point)
        self.direction = onto.direction

    def generate(self, requests: Sequence[GenerationRequest], *, on_result: "OnProjected", **settings: Any) -> None:
        """
        `Engine.generate` with each answer's mean projection beside it, under the request's own interventions; None for
        an answer without tokens.
        """
        self.engine.generate_projected(requests, self.place, self.direction, on_result=on_result, **settings)


def projection_onto(config: InterventionConfigBase, engine: Engine) -> Projection | None:
    """
    What --project_onto names, None without it. Raises InputError for directions of another model and for a layer that
    has none.
    """
    wanted = config.projection_entry()
    if wanted is None:
        return None
    with naming(f"--project_onto {config.project_onto}"):
        return Projection(engine, one_place(engine, wanted, config.allow_model_mismatch))


def one_place(engine: Engine, entry: Entry, allow_model_mismatch: bool) -> ResolvedOperation:
    """The last layer that an entry acts on, with its direction there. Raises InputError as `Engine.resolve`."""
    # As a plain ablation, so that a coefficient of 0 does not leave it out.
    plain = Entry(
        directions_path=entry.directions_path, k_index=entry.k_index, source_layer=entry.source_layer,
        layers=entry.layers, hook_point=entry.hook_point, op="ablate",
    )  # fmt: skip
    return engine.resolve([plain], allow_model_mismatch).operations[-1]
