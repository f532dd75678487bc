"""A real single-node SLURM for tests, and a repository with one command in it that its jobs can run."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "slurm_local.sh"
MISSING = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(tool) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"needs SLURM and root: {'no ' + ', '.join(MISSING) if MISSING else 'not root'}",
)

# Stands for a command of Tiller: it writes down how it was started, and can be stopped and taken up again.
PROBE = """
import json, os, signal, sys, time
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
def write(kind, **values):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "start": start, **values}) + "\\n")
def stop(number, frame):
    write("signal", name=signal.Signals(number).name)
    sys.exit(75)
for each in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(each, stop)
write("start", arguments=sys.argv[1:], cache=os.environ.get("TILLER_CACHE_DIR"))
if start == 0 and "--exit" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--exit") + 1]))
if start == 0 and "--wait" in sys.argv:
    time.sleep(60)
"""


def slurm_local(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SLURM_LOCAL": str(folder)}
    return subprocess.run([SCRIPT, action], env=environment, capture_output=True, text=True, timeout=60)


def processes_of(folder: Path) -> dict[str, int]:
    found = {}
    for process in psutil.process_iter(["name", "cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found[process.info["name"]] = process.pid
    return found


class Project:
    """A repository with one command, `probe`, and the cluster's job scripts."""

    def __init__(self, folder: Path, cluster: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(cluster / "slurm.conf")}
        self.environment.pop("TILLER_CACHE_DIR", None)
        shutil.copytree(ROOT / "hpc", folder / "hpc")
        (folder / "src").mkdir()
        (folder / "src" / "probe.py").write_text(PROBE)
        settings = 'runner = ["python3"]\ncache_dir = "/tmp/a cache"\nenvironment = ["export A=b  # fine"]\n'
        (folder / "hpc" / "cluster.toml").write_text(settings)

    def call(self, *words: str) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> str:
        return self.call("sbatch", "--parsable", "--mem=100", *options, "hpc/run.slurm", "probe", *arguments)

    def field(self, job: str, name: str) -> str:
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(word.removeprefix(f"{name}=") for word in shown.split() if word.startswith(f"{name}="))

    def wait_for(self, job: str, state: str) -> None:
        deadline = time.monotonic() + 60
        while self.field(job, "JobState") != state:
            shown = self.call("scontrol", "show", "job", job)
            assert time.monotonic() < deadline, f"{shown}\n{self.output(job)}"
            time.sleep(0.1)

    def wait_for_event(self, kind: str) -> None:
        deadline = time.monotonic() + 60
        while kind not in [event["kind"] for event in self.events()]:
            assert time.monotonic() < deadline, self.events()
            time.sleep(0.1)

    def events(self) -> list[dict]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()
