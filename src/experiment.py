"""
A design matrix on SLURM or here: plan, submit, look, join. From the repository root:
uv run -m src.experiment plan data/experiment.toml --output_dir data/experiments/ranks
uv run -m src.experiment submit data/experiments/ranks
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cluster.settings import ExperimentSettings
from src.common.cli import CHECK_FAILED, run_command
from src.common.errors import CheckFailed, InputError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class ExperimentConfig(ExperimentSettings):
    """The experiment"""


def main(config: ExperimentConfig) -> None:
    actions = {
        "plan": plan, "submit": submit, "status": status, "summarize": summarize, "cancel": cancel,
        "archive": archive, "check": check,
    }  # fmt: skip
    actions[config.action](config)


def plan(config: ExperimentConfig) -> None:
    """Folders, runs.jsonl, and what it is expected to take."""
    from src.cluster.estimating import disk_gb, estimate_steps
    from src.cluster.matrix import planned_runs
    from src.cluster.planning import refuse_changed, validate, write_plan
    from src.cluster.printing import plan_table
    from src.cluster.records import PLAN, held
    from src.cluster.spec import read_experiment

    # 1. Every run of the design matrix, and each command as its own parser sees it.
    experiment = read_experiment(config.place)
    folder = config.output_dir
    assert folder is not None
    runs = planned_runs(experiment, folder)
    if config.validate:
        validate(runs, ROOT)

    # 2. The folder, unless what is in it was made by another plan.
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        refuse_changed(folder, runs)
        write_plan(folder, config.place, experiment, runs)

    # 3. What it takes.
    estimates = estimate_steps(runs, config.history or folder.parent)
    console().print(plan_table(runs, estimates, disk_gb(experiment, runs)))
    print(f"wrote {folder / PLAN}  a line a run: id, name, factors, command, resources")
    print(
        f"to start it: uv run -m src.experiment submit {shlex.quote(str(folder))}        (without SLURM: add --local)"
    )


def submit(config: ExperimentConfig) -> None:
    """Everything that is not done, waiting or running."""
    from src.cluster import local, slurm
    from src.cluster.estimating import disk_gb, refuse_full_disk
    from src.cluster.records import SPEC, held, read_plan, read_submitted, refuse_moved
    from src.cluster.spec import read_experiment
    from src.cluster.states import states_of
    from src.cluster.submitting import open_runs, submit_all

    folder = config.place
    runs = read_plan(folder)
    refuse_moved(folder)
    if not config.local:
        slurm.require()
    refuse_full_disk(folder, disk_gb(read_experiment(folder / SPEC), runs))
    with held(folder):
        states = states_of(runs, read_submitted(folder))
        chosen = open_runs(states)
        if config.local:
            busy = [each for each in states if each.state in ("waiting", "running")]
            if busy:
                first = f"{busy[0].run.name}{f', job {busy[0].task}' if busy[0].task else ''}"
                raise InputError(
                    f"{len(busy)} runs wait or run ({first}); wait for them, or end them (`cancel` ends those of SLURM)"
                )
            codes = local.run_all(folder, ROOT, chosen, config.at_once)
            failed = [code for code in codes.values() if code != 0]
            status(config)
            if failed:
                raise CheckFailed(f"{len(failed)} of {len(codes)} runs did not finish")
            return
        found, why = submit_all(folder, ROOT, chosen, states, config.most)
    jobs = sorted({row.task.partition("_")[0] for row in found if row.task})
    print(f"submitted {len(found)} of {len(runs)} runs" + (f" in jobs {', '.join(jobs)}" if jobs else ""))
    if why:
        print(why)
    if why and not found:
        raise CheckFailed("nothing was submitted")
    print(f"to look at it: uv run -m src.experiment status {shlex.quote(str(folder))} --watch")


def status(config: ExperimentConfig) -> None:
    """Every run's state, once or again and again."""
    from src.cluster.printing import status_table
    from src.cluster.records import read_plan, read_submitted
    from src.cluster.states import states_of

    folder = config.place
    runs = read_plan(folder)
    look = lambda: states_of(runs, read_submitted(folder))  # noqa: E731
    if not config.watch:
        console().print(status_table(look()))
        return
    from src.cluster.watching import watch

    watch(look, config.seconds, console())


