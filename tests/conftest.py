"""Real things that several tests share; each is made once a session."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from src.models.vllm_engine import VLLMEngine

# Side by side, processes with two threads each spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what this environment cannot run."""
    import torch

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "no vLLM: uv run --extra cpu -m pytest tests/"
    for item in items:
        for name, reason in missing.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def bundled_folder() -> Path:
    """The bundled chat model as a local folder."""
    from src.models.bundled import bundled_folder

    return bundled_folder("bundled:smollm2-135m")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, bundled_folder: Path) -> Path:
    """A random two-layer Llama with the bundled model's tokenizer and template, saved as a model folder."""
    from transformers import AutoTokenizer

    from tests.tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's attention on the CPU takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_models import COMMON, copy_model

    folder = copy_model(tiny_folder, tmp_path_factory.mktemp("small") / "small")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**COMMON, head_dim=32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_engine() -> Iterator["VLLMEngine"]:
    """The bundled model in vLLM, float32, a context of 1024. One a process: two share vLLM's global state."""
    from src.common.engine_config import EngineConfigBase
    from src.models.vllm_engine import VLLMEngine

    config = EngineConfigBase(
        model_id="bundled:smollm2-135m", output_dir=Path("unused"), dtype="float32", device="cpu", max_model_len=1024,
        kv_cache_gib=0.5,
    )  # fmt: skip
    with VLLMEngine.load(config) as engine:
        yield engine


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m src.<command>` as a user would, in a process of its own."""

    def run(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            module_command(command, arguments), cwd=ROOT, text=True, capture_output=True, timeout=300,
            env={**os.environ, **environment},
        )  # fmt: skip

    return run


def heeds_ctrl_c() -> None:
    """For `preexec_fn`: a process started in the background inherits that Ctrl-C is ignored; this one is to hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def module_command(command: str, arguments: Sequence[str]) -> list[str]:
    """The words that start a command with this Python."""
    return [sys.executable, "-m", f"src.{command}", *map(str, arguments)]
