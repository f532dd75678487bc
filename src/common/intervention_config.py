"""The settings of every command that steers: which interventions act, and what the answers are projected on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.common.settings import setting

if TYPE_CHECKING:
    from src.common.interventions import Entry


@dataclass(kw_only=True)
class InterventionConfigBase(EngineConfigBase):
    """Interventions"""

    steer: list[str] | None = None
    """FILE:LAYERS:COEFFICIENT: add a file's directions to the hidden states of LAYERS (14, 8-12, 8,12, all or best), at
    all positions; several act together."""
    interventions_path: Path | None = None
    """An interventions spec, a JSON list, in place of --steer."""
    project_onto: str | None = None
    """FILE:LAYER: the mean projection of each response on the file's direction at LAYER (a number or best), after any
    intervention there, as the column mean_projection."""
    allow_model_mismatch: bool = setting(False, affects_rows=False)
    """Take directions of another model of the same shape."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steer is not None and self.interventions_path is not None:
            raise InputError("--steer and --interventions_path exclude each other; write all entries into the spec")
        if self.steer is not None and not self.steer:
            raise InputError("--steer is empty; expected FILE:LAYERS:COEFFICIENT, or leave it out")

    @property
    def projects(self) -> bool:
        """Whether hidden states are measured."""
        return self.project_onto is not None

    def entries(self) -> "list[Entry]":
        """The interventions as they are written. Raises InputError for a bad spec file or --steer."""
        from src.common.interventions import parse_steer, read_interventions

        if self.interventions_path is not None:
            return read_interventions(self.interventions_path)
        return [parse_steer(text) for text in self.steer or []]

    def projection_entry(self) -> "Entry | None":
        """--project_onto as an entry whose operation is not used. Raises InputError for another form."""
        return None if self.project_onto is None else parse_projection(self.project_onto)

    def checked_entries(self) -> "list[Entry]":
        """
        `entries`, after everything was tried that can be without a model. Raises InputError for a bad spec, directions
        file, layer, percentile or projection.
        """
        entries, projection = self.entries(), self.projection_entry()
        if self.interventions_path is not None:
            try_entries(entries, f"{self.interventions_path}: ")
        for text, each in zip(self.steer or [], entries, strict=False):
            with naming(f"--steer {text}"):
                try_entries([each])
        if projection:
            with naming(f"--project_onto {self.project_onto}"):
                try_entries([projection])
        return entries

    def intervention_files(self) -> list[Path]:
        """The spec and every directions file that it or a flag names: their content decides the rows."""
        projection = self.projection_entry()
        paths = [self.interventions_path] if self.interventions_path else []
        for each in [*self.entries(), *([projection] if projection else [])]:
            paths += [Path(each.directions_path), *([Path(each.when.directions_path)] if each.when else [])]
        return list(dict.fromkeys(paths))


def try_entries(entries: "list[Entry]", prefix: str = "") -> None:
    """Resolve entries for a model of the first one's shape. Raises InputError that begins with `prefix`."""
    from src.common.directions_file import read_directions
    from src.common.resolved_interventions import resolve

    shape = read_directions(entries[0].directions_path)
    try:
        resolve(
            entries, n_layers=shape.n_layers, d_model=shape.d_model, model_fingerprint=None, allow_model_mismatch=True
        )
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Within the context an InputError about a single entry begins with `place` instead of the entry's number."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {str(error).removeprefix('entry 1: ')}") from error


def parse_projection(text: str) -> "Entry":
    """The entry of `--project_onto FILE:LAYER`. FILE may itself hold colons. Raises InputError for another form."""
    from src.common.interventions import entry

    path, colon, layer = text.rpartition(":")
    if not colon or not path or not (layer == "best" or (layer.isascii() and layer.isdigit())):
        raise InputError(f"--project_onto {text}: expected FILE:LAYER, for example directions.safetensors:14")
    return entry({"directions_path": path, "layers": layer, "op": "ablate"}, f"--project_onto {text}")
