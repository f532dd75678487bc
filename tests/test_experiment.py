"""Plans on a real SLURM and in processes of this machine: dependencies, failures, requeues, states, summaries."""

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from src.cluster import local, slurm
from src.cluster.archiving import checkpoints
from src.cluster.estimating import earlier_runs, refuse_full_disk
from src.cluster.matrix import planned_runs
from src.cluster.planning import refuse_changed
from src.cluster.printing import status_table
from src.cluster.records import read_submitted
from src.cluster.spec import read_experiment
from src.cluster.states import RunState
from src.cluster.submitting import open_runs, submit_all
from src.cluster.summarizing import by_factor, report, summary_rows
from src.common.errors import InputError
from tests.slurm_cluster import needs_slurm, slurm_local
from tests.slurm_study import MATRIX, STEP, Study

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Study]:
    monkeypatch.setenv("SLURM_CONF", str(cluster / "slurm.conf"))
    monkeypatch.delenv("TILLER_CACHE_DIR", raising=False)
    return lambda text: Study(tmp_path, text)


def printed(states: list[RunState]) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status_table(states))
    return console.export_text()


@needs_slurm
def test_a_matrix_is_run_preempted_resumed_and_summed_up(study) -> None:
    """Two steps of 2 × 3 runs, the second after the first; one run is thrown off its node by another job."""
    it = study(MATRIX.replace('command = "probe"', 'command = "probe"\nflags = { hold = "2" }', 1))
    assert it.submit() == it.runs and len(it.runs) == 12
    jobs = {row.task.split("_")[0] for row in read_submitted(it.folder).values()}
    assert len(jobs) == 2, "an array a step"
    assert it.submit() == [], "what waits or runs is not submitted again"
    it.wait(lambda counts: (it.root / "holding").exists() and counts["running"])
    subprocess.run(
        ["sbatch", "--partition=high", "--exclusive", "--mem=100", "--wrap", "true"], cwd=it.root, check=True
    )
    assert it.wait_to_end() == {"done": 12}
    states = it.states()
    assert sum(each.restarts for each in states) >= 1
    rows = summary_rows(states)
    assert len(rows) == 12 and {row["state"] for row in rows} == {"done"}
    assert all(row["score"] == row["factor.level"] and row["n"] == 3 and row["last.loss"] == 0.5 for row in rows)
    effects = [row for row in by_factor(rows) if (row["step"], row["measure"]) == ("test", "score")]
    levels = {row["level"]: (row["mean"], row["runs"]) for row in effects if row["factor"] == "level"}
    assert levels == {1: (1, 2), 2: (2, 2), 3: (3, 2)}
    page = report(it.experiment.question, {}, states, rows)
    assert "Does the level matter?" in page and "not finished" not in page and "plotly" in page
    for run in it.runs:
        log = Path(read_submitted(it.folder)[run.id].log).read_text()
        assert f"--output_dir {run.folder}" in log.replace("\\", "")


@needs_slurm
def test_after_a_failure_only_what_lacks_is_run_again(study) -> None:
    it = study(MATRIX.replace('command = "probe"', 'command = "probe"\nflags = { need = "input_${level}" }', 1))
    for level in (1, 3):
        (it.root / f"input_{level}").touch()
    it.submit()
    assert it.wait_to_end() == {"done": 8, "failed": 2, "cancelled": 2}
    states = it.states()
    failed = [each for each in states if each.state == "failed"]
    assert {(each.run.step, each.run.factors["level"]) for each in failed} == {("train", 2)}
    assert all("no such file: input_2" in each.reason for each in failed)
    text = printed(states)
    assert "error: no such file: input_2" in text and "8 done, 2 failed, 2 cancelled" in text
    rows = summary_rows(states)
    page = report("q", {}, states, rows)
    assert "4 of 12 runs have not finished" in page and "no such file: input_2" in page
    without = [row for row in by_factor(rows) if row["level"] == 2]
    assert without and all(row["without"] == 2 and row["mean"] is None for row in without)
    (it.root / "input_2").touch()
    again = it.submit()
    assert {(run.step, run.factors["level"]) for run in again} == {("train", 2), ("test", 2)} and len(again) == 4
    assert it.wait_to_end() == {"done": 12}
    assert it.submit() == []


