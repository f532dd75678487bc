"""What generates, whichever it is: the interface of the engines, and the choice between them."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from src.common.engine_config import EngineSettings
from src.common.errors import InputError
from src.models.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from src.common.interventions import Entry
    from src.common.resolved_interventions import ReadDirections, ResolvedSpec
    from src.models.hooks import Location
    from src.models.teacher_forcing import ForcedRow, OnProjected

LOGGER = logging.getLogger(__name__)
VLLM_ONLY = (
    *("gpu_memory_utilization", "kv_cache_gib", "tensor_parallel_size", "pipeline_parallel_size"),
    *("enforce_eager", "compiled", "engine_log"),
)
"""Settings of EngineSettings that transformers cannot follow."""


class Bounded(Protocol):
    """Settings that may bound the context."""

    max_model_len: int | None


class Engine(Protocol):
    """A model that continues prompts: `LanguageModel` on transformers, `VLLMEngine` on vLLM."""

    tokenizer: Any
    facts: dict[str, str | None]
    """What provenance records: fingerprints, device, dtype, backend."""
    eos_ids: frozenset[int]
    context_length: int | None
    n_layers: int
    batches_at_once: int
    """How many batches of rows to ask for at once: a scheduler that fills its batches from all wants several."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None],
        on_tokens: Callable[[int], None] = ...,
        batch_size: int = ...,
        top_k: int = ...,
    ) -> None: ...

    def generate_projected(
        self,
        requests: Sequence[GenerationRequest],
        place: "Location",
        direction: "np.ndarray",
        *,
        on_result: "OnProjected",
        on_tokens: Callable[[int], None],
        batch_size: int,
        top_k: int,
    ) -> None: ...

    def log_probabilities(self, rows: "Sequence[ForcedRow]") -> "list[Tensor]": ...

    def kl_per_token(self, rows: "Sequence[ForcedRow]") -> "list[Tensor]": ...

    def mean_projections(
        self, rows: "Sequence[ForcedRow]", place: "Location", direction: "np.ndarray"
    ) -> list[float]: ...

    def resolve(
        self, entries: "Sequence[Entry]", allow_model_mismatch: bool = ..., read: "ReadDirections" = ...
    ) -> "ResolvedSpec": ...

    def use_adapter(self, folder: "Path | None") -> None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


def choose_backend(config: EngineSettings, keeps: bool = False) -> tuple[str, str]:
    """
    "hf" or "vllm", and why. Neither engine is imported; torch is only asked for its devices.

    keeps: whether hidden states are to be kept or measured. Raises InputError when vLLM is asked for and not installed,
    or cannot do what is asked.
    """
    if keeps and config.compiled and config.backend != "hf":
        raise InputError("--compiled: a compiled model's hidden states are not kept or measured; leave it out")
    if config.backend == "vllm":
        require_vllm()
        return "vllm", "asked for"
    name, reason = _chosen(config, vllm_is_installed())
    stray = [f"--{flag}" for flag in VLLM_ONLY if getattr(config, flag) != getattr(EngineSettings, flag)]
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


def _chosen(config: EngineSettings, installed: bool) -> tuple[str, str]:
    if config.backend == "hf":
        return "hf", "asked for"
    if not installed:
        return "hf", "vLLM is not installed"
    if config.quantization != "none":
        return "hf", f"--quantization {config.quantization} is for it"

    from src.models.devices import resolve_device

    device = resolve_device(config.device)
    return ("vllm", "installed, on CUDA") if device.type == "cuda" else ("hf", f"the device is {device.type}")


def load_engine(
    config: EngineSettings, batch_size: int, *, keeps: bool = False, specs: "Sequence[ResolvedSpec]" = (),
    adapters: "Sequence[Path]" = (),
) -> Engine:  # fmt: skip
    """
    The engine that a command's settings name, loaded; it says which and why.

    batch_size: rows decoded at once. keeps: as for `choose_backend`. specs: interventions that are to come; vLLM then
    compiles the model only for --compiled, and the interventions with it. adapters: folders that `use_adapter` will
    name, beside none in `config`.
    Raises what the engines raise, and InputError when hidden states cannot be reached in this model.
    """
    backend, reason = choose_backend(config, keeps)
    LOGGER.info("Generating on %s (%s)", {"hf": "transformers", "vllm": "vLLM"}[backend], reason)
    if backend == "vllm":
        from src.models.vllm_engine import VLLMEngine

        engine = VLLMEngine.load(config, batch_size=batch_size, adapters=adapters, **_steering(config, keeps, specs))
        if (keeps or specs) and engine.no_steering:
            engine.close()
            raise InputError(
                f"--backend vllm: it can neither steer nor measure hidden states here ({engine.no_steering}); "
                f"take --backend hf"
            )
        return engine
    from src.models.language_model import LanguageModel

    model = LanguageModel.load(config)
    model.context_length = bounded_context(config, model.context_length)
    return model


def _steering(config: EngineSettings, keeps: bool, specs: "Sequence[ResolvedSpec]") -> dict[str, Any]:
    """What `VLLMEngine.load` is told besides."""
    if not keeps and not specs:
        return {}
    if not config.compiled:
        return {"enforce_eager": True}
    from src.models.vllm_compiled import declare

    return {"declared": declare(specs)}


def refuse_unsupported(
    requests: Sequence[GenerationRequest],
    context_length: int | None,
    *,
    no_interventions: str | None = None,
    no_captures: str | None = None,
) -> None:
    """
    Raises InputError for a request whose prompt alone fills the context, for an intervention that can act on none
    of its positions, and for one that asks for interventions or a capture where there is a reason why not.
    """
    for request in requests:
        if request.spec and no_interventions:
            raise InputError(f"request {request.id!r} asks for interventions: {no_interventions}")
        # A given answer is as long as it is.
        if request.prompt_length is None:
            refuse_idle(request)
        if request.capture is not None and no_captures:
            raise InputError(f"request {request.id!r} asks for a capture: {no_captures}")
        if context_length and len(request.token_ids) >= context_length:
            raise InputError(
                f"request {request.id!r}: its prompt has {len(request.token_ids)} tokens and the model's context "
                f"{context_length}; shorten the prompt or take a model with a longer context"
            )


def refuse_idle(request: GenerationRequest) -> None:
    """Raises InputError for an intervention that can act nowhere, which would be reported as one without effect."""
    n_positions = len(request.token_ids) + request.max_tokens - 1
    for operation in request.spec.operations if request.spec else ():
        start, end = operation.window(request.boundary)
        if start >= (n_positions if end is None else min(end, n_positions)):
            told = f"positions {start} to {'the end' if end is None else end - 1}"
            raise InputError(
                f"request {request.id!r}: {operation.op} at layer {operation.layer} is to act on {told}, of which "
                f"there are none: with a prompt of {request.boundary} tokens and at most {request.max_tokens} more, "
                f"{n_positions} positions, counted from 0, go through the model (the answer's last token does not)"
            )


def fitted(request: GenerationRequest, context_length: int | None) -> GenerationRequest:
    """The request with as many tokens at most as the context has room for behind its prompt."""
    room = (context_length or len(request.token_ids) + request.max_tokens) - len(request.token_ids)
    return request if request.max_tokens <= room else replace(request, max_tokens=room)


def bounded_context(config: Bounded, context: int | None) -> int | None:
    """The model's context, or the part of it that --max_model_len leaves. Raises InputError when it asks for more."""
    if config.max_model_len and context and config.max_model_len > context:
        raise InputError(f"--max_model_len {config.max_model_len}: the model's context is {context}")
    return config.max_model_len or context