def summarize(config: ExperimentConfig) -> None:
    """summary.jsonl and summary.html."""
    from src.cluster.alike import differences, refuse_other_inputs
    from src.cluster.records import SPEC, read_plan, read_submitted
    from src.cluster.spec import read_experiment
    from src.cluster.states import states_of
    from src.cluster.summarizing import report, summary_rows
    from src.common.files import write_text_atomic
    from src.common.jsonl import write_jsonl_atomic

    folder = config.place
    states = states_of(read_plan(folder), read_submitted(folder))
    refuse_other_inputs(states)
    rows = summary_rows(states)
    write_jsonl_atomic(folder / "summary.jsonl", rows)
    experiment = read_experiment(folder / SPEC)
    about = {"folder": str(folder), "seeds": list(experiment.seeds), **experiment.factors}
    write_text_atomic(folder / "summary.html", report(experiment.question, about, states, rows))
    n = sum(row["state"] == "done" for row in rows)
    print(f"{n} of {len(rows)} runs are done; {sum(row['restarts'] > 0 for row in rows)} were restarted")
    unlike = ", ".join(dict.fromkeys(row["what"] for row in differences(states)))
    if unlike:
        print(f"not all were made alike: they differ in {unlike} (summary.html says which)")
    print(f"wrote {folder / 'summary.jsonl'}  a row a run: factors, state, numbers")
    print(f"wrote {folder / 'summary.html'}   numbers by factor with intervals, loss curves, runs that failed")
    print(f"to look at it: uv run -m src.view {shlex.quote(str(folder))}        (to filter and draw it: add --app)")


def cancel(config: ExperimentConfig) -> None:
    """Ends what waits or runs on SLURM."""
    from src.cluster import slurm
    from src.cluster.records import held, read_plan, read_submitted
    from src.cluster.states import states_of

    folder = config.place
    with held(folder):
        states = states_of(read_plan(folder), read_submitted(folder))
        live = [each.task for each in states if each.task and each.state in ("waiting", "running")]
        if not live:
            print("nothing waits or runs on SLURM")
            return
        confirm(config, f"end {len(live)} jobs ({live[0]} …)?")
        slurm.cancel(live)
        print(f"cancelled {len(live)}; submit again to go on")


def archive(config: ExperimentConfig) -> None:
    """Removes checkpoints, and keeps everything else."""
    from src.cluster.archiving import checkpoints, remove, size_of
    from src.cluster.records import held, read_plan, read_submitted
    from src.cluster.states import states_of

    folder = config.place
    runs = read_plan(folder)
    with held(folder):
        busy = [each for each in states_of(runs, read_submitted(folder)) if each.state in ("running", "waiting")]
        if busy:
            raise InputError(f"{busy[0].run.name}: still {busy[0].state}; archive when all runs have ended")
        found = checkpoints([Path(run.folder) for run in runs])
        if not found:
            print("there are no checkpoints")
            return
        for path in found:
            print(f"  {size_of(path) / 1e6:8.1f} MB  {path}")
        confirm(config, f"remove these {len(found)} checkpoints ({sum(map(size_of, found)) / 1e6:.1f} MB)?")
        remove(found)
        print(f"removed; adapters, results, logs and settings are in {folder}")


def check(config: ExperimentConfig) -> None:
    """What this cluster lacks."""
    from src.cluster.checking import findings

    found = findings(ROOT)
    for is_right, words in found:
        print(f"{'ok     ' if is_right else 'MISSING'}  {words}")
    if not all(is_right for is_right, _ in found):
        sys.exit(CHECK_FAILED)


def confirm(config: ExperimentConfig, question: str) -> None:
    """Raises InputError unless the answer is yes."""
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise InputError(f"{question} add --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was done")


def console() -> Any:
    """Where tables go."""
    from rich.console import Console

    return Console(file=sys.stdout)


if __name__ == "__main__":
    run_command(main, ExperimentConfig)
