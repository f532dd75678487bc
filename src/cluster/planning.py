"""Checking a plan's commands, and writing the plan down."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from src.cluster import nodes
from src.cluster.matrix import PlannedRun
from src.cluster.records import PLAN, SPEC, read_plan, read_submitted
from src.cluster.spec import Experiment
from src.cluster.states import RUNNING, UNKNOWN, WAITING, states_of
from src.common.errors import InputError
from src.common.files import write_text_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.run_folder import CONFIG

SHOW = "--show_config"
README = """\
# {question}

Planned from `experiment.toml` by `src.experiment plan`: {n} runs of {steps}.

- `runs.jsonl`: a line a run: id, name, step, factors, command, folder, what it waits for, resources
- `runs/STEP/NAME/`: the run folders; one with `DONE` has finished
- `jobs/`, `jobs.jsonl`, `logs/`: what was submitted, as which job, and what it printed
- `summary.jsonl`, `summary.html`: all runs joined, by `src.experiment summarize`
"""


def validate(runs: Sequence[PlannedRun], root: Path) -> None:
    """Run every command with --show_config. Raises InputError with the words of the first that is refused."""
    from tqdm import tqdm

    unknown = [run for run in runs if not (root / "src" / f"{run.command[0]}.py").exists()]
    if unknown:
        raise InputError(f"steps.{unknown[0].step}.command: no src.{unknown[0].command[0]}")
    refused = next(filter(None, map(nodes.refusal, runs)), None)
    if refused:
        raise InputError(refused)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        bar = tqdm(zip(runs, pool.map(lambda run: _refusal(run, root), runs), strict=True), total=len(runs),
                   unit="command", desc="checking", file=sys.stderr, leave=False)  # fmt: skip
        for run, refusal in bar:
            if refusal:
                pool.shutdown(cancel_futures=True)
                raise InputError(f"steps.{run.step} ({run.name}): {refusal}")


def _refusal(run: PlannedRun, root: Path) -> str | None:
    words = [sys.executable, "-m", f"src.{run.command[0]}", *run.command[1:], SHOW]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("error: ")


def refuse_changed(folder: Path, runs: Sequence[PlannedRun]) -> None:
    """Raises InputError where a run that has begun, or waits in a queue, would be another one now, or none."""
    if not (folder / PLAN).exists():
        return
    new = {run.id: run for run in runs}
    old_runs = read_plan(folder)
    changed = [old for old in old_runs if old.id not in new or new[old.id].command != old.command]
    for old in changed:
        if (Path(old.folder) / CONFIG).exists():
            raise InputError(
                f"{folder}: {old.step} {old.name} has begun, and in this plan it is {_now(old, new)}; choose another "
                f"--output_dir, or remove {old.folder}"
            )
    for each in states_of(changed, read_submitted(folder)):
        if each.state in (RUNNING, WAITING, UNKNOWN):
            # Its job would run the old command, and the plan say the new one.
            raise InputError(
                f"{folder}: {each.run.step} {each.run.name} is {each.state} as {each.task or 'a process'}, and in this "
                f"plan it is {_now(each.run, new)}; `src.experiment cancel {folder}` first, or choose another "
                f"--output_dir"
            )


def _now(old: PlannedRun, new: Mapping[str, PlannedRun]) -> str:
    return "another command" if old.id in new else "gone"


def write_plan(folder: Path, source: Path, experiment: Experiment, runs: Sequence[PlannedRun]) -> None:
    """The run folders, the experiment's file, a README, and runs.jsonl last."""
    for run in runs:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / SPEC, source.read_text(encoding="utf-8"))
    words = README.format(question=experiment.question, n=len(runs), steps=", ".join(experiment.in_order()))
    write_text_atomic(folder / "README.md", words)
    write_jsonl_atomic(folder / PLAN, (run.as_row() for run in runs))
