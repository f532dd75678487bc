"""
The figures of src.experiment and hpc/ on a real SLURM (scripts/slurm_local.sh; as root, with slurm-wlm and munge). From
the repository root:
uv run python scripts/acceptance/experiment.py --output_dir data/experiments/acceptance_experiment
matrix: 2 learning rates × 3 seeds, fine-tune → evaluate; a training is preempted, and must end as if it had not been.
shards: a persona run as an array of 8, one of them killed, against one process. container: a prompt file with spaces
and quotes through a container. nodes: runs over two nodes. With a tiny random model, or --model_id. Ends with exit
code 1 where a figure is not what it must be.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiment_nodes import nodes  # noqa: E402

from tests.slurm_clone import RUNNER, Clone, lines_of, losses, n_lines, sessions, wait  # noqa: E402

MATRIX = """
question = "Does the learning rate matter?"
seeds = [0, 1, 2]
disk_gb = 0.5
[factors]
lr = [1e-3, 1e-2]
[steps.train]
command = "finetune"
factors = ["lr"]
resources = {{ time = "60", memory_gb = 3, at_once = 1 }}
[steps.train.flags]
model_id = {model}
dataset_path = "data/finetuning/capitalization.json"
prompt = "Capitalize the word: {{input}}"
num_tasks = {rows}
epochs = 2
batch_size = 4
lora_dropout = 0.1
save_last_epoch_only = true
[steps.test]
command = "evaluate"
resources = {{ time = "60", memory_gb = 3, at_once = 1 }}
[steps.test.flags]
model_id = {adapter}
tasks = "data/evals/capitalization.jsonl"
num_tasks = 10
"""
CONVERSION = """
question = "Do words arrive as they were written?"
disk_gb = 0.1
[factors]
to = ["prompt_jsonl"]
[steps.convert]
command = "convert_dataset"
factors = ["to"]
seeds = false
flags = {{ dataset_path = {path} }}
resources = {{ time = "10", memory_gb = 1 }}
"""


def matrix(folder: Path, model: str, rows: int) -> tuple[dict, dict]:
    """Twelve jobs in two arrays, and one training that is thrown off its node."""
    with Clone(folder) as it:
        source, experiment = folder / "matrix.toml", folder / "matrix"
        adapter = json.dumps(f"{model}+${{train}}/epoch_1")
        source.write_text(MATRIX.format(model=json.dumps(model), adapter=adapter, rows=rows))
        shutil.rmtree(experiment, ignore_errors=True)
        it.tiller("experiment", "plan", source, "--output_dir", experiment)
        print(it.tiller("experiment", "submit", experiment), file=sys.stderr)
        runs = lines_of(experiment / "runs.jsonl")
        tasks = [row["task"] for row in lines_of(experiment / "jobs.jsonl")]
        arrays = {task.split("_")[0] for task in tasks}
        first = Path(runs[0]["folder"])
        wait(lambda: n_lines(first / "metrics.jsonl") > 20, "the first training")
        it.preempt(first)
        wait(lambda: not it.live(), "the matrix")
        print(it.tiller("experiment", "status", experiment), file=sys.stderr)
        said = it.tiller("experiment", "summarize", experiment)
        view = it.tiller("view", "--root", experiment)
        again = it.tiller("experiment", "submit", experiment)
        alone = folder / "uninterrupted"
        shutil.rmtree(alone, ignore_errors=True)
        words = [str(alone) if word == runs[0]["folder"] else word for word in runs[0]["command"]]
        it.tiller(*words)
    summary = lines_of(experiment / "summary.jsonl")
    restarted = [row["name"] for row in summary if row["restarts"]]
    figures = {
        "jobs, arrays": [len(runs), len(arrays)], "summarize": said.splitlines()[0], "restarted": restarted,
        "sessions of the preempted training": sessions(first), "steps": len(losses(first)),
        "scores by learning rate": scores(summary), "reports of runs": view.count("/runs/"),
    }  # fmt: skip
    return figures, {
        "6 + 6 jobs in two arrays": [row["step"] for row in runs] == ["train"] * 6 + ["test"] * 6 and len(arrays) == 2,
        "the summary has 6 + 6 rows, all done": [row["state"] for row in summary] == ["done"] * 12,
        "and says that one was restarted": restarted == [runs[0]["name"]] and "; 1 were restarted" in said,
        "its adapter is the uninterrupted one's, bit for bit": same_adapters(first, alone),
        "and so are its losses": losses(first) == losses(alone),
        "src.view shows every run": view.count("/runs/") == 12,
        "submitted again, nothing runs again": again.startswith("submitted 0 of 12"),
    }


def scores(summary: Sequence[dict]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in summary:
        if row["step"] == "test":
            found.setdefault(str(row["factor.lr"]), []).append(row["score"])
    return found


def same_adapters(first: Path, second: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(folder / "epoch_1" / "adapter_model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shards(folder: Path, model: str) -> tuple[dict, dict]:
    """Eight workers as an array, the fourth killed when it has rows, and one process."""
    wide, one = folder / "wide", folder / "one"
    for each in (wide, one):
        shutil.rmtree(each, ignore_errors=True)
    words = ("run_personas", "--prompts_json", "data/personas/prompts.json", "--personae_json",
             "data/personas/personae.json", "--model_id", model, "--num_personae", 4, "--num_tasks", 40,
             "--max_tokens", 64, "--temperature", 0.7, "--batch_size", 2)  # fmt: skip
    with Clone(folder) as it:
        job = it.call("sbatch", "--parsable", "--array=0-7", "--mem=2500", "--time=30", "hpc/run.slurm", *words,
                      "--output_dir", wide)  # fmt: skip
        killed = wide / "shards" / "worker-00003-of-00008"
        wait(lambda: n_lines(killed / "results.jsonl") > 4, "the fourth worker")
        it.call("scontrol", "requeue", f"{job}_3")
        wait(lambda: not it.live(f"--jobs={job}"), "the array")
        at_kill = sessions(killed)
        it.tiller("merge_shards", "--shards_dir", wide / "shards", "--output_dir", wide)
        it.tiller(*words, "--output_dir", one)
        it.tiller(*words, "--output_dir", wide)
    merged, whole = (lines_of(each / "results.jsonl") for each in (wide, one))
    differing = [a["id"] for a, b in zip(merged, whole, strict=False) if a != b]
    summaries = [json.loads((each / "summary.json").read_text()) for each in (wide, one)]
    figures = {"rows": [len(merged), len(whole)], "rows that differ": len(differing), "sessions of the killed": at_kill}
    return figures, {
        "the killed worker was started twice": len(at_kill) == 2,
        "merged rows are those of one process, in its order": bool(merged) and merged == whole,
        "and the summary too": summaries[0] == summaries[1],
    }


def container(folder: Path) -> tuple[dict, dict]:
    """A stub in the place of apptainer, which writes down what it got and runs it."""
    stub, log = folder / "apptainer", folder / "apptainer.log"
    stub.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>"{log}"\nshift 4\nexec "$@"\n')
    stub.chmod(0o755)
    log.unlink(missing_ok=True)
    with Clone(folder) as it:
        prefix = [str(stub), "exec", "--bind", "/a b:/c", "an 'image'.sif"]
        it.settings.write_text(RUNNER.format(python=sys.executable) + f"container = {json.dumps(prefix)}\n")
        path = folder / 'it\'s a "prompt" $HOME `file`, é.json'
        path.write_text(json.dumps({"train": [{"input": "a", "output": "A"}]}))
        source, experiment = folder / "conversion.toml", folder / "an \"experiment\" of 'mine'"
        shutil.rmtree(experiment, ignore_errors=True)
        source.write_text(CONVERSION.format(path=json.dumps(str(path))))
        it.tiller("experiment", "plan", source, "--output_dir", experiment)
        it.tiller("experiment", "submit", experiment)
        wait(lambda: not it.live(), "the conversion")
        status = it.tiller("experiment", "status", experiment)
    print(status, file=sys.stderr)
    (run,) = lines_of(experiment / "runs.jsonl")
    got = log.read_text().splitlines()
    return {"what the container got": got}, {
        "its own words and the command's arrive unchanged":
            got == [*prefix[1:], sys.executable, "-m", f"src.{run['command'][0]}", *run["command"][1:]],
        "and the run is done": "1 done" in status,
    }  # fmt: skip


def tiny(folder: Path) -> str:
    """A random two-layer Llama with the bundled model's tokenizer."""
    from transformers import AutoTokenizer

    from src.models.bundled import bundled_folder
    from tests.tiny_models import tiny_model

    if not (folder / "tokenizer_config.json").exists():
        tiny_model("llama").save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled_folder("bundled:smollm2-135m")).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_id", help="a tiny random model unless given")
    parser.add_argument("--num_rows", type=int, default=200, help="training rows of the matrix")
    parser.add_argument("--parts", nargs="+", default=["matrix", "shards", "container", "nodes"])
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model_id or tiny(folder / "tiny")
    parts = {
        "matrix": lambda: matrix(folder, model, options.num_rows), "shards": lambda: shards(folder, model),
        "container": lambda: container(folder), "nodes": lambda: nodes(folder, model, options.num_rows),
    }  # fmt: skip
    found = {}
    for name in options.parts:
        figures, checks = parts[name]()
        found[name] = {"figures": figures, "checks": checks}
        print(json.dumps({name: found[name]}, indent=2, ensure_ascii=False), flush=True)
    sys.exit(0 if all(all(part["checks"].values()) for part in found.values()) else 1)


if __name__ == "__main__":
    main()
