"""
Directions of other tools: repeng and llama.cpp control vectors (.gguf), NumPy (.npz) and PyTorch (.pt) files.

In a GGUF control vector `direction.14` belongs to the output of decoder block 14 counted from 0, which is layer 14
here: repeng fits it on `hidden_states[15]` and adds it to the output of `layers[14]`; llama.cpp adds it after block 14.
Only block 0 can have none. The vectors of other tools need not be of length 1 and carry neither model nor layer count.
"""

import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from src.common.directions_file import Directions, DirectionsMetadata, HookPoint
from src.common.errors import InputError
from src.common.files import open_atomic
from src.common.row_files import require_file

if TYPE_CHECKING:
    import numpy as np

LOGGER = logging.getLogger(__name__)

FORMATS = (".gguf", ".npz", ".pt")
LAYER_NAME = re.compile(r"(?:direction\.|layer[._ ]?)?(\d+)")


def import_directions(
    path: str | Path,
    *,
    model_id: str,
    model_fingerprint: str,
    n_layers: int,
    adapter_fingerprint: str | None = None,
    hook_point: HookPoint = "resid_post",
    token_position: str = "unknown",
) -> Directions:
    """
    Directions from a .gguf, .npz or .pt file, for the model that is named.

    An .npz or .pt file holds an array `directions`, or, as .pt, is one: (n_layers, d_model) or (n_layers, k, d_model),
    a layer of zeros counting as absent; or it has one vector (d_model,) or (k, d_model) a layer, under the layer's
    number, `layer_14` or `direction.14`. Vectors are made unit vectors; the norms they had are kept in the metadata as
    `imported_norms` and logged. Raises InputError: no such file, another format, damaged, a pickle that would run code,
    no vectors, wrong shapes, NaN or infinity, a zero vector, a layer out of range.
    """
    path = Path(path)
    require_file(path)
    match path.suffix.lower():
        case ".gguf":
            vectors, details = _read_gguf(path)
        case ".npz":
            vectors, details = _by_layer(path, _read_npz(path), n_layers), {}
        case ".pt":
            vectors, details = _by_layer(path, _read_pt(path), n_layers), {}
        case _:
            raise InputError(f"{path}: not a format to import; expected {', '.join(FORMATS)}")
    directions, norms = _unit(path, vectors, n_layers)
    metadata = DirectionsMetadata(
        model_id=model_id, model_fingerprint=model_fingerprint, adapter_fingerprint=adapter_fingerprint,
        hook_point=hook_point, token_position=token_position,
        method=f"imported from {path.suffix.lower()[1:]}", imported_norms=norms, details=details,
    )  # fmt: skip
    _log_norms(path, [norm for layer in norms if layer for norm in layer])
    return Directions(directions=directions, layers_present=tuple(sorted(vectors)), metadata=metadata, source=str(path))


def export_directions(path: str | Path, directions: Directions, k_index: int = 0) -> None:
    """
    The unit vectors to a .gguf (one a layer, that of `k_index`), .npz or .pt file (all), whole or not at all.

    Raises InputError for another format, a k_index out of range, and for .gguf when layer 0 is present, which a control
    vector cannot have, or when the vectors are not those of the residual stream after a block.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".gguf":
            _write_gguf(path, directions, k_index)
        case ".npz":
            _write_npz(path, directions)
        case ".pt":
            _write_pt(path, directions)
        case _:
            raise InputError(f"{path}: not a format to export to; expected {', '.join(FORMATS)}")


def _unit(path: Path, vectors: dict[int, "np.ndarray"], n_layers: int) -> tuple["np.ndarray", list[list[float] | None]]:
    """float32 (n_layers, k, d_model), and each layer's norms before. `vectors`: layer → (k, d_model)."""
    import numpy as np

    if not vectors:
        raise InputError(f"{path}: no vectors in it")
    for layer, rows in vectors.items():
        place = f"{path}: layer {layer}"
        if not 0 <= layer < n_layers:
            raise InputError(f"{place}: the model's layers are 0 to {n_layers - 1}; is the file of another model?")
        if rows.shape != next(iter(vectors.values())).shape or rows.ndim != 2 or 0 in rows.shape:
            raise InputError(f"{place}: a vector of shape {rows.shape}; expected (k, d_model), the same in all layers")
        if not np.isfinite(rows).all():
            raise InputError(f"{place}: the vector holds NaN or infinity")
        if not np.linalg.norm(rows, axis=-1).all():
            raise InputError(f"{place}: a vector of zeros; leave the layer out")
    directions = np.zeros((n_layers, *next(iter(vectors.values())).shape), dtype=np.float32)
    norms: list[list[float] | None] = [None] * n_layers
    for layer, rows in vectors.items():
        lengths = np.linalg.norm(rows, axis=-1)
        directions[layer], norms[layer] = rows / lengths[:, None], lengths.tolist()
    return directions, norms


def _log_norms(path: Path, norms: list[float]) -> None:
    if all(abs(norm - 1) < 1e-6 for norm in norms):
        return
    LOGGER.warning(
        "%s: its vectors had norms %.4g to %.4g and are now unit vectors, so a coefficient means another strength than "
        "in the tool they come from: multiply it by the norm, kept as imported_norms",
        path, min(norms), max(norms),
    )  # fmt: skip


