"""The settings of every command that generates, in a run folder or without one: which engine, what vLLM is told."""

from dataclasses import dataclass

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase, ModelSettings
from src.common.settings import require_at_least_one, setting


@dataclass(kw_only=True)
class EngineSettings(ModelSettings):
    """The engine"""

    backend: str = setting("auto", choices=("auto", "hf", "vllm"), affects_rows=False)
    """Engine that generates: transformers (hf) or vLLM; auto takes vLLM on CUDA where it is installed."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together at most; the model's context unless given."""
    gpu_memory_utilization: float | None = setting(None, affects_rows=False)
    """vLLM: share of the device's memory to take, 0.9 unless given; on the CPU see --kv_cache_gib."""
    kv_cache_gib: float | None = setting(None, affects_rows=False)
    """vLLM: GiB for keys and values; on the CPU 4, or a third of the free memory, unless given."""
    tensor_parallel_size: int = setting(1, affects_rows=False)
    """vLLM: devices that share each layer."""
    pipeline_parallel_size: int = setting(1, affects_rows=False)
    """vLLM: groups of devices that share the layers one after another."""
    enforce_eager: bool = setting(False, affects_rows=False)
    """vLLM: run without compiling, as on the CPU by default."""
    compiled: bool = setting(False, affects_rows=False)
    """vLLM: compile the model, as on CUDA by default; a slower start, faster steps on CUDA."""
    capture_budget_gb: float = setting(4.0, affects_rows=False)
    """vLLM: gigabytes (10⁹ bytes) of captured hidden states in memory; requests wait until there is room."""
    capture_ttl: float = setting(600.0, affects_rows=False)
    """vLLM: seconds after which captures that nobody takes end in an error."""
    engine_log: bool = setting(False, affects_rows=False)
    """Show vLLM's own log."""

    def check_engine(self) -> None:
        """Raises InputError for settings out of range, and for those that exclude each other."""
        require_at_least_one(self, ("max_model_len", "tensor_parallel_size", "pipeline_parallel_size"))
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"--gpu_memory_utilization {self.gpu_memory_utilization}: expected a share above 0, up to 1"
            )
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise InputError(f"--kv_cache_gib {self.kv_cache_gib}: expected a positive number of GiB")
        for name in ("capture_budget_gb", "capture_ttl"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)}: expected a positive number")
        if self.enforce_eager and self.compiled:
            raise InputError("--enforce_eager and --compiled exclude each other; give one of them or neither")


@dataclass(kw_only=True)
class EngineConfigBase(EngineSettings, ModelConfigBase):
    """A command that generates and keeps a run folder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
