"""The settings of every command that loads a model, in a run folder or without one: a *model reference* in flags."""

from dataclasses import dataclass
from pathlib import Path

from src.common.experiment_config import RunConfigBase
from src.common.settings import setting


@dataclass(kw_only=True)
class ModelSettings:
    """The model"""

    model_id: str = setting(aliases=("model",))
    """Hub id, local folder or bundled:smollm2-135m; X+ADAPTER_PATH also names an adapter."""
    adapter_path: Path | None = None
    """LoRA adapter to put on the model: a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    """auto is bfloat16 on CUDA and MPS, float32 on the CPU."""
    device: str = setting("auto", affects_rows=False)
    """auto is the first that is there of cuda, mps, cpu."""
    quantization: str = setting("none", choices=("none", "nf4"))
    """nf4 keeps the weights in 4 bits (CUDA only)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(kw_only=True)
class ModelConfigBase(ModelSettings, RunConfigBase):
    """A command that loads a model and keeps a run folder"""
