import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.common.errors import InputError
from src.models.token_sequences import TokenPosition, TokenSequence, in_windows, next_batch, right_padded

SEQUENCE = TokenSequence(id="a", token_ids=(5, 6, 7, 8, 9), prompt_length=3)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def of_lengths(lengths: list[int]) -> list[TokenSequence]:
    return [TokenSequence(id=str(i), token_ids=(5,) * n, prompt_length=n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("name", "read", "n_run"),
    [
        ("last_prompt", (7,), 3),
        ("token:-1", (7,), 3),
        ("token:-3", (5,), 3),
        ("mean_prompt", (5, 6, 7), 3),
        ("mean_response", (8, 9), 5),
        ("all", (5, 6, 7, 8, 9), 5),
    ],
)
def test_positions_read_these_tokens_and_need_no_later_ones(name: str, read: tuple[int, ...], n_run: int) -> None:
    position = TokenPosition(name)
    start, end = position.span(SEQUENCE)
    assert SEQUENCE.token_ids[start:end] == read
    assert position.n_run(SEQUENCE) == n_run >= end


@pytest.mark.parametrize("name", ["", "last", "token:-0", "token:-01", "token:2", "token:-", "token:-٣", "mean", "ALL"])
def test_other_positions_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected last_prompt, mean_prompt"):
        TokenPosition(name)


def test_positions_outside_the_sequence_are_refused() -> None:
    with pytest.raises(InputError, match=r"'a': its prompt has 3 tokens, so there is no token:-4.*at most 3"):
        TokenPosition("token:-4").span(SEQUENCE)
    with pytest.raises(InputError, match=r"'a' has no response token"):
        TokenPosition("mean_response").span(TokenSequence(id="a", token_ids=(5, 6), prompt_length=2))


@given(LENGTHS, st.integers(1, 100))
def test_windows_hold_every_sequence_once_and_little_more_than_asked(lengths: list[int], n_tokens: int) -> None:
    sequences = of_lengths(lengths)
    windows = list(in_windows(iter(sequences), n_tokens))
    assert [s for window in windows for s in window] == sequences
    for window in windows:
        assert window and sum(len(s.token_ids) for s in window[:-1]) < n_tokens


@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_batches_are_the_longest_that_the_budget_allows(lengths: list[int], budget: int, equal: bool) -> None:
    queue = of_lengths(sorted(lengths, reverse=True))
    run = lambda sequence: len(sequence.token_ids)  # noqa: E731
    batch = next_batch(queue, run, tokens_per_batch=budget, equal_lengths=equal)
    longest = run(queue[0])
    assert batch == queue[: len(batch)] and len(batch) >= 1
    assert len(batch) == 1 or len(batch) * longest <= budget
    following = queue[len(batch) : len(batch) + 1]
    for sequence in following:
        assert (len(batch) + 1) * longest > budget or (equal and run(sequence) != longest)
    assert not equal or {run(s) for s in batch} == {longest}


def test_padding_stands_on_the_right() -> None:
    ids, mask = right_padded([(5, 6, 7), (8,)], torch.device("cpu"))
    assert ids[0].tolist() == [5, 6, 7] and ids[1, 0] == 8
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