@needs_slurm
def test_states_hold_while_jobs_wait_and_when_the_controller_restarts(study, cluster) -> None:
    """Accounting is off here: `sacct` fails throughout."""
    assert subprocess.run(["sacct", "-j", "1"], capture_output=True).returncode != 0
    it = study(MATRIX.replace('command = "probe"', 'command = "probe"\nflags = { hold = "1" }', 1))
    assert it.counts() == {"planned": 12}
    assert len(it.submit(most=4)) == 4 and len(it.submit(most=3)) == 3 and it.counts()["planned"] == 5
    assert len(it.submit()) == 5, "the second step waits for jobs that an earlier submit started"
    changed = it.root / "changed.toml"
    changed.write_text((it.folder / "experiment.toml").read_text().replace("adapter =", "other ="))
    with pytest.raises(InputError, match=r"test \w+ is waiting as \d+_\d, and in this plan it is another command"):
        refuse_changed(it.folder, planned_runs(read_experiment(changed), it.folder))
    before = it.wait(lambda counts: counts["running"] and counts["waiting"])
    assert not before["planned"] and not before["lost"]
    pid = int((cluster / "slurmctld.pid").read_text())
    os.kill(pid, 15)
    while Path(f"/proc/{pid}").exists() and "slurmctld" in Path(f"/proc/{pid}/cmdline").read_text():
        time.sleep(0.1)
    off = it.states()
    assert {each.state for each in off} <= {"unknown", "done"} and any(each.state == "unknown" for each in off)
    with pytest.raises(InputError, match="SLURM does not answer"):
        open_runs(off)
    assert slurm_local("start", cluster).returncode == 0
    it.wait(lambda counts: not counts["unknown"])
    live = [each.task for each in it.states() if each.state in ("waiting", "running")]
    slurm.cancel(live)
    ended = it.wait_to_end()
    # Short runs may end before they are told to.
    assert set(ended) <= {"cancelled", "done"} and ended["cancelled"] and sum(ended.values()) == 12, ended
    # A command that ends well without having finished its run has failed.
    (it.root / "src" / "probe.py").write_text(STEP.replace('if "empty" in given', "if True"))
    first = next(each.run for each in it.states() if each.state == "cancelled" and each.run.step == "train")
    it.runs = [first]
    it.submit()
    assert it.wait_to_end() == {"failed": 1}
    assert "counted as failed" in printed(it.states())


@needs_slurm
def test_what_sbatch_refuses_is_printed_whole_and_nothing_is_submitted(study) -> None:
    it = study(MATRIX.replace('time = "5"', 'time = "5", gpus = 99', 1))
    with pytest.raises(InputError, match=r"(?s)sbatch refuses .*train.*Requested node configuration"):
        it.submit()
    assert it.counts() == {"planned": 12} and not read_submitted(it.folder)


@needs_slurm
def test_of_an_array_as_much_is_submitted_as_slurm_takes(study, monkeypatch) -> None:
    """A limit on the jobs of a user needs a database of users: here sbatch itself has one, of four tasks at once."""
    it = study(MATRIX)
    real, stub = shutil.which("sbatch"), it.root / "tools" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(f"""#!/bin/bash
for word in "$@"; do case $word in --array=*) list=${{word#--array=}} ;; esac; done
n=$(for part in ${{list//,/ }}; do seq ${{part%-*}} ${{part#*-}}; done | wc -l)
if ((n > 4)); then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi
exec {real} --hold "$@"
""")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    states = it.states()
    found, why = submit_all(it.folder, it.root, open_runs(states), states, None)
    assert [row.id for row in found] == [run.id for run in it.runs[:3]]
    assert why.startswith("9 of 12 runs were not taken yet, submit again later: sbatch: error: QOSMaxSubmit")
    assert it.submit() == it.runs[3:]
    slurm.cancel([each.task for each in it.states() if each.task])
    assert it.wait_to_end() == {"cancelled": 12}


