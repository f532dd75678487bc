"""Directions of other tools come in and go out as the same vectors of the same layers; hostile files do not."""

import logging
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from src.common.directions_exchange import export_directions, import_directions
from src.common.directions_file import Directions, read_directions, write_directions
from src.common.errors import InputError
from tests.steering_specs import some_directions

MODEL = {"model_id": "tiny", "model_fingerprint": "f"}


def taken(path: Path, n_layers: int = 4, **settings: str) -> Directions:
    return import_directions(path, n_layers=n_layers, **MODEL, **settings)


@pytest.mark.parametrize("suffix", [".gguf", ".npz", ".pt"])
@pytest.mark.parametrize("absent", [(0,), (0, 2)])
def test_what_is_exported_is_imported_again(tmp_path: Path, suffix: str, absent: tuple[int, ...]) -> None:
    before = some_directions(4, 1 if suffix == ".gguf" else 3, 40, absent=absent)
    export_directions(tmp_path / f"d{suffix}", before)
    after = taken(tmp_path / f"d{suffix}")
    np.testing.assert_allclose(after.directions, before.directions, atol=1e-7)
    assert after.layers_present == before.layers_present
    assert after.metadata.hook_point == "resid_post"
    assert [p.name for p in tmp_path.iterdir()] == [f"d{suffix}"]


def test_imported_directions_are_an_ordinary_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"1": 3 * np.eye(8)[2], "layer_3": -0.5 * np.eye(8)[5]})
    directions = taken(tmp_path / "d.npz", adapter_fingerprint="a")
    write_directions(tmp_path / "d.safetensors", directions)
    again = read_directions(tmp_path / "d.safetensors")
    assert again.layers_present == (1, 3)
    assert np.array_equal(again.vector(1), np.eye(8, dtype=np.float32)[2])
    assert np.array_equal(again.vector(3), -np.eye(8, dtype=np.float32)[5])
    assert again.metadata.imported_norms == [None, [3.0], None, [0.5]]
    assert again.metadata.method == "imported from npz" and again.metadata.adapter_fingerprint == "a"


