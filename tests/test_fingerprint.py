from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src.common.errors import InputError
from src.models.fingerprint import fingerprint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(300, 300, generator=generator), "b": torch.randn(3, generator=generator)}


def saved(folder: Path, **files: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    return fingerprint(folder)


def test_the_spread_over_files_does_not_matter(tmp_path: Path) -> None:
    whole = saved(tmp_path / "one", model=tensors())
    split = saved(tmp_path / "two", y={"a": tensors()["a"]}, x={"b": tensors()["b"]})
    assert whole == split and len(whole) == 64


@pytest.mark.parametrize("name, index", [("a", 0), ("a", -1), ("b", 1)])
def test_a_changed_value_at_either_end_is_seen(tmp_path: Path, name: str, index: int) -> None:
    changed = tensors()
    changed[name].view(-1)[index] += 1
    assert saved(tmp_path / "one", model=tensors()) != saved(tmp_path / "two", model=changed)


def test_names_and_shapes_count(tmp_path: Path) -> None:
    renamed = {"c": tensors()["a"], "b": tensors()["b"]}
    reshaped = {"a": tensors()["a"].view(100, 900), "b": tensors()["b"]}
    prints = [saved(tmp_path / str(i), model=t) for i, t in enumerate([tensors(), renamed, reshaped])]
    assert len(set(prints)) == 3


def test_no_weights_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        fingerprint(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 5, 20, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            fingerprint(tmp_path)
