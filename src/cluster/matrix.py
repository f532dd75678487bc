"""The design matrix: every combination of the factors, and the runs that each step has for them."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.cluster.spec import REFERENCE, SEED, Experiment, Scalar, Step
from src.common.errors import InputError
from src.common.run_names import name_of

RUNS = "runs"
"""Folder of the runs: runs/<step>/<name>."""
Cell = dict[str, Scalar]
"""Factor → value."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A line of runs.jsonl."""

    id: str
    name: str
    step: str
    factors: Cell
    command: list[str]
    """The command's name and its flags, without what runs it."""
    folder: str
    after: list[str]
    """Ids of the runs that it waits for."""
    resources: dict[str, Any]

    def as_row(self) -> dict[str, Any]:
        """The line, id first."""
        return asdict(self)


def cells(experiment: Experiment) -> list[Cell]:
    """The combinations of all factors and seeds that are not excluded, the last factor changing fastest."""
    grouped = {name: group for group in experiment.zipped for name in group}
    axes: dict[tuple[str, ...], list[tuple[Scalar, ...]]] = {}
    for name in experiment.factors:
        names = grouped.get(name, (name,))
        axes.setdefault(names, list(zip(*(experiment.factors[each] for each in names), strict=True)))
    if experiment.seeds:
        axes[(SEED,)] = [(seed,) for seed in experiment.seeds]
    found = []
    for values in itertools.product(*axes.values()):
        cell = {name: value for names, some in zip(axes, values, strict=True)
                for name, value in zip(names, some, strict=True)}  # fmt: skip
        if not any(_agrees(cell, some) for some in experiment.exclude):
            found.append(cell)
    if not found:
        raise InputError("exclude: it leaves no combination of the factors")
    return found


def _agrees(cell: Cell, some: Mapping[str, Scalar]) -> bool:
    return all(name in cell and type(cell[name]) is type(value) and cell[name] == value for name, value in some.items())


def used_factors(experiment: Experiment, name: str) -> list[str]:
    """The factors on which a step's results depend: its own, those in its flags, and those of the steps before it."""
    step = experiment.steps[name]
    own = {*step.factors, *(step.references() & {*experiment.factors, SEED})}
    if step.seeds and experiment.seeds:
        own.add(SEED)
    for other in experiment.before(name):
        own |= set(used_factors(experiment, other))
    return [factor for factor in (*experiment.factors, SEED) if factor in own]


def planned_runs(experiment: Experiment, folder: Path) -> list[PlannedRun]:
    """All runs, steps in an order in which each comes after what it waits for."""
    found: list[PlannedRun] = []
    by_place: dict[tuple[str, str], PlannedRun] = {}
    design = cells(experiment)
    for name in experiment.in_order():
        step, used = experiment.steps[name], used_factors(experiment, name)
        taken: set[str] = set()
        for cell in {_key(each, used): each for each in design}.values():
            own = {factor: cell[factor] for factor in used}
            before = [by_place[other, _key(cell, used_factors(experiment, other))] for other in experiment.before(name)]
            identity = f"{name} {_key(own, used)}"
            run_name = name_of(identity, taken)
            taken.add(run_name)
            place = str(run_folder(folder, name, run_name))
            run = PlannedRun(
                id=hashlib.sha256(identity.encode()).hexdigest()[:16], name=run_name, step=name, factors=own,
                command=_command(step, own, {each.step: each.folder for each in before}, place, bool(experiment.seeds)),
                folder=place, after=[each.id for each in before], resources=step.resources.model_dump(mode="json"),
            )  # fmt: skip
            by_place[name, _key(own, used)] = run
            found.append(run)
    return found


def run_folder(folder: Path, step: str, name: str) -> Path:
    """Where a run of an experiment writes."""
    return folder / RUNS / step / name


def _key(cell: Cell, names: Sequence[str]) -> str:
    return json.dumps({name: cell[name] for name in names}, ensure_ascii=False)


def _command(step: Step, cell: Cell, folders: Mapping[str, str], output_dir: str, has_seeds: bool) -> list[str]:
    values = {**cell, **folders}
    words = [step.command]
    for flag, value in step.flags.items():
        words += _flag(flag, [_filled(item, values) for item in (value if isinstance(value, list) else [value])])
    for factor in step.factors:
        words += _flag(factor, [_word(cell[factor])])
    if step.seeds and has_seeds:
        words += _flag(SEED, [_word(cell[SEED])])
    return [*words, *_flag("output_dir", [output_dir])]


def _filled(value: Scalar, values: Mapping[str, Scalar]) -> str:
    if not isinstance(value, str):
        return _word(value)
    return REFERENCE.sub(lambda match: "$" if match[2] is None else _word(values[match[2]]), value)


def _word(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(name: str, words: Sequence[str]) -> list[str]:
    # A word that looks like a flag is its value only behind an equals sign.
    if any(word.startswith("--") for word in words):
        return [f"--{name}={word}" for word in words]
    return [f"--{name}", *words]
