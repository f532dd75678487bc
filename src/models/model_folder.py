"""Model folders as files: what dtype they are in, what differs between two, writing one that appears whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from src.common.errors import InputError
from src.common.files import sync_files, sync_folder

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack", ".onnx", ".ckpt", ".ot",
)  # fmt: skip
OF_THE_BASE_ALONE = ("README.md", "download.json", "config.json")
"""Files that speak of the base model's weights; the configuration is written anew."""
SCRATCH = ".making-"
TEMPLATE_FOLDER = "additional_chat_templates"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The float dtype that most bytes of a folder's weights are in. Raises InputError when none are floats."""
    sizes = dict.fromkeys(FLOATS, 0)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                if part.get_dtype() in sizes:
                    size = FLOATS[part.get_dtype()].itemsize
                    for length in part.get_shape():
                        size *= length
                    sizes[part.get_dtype()] += size
    if not any(sizes.values()):
        raise InputError(f"{folder}: no weights in {', '.join(FLOATS)}; an edit cannot be saved in another format")
    return FLOATS[max(sizes, key=sizes.__getitem__)]


def write_model(model: nn.Module, source: Path, folder: Path) -> None:
    """
    Weights and configuration of `model`, and of the folder `source`, which it was loaded from, all other files that do
    not hold or describe weights: tokenizer, chat templates, generation config, code.
    """
    if (source / "generation_config.json").exists():
        # transformers refuses to write one whose values contradict one another, as many a published one's do.
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in OF_THE_BASE_ALONE:
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)


def remove_unfinished(folder: Path) -> None:
    """What kills left of folders that were to appear in `folder`, which no other process may be writing to."""
    for path in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(path)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """
    A folder that takes the name `folder` when the block ends, its files on the disk by then; nothing is left of it when
    the block raises. Raises OSError when by then there is something of that name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{SCRATCH}{folder.name}-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        yield made
        sync_files(made)
        made.rename(folder)
    sync_folder(folder.parent)


def changed_tensors(before: Path, after: Path) -> list[str]:
    """Names of the tensors stored in the folder `after` that are not, bit for bit, in the folder `before`, in order."""
    at = {name: file for file in before.glob("*.safetensors") for name in _names(file)}
    changed = []
    for file in sorted(after.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name not in at or not _same(_tensor(at[name], name), tensors.get_tensor(name)):
                    changed.append(name)
    return sorted(changed)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _same(first: Tensor, second: Tensor) -> bool:
    # As bytes: a zero's sign counts too, and a NaN is itself.
    is_alike = first.dtype == second.dtype and first.shape == second.shape
    return is_alike and torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))
