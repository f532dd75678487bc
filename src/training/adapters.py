"""Adapters as folders that PEFT and every command load, each with what it was trained on."""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.models.architectures import decoder_layers
from src.models.loading import BASE_FILE, ModelFiles
from src.models.merging import write_merged
from src.models.model_folder import appearing, remove_unfinished
from src.training.settings import FinetuneSettings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MERGED, STASHED = "merged", "adapter"
EPOCH = re.compile(r"epoch_(\d+)")


def lora_config(config: FinetuneSettings, model: nn.Module) -> LoraConfig:
    """The adapter that the settings ask for. Raises InputError for a module name that the decoder does not have."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_targets(model, config.target_modules),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _targets(model: nn.Module, wanted: list[str] | None) -> list[str]:
    """Full names of the linear modules in the decoder's layers that end in one of the wanted names."""
    blocks = {id(block) for block in decoder_layers(model)}
    inside = [
        name
        for prefix, block in model.named_modules()
        if id(block) in blocks
        for name in (f"{prefix}.{inner}" for inner, module in block.named_modules() if _is_linear(module))
    ]
    names = sorted({name.rsplit(".", 1)[-1] for name in inside})
    unknown = [name for name in wanted or [] if name not in names]
    if unknown or not inside:
        raise InputError(
            f"--target_modules {' '.join(unknown)}: not in this model's layers, which have {', '.join(names)}"
        )
    chosen = wanted or names
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    everywhere = [name for name in linears if name.rsplit(".", 1)[-1] in chosen]
    own = [name for name in inside if name.rsplit(".", 1)[-1] in chosen]
    # Short names read better, but must not reach into a vision tower.
    return sorted(chosen) if sorted(everywhere) == sorted(own) else own


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is one, and bitsandbytes' are derived from torch's.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@dataclass(frozen=True)
class Base:
    """The model that an adapter is of, as other machines find it."""

    reference: str
    about: dict[str, Any]


def base_of(config: FinetuneSettings, files: ModelFiles) -> Base:
    """A hub id or `bundled:` name where the model came from one, also by way of src.download_model; else the folder."""
    reference, revision = config.model_id, config.revision
    card = files.folder / "download.json"
    if Path(reference).expanduser().is_dir():
        reference = str(Path(reference).expanduser().absolute())
        if card.exists():
            known = json.loads(card.read_text("utf-8"))
            reference, revision = known["model_id"], known["commit"]
    about = {
        "model_id": reference,
        "revision": revision,
        "model_fingerprint": files.facts["model_fingerprint"],
        "format_fingerprint": files.facts["format_fingerprint"],
    }
    return Base(reference, about)


def write_adapter(folder: Path, model: PeftModel, base: Base, about: Mapping[str, Any]) -> None:
    """An adapter folder that appears whole; one of that name is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = copy.copy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = base.reference, True
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    with appearing(folder) as scratch:
        settings.save_pretrained(scratch)
        # A set has no order, and the same run is to leave the same file.
        written = json.loads((scratch / CONFIG).read_text("utf-8"))
        write_json_atomic(scratch / CONFIG, written | {"target_modules": sorted(written["target_modules"])})
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch / WEIGHTS, metadata={"format": "pt"}
        )
        write_json_atomic(scratch / BASE_FILE, {**base.about, "training": dict(about)})


def drop_epochs_behind(folder: Path, step: int, steps_per_epoch: int) -> None:
    """Remove the adapters of epochs that end behind `step`: they are trained again."""
    for path in folder.glob("epoch_*"):
        found = EPOCH.fullmatch(path.name)
        if found and (int(found.group(1)) + 1) * steps_per_epoch > step:
            shutil.rmtree(path)


def merge_epoch(folder: Path, config: FinetuneSettings, files: ModelFiles) -> None:
    """
    The model with an epoch's adapter merged, checked against the two apart: in merged/ beside the adapter or, with
    --stash_adapter_weights, in the epoch's folder itself with the adapter in adapter/. Does nothing where it is there.
    """
    whole = folder.with_name(f".stashed-{folder.name}")
    remove_unfinished(folder)
    if config.stash_adapter_weights:
        if (folder / STASHED).is_dir():
            shutil.rmtree(whole, ignore_errors=True)
            return
        if not whole.is_dir():
            with appearing(whole) as scratch:
                write_merged(replace(files, adapter=folder), config, scratch)
                shutil.copytree(folder, scratch / STASHED)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    elif not (folder / MERGED).is_dir():
        with appearing(folder / MERGED) as scratch:
            write_merged(replace(files, adapter=folder), config, scratch)
