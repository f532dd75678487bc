import asyncio
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.common.rows import read_personas, read_prompts
from src.models.chat_format import PersonaRenderer
from src.models.language_model import LanguageModel, generate_all
from src.models.types import GenerationRequest, GenerationResult
from tests.conftest import ROOT
from tests.vllm_process import results_of, run_jobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def requests(hf: LanguageModel) -> list[GenerationRequest]:
    """8 personas × 6 prompts, 64 tokens each, greedy."""
    renderer = PersonaRenderer(hf.tokenizer, "both")
    personas = read_personas(ROOT / "data/personas/personae.json")[:8]
    prompts = read_prompts(ROOT / "data/personas/prompts.json", 6)
    rendered = [
        renderer.render([{"role": "user", "content": prompt.text}], persona.persona, persona.article).token_ids
        for persona in personas
        for prompt in prompts
    ]
    return [GenerationRequest(id=f"{i:02d}", token_ids=ids, max_tokens=64, seed=i) for i, ids in enumerate(rendered)]


@pytest.fixture(scope="module")
def expected(hf: LanguageModel, requests: list[GenerationRequest]) -> list[GenerationResult]:
    return generate_all(hf, requests)


def assert_equal(ours: Sequence[GenerationResult], expected: Sequence[GenerationResult]) -> None:
    assert [r.id for r in ours] == [r.id for r in expected]
    for a, b in zip(ours, expected, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason), a.id
        assert max(map(abs_difference, a.entropy, b.entropy), default=0) <= 1e-3
        assert max(map(abs_difference, a.top_k_mass, b.top_k_mass), default=0) <= 1e-4


def assert_drawn_alike(ours: Sequence[GenerationResult], expected: Sequence[GenerationResult]) -> None:
    """
    Equal up to rounding: where it moves the cumulative distribution past a draw, which it does about once in a thousand
    tokens at temperature 1, the rows part; until there all is equal, and most rows are so to the end.
    """
    alike = 0
    for a, b in zip(ours, expected, strict=True):
        pairs = zip(a.token_ids, b.token_ids, strict=False)
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))
        assert max(map(abs_difference, a.entropy[:same], b.entropy[:same]), default=0) <= 1e-3
        assert max(map(abs_difference, a.top_k_mass[:same], b.top_k_mass[:same]), default=0) <= 1e-4
        alike += a.token_ids == b.token_ids
    assert alike >= 0.6 * len(ours), f"{alike} of {len(ours)} rows alike"


def abs_difference(a: float, b: float) -> float:
    return abs(a - b)


def test_greedy_answers_and_uncertainty_are_those_of_transformers(vllm_engine, requests, expected) -> None:
    steps: list[int] = []
    results: list[GenerationResult] = []
    vllm_engine.generate(requests, on_result=results.append, on_tokens=steps.append)
    assert_equal(sorted(results, key=lambda r: r.id), expected)
    assert sum(steps) == sum(len(r.token_ids) for r in results)
    assert {"stop", "length"} == {r.finish_reason for r in results}, "both ways of ending should occur here"


def test_drawn_answers_are_those_of_transformers(vllm_engine, hf, requests) -> None:
    drawn = [replace(r, temperature=0.5 + i % 3 / 2, max_tokens=24) for i, r in enumerate(requests[:12])]
    assert_drawn_alike(generate_all(vllm_engine, drawn), generate_all(hf, drawn))


def test_chunks_and_preemption_change_nothing(requests, expected, hf) -> None:
    drawn = [replace(r, id=f"drawn-{r.id}", temperature=1.0, max_tokens=16) for r in requests[:8]]
    listed = [asdict(r) for r in [*requests, *drawn]]
    config = {"model_id": "bundled:smollm2-135m", "dtype": "float32", "max_model_len": 256}
    variants = [
        {"max_num_batched_tokens": 64, "max_num_seqs": 64},
        {"num_gpu_blocks_override": 12, "block_size": 32, "enable_prefix_caching": False},
    ]
    chunked, preempted = run_jobs(
        [{"config": config, "engine_args": variant, "requests": listed} for variant in variants], ROOT
    )
    assert preempted["preemptions"] > 0
    for results in (results_of(chunked), results_of(preempted)):
        assert_equal(results[: len(expected)], expected)
        assert_drawn_alike(results[len(expected) :], generate_all(hf, drawn))


def test_batch_mates_and_order_change_nothing(vllm_engine, requests, expected) -> None:
    chosen = [31, 4, 17]
    assert_equal(generate_all(vllm_engine, [requests[i] for i in chosen]), [expected[i] for i in chosen])


