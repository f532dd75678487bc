import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.ops import metrics
from src.ops.metrics import token_uncertainty


@pytest.mark.parametrize("vocabulary", [2, 100, 49152, 151936])
def test_uniform_logits_give_the_logarithm_of_the_vocabulary(vocabulary: int) -> None:
    measured = token_uncertainty(torch.full((3, vocabulary), -7.5), k=2)
    assert measured.entropy.tolist() == pytest.approx([math.log(vocabulary)] * 3, abs=2e-5)
    assert measured.top_k_mass.tolist() == pytest.approx([2 / vocabulary] * 3, rel=1e-5)


@pytest.mark.parametrize("rest", [-torch.inf, -1e4])
def test_a_one_hot_distribution_has_no_entropy(rest: float) -> None:
    logits = torch.full((2, 1000), rest)
    logits[0, 3] = logits[1, 999] = 5.0
    measured = token_uncertainty(logits, k=5)
    assert measured.entropy.tolist() == [0.0, 0.0]
    assert measured.top_k_mass.tolist() == [1.0, 1.0]


def test_masked_tokens_count_as_probability_zero() -> None:
    logits = torch.full((1, 64), -torch.inf)
    logits[0, :8] = 1.25
    assert token_uncertainty(logits, k=4).entropy.item() == pytest.approx(math.log(8), abs=1e-6)
    assert token_uncertainty(logits, k=4).top_k_mass.item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_is_nan_and_leaves_its_neighbours_alone(broken: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone = token_uncertainty(logits, k=5)
    logits[1, 7] = broken
    beside = token_uncertainty(logits, k=5)
    assert beside.entropy.isnan().tolist() == [False, True, False]
    assert beside.top_k_mass.isnan().tolist() == [False, True, False]
    assert beside.entropy[[0, 2]].tolist() == alone.entropy[[0, 2]].tolist()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(5, 3000),
    spread=st.floats(0.01, 50),
    shift=st.integers(-8, 8),
)
def test_agrees_with_float64_and_ignores_a_shift(seed: int, vocabulary: int, spread: float, shift: int) -> None:
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p.exp() * log_p).sum(-1)
    mass = log_p.exp().topk(5, -1).values.sum(-1)
    measured = token_uncertainty(logits, k=5)
    assert (measured.entropy - exact).abs().max() < 1e-5
    assert (measured.top_k_mass - mass).abs().max() < 1e-5
    assert (token_uncertainty(logits + shift, k=5).entropy - exact).abs().max() < 1e-3
    assert measured.entropy.min() >= 0 and measured.top_k_mass.max() <= 1


def test_taking_rows_in_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    whole = token_uncertainty(logits, k=3)
    monkeypatch.setattr(metrics, "MAX_ELEMENTS_AT_ONCE", 80)
    grouped = token_uncertainty(logits, k=3)
    assert torch.equal(whole.entropy, grouped.entropy) and torch.equal(whole.top_k_mass, grouped.top_k_mass)


@pytest.mark.parametrize("k", [1, 5, 15, 16, 900, 1007])
@pytest.mark.parametrize("offset", [0, 64, 1000])
def test_the_likeliest_tokens_are_found_wherever_they_stand(k: int, offset: int) -> None:
    logits = torch.randn(2, 1007, generator=torch.Generator().manual_seed(k)).roll(offset, dims=1)
    logits[1, offset : offset + 5] = 9.0
    expected = logits.double().softmax(-1).topk(k, -1).values.sum(-1)
    assert (token_uncertainty(logits, k).top_k_mass - expected).abs().max() < 1e-6


@pytest.mark.parametrize("vocabulary", [49152, 151936, 262144])
def test_rounding_stays_below_a_hundred_thousandth_of_a_nat_at_real_vocabularies(vocabulary: int) -> None:
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(3)) * 3
    log_p = logits.double().log_softmax(-1)
    assert (token_uncertainty(logits).entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 1e-5


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits = (torch.randn(4, 30000, generator=torch.Generator().manual_seed(2)) * 3).bfloat16()
    assert torch.equal(token_uncertainty(logits).entropy, token_uncertainty(logits.float()).entropy)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_a_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}.*10"):
        token_uncertainty(torch.zeros(1, 10), k=k)
