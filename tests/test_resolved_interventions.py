"""A spec made concrete: numbers and vectors of the right layers, refusals, and what its fingerprint depends on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.directions_file import Directions, write_directions
from src.common.errors import InputError
from src.common.interventions import Entry, entry
from src.common.resolved_interventions import ResolvedSpec, resolve
from tests.steering_specs import some_directions

FILES = {
    "d": some_directions(6, 2, 16, best_layer=4),
    "gaps": some_directions(6, 1, 16, absent=(0, 3), seed=1),
    "attn": some_directions(6, 1, 16, hook_point="attn_out", seed=2),
    "other": some_directions(6, 1, 16, model_fingerprint="g"),
    "adapted": some_directions(6, 1, 16, adapter_fingerprint="a"),
    "deep": some_directions(7, 1, 16),
    "wide": some_directions(6, 1, 17),
    "bare": some_directions(6, 1, 16, percentiles=None),
}


def made(**fields) -> Entry:
    return entry({"directions_path": "d", "layers": "2", "op": "ablate", **fields}, "here")


def concrete(*entries: Entry, **settings) -> ResolvedSpec:
    known = {"n_layers": 6, "d_model": 16, "model_fingerprint": "f", "read": FILES.__getitem__}
    return resolve(entries, **{**known, **settings})


def layers_of(resolved: ResolvedSpec) -> list[int]:
    return [operation.layer for operation in resolved.operations]


def test_layers_become_numbers() -> None:
    assert layers_of(concrete(made(layers="1,3-5"))) == [1, 3, 4, 5]
    assert layers_of(concrete(made(layers="best"))) == [4]
    assert layers_of(concrete(made(layers="all"))) == [0, 1, 2, 3, 4, 5]
    assert layers_of(concrete(made(layers="all", directions_path="gaps"))) == [1, 2, 4, 5]
    assert layers_of(concrete(made(layers="all", directions_path="gaps", source_layer=1))) == [0, 1, 2, 3, 4, 5]


def test_each_layer_gets_its_own_vector_unless_one_is_named() -> None:
    own = concrete(made(layers="all", k_index=1)).operations
    fixed = concrete(made(layers="all", source_layer=3)).operations
    for layer in range(6):
        assert np.array_equal(own[layer].direction, FILES["d"].vector(layer, 1))
        assert np.array_equal(fixed[layer].direction, FILES["d"].vector(3, 0))
    assert {(o.hook_point, o.coefficient) for o in own} == {("resid_post", 1.0)}
    assert concrete(made(directions_path="attn")).operations[0].hook_point == "attn_out"
    assert concrete(made(directions_path="attn", hook_point="mlp_out")).operations[0].hook_point == "mlp_out"


def test_percentiles_become_the_numbers_of_the_layer() -> None:
    """The target class' percentiles count 0, 1, … from the layer's index; control's are 100 below."""
    for layer in range(6):
        (operation,) = concrete(made(op="cap", lo="control:p0", hi="p25", layers=layer)).operations
        assert (operation.lo, operation.hi) == (layer - 100, layer + 4)
        (operation,) = concrete(made(op="set", value="p100", layers=layer)).operations
        assert operation.value == layer + 10
        when = {"directions_path": "d", "layer": 0, "above": "p1"}
        assert concrete(made(layers=layer, when=when)).operations[0].condition.above == 1


def test_a_conditions_layer_vector_and_hook_point_are_its_own() -> None:
    spec = concrete(made(layers="2,5", when={"directions_path": "attn", "above": 0, "below": 3}))
    for operation in spec.operations:
        assert operation.condition.layer == operation.layer
        assert operation.condition.hook_point == "attn_out"
        assert np.array_equal(operation.condition.direction, FILES["attn"].vector(operation.layer))
        assert (operation.condition.above, operation.condition.below) == (0.0, 3.0)
    fixed = {"directions_path": "d", "layer": 1, "source_layer": 4, "k_index": 1, "below": 0}
    for operation in concrete(made(layers="2,5", when=fixed)).operations:
        assert operation.condition.layer == 1
        assert np.array_equal(operation.condition.direction, FILES["d"].vector(4, 1))


def test_the_order_of_entries_and_layers_is_kept() -> None:
    spec = concrete(made(layers="3,1"), made(op="add", coefficient=2, layers="1"))
    assert [(o.op, o.layer) for o in spec.operations] == [("ablate", 1), ("ablate", 3), ("add", 1)]


