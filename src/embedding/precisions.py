"""The number formats of stored vectors: from float32 and back."""

import numpy as np

NEARLY_ZERO = 0.05
"""As a share of a vector's root mean square."""


def shortened(vectors: np.ndarray, truncate_dim: int | None, normalize: bool) -> np.ndarray:
    """
    vectors: (n, dim) float32. Its first `truncate_dim` dimensions, scaled to length 1 where asked; a zero vector stays.
    """
    kept = vectors if truncate_dim is None else vectors[:, :truncate_dim]
    if not normalize:
        return np.ascontiguousarray(kept)
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return kept / np.where(norms == 0, 1, norms)


def to_precision(vectors: np.ndarray, precision: str) -> tuple[np.ndarray, float | None]:
    """
    vectors: (n, dim) float32. Returns (stored, coefficient): float32, float16; bfloat16 as float32 with the lower 16
    bits zero (rounded to nearest even; Parquet has no bfloat16, and the zeros cost nothing in the file); int8 with
    vector ≈ stored × coefficient, the coefficient being the largest absolute value / 127; binary as (n, ⌈dim / 8⌉)
    uint8 of np.packbits(vector > 0). The coefficient is None except for int8.
    """
    match precision:
        case "float16":
            # What is too large for it becomes infinite, which the caller looks for.
            with np.errstate(over="ignore"):
                return vectors.astype(np.float16), None
        case "bfloat16":
            bits = vectors.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return rounded.astype(np.uint32).view(np.float32), None
        case "int8":
            largest = float(np.abs(vectors).max()) if vectors.size else 0.0
            coefficient = largest / 127 or 1.0
            return np.rint(vectors / np.float32(coefficient)).clip(-127, 127).astype(np.int8), coefficient
        case "binary":
            return np.packbits(vectors > 0, axis=1), None
    assert precision == "float32", precision
    return vectors.astype(np.float32, copy=False), None


def agreement(stored: np.ndarray, wanted: np.ndarray, precision: str) -> float:
    """
    How well a stored vector and a float32 one, both one-dimensional, agree: their cosine, or for binary the share of
    equal bits, of numbers that are not nearly zero: those have either sign in bfloat16. Two zero vectors agree fully.
    """
    if precision == "binary":
        bits = np.unpackbits(stored)[: len(wanted)]
        rms = np.sqrt(np.square(wanted.astype(np.float64)).mean())
        equal = (bits == (wanted > 0))[np.abs(wanted) >= NEARLY_ZERO * rms]
        return float(equal.mean()) if len(equal) else float(not bits.any())
    first, second = stored.astype(np.float64), wanted.astype(np.float64)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))