def _by_layer(path: Path, value: Any, n_layers: int) -> dict[int, "np.ndarray"]:
    """Layer → float64 (k, d_model), from an array over layers or a dictionary of arrays."""
    import numpy as np

    if isinstance(value, dict) and "directions" in value:
        value = value["directions"]
    if isinstance(value, dict):
        rows = {_layer(path, name): _array(path, name, vector) for name, vector in value.items()}
        if len(rows) < len(value):
            raise InputError(f"{path}: a layer twice in {list(value)}")
        return {layer: each[None] if each.ndim == 1 else each for layer, each in rows.items()}
    array = _array(path, "directions", value)
    if array.ndim not in (2, 3) or array.shape[0] != n_layers:
        hint = "; is the first row the embedding's? leave it out" if array.shape[:1] == (n_layers + 1,) else ""
        expected = f"({n_layers}, d_model) or ({n_layers}, k, d_model), a row a layer of the model"
        raise InputError(f"{path}: an array of shape {array.shape}; expected {expected}{hint}")
    array = array[:, None] if array.ndim == 2 else array
    return {layer: rows for layer, rows in enumerate(array) if np.any(rows)}


def _array(path: Path, name: object, value: Any) -> "np.ndarray":
    import numpy as np

    # By its methods, since torch is imported for .pt files only.
    is_tensor = hasattr(value, "is_floating_point")
    if is_tensor and value.is_floating_point() and not (value.is_sparse or value.is_meta):
        value = value.detach().double().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise InputError(f"{path}: {name} is not an array of floats; expected vectors by layer")
    return value.astype(np.float64)


def _layer(path: Path, name: object) -> int:
    found = LAYER_NAME.fullmatch(str(name))
    if isinstance(name, bool) or not found:
        raise InputError(f"{path}: a key {name!r}; expected `directions`, or layers such as 14, layer_14, direction.14")
    return int(found[1])


def _damaged(path: Path, what: str, error: Exception) -> NoReturn:
    raise InputError(f"{path}: not a {what} file or damaged ({type(error).__name__}: {error})") from error


def _read_gguf(path: Path) -> tuple[dict[int, "np.ndarray"], dict[str, Any]]:
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name.count(".") == 1}
        tensors = {t.name: gguf.dequantize(np.array(t.data), t.tensor_type) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError, MemoryError) as error:
        _damaged(path, "GGUF", error)
    architecture = fields.get("general.architecture")
    if architecture != "controlvector":
        raise InputError(f"{path}: a GGUF file of architecture {architecture!r}; expected 'controlvector'")
    named = {name: array for name, array in tensors.items() if re.fullmatch(r"direction\.\d+", name)}
    vectors = {_layer(path, name): array.astype(np.float64)[None] for name, array in named.items()}
    if 0 in vectors:
        raise InputError(f"{path}: has direction.0, which control vectors cannot have; are its layers numbered anew?")
    return vectors, {"model_hint": fields.get("controlvector.model_hint")}


def _write_gguf(path: Path, directions: Directions, k_index: int) -> None:
    import gguf

    if 0 in directions.layers_present:
        raise InputError(f"{path}: a GGUF control vector cannot hold layer 0; leave it out, or export to .npz")
    if directions.metadata.hook_point != "resid_post":
        raise InputError(f"{path}: a GGUF control vector is added to resid_post, not {directions.metadata.hook_point}")
    # The writer takes a path of its own; only the finished bytes get the name.
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(written, "controlvector")
        writer.add_string("controlvector.model_hint", directions.metadata.model_id)
        writer.add_uint32("controlvector.layer_count", len(directions.layers_present))
        for layer in directions.layers_present:
            writer.add_tensor(f"direction.{layer}", directions.vector(layer, k_index))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = written.read_bytes()
    with open_atomic(path, "wb") as file:
        file.write(data)


def _read_npz(path: Path) -> dict[str, "np.ndarray"]:
    import zipfile

    import numpy as np

    try:
        # Without allow_pickle an array of objects, which could run code, raises ValueError.
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name != "layers_present"}
    except (ValueError, EOFError, KeyError, AttributeError, NotImplementedError, OSError, zipfile.BadZipFile) as error:
        _damaged(path, "NumPy .npz", error)


def _write_npz(path: Path, directions: Directions) -> None:
    import numpy as np

    with open_atomic(path, "wb") as file:
        np.savez(file, directions=directions.directions, layers_present=np.array(directions.layers_present))


def _read_pt(path: Path) -> Any:
    import pickle

    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, or is damaged; a pickle can run code and is not opened. "
            "Save a tensor or a dictionary of tensors with torch.save"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, OSError) as error:
        _damaged(path, "PyTorch .pt", error)
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if name != "layers_present"}
    return value


def _write_pt(path: Path, directions: Directions) -> None:
    import torch

    tensors = {"directions": torch.from_numpy(directions.directions.copy())}
    with open_atomic(path, "wb") as file:
        torch.save({**tensors, "layers_present": torch.tensor(directions.layers_present)}, file)
