"""Adapters on vLLM: through its own LoRA where that does what PEFT does, else as a merged copy of the model."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open

from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed, InputError
from src.models.adapter_switching import tensor_names
from src.models.loading import ModelFiles, auto_class_of, load_config
from src.models.merging import merged_copy
from src.models.vllm_check import distribution

LOGGER = logging.getLogger(__name__)
TEXT = "The answer to your question is simple:"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
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
    number: int = 1
    """Tells several adapters of one engine apart, from 1."""

    def engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs that make room for the adapter."""
        return room_for([self])

    def request(self) -> Any:
        """What names the adapter in a request."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{self.number}", self.number, str(self.folder))


def room_for(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs for adapters of which one at a time acts."""
    rank = max(adapter.rank for adapter in adapters)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": len(adapters), "max_lora_rank": rank}


def switchable_adapters(files: ModelFiles, folders: Sequence[Path]) -> list[Adapter]:
    """Adapters for one engine to switch between. Raises InputError for one that vLLM's LoRA cannot do as PEFT does."""
    adapters = []
    for number, folder in enumerate(folders, start=1):
        rank, obstacle = lora_rank(replace(files, adapter=folder))
        if obstacle:
            raise InputError(f"adapter {folder}: vLLM cannot switch to it ({obstacle}); load it alone")
        adapters.append(Adapter(folder, rank, None, number))
    return adapters


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
    from vllm.exceptions import VLLMError
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    obstacle = obstacle_of(tensor_names(files.adapter), files)
    if obstacle:
        return 0, obstacle
    try:
        helper = PEFTHelper.from_local_dir(str(files.adapter), None)
        largest = max(helper.r, *helper.rank_pattern.values(), 0)
        fitting = [rank for rank in get_args(MaxLoRARanks) if rank >= largest]
        if not fitting:
            return 0, f"its rank {largest} is above {max(get_args(MaxLoRARanks))}"
        helper.validate_legal(LoRAConfig(max_lora_rank=fitting[0]))
        model_config = EngineArgs(model=str(files.folder), skip_tokenizer_init=True).create_model_config()
        model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
    except (ValueError, TypeError, VLLMError) as error:
        return 0, str(error).strip().splitlines()[0]
    check_fit(files)
    return fitting[0], None if supports_lora(model_class) else f"{model_class.__name__} takes no adapters there"


def obstacle_of(names: list[str], files: ModelFiles) -> str | None:
    """What in an adapter's tensors or its model vLLM's LoRA is known not to do, None where there is nothing."""
    odd = [name for name in names if not re.search(r"\.lora_[AB]\.weight$", name)]
    if odd:
        return f"it holds more than factors of linear layers, {odd[0]} for one"
    config = load_config(files.folder)
    text = config.get_text_config(decoder=True)
    if any("expert" in name for name in names):
        return "it changes experts"
    if files.device.type == "cpu" and any(getattr(text, name, None) for name in EXPERT_COUNTS):
        return "mixtures of experts take no adapters on the CPU"
    tied = getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)
    if tied and any("lm_head" in name for name in names):
        return "it changes an unembedding that shares its weights with the embedding"
    return None


def check_fit(files: ModelFiles) -> None:
    """
    Raises InputError unless adapter and model have the same places, of the same shapes: vLLM puts a smaller factor into
    a corner of the matrix, and leaves places empty.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = load_config(files.folder)
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
        wrapped = get_peft_model(model, PeftConfig.from_pretrained(files.adapter))
        places = {
            name: tuple(tensor.shape)
            for name, tensor in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
        }
    stored = {name: shape for file in weight_files(files.adapter) for name, shape in shapes_in(file)}
    odd = sorted(name for name in {**stored, **places} if stored.get(name) != places.get(name))
    if odd:
        raise InputError(
            f"--adapter_path {files.adapter}: the adapter does not fit the model: {len(odd)} of its tensors have "
            f"another shape, no place, or are missing; {odd[0]} for one is {stored.get(odd[0], 'not there')}, and the "
            f"model has {places.get(odd[0], 'no place for it')}; take the base model that adapter_config.json names"
        )


def weight_files(adapter: Path) -> list[Path]:
    """The files of an adapter's tensors."""
    return sorted(adapter.glob("adapter_model*.safetensors"))


def shapes_in(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a file."""
    with safe_open(file, framework="pt") as tensors:
        return [(name, tuple(tensors.get_slice(name).get_shape())) for name in list(tensors.keys())]


def is_zero(adapter: Path) -> bool:
    """Whether the adapter changes nothing, as one that was never trained: every B is zero."""
    for file in weight_files(adapter):
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
    ranks = loaded._engine.collective_rpc("tiller_adapter_modules")
    # Each pipeline rank has some of the layers.
    homeless = sorted(set.intersection(*(set(placed["homeless"]) for placed in ranks)))
    if homeless:
        raise CheckFailed(
            f"adapter {adapter.folder}: vLLM has no place for {len(homeless)} of its weights, "
            f"{homeless[0]} for one, so the answers would not be the adapter's; take --backend hf"
        )
    moved = max(abs(with_adapter[token] - without[token]) for token in without if without[token] > -math.inf)
    if (moved < MOVED or not any(placed["acting"] for placed in ranks)) and not is_zero(adapter.folder):
        raise CheckFailed(
            f"adapter {adapter.folder}: it does not act in vLLM: with it and without it log-probabilities differ by at "
            f"most {moved:.1e}; take --backend hf"
        )
