import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.ops.sampling import next_tokens


def draw(logits: torch.Tensor, temperature: float, uniforms: list[float]) -> list[int]:
    rows = logits.expand(len(uniforms), -1)
    temperatures = torch.full((len(uniforms),), temperature)
    return next_tokens(rows, temperatures, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]])
    assert draw(logits, 0.0, [0.0, 0.5, 0.999]) == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 5), st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_cumulative_distribution(seed: int, temperature: float, uniform: float) -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(seed)) * 4
    token = draw(logits, temperature, [uniform])[0]
    p = (logits.double() / torch.tensor(temperature).double()).softmax(-1)[0]
    below = p[:token].sum().item()
    assert below - 1e-9 <= uniform <= below + p[token].item() + 1e-9


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0, -1.0]])
    uniforms = ((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).tolist()
    counts = torch.bincount(torch.tensor(draw(logits, 0.7, uniforms)), minlength=5) / 20000
    assert torch.allclose(counts, (logits / 0.7).softmax(-1)[0], atol=2e-4)
    assert counts[2] == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_never_draw_an_impossible_token(uniform: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 400:500] = 0.0
    assert 400 <= draw(logits, 1.0, [uniform])[0] < 500


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 1.5, 1.4]])
    assert draw(logits, 1e-30, [0.0, 0.5, 0.99]) == [1, 1, 1]


def test_rows_with_and_without_temperature_mix() -> None:
    logits = torch.zeros(3, 4)
    tokens = next_tokens(logits, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64))
    assert tokens.tolist() == [0, 3, 0]
