"""Which backend runs, on which devices and in which number format; loading it."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.common.errors import InputError
from src.embedding.encoder import CPU_TOKENS, GPU_TOKENS, Encoder, TorchEncoder, encoder_dtype
from src.embedding.loading import Pieces
from src.embedding.model_files import (
    chosen_prompt,
    embedding_fingerprint,
    embedding_folder,
    load_sentence_transformer,
)
from src.embedding.openai_encoder import OpenAIEncoder, whole_texts
from src.embedding.settings import EmbedderSettings, EmbedSettings
from src.embedding.tokenizing import PieceTokenizer
from src.embedding.verification import Reference
from src.models.devices import resolve_device
from src.models.engine import vllm_is_installed

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What embeds, and what vectors depend on beyond the settings."""

    encoders: list[Encoder]
    pieces_of: Pieces
    reference: Callable[[], Reference]
    """Loads what checks the vectors; called when the encoders are done."""
    facts: dict[str, Any]
    """Settings as they were resolved: backend, dtype, model_fingerprint, prompt, max_length, tokens_per_batch."""
    device: str

    def close(self) -> None:
        """Gives back the memory of the encoders."""
        for encoder in self.encoders:
            encoder.close()


def load_backend(settings: EmbedSettings) -> Backend:
    """Raises InputError for a model, device, prompt or length that does not do, and for a missing package."""
    return _openai(settings) if settings.backend == "openai" else _local(settings)


def _openai(settings: EmbedSettings) -> Backend:
    encoder = OpenAIEncoder(settings)
    _require_dimensions(settings, encoder.dim)
    facts = {"backend": "openai", "dtype": "float32", "model_fingerprint": None, "prompt": settings.prompt or ""}
    return Backend(
        encoders=[encoder], pieces_of=whole_texts, reference=lambda: encoder.embed_one, facts=facts, device="server"
    )


def choose_local(settings: EmbedderSettings, device: torch.device, is_compiled: bool = False) -> str:
    """st, openvino or vllm. Raises InputError where another than st is asked for and cannot run."""
    installed = importlib.util.find_spec("openvino") is not None
    if settings.backend == "openvino":
        if not installed:
            raise InputError("--backend openvino: the package is not installed; uv sync --extra openvino adds it")
        if device.type != "cpu":
            raise InputError(f"--backend openvino runs on the CPU; --device {device} needs --backend st")
    elif settings.backend == "vllm":
        if not vllm_is_installed():
            raise InputError(
                "--backend vllm: vLLM is not installed; run the command as `uv run --extra cpu -m src.embed_dataset …` "
                "(on a CUDA machine `--extra cuda`), or take --backend st"
            )
        if device.index:
            raise InputError(f"--device {device} with vLLM: set CUDA_VISIBLE_DEVICES={device.index} instead")
    elif settings.backend == "auto":
        return "openvino" if device.type == "cpu" and installed and not is_compiled else "st"
    return settings.backend


def _local(settings: EmbedSettings) -> Backend:
    names = settings.devices.split(",") if settings.devices else [settings.device]
    devices = [resolve_device(name.strip()) for name in names]
    if len({device.type for device in devices}) > 1:
        raise InputError(f"--devices {settings.devices}: expected devices of one kind")
    backend = load_local(
        settings, devices, chunk_tokens=settings.chunk_tokens, chunk_overlap=settings.chunk_overlap,
        is_compiled=settings.compile,
    )  # fmt: skip
    _require_dimensions(settings, backend.encoders[0].dim)
    return backend


def load_local(
    settings: EmbedderSettings,
    devices: Sequence[torch.device],
    *,
    chunk_tokens: int | None = None,
    chunk_overlap: int = 0,
    is_compiled: bool = False,
) -> Backend:
    """A sentence-transformers model, a copy on each device. Raises InputError as `load_backend`."""
    backend = choose_local(settings, devices[0], is_compiled)
    folder = embedding_folder(settings.model_id, settings.revision)
    dtype = encoder_dtype(settings.dtype, devices[0])
    tokens = settings.tokens_per_batch or (CPU_TOKENS if devices[0].type == "cpu" else GPU_TOKENS)
    # vLLM has its own copy of the model on the device.
    model = load_sentence_transformer(folder, torch.device("cpu") if backend == "vllm" else devices[0])
    prompt = chosen_prompt(model, settings.prompt, settings.prompt_name)
    max_length = _max_length(model, settings)
    tokenizer = PieceTokenizer(model.tokenizer, prompt, max_length, chunk_tokens, chunk_overlap)

    def make(device: torch.device, loaded: Any = None) -> Encoder:
        loaded = loaded or load_sentence_transformer(folder, device)
        if backend == "vllm":
            from src.embedding.vllm_encoder import VLLMEncoder

            return VLLMEncoder(loaded, folder, device, dtype, tokens, max_length, tokenizer.prompt_length())
        if backend == "openvino":
            from src.embedding.openvino_encoder import OpenVinoEncoder

            return OpenVinoEncoder(loaded, dtype, tokens, tokenizer.prompt_length())
        return TorchEncoder(loaded, dtype, tokens, tokenizer.prompt_length(), is_compiled)

    dtype_name = str(dtype).removeprefix("torch.")
    LOGGER.info("Embedding with %s in %s on %s", backend, dtype_name, ", ".join(map(str, devices)))
    return Backend(
        encoders=[make(devices[0], model), *(make(device) for device in devices[1:])],
        pieces_of=tokenizer.pieces,
        reference=lambda: _library_reference(folder, devices[0], prompt, max_length),
        facts={
            "backend": backend, "dtype": dtype_name, "model_fingerprint": embedding_fingerprint(folder),
            "prompt": prompt, "max_length": max_length, "tokens_per_batch": tokens,
        },
        device=",".join(map(str, devices)),
    )  # fmt: skip


def _require_dimensions(settings: EmbedSettings, dim: int) -> None:
    if settings.truncate_dim and settings.truncate_dim > dim:
        raise InputError(f"--truncate_dim {settings.truncate_dim}: the model's vectors have {dim} dimensions")


def _max_length(model: Any, settings: EmbedderSettings) -> int | None:
    positions = getattr(model[0].config, "max_position_embeddings", None)
    wanted = settings.max_length or model.max_seq_length or positions
    if settings.max_length and positions and settings.max_length > positions:
        raise InputError(f"--max_length {settings.max_length}: the model has positions for {positions} tokens")
    return wanted


def _library_reference(folder: Path, device: torch.device, prompt: str, max_length: int | None) -> Reference:
    model = load_sentence_transformer(folder, device)
    model.max_seq_length = max_length

    def embed(text: str) -> np.ndarray:
        return model.encode([text], prompt=prompt, show_progress_bar=False, convert_to_numpy=True)[0]

    return embed
