"""What needs a CUDA device: the V2 model runner, CUDA graphs, and how fast they are with uncertainty."""

from pathlib import Path

import pytest

from src.common.engine_config import EngineConfigBase
from src.models.language_model import generate_all
from src.models.types import GenerationRequest

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_the_second_runner_gives_the_answers_and_uncertainty_of_transformers(enforce_eager: bool) -> None:
    from src.models.language_model import LanguageModel
    from src.models.vllm_engine import VLLMEngine

    settings = {"model_id": "bundled:smollm2-135m", "output_dir": Path("unused"), "dtype": "float32", "device": "cuda"}
    requests = [GenerationRequest(id=str(i), token_ids=tuple(range(50, 90 + i)), max_tokens=24) for i in range(8)]
    drawn = [
        GenerationRequest(id=str(i), token_ids=r.token_ids, max_tokens=24, temperature=1.0, seed=i)
        for i, r in enumerate(requests)
    ]
    config = EngineConfigBase(**settings, enforce_eager=enforce_eager, gpu_memory_utilization=0.3, max_model_len=512)
    with VLLMEngine.load(config) as engine:
        assert engine.facts["runner"] == "v2"
        ours, drawn_once = generate_all(engine, requests), generate_all(engine, drawn)
        assert generate_all(engine, drawn[3:4])[0].token_ids == drawn_once[3].token_ids
    expected = generate_all(LanguageModel.load(EngineConfigBase(**settings)), requests)
    for a, b in zip(ours, expected, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), 24)
        assert same > 0
        assert a.entropy[:same] == pytest.approx(b.entropy[:same], abs=5e-3)
        assert a.top_k_mass[:same] == pytest.approx(b.top_k_mass[:same], abs=1e-3)
