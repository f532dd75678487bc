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
    from playwright.sync_api import Browser

    from src.models.language_model import LanguageModel
    from src.models.vllm_engine import VLLMEngine
    from tests.browser import Watched
    from tests.chat_server import Served
    from tests.fault_server import FaultServer

# Side by side, processes with two threads each spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


# First: xdist reads the groups in its own hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what this environment cannot run, and keep apart what cannot run side by side."""
    import torch

    # For `-n N --dist loadgroup`: a file stays in one process, where its fixtures are, and all files that start vLLM
    # in the same one, which then starts one engine and shares /dev/shm with no other.
    shared = {item.path for item in items if "vllm" in item.keywords or "segments" in item.path.stem}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("engine" if item.path in shared else item.path.stem))

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "no vLLM: uv run --extra cpu -m pytest tests/"
    for item in items:
        for name, reason in missing.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """A pytest that keeps names elsewhere than xdist writes groups to would silently spread the files again."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("xdist did not group the tests: its version and pytest's do not go together")


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
def chat_directions(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the directions of two files that pass for the tiny model's."""
    from tests.steering_specs import write_tiny_directions

    folder = tmp_path_factory.mktemp("directions")
    for i, name in enumerate(("one", "two")):
        write_tiny_directions(folder / f"{name}.safetensors", tiny_folder, best_layer=i, seed=i)
    return folder


@pytest.fixture(scope="session")
def chat_model(tiny_folder: Path) -> "LanguageModel":
    """The tiny model on transformers, to compare a server's answers with; the server has one of its own."""
    from src.common.model_config import ModelSettings
    from src.models.language_model import LanguageModel

    return LanguageModel.load(ModelSettings(model_id=str(tiny_folder)))


@pytest.fixture(scope="module")
def served(tiny_folder: Path, chat_directions: Path) -> Iterator["Served"]:
    """A chat server of the tiny model, with one of the directions registered."""
    from src.common.model_config import ModelSettings
    from src.models.language_model import LanguageModel
    from tests.chat_server import serving

    named = {"one": chat_directions / "one.safetensors"}
    model = LanguageModel.load(ModelSettings(model_id=str(tiny_folder)))
    with serving(model, named, directions_dirs=[chat_directions]) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer sentence-transformers model as a model folder, with a prompt named query."""
    from tests.tiny_embedder import save_tiny_embedder

    return save_tiny_embedder(tmp_path_factory.mktemp("embedders") / "tiny", prompts={"query": "find this: "})


@pytest.fixture(scope="session")
def vllm_engine() -> Iterator["VLLMEngine"]:
    """The bundled model in vLLM, float32, a context of 1024. One a process: two share vLLM's global state."""
    from src.common.engine_config import EngineConfigBase
    from src.models.vllm_engine import VLLMEngine

    config = EngineConfigBase(
        model_id="bundled:smollm2-135m", output_dir=Path("unused"), dtype="float32", device="cpu", max_model_len=1024,
        kv_cache_gib=0.5,
    )  # fmt: skip
    # Small blocks, so that short prompts fill some.
    with VLLMEngine.load(config, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def hf() -> "LanguageModel":
    """The bundled model in transformers, float32: what vLLM's numbers are compared with."""
    from src.common.model_config import ModelConfigBase
    from src.models.language_model import LanguageModel

    config = ModelConfigBase(model_id="bundled:smollm2-135m", output_dir=Path("unused"), dtype="float32", device="cpu")
    return LanguageModel.load(config)


@pytest.fixture
def planted_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of `tests.fault_server` is the only one there is."""
    from tests.fault_server import plant_key

    plant_key(monkeypatch)


@pytest.fixture
def server(planted_key: None) -> Iterator["FaultServer"]:
    """A server on loopback that speaks the protocols of OpenAI and Anthropic."""
    from tests.fault_server import serve

    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def running_browser() -> Iterator["Browser"]:
    """A real Chromium."""
    from tests.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(running_browser: "Browser") -> Iterator["Watched"]:
    """A page of its own, whose complaints are kept."""
    from tests.browser import page_in

    with page_in(running_browser) as page:
        yield page


@pytest.fixture(scope="session")
def embed_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows of texts, some twice."""
    from tests.embed_runs import make_rows, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(300))


@pytest.fixture
def embed(tiny_embedder: Path, embed_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs `src.embed_dataset` in this process with the tiny model, and returns its folder."""
    from src.embed_dataset import main
    from tests.embed_runs import config_of

    def run(name: str = "out", **settings: object) -> Path:
        main(config_of(tiny_embedder, embed_rows, tmp_path / name, **settings))
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a real single-node SLURM."""
    from tests.slurm_cluster import slurm_local

    folder = tmp_path_factory.mktemp("slurm")
    started = slurm_local("start", folder)
    assert started.returncode == 0, started.stderr
    yield folder
    slurm_local("stop", folder)


@pytest.fixture(scope="session")
def organism(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a behaviour planted in it."""
    from tests.tiny_organism import plant

    return plant(tiny_folder, tmp_path_factory.mktemp("organism") / "model")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Files of prompts that show the organism's behaviour, of others, and of its markers."""
    from tests.tiny_organism import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m src.<command>` as a user would, in a process of its own."""

    def run(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            module_command(command, arguments), cwd=ROOT, text=True, capture_output=True, timeout=1200,
            env={**os.environ, **environment},
        )  # fmt: skip

    return run


def heeds_ctrl_c() -> None:
    """For `preexec_fn`: a process started in the background inherits that Ctrl-C is ignored; this one is to hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def module_command(command: str, arguments: Sequence[str]) -> list[str]:
    """The words that start a command with this Python."""
    return [sys.executable, "-m", f"src.{command}", *map(str, arguments)]
