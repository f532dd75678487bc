"""How much a text repeats itself."""

from collections.abc import Sequence


def distinct_n(token_ids: Sequence[int], n: int) -> float | None:
    """
    Distinct n-grams over all n-grams of the tokens: 1 without repetition, near 0 for a text that goes in circles. None
    for fewer than n tokens. A sign of coherence that falls with length, so compare answers of one length.

    After Li et al. 2016 (arXiv:1510.03055), who divide by the number of tokens, which is n − 1 more.
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
