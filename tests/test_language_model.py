import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.common.resolved_interventions import ResolvedCondition
from src.models.chat_format import PersonaRenderer
from src.models.hooks import reading
from src.models.language_model import LanguageModel, generate_all
from src.models.types import GenerationRequest, GenerationResult
from src.ops.metrics import token_uncertainty
from tests.steering_specs import spec, unit

QUESTIONS = ["Who are you?", "Tell me about the sea in winter, at some length.", "2 + 2?", "Why do birds sing at dawn?"]
PERSONAS = ["assistant", "Hamlet", "grandmother"]


def load(model_id: Path | str, **settings: object) -> LanguageModel:
    return LanguageModel.load(ModelConfigBase(model_id=str(model_id), output_dir=Path("unused"), **settings))


@pytest.fixture(scope="module")
def model(bundled_folder: Path) -> LanguageModel:
    return load(bundled_folder)


@pytest.fixture(scope="module")
def requests(model: LanguageModel) -> list[GenerationRequest]:
    renderer = PersonaRenderer(model.tokenizer, "both")
    prompts = [renderer.render([{"role": "user", "content": q}], p, "a").token_ids for p in PERSONAS for q in QUESTIONS]
    return [GenerationRequest(id=str(i), token_ids=ids, max_tokens=16, seed=i) for i, ids in enumerate(prompts)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_do_not_depend_on_batch_size_order_or_mates(model, requests, temperature: float) -> None:
    requests = [replace(r, temperature=temperature) for r in requests]
    reference = {r.id: r for r in generate_all(model, requests)}
    shuffled = random.Random(0).sample(requests, len(requests))
    for some, batch_size in ((shuffled, 256), (requests, 5), (requests[3:4], 1), (requests[::-1][:2], 256)):
        for result in generate_all(model, some, batch_size=batch_size):
            expected = reference[result.id]
            assert result.token_ids == expected.token_ids and result.text == expected.text
            assert result.entropy == pytest.approx(expected.entropy, abs=1e-4)
            assert result.top_k_mass == pytest.approx(expected.top_k_mass, abs=1e-5)


def test_uncertainty_is_that_of_a_full_forward_pass(model, requests) -> None:
    request = requests[5]
    result = generate_all(model, requests)[5]
    ids = torch.tensor([[*request.token_ids, *result.token_ids]])
    with torch.no_grad():
        logits = model.model(ids).logits[0, len(request.token_ids) - 1 : -1]
    reference = token_uncertainty(logits, 5)
    assert result.entropy == pytest.approx(reference.entropy.tolist(), abs=1e-4)
    assert result.top_k_mass == pytest.approx(reference.top_k_mass.tolist(), abs=1e-5)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(model, requests, bundled_folder: Path) -> None:
    """The same tokens forced through both, so that only the number format differs."""
    half = load(bundled_folder, dtype="bfloat16")
    differences = []
    for request, result in zip(requests, generate_all(model, requests), strict=True):
        ids = torch.tensor([[*request.token_ids, *result.token_ids]])
        with torch.no_grad():
            logits = half.model(ids).logits[0, len(request.token_ids) - 1 : -1]
        differences += (token_uncertainty(logits).entropy - torch.tensor(result.entropy)).abs().tolist()
    assert 0 < sum(differences) / len(differences) < 0.05


SPECS = [
    (),
    spec({"op": "add", "coefficient": 6.0}),
    spec({"op": "ablate", "coefficient": 1.0, "layer": 1}, {"op": "cap", "lo": 1.0, "positions": "generated"}),
    spec({"op": "add", "coefficient": 0.5, "relative": True, "positions": "last_prompt", "direction": unit(3)}),
]
"""Specs of the tiny model; rows under all of them share a batch."""


def mixed_requests(n: int = 9) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=str(i), token_ids=tuple(range(5, 10 + i)), max_tokens=6 + i % 3, seed=i, interventions=SPECS[i % 4]
        )
        for i in range(n)
    ]


def same_results(found: list[GenerationResult], expected: list[GenerationResult]) -> bool:
    """The same tokens, and the same numbers to rounding."""
    return all(
        (a.id, a.token_ids) == (b.id, b.token_ids) and a.entropy == pytest.approx(b.entropy, abs=1e-4)
        for a, b in zip(found, expected, strict=True)
    )


def test_a_mixed_batch_gives_each_row_what_it_gives_alone(tiny_folder: Path) -> None:
    model, requests = load(tiny_folder), mixed_requests()
    together = generate_all(model, requests)
    alone = [generate_all(model, [request])[0] for request in requests]
    assert same_results(together, alone)
    plain = generate_all(model, [replace(request, interventions=()) for request in requests])
    for i, (acted_on, other) in enumerate(zip(together, plain, strict=True)):
        # Rows that nothing acts on keep their bits; the others really differ.
        assert (acted_on == other) == (i % 4 == 0)