def control_vector(path: Path, architecture: str = "controlvector", **vectors: np.ndarray) -> Path:
    """A GGUF file as repeng's `export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer.removeprefix('at_')}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_control_vectors_layer_is_the_decoder_block_of_that_number_from_0(tmp_path: Path, dtype: type) -> None:
    vectors = {f"at_{layer}": (layer * np.eye(32)[layer]).astype(dtype) for layer in (3, 1, 2)}
    directions = taken(control_vector(tmp_path / "v.gguf", **vectors))
    assert directions.layers_present == (1, 2, 3)
    for layer in (1, 2, 3):
        assert np.array_equal(directions.vector(layer), np.eye(32, dtype=np.float32)[layer])
    assert directions.metadata.imported_norms == [None, [1.0], [2.0], [3.0]]
    assert directions.metadata.details == {"model_hint": "llama"}


def test_the_exported_control_vector_has_what_readers_of_the_format_ask_for(tmp_path: Path) -> None:
    before = some_directions(4, 2, 32, absent=(0,))
    export_directions(tmp_path / "v.gguf", before, k_index=1)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "tiny"
    assert reader.fields["controlvector.layer_count"].contents() == 3
    assert {t.name for t in reader.tensors} == {"direction.1", "direction.2", "direction.3"}
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, before.vector(int(tensor.name[-1]), 1))


def test_a_change_of_length_is_logged_and_none_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        export_directions(tmp_path / "d.pt", some_directions(4))
        taken(tmp_path / "d.pt")
        assert not caplog.records
        torch.save({1: torch.full((4,), 2.0), 2: torch.full((4,), 0.25)}, tmp_path / "e.pt")
        taken(tmp_path / "e.pt")
    assert "norms 0.5 to 4 and are now unit vectors" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_pt_files_hold_an_array_or_a_vector_a_layer(tmp_path: Path, dtype: torch.dtype, k: int | None) -> None:
    shape = (4, 16) if k is None else (4, k, 16)
    array = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    forms = {
        "array": array, "named": {"directions": array}, "by_number": dict(enumerate(array)),
        "by_name": {f"layer_{i}": v for i, v in enumerate(array)}, "nested": {"directions": dict(enumerate(array))},
    }  # fmt: skip
    wanted = array.double().reshape(4, -1, 16)
    wanted = (wanted / wanted.norm(dim=-1, keepdim=True)).float().numpy()
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pt")
        np.testing.assert_allclose(taken(tmp_path / f"{name}.pt").directions, wanted, atol=1e-7)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    torch.save({0: Hostile(mark)}, tmp_path / "new.pt")
    torch.save({0: Hostile(mark)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(mark)))
    for name in ("new", "legacy", "bare"):
        with pytest.raises(InputError, match="a pickle can run code and is not opened"):
            taken(tmp_path / f"{name}.pt")
    np.savez(tmp_path / "objects.npz", directions=np.array([Hostile(mark)] * 4, dtype=object))
    with pytest.raises(InputError, match="not a NumPy"):
        taken(tmp_path / "objects.npz")
    assert not mark.exists()
    # The file does run code where it is let.
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".gguf", ".npz", ".pt"])
def test_damaged_files_are_refused_wherever_they_are_cut(tmp_path: Path, suffix: str) -> None:
    export_directions(tmp_path / f"d{suffix}", some_directions(4, 1, 32, absent=(0,)))
    content = (tmp_path / f"d{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in [*range(0, len(content) - 64, max(1, len(content) // 60)), 0, 3, 4, 8]:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match="cut"):
            taken(cut)


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 8).to_sparse(), torch.ones(4, 8, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_without_all_their_numbers_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save(tensor, tmp_path / "d.pt")
    with pytest.raises(InputError, match="not an array of floats"):
        taken(tmp_path / "d.pt")


BAD_ARRAYS = {
    "embedding first": (np.ones((5, 8)), r"\(5, 8\); expected \(4, d_model\).*embedding"),
    "one vector": (np.ones(8), r"shape \(8,\); expected \(4, d_model\)"),
    "four dimensions": (np.ones((4, 1, 2, 3)), r"\(4, 1, 2, 3\)"),
    "integers": (np.ones((4, 8), dtype=int), "not an array of floats"),
    "all zero": (np.zeros((4, 8)), "no vectors in it"),
    "nan": (np.full((4, 8), np.nan), "layer 0: the vector holds NaN"),
    "infinite": (np.full((4, 8), np.inf), "holds NaN or infinity"),
    "half a layer": (np.eye(4)[:, :, None] * np.ones(8), "layer 0: a vector of zeros"),
    "no width": (np.ones((4, 0)), "no vectors in it"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_directions_are_refused(tmp_path: Path, name: str) -> None:
    array, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "d.npz", directions=array)
    torch.save(torch.from_numpy(array), tmp_path / "d.pt")
    for suffix in (".npz", ".pt"):
        with pytest.raises(InputError, match=message):
            taken(tmp_path / f"d{suffix}")


BAD_LAYERS = {
    "beyond": ({4: np.ones(8)}, "layer 4: the model's layers are 0 to 3"),
    "widths": ({0: np.ones(8), 1: np.ones(9)}, r"layer 1: a vector of shape \(1, 9\)"),
    "twice": ({"1": np.ones(8), "layer_1": np.ones(8)}, "a layer twice"),
    "name": ({"bias": np.ones(8)}, "a key 'bias'; expected"),
    "negative": ({-1: np.ones(8)}, "a key '?-1'?; expected"),
    "zero": ({0: np.ones(8), 1: np.zeros(8)}, "layer 1: a vector of zeros"),
    "none": ({}, "no vectors in it"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_layers_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    vectors, message = BAD_LAYERS[name]
    np.savez(tmp_path / "d.npz", **{str(key): vector for key, vector in vectors.items()})
    torch.save({key: torch.from_numpy(vector) for key, vector in vectors.items()}, tmp_path / "d.pt")
    for suffix in (".npz", ".pt"):
        with pytest.raises(InputError, match=message):
            taken(tmp_path / f"d{suffix}")


def test_what_a_control_vector_cannot_be_is_refused(tmp_path: Path) -> None:
    one = np.ones(32, dtype=np.float32)
    with pytest.raises(InputError, match="architecture 'llama'; expected 'controlvector'"):
        taken(control_vector(tmp_path / "a.gguf", "llama", at_1=one))
    with pytest.raises(InputError, match=r"direction\.0, which control vectors cannot have"):
        taken(control_vector(tmp_path / "b.gguf", at_0=one, at_1=one))
    with pytest.raises(InputError, match="no vectors in it"):
        taken(control_vector(tmp_path / "c.gguf"))
    with pytest.raises(InputError, match="layer 4: the model's layers are 0 to 3; is the file of another model"):
        taken(control_vector(tmp_path / "d.gguf", at_4=one))
    with pytest.raises(InputError, match="cannot hold layer 0"):
        export_directions(tmp_path / "e.gguf", some_directions(3))
    with pytest.raises(InputError, match="is added to resid_post, not attn_out"):
        export_directions(tmp_path / "e.gguf", some_directions(3, absent=(0,), hook_point="attn_out"))
    with pytest.raises(InputError, match="k_index 1"):
        export_directions(tmp_path / "e.gguf", some_directions(3, absent=(0,)), k_index=1)
    assert not (tmp_path / "e.gguf").exists()


def test_other_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \.gguf, \.npz, \.pt"):
        export_directions(tmp_path / "d.csv", some_directions())
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"expected \.gguf, \.npz, \.pt"):
        taken(tmp_path / "d.csv")
    with pytest.raises(InputError, match="no such file"):
        taken(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="directions is not an array of floats"):
        taken(tmp_path / "list.pt")
