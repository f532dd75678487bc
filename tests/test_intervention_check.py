"""Interventions that do not fit a model are refused by its files, whatever its weights."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from src.common.directions_file import write_directions
from src.common.errors import InputError
from src.common.intervention_config import InterventionConfigBase
from src.models.intervention_check import refuse_unfit
from src.models.loading import load
from tests.steering_specs import some_directions
from tests.tiny_models import copy_model


@pytest.fixture
def unloadable(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of which weights are missing: what is said of it was known without them."""
    folder = copy_model(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_directions_of_another_model_are_refused_before_it_is_loaded(unloadable: Path, tmp_path: Path) -> None:
    for name, d_model in (("other", 32), ("wide", 48)):
        write_directions(tmp_path / f"{name}.safetensors", some_directions(d_model=d_model))
    other, wide = f"{tmp_path}/other.safetensors", f"{tmp_path}/wide.safetensors"
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps([{"directions_path": other, "layers": "0", "op": "ablate"}]))

    def config(**settings: object) -> InterventionConfigBase:
        return InterventionConfigBase(model_id=str(unloadable), output_dir=tmp_path / "o", **settings)

    refuse_unfit(config())
    refuse_unfit(config(steer=[f"{other}:0:2"], project_onto=f"{other}:1", allow_model_mismatch=True))
    for settings, expected in [
        ({"steer": [f"{other}:0:2"]}, r"--steer .*:0:2: .*--allow_model_mismatch"),
        ({"interventions_path": spec}, r"entry 1: .*--allow_model_mismatch"),
        ({"project_onto": f"{other}:1"}, r"--project_onto .*--allow_model_mismatch"),
        ({"steer": [f"{wide}:0:2"], "allow_model_mismatch": True}, r"width 48.*cannot be used"),
    ]:
        with pytest.raises(InputError, match=expected):
            refuse_unfit(config(**settings))
    with pytest.raises(InputError, match="down_proj"):
        load(config())
