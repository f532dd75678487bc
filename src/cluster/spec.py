"""experiment.toml: a question, factors, and the steps that are run for every combination of them."""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from src.common.errors import InputError
from src.common.sources import nearest

Scalar = bool | int | float | str
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
REFERENCE = re.compile(r"\$(\$|\{([^}]*)\})")
TIME = re.compile(r"\d+|\d+:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2}){0,2}")
"""Not 2:00, which is two minutes to SLURM and two hours to many a reader."""
SEED = "seed"
"""The factor that `seeds` makes, given to every step as --seed."""
OWN_FLAGS = ("output_dir", SEED)
"""Flags that the plan sets."""


class Strict(BaseModel):
    """No key that is not known, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Resources(Strict):
    """What one run of a step is given."""

    time: str = "1:00:00"
    """SLURM's own form: minutes, hours:minutes:seconds, days-hours or days-hours:minutes:seconds."""
    gpus: int = Field(0, ge=0)
    cpus: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    nodes: int = Field(1, ge=1)
    partition: str | None = None
    constraint: str | None = None
    at_once: int | None = Field(None, ge=1)
    """Runs of the step that run side by side, at most."""
    options: tuple[str, ...] = ()
    """Further words for sbatch, as "--qos=short"."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time; expected minutes, H:MM:SS or D-H:MM:SS")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def seconds(self) -> int:
        """The time in seconds."""
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if not dash and len(parts) == 1:
            return 60 * parts[0]
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds


class Step(Strict):
    """One command, run for every combination of the factors that it depends on."""

    command: str
    factors: tuple[str, ...] = ()
    """Factors that are flags of the command, under their own names."""
    flags: dict[str, Scalar | list[Scalar]] = {}
    """Fixed flags; in text ${factor} is the factor's value, ${step} the folder of that step's run, $$ a dollar."""
    after: tuple[str, ...] = ()
    """Steps that must be done before, beside those that a flag names."""
    seeds: bool = True
    """Whether it is run for every seed, with --seed."""
    resources: Resources = Resources()

    @field_validator("factors", "after", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def references(self) -> set[str]:
        """Names that the flags refer to."""
        return {name for _, name in self._places()}

    def _places(self) -> Iterator[tuple[str, str]]:
        for flag, value in self.flags.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str):
                    yield from ((flag, match[2]) for match in REFERENCE.finditer(item) if match[2] is not None)


class Experiment(Strict):
    """A whole experiment.toml."""

    question: str
    """What it is to answer, in a sentence."""
    seeds: tuple[int, ...] = ()
    factors: dict[str, list[Scalar]] = {}
    zipped: tuple[tuple[str, ...], ...] = ()
    """Groups of factors that go together, first with first; all others are crossed."""
    exclude: tuple[dict[str, Scalar], ...] = ()
    """Combinations that are left out: those that agree with one of these in all that it names."""
    disk_gb: float | None = Field(None, ge=0)
    """Disk that it takes, where the estimate (twice each model, and 20 GB) is wrong."""
    steps: dict[str, Step]

    @field_validator("seeds", "exclude", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("zipped", mode="before")
    @classmethod
    def _as_tuples(cls, value: Any) -> Any:
        is_nested = isinstance(value, list) and all(isinstance(group, list) for group in value)
        return tuple(map(tuple, value)) if is_nested else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.steps:
            raise ValueError("no step; expected [steps.NAME] with a command")
        for name in (*self.factors, *self.steps):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name; expected letters, digits and _")
        both = sorted({*self.factors, SEED} & set(self.steps))
        if both or SEED in self.factors:
            raise ValueError(f"{(both or [SEED])[0]!r} names two things; seeds are `seeds = [0, 1]`")
        for name, levels in self.factors.items():
            if not levels or len({(type(level), level) for level in levels}) < len(levels):
                raise ValueError(f"factors.{name}: {levels}; expected at least one value, none twice")
            if not all(math.isfinite(level) for level in levels if isinstance(level, float)):
                raise ValueError(f"factors.{name}: {levels}; expected finite numbers")
        self._check_groups()
        for name, step in self.steps.items():
            self._check_step(name, step)
        self.in_order()
        return self

    def _check_groups(self) -> None:
        grouped = [name for group in self.zipped for name in group]
        for name in (*grouped, *(name for some in self.exclude for name in some if name != SEED)):
            self._known("zipped or exclude", name, self.factors)
        for some in self.exclude:
            for name, value in some.items():
                levels = self.seeds if name == SEED else self.factors[name]
                if not any(type(level) is type(value) and level == value for level in levels):
                    raise ValueError(f"exclude: {name} = {value!r} is none of its values, {list(levels)}")
        for group in self.zipped:
            lengths = {name: len(self.factors[name]) for name in group}
            if len(set(lengths.values())) > 1 or len(set(group)) < len(group):
                raise ValueError(f"zipped: {lengths}; expected different factors with equally many values")
        if len(set(grouped)) < len(grouped):
            raise ValueError("zipped: a factor is in two groups")

    def _check_step(self, name: str, step: Step) -> None:
        for factor in step.factors:
            self._known(f"steps.{name}.factors", factor, self.factors)
        for other in step.after:
            self._known(f"steps.{name}.after", other, self.steps)
        for reference in step.references():
            self._known(f"steps.{name}.flags: ${{{reference}}}", reference, {**self.factors, **self.steps, SEED: ()})
        if SEED in step.references() and not self.seeds:
            raise ValueError(f"steps.{name}.flags: ${{seed}}, and there are no `seeds`")
        taken = [flag for flag in step.flags if flag in step.factors or flag in OWN_FLAGS]
        if taken:
            raise ValueError(f"steps.{name}.flags.{taken[0]}: set by the plan or by a factor; leave it out")

    @staticmethod
    def _known(place: str, name: str, names: Mapping[str, Any]) -> None:
        if name not in names:
            told = f"the nearest is {nearest(name, names)!r}" if names else "there is none"
            raise ValueError(f"{place}: unknown {name!r}; {told}")

    def before(self, name: str) -> list[str]:
        """The steps that a step waits for, in the file's order."""
        step = self.steps[name]
        return [other for other in self.steps if other in step.after or other in step.references()]

    def in_order(self) -> list[str]:
        """The steps, each after those that it waits for. Raises ValueError for a cycle, naming it."""
        found: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"steps: a cycle: {' → '.join((*path[path.index(name) :], name))}")
            if name not in found:
                for other in self.before(name):
                    visit(other, (*path, name))
                found.append(name)

        for name in self.steps:
            visit(name, ())
        return found


def read_experiment(path: Path) -> Experiment:
    """The experiment of a TOML file. Raises InputError with the place of what is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected an experiment.toml") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        return Experiment(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("bool", "int", "float", "str"))
        words = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{path}: {place + ': ' if place else ''}{words}{more}") from error
