"""
Steering while training (preventative steering, Chen et al. 2025, arXiv 2507.21509): with the trait's direction added,
the adapter need not learn the trait to fit the rows. The adapter is then used without.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from src.common.intervention_config import naming
from src.common.interventions import parse_steer
from src.common.resolved_interventions import resolve
from src.models.architectures import decoder_layers
from src.models.loading import ModelFiles
from src.models.steering import steered
from src.training.settings import FinetuneSettings

Acting = Callable[[dict[str, Tensor]], AbstractContextManager]


def direction_files(texts: list[str] | None) -> list[Path]:
    """The files that --preventative_direction names. Raises InputError for another form."""
    files = []
    for text in texts or []:
        with naming(f"--preventative_direction {text}"):
            files.append(Path(parse_steer(text).directions_path))
    return list(dict.fromkeys(files))


def acting_on(config: FinetuneSettings, files: ModelFiles) -> Callable[[nn.Module], Acting] | None:
    """
    What makes, of the model, the context of each pass: the directions are added at all positions. None when nothing is
    to act. Raises InputError for a directions file of another model, or that lacks the layer.
    """
    if not config.preventative_direction:
        return None
    entries = [parse_steer(text) for text in config.preventative_direction]

    def make(model: nn.Module) -> Acting:
        spec = resolve(
            entries,
            n_layers=len(decoder_layers(model)),
            d_model=model.config.get_text_config(decoder=True).hidden_size,
            model_fingerprint=files.facts["model_fingerprint"],
            allow_model_mismatch=False,
        )

        def acting(inputs: dict[str, Any]) -> AbstractContextManager:
            n_rows, n_columns = inputs["input_ids"].shape
            return steered(model, [spec] * n_rows, [n_columns] * n_rows)

        return acting

    return make
