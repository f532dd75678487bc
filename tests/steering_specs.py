"""Directions and specs for tests, without files where none are needed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.common.directions_file import PERCENTILES, Directions, DirectionsMetadata, write_directions
from src.common.resolved_interventions import ResolvedOperation, ResolvedSpec
from src.models.fingerprint import fingerprint


def unit(seed: int, d_model: int = 32) -> np.ndarray:
    """A random unit vector, float32 (d_model,)."""
    vector = np.random.default_rng(seed).normal(size=d_model)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def spec(*operations: dict[str, Any]) -> ResolvedSpec:
    """Operations at layer 0, resid_post, along unit(0) unless they say otherwise."""
    default = {"layer": 0, "hook_point": "resid_post", "direction": unit(0)}
    return ResolvedSpec(operations=tuple(ResolvedOperation(**{**default, **each}) for each in operations))


def some_directions(
    n_layers: int = 2, k: int = 1, d_model: int = 32, absent: tuple[int, ...] = (), seed: int = 0, **metadata: Any
) -> Directions:
    """Random directions of a model with fingerprint "f"; percentiles of target are 0, 1, … 10, of control 100 less."""
    vectors = np.random.default_rng(seed).normal(size=(n_layers, k, d_model))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[list(absent)] = 0
    ranks = [float(i) for i in range(len(PERCENTILES))]
    rows = lambda shift: [None if i in absent else [[r - shift + i for r in ranks]] * k for i in range(n_layers)]  # noqa: E731
    known = {
        "model_id": "tiny", "model_fingerprint": "f", "hook_point": "resid_post", "token_position": "last_prompt",
        "method": "random", "percentiles": {"target": rows(0), "control": rows(100)},
    }  # fmt: skip
    return Directions(
        directions=vectors.astype(np.float32),
        layers_present=tuple(i for i in range(n_layers) if i not in absent),
        metadata=DirectionsMetadata(**{**known, **metadata}),
    )


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal as bytes: −0.0 differs from 0.0, and NaN equals NaN."""
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    )


def write_tiny_directions(path: Path, model_folder: Path, **metadata: Any) -> Path:
    """Random directions that pass for the tiny model's in `model_folder`."""
    known = {"model_fingerprint": fingerprint(model_folder), "best_layer": 1}
    write_directions(path, some_directions(**{**known, **metadata}))
    return path
