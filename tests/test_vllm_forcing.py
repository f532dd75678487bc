"""KL and projections by vLLM against those by transformers, on given tokens and on answers."""

from dataclasses import replace

import numpy as np
import pytest

from src.common.errors import InputError
from src.common.interventions import Window
from src.models.hooks import Location
from src.models.language_model import LanguageModel, generate_all
from src.models.teacher_forcing import ForcedRow, answered
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult
from tests.steering_specs import spec, unit

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
D_MODEL = 576
PLACE = Location(12, "resid_post")
TEXTS = ("The capital of France is", "Once upon a time there was a small village, and in it a baker who", "def f(x):")


def op(name: str, layer: int, seed: int, **fields: object) -> dict:
    return {"op": name, "layer": layer, "direction": unit(seed, D_MODEL), **fields}


SPECS = (
    None,
    spec(op("add", 8, 1, coefficient=20.0)),
    spec(op("ablate", 12, 2, coefficient=1.0), op("add", 20, 3, coefficient=15.0, positions="generated")),
    spec(op("cap", 12, 4, lo=-0.5, hi=0.5, positions="last_prompt")),
)


@pytest.fixture(scope="module")
def requests(hf: LanguageModel) -> list[GenerationRequest]:
    """Every prompt under every spec, 9 tokens each."""
    ids = [tuple(hf.tokenizer(text).input_ids) for text in TEXTS]
    return [
        GenerationRequest(id=f"{i}-{j}", token_ids=tokens, max_tokens=9, interventions=one or ())
        for i, tokens in enumerate(ids)
        for j, one in enumerate(SPECS)
    ]


@pytest.fixture(scope="module")
def rows(hf: LanguageModel, requests) -> list[ForcedRow]:
    """The unsteered answer of each prompt under every spec."""
    plain = [request for request in requests if not request.spec]
    answers = {q.token_ids: answer for q, answer in zip(plain, generate_all(hf, plain), strict=True)}
    return [(answered(request, answers[request.token_ids]), request.spec) for request in requests]


def counts(engine) -> tuple[int, int]:
    (held,) = engine._engine.collective_rpc("tiller_state")
    return held["captures"], engine._states.captures.budget.in_flight


def test_divergences_are_those_of_transformers(vllm_engine, hf, rows) -> None:
    expected = hf.kl_per_token(rows)
    found = vllm_engine.kl_per_token(rows)
    for (sequence, one), ours, theirs in zip(rows, found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours == 0).all() if one is None else ours.max() > 0
        assert (ours - theirs).abs().max() < 1e-3, sequence.id
        np.testing.assert_allclose(ours.sum(), theirs.sum(), rtol=2e-3, atol=1e-4)
    assert counts(vllm_engine) == (0, 0)


def test_what_changes_nothing_has_no_divergence(vllm_engine, rows) -> None:
    beyond = spec(op("add", 8, 1, coefficient=20.0, positions=Window(start=500)))
    for kl in vllm_engine.kl_per_token([(sequence, beyond) for sequence, _ in rows[:3]]):
        assert kl.max() < 1e-6


def test_few_states_at_a_time_give_the_same(vllm_engine, rows, monkeypatch) -> None:
    from src.models import vllm_forcing
    from src.ops import divergence

    whole = vllm_engine.kl_per_token(rows)
    n_tokens = [len(sequence.token_ids) - sequence.prompt_length for sequence, _ in rows]
    monkeypatch.setattr(vllm_forcing, "MAX_HELD_BYTES", 2 * max(n_tokens) * D_MODEL * 4)
    monkeypatch.setattr(divergence, "MAX_LOGITS_AT_ONCE", 3 * 49152)
    for kl, expected in zip(vllm_engine.kl_per_token(rows), whole, strict=True):
        np.testing.assert_allclose(kl, expected, atol=1e-6, rtol=1e-3)
    monkeypatch.setattr(vllm_forcing, "MAX_HELD_BYTES", 2 * D_MODEL * 4)
    with pytest.raises(InputError, match="--capture_budget_gb"):
        vllm_engine.kl_per_token(rows)


