"""Several adapters of one base model in one engine: which can share it, and how transformers changes between them."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn

from src.models.hub import adapter_folder, split_reference
from src.models.loading import with_adapter

if TYPE_CHECKING:
    from peft import PeftModel

    from src.common.engine_config import EngineConfigBase

LOGGER = logging.getLogger(__name__)
BEYOND_FACTORS = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "lora_bias", "use_bdlora", "arrow_config"),
)
"""Keys of adapter_config.json by which an adapter changes more than linear layers by a product of two factors."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Model references that one engine serves, one after another."""

    base: str
    references: tuple[str, ...]
    """In the order they were given."""
    adapters: tuple[Path, ...]
    """Folders of those that the engine switches between; none where a single reference is loaded as it is."""


def tensor_names(adapter: Path) -> list[str]:
    """Names of the tensors of an adapter."""
    names = []
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += list(tensors.keys())
    return names


def is_plain_lora(adapter: Path) -> bool:
    """
    Whether taking the adapter off again leaves the base model as it was: it holds nothing but the factors of linear
    layers. PEFT leaves whole modules, biases and repeated layers of others behind.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    is_lora = settings.get("peft_type") == "LORA" and settings.get("bias", "none") == "none"
    is_plain = is_lora and not any(settings.get(key) for key in BEYOND_FACTORS)
    return is_plain and all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensor_names(adapter))


def shared_engines(config: "EngineConfigBase", references: Sequence[str], backend: str) -> list[Sharing]:
    """
    The references by the engine that serves them, in the order of first appearance. Base models each have their own; of
    the adapters of one base model those share it that can be put on and taken off. Raises InputError for an adapter
    that cannot be found.
    """
    groups: dict[str, list[tuple[str, Path | None]]] = {}
    for reference in references:
        base, adapter = split_reference(reference, config.adapter_path)
        groups.setdefault(base, []).append((reference, adapter_folder(adapter) if adapter else None))
    found = []
    for base, members in groups.items():
        shared = [
            (reference, folder) for reference, folder in members
            if len(members) > 1 and (folder is None or _can_switch(config, base, folder, backend))
        ]  # fmt: skip
        for member in members:
            if member not in shared:
                found.append(Sharing(base=base, references=(member[0],), adapters=()))
            elif member == shared[0]:
                folders = tuple(folder for _, folder in shared if folder)
                names = tuple(reference for reference, _ in shared)
                # A single one is loaded as every command loads it.
                found.append(Sharing(base=base, references=names, adapters=folders if len(names) > 1 else ()))
    return found


def _can_switch(config: "EngineConfigBase", base: str, adapter: Path, backend: str) -> bool:
    if not is_plain_lora(adapter):
        return False
    if backend != "vllm":
        return True
    from src.models import vllm_start
    from src.models.loading import resolve
    from src.models.vllm_adapter import lora_rank

    vllm_start.set_environment(config.engine_log)
    files = resolve(replace(config, model_id=base, adapter_path=None))
    with vllm_start.errors_in_words(base):
        _, obstacle = lora_rank(replace(files, adapter=adapter))
    return obstacle is None


class AdapterSwitch:
    """Puts plain LoRA adapters on a model in memory, one at a time, and takes them off."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapped: PeftModel | None = None
        self._folder: Path | None = None

    def use(self, folder: Path | None) -> None:
        """Only the adapter in `folder` acts from now on, None for none. Raises InputError as `with_adapter` does."""
        if folder == self._folder:
            return
        if self._wrapped is not None:
            self._wrapped.unload()
            self._wrapped = self._folder = None
        if folder is not None:
            assert is_plain_lora(folder), f"{folder} cannot be taken off again"
            self._wrapped = with_adapter(self._model, folder)
            self._folder = folder
