"""The part of experiment.py (beside this file) on two nodes: a sum, and a training that is stopped once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.slurm_clone import Clone, lines_of, losses, n_lines, sessions, wait

WIDE = """
question = "Is a training over two nodes the one of one node?"
disk_gb = 0.5
[steps.train]
command = "finetune"
seeds = false
resources = {{ time = "60", memory_gb = 3, nodes = 2 }}
[steps.train.flags]
model_id = {model}
dataset_path = "data/finetuning/capitalization.json"
prompt = "Capitalize the word: {{input}}"
num_tasks = {rows}
epochs = 2
batch_size = 4
num_processes = 2
shard_weights = true
checkpoint_every = 10
save_last_epoch_only = true
"""
# Every process adds its number to a sum over all of them.
RANKS = """
import os, sys
import torch.distributed as dist, torch
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print(f"rank {dist.get_rank()} on {os.environ['SLURMD_NODENAME']}: sum {total:.0f}", flush=True)
dist.barrier()
if dist.get_rank() == 0:
    open(sys.argv[sys.argv.index("--output_dir") + 1] + "/DONE", "w").close()
"""


def nodes(folder: Path, model: str, rows: int) -> tuple[dict, dict]:
    """Two processes on two nodes: a sum, by the script of the same writer, then a training that is stopped once."""
    found, checks = ranks(folder)
    with Clone(folder, nodes=2) as it:
        source, experiment = folder / "wide.toml", folder / "wide_training"
        source.write_text(WIDE.format(model=json.dumps(model), rows=rows))
        shutil.rmtree(experiment, ignore_errors=True)
        it.tiller("experiment", "plan", source, "--output_dir", experiment)
        it.tiller("experiment", "submit", experiment)
        (run,) = lines_of(experiment / "runs.jsonl")
        (task,) = [row["task"] for row in lines_of(experiment / "jobs.jsonl")]
        wide, one = Path(run["folder"]), folder / "one_node"
        wait(lambda: n_lines(wide / "metrics.jsonl") > 20, "the training over two nodes")
        # What SLURM sends before the time is up.
        it.call("scancel", "--batch", "--signal=USR1", task)
        wait(lambda: not it.live(), "the end of the training over two nodes")
        print(it.tiller("experiment", "status", experiment), file=sys.stderr)
        shutil.rmtree(one, ignore_errors=True)
        it.tiller(*[str(one) if word == str(wide) else word for word in run["command"]])
    where = [
        each["slurm"]["SLURM_JOB_NODELIST"] for each in json.loads((wide / "provenance.json").read_text())["sessions"]
    ]
    pairs = [(a[1] - b[1]) for a, b in zip(losses(wide), losses(one), strict=False)]
    found |= {"nodes of each session": where, "sessions of the training": sessions(wide), "steps": len(losses(wide))}
    found |= {"largest difference of a loss": max(map(abs, pairs))}
    return found, checks | {
        "the training was stopped and taken up again": sessions(wide) == ["stopped", "done"],
        "both times on two nodes": len(where) == 2 and all("[1-2]" in each for each in where),
        "its losses are those of one node, up to rounding":
            len(pairs) == len(losses(one)) == len(losses(wide)) and max(map(abs, pairs)) <= 2e-4,
    }  # fmt: skip


def ranks(folder: Path) -> tuple[dict, dict]:
    """The script of a run on two nodes."""
    from src.cluster import slurm
    from src.cluster.matrix import PlannedRun
    from src.cluster.scripts import array_script
    from src.cluster.spec import Resources

    with Clone(folder, nodes=2) as it:
        (it.clone / "src" / "ranks.py").write_text(RANKS)
        place = folder / "two nodes"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run = PlannedRun(
            id="1", name="ranks", step="ranks", factors={}, command=["ranks", "--output_dir", str(place)],
            folder=str(place), after=[], resources={},
        )  # fmt: skip
        script = folder / "two_nodes.sh"
        resources = Resources(nodes=2, time="10", memory_gb=2, gpus=1)
        script.write_text(array_script({0: run}, resources, it.clone, place, {}))
        syntax = subprocess.run(["bash", "-n", script]).returncode
        os.environ["SLURM_CONF"] = it.environment["SLURM_CONF"]
        refusal = slurm.refusal(script, ["--array=0"], it.clone)
        job = it.call("sbatch", "--parsable", "--array=0", script)
        wait(lambda: not it.live(f"--jobs={job}"), "the run on two nodes")
    said = (place / f"ranks-{job}_0.out").read_text()
    ranks = sorted(line for line in said.splitlines() if line.startswith("rank "))
    print(said, file=sys.stderr)
    hosts = {line.split(" on ")[1].split(":")[0] for line in ranks}
    return {"bash -n": syntax, "sbatch --test-only": refusal, "ranks": ranks}, {
        "the script is taken": syntax == 0 and refusal is None,
        "two processes on two nodes found each other": len(hosts) == 2 and all("sum 3" in line for line in ranks),
        "and the run is done": (place / "DONE").exists(),
    }
