"""Adapters on vLLM: through its own LoRA where that does what PEFT does, else as a merged copy of the model."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open

from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed
from src.models.loading import ModelFiles
from src.models.merging import merged_copy
from src.models.vllm_check import distribution

LOGGER = logging.getLogger(__name__)
TEXT = "The answer to your question is simple:"
MOVED = 1e-6
"""Largest change of a log-probability (nats) from which an adapter counts as acting; rounding stays below."""


@dataclass(frozen=True)
class Adapter:
    """How an adapter gets into vLLM."""

    folder: Path
    rank: int
    """The largest rank of vLLM's that holds the adapter's; 0 for a merged one."""
    merged: Path | None
    """The model with the adapter in its weights, None where vLLM applies it."""

    def engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs that make room for the adapter."""
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": self.rank}

    def request(self) -> Any:
        """What names the adapter in a request."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, str(self.folder))


def prepare_adapter(files: ModelFiles, config: EngineConfigBase) -> Adapter:
    """The adapter of a model reference, merged first where vLLM's LoRA cannot do what PEFT does with it."""
    assert files.adapter is not None
    rank, obstacle = lora_rank(files)
    if obstacle is None:
        return Adapter(files.adapter, rank, None)
    LOGGER.info("vLLM cannot apply the adapter itself (%s): merging it into a copy of the model", obstacle)
    return Adapter(files.adapter, 0, merged_copy(files, config))


def lora_rank(files: ModelFiles) -> tuple[int, str | None]:
    """The rank to make room for, and why vLLM's own LoRA would not do, None where it does."""
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    experts = [name for name in tensor_names(files.adapter) if "expert" in name]
    if experts:
        return 0, f"it changes experts, {experts[0]} for one"
    try:
        helper = PEFTHelper.from_local_dir(str(files.adapter), None)
        largest = max(helper.r, *helper.rank_pattern.values(), 0)
        fitting = [rank for rank in get_args(MaxLoRARanks) if rank >= largest]
        if not fitting:
            return 0, f"its rank {largest} is above {max(get_args(MaxLoRARanks))}"
        helper.validate_legal(LoRAConfig(max_lora_rank=fitting[0]))
        model_config = EngineArgs(model=str(files.folder), skip_tokenizer_init=True).create_model_config()
        model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
    except (ValueError, TypeError) as error:
        return 0, str(error).strip().splitlines()[0]
    return fitting[0], None if supports_lora(model_class) else f"{model_class.__name__} takes no adapters there"


def tensor_names(adapter: Path) -> list[str]:
    """Names of the tensors of an adapter."""
    names: list[str] = []
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names


def is_zero(adapter: Path) -> bool:
    """Whether the adapter changes nothing, as one that was never trained: each product has a factor of zeros."""
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if any(".lora_B" in name and tensors.get_tensor(name).any() for name in list(tensors.keys())):
                return False
    return True


def check_adapter(loaded: Any, adapter: Adapter) -> None:
    """
    Raises CheckFailed unless every weight of the adapter has its place in vLLM's model and the adapter moves the
    distribution of a next token.
    """
    with_adapter, without = distribution(loaded, TEXT, adapted=True), distribution(loaded, TEXT, adapted=False)
    placed = loaded._engine.collective_rpc("tiller_adapter_modules")[0]
    if placed["homeless"]:
        raise CheckFailed(
            f"adapter {adapter.folder}: vLLM has no place for {len(placed['homeless'])} of its weights, "
            f"{placed['homeless'][:1]} for one, so the answers would not be the adapter's; take --backend hf"
        )
    moved = max(abs(with_adapter[token] - without[token]) for token in without if without[token] > -math.inf)
    if (moved < MOVED or not placed["acting"]) and not is_zero(adapter.folder):
        raise CheckFailed(
            f"adapter {adapter.folder}: it does not act in vLLM: with it and without it log-probabilities differ by at "
            f"most {moved:.1e}; take --backend hf"
        )
