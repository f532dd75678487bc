"""Which device and number format a model runs in, and how many rows fit beside it."""

import logging

import psutil
import torch

from src.common.errors import InputError

LOGGER = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_DTYPES = {
    "cuda": ("bfloat16", "float16", "float32"),
    "mps": ("bfloat16", "float16", "float32"),
    "cpu": ("float32",),
}
FREE_MEMORY_SHARE = 0.5
"""Share of free memory that keys and values may take; the rest is for activations, logits and the allocator."""


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises InputError for a device that this machine does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: no such device; expected auto, cpu, mps, cuda or cuda:N") from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(resolved.type, 0)
    if (resolved.index or 0) >= available:
        raise InputError(
            f"--device {device}: this machine has {available} {resolved.type} device(s); try --device auto"
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """
    `auto` is the first of bfloat16, float16, float32 that computes on a CUDA or MPS device, float32 on the CPU.

    A named dtype is taken as it is. Raises InputError for an unknown name or one that the device cannot compute in.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    for name in AUTO_DTYPES[device.type] if dtype == "auto" else (dtype,):
        if _computes(device, DTYPES[name]):
            LOGGER.info("Computing in %s on %s", name, device)
            return DTYPES[name]
        LOGGER.info("%s does not compute in %s", device, name)
    raise InputError(f"--dtype {dtype}: {device} does not compute in it; try --dtype auto")


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return False
    try:
        ones = torch.ones(2, 2, device=device, dtype=dtype)
        return (ones @ ones).float().sum().item() == 8.0
    except (RuntimeError, TypeError):
        return False


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def halved(n_rows: int, what: str, device: torch.device) -> int:
    """
    How many to try after memory ran out with `n_rows` at once, 2 or more. To be called outside the handler of the
    error, whose traceback holds the batch's tensors.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    LOGGER.warning("Out of memory with %d %s at once; going on with %d", n_rows, what, n_rows // 2)
    return n_rows // 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that memory ran out: CUDA's and MPS' own type, or the CPU allocator's message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or (
        "MPS backend out of memory" in str(error)
    )  # fmt: skip
