"""What an experiment need not keep: checkpoints, which are only for going on."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from src.common.run_folder import DONE

CHECKPOINTS = "checkpoints"
"""A folder of this name in a finished run holds nothing but them."""


def checkpoints(folders: Iterable[Path]) -> list[Path]:
    """The checkpoint folders of runs that have finished: one that has not needs its own."""
    return [folder / CHECKPOINTS for folder in folders if (folder / DONE).exists() and (folder / CHECKPOINTS).is_dir()]


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def remove(folders: Sequence[Path]) -> None:
    """Remove them."""
    for folder in folders:
        shutil.rmtree(folder)
