"""
The directions file: unit vectors of a model's layers, with where they come from. safetensors: the tensors `directions`
float32 (n_layers, k, d_model) and `layers_present` int64, and one JSON text of metadata under the key `tiller`.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.common.errors import InputError
from src.common.files import encode_json, open_atomic
from src.common.row_files import require_file

if TYPE_CHECKING:
    import numpy as np

HookPoint = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
HOOK_POINTS: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""In the order in which a forward pass reaches them within one layer."""
PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
CLASSES = ("target", "control")
METADATA_KEY = "tiller"
VERSION = 1
UNIT_TOLERANCE = 1e-3
STORED = {"directions": "F32", "layers_present": "I64"}
"""The tensors of a file, and their dtypes as safetensors names them."""
PERCENTILE_SYNTAX = re.compile(r"(?:(target|control):)?p(\d+)")

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class DirectionsMetadata(BaseModel):
    """What is known of the directions; lists over layers have n_layers entries, None where a layer is absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_id: Text
    model_fingerprint: Text
    """As src/models/fingerprint.py makes it."""
    adapter_fingerprint: str | None = None
    """The adapter's, when the hidden states were those of a model with one."""
    hook_point: HookPoint
    """Where the hidden states were read."""
    token_position: Text
    """Which token's, or the mean over which."""
    method: Text
    """The estimator."""
    best_layer: int | None = None
    scores: dict[str, list[Any]] = {}
    """Name of a score → one value, or list of k values, a layer."""
    activation_norms: list[Number | None] | None = None
    """Mean Euclidean norm of the hidden states of each layer."""
    percentiles: dict[Literal["target", "control"], list[list[list[Number]] | None]] | None = None
    """Class → layer → k → the projection's percentiles p0, p1, p5, p10, p25, p50, p75, p90, p95, p99, p100."""
    target_sha256: str | None = None
    control_sha256: str | None = None
    split_sha256: str | None = None
    """Of both prompt sets, and of the split into those fitted and those held out."""
    prompts_sha256: list[str] | None = None
    """`prompt_sha256` of every prompt that took part, fitted, held out or preserved, rising; None where unknown."""
    imported_norms: list[list[Number] | None] | None = None
    """Layer → k → the norm that an imported vector had before it was made a unit vector."""
    details: dict[str, Any] = {}
    """Anything else worth keeping, as JSON."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """One directions file. Raises InputError when its parts do not fit together; absent layers are rows of zeros."""

    directions: "np.ndarray"
    """float32 (n_layers, k, d_model), unit vectors."""
    layers_present: tuple[int, ...]
    metadata: DirectionsMetadata
    source: str = "directions"
    """Named in error messages: the file's path."""

    def __post_init__(self) -> None:
        _check_vectors(self.source, self.directions, self.layers_present)
        _check_metadata(self.source, self.metadata, self.directions.shape, self.layers_present)

    @property
    def n_layers(self) -> int:
        return self.directions.shape[0]

    @property
    def k(self) -> int:
        return self.directions.shape[1]

    @property
    def d_model(self) -> int:
        return self.directions.shape[2]

    def vector(self, layer: int, k_index: int = 0) -> "np.ndarray":
        """
        The unit vector of a layer, float32 (d_model,), normalised once more in float64: what is stored may be off by
        up to 1e-3. Raises InputError for a layer that is absent or out of range, and for a k_index out of range.
        """
        import numpy as np

        self._require(layer, k_index)
        stored = self.directions[layer, k_index].astype(np.float64)
        return (stored / np.linalg.norm(stored)).astype(np.float32)

    def percentile(self, layer: int, k_index: int, name: str) -> float:
        """
        A percentile of the projection of hidden states on the direction: "p25" or "target:p25" over the target class,
        "control:p25" over the control class. Raises InputError for another name, and when the file does not keep it.
        """
        self._require(layer, k_index)
        found = PERCENTILE_SYNTAX.fullmatch(name)
        if not found or int(found[2]) not in PERCENTILES:
            known = ", ".join(f"p{p}" for p in PERCENTILES)
            raise InputError(f"percentile {name!r}: expected one of {known}, perhaps after target: or control:")
        layers = (self.metadata.percentiles or {}).get(found[1] or "target")
        values = layers[layer] if layers else None
        if values is None:
            raise InputError(
                f"{self.source}: keeps no percentiles of layer {layer} for {name!r}; give a number instead"
            )
        return values[k_index][PERCENTILES.index(int(found[2]))]

    def _require(self, layer: int, k_index: int) -> None:
        if layer not in self.layers_present:
            raise InputError(f"{self.source}: has no direction for layer {layer}; it has {shown(self.layers_present)}")
        if not 0 <= k_index < self.k:
            raise InputError(f"{self.source}: k_index {k_index}; it has {self.k} directions a layer, from 0")


def prompt_sha256(text: str) -> str:
    """
    The first 16 hexadecimal digits of the SHA-256 of a prompt, the same whatever its case and the white space around.
    """
    return hashlib.sha256(text.strip().casefold().encode()).hexdigest()[:16]


