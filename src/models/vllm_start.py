"""Starting vLLM: its environment, memory and threads, and what is said when it cannot start."""

import atexit
import contextlib
import functools
import gc
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed, InputError
from src.common.logs import FILE_ONLY
from src.models import vllm_prefix
from src.models.generation import rope_types
from src.models.loading import ModelFiles
from src.models.shared_segments import sweep_stale_segments
from src.models.vllm_adapter import Adapter
from src.models.vllm_process import kept_as_they_are, nothing_left_behind, out_of_sight, quiet

LOGGER = logging.getLogger(__name__)
ENVIRONMENT = {
    # In this process: no copy of each token through a socket, and nothing that outlives a kill.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # Our handlers take its records; its own would write to stdout.
    "VLLM_CONFIGURE_LOGGING": "0",
}
LOCAL = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1"}
KV_CACHE_GIB = 4.0
MAX_ROWS = 1024
"""Rows decoded at once at most; vLLM wants no more than the tokens of a step."""
FREE_SHARE = 1 / 3
WORKER = "src.models.vllm_worker.TillerWorker"


def set_environment(engine_log: bool) -> None:
    """Tell vLLM, before it is imported, how to run here."""
    os.environ.update(ENVIRONMENT)
    for name, value in (LOCAL | {"VLLM_RPC_BASE_PATH": _sockets().name}).items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.INFO if engine_log else logging.ERROR)


@functools.cache
def _sockets() -> tempfile.TemporaryDirectory:
    """Where workers meet, removed with this process: vLLM leaves the files of its sockets behind."""
    return tempfile.TemporaryDirectory(prefix="tiller-")


def start(
    config: EngineConfigBase,
    files: ModelFiles,
    adapter: Adapter | None,
    batch_size: int,
    engine_args: dict[str, Any],
) -> tuple[Any, str]:
    """vLLM's engine with our sampler in it, and its runner's generation ("v1" or "v2"). Raises InputError."""
    # Python's own end would look through all of vLLM's objects for cycles, seconds after a Ctrl-C.
    atexit.register(gc.freeze)
    began = time.monotonic()
    LOGGER.info("Starting vLLM, which takes a minute or so …")
    with quiet(config.engine_log), kept_as_they_are(), out_of_sight("llvmlite"):
        check_device(config, files)
        arguments = arguments_of(config, files, adapter, batch_size) | engine_args
        check_memory(files, arguments, config.tensor_parallel_size * config.pipeline_parallel_size)
        sweep_stale_segments()
        vllm_prefix.install()
        if files.device.type == "cpu":
            vllm_prefix.zero_new_blocks()
        with nothing_left_behind():
            engine = make_engine(arguments)
            runners = set(engine.collective_rpc("tiller_install"))
    assert len(runners) == 1, f"workers of several kinds: {runners}"
    LOGGER.info("vLLM is ready after %.0f s", time.monotonic() - began)
    return engine, runners.pop()


def check_device(config: EngineConfigBase, files: ModelFiles) -> None:
    """Raises InputError where the vLLM that is installed was built for another device."""
    if config.quantization != "none":
        raise InputError(f"--quantization {config.quantization} with --backend vllm: not supported; take --backend hf")
    require_platform(files.device, config.device)
    if files.device.index:
        raise InputError(f"--device {config.device} with vLLM: set CUDA_VISIBLE_DEVICES={files.device.index} instead")
    n_workers = config.tensor_parallel_size * config.pipeline_parallel_size
    if files.device.type == "cpu" and n_workers > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(shares_of_cpus(n_workers))


def require_platform(device: torch.device, asked: str, instead: str = "--backend hf") -> None:
    """Raises InputError where the vLLM that is installed was built for another kind of device; `asked`: its name."""
    from vllm.platforms import current_platform

    if device.type != current_platform.device_type:
        raise InputError(
            f"--device {asked} is {device.type} here, and the vLLM that is installed is built for "
            f"{current_platform.device_type}; take --device {current_platform.device_type}, or {instead}"
        )