@needs_slurm
def test_what_is_preempted_for_good_is_open_again(study) -> None:
    lines = MATRIX.replace("memory_gb = 0.1", 'memory_gb = 0.1, options = ["--no-requeue"]', 1)
    it = study(lines.replace('command = "probe"', 'command = "probe"\nflags = { hold = "1" }', 1))
    it.submit(most=1)
    it.wait(lambda counts: (it.root / "holding").exists())
    subprocess.run(["sbatch", "-W", "--partition=high", "--exclusive", "--mem=100", "--wrap", "true"], check=True,
                   cwd=it.root)  # fmt: skip
    it.wait(lambda counts: counts["failed"])
    assert "PREEMPTED" in next(each.reason for each in it.states() if each.state == "failed")
    assert len(it.submit(most=1)) == 1 and it.wait_to_end() == {"done": 1, "planned": 11}


def test_a_process_that_ends_before_its_run_begins_has_failed(tmp_path: Path) -> None:
    it = Study(tmp_path, MATRIX)
    (it.root / "src" / "probe.py").write_text('import sys\nsys.exit("error: no such flag")')
    codes = local.run_all(it.folder, it.root, it.runs, 3)
    assert Counter(codes.values()) == {1: 6, None: 6} and it.counts() == {"failed": 6, "planned": 6}
    states = it.states()
    assert states[0].reason == "error: no such flag" and "error: no such flag" in printed(states)
    assert {row["reason"] for row in summary_rows(states)} == {"error: no such flag", None}
    (it.root / "src" / "probe.py").write_text(STEP)
    local.run_all(it.folder, it.root, open_runs(states), 3)
    assert it.counts() == {"done": 12}


def test_the_same_plan_runs_without_slurm(tmp_path: Path) -> None:
    it = Study(
        tmp_path, MATRIX.replace('command = "probe"', 'command = "probe"\nflags = { need = "input_${level}" }', 1)
    )
    for level in (1, 3):
        (it.root / f"input_{level}").touch()
    codes = local.run_all(it.folder, it.root, it.runs, 3)
    assert Counter(codes.values()) == {0: 8, 2: 2, None: 2}
    (it.root / "input_2").touch()
    left = open_runs(it.states())
    assert {run.factors["level"] for run in left} == {2} and len(left) == 4
    assert set(local.run_all(it.folder, it.root, left, 2).values()) == {0}
    assert it.counts() == {"done": 12} and not open_runs(it.states())
    known = earlier_runs(it.folder)
    assert [seconds for seconds, _ in known["probe", frozenset()]].count(1.5) == 10, (
        "a run's seconds are those of all starts"
    )


def test_only_what_has_finished_gives_its_checkpoints_away(tmp_path: Path) -> None:
    it = Study(tmp_path, MATRIX)
    first, second = it.runs[:2]
    for run in (first, second):
        (Path(run.folder) / "checkpoints").mkdir()
    (Path(first.folder) / "DONE").touch()
    assert checkpoints([Path(run.folder) for run in it.runs]) == [Path(first.folder) / "checkpoints"]


def test_without_slurm_or_room_it_is_said_at_once(tmp_path: Path, run_module) -> None:
    it = Study(tmp_path, MATRIX)
    tools = tmp_path / "tools"
    tools.mkdir()
    done = run_module("experiment", "submit", str(it.folder), PATH=str(tools))
    assert done.returncode == 2 and "no SLURM here (no sbatch); add --local" in done.stderr
    with pytest.raises(InputError, match="GB are free on its disk, and the experiment may take 1000000000"):
        refuse_full_disk(it.folder, 1e9)
    huge = Study(tmp_path, MATRIX.replace("disk_gb = 0.001", "disk_gb = 1e9"))
    done = run_module("experiment", "submit", str(huge.folder), "--local")
    assert done.returncode == 2 and "with disk_gb in the experiment's file" in done.stderr


def test_rows_of_a_summary_are_json(tmp_path: Path) -> None:
    it = Study(tmp_path, MATRIX)
    rows = summary_rows(it.states())
    assert [json.loads(json.dumps(row, allow_nan=False)) for row in rows] == rows and len(rows) == 12
