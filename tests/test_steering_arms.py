from pathlib import Path

import numpy as np
import pytest

from src.common.model_config import ModelConfigBase
from src.common.resolved_interventions import ResolvedCondition
from src.common.rows import Prompt
from src.models.arms import build_arms, fingerprint_of, random_rotation, specs_of, with_random_directions
from src.models.language_model import LanguageModel
from src.steering.settings import SteerSettings
from src.steering.tasks import build_tasks
from tests.steering_specs import spec, unit, write_tiny_directions


def config(**settings: object) -> SteerSettings:
    return SteerSettings(output_dir=Path("unused"), model_id="unused", prompts_json="unused", **settings)


def arms_of(**settings: object) -> list:
    some = config(**settings)
    return build_arms(some, some.entries())


def test_a_grid_has_the_unsteered_arm_once_and_controls_behind() -> None:
    arms = arms_of(steer=["d.safetensors:1:9"], coefficients=[4.0, -8.0, 0.0, 0.5], random_control=True)
    assert [(arm.name, arm.coefficient, arm.is_control) for arm in arms] == [
        ("-8", -8, False), ("unsteered", 0, False), ("+0.5", 0.5, False), ("+4", 4, False),
        ("-8 random", -8, True), ("+0.5 random", 0.5, True), ("+4 random", 4, True),
    ]  # fmt: skip
    assert [[e.coefficient for e in arm.entries] for arm in arms[:4]] == [[-8], [], [0.5], [4]]


def test_without_a_grid_there_is_one_steered_arm() -> None:
    arms = arms_of(steer=["d.safetensors:1:9", "e.safetensors:0:9"], relative=True, positions="generated")
    assert [(arm.name, arm.coefficient) for arm in arms] == [("unsteered", 0), ("steered", 9)]
    assert [(e.relative, e.positions, e.coefficient) for e in arms[1].entries] == [(True, "generated", 9)] * 2
    assert arms_of(steer=["d.safetensors:1:9", "e.safetensors:0:3"])[1].coefficient is None


def test_ids_name_the_arm_the_prompt_and_the_repeat() -> None:
    arms = arms_of(steer=["d.safetensors:1:9"], coefficients=[1.0, 2.0], random_control=True)
    prompts = [Prompt("a", "one"), Prompt("b", "two")]
    tasks = build_tasks(arms, prompts, 3)
    assert len({task.row_id for task in tasks}) == len(tasks) == 5 * 2 * 3
    references = {task.row_id for task in tasks if task.arm.is_reference}
    assert {task.reference_id for task in tasks} == references
    # They do not depend on which other arms, prompts and repeats there are.
    few = build_tasks(arms_of(steer=["d.safetensors:1:9"], coefficients=[2.0]), prompts[1:], 1)
    assert {task.row_id for task in few} < {task.row_id for task in tasks}


@pytest.mark.parametrize("n", [1, 3, 8, 12])
def test_a_random_rotation_keeps_lengths_and_angles_and_nothing_else(n: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    turned = random_rotation(vectors, seed=1)
    np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, atol=1e-4)
    assert not np.allclose(turned, vectors, atol=0.1)
    np.testing.assert_array_equal(turned, random_rotation(vectors, seed=1))
    assert not np.allclose(turned, random_rotation(vectors, seed=2), atol=0.1)


def test_random_rotations_favour_no_direction() -> None:
    """Over many seeds the image of a unit vector has mean 0 and covariance 1/d."""
    vector = unit(0, 8)[None]
    images = np.concatenate([random_rotation(vector, seed) for seed in range(4000)])
    assert np.abs(images.mean(axis=0)).max() < 0.03
    np.testing.assert_allclose(images.T @ images / 4000, np.eye(8) / 8, atol=0.02)


def test_a_control_differs_in_its_directions_alone_and_is_one_for_all_doses() -> None:
    condition = ResolvedCondition(layer=0, hook_point="resid_post", direction=unit(7), above=1.0, below=None)
    make = lambda c: spec(  # noqa: E731
        {"op": "add", "coefficient": c, "layer": 0, "condition": condition},
        {"op": "add", "coefficient": c, "layer": 1},
        {"op": "cap", "lo": -1.0, "direction": unit(1), "positions": "generated"},
    )
    small, large = with_random_directions(make(1.0), 3), with_random_directions(make(8.0), 3)
    for before, after, other in zip(make(1.0).operations, small.operations, large.operations, strict=True):
        assert np.linalg.norm(after.direction) == pytest.approx(1.0, abs=1e-6)
        assert abs(float(before.direction @ after.direction)) < 0.9
        np.testing.assert_array_equal(after.direction, other.direction)
        kept = {k: v for k, v in vars(before).items() if k != "direction"}
        assert {k: v for k, v in vars(after).items() if k != "direction"} == kept
    # One direction at two layers stays one direction; the angle to the other stays.
    first, second, third = (operation.direction for operation in small.operations)
    np.testing.assert_array_equal(first, second)
    assert float(first @ third) == pytest.approx(float(unit(0) @ unit(1)), abs=1e-5)
    assert with_random_directions(spec(), 3).operations == ()


def test_specs_of_a_model_and_their_fingerprint(tiny_folder: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("unused")))
    file = write_tiny_directions(tmp_path / "d.safetensors", tiny_folder)
    arms = arms_of(steer=[f"{file}:best:1"], coefficients=[2.0, 3.0], random_control=True)
    specs = specs_of(arms, model, 1, False)
    assert {name: len(one.operations) for name, one in specs.items()} == {
        "unsteered": 0, "+2": 1, "+3": 1, "+2 random": 1, "+3 random": 1,
    }  # fmt: skip
    operation, control = specs["+2"].operations[0], specs["+2 random"].operations[0]
    assert operation.layer == control.layer == 1 and operation.coefficient == control.coefficient == 2
    assert np.linalg.norm(operation.direction) == pytest.approx(np.linalg.norm(control.direction), abs=1e-6)
    assert fingerprint_of(specs) == fingerprint_of(specs_of(arms, model, 1, False))
    assert fingerprint_of(specs) != fingerprint_of(specs_of(arms, model, 2, False))