def test_each_request_may_have_its_own_k(vllm_engine, requests, expected) -> None:
    for k in (1, 49152):
        result = generate_all(vllm_engine, requests[:1], top_k=k)[0]
        assert result.token_ids == expected[0].token_ids
        assert all(m <= e for m, e in zip(result.top_k_mass, expected[0].top_k_mass, strict=True)) == (k == 1)
    assert result.top_k_mass == pytest.approx([1.0] * len(result.top_k_mass), abs=1e-5)


def test_requests_of_others_in_the_same_batch_are_left_alone(vllm_engine, requests, expected) -> None:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    def others(name: str) -> None:
        for i, ids in enumerate(r.token_ids for r in requests[5:8]):
            params = SamplingParams(
                temperature=0.0, max_tokens=8, logprobs=4, flat_logprobs=True, detokenize=False, ignore_eos=True
            )
            vllm_engine._engine.add_request(f"{name}{i}", tokens_input(list(ids)), params)

    def drain() -> dict:
        finished = {}
        while vllm_engine._engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in vllm_engine.step() if output.finished}
        return finished

    others("alone")
    alone = drain()
    others("mixed")
    for request in requests[:3]:
        vllm_engine.add(request, 5)
    mixed = drain()
    assert_equal([vllm_engine.result(mixed[r.id]) for r in requests[:3]], expected[:3])
    for i in range(3):
        ours, theirs = mixed[f"mixed{i}"].outputs[0], alone[f"alone{i}"].outputs[0]
        assert list(ours.token_ids) == list(theirs.token_ids)
        assert ours.logprobs.logprobs == pytest.approx(theirs.logprobs.logprobs, abs=1e-3)
        assert ours.logprobs.token_ids == theirs.logprobs.token_ids


def test_the_context_bounds_prompt_and_answer(vllm_engine) -> None:
    assert vllm_engine.context_length == 1024
    request = GenerationRequest(id="a", token_ids=(5,) * 1020, max_tokens=100)
    result = generate_all(vllm_engine, [request])[0]
    assert len(result.token_ids) == 4 and result.finish_reason == "length"
    with pytest.raises(InputError, match=r"'a'.*1024 tokens"):
        generate_all(vllm_engine, [replace(request, token_ids=(5,) * 1024)])


@pytest.mark.parametrize("k", [0, 49153])
def test_a_k_outside_the_vocabulary_is_refused(vllm_engine, requests, k: int) -> None:
    with pytest.raises(InputError, match=f"{k} tokens.*49152"):
        generate_all(vllm_engine, requests[:1], top_k=k)


def test_an_interrupted_call_leaves_nothing_running(vllm_engine, requests, expected) -> None:
    def interrupt(n_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate(requests, on_result=lambda result: None, on_tokens=interrupt)
    assert not vllm_engine._engine.has_unfinished_requests()
    assert_equal(generate_all(vllm_engine, requests[:2]), expected[:2])


def test_the_async_form_gives_the_same_and_streams(vllm_engine, requests, expected) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def together() -> tuple[list[GenerationResult], list]:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            pieces = [piece async for piece in engine.stream(requests[9])]
            return await asyncio.gather(*(engine.generate(request) for request in requests[:9])), pieces

    results, pieces = asyncio.run(together())
    assert_equal(results, expected[:9])
    assert sum((piece.token_ids for piece in pieces), ()) == expected[9].token_ids
    assert len(pieces) > 10 and pieces[-1].finish_reason == expected[9].finish_reason


def test_an_async_request_that_nobody_waits_for_is_dropped(vllm_engine, requests) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def leave() -> None:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            async for _ in engine.stream(replace(requests[0], max_tokens=900)):
                break
            with pytest.raises(InputError, match="token 49152 is outside"):
                await engine.generate(replace(requests[1], token_ids=(5, 49152)))
            await engine.generate(replace(requests[2], max_tokens=2))
            assert not vllm_engine._engine.has_unfinished_requests()

    asyncio.run(leave())
    assert not vllm_engine._engine.has_unfinished_requests()


def test_an_async_id_may_come_again_and_a_bad_request_harms_no_other(vllm_engine, requests, expected) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def again() -> None:
        engine = AsyncVLLMEngine(vllm_engine)
        with pytest.raises(RuntimeError, match="not open"):
            await engine.generate(requests[0])
        async with engine:
            for i in range(6):
                async for _ in engine.stream(replace(requests[i], id="same", max_tokens=200)):
                    break
                assert (await engine.generate(replace(requests[i + 1], id="same"))).text == expected[i + 1].text
            good = asyncio.create_task(engine.generate(requests[0]))
            with pytest.raises(InputError, match="token 49152 is outside"):
                await engine.generate(replace(requests[1], token_ids=(5, 49152)))
            assert_equal([await good], expected[:1])
            left = asyncio.create_task(engine.generate(replace(requests[2], max_tokens=900)))
            await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="ended before the answer"):
            await left
        with pytest.raises(RuntimeError, match="takes no requests"):
            await engine.generate(requests[3])

    asyncio.run(asyncio.wait_for(again(), 300))
    assert not vllm_engine.has_work()