def test_a_steered_row_is_that_of_a_hook_set_by_hand(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    request = mixed_requests()[1]
    vector = 6.0 * torch.from_numpy(unit(0))
    by_spec = generate_all(model, [request])
    handle = model.model.model.layers[0].register_forward_hook(lambda module, args, output: output + vector)
    by_hand = generate_all(model, [replace(request, interventions=())])
    handle.remove()
    assert same_results(by_spec, by_hand)
    assert not same_results(by_spec, generate_all(model, [replace(request, interventions=())]))


def test_what_conditions_read_comes_back_for_every_position(tiny_folder: Path) -> None:
    """Also from rows that outlive their mates, and where no operation was to act."""
    model = load(tiny_folder)
    at = {"hook_point": "resid_post", "above": 0.0, "below": None}
    first = ResolvedCondition(layer=0, direction=unit(7), **at)
    second = ResolvedCondition(layer=1, direction=unit(8), **at)
    steering = spec(
        {"op": "add", "coefficient": 2.0, "layer": 1, "condition": second, "positions": "generated"},
        {"op": "add", "coefficient": 3.0, "layer": 1, "condition": first},
        {"op": "ablate", "coefficient": 1.0, "layer": 1, "condition": second},
    )
    asked = [
        replace(each, interventions=steering if i % 3 else (), max_tokens=3 + i)
        for i, each in enumerate(mixed_requests())
    ]
    for request, result in zip(asked, generate_all(model, asked), strict=True):
        if not request.spec:
            assert result.gates == ()
            continue
        ids = torch.tensor([[*request.token_ids, *result.token_ids]])
        n = ids.shape[1] - (result.finish_reason == "length")
        seen: list[torch.Tensor] = []
        # At layer 0 nothing acts, so what leaves it is what the condition read there.
        with torch.inference_mode(), reading(model.model, {(0, "resid_post"): seen.append}):
            model.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
        assert [len(gate) for gate in result.gates] == [n, n]
        expected = seen[0][0, :n] @ torch.from_numpy(unit(7))
        assert torch.allclose(torch.tensor(result.gates[1]), expected, atol=1e-5)


def test_interventions_that_do_not_fit_the_model_are_refused_and_leave_no_hook(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    for bad in (
        {"op": "add", "coefficient": 1.0, "layer": 5},
        {"op": "add", "coefficient": 1.0, "direction": unit(0, 48)},
    ):
        with pytest.raises(InputError, match=r"layer 5|width 48"):
            generate_all(model, [replace(mixed_requests()[0], interventions=spec(bad))])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize("interventions", [False, True])
def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_folder: Path, caplog, interventions: bool) -> None:
    model = load(tiny_folder)
    requests = mixed_requests()
    if not interventions:
        requests = [replace(request, interventions=()) for request in requests]
    expected = generate_all(model, requests)
    sizes = []

    def runs_out_of_memory(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sizes.append(len(kwargs["input_ids"]))
        # Late in the batch, when some rows have ended and been given out.
        if len(kwargs["input_ids"]) > 2 and kwargs["attention_mask"].shape[1] > 18:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(runs_out_of_memory, with_kwargs=True)
    given = []
    model.generate(requests, on_result=given.append)
    assert sorted(r.id for r in given) == sorted(r.id for r in requests)
    assert {r.id: r.token_ids for r in given} == {r.id: r.token_ids for r in expected}
    assert "Out of memory with 9 rows at once; going on with 4" in caplog.text


def test_out_of_memory_with_one_row_is_an_error_with_a_remedy(tiny_folder: Path) -> None:
    model = load(tiny_folder)

    def runs_out_of_memory(module: nn.Module, args: tuple) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(runs_out_of_memory)
    with pytest.raises(InputError, match=r"single row.*--max_tokens"):
        generate_all(model, [GenerationRequest(id="a", token_ids=(5, 6), max_tokens=4)])


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tiny_folder: Path) -> None:
    model = load(tiny_folder)

    def fails(module: nn.Module, args: tuple) -> None:
        raise RuntimeError("something else")

    model.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="something else"):
        generate_all(model, [GenerationRequest(id="a", token_ids=(5, 6), max_tokens=4)])


def test_the_context_bounds_prompt_and_answer(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    assert model.context_length == 512
    result = generate_all(model, [GenerationRequest(id="a", token_ids=(5,) * 508, max_tokens=100, temperature=1.0)])[0]
    assert len(result.token_ids) == 4 and result.finish_reason == "length"
    with pytest.raises(InputError, match=r"'b'.*512 tokens"):
        generate_all(model, [GenerationRequest(id="b", token_ids=(5,) * 512, max_tokens=1)])


def test_what_the_engine_cannot_do_is_refused_not_ignored(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    with pytest.raises(InputError, match="asks for a capture"):
        generate_all(model, [GenerationRequest(id="a", token_ids=(5,), max_tokens=1, capture="layer 1")])
    with pytest.raises(ValueError, match="expected a resolved spec"):
        GenerationRequest(id="a", token_ids=(5,), max_tokens=1, interventions=("add",))


def test_progress_counts_every_token_once(model, requests) -> None:
    steps, results = [], []
    model.generate(requests, on_result=results.append, on_tokens=steps.append, batch_size=5)
    assert sum(steps) == sum(len(r.token_ids) for r in results)
