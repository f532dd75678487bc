"""An experiment whose only command stands for one of Tiller's, for tests of what becomes of it on SLURM and here."""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from src.cluster.matrix import PlannedRun, planned_runs
from src.cluster.planning import write_plan
from src.cluster.records import read_submitted
from src.cluster.spec import read_experiment
from src.cluster.states import RunState, states_of
from src.cluster.submitting import open_runs, submit_all
from tests.conftest import ROOT

# Stands for a command of Tiller, with a run folder like one's: sessions, a summary, DONE; it can be made to fail.
STEP = """
import json, os, signal, sys, time
words = iter(sys.argv[1:])
given = {word[2:]: next(words) for word in words}
folder, path = given["output_dir"], given["output_dir"] + "/provenance.json"
sessions = json.load(open(path))["sessions"] if os.path.exists(path) else []
sessions.append({"outcome": "running", "hostname": os.uname().nodename, "pid": os.getpid(), "seconds": 1.5,
                 "peak_memory_mib": {"process": 100.0}})
def end(outcome, code):
    sessions[-1]["outcome"] = outcome
    json.dump({"sessions": sessions, "inputs": {}}, open(path, "w"))
    sys.exit(code)
def stop(number, frame):
    print("stopped")
    end("stopped", 75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
json.dump({"command": "probe", "config": given}, open(folder + "/config.json", "w"))
json.dump({"sessions": sessions, "inputs": {}}, open(path, "w"))
print("before\\rworking on", given.get("level"), flush=True)
if "need" in given and not os.path.exists(given["need"]):
    print("error: no such file:", given["need"], flush=True)
    end("failed: InputError: no such file: " + given["need"], 2)
if "--hold" in sys.argv and len(sessions) == 1 and given["hold"] == given.get("level"):
    open("holding", "w").close()
    time.sleep(60)
if "empty" in given:
    sys.exit(0)
json.dump({"overall": {"score": {"mean": float(given.get("level", 0)), "ci_low": 0}, "n": 3}, "details": {"x": 1}},
          open(folder + "/summary.json", "w"))
with open(folder + "/metrics.jsonl", "w") as file:
    for step in (1, 2):
        file.write(json.dumps({"step": step, "loss": 1 / step, "tokens_per_second": 12.0}) + "\\n")
sessions[-1]["outcome"] = "done"
json.dump({"sessions": sessions, "inputs": {}}, open(path, "w"))
open(folder + "/DONE", "w").write(json.dumps({"files": {}}))
"""
MATRIX = """
question = "Does the level matter?"
seeds = [0, 1]
disk_gb = 0.001
[factors]
level = [1, 2, 3]
[steps.train]
command = "probe"
factors = ["level"]
resources = { time = "5", memory_gb = 0.1 }
[steps.test]
command = "probe"
factors = ["level"]
flags = { adapter = "${train}/DONE", need = "${train}/DONE" }
resources = { time = "5", memory_gb = 0.1 }
"""


class Study:
    """An experiment in a repository whose only command is the probe."""

    def __init__(self, root: Path, text: str) -> None:
        self.root, self.folder = root, root / "an 'experiment'"
        shutil.copytree(ROOT / "hpc", root / "hpc", dirs_exist_ok=True)
        (root / "src").mkdir(exist_ok=True)
        (root / "src" / "probe.py").write_text(STEP)
        (root / "hpc" / "cluster.toml").write_text('runner = ["python3"]\n')
        self.folder.mkdir(exist_ok=True)
        source = root / "experiment.toml"
        source.write_text(text)
        self.experiment = read_experiment(source)
        self.runs = planned_runs(self.experiment, self.folder)
        write_plan(self.folder, source, self.experiment, self.runs)

    def states(self) -> list[RunState]:
        return states_of(self.runs, read_submitted(self.folder))

    def counts(self) -> Counter[str]:
        return Counter(each.state for each in self.states())

    def submit(self, most: int | None = None) -> list[PlannedRun]:
        states = self.states()
        found, _ = submit_all(self.folder, self.root, open_runs(states), states, most)
        by_id = {run.id: run for run in self.runs}
        return [by_id[row.id] for row in found]

    def wait(self, until: Callable[[Counter[str]], bool]) -> Counter[str]:
        deadline = time.monotonic() + 120
        while not until(counts := self.counts()):
            shown = [
                (each.run.step, each.run.factors, each.state, each.reason, each.progress) for each in self.states()
            ]
            assert time.monotonic() < deadline, shown
            time.sleep(0.3)
        return counts

    def wait_to_end(self) -> Counter[str]:
        return self.wait(lambda counts: not counts["waiting"] and not counts["running"])
