"""From a model reference to a model in memory: files, number format, device, quantization, adapter."""

import hashlib
import json
import logging
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from src.common.errors import InputError
from src.common.model_config import ModelSettings
from src.models.devices import free_memory, resolve_device, resolve_dtype
from src.models.fingerprint import fingerprint
from src.models.hub import adapter_folder, model_folder, split_reference

if TYPE_CHECKING:
    from peft import PeftModel

LOGGER = logging.getLogger(__name__)
WITHOUT_EFFECT = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
"""Keys of adapter_config.json that change no number."""
BASE_FILE = "base_model.json"
"""In an adapter's folder: the model that it was trained on, with its fingerprint."""
FORMAT_FILES = ("config.json", "generation_config.json", "token*", "vocab*", "merges.txt", "*.jinja", "chat_template*")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model reference resolved on this machine: what there is before any weight is read."""

    folder: Path
    adapter: Path | None
    device: torch.device
    dtype: torch.dtype
    facts: dict[str, str | None]
    """What provenance records: fingerprints, device, dtype."""

    @property
    def dtype_name(self) -> str:
        """The dtype without `torch.`."""
        return str(self.dtype).removeprefix("torch.")


def resolve(config: ModelSettings) -> ModelFiles:
    """
    Find, and where they come from a hub download, the files of a model and its adapter.

    Raises InputError for what cannot be found, reached or run here.
    """
    model_id, adapter_reference = split_reference(config.model_id, config.adapter_path)
    folder = model_folder(model_id, config.revision)
    adapter = adapter_folder(adapter_reference) if adapter_reference else None
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    facts = {
        "model_fingerprint": fingerprint(folder),
        "adapter_fingerprint": adapter_fingerprint(adapter) if adapter else None,
        "format_fingerprint": format_fingerprint(folder),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": "hf",
    }
    if adapter:
        _refuse_other_base(adapter, config.model_id, facts["model_fingerprint"])
    return ModelFiles(folder=folder, adapter=adapter, device=device, dtype=dtype, facts=facts)


def load(config: ModelSettings) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, str | None]]:
    """The model in evaluation mode, its tokenizer, and the facts that provenance records."""
    files = resolve(config)
    tokenizer = load_tokenizer(files.folder, config.trust_remote_code)
    model = load_weights(files.folder, config, files.device, files.dtype)
    if files.adapter:
        model = attach_adapter(model, files.adapter)
    return model, tokenizer, files.facts


def _refuse_other_base(adapter: Path, model_id: str, fingerprint_of_model: str) -> None:
    """Raises InputError for an adapter that says it was trained on other weights."""
    path = adapter / BASE_FILE
    if not path.exists():
        return
    known = _read_json(path)
    if known.get("model_fingerprint") != fingerprint_of_model:
        raise InputError(
            f"--adapter_path {adapter}: it was trained on {known.get('model_id')} (fingerprint "
            f"{str(known.get('model_fingerprint'))[:12]}), and --model_id {model_id} has other weights "
            f"({fingerprint_of_model[:12]}); take that model, or remove {path} to use it on this one all the same"
        )


def adapter_fingerprint(folder: Path) -> str:
    """sha256 (hex) of an adapter's weights and of what its settings make of them, its rank, alpha and modules."""
    settings = _read_json(folder / "adapter_config.json")
    acting = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps([fingerprint(folder), acting], sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {_first_line(error)}") from error


def format_fingerprint(folder: Path) -> str:
    """sha256 (hex) of template, tokenizer and configuration: how text becomes tokens and where answers end."""
    digest = hashlib.sha256()
    for pattern in FORMAT_FILES:
        for file in sorted(folder.glob(pattern)):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises InputError when the folder holds none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot load a tokenizer from it: {_first_line(error)}") from error


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder. Raises InputError when there is none or it is of an unknown model type."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {_first_line(error)}") from error


