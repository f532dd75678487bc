"""What generates, whichever it is: the interface of the engines, and the choice between them."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.models.types import GenerationRequest, GenerationResult

LOGGER = logging.getLogger(__name__)
VLLM_ONLY = (
    *("gpu_memory_utilization", "kv_cache_gib", "tensor_parallel_size", "pipeline_parallel_size"),
    *("enforce_eager", "compiled", "engine_log"),
)
"""Settings of EngineConfigBase that transformers cannot follow."""


class Engine(Protocol):
    """A model that continues prompts: `LanguageModel` on transformers, `VLLMEngine` on vLLM."""

    tokenizer: Any
    facts: dict[str, str | None]
    """What provenance records: fingerprints, device, dtype, backend."""
    eos_ids: frozenset[int]
    context_length: int | None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None],
        on_tokens: Callable[[int], None] = ...,
        batch_size: int = ...,
        top_k: int = ...,
    ) -> None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


def choose_backend(config: EngineConfigBase, only_hf: str | None = None) -> tuple[str, str]:
    """
    "hf" or "vllm", and why. Neither engine is imported; torch is only asked for its devices.

    only_hf: the flag or command, if there is one, that only transformers can serve. Raises InputError when vLLM is
    asked for and not installed, or cannot do what is asked.
    """
    if only_hf and config.backend == "vllm":
        raise InputError(f"--backend vllm: {only_hf} runs on transformers only; take --backend hf or auto")
    if config.backend == "vllm":
        require_vllm()
        return "vllm", "asked for"
    name, reason = _chosen(config, vllm_is_installed(), only_hf)
    stray = [f"--{flag}" for flag in VLLM_ONLY if getattr(config, flag) != getattr(EngineConfigBase, flag)]
    if name == "hf" and stray:
        raise InputError(f"{', '.join(stray)}: only vLLM has that, and transformers it is ({reason}); --backend vllm")
    return name, reason


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported; it is not."""
    return importlib.util.find_spec("vllm") is not None


def require_vllm() -> None:
    """Raises InputError when vLLM is not installed."""
    if not vllm_is_installed():
        raise InputError(
            "--backend vllm: vLLM is not installed; run the command as `uv run --extra cpu -m src.…` "
            "(on a CUDA machine `--extra cuda`), or take --backend hf"
        )


def _chosen(config: EngineConfigBase, installed: bool, only_hf: str | None) -> tuple[str, str]:
    if config.backend == "hf":
        return "hf", "asked for"
    if only_hf:
        return "hf", f"{only_hf} runs on it only"
    if not installed:
        return "hf", "vLLM is not installed"
    if config.quantization != "none":
        return "hf", f"--quantization {config.quantization} is for it"

    from src.models.devices import resolve_device

    device = resolve_device(config.device)
    return ("vllm", "installed, on CUDA") if device.type == "cuda" else ("hf", f"the device is {device.type}")


def load_engine(config: EngineConfigBase, batch_size: int, only_hf: str | None = None) -> Engine:
    """
    The engine that a command's settings name, loaded; it says which and why. batch_size: rows decoded at once. only_hf:
    as for `choose_backend`.

    Raises what the engines raise.
    """
    backend, reason = choose_backend(config, only_hf)
    LOGGER.info("Generating on %s (%s)", {"hf": "transformers", "vllm": "vLLM"}[backend], reason)
    if backend == "vllm":
        from src.models.vllm_engine import VLLMEngine

        return VLLMEngine.load(config, batch_size=batch_size)
    from src.models.language_model import LanguageModel

    model = LanguageModel.load(config)
    model.context_length = bounded_context(config, model.context_length)
    return model


def refuse_unsupported(requests: Sequence[GenerationRequest], context_length: int | None, can_steer: bool) -> None:
    """
    Raises InputError for a request that asks for a capture, or for interventions of an engine that cannot steer, or
    whose prompt alone fills the context.
    """
    for request in requests:
        if request.spec and not can_steer:
            raise InputError(
                f"request {request.id!r} asks for interventions, which vLLM cannot do here; --backend hf can"
            )
        if request.capture is not None:
            raise InputError(f"request {request.id!r} asks for a capture, which this engine cannot do")
        if context_length and len(request.token_ids) >= context_length:
            raise InputError(
                f"request {request.id!r}: its prompt has {len(request.token_ids)} tokens and the model's context "
                f"{context_length}; shorten the prompt or take a model with a longer context"
            )


def bounded_context(config: EngineConfigBase, context: int | None) -> int | None:
    """The model's context, or the part of it that --max_model_len leaves. Raises InputError when it asks for more."""
    if config.max_model_len and context and config.max_model_len > context:
        raise InputError(f"--max_model_len {config.max_model_len}: the model's context is {context}")
    return config.max_model_len or context
