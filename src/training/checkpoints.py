"""
Checkpoints that appear whole: written beside the last one, on the disk itself, then named; only then the last one goes.
A kill or a full disk at any moment leaves one that can be gone on from.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from src.common.errors import InputError
from src.common.files import sync_files, sync_folder

FOLDER = "checkpoints"
UNFINISHED = ".unfinished"
SETTINGS = "settings.json"
NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of one run, of which the newest whole one counts."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """fingerprint: of everything that must be the same for training to go on."""
        self.folder = folder / FOLDER
        self._fingerprint = fingerprint

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest. Raises InputError where it is of another configuration."""
        found = self._whole()
        if not found:
            return None
        step, path = found[-1]
        try:
            known = json.loads((path / SETTINGS).read_text("utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: no checkpoint of this command ({error}); choose another --output_dir") from error
        if known != self._fingerprint:
            raise InputError(
                f"{path}: a checkpoint of another configuration, model or dataset; choose another --output_dir, or "
                f"remove {self.folder} to begin anew"
            )
        return step, path

    def write(self, step: int, save: Callable[[Path], None]) -> Path:
        """
        `save` writes into the folder that it is given, which then becomes the newest. Raises InputError when the disk
        is full; the newest so far stays.
        """
        scratch = self.folder / UNFINISHED
        with self.naming_full_disk(step):
            _remove(scratch)
            scratch.mkdir(parents=True)
            save(scratch)
            (scratch / SETTINGS).write_text(json.dumps({"fingerprint": self._fingerprint, "step": step}), "utf-8")
            sync_files(scratch)
        path = self.folder / f"step-{step:08d}"
        _remove(path)
        scratch.rename(path)
        sync_folder(self.folder)
        for _, older in self._whole():
            if older != path:
                _remove(older)
        return path

    @contextmanager
    def naming_full_disk(self, step: int) -> Iterator[None]:
        """Within the context a full disk is an InputError that names the checkpoint that there is."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_full(error):
                raise
            _remove(self.folder / UNFINISHED)
            kept = self._whole()
            raise InputError(
                f"{self.folder.parent}: the disk is full, so that step {step} was not saved; the checkpoint of step "
                f"{kept[-1][0] if kept else 0} is whole. Make room, then give the same command again"
            ) from error

    def clear(self) -> None:
        """No checkpoints any more: training is done."""
        _remove(self.folder)

    def _whole(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        named = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(name.group(1)), path) for name, path in named if name)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch's and safetensors' writers have errors of their own for it.
    words = ("No space left", "quota exceeded", "file write failed", "iostream error", "unexpected pos")
    chain = (error, error.__cause__, error.__context__)
    return any(word in str(each) for each in chain for word in words)


def _remove(path: Path) -> None:
    if not path.is_dir():
        return
    gone = path
    if NAME.fullmatch(path.name):
        # Another name first: a kill in the middle must not leave half of a checkpoint under its own.
        gone = path.with_name(f".old-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)
