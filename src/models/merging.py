"""A model with its adapter's weights added in, as a folder like any other."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from src.common.cache_dirs import cache_root
from src.common.model_config import ModelConfigBase
from src.models.loading import ModelFiles, load_weights, with_adapter
from src.models.model_folder import appearing, write_model
from src.models.saving import difference, refuse_difference, untie

LOGGER = logging.getLogger(__name__)


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
        try:
            with appearing(folder) as scratch:
                write_merged(files, config, scratch)
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
    # Weights in 4 bits take no sum: an adapter that was trained on them is merged into those that they came from.
    base = load_weights(files.folder, replace(config, quantization="none"), torch.device("cpu"), torch.float32)
    untie(base)
    ids = torch.arange(10, 42) % base.get_input_embeddings().weight.shape[0]
    attached = with_adapter(base, files.adapter)
    expected = attached(ids[None]).logits[0].log_softmax(-1)
    write_model(attached.merge_and_unload(safe_merge=True).to(files.dtype), files.folder, folder)
    found = difference(folder, config, [(ids, expected)])
    problem = f"adapter {files.adapter}: merged into the model it gives other answers than beside it"
    refuse_difference(found, files.dtype == torch.float32, problem, "; take --backend hf")