@pytest.mark.parametrize("op", ["add", "ablate", "scale"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_a_coefficient_of_0_leaves_the_entry_out_but_not_its_mistakes(op: str, zero: float) -> None:
    one = made(op="add", coefficient=1)
    assert layers_of(concrete(made(op=op, coefficient=zero))) == []
    assert concrete(made(op=op, coefficient=zero), one).fingerprint == concrete(one).fingerprint
    with pytest.raises(InputError, match="layers 6"):
        concrete(made(op=op, coefficient=zero, layers=6))


REFUSED = [
    (made(layers="4-6"), "layers 4-6: the model's layers are 0 to 5"),
    (made(layers="best", directions_path="gaps"), "gaps: names no best layer"),
    (made(layers="2-4", directions_path="gaps"), "no direction for layer 3"),
    (made(source_layer=6), "no direction for layer 6; it has 0-5"),
    (made(k_index=2), "k_index 2"),
    (made(directions_path="other"), "whose weights or adapter are not this model's.*allow_model_mismatch"),
    (made(directions_path="adapted"), "whose weights or adapter are not this model's"),
    (made(directions_path="deep"), "7 layers of width 16; this model has 6 of width 16"),
    (made(directions_path="wide"), "6 layers of width 17; this model has 6 of width 16"),
    (made(op="cap", lo="p25", directions_path="bare"), "keeps no percentiles of layer 2"),
    (made(op="cap", lo="p25", source_layer=3), "'p25' was measured at resid_post of layer 3 and says nothing"),
    (made(op="cap", lo="p25", hook_point="mlp_out"), "'p25' was measured at resid_post of layer 2"),
    (made(op="cap", lo="p75", hi="p25"), "lo p75 is 8 at layer 2, above hi p25, 6"),
    (made(op="cap", lo=7, hi="p25"), "lo 7.0 is 7 at layer 2, above hi p25, 6"),
    (made(when={"directions_path": "d", "layer": 3, "above": 0}), "comes after resid_post of layer 2"),
    (made(when={"directions_path": "d", "above": 0}, hook_point="attn_out"), "comes after attn_out of layer 2"),
    (made(when={"directions_path": "d", "layer": 9, "above": 0}), "when.layer 9: the model's layers are 0 to 5"),
    (made(when={"directions_path": "other", "above": 0}), "not this model's"),
    (made(when={"directions_path": "d", "above": "p75", "below": "p25"}), "above p75 is 8 and below p25 is 6: never"),
    (
        made(when={"directions_path": "d", "layer": 1, "source_layer": 0, "above": "p5"}),
        "'p5' was measured at resid_post",
    ),
]


@pytest.mark.parametrize(("bad", "message"), REFUSED)
def test_what_cannot_be_on_this_model_is_refused_with_the_entrys_number(bad: Entry, message: str) -> None:
    with pytest.raises(InputError, match=f"entry 2: .*{message}"):
        concrete(made(), bad)


def test_a_mismatch_is_allowed_for_equal_shapes_only() -> None:
    for path in ("other", "adapted"):
        assert layers_of(concrete(made(directions_path=path), allow_model_mismatch=True)) == [2]
    assert layers_of(concrete(made(directions_path="adapted"), adapter_fingerprint="a")) == [2]
    with pytest.raises(InputError, match="not this model's"):
        concrete(made(), model_fingerprint=None)
    for path in ("deep", "wide"):
        with pytest.raises(InputError, match="cannot be used"):
            concrete(made(directions_path=path), allow_model_mismatch=True)


VARIANTS = [
    made(), made(layers="3"), made(k_index=1), made(source_layer=3), made(coefficient=0.5), made(hook_point="attn_out"),
    made(op="scale", coefficient=1), made(op="add", coefficient=1), made(op="add", coefficient=1, relative=True),
    made(op="set", value=1), made(op="cap", lo=1), made(op="cap", hi=1), made(op="cap", lo=1, hi=2),
    made(positions="prompt"), made(positions="generated"), made(positions={"start": 0, "end": 4}),
    made(positions={"start": 0}), made(when={"directions_path": "d", "above": 1}),
    made(when={"directions_path": "d", "below": 1}), made(when={"directions_path": "d", "above": 1, "k_index": 1}),
    made(when={"directions_path": "d", "above": 1, "layer": 1}), made(directions_path="gaps"), made(layers="2,3"),
]  # fmt: skip


def test_every_difference_in_what_is_done_changes_the_fingerprint() -> None:
    prints = [concrete(each).fingerprint for each in VARIANTS]
    prints += [concrete().fingerprint, concrete(VARIANTS[0], VARIANTS[4]).fingerprint]
    prints += [concrete(VARIANTS[4], VARIANTS[0]).fingerprint]
    assert len(set(prints)) == len(prints)
    assert all(len(each) == 64 and int(each, 16) for each in prints)


def test_the_smallest_change_of_a_vector_changes_the_fingerprint() -> None:
    spec = concrete(made())
    vector = spec.operations[0].direction.copy()
    vector[3] = np.nextafter(vector[3], np.float32(1))
    moved = ResolvedSpec(operations=(replace(spec.operations[0], direction=vector),))
    assert moved.fingerprint != spec.fingerprint


def test_what_is_done_alike_has_one_fingerprint(tmp_path: Path) -> None:
    """Another path, another notation, defaults spelt out: the same."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b" / "c.safetensors"]
    paths[1].parent.mkdir()
    prints = set()
    for path in paths:
        write_directions(path, FILES["d"])
        for fields in (
            {}, {"coefficient": 1}, {"coefficient": 1.0, "layers": 2}, {"source_layer": 2},
            {"hook_point": "resid_post"},
        ):  # fmt: skip
            entries = [made(directions_path=str(path), **fields)]
            prints.add(resolve(entries, n_layers=6, d_model=16, model_fingerprint="f").fingerprint)
    assert prints == {concrete(made()).fingerprint}
    capped = [concrete(made(op="cap", lo=lo, layers=1)).fingerprint for lo in ("p25", "target:p25", 5, 5.0)]
    assert len(set(capped)) == 1
    assert concrete(made(op="cap", lo=0.0)).fingerprint == concrete(made(op="cap", lo=-0.0)).fingerprint


def test_files_are_read_once() -> None:
    reads = []

    def read(path: str) -> Directions:
        reads.append(path)
        return FILES[path]

    concrete(made(), made(when={"directions_path": "attn", "above": 0}), made(layers=5), read=read)
    assert reads == ["d", "attn"]


@given(st.sets(st.integers(0, 5), min_size=1), st.integers(0, 1), st.floats(-9, 9))
@settings(deadline=None, max_examples=40)
def test_a_list_of_layers_is_the_entries_one_by_one(layers: set[int], k_index: int, coefficient: float) -> None:
    fields = {"op": "add", "coefficient": coefficient, "k_index": k_index}
    together = concrete(made(**fields, layers=",".join(map(str, layers))))
    apart = concrete(*(made(**fields, layers=layer) for layer in sorted(layers)))
    assert together.fingerprint == apart.fingerprint
