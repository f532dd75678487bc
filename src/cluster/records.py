"""What an experiment's folder holds of its plan and of what was submitted, and the lock that one process has on it."""

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from src.cluster.matrix import PlannedRun, run_folder
from src.common.errors import InputError
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail
from src.common.run_folder import LOCK, lock_folder
from src.common.sources import nearest

PLAN, JOBS, SPEC, SCRIPTS, LOGS = "runs.jsonl", "jobs.jsonl", "experiment.toml", "jobs", "logs"
CLUSTER = Path("hpc/cluster.toml")
CLUSTER_KEYS = {
    "account": str, "partition": str, "constraint": str, "cache_dir": str, "environment": list, "container": list,
    "runner": list,
}  # fmt: skip
"""Those of hpc/cluster_settings.sh."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A line of jobs.jsonl: one start of one run, as a task of an array or as a process."""

    id: str
    """The run's."""
    task: str | None
    """SLURM's, as 123_4; None for a process of `submit --local`."""
    submitted: str
    log: str
    pid: int | None = None
    """Of such a process."""
    host: str | None = None
    """Where it is."""


def read_plan(folder: Path) -> list[PlannedRun]:
    """
    The runs of a planned experiment, their folders below this one: it may have been moved or copied since, and what is
    where it was planned may be another experiment. Raises InputError where there is no plan.
    """
    if not (folder / PLAN).exists():
        raise InputError(f"{folder}: it has no {PLAN}; run `src.experiment plan experiment.toml --output_dir …` first")
    runs = [PlannedRun(**row) for _, row in read_jsonl(folder / PLAN)]
    return [replace(run, folder=str(run_folder(folder, run.step, run.name))) for run in runs]


def refuse_moved(folder: Path) -> None:
    """Raises InputError where the commands of a plan would write into another folder than the plan's."""
    for _, row in read_jsonl(folder / PLAN):
        here = run_folder(folder, row["step"], row["name"])
        if Path(row["folder"]).resolve() != here.resolve():
            raise InputError(
                f"{folder}: its commands write to {row['folder']}, where it was planned; move it back, or plan again "
                f"with this --output_dir (what has finished here can be looked at and summarized as it is)"
            )


def read_submitted(folder: Path) -> dict[str, Submitted]:
    """Run id → how it was started last."""
    path = folder / JOBS
    rows = read_jsonl(path, in_progress=True) if path.exists() else ()
    return {row["id"]: Submitted(**row) for _, row in rows}


def add_submitted(folder: Path, rows: Sequence[Submitted]) -> None:
    """Append what was just started; on the disk when it returns."""
    repair_torn_tail(folder / JOBS)
    with JsonlWriter(folder / JOBS) as file:
        for row in rows:
            file.write(asdict(row))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process: two that submit at once would submit twice."""
    (folder / LOCK).open("a").close()
    lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.close()


def cluster_settings(root: Path) -> dict[str, Any]:
    """
    hpc/cluster.toml; empty where there is none. Raises InputError where it cannot be read, and for what the jobs, which
    read it themselves, would refuse only when they run.
    """
    path = root / CLUSTER
    if not path.exists():
        return {}
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    for name, value in settings.items():
        if name not in CLUSTER_KEYS:
            raise InputError(f"{path}: unknown key {name!r}; the nearest is {nearest(name, CLUSTER_KEYS)!r}")
        if not _is_right(value, CLUSTER_KEYS[name]):
            expected = "a text" if CLUSTER_KEYS[name] is str else "a list of texts"
            raise InputError(f"{path}: {name} is {value!r}; expected {expected}")
    return settings


def _is_right(value: Any, kind: type) -> bool:
    items = value if kind is list and isinstance(value, list) else [value]
    return isinstance(value, kind) and all(isinstance(item, str) for item in items)
