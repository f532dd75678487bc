"""The directions file: what is written is read back, and what is wrong with one is said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from src.common.directions_file import (
    METADATA_KEY,
    PERCENTILES,
    Directions,
    read_directions,
    shown,
    write_directions,
)
from src.common.errors import InputError
from tests.steering_specs import some_directions

FULL = {
    "best_layer": 1, "scores": {"auc": [0.5, [0.9, 0.8], None]}, "activation_norms": [1.0, 2.5, None],
    "target_sha256": "a" * 64, "control_sha256": "b" * 64, "split_sha256": "c" * 64, "adapter_fingerprint": "g",
    "details": {"penalty": 0.1, "naïve": ["é", None]},
}  # fmt: skip


@given(st.integers(1, 5), st.integers(1, 3), st.integers(2, 40), st.integers(0, 99), st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, n_layers: int, k: int, d_model: int, seed: int, data: st.DataObject
) -> None:
    absent = tuple(data.draw(st.sets(st.integers(0, n_layers - 1), max_size=n_layers - 1)))
    before = some_directions(n_layers, k, d_model, absent=absent, seed=seed)
    path = tmp_path_factory.mktemp("d") / "directions.safetensors"
    write_directions(path, before)
    after = read_directions(path)
    assert after.directions.tobytes() == before.directions.tobytes()
    assert after.directions.shape == (n_layers, k, d_model)
    assert (after.layers_present, after.metadata) == (before.layers_present, before.metadata)
    assert (after.n_layers, after.k, after.d_model, after.source) == (n_layers, k, d_model, str(path))


def test_all_metadata_is_read_back_and_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    directions = some_directions(3, 2, absent=(2,), **FULL)
    for name in "ab":
        write_directions(tmp_path / name, directions)
    assert read_directions(tmp_path / "a").metadata == directions.metadata
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_vectors_are_of_length_1_to_rounding_though_the_file_may_be_a_little_off() -> None:
    exact = some_directions(2, 2, 500)
    off = replace(exact, directions=(exact.directions * np.float32(1.0009)))
    for layer in range(2):
        for index in range(2):
            assert abs(np.linalg.norm(off.vector(layer, index).astype(np.float64)) - 1) < 1e-7
            np.testing.assert_allclose(off.vector(layer, index), exact.directions[layer, index], rtol=1e-6)


def test_absent_layers_and_indices_out_of_range_are_refused_on_use() -> None:
    directions = some_directions(6, 2, absent=(0, 4))
    for layer in (0, 4, 6, -1):
        with pytest.raises(InputError, match=f"no direction for layer {layer}; it has 1-3, 5"):
            directions.vector(layer)
    for index in (2, -1):
        with pytest.raises(InputError, match=rf"k_index {index}; it has 2 directions"):
            directions.vector(1, index)
        with pytest.raises(InputError, match="k_index"):
            directions.percentile(1, index, "p50")


def test_percentiles_are_of_the_target_unless_control_is_named() -> None:
    directions = some_directions(2, 1)
    for rank, p in enumerate(PERCENTILES):
        assert directions.percentile(1, 0, f"p{p}") == directions.percentile(1, 0, f"target:p{p}") == rank + 1
        assert directions.percentile(0, 0, f"control:p{p}") == rank - 100


@pytest.mark.parametrize("name", ["p26", "25", "p-1", "P25", "both:p25", "p25 ", "p101", ""])
def test_an_unknown_percentile_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected one of p0, p1, p5"):
        some_directions().percentile(0, 0, name)


def test_percentiles_that_are_not_kept_are_refused() -> None:
    for kept in (None, {}, {"control": [None, [[0.0] * 11]]}):
        directions = some_directions(percentiles=kept)
        with pytest.raises(InputError, match="keeps no percentiles of layer 1"):
            directions.percentile(1, 0, "p25")
    with pytest.raises(InputError, match="keeps no percentiles of layer 0"):
        directions.percentile(0, 0, "control:p25")


@pytest.mark.parametrize(
    ("layers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5, 7, 8), "0-2, 5, 7-8"), ((1, 3), "1, 3")]
)
def test_layers_are_shown_in_short(layers: tuple[int, ...], text: str) -> None:
    assert shown(layers) == text


def tensors(directions: Directions) -> dict[str, np.ndarray]:
    present = np.array(directions.layers_present, dtype=np.int64)
    return {"directions": directions.directions.copy(), "layers_present": present}


def metadata(directions: Directions) -> dict:
    return {"version": 1, **directions.metadata.model_dump(mode="json")}


def spoiled(edit_tensors=lambda t: None, edit_metadata=lambda m: None, text: str | None = None) -> bytes:
    """A directions file after the edits."""
    directions = some_directions(3, 2, 8)
    arrays, values = tensors(directions), metadata(directions)
    edit_tensors(arrays)
    edit_metadata(values)
    return save(arrays, {METADATA_KEY: json.dumps(values) if text is None else text})


def put(name: str, *index):
    """An edit that puts a value at an index of a tensor."""
    return lambda value: lambda arrays: arrays[name].__setitem__(index, value)


def swap(name: str, make):
    return lambda arrays: arrays.update({name: make(arrays[name])})


def field(**values):
    return lambda metadata: metadata.update(values)


BAD = {
    "empty file": (b"", "not a safetensors file"),
    "text": (b"hello, this is not a tensor file at all", "not a safetensors file"),
    "cut short": (spoiled()[:-9], "not a safetensors file or cut short"),
    "other tensors": (save({"weight": np.zeros(3)}), "no tensor directions and no tensor layers_present and"),
    "no metadata": (save(tensors(some_directions())), "no metadata"),
    "metadata is no JSON": (spoiled(text="{"), "not of version 1"),
    "metadata is a list": (spoiled(text="[]"), "not of version 1"),
    "future version": (spoiled(edit_metadata=field(version=2)), "not of version 1"),
    "field missing": (spoiled(edit_metadata=lambda m: m.pop("model_fingerprint")), "model_fingerprint: Field"),
    "field unknown": (spoiled(edit_metadata=field(modle_id="x")), "metadata modle_id: Extra"),
    "hook point": (spoiled(edit_metadata=field(hook_point="resid_mid")), "metadata hook_point"),
    "text empty": (spoiled(edit_metadata=field(model_id="")), "metadata model_id"),
    "number as text": (spoiled(edit_metadata=field(best_layer="1")), "metadata best_layer"),
    "best layer": (spoiled(edit_metadata=field(best_layer=7)), "best_layer is 7"),
    "scores": (spoiled(edit_metadata=field(scores={"auc": [1, 2]})), "scores.auc has 2 entries; expected one a layer"),
    "norms": (spoiled(edit_metadata=field(activation_norms=[1.0])), "activation_norms has 1 entries"),
    "nan": (spoiled(edit_metadata=field(activation_norms=[1.0, float("nan"), 1.0])), "activation_norms.1"),
    "few percentiles": (spoiled(edit_metadata=field(percentiles={"target": [[[0.0] * 11]] * 3})), "layer 0 are not"),
    "falling": (
        spoiled(edit_metadata=field(percentiles={"control": [[[0.0] * 11, [1.0] + [0.0] * 10]] * 3})), "do not rise",
    ),
    "nan vector": (spoiled(put("directions", 1, 0, 3)(np.nan)), "layer 1, k_index 0: the vector holds NaN"),
    "infinite vector": (spoiled(put("directions", 2, 1, 0)(-np.inf)), "layer 2, k_index 1: the vector holds"),
    "long vector": (spoiled(swap("directions", lambda d: d * np.float32(1.002))), "norm is 1.002; expected a unit"),
    "zero vector": (spoiled(put("directions", 0, 1)(0)), "layer 0, k_index 1: the vector's norm is 0"),
    "absent but there": (spoiled(swap("layers_present", lambda p: p[1:])), "layer that is said to be absent"),
    "no layer": (spoiled(swap("layers_present", lambda p: p[:0])), r"layers_present is \[\]"),
    "layer twice": (spoiled(swap("layers_present", lambda p: np.array([0, 1, 1, 2]))), r"is \[0, 1, 1, 2\]"),
    "layer beyond": (spoiled(swap("layers_present", lambda p: p + 1)), "rising layers of 0 to 2"),
    "float64": (spoiled(swap("directions", lambda d: d.astype(np.float64))), "stored as F64; expected F32"),
    "layers as floats": (
        spoiled(swap("layers_present", lambda p: np.array([0, 1, np.nan]))), "layers_present is stored as F64",
    ),
    "metadata too deep": (spoiled(text="[" * 10**6), "not of version 1"),
    "two dimensions": (spoiled(swap("directions", lambda d: d[:, 0])), r"\(3, 8\); expected float32 \(n_layers"),
    "width 0": (spoiled(swap("directions", lambda d: d[:, :, :0])), r"\(3, 2, 0\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_path(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.safetensors: .*{message}"):
        read_directions(path)


def test_bfloat16_vectors_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    stored = {name: torch.from_numpy(each) for name, each in tensors(some_directions()).items()}
    stored["directions"] = stored["directions"].bfloat16()
    save_file(stored, tmp_path / "d.safetensors", {METADATA_KEY: json.dumps(metadata(some_directions()))})
    with pytest.raises(InputError, match=r"d\.safetensors: directions is stored as BF16; expected F32"):
        read_directions(tmp_path / "d.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_directions(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        read_directions(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    write_directions(path, some_directions())
    old = path.read_bytes()
    unwritable = some_directions(details={"x": float("inf")})
    with pytest.raises(ValueError, match="JSON"):
        write_directions(path, unwritable)
    assert path.read_bytes() == old
