import pytest

from src.ops.repetition import distinct_n


def test_distinct_n_counts_each_ngram_once() -> None:
    assert distinct_n([1, 2, 3, 4], 1) == distinct_n([1, 2, 3, 4], 2) == 1.0
    assert distinct_n([7] * 10, 1) == 0.1 and distinct_n([7] * 10, 2) == pytest.approx(1 / 9)
    assert distinct_n([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct_n([], 1) is None and distinct_n([1], 2) is None
