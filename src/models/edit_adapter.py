"""Edits as a LoRA adapter, where they are one: added to the weights, a product of two thin matrices."""

from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from src.common.errors import InputError
from src.models.expert_edits import is_fused
from src.models.residual_writers import residual_writers
from src.models.weight_editor import Edits

WEIGHTS = "adapter_model.safetensors"


def write_adapter(folder: Path, model: nn.Module, base_model_id: str, edits: Edits) -> None:
    """
    Write the edits of `model` as a PEFT adapter of rank k: W' − W = −U·A. Raises InputError for edits that are no such
    product (norms kept, something added) and for fused experts.
    """
    by_name = {each.name: each for each in residual_writers(model)}
    prefixes = {id(module): name for name, module in model.named_modules()}
    tensors, targets = {}, []
    for name, edit in edits.items():
        if edit.s is not None or edit.t is not None or edit.bias is not None or is_fused(by_name[name].writer):
            raise InputError(
                f"--save adapter: the edit of {name} is no low-rank product (--norm none without --induce is, outside "
                f"fused experts); take --save model"
            )
        path = prefixes[id(by_name[name].writer.module)]
        targets.append(path)
        tensors[f"base_model.model.{path}.lora_A.weight"] = edit.a.float().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = -edit.u.float().cpu().contiguous()
    assert tensors, "an adapter of no edits"
    rank = next(iter(edits.values())).a.shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        base_model_name_or_path=base_model_id, r=rank, lora_alpha=rank, target_modules=sorted(targets),
        task_type="CAUSAL_LM", inference_mode=True,
    ).save_pretrained(folder)  # fmt: skip
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
