"""The directions file of a finished extraction, and the files of other tools."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.common.directions_exchange import export_directions, import_directions
from src.common.directions_file import Directions, DirectionsMetadata, prompt_sha256
from src.common.errors import InputError
from src.common.jsonl import round_measured
from src.directions.examples import sha256_of
from src.directions.scoring import LayerResult
from src.directions.settings import DirectionSettings
from src.directions.source import Source

LOGGER = logging.getLogger(__name__)
FILE_NAME = "directions.safetensors"
SCORES = ("auc", "d_prime", "target_mean", "control_mean", "cosine_held_out", "cosine_fitted", "random_auc",
          "random_auc_high", "shuffled_auc", "shuffled_auc_high")  # fmt: skip


def directions_of(
    source: Source,
    facts: Mapping[str, Any],
    n_layers: int,
    results: Sequence[LayerResult],
    rows: Sequence[Mapping[str, Any]],
    best: LayerResult,
    details: Mapping[str, Any],
) -> Directions:
    """
    The directions with all that is known of them. `rows`: those of scores.jsonl. Layers without a direction are absent.
    """
    config, contrast = source.config, source.contrast
    present = [result for result in results if result.directions is not None]
    k, d_model = present[0].directions.shape
    vectors = np.zeros((n_layers, k, d_model), dtype=np.float32)
    for result in present:
        vectors[result.layer] = result.directions.numpy()
    metadata = DirectionsMetadata(
        model_id=config.model_id,
        model_fingerprint=facts["model_fingerprint"],
        adapter_fingerprint=facts["adapter_fingerprint"],
        hook_point=config.hook_point,
        token_position=config.token_position,
        method=config.method,
        best_layer=best.layer,
        scores={name: _by_layer(rows, name, n_layers) for name in SCORES},
        activation_norms=_over_layers({r.layer: round_measured(r.activation_norm) for r in results}, n_layers),
        percentiles={name: _percentiles(present, name, n_layers) for name in ("target", "control")},
        target_sha256=_content(contrast.target),
        control_sha256=_content(contrast.control),
        split_sha256=sha256_of(sorted(source.held)),
        prompts_sha256=sorted({prompt_sha256(example.text) for example in source.examples}),
        details=dict(details),
    )
    return Directions(directions=vectors, layers_present=tuple(result.layer for result in present), metadata=metadata)


def _over_layers(values: Mapping[int, Any], n_layers: int) -> list[Any]:
    return [values.get(layer) for layer in range(n_layers)]


def _by_layer(rows: Sequence[Mapping[str, Any]], name: str, n_layers: int) -> list[list[Any] | None]:
    found: dict[int, list[Any]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row[name])
    return _over_layers(found, n_layers)


def _percentiles(results: Sequence[LayerResult], name: str, n_layers: int) -> list[Any]:
    rounded = {
        result.layer: [[round_measured(value) for value in each] for each in result.percentiles[name]]
        for result in results
    }
    return _over_layers(rounded, n_layers)


def _content(examples: Sequence[Any]) -> str:
    return sha256_of([example.id, example.text, (example.row or {}).get("response")] for example in examples)


def import_file(config: DirectionSettings, facts: Mapping[str, Any], n_layers: int, d_model: int) -> Directions:
    """The directions of --import_path. Raises InputError as `import_directions`, and for another width."""
    found = import_directions(
        config.import_path, model_id=config.model_id, model_fingerprint=facts["model_fingerprint"], n_layers=n_layers,
        adapter_fingerprint=facts["adapter_fingerprint"], hook_point=config.hook_point,
    )  # fmt: skip
    if found.d_model != d_model:
        raise InputError(
            f"{config.import_path}: its vectors have {found.d_model} coordinates and the model's hidden states "
            f"{d_model}; is the file of another model?"
        )
    return found


def export_all(folder: Path, directions: Directions, formats: Sequence[str]) -> dict[str, str]:
    """Writes the directions in each format; file name → what it is. Raises InputError as `export_directions`."""
    written = {}
    for name in formats:
        path = folder / f"directions.{name}"
        if name == "gguf":
            export_directions(path, _for_gguf(directions))
            first = f", the first of {directions.k} of each layer" if directions.k > 1 else ""
            written[path.name] = f"control vectors for llama.cpp and repeng{first}"
        else:
            export_directions(path, directions)
            written[path.name] = {"npz": "the directions for NumPy", "pt": "the directions for PyTorch"}[name]
    return written


def _for_gguf(directions: Directions) -> Directions:
    if directions.layers_present == (0,):
        raise InputError("--export gguf: a control vector cannot hold layer 0, and there is no other layer")
    if 0 not in directions.layers_present:
        return directions
    LOGGER.info("A GGUF control vector cannot hold layer 0: it is left out of the .gguf file")
    vectors = directions.directions.copy()
    vectors[0] = 0
    metadata = directions.metadata
    if metadata.best_layer == 0:
        metadata = metadata.model_copy(update={"best_layer": None})
    return replace(directions, directions=vectors, layers_present=directions.layers_present[1:], metadata=metadata)
