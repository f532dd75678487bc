import subprocess
import sys
from pathlib import Path

import pytest

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.common.interventions import Window
from src.models.engine import bounded_context, choose_backend, load_engine, refuse_idle, refuse_unsupported
from src.models.types import GenerationRequest
from tests.conftest import ROOT
from tests.steering_specs import spec


def config(**settings: object) -> EngineConfigBase:
    return EngineConfigBase(**({"model_id": "bundled:smollm2-135m", "output_dir": Path("unused")} | settings))


def test_transformers_is_the_choice_on_the_cpu_and_says_why() -> None:
    name, reason = choose_backend(config(device="cpu"))
    assert name == "hf" and ("cpu" in reason or "not installed" in reason)
    assert choose_backend(config(backend="hf")) == ("hf", "asked for")


WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
from tests.test_engine import config
from src.models.engine import choose_backend
print(choose_backend(config()))
choose_backend(config(backend="vllm"))
"""


def test_without_vllm_the_remedy_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], cwd=ROOT, capture_output=True, text=True)
    assert "('hf', 'vLLM is not installed')" in done.stdout
    assert "InputError: --backend vllm: vLLM is not installed" in done.stderr and "uv run --extra cpu" in done.stderr


def test_the_context_may_be_bounded_not_stretched(tiny_folder: Path) -> None:
    assert bounded_context(config(), 512) == 512 and bounded_context(config(), None) is None
    assert bounded_context(config(max_model_len=100), 512) == 100
    with pytest.raises(InputError, match=r"--max_model_len 513: .* 512"):
        bounded_context(config(max_model_len=513), 512)
    with load_engine(config(model_id=str(tiny_folder), max_model_len=20, device="cpu", backend="hf"), 4) as engine:
        assert engine.context_length == 20 and engine.facts["backend"] == "hf"


@pytest.mark.parametrize("flag", [{"tensor_parallel_size": 2}, {"kv_cache_gib": 1.0}, {"compiled": True}])
def test_what_only_vllm_has_is_not_ignored(flag: dict) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(flag))}: only vLLM has that"):
        choose_backend(config(backend="hf", **flag))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 0}, "--max_model_len 0: expected at least 1"),
        ({"tensor_parallel_size": 0}, "--tensor_parallel_size 0"),
        ({"gpu_memory_utilization": 1.5}, "--gpu_memory_utilization 1.5"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu_memory_utilization nan"),
        ({"kv_cache_gib": 0}, "--kv_cache_gib 0"),
        ({"enforce_eager": True, "compiled": True}, "exclude each other"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(**settings)


# A prompt of 4 tokens and at most 3 generated: positions 0 to 5 go through the model.
@pytest.mark.parametrize(
    ("positions", "acts"),
    [
        ("all", True), ("generated", True), ("last_prompt", True), (Window(start=5), True), (Window(start=6), False),
        (Window(start=9, end=20), False), (Window(start=-1, end=2), False), (Window(start=-1, end=4), True),
        (Window(start=-9, end=-8), False), (Window(start=-9, end=-3), True),
    ],
)  # fmt: skip
def test_interventions_that_can_act_nowhere_are_refused(positions: str | Window, acts: bool) -> None:
    add = {"op": "add", "coefficient": 1.0}
    some = spec(add, {**add, "positions": positions})
    request = GenerationRequest(id="r", token_ids=(5, 6, 7, 8), max_tokens=3, interventions=some)
    if acts:
        return refuse_unsupported([request], None)
    with pytest.raises(InputError, match=r"request 'r': add at layer 0 is to act on positions .*6 positions"):
        refuse_unsupported([request], None)


def test_a_single_token_is_generated_before_anything_generated_is_steered() -> None:
    some = spec({"op": "add", "coefficient": 1.0, "positions": "generated"})
    request = GenerationRequest(id="r", token_ids=(5, 6), max_tokens=1, interventions=some)
    with pytest.raises(InputError, match="positions 2 to the end, of which there are none"):
        refuse_unsupported([request], None)
    with pytest.raises(InputError, match="at most 1 more"):
        refuse_idle(request)
    # Of answers that are given some have one token, and are run as they are.
    given = GenerationRequest(id="r", token_ids=(5, 6), max_tokens=1, interventions=some, prompt_length=2)
    refuse_unsupported([given], None)
