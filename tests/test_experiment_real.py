"""A real training on a real SLURM: thrown off its node, taken up again, evaluated, and as if nothing had been."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.slurm_clone import Clone, losses, wait
from tests.slurm_cluster import needs_slurm

TOML = """
question = "Does it matter that it was interrupted?"
seeds = [3]
disk_gb = 0.1
[steps.train]
command = "finetune"
resources = {{ time = "10", memory_gb = 3 }}
[steps.train.flags]
model_id = {model}
dataset_path = "data/finetuning/capitalization.json"
prompt = "Capitalize the word: {{input}}"
num_tasks = 240
epochs = 6
batch_size = 2
lora_rank = 2
lora_dropout = 0.1
[steps.test]
command = "evaluate"
resources = {{ time = "10", memory_gb = 3 }}
[steps.test.flags]
model_id = {adapter}
tasks = "data/evals/capitalization.jsonl"
num_tasks = 2
"""


@pytest.mark.slow
@needs_slurm
def test_a_preempted_training_ends_as_if_it_had_not_been(tmp_path: Path, tiny_folder: Path) -> None:
    source, folder = tmp_path / "experiment.toml", tmp_path / "experiment"
    adapter = json.dumps(f"{tiny_folder}+${{train}}/epoch_5")
    source.write_text(TOML.format(model=json.dumps(str(tiny_folder)), adapter=adapter))
    with Clone(tmp_path) as it:
        it.tiller("experiment", "plan", source, "--output_dir", folder, "--validate", "false")
        it.tiller("experiment", "submit", folder)
        train = json.loads((folder / "runs.jsonl").read_text().splitlines()[0])
        metrics = Path(train["folder"]) / "metrics.jsonl"
        wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, "the training", 900)
        it.preempt(Path(train["folder"]))
        wait(lambda: not it.live(), "both steps", 900)
        said = it.tiller("experiment", "summarize", folder)
        alone = tmp_path / "alone"
        it.tiller(*(str(alone) if word == train["folder"] else word for word in train["command"]))
    assert "2 of 2 runs are done; 1 were restarted" in said
    rows = [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]
    assert [(row["step"], row["restarts"]) for row in rows] == [("train", 1), ("test", 0)] and rows[1]["n"] == 2
    assert losses(Path(train["folder"])) == losses(alone)
    a, b = (load_file(Path(place) / "epoch_5" / "adapter_model.safetensors") for place in (train["folder"], alone))
    # Not to the bit, as where all is in one process: with another number of threads two processes are 3e-8 apart after
    # as many steps.
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) <= 1e-6
