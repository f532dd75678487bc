"""The directions that requests may name: read once when they are registered, from given folders only."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.directions_file import Directions, read_directions
from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.intervention_fields import meant
from src.common.interventions import Entry, entry, parse_steer
from src.common.resolved_interventions import ResolvedSpec
from src.models.engine import Engine

NAME_SYNTAX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
MOST = 1000


class Outside(InputError):
    """A path that is in none of the folders."""


class Conflict(InputError):
    """A name that is taken by other directions."""


class Unknown(InputError):
    """A file or a name that is not there."""


@dataclass(frozen=True)
class Registered:
    """Directions under a name; what the file becomes later changes nothing."""

    name: str
    path: Path
    sha256: str
    directions: Directions

    def described(self) -> dict[str, Any]:
        """As JSON, for lists."""
        metadata = self.directions.metadata
        return {
            "id": self.name, "object": "directions", "path": str(self.path), "sha256": self.sha256,
            "layers_present": list(self.directions.layers_present), "best_layer": metadata.best_layer,
            "k": self.directions.k, "hook_point": metadata.hook_point, "method": metadata.method,
            "token_position": metadata.token_position, "model_id": metadata.model_id,
        }  # fmt: skip


class DirectionsRegister:
    """Directions by name, all of which fit the model."""

    def __init__(self, engine: Engine, folders: Sequence[Path], allow_model_mismatch: bool) -> None:
        """folders: where files may lie."""
        self._engine = engine
        self._allow_model_mismatch = allow_model_mismatch
        self._known: dict[str, Registered] = {}
        self._folders = [folder.resolve() for folder in folders]

    def everything(self) -> list[Registered]:
        """All of them, by name."""
        return [self._known[name] for name in sorted(self._known)]

    def register(self, name: str, path: str) -> Registered:
        """
        Directions of a file within the folders, under a new name; the same again changes nothing. Raises `Outside`,
        `Unknown`, `Conflict`, and InputError for a bad name, a file that holds no directions, and those of another
        model.
        """
        return self._add(name, self._inside(path))

    def add(self, name: str, path: Path) -> Registered:
        """`register` for a file anywhere."""
        return self._add(name, path)

    def named(self, name: str) -> Directions:
        """The directions of a name. Raises `Unknown`."""
        if name not in self._known:
            known = ", ".join(sorted(self._known)[:20]) or "none"
            raise Unknown(
                f"no directions are registered as {name[:80]!r}{meant(name, self._known)}; registered: {known}"
            )
        return self._known[name].directions

    def resolve(self, steering: Sequence[str | dict[str, Any]]) -> ResolvedSpec | None:
        """
        What `steering` of a request does, None for nothing. Raises `Unknown`, and InputError for what an interventions
        spec refuses.
        """
        entries = [_entry(each, f"steering[{i}]") for i, each in enumerate(steering)]
        for each in entries:
            self.named(each.directions_path)
            if each.when:
                self.named(each.when.directions_path)
        spec = self._engine.resolve(entries, self._allow_model_mismatch, self.named) if entries else None
        return spec if spec is not None and spec.operations else None

    def _add(self, name: str, path: Path) -> Registered:
        if not NAME_SYNTAX.fullmatch(name):
            raise InputError(f"name {name[:80]!r}: expected 1 to 64 letters, digits, points, - and _, no point first")
        if len(self._known) >= MOST:
            raise InputError(f"{MOST} directions are registered, which is the most")
        new = Registered(name, path, sha256_file(path), read_directions(path))
        # As a plain ablation of all layers, which needs every vector and no number.
        plain = Entry(directions_path=name, layers="all", op="ablate")
        self._engine.resolve([plain], self._allow_model_mismatch, lambda _: new.directions)
        # Nobody comes between here: of two who register a name at once, one is told that it is taken.
        known = self._known.setdefault(name, new)
        if known.sha256 != new.sha256:
            raise Conflict(f"name {name!r} is taken by other directions ({known.path}); choose another")
        return known

    def _inside(self, text: str) -> Path:
        """The file that a path names, links followed. Raises `Outside` for one in no folder, there or not."""
        if not text or "\0" in text:
            raise InputError(f"path {text[:80]!r}: expected that of a directions file")
        found = []
        for folder in self._folders:
            path = (folder / text).resolve()
            if path.is_relative_to(folder):
                found.append(path)
        if not found:
            where = ", ".join(map(str, self._folders)) or "none were given: --directions_dirs"
            raise Outside(f"path {text[:200]!r} is outside of the folders of directions ({where})")
        path = next((each for each in found if os.path.isfile(each)), None)
        if path is None:
            raise Unknown(f"path {text[:200]!r}: no such file; expected a directions file")
        return path


def _entry(value: str | dict[str, Any], place: str) -> Entry:
    if isinstance(value, str):
        # The words of the command line's own flag fit here too, but for what stands for a file.
        return parse_steer(value, f"{place} {value[:200]!r}")
    return entry(value, place)