def write_directions(path: Path, directions: Directions) -> None:
    """Writes the file whole or not at all. Raises ValueError for NaN or infinity in scores and details."""
    import numpy as np
    from safetensors.numpy import save

    # Not mode="json", which writes NaN as null.
    text = {"version": VERSION, **directions.metadata.model_dump()}
    tensors = {
        "directions": np.ascontiguousarray(directions.directions),
        "layers_present": np.array(directions.layers_present, dtype=np.int64),
    }
    with open_atomic(path, "wb") as file:
        file.write(save(tensors, {METADATA_KEY: encode_json(text)}))


def read_directions(path: str | Path) -> Directions:
    """
    Reads a directions file. Raises InputError: no such file, not safetensors or cut short, no metadata, unknown
    version, unknown or missing fields, wrong shapes or dtypes, NaN, infinite or non-unit vectors.
    """
    from safetensors import SafetensorError, safe_open

    require_file(Path(path))
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            names = set(file.keys())
            missing = [f"tensor {n}" for n in STORED if n not in names]
            missing += [] if METADATA_KEY in header else ["metadata"]
            if missing:
                raise InputError(f"{path}: has no {' and no '.join(missing)}; expected a directions file")
            # Before they are read: NumPy knows no bfloat16.
            for name, dtype in STORED.items():
                found = file.get_slice(name).get_dtype()
                if found != dtype:
                    raise InputError(f"{path}: {name} is stored as {found}; expected {dtype}, as a directions file has")
            vectors, present = (file.get_tensor(name) for name in STORED)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file or cut short ({error}); expected a directions file") from None
    return Directions(
        directions=vectors,
        layers_present=tuple(int(layer) for layer in present.reshape(-1)),
        metadata=_metadata(path, header[METADATA_KEY]),
        source=str(path),
    )


def shown(layers: tuple[int, ...]) -> str:
    """Layers in a few characters: `0-11, 14`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _metadata(path: str | Path, text: str) -> DirectionsMetadata:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.pop("version", None) != VERSION:
        raise InputError(f"{path}: its metadata is not of version {VERSION}; extract the directions again")
    try:
        return DirectionsMetadata.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: metadata {field}: {first['msg']}; expected a directions file") from None


def _check_vectors(source: str, directions: "np.ndarray", present: tuple[int, ...]) -> None:
    import numpy as np

    if directions.ndim != 3 or directions.dtype != np.float32 or 0 in directions.shape:
        found = f"{directions.dtype} {directions.shape}"
        raise InputError(f"{source}: directions are {found}; expected float32 (n_layers, k, d_model)")
    n_layers = directions.shape[0]
    if not present or list(present) != sorted(set(present)) or present[0] < 0 or present[-1] >= n_layers:
        raise InputError(f"{source}: layers_present is {list(present)}; expected rising layers of 0 to {n_layers - 1}")
    norms = np.linalg.norm(directions.astype(np.float64), axis=-1)
    for layer in range(n_layers):
        for index, norm in enumerate(norms[layer].tolist()):
            place = f"{source}: layer {layer}, k_index {index}"
            if layer not in present and norm != 0:
                raise InputError(f"{place}: a vector of norm {norm} in a layer that is said to be absent")
            if layer in present and not math.isfinite(norm):
                raise InputError(f"{place}: the vector holds NaN or infinity; extract the directions again")
            if layer in present and abs(norm - 1) > UNIT_TOLERANCE:
                raise InputError(f"{place}: the vector's norm is {norm:.6g}; expected a unit vector (import makes one)")


def _check_metadata(
    source: str, metadata: DirectionsMetadata, shape: tuple[int, ...], present: tuple[int, ...]
) -> None:
    n_layers, k, _ = shape
    if metadata.best_layer is not None and metadata.best_layer not in present:
        raise InputError(
            f"{source}: metadata best_layer is {metadata.best_layer}, which is not one of {shown(present)}"
        )
    classes = metadata.percentiles or {}
    over_layers: dict[str, list[Any] | None] = {
        "activation_norms": metadata.activation_norms,
        "imported_norms": metadata.imported_norms,
        **{f"percentiles.{name}": layers for name, layers in classes.items()},
        **{f"scores.{name}": values for name, values in metadata.scores.items()},
    }
    for field, values in over_layers.items():
        if values is not None and len(values) != n_layers:
            raise InputError(f"{source}: metadata {field} has {len(values)} entries; expected one a layer, {n_layers}")
    for name, layers in classes.items():
        for layer, values in enumerate(layers):
            if values is not None and [len(each) for each in values] != [len(PERCENTILES)] * k:
                raise InputError(f"{source}: metadata percentiles.{name} of layer {layer} are not {k} × 11 numbers")
            if values is not None and any(each != sorted(each) for each in values):
                raise InputError(f"{source}: metadata percentiles.{name} of layer {layer} do not rise")
