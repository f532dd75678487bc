"""A real single-node SLURM: it comes up and goes away whole, and hpc/run.slurm keeps its promises on it."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm_cluster import SCRIPT, Project, needs_slurm, processes_of, slurm_local


@pytest.fixture
def project(tmp_path: Path, cluster: Path) -> Project:
    return Project(tmp_path, cluster)


def test_without_the_packages_it_names_them(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "realpath", "id"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))
    done = subprocess.run(["bash", SCRIPT, "start"], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no slurmctld here; install it: apt-get" in done.stderr
    assert "slurm-wlm munge" in done.stderr


@pytest.mark.slow
@needs_slurm
def test_it_starts_once_and_leaves_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: slurm_local("stop", tmp_path))
    first = slurm_local("start", tmp_path)
    assert first.stdout == f"export SLURM_CONF={tmp_path}/slurm.conf\n", first.stderr
    running = processes_of(tmp_path)
    assert {"munged", "slurmctld", "slurmd"} <= set(running)
    assert slurm_local("start", tmp_path).stdout == first.stdout
    assert processes_of(tmp_path) == running
    assert slurm_local("status", tmp_path).returncode == 0
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    output = tmp_path / "job.out"
    wrapped = ["sbatch", "--wait", "--mem=100", "--gres=gpu:1", f"--output={output}", "--wrap"]
    subprocess.run([*wrapped, "echo on $CUDA_VISIBLE_DEVICES"], env=environment, check=True, timeout=60)
    assert output.read_text() == "on 0\n"
    # A job that is still running goes too.
    endless = ["sbatch", "--mem=100", "--wrap", f"exec tail -f {output}"]
    subprocess.run(endless, env=environment, cwd=tmp_path, check=True)
    deadline = time.monotonic() + 30
    while "tail" not in processes_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert slurm_local("stop", tmp_path).returncode == 0
    assert processes_of(tmp_path) == {}
    assert slurm_local("status", tmp_path).returncode == 1
    assert slurm_local("stop", tmp_path).returncode == 0


@pytest.mark.slow
@needs_slurm
def test_a_job_that_exits_75_is_queued_again(project: Project) -> None:
    arguments = ["--exit", "75", "a b", 'it\'s "so"', "$HOME", ""]
    job = project.submit(*arguments)
    project.wait_for(job, "COMPLETED")
    assert project.field(job, "Restarts") == "1"
    # Without --output_dir it gets one, and keeps it when it is queued again.
    arguments.append(f"--output_dir=data/experiments/probe-{job}")
    assert project.events() == [
        {"kind": "start", "start": start, "arguments": arguments, "cache": "/tmp/a cache"} for start in (0, 1)
    ]
    assert "queueing job" in project.output(job) and "start 2" in project.output(job)


@pytest.mark.slow
@needs_slurm
def test_another_exit_code_is_the_jobs(project: Project) -> None:
    job = project.submit("--exit", "2")
    project.wait_for(job, "FAILED")
    assert project.field(job, "ExitCode") == "2:0"
    assert project.field(job, "Restarts") == "0"


@pytest.mark.slow
@needs_slurm
def test_a_warning_is_forwarded_and_the_job_goes_on_later(project: Project) -> None:
    job = project.submit("--wait")
    project.wait_for_event("start")
    project.call("scancel", "--batch", "--signal=USR1", job)  # What --signal=B:USR1@120 sends before the time is up.
    project.wait_for(job, "COMPLETED")
    assert [event.get("name", event["start"]) for event in project.events()] == [0, "SIGUSR1", 1]


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_goes_on_later_and_a_cancelled_one_does_not(project: Project) -> None:
    job = project.submit("--wait", options=("--exclusive",))
    project.wait_for_event("start")
    project.call("sbatch", "--partition=high", "--exclusive", "--mem=100", "--wrap", "true")
    project.wait_for(job, "COMPLETED")
    assert [event["start"] for event in project.events() if event["kind"] == "start"] == [0, 1]
    (project.folder / "events.jsonl").unlink()
    job = project.submit("--wait")
    project.wait_for_event("start")
    project.call("scancel", job)
    project.wait_for_event("signal")
    project.wait_for(job, "CANCELLED")
    time.sleep(8)  # Longer than a requeued job waits here.
    assert project.field(job, "JobState") == "CANCELLED"
    assert project.field(job, "Restarts") == "0"


@pytest.mark.slow
@needs_slurm
def test_an_array_becomes_workers(project: Project) -> None:
    given = ("--x", "1", "--output-dir", "o")
    project.call("sbatch", "--wait", "--mem=100", "--array=0-2", "hpc/run.slurm", "probe", *given)
    started = sorted(event["arguments"] for event in project.events())
    assert started == [[*given, "--num_workers", "3", "--worker_index", str(i)] for i in range(3)]
    own = ("--num-workers", "8", "--worker-index", "5", "--output_dir=o")
    project.call("sbatch", "--wait", "--mem=100", "--array=1,5", "hpc/run.slurm", "probe", *own)
    assert [event["arguments"] for event in project.events()[3:]] == [list(own)] * 2
    job = project.submit(options=("--array=1,5",))
    project.wait_for(f"{job}_5", "FAILED")
    assert "give --num_workers and --worker_index yourself" in project.output(f"{job}_5")


@pytest.mark.slow
@needs_slurm
def test_a_wrong_command_or_setting_is_said(project: Project) -> None:
    job = project.call("sbatch", "--parsable", "--mem=100", "hpc/run.slurm", "prob")
    project.wait_for(job, "FAILED")
    assert "no src/prob.py in" in project.output(job)
    with (project.folder / "hpc" / "cluster.toml").open("a") as file:
        file.write('containr = ["apptainer"]\n')
    job = project.submit()
    project.wait_for(job, "FAILED")
    assert "hpc/cluster.toml: unknown key 'containr'; expected account, cache_dir, constraint" in project.output(job)


@pytest.mark.slow
@needs_slurm
def test_a_container_gets_the_arguments_unchanged(project: Project) -> None:
    stub = project.folder / "apptainer"
    stub.write_text('#!/bin/sh\necho "apptainer $2" >>prefixes\nshift 2\nexec "$@"\n')
    stub.chmod(0o755)
    with (project.folder / "hpc" / "cluster.toml").open("a") as file:
        file.write(f'container = ["{stub}", "exec", "an image.sif"]\n')
    job = project.submit("a b", "'", "--output_dir=o")
    project.wait_for(job, "COMPLETED")
    assert project.events()[0]["arguments"] == ["a b", "'", "--output_dir=o"]
    assert (project.folder / "prefixes").read_text() == "apptainer an image.sif\n"
