"""A SLURM in a folder with a copy of the repository beside it: real commands as jobs, run by this Python."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

RUNNER = 'runner = ["{python}"]\n'


class Clone:
    """A SLURM in a folder, and a copy of the repository whose jobs run this Python."""

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self.clone = folder / "clone"
        shutil.rmtree(self.clone, ignore_errors=True)
        for name in ("src", "hpc", "data"):
            ignored = shutil.ignore_patterns("experiments", "__pycache__", "cluster.toml")
            shutil.copytree(ROOT / name, self.clone / name, ignore=ignored)
        self.settings = self.clone / "hpc" / "cluster.toml"
        self.settings.write_text(RUNNER.format(python=sys.executable))
        self.place = folder / f"slurm_{nodes}"
        self.environment = {**os.environ, "SLURM_LOCAL": str(self.place), "SLURM_LOCAL_NODES": str(nodes)}
        self.environment["SLURM_CONF"] = str(self.place / "slurm.conf")
        # The copy's own modules, whatever is installed.
        self.environment["PYTHONPATH"] = str(self.clone)

    def __enter__(self) -> "Clone":
        subprocess.run([ROOT / "scripts/slurm_local.sh", "start"], env=self.environment, check=True, stdout=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run([ROOT / "scripts/slurm_local.sh", "stop"], env=self.environment)

    def call(self, *words: object, check: bool = True) -> str:
        done = subprocess.run(
            [str(word) for word in words], cwd=self.clone, env=self.environment, check=False, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        if check and done.returncode:
            sys.exit(f"{words}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout.strip()

    def tiller(self, command: str, *words: object) -> str:
        return self.call(sys.executable, "-m", f"src.{command}", *words)

    def preempt(self, folder: Path) -> None:
        """
        Throw the job of a run off its node, by one that takes all of it and comes before all others. The run is made to
        stand still until then: how far it has come does not depend on how fast SLURM is.
        """
        os.kill(json.loads((folder / "provenance.json").read_text())["sessions"][-1]["pid"], signal.SIGSTOP)
        words = ("sbatch", "--wait", "--partition=high", "--exclusive", "--mem=100", "--output=/dev/null")
        self.call(*words, "--wrap", "sleep 1")

    def live(self, *jobs: str) -> list[str]:
        """What waits or runs."""
        return self.call("squeue", "--noheader", "--format=%i %T", *jobs).splitlines()


def wait(until: Callable[[], Any], what: str, seconds: float = 3000) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not in {seconds} s")
        time.sleep(0.2)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sessions(folder: Path) -> list[str]:
    return [each["outcome"] for each in json.loads((folder / "provenance.json").read_text())["sessions"]]


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row.get("validation_loss")) for row in lines_of(folder / "metrics.jsonl")]
