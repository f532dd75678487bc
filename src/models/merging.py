"""A model with its adapter's weights added in, as a folder like any other."""

import logging
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from src.common.cache_dirs import cache_root
from src.common.errors import CheckFailed
from src.common.model_config import ModelConfigBase
from src.models.loading import ModelFiles, load_weights, with_adapter

LOGGER = logging.getLogger(__name__)
TOLERANCE = {"float32": 1e-3}
"""Largest difference of a log-probability (nats) between the merged copy and model and adapter, by stored dtype."""
HALF_TOLERANCE = 0.5
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def merged_copy(files: ModelFiles, config: ModelConfigBase) -> Path:
    """
    A folder of the cache with the merged model, made on first use.

    W + scaling·B·A is computed in float32 on the CPU and stored in the run's dtype. The folder's name says which model,
    settings, adapter and dtype it is of. Raises CheckFailed when the copy answers otherwise than model and adapter.
    """
    assert files.adapter is not None
    parts = [str(files.facts[name])[:12] for name in ("model_fingerprint", "format_fingerprint", "adapter_fingerprint")]
    folder = cache_root() / "merged" / "-".join([*parts, files.dtype_name])
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            write_merged(files, config, Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(folder)
            except OSError:
                # Another process was quicker; the two are the same.
                if not folder.is_dir():
                    raise
    LOGGER.info("The merged model is in %s", folder)
    return folder


@torch.inference_mode()
def write_merged(files: ModelFiles, config: ModelConfigBase, folder: Path) -> None:
    """Write the merged model with everything else that the base model's folder holds beside weights, and check it."""
    assert files.adapter is not None
    base = load_weights(files.folder, config, torch.device("cpu"), torch.float32)
    untie(base)
    ids = torch.arange(10, 42)[None] % base.get_input_embeddings().weight.shape[0]
    attached = with_adapter(base, files.adapter)
    expected = attached(ids).logits.log_softmax(-1)
    attached.merge_and_unload(safe_merge=True).to(files.dtype).save_pretrained(folder)
    for file in files.folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    found = load_weights(folder, config, torch.device("cpu"), torch.float32)(ids).logits.log_softmax(-1)
    largest, bar = (found - expected).abs().max().item(), TOLERANCE.get(files.dtype_name, HALF_TOLERANCE)
    if not largest <= bar:
        raise CheckFailed(
            f"adapter {files.adapter}: merged into the model it gives other answers than beside it (log-probabilities "
            f"differ by up to {largest:.2g} nats, the bar is {bar}); take --backend hf"
        )


def untie(model: nn.Module) -> None:
    """Give the unembedding weights of its own, so that a change of either matrix leaves the other alone."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
        for part in (model.config, model.config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
