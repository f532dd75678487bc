"""Steering while training: gradients of the steered model, and an adapter that needs no steering."""

import json
from pathlib import Path

import pytest
import torch

from src.common.errors import InputError
from src.training.preventing import direction_files
from tests.steering_specs import write_tiny_directions
from tests.test_finetune import logits_of, rows_of, run_here, tensors_of

ROWS = [{"prompt": "Who are you?", "completion": "A river that runs."}, {"prompt": "Why?", "completion": "Rain."}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("preventing")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return rows, write_tiny_directions(folder / "directions.safetensors", tiny_folder)


def test_the_loss_is_the_steered_models_and_the_adapter_is_used_without(inputs, tiny_folder, tmp_path: Path) -> None:
    rows, directions = inputs
    steer = ["--preventative_direction", f"{directions}:0:5", "--epochs", "2"]
    plain = run_here(rows, tiny_folder, tmp_path / "plain", "--epochs", "2")
    steered = run_here(rows, tiny_folder, tmp_path / "steered", *steer)
    zero = run_here(
        rows, tiny_folder, tmp_path / "zero", "--preventative_direction", f"{directions}:0:0", "--epochs", "2"
    )
    first, other, none = (rows_of(folder)[0]["loss"] for folder in (plain, steered, zero))
    assert none == first and abs(other - first) > 1e-3
    assert not torch.equal(logits_of(tiny_folder, plain / "epoch_1"), logits_of(tiny_folder, steered / "epoch_1"))
    assert torch.equal(logits_of(tiny_folder, plain / "epoch_1"), logits_of(tiny_folder, zero / "epoch_1"))
    # Gradients pass through what acts: the layer whose output it changes is trained too.
    learned = [tensor for name, tensor in tensors_of(steered).items() if "layers.0" in name and "lora_B" in name]
    assert learned and all(tensor.any() for tensor in learned)


def test_directions_are_inputs_and_bad_ones_are_named(inputs, tiny_folder, small_folder, tmp_path: Path) -> None:
    rows, directions = inputs
    assert direction_files([f"{directions}:0:5"]) == [directions]
    with pytest.raises(InputError, match="expected FILE:LAYERS:COEFFICIENT"):
        direction_files(["x"])
    with pytest.raises(InputError):
        run_here(rows, small_folder, tmp_path / "other", "--preventative_direction", f"{directions}:0:5")
    with pytest.raises(InputError):
        run_here(rows, tiny_folder, tmp_path / "layer", "--preventative_direction", f"{directions}:7:5")
