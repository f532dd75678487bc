"""The sbatch script of some runs of one step: an array, a task a run."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.cluster.matrix import PlannedRun
from src.cluster.nodes import launcher, tasks_of
from src.cluster.spec import Resources
from src.common.errors import InputError

SIGNAL_SECONDS = 120
"""Before the time is up a run is told to save."""


def array_script(
    tasks: Mapping[int, PlannedRun], resources: Resources, root: Path, logs: Path, cluster: Mapping[str, str]
) -> str:
    """
    The script of an array. tasks: array index → run. root: the repository. logs: folder of the jobs' output. cluster:
    account, partition and constraint of hpc/cluster.toml, for what the step does not name itself.
    """
    first = next(iter(tasks.values()))
    step, n_tasks = first.step, tasks_of(first.command, resources)
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH {_quoted(option)}" for option in _options(step, resources, n_tasks, logs, cluster)]
    lines += [
        f"# {len(tasks)} runs of the step {step}, written by src.experiment submit.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(root))}",
        "source hpc/cluster_settings.sh",
        "source hpc/job.sh",
        *launcher(first.command, resources),
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for index, run in tasks.items():
        lines.append(f"  {index}) run_job {shlex.join([run.folder, *run.command])} ;; # {run.name}")
    lines += ['  *) echo "no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n"


def _options(step: str, resources: Resources, n_tasks: int, logs: Path, cluster: Mapping[str, str]) -> list[str]:
    # A % would begin one of sbatch's own patterns.
    output = str(logs).replace("%", "%%") + f"/{step}-%A_%a.out"
    found = [
        f"--job-name=tiller-{step}", f"--output={output}", "--open-mode=append", "--requeue",
        # Told as soon as it has begun, a short job would save nothing, and be queued again for ever.
        f"--signal=B:USR1@{min(SIGNAL_SECONDS, resources.seconds // 4 or SIGNAL_SECONDS)}",
        f"--nodes={resources.nodes}", f"--ntasks-per-node={n_tasks}",
        f"--cpus-per-task={max(1, resources.cpus // n_tasks)}", f"--time={resources.time}",
    ]  # fmt: skip
    if resources.gpus:
        found.append(f"--gres=gpu:{resources.gpus}")
    if resources.memory_gb:
        found.append(f"--mem={int(resources.memory_gb * 1024)}M")
    for name in ("account", "partition", "constraint"):
        value = getattr(resources, name, None) or cluster.get(name)
        if value:
            found.append(f"--{name}={value}")
    return [*found, *resources.options]


def _quoted(option: str) -> str:
    if any(sign in option for sign in "\n\r"):
        raise InputError(f"resources: {option!r} has a line break in it")
    return option if all(sign.isalnum() or sign in "-_=:/.,@%+*" for sign in option) else shlex.quote(option)


def array_option(indexes: Sequence[int], at_once: int | None) -> str:
    """The word that tells sbatch which tasks the array has."""
    from src.cluster.slurm import gathered

    return f"--array={gathered(indexes)}{f'%{at_once}' if at_once else ''}"
