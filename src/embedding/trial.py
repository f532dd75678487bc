"""Whether another way to compute gives a model's own vectors: a few rows of random tokens, compared before any work."""

import numpy as np

from src.common.errors import InputError
from src.embedding.precisions import agreement
from src.embedding.records import Piece

LEAST_COSINE = 0.995
"""Of random tokens in bfloat16; texts agree far better, and --verify looks at them."""
LENGTHS = (23, 11, 5)
FIRST_TOKEN, PAST_TOKENS = 5, 1000
"""Among the first few tokens of a vocabulary are special ones."""


def trial_pieces(vocabulary_size: int) -> list[Piece]:
    """Pieces of different lengths, of tokens drawn evenly."""
    draw = np.random.default_rng(0)
    last = min(PAST_TOKENS, vocabulary_size)
    return [Piece(0, 0, draw.integers(FIRST_TOKEN, last, n).astype(np.int32), truncated=False) for n in LENGTHS]


def require_own_vectors(backend: str, found: np.ndarray, wanted: np.ndarray) -> None:
    """Raises InputError where a backend's vectors of the trial pieces are not the model's own, (n, dim) both."""
    least = min(agreement(*each, "float32") for each in zip(found, wanted, strict=True))
    if not least >= LEAST_COSINE:
        raise InputError(
            f"--backend {backend}: it gives other vectors than the model's own code (cosine {least:.4f}); take "
            f"--backend st"
        )
