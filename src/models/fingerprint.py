"""What identifies a model's weights, so that a direction or an adapter is never used on another model unnoticed."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from src.common.errors import InputError

EDGE_BYTES = 64 * 1024


class _StoredTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def fingerprint(folder: Path) -> str:
    """
    sha256 (hex) over the sorted tensor names, their shapes, and the first and last 64 KiB of each tensor as stored.

    `folder` holds safetensors files, of a model or of an adapter; how the tensors are spread over files does not
    matter. Raises InputError when there is no such file or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no *.safetensors file; a model folder holds its weights in that format")
    digest = hashlib.sha256()
    for tensor in sorted((t for file in files for t in _tensors(file)), key=lambda t: t.name):
        digest.update(json.dumps([tensor.name, tensor.shape]).encode())
        with tensor.file.open("rb") as stream:
            for start in (tensor.start, max(tensor.start, tensor.end - EDGE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(min(EDGE_BYTES, tensor.end - start)))
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[_StoredTensor]:
    # The format: 8 bytes little-endian length, a JSON header, the data (huggingface/safetensors README).
    with file.open("rb") as stream:
        head = stream.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= size <= file.stat().st_size - 8:
            raise InputError(f"{file}: not a safetensors file or cut short; fetch it again")
        header = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if 8 + size + end > file.stat().st_size:
                raise InputError(f"{file}: tensor {name} ends beyond the file's end; fetch it again")
            yield _StoredTensor(name, tuple(entry["shape"]), file, 8 + size + start, 8 + size + end)