def test_projections_are_those_of_transformers(vllm_engine, hf, rows) -> None:
    direction = unit(2, D_MODEL)
    for place in (PLACE, Location(29, "resid_post"), Location(5, "mlp_out")):
        expected = hf.mean_projections(rows, place, direction)
        assert vllm_engine.mean_projections(rows, place, direction) == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert counts(vllm_engine) == (0, 0)


def test_answers_come_with_their_projections(vllm_engine, hf, requests) -> None:
    direction, found, n_tokens = unit(1, D_MODEL), {}, []

    def ask(engine) -> dict[str, tuple[GenerationResult, float | None]]:
        found.clear()
        n_tokens.clear()
        engine.generate_projected(
            requests, PLACE, direction, on_result=lambda r, mean: found.__setitem__(r.id, (r, mean)),
            on_tokens=n_tokens.append, batch_size=5, top_k=5,
        )  # fmt: skip
        assert sum(n_tokens) == sum(len(result.token_ids) for result, _ in found.values())
        return dict(found)

    theirs, ours = ask(hf), ask(vllm_engine)
    assert ours.keys() == theirs.keys() == {request.id for request in requests}
    for name, (result, mean) in ours.items():
        assert result.token_ids == theirs[name][0].token_ids
        assert mean == pytest.approx(theirs[name][1], rel=1e-2)
    assert counts(vllm_engine) == (0, 0)


def test_an_answer_that_is_measured_leaves_the_contexts_last_token(vllm_engine, requests) -> None:
    n = vllm_engine.room
    results = []
    for length in (n - 3, n - 2):
        one = replace(requests[0], token_ids=(requests[0].token_ids * n)[:length], max_tokens=8, id=str(length))
        vllm_engine.generate_projected(
            [one], PLACE, unit(1, D_MODEL), on_result=lambda r, m: results.append((len(r.token_ids), m)),
            on_tokens=lambda n: None, batch_size=1, top_k=5,
        )  # fmt: skip
    assert [length for length, _ in results] == [2, 1] and all(mean is not None for _, mean in results)
    full = replace(requests[0], token_ids=(requests[0].token_ids * n)[: n - 1], max_tokens=8)
    with pytest.raises(InputError, match="--backend hf"):
        vllm_engine.generate_projected(
            [full], PLACE, unit(1, D_MODEL), on_result=lambda r, m: None, on_tokens=lambda n: None, batch_size=1,
            top_k=5,
        )  # fmt: skip
    ids = (requests[0].token_ids * n)[:n]
    acting = spec(op("add", 8, 1, coefficient=20.0))
    whole = TokenSequence(id="whole", token_ids=ids, prompt_length=n - 4)
    assert len(vllm_engine.kl_per_token([(whole, acting)])[0]) == 4
    with pytest.raises(InputError, match=f"{n - 1} given tokens"):
        vllm_engine.mean_projections([(whole, acting)], PLACE, unit(1, D_MODEL))


def test_numbers_that_are_none_are_refused_and_leave_nothing(vllm_engine, rows) -> None:
    sequence = rows[0][0]
    beyond = {"op": "add", "layer": 12, "direction": np.eye(D_MODEL, dtype=np.float32)[3], "coefficient": 3e38}
    huge = spec(beyond, beyond)
    with pytest.raises(InputError, match=r"hidden states are not finite; try a smaller coefficient"):
        vllm_engine.mean_projections([(sequence, huge)], PLACE, unit(1, D_MODEL))
    with pytest.raises(InputError, match=r"logits are not finite; try a smaller coefficient"):
        vllm_engine.kl_per_token([(sequence, SPECS[1]), (sequence, huge)])
    with pytest.raises(InputError, match="has no response token"):
        vllm_engine.kl_per_token([(TokenSequence(id="empty", token_ids=(5, 6), prompt_length=2), SPECS[1])])
    with pytest.raises(InputError, match="layer 30"):
        vllm_engine.kl_per_token([(sequence, spec(op("add", 30, 1, coefficient=1.0)))])
    assert vllm_engine.mean_projections(rows[:1], PLACE, unit(1, D_MODEL)) and counts(vllm_engine) == (0, 0)
    # More than there are blocks in the cache: none may meet the numbers that are none in a block that was used.
    many = [GenerationRequest(id=f"m{i}", token_ids=(i + 3, 5, 6, 7, 8), max_tokens=1) for i in range(400)]
    assert len(generate_all(vllm_engine, many)) == 400