def auto_class_of(config: PreTrainedConfig) -> type:
    """The transformers class that makes a model of this configuration, with its vision tower where it has one."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def load_weights(folder: Path, config: ModelSettings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, without an adapter. Raises InputError when weights are missing or cannot be read."""
    model_config = load_config(folder, config.trust_remote_code)
    auto_class = auto_class_of(model_config)
    capped = getattr(model_config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    try:
        model, report = auto_class.from_pretrained(
            folder,
            # The other kernels leave the cap on attention logits out (Gemma 2), without a word.
            attn_implementation="eager" if capped else None,
            dtype=dtype,
            device_map=_device_map(folder, device, config.quantization),
            quantization_config=_quantization(config.quantization, device, dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--model_id {config.model_id}: {_first_line(error)}") from error
    expected = "it is damaged or no causal language model"
    refuse_missing_weights(f"--model_id {config.model_id}", model, report, expected)
    model.requires_grad_(False)
    return model if hasattr(model, "hf_device_map") else model.to(device)


def refuse_missing_weights(place: str, model: nn.Module, report: dict[str, Collection], expected: str) -> None:
    """Raises InputError where weights were missing or of another shape: transformers draws them, and only warns."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:
        raise InputError(
            f"{place}: {len(missing)} weights of {type(model).__name__} are missing and {len(mismatched)} have another "
            f"shape, {(missing + mismatched)[0]} for one; {expected}"
        )


def _device_map(folder: Path, device: torch.device, quantization: str) -> str | dict[str, torch.device] | None:
    # A map over several devices costs a transfer a layer, so only a model that one device cannot hold gets one.
    if device.type != "cuda":
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // (4 if quantization == "nf4" else 1)
    if size > 0.9 * free_memory(device) and torch.cuda.device_count() > 1:
        LOGGER.info("%.1f GB of weights do not fit on %s: spreading over all CUDA devices", size / 1e9, device)
        return "auto"
    return {"": device}


def _quantization(name: str, device: torch.device, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if name == "none":
        return None
    if device.type != "cuda":
        raise InputError(f"--quantization {name} needs a CUDA device and this is {device}; leave it out")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype)


def attach_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the LoRA adapter in `folder` acting on it, not merged. Raises as `with_adapter` does."""
    # PEFT put its layers into the model itself; the wrapper would only hide where the decoder's parts are.
    return with_adapter(model, folder).get_base_model()


def with_adapter(model: nn.Module, folder: Path) -> "PeftModel":
    """
    PEFT's wrapper around `model` with the adapter in `folder`.

    Raises InputError when a tensor of the adapter finds no place in the model, or the other way round: PEFT only warns,
    and the numbers would be the base model's.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # PEFT would look a bundled model up on the hub, to see whether words were added to its vocabulary.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        try:
            wrapped = PeftModel.from_pretrained(model, folder)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--adapter_path {folder}: {_first_line(error)}") from error
        present = set(get_peft_model_state_dict(wrapped))
    stored: set[str] = set()
    for file in folder.glob("adapter_model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    if stored != present:
        odd = sorted(stored ^ present)
        raise InputError(
            f"--adapter_path {folder}: the adapter does not fit {type(model).__name__}: {len(stored - present)} of its "
            f"tensors have no place there and {len(present - stored)} places stay empty, {odd[0]} for one; "
            f"take the base model that adapter_config.json names"
        )
    for warning in caught:
        LOGGER.info("While loading the adapter: %s", warning.message)
    wrapped.requires_grad_(False)
    return wrapped


def eos_token_ids(
    config: PreTrainedConfig, generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Every token that ends a response: the generation config's, all of them, and the tokenizer's own."""
    stated = generation_config.eos_token_id if generation_config else None
    stated = stated or config.get_text_config(decoder=True).eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a model folder, None where it has none."""
    try:
        return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'generation_config.json'}: {_first_line(error)}") from error


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's positions reach, None where its config states no bound."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of one row takes in the cache, an upper bound with sliding windows."""
    config = config.get_text_config(decoder=True)
    # Where layers differ (Gemma 4) a config refuses to name one value for all of them.
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    widths = [
        (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
        for layer in layers
    ]
    return 2 * sum(widths) * dtype.itemsize


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