def shares_of_cpus(n_workers: int) -> list[str]:
    """The CPUs that this process may use, dealt to `n_workers`: comma-separated numbers. Raises InputError."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < n_workers:
        raise InputError(f"{n_workers} workers on {len(cpus)} CPUs; lower --tensor_parallel_size or --pipeline_…")
    return [",".join(map(str, cpus[i::n_workers])) for i in range(n_workers)]


def arguments_of(
    config: EngineConfigBase, files: ModelFiles, adapter: Adapter | None, batch_size: int
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs."""
    on_cpu = files.device.type == "cpu"
    kv_cache_gib = config.kv_cache_gib
    if kv_cache_gib is None and on_cpu and config.gpu_memory_utilization is None:
        n_workers = config.tensor_parallel_size * config.pipeline_parallel_size
        kv_cache_gib = min(KV_CACHE_GIB, FREE_SHARE * psutil.virtual_memory().available / 2**30 / n_workers)
    arguments = {
        "model": str(adapter.merged if adapter and adapter.merged else files.folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "trust_remote_code": config.trust_remote_code,
        "dtype": files.facts["dtype"],
        "seed": config.seed,
        # −1: the model's context, or less where memory is short; a request that then does not fit is refused.
        "max_model_len": config.max_model_len or -1,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30) if kv_cache_gib else None,
        "gpu_memory_utilization": config.gpu_memory_utilization or 0.9,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enforce_eager": config.enforce_eager or (on_cpu and not config.compiled),
        "max_num_seqs": min(batch_size, MAX_ROWS),
        "max_logprobs": -1,
        "disable_log_stats": True,
        "use_tqdm_on_load": config.engine_log,
        "worker_extension_cls": WORKER,
    }
    if "RAY_ADDRESS" in os.environ:
        # A script of src.experiment over several nodes has brought it up.
        arguments["distributed_executor_backend"] = "ray"
    return arguments | (adapter.engine_args() if adapter and not adapter.merged else {})


def check_memory(files: ModelFiles, arguments: dict[str, Any], n_workers: int) -> None:
    """Raises InputError where the CPU's memory does not hold the weights beside each worker's keys and values."""
    if files.device.type != "cpu":
        return
    stored = sum(file.stat().st_size for file in Path(arguments["model"]).glob("*.safetensors"))
    weights = int(stored * files.dtype.itemsize / stored_bytes(Path(arguments["model"])))
    needed = weights + n_workers * (arguments["kv_cache_memory_bytes"] or 0)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{weights / 2**30:.1f} GiB of weights and {(needed - weights) / 2**30:.1f} GiB of keys and values do not "
            f"fit in the {free / 2**30:.1f} GiB of free memory; lower --kv_cache_gib, take --dtype bfloat16, or a "
            f"smaller model"
        )


def stored_bytes(folder: Path) -> int:
    """Bytes of one number of the first stored tensor: most models hold a single dtype."""
    from safetensors import safe_open

    with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="pt") as tensors:
        dtype = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits.group()) // 8) if bits else 1


def check_rotary(model_config: PreTrainedConfig, context: int | None) -> None:
    """
    Raises InputError for LongRoPE beyond the length that it was first trained for: vLLM then takes the long factors for
    every prompt, transformers only for long ones.
    """
    text = model_config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if "longrope" in rope_types(parameters) and not (original and context and context <= original):
        raise InputError(
            f"LongRoPE with a context of {context}: vLLM and transformers choose its factors differently above "
            f"{original} tokens; take --max_model_len {original}, or --backend hf"
        )


def make_engine(arguments: dict[str, Any]) -> Any:
    """vLLM's engine from arguments of its EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**arguments))


@contextlib.contextmanager
def errors_in_words(model_id: str, instead: str = "--backend hf", log: str = "--engine_log") -> Iterator[None]:
    """
    Turns what vLLM raises about a model, memory or a setting, which has no type of its own, into InputError. instead:
    what runs the model without vLLM. log: what shows more of vLLM's own words.
    """
    try:
        yield
    except (InputError, CheckFailed):
        raise
    except (ValueError, RuntimeError, NotImplementedError, OSError, *_own_errors()) as error:
        LOGGER.error("vLLM did not start", exc_info=True, extra={FILE_ONLY: True})
        raise InputError(f"vLLM cannot run --model_id {model_id} here: {remedy(error, instead, log)}") from error


def _own_errors() -> tuple[type[Exception], ...]:
    # Not a ValueError; asked for only once vLLM is imported, which is when it can be raised.
    module = sys.modules.get("vllm.exceptions")
    return (module.VLLMError,) if module else ()


def remedy(error: Exception, instead: str, log: str) -> str:
    """vLLM's own words, shortened, and what may help."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic puts the number of errors and the class first, and vLLM lists all it knows.
    told = [line.removeprefix("Value error, ") for line in lines if not re.match(r"\d+ validation error", line)]
    words = (told or [type(error).__name__])[0].split(". Supported ")[0][:300]
    text = str(error).lower()
    if "not supported" in text or "architecture" in text:
        return f"{words} (vLLM does not know this model; take {instead})"
    if "memory" in text or "kv cache" in text:
        return f"{words} (lower --max_model_len or --kv_cache_gib; on CUDA change --gpu_memory_utilization)"
    return f"{words} ({log} shows more; {instead} needs no vLLM)"


def facts(engine: Any, runner: str, adapter: Adapter | None) -> dict[str, str | None]:
    """What provenance records of the engine."""
    import vllm

    how = None if adapter is None else "merged" if adapter.merged else "lora"
    return {
        "backend": "vllm",
        "vllm": vllm.__version__,
        "runner": runner,
        "adapter_applied": how,
        "kv_cache_tokens": str(
            engine.vllm_config.cache_config.num_gpu_blocks * engine.vllm_config.cache_config.block_size
        ),
    }
