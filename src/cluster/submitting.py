"""From a plan to jobs: which runs are open, in which arrays, after what, checked by sbatch and submitted once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from src.cluster import slurm
from src.cluster.matrix import PlannedRun
from src.cluster.records import LOGS, SCRIPTS, Submitted, add_submitted, cluster_settings
from src.cluster.scripts import array_option, array_script
from src.cluster.spec import Resources
from src.cluster.states import DONE_STATE, OPEN, UNKNOWN, RunState
from src.common.errors import InputError
from src.common.files import write_text_atomic
from src.common.provenance import now


@dataclass(frozen=True, kw_only=True)
class Array:
    """Runs that are submitted together."""

    tasks: dict[int, PlannedRun]
    """Array index → run."""
    dependency: str | None
    """The word of --dependency."""


def open_runs(states: Sequence[RunState]) -> list[PlannedRun]:
    """
    The runs that are to be submitted: not done, not waiting, not running.
    Raises InputError where SLURM does not say what became of earlier ones.
    """
    unknown = [each for each in states if each.state == UNKNOWN]
    if unknown:
        raise InputError(
            f"SLURM does not answer, and {len(unknown)} runs were submitted to it before (first {unknown[0].task}): to "
            f"submit them again could run them twice; try again when `scontrol ping` answers"
        )
    return [each.run for each in states if each.state in OPEN]


def submit_all(
    folder: Path, root: Path, runs: Sequence[PlannedRun], states: Sequence[RunState], most: int | None
) -> tuple[list[Submitted], str]:
    """
    Submit `runs` step by step, at most `most` of them. Returns what was submitted, and in words why the rest was not.
    Raises InputError for a script that sbatch does not take; what was submitted before it stays, and is on record.
    """
    settings = slurm.configuration()
    largest = int(settings.get("MaxArraySize", "1001"))
    tasks = {each.run.id: each.task for each in states if each.task and each.state != DONE_STATE}
    done = {each.run.id for each in states if each.state == DONE_STATE}
    open_ids = {run.id for run in runs}
    tasks = {id_: task for id_, task in tasks.items() if id_ not in open_ids}
    found: list[Submitted] = []
    for step in dict.fromkeys(run.step for run in runs):
        some = [run for run in runs if run.step == step]
        for array in arrays(some, tasks, done, largest):
            room = len(array.tasks) if most is None else min(most - len(found), len(array.tasks))
            rows, limit = _as_many_as_taken(folder, root, step, _first(array, room), len(found))
            add_submitted(folder, rows)
            found += rows
            left = f"{len(runs) - len(found)} of {len(runs)} runs"
            if limit:
                return found, f"{left} were not taken yet, submit again later: {limit}"
            if room < len(array.tasks):
                return found, f"{left} wait for the next submit (--most {most})"
            tasks |= {row.id: row.task for row in rows if row.task}
    return found, ""


def _first(array: Array, n: int) -> Array:
    return Array(tasks=dict(islice(array.tasks.items(), n)), dependency=array.dependency)


def _as_many_as_taken(folder: Path, root: Path, step: str, array: Array, number: int) -> tuple[list[Submitted], str]:
    """Submit an array, or what SLURM's limits leave of it; with the words of the limit, where there was one."""
    limit = ""
    while array.tasks:
        try:
            return _submit(folder, root, step, array, number), limit
        except slurm.SubmitLimit as error:
            limit = str(error)
            array = _first(array, len(array.tasks) // 2)
    return [], limit


def arrays(
    runs: Sequence[PlannedRun], tasks: Mapping[str, str], done: set[str], largest: int
) -> list[Array]:  # fmt: skip
    """
    The arrays of some runs of one step. tasks: run id → SLURM's task of what is submitted and not done. largest: one
    more than the highest index. Runs that wait for one task each of the same array get the indexes of those tasks, so
    that each begins as soon as its own is done (aftercorr); others go together that wait for the same tasks.
    """
    groups: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in runs:
        lacking = [each for each in run.after if each not in done and each not in tasks]
        assert not lacking, f"{run.name} waits for runs that are not submitted: {lacking}"
        groups.setdefault(tuple(tasks[each] for each in run.after if each not in done), []).append(run)
    one_to_one: dict[str, dict[int, PlannedRun]] = {}
    found: list[Array] = []
    for waits, some in groups.items():
        if len(waits) == len(some) == 1:
            job, _, index = waits[0].partition("_")
            one_to_one.setdefault(job, {})[int(index)] = some[0]
            continue
        dependency = f"afterok:{':'.join(waits)}" if waits else None
        for at in range(0, len(some), largest):
            found.append(Array(tasks=dict(enumerate(some[at : at + largest])), dependency=dependency))
    found += [Array(tasks=some, dependency=f"aftercorr:{job}") for job, some in one_to_one.items()]
    return found


def _submit(folder: Path, root: Path, step: str, array: Array, number: int) -> list[Submitted]:
    resources = Resources(**next(iter(array.tasks.values())).resources)
    logs = (folder / LOGS).resolve()
    for each in (folder / SCRIPTS, logs):
        each.mkdir(exist_ok=True)
    cluster = {name: value for name, value in cluster_settings(root).items() if isinstance(value, str)}
    script = (folder / SCRIPTS / f"{step}-{now().replace(':', '')}-{number}.sh").resolve()
    write_text_atomic(script, array_script(array.tasks, resources, root, logs, cluster))
    words = [array_option(list(array.tasks), resources.at_once)]
    told = slurm.refusal(script, words, root)
    if told is not None:
        slurm.refuse(script, told)
    if array.dependency:
        words += [f"--dependency={array.dependency}", "--kill-on-invalid-dep=yes"]
    job = slurm.submit(script, words, root)
    return [
        Submitted(id=run.id, task=f"{job}_{index}", submitted=now(), log=str(logs / f"{step}-{job}_{index}.out"))
        for index, run in array.tasks.items()
    ]