def test_an_error_in_the_step_thread_reaches_everyone(vllm_engine, requests, monkeypatch) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def fails() -> None:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            monkeypatch.setattr(threading, "excepthook", lambda args: None)
            with monkeypatch.context() as patch:
                patch.setattr(vllm_engine, "step", lambda: 1 / 0)
                waiting = [engine.generate(request) for request in requests[:2]]
                gave = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(error, RuntimeError) for error in gave), gave
            with pytest.raises(RuntimeError, match="division by zero"):
                await engine.generate(requests[3])

    asyncio.run(asyncio.wait_for(fails(), 60))
    assert not vllm_engine.has_work()


@pytest.fixture(scope="module")
def tiny_jobs(small_folder: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Engines on the tiny model, one after another in one process."""
    from safetensors.torch import load_file, save_file

    from tests.tiny_models import copy_model

    nan = copy_model(small_folder, tmp_path_factory.mktemp("nan") / "nan")
    tensors = load_file(nan / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, nan / "model.safetensors", {"format": "pt"})
    unknown = copy_model(small_folder, tmp_path_factory.mktemp("unknown") / "unknown")
    config = json.loads((unknown / "config.json").read_text()) | {
        "model_type": "xglm",
        "architectures": ["XGLMForCausalLM"],
    }
    (unknown / "config.json").write_text(json.dumps(config))
    requests = [asdict(r) for r in tiny_requests()]
    tiny = {"model_id": str(small_folder), "dtype": "float32"}
    jobs = {
        "plain": {"config": tiny, "requests": requests},
        "two devices": {"config": tiny | {"tensor_parallel_size": 2}, "requests": requests},
        "two stages": {"config": tiny | {"pipeline_parallel_size": 2}, "requests": requests},
        "without our sampler": {"config": tiny, "patch": "sampler"},
        "not numbers": {"config": tiny | {"model_id": str(nan)}},
        "unknown model": {"config": tiny | {"model_id": str(unknown)}},
        "heads of 8": {"config": tiny | {"model_id": str(tiny_folder)}},
        "no memory": {"config": tiny | {"kv_cache_gib": 1e6}},
        "hardly any cache": {"config": tiny | {"kv_cache_gib": 1e-6}},
        "little cache": {"config": tiny | {"kv_cache_gib": 4e-4}, "requests": [requests[0] | {"max_tokens": 400}]},
        "bfloat16": {"config": tiny | {"dtype": "bfloat16"}, "requests": requests},
    }
    return dict(zip(jobs, run_jobs(list(jobs.values()), ROOT), strict=True))


def tiny_requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(id=str(i), token_ids=tuple(range(50, 55 + i)), max_tokens=12, temperature=i % 2, seed=i)
        for i in range(6)
    ]


@pytest.mark.parametrize("name", ["plain", "two devices", "two stages"])
def test_workers_of_their_own_give_the_same_and_end(tiny_jobs, small_folder: Path, name: str) -> None:
    config = ModelConfigBase(model_id=str(small_folder), output_dir=Path("unused"), device="cpu")
    ours, whole = results_of(tiny_jobs[name]), generate_all(LanguageModel.load(config), tiny_requests())
    assert_equal(ours[::2], whole[::2])
    assert_drawn_alike(ours, whole)
    assert tiny_jobs[name]["children"] == [] and tiny_jobs[name]["shared_memory"] == []
    # What is swept when a worker had no time to remove its own.
    assert bool(tiny_jobs[name]["segments"]) == (name != "plain")


def test_half_precision_passes_its_self_test(tiny_jobs) -> None:
    assert tiny_jobs["bfloat16"]["facts"]["dtype"] == "bfloat16"
    assert all(len(r.entropy) == 12 for r in results_of(tiny_jobs["bfloat16"]))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("without our sampler", "CheckFailed", "uncertainty is wrong"),
        ("not numbers", "InputError", "not numbers.*--dtype float32"),
        ("unknown model", "InputError", "cannot run.*--backend hf"),
        ("heads of 8", "InputError", "cannot run.*head_dim=8.*--backend hf"),
        ("no memory", "InputError", "do not fit.*--kv_cache_gib"),
        ("hardly any cache", "InputError", "--kv_cache_gib"),
        ("little cache", "InputError", r"request '0' may take 405 tokens.*--kv_cache_gib"),
    ],
)
def test_what_is_wrong_at_start_is_said_with_a_remedy(tiny_jobs, name: str, kind: str, words: str) -> None:
    assert tiny_jobs[name]["error"][0] == kind
    assert re.search(words, tiny_jobs[name]["error"][1]), tiny_jobs[name]["error"][1]
    assert tiny_jobs[name]["children"] == []
