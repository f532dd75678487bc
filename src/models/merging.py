"""A model with its adapter's weights added in, as a folder like any other."""

import logging
import shutil
import tempfile
from pathlib import Path

import torch

from src.common.cache_dirs import cache_root
from src.common.model_config import ModelConfigBase
from src.models.loading import ModelFiles, attach_adapter, load_weights

LOGGER = logging.getLogger(__name__)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def merged_copy(files: ModelFiles, config: ModelConfigBase) -> Path:
    """
    A folder of the cache with the merged model, made on first use.

    W + scaling·B·A is computed in float32 on the CPU and stored in the run's dtype. The folder's name says which model,
    adapter and dtype it is of.
    """
    assert files.adapter is not None
    model, adapter = str(files.facts["model_fingerprint"])[:16], str(files.facts["adapter_fingerprint"])[:16]
    folder = cache_root() / "merged" / f"{model}-{adapter}-{files.facts['dtype']}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            write_merged(files, config, Path(scratch) / "model")
            # Another process may have been quicker; the two are the same.
            if not folder.is_dir():
                (Path(scratch) / "model").rename(folder)
    LOGGER.info("The merged model is in %s", folder)
    return folder


def write_merged(files: ModelFiles, config: ModelConfigBase, folder: Path) -> None:
    """Write the merged model with everything else that the base model's folder holds beside weights."""
    assert files.adapter is not None
    base = load_weights(files.folder, config, torch.device("cpu"), torch.float32)
    model = attach_adapter(base, files.adapter, merge=True).to(files.dtype)
    model.save_pretrained(folder)
    for file in files.folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
