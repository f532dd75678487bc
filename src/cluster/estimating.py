"""What an experiment will take, from earlier runs where there are any, and from the models' sizes otherwise."""

import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cluster.matrix import PlannedRun
from src.cluster.spec import Experiment
from src.common.errors import InputError
from src.common.run_folder import CONFIG, DONE, PROVENANCE, read_run

FREE_DISK_GB = 20.0
"""Beside twice each model: results, checkpoints, logs."""
MEMORY_FACTOR, MEMORY_BASE_GB = 1.5, 2.0
"""Of the stored weights, and of Python with torch."""
Models = frozenset[str]
DEPTH = 6
"""Folders below the one that is searched for earlier runs."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Of one run of a step."""

    step: str
    n_runs: int
    seconds: float | None
    """Median of earlier runs of the same command and base model."""
    memory_gb: float | None
    """Most of earlier runs; without any, 1.5 × the stored weights + 2 GB."""
    n_earlier: int


def estimate_steps(runs: Sequence[PlannedRun], history: Path) -> list[StepEstimate]:
    """One estimate a step. history: a folder whose run folders are looked at."""
    earlier = earlier_runs(history)
    found = []
    for step in dict.fromkeys(run.step for run in runs):
        some = [run for run in runs if run.step == step]
        models = {_models(_flag_values(run, "model_id")) for run in some}
        known = [each for names in models for each in earlier.get((some[0].command[0], names), [])]
        sizes = [size for name in set().union(*models) if (size := stored_gb(name)) is not None]
        guessed = MEMORY_FACTOR * max(sizes) + MEMORY_BASE_GB if sizes else None
        found.append(StepEstimate(
            step=step, n_runs=len(some), n_earlier=len(known),
            seconds=statistics.median(seconds for seconds, _ in known) if known else None,
            memory_gb=max((memory for _, memory in known), default=guessed),
        ))  # fmt: skip
    return found


def disk_gb(experiment: Experiment, runs: Sequence[PlannedRun]) -> float:
    """disk_gb of the experiment, or twice the stored size of each base model that is known, and 20 GB."""
    if experiment.disk_gb is not None:
        return experiment.disk_gb
    models = set().union(*(_models(_flag_values(run, "model_id")) for run in runs))
    return 2 * sum(stored_gb(model) or 0.0 for model in models) + FREE_DISK_GB


def refuse_full_disk(folder: Path, needed_gb: float) -> None:
    """Raises InputError where the disk of a folder has less room than that."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        raise InputError(
            f"{folder}: {free:.1f} GB are free on its disk, and the experiment may take {needed_gb:.1f}; make room, or "
            f"plan again with another --output_dir or with disk_gb in the experiment's file"
        )


def stored_gb(name: str) -> float | None:
    """Weights of a base model as stored; None for one that is not on this machine."""
    from src.models.bundled import PREFIX, bundled_folder

    folder = bundled_folder(name) if name.startswith(PREFIX) else Path(name)
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(file.stat().st_size for file in files) / 1e9 if files else None


def earlier_runs(folder: Path) -> Mapping[tuple[str, Models], list[tuple[float, float]]]:
    """(command, base models) → seconds and GB of memory of every finished run below a folder."""
    found: dict[tuple[str, Models], list[tuple[float, float]]] = defaultdict(list)
    for run in _run_folders(folder):
        try:
            config, provenance = read_run(run)
        except InputError:
            # Being written, or somebody else's.
            continue
        ended = [each for each in provenance["sessions"] if each.get("seconds") is not None]
        if ended:
            memory = max(max(each["peak_memory_mib"].values()) for each in ended) * 2**20 / 1e9
            key = (config["command"], _models(config["config"].get("model_id")))
            found[key].append((sum(each["seconds"] for each in ended), memory))
    return found


def _run_folders(folder: Path) -> Iterator[Path]:
    root = len(folder.parts)
    for place, folders, files in os.walk(folder):
        if DONE in files and CONFIG in files and PROVENANCE in files:
            yield Path(place)
        if len(Path(place).parts) - root >= DEPTH:
            folders.clear()


def _models(references: Any) -> Models:
    """The base models of references, as a setting holds them: one, several, none."""
    from src.models.hub import split_reference

    some = references if isinstance(references, list) else [references]
    return frozenset(split_reference(each)[0] for each in some if isinstance(each, str) and each)


def _flag_values(run: PlannedRun, name: str) -> list[str]:
    found, is_open = [], False
    for word in run.command:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            is_open = flag == f"--{name}"
            found += [value] if is_open and equals else []
        elif is_open:
            found.append(word)
    return found
