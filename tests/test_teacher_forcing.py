"""KL and projections on given tokens, against one sequence at a time with plain hooks and float64 formulas."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.common.interventions import Window
from src.common.model_config import ModelConfigBase
from src.common.resolved_interventions import ResolvedSpec
from src.models import teacher_forcing
from src.models.hooks import Location
from src.models.language_model import LanguageModel
from src.models.teacher_forcing import kl_per_token, mean_projections
from src.models.token_sequences import TokenSequence
from src.ops import divergence
from tests.steering_specs import spec, unit
from tests.tiny_models import tiny_model

PLACE = Location(1, "resid_post")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("unused")))


def sequence(name: str, n_prompt: int, n_response: int, seed: int = 0) -> TokenSequence:
    ids = torch.randint(5, 49000, (n_prompt + n_response,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenSequence(id=name, token_ids=tuple(ids), prompt_length=n_prompt)


def by_hand(model: nn.Module, row: TokenSequence, layer: int | None, vector: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and what leaves layer 1, the vector being added to every token's hidden state by a hook of its own."""
    hidden = []
    handles = [model.model.layers[1].register_forward_hook(lambda m, a, out: hidden.append(out))]
    if layer is not None:
        handles.insert(0, model.model.layers[layer].register_forward_hook(lambda m, a, out: out + vector))
    if layer == 1:
        handles[0].remove()
        handles[0] = model.model.layers[1].register_forward_hook(lambda m, a, out: out + vector, prepend=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.token_ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, hidden[0][0]


@pytest.mark.parametrize("layer", [0, 1])
def test_both_equal_a_hook_set_by_hand(model: LanguageModel, layer: int) -> None:
    rows = [sequence("a", 7, 9, 1), sequence("b", 15, 4, 2), sequence("c", 3, 1, 3)]
    one = spec({"op": "add", "coefficient": 3.0, "layer": layer})
    vector, direction = 3.0 * torch.from_numpy(unit(0)), unit(5)
    divergences = kl_per_token(model, [(row, one) for row in rows])
    projections = mean_projections(model, [(row, one) for row in rows], PLACE, direction)
    for row, found, mean in zip(rows, divergences, projections, strict=True):
        n = row.prompt_length
        plain, _ = by_hand(model.model, row, None, None)
        steered, hidden = by_hand(model.model, row, layer, vector)
        p, q = (x.double().log_softmax(-1)[n - 1 : -1] for x in (plain, steered))
        assert found.dtype == torch.float64 and len(found) == len(row.token_ids) - n
        torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), atol=2e-6, rtol=1e-3)
        assert mean == pytest.approx((hidden[n:] @ torch.from_numpy(direction)).mean().item(), abs=1e-5)


def test_what_changes_nothing_has_a_divergence_of_exactly_zero(model: LanguageModel) -> None:
    """A coefficient of 0, no spec, and positions beyond the end, among rows that are steered."""
    a, b = sequence("a", 7, 9, 1), sequence("b", 15, 4, 2)
    acting = spec({"op": "add", "coefficient": 3.0})
    beyond = spec({"op": "add", "coefficient": 3.0, "positions": Window(start=100)})
    found = kl_per_token(model, [(a, acting), (b, beyond), (a, None), (b, ResolvedSpec(operations=())), (b, acting)])
    assert [bool((kl == 0).all()) for kl in found] == [False, True, True, True, False]
    assert (found[0] > 0).all() and (found[4] > 0).all()


def test_tokens_before_an_intervention_do_not_diverge(model: LanguageModel) -> None:
    """The token that follows the prompt is predicted from the prompt, which `generated` leaves alone."""
    row = sequence("a", 7, 9, 1)
    kl = kl_per_token(model, [(row, spec({"op": "add", "coefficient": 3.0, "positions": "generated"}))])[0]
    assert kl[0] == 0 and (kl[1:] > 0).all()


def test_an_intervention_at_the_place_of_the_projection_counts(model: LanguageModel) -> None:
    row, direction = sequence("a", 7, 9, 1), unit(0)
    specs = [None, spec({"op": "add", "coefficient": 2.5, "layer": 1}), spec({"op": "set", "value": -4.0, "layer": 1})]
    values = mean_projections(model, [(row, one) for one in specs], PLACE, direction)
    assert values[1] - values[0] == pytest.approx(2.5, abs=1e-5)
    assert values[2] == pytest.approx(-4.0, abs=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "opt", "mixtral", "qwen3_next"])
def test_a_row_does_not_depend_on_its_batch_mates(model: LanguageModel, name: str) -> None:
    other = LanguageModel(tiny_model(name), model.tokenizer)
    rows = [
        (sequence(str(i), 3 + 2 * i, 5 + i, i), spec({"op": "ablate", "coefficient": 1.0, "layer": i % 2}))
        for i in range(4)
    ]
    together, means = kl_per_token(other, rows), mean_projections(other, rows, PLACE, unit(0))
    for row, kl, mean in zip(rows, together, means, strict=True):
        torch.testing.assert_close(kl_per_token(other, [row])[0], kl, atol=1e-6, rtol=1e-2)
        assert mean_projections(other, [row], PLACE, unit(0))[0] == pytest.approx(mean, abs=1e-5)


def test_small_budgets_and_a_lack_of_memory_change_nothing(model: LanguageModel, monkeypatch, caplog) -> None:
    rows = [(sequence(str(i), 5, 6, i), spec({"op": "add", "coefficient": 2.0})) for i in range(6)]
    whole = kl_per_token(model, rows)
    monkeypatch.setattr(teacher_forcing, "MAX_LOGITS", 49152 * 15)
    monkeypatch.setattr(divergence, "MAX_LOGITS_AT_ONCE", 49152)
    for found, expected in zip(kl_per_token(model, rows, tokens_per_batch=40), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)

    def runs_out_of_memory(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.register_forward_pre_hook(runs_out_of_memory, with_kwargs=True)
    expected = mean_projections(model, rows[:1], PLACE, unit(0))
    found = mean_projections(model, rows, PLACE, unit(0))
    handle.remove()
    assert found[0] == pytest.approx(expected[0], abs=1e-5) and len(found) == 6
    assert "Out of memory with 6 sequences at once; going on with 3" in caplog.text


def test_no_response_and_numbers_that_are_none_are_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="'empty' has no response token"):
        kl_per_token(model, [(TokenSequence(id="empty", token_ids=(5, 6), prompt_length=2), None)])
    huge = spec({"op": "add", "coefficient": 3e38}, {"op": "add", "coefficient": 3e38})
    with pytest.raises(InputError, match=r"'a'.*hidden states are not finite"):
        mean_projections(model, [(sequence("a", 3, 3), huge)], Location(0, "resid_post"), unit(0))
    broken = LanguageModel(tiny_model("llama"), model.tokenizer)
    with torch.no_grad():
        broken.model.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match=r"'a'.*logits are not finite"):
        kl_per_token(broken, [(sequence("a", 3, 3), spec({"op": "add", "coefficient": 1.0}))])
