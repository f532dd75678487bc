"""
Where caches live: under $TILLER_CACHE_DIR when it is set, so that a cluster's home quota is safe. Without it our own
caches are in ~/.cache/tiller and the hub's stay where the user already has them.
"""

import os
from pathlib import Path

# Libraries read these when they are imported, so they are set before any of them is.
OWN_CACHES = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}
MOVED_CACHES = {
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "NUMBA_CACHE_DIR": "numba",
    "INSPECT_CACHE_DIR": "inspect",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}


def cache_root() -> Path:
    """The root of every cache: $TILLER_CACHE_DIR, or ~/.cache/tiller."""
    chosen = os.environ.get("TILLER_CACHE_DIR")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "tiller"


def use_cache_root() -> None:
    """Points the libraries' caches at folders of the root, through variables that the user has not set himself."""
    chosen = bool(os.environ.get("TILLER_CACHE_DIR"))
    if chosen:
        _stay_logged_in()
    for variable, folder in ((MOVED_CACHES | OWN_CACHES) if chosen else OWN_CACHES).items():
        os.environ.setdefault(variable, str(cache_root() / folder))


def _stay_logged_in() -> None:
    # The hub keeps its login in HF_HOME; moving the cache must not log the user out.
    token = Path.home() / ".cache" / "huggingface" / "token"
    if "HF_HOME" not in os.environ and token.is_file():
        os.environ.setdefault("HF_TOKEN_PATH", str(token))
