"""The async form of a model on transformers: the same answers, side by side, dropped when nobody waits, kept states."""

import asyncio
import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from src.common.capture_spec import Capture
from src.common.errors import InputError
from src.common.interventions import Window
from src.common.model_config import ModelSettings
from src.models.async_pieces import Piece
from src.models.hf_async import AsyncLanguageModel
from src.models.hooks import reading
from src.models.language_model import LanguageModel, generate_all
from src.models.steering import steered
from src.models.types import GenerationRequest
from tests.steering_specs import spec, unit


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(model_id=str(tiny_folder)))


def requests(n: int, **changed: object) -> list[GenerationRequest]:
    """Of different lengths, under different interventions, every third without."""
    found = []
    for i in range(n):
        acting = spec({"op": "add", "direction": unit(i), "coefficient": 3.0 * i, "layer": i % 2}) if i % 3 else ()
        known = {"token_ids": (1, *range(5, 8 + i)), "max_tokens": 10 + i, "seed": i, "interventions": acting}
        found.append(GenerationRequest(**{"id": str(i), "temperature": float(i % 2)} | known | changed))
    return found


async def gathered(engine: AsyncLanguageModel, asked: list[GenerationRequest]) -> list:
    return await asyncio.gather(*(engine.generate(request) for request in asked), return_exceptions=True)


def hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.modules())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
async def test_side_by_side_each_gets_what_it_gets_alone(model: LanguageModel, batch_size: int) -> None:
    alone = [generate_all(model, [request])[0] for request in requests(8)]
    async with AsyncLanguageModel(model, batch_size) as engine:
        found = await gathered(engine, requests(8))
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]
    assert [each.id for each in found] == [str(i) for i in range(8)]
    assert len({each.token_ids for each in found}) == 8
    for one, other in zip(found, alone, strict=True):
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5) and one.finish_reason == other.finish_reason


async def test_pieces_together_are_the_answer(model: LanguageModel) -> None:
    request = requests(2)[1]
    async with AsyncLanguageModel(model) as engine:
        pieces = [piece async for piece in engine.stream(request)]
    result = pieces[-1].result
    assert len(pieces) > 5 and [each.result for each in pieces[:-1]] == [None] * (len(pieces) - 1)
    for name in ("token_ids", "entropy", "top_k_mass"):
        assert sum((getattr(each, name) for each in pieces), ()) == getattr(result, name)


async def first_of(engine: AsyncLanguageModel, request: GenerationRequest) -> Piece:
    async with contextlib.aclosing(engine.stream(request)) as pieces:
        async for piece in pieces:
            return piece


async def test_whoever_leaves_ends_its_own_answer_alone(model: LanguageModel) -> None:
    long = replace(requests(3)[2], id="long", max_tokens=480)
    mate = replace(requests(2)[1], max_tokens=30)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    async with AsyncLanguageModel(model) as engine:
        watch = model.model.register_forward_pre_hook(count)
        _, answer = await asyncio.gather(first_of(engine, long), engine.generate(mate))
        await first_of(engine, replace(long, max_tokens=400))
        # Answered only once the one that was left is no longer computed.
        await engine.generate(replace(mate, max_tokens=1))
        watch.remove()
    assert steps < 100, "nobody waited for the long answers any more"
    assert answer.token_ids == generate_all(model, [mate])[0].token_ids
    assert hooks(model) == 0


async def test_what_is_wrong_is_refused_and_harms_no_other(model: LanguageModel) -> None:
    good, one_axis = requests(2)[1], np.eye(32, dtype=np.float32)[0]
    bad = [
        (replace(good, token_ids=(1, 49152)), "token 49152 is outside"),
        (replace(good, token_ids=(1,) * 512), "context"),
        (replace(good, interventions=spec({"op": "add", "layer": 9, "coefficient": 1.0})), "layers are 0 to 1"),
        (
            replace(good, interventions=spec(*[{"op": "add", "coefficient": 3e38, "direction": one_axis}] * 2)),
            "not num",
        ),
    ]
    async with AsyncLanguageModel(model) as engine:
        for request, words in bad:
            with pytest.raises(InputError, match=words):
                await engine.generate(request)
        with pytest.raises(InputError, match="top-k mass of 0"):
            await engine.generate(good, top_k=0)
        answer = await engine.generate(good)
    assert answer.token_ids == generate_all(model, [good])[0].token_ids


async def test_a_mate_whose_numbers_run_over_harms_no_other(model: LanguageModel) -> None:
    mates = requests(4, max_tokens=12)
    one_axis = np.eye(32, dtype=np.float32)[0]
    late = [{"op": "add", "coefficient": 3e38, "direction": one_axis, "positions": Window(start=8)}] * 2
    mates[1] = replace(mates[1], interventions=spec(*late))
    alone = [generate_all(model, [each])[0] for i, each in enumerate(mates) if i != 1]
    async with AsyncLanguageModel(model) as engine:
        pieces = [piece async for piece in engine.stream(replace(mates[0], max_tokens=1))]
        found = await gathered(engine, mates)
    assert len(pieces) == 1 and isinstance(found.pop(1), InputError)
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]


async def test_the_end_is_heard_by_those_who_wait_and_those_who_come(model: LanguageModel) -> None:
    engine = AsyncLanguageModel(model, batch_size=1)
    with pytest.raises(RuntimeError, match="not open"):
        await engine.generate(requests(1)[0])
    async with engine:
        waiting = asyncio.ensure_future(gathered(engine, requests(4, max_tokens=400, interventions=())))
        await asyncio.sleep(0.2)
    errors = [each for each in await waiting if isinstance(each, RuntimeError)]
    assert len(errors) >= 3 and all("ended before the answer" in str(each) for each in errors)
    with pytest.raises(RuntimeError, match="takes no requests"):
        await engine.generate(requests(1)[0])


@pytest.mark.parametrize(
    "acting", [(), spec({"op": "ablate", "coefficient": 1.0}), spec({"op": "add", "coefficient": 20.0, "layer": 1})]
)
async def test_kept_states_are_those_that_flowed(model: LanguageModel, acting: object) -> None:
    capture = Capture(places=((0, "resid_post"), (1, "mlp_out")), start=2)
    request = replace(requests(1)[0], interventions=acting, capture=capture)
    mean = replace(request, capture=replace(capture, mean=True))
    async with AsyncLanguageModel(model) as engine:
        found, averaged = await gathered(engine, [request, mean])
    n_run = len(request.token_ids) + len(found.token_ids) - (found.finish_reason == "length")
    ids = torch.tensor([[*request.token_ids, *found.token_ids][:n_run]])
    seen: dict[str, torch.Tensor] = {}

    def note(layer: int, hook_point: str, hidden: torch.Tensor) -> None:
        seen[f"{layer}.{hook_point}"] = hidden[0, 2:]

    places = {place: partial(note, *place) for place in capture.places}
    with torch.inference_mode(), steered(model.model, [request.spec], [request.boundary]), reading(model.model, places):
        model.model(input_ids=ids)
    assert found.captures.keys() == averaged.captures.keys() == seen.keys()
    for key, states in seen.items():
        torch.testing.assert_close(found.captures[key], states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(averaged.captures[key], states.mean(0, keepdim=True), atol=1e-5, rtol=1e-4)
