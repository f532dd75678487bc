"""A design matrix becomes runs: combinations, projections, commands, and what is wrong said in words."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from src.cluster.estimating import disk_gb, estimate_steps
from src.cluster.matrix import PlannedRun, planned_runs
from src.cluster.nodes import refusal
from src.cluster.planning import validate, write_plan
from src.cluster.records import read_plan, refuse_moved
from src.cluster.spec import Resources, read_experiment
from src.common.errors import InputError
from src.common.run_names import name_of
from tests.conftest import ROOT

TWO_STEPS = """
question = "What does the rank buy?"
seeds = [0, 1]
zipped = [["lora_rank", "lr"]]
exclude = [{ lora_rank = 16, persona = "Ham \\"let\\"" }]
[factors]
lora_rank = [4, 16]
lr = [1e-3, 3e-4]
persona = ["", "Ham \\"let\\"", "--odd"]
[steps.test]
command = "evaluate"
factors = ["persona"]
flags = { model_id = "base+${train}/epoch_0", tasks = ["a b.jsonl", "c.jsonl"], steer = "x:${lr}" }
[steps.train]
command = "finetune"
factors = ["lora_rank", "lr"]
flags = { prompt = "say $${input}", packing = true }
resources = { time = "30", gpus = 1, memory_gb = 1.5, at_once = 2 }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def runs_of(folder: Path, text: str) -> list[PlannedRun]:
    return planned_runs(read_experiment(written(folder, text)), folder / "e")


def test_each_step_has_a_run_for_each_combination_that_it_depends_on(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, TWO_STEPS)
    train = [run for run in runs if run.step == "train"]
    test = [run for run in runs if run.step == "test"]
    assert runs == train + test, "a step comes after those that it waits for, whatever the file's order"
    assert [run.factors for run in train] == [
        {"lora_rank": rank, "lr": lr, "seed": seed}
        for (rank, lr), seed in itertools.product([(4, 1e-3), (16, 3e-4)], [0, 1])
    ]  # fmt: skip
    personas = {4: ["", 'Ham "let"', "--odd"], 16: ["", "--odd"]}
    assert [(run.factors["lora_rank"], run.factors["persona"], run.factors["seed"]) for run in test] == [
        (rank, persona, seed) for rank in (4, 16) for persona in personas[rank] for seed in (0, 1)
    ]
    by_id = {run.id: run for run in runs}
    assert len(by_id) == len(runs) and len({run.folder for run in runs}) == len(runs)
    for run in test:
        (before,) = (by_id[each] for each in run.after)
        assert {name: run.factors[name] for name in before.factors} == before.factors
        assert f"base+{before.folder}/epoch_0" in run.command
        assert run.command[run.command.index("--tasks") + 1 :][:2] == ["a b.jsonl", "c.jsonl"]
    assert train[0].command == [
        "finetune", "--prompt", "say ${input}", "--packing", "true", "--lora_rank", "4", "--lr", "0.001",
        "--seed", "0", "--output_dir", train[0].folder,
    ]  # fmt: skip
    assert "--persona=--odd" in test[4].command and test[4].factors["persona"] == "--odd"
    assert runs_of(tmp_path, TWO_STEPS) == runs


def test_commands_are_read_as_they_were_meant(tmp_path: Path) -> None:
    """By the parser of a real command, from the words of the plan."""
    from src.common.cli import parse_config
    from src.run_personas import RunPersonasConfig

    text = """
    question = "q"
    [factors]
    temperature = [0.5]
    [steps.a]
    command = "run_personas"
    factors = ["temperature"]
    [steps.a.flags]
    prompts_json = "a 'b' \\"c\\".json"
    personae_json = "d.json"
    model_id = "m"
    categories = ["x y", "--z"]
    token_arrays = false
    """
    (run,) = runs_of(tmp_path, text)
    config = parse_config(RunPersonasConfig, run.command[1:])
    assert (config.temperature, config.categories, config.token_arrays) == (0.5, ["x y", "--z"], False)
    assert str(config.prompts_json) == "a 'b' \"c\".json" and str(config.output_dir) == run.folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('question = "q"', ""), "question: Field required"),
        (("seeds = [0]", "seed = [0]"), "seed: Extra inputs"),
        (('factors = ["a"]', 'factors = ["aa"]'), "steps.one.factors: unknown 'aa'; the nearest is 'a'"),
        (('x = "1"', 'x = "${b}"'), r"steps.one.flags: \$\{b\}: unknown 'b'"),
        (('x = "1"', 'x = "${two}"'), "a cycle: one → two → one"),
        (('x = "1"', 'output_dir = "1"'), "output_dir: set by the plan"),
        (("a = [1, 2]", "a = [1, 1]"), "factors.a: .*none twice"),
        (("a = [1, 2]", "a = []"), "factors.a: .*at least one"),
        (("a = [1, 2]", "one = [1, 2]"), "'one' names two things"),
        (("[factors]", 'zipped = [["a", "c"]]\n[factors]\nc = [1]'), "zipped: .*equally many"),
        (("[factors]", "exclude = [{ a = 1 }, { a = 2 }]\n[factors]"), "leaves no combination"),
        (("[factors]", "exclude = [{ a = 1.0 }]\n[factors]"), "exclude: a = 1.0 is none of its values"),
        (("[factors]", "exclude = [{ seed = 7 }]\n[factors]"), "exclude: seed = 7 is none of its values"),
        (("a = [1, 2]", "a = [1.0, nan]"), "factors.a: .*finite"),
        (('time = "10"', 'time = "soon"'), "steps.one.resources.time: 'soon' is no time"),
        (('time = "10"', 'time = "2:00"'), "'2:00' is no time; expected minutes, H:MM:SS"),
        (('time = "10"', "gpus = -1"), "steps.one.resources.gpus"),
        (("a = [1, 2]", "a = [1, 2"), "experiment.toml: .*line"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = """
question = "q"
seeds = [0]
[factors]
a = [1, 2]
[steps.one]
command = "finetune"
factors = ["a"]
flags = { x = "1" }
resources = { time = "10" }
[steps.two]
command = "evaluate"
after = ["one"]
"""
    assert len(runs_of(tmp_path, text)) == 4
    assert change[0] in text
    with pytest.raises(InputError, match=words):
        runs_of(tmp_path, text.replace(*change, 1))
    with pytest.raises(InputError, match=r"nowhere\.toml: No such file"):
        read_experiment(tmp_path / "nowhere.toml")


def finished(folder: Path, model: Any, **session: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"command": "evaluate", "config": {"model_id": model}}))
    session = {"seconds": 2.0, "peak_memory_mib": {"process": 100.0, "largest_child": 50.0}} | session
    (folder / "provenance.json").write_text(json.dumps({"inputs": {}, "sessions": [session]}))
    (folder / "DONE").touch()
    return folder


def test_estimates_are_of_the_base_model(tmp_path: Path) -> None:
    """Adapters of one base model take its disk once, and earlier runs of several models are no obstacle."""
    runs = runs_of(tmp_path, TWO_STEPS.replace('"base+', f'"{tmp_path}/base+'))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(bytes(10_000_000))
    assert disk_gb(read_experiment(written(tmp_path, TWO_STEPS)), runs) == pytest.approx(20.02)
    finished(tmp_path / "earlier" / "one", [f"{tmp_path}/base+elsewhere/epoch_3"])
    finished(tmp_path / "earlier" / "two", ["another", "and another"])
    finished(tmp_path / "earlier" / "three", None)
    (test,) = [each for each in estimate_steps(runs, tmp_path / "earlier") if each.step == "test"]
    assert (test.n_earlier, test.seconds, test.memory_gb) == (1, 2.0, 100 * 2**20 / 1e9)


SPREAD = {
    ("finetune",): "steps.s.resources.nodes = 2: 2 processes, one a node; give num_processes = 2, it is 1",
    ("finetune", "--num_processes", "2"): None,
    ("finetune", "--num-processes=2", "--lr", "1"): None,
    (
        "finetune",
        "--num_processes",
        "2",
        "gpus",
    ): "2 nodes of 4 GPUs are 8 processes, a GPU each; give num_processes = 8",
    ("finetune", "--num_processes", "8", "gpus"): None,
    (
        "evaluate",
        "--backend=vllm",
        "--tensor_parallel_size=8",
        "gpus",
    ): "vLLM over several nodes is written but was never",
    ("evaluate", "--backend", "hf", "gpus"): "src.evaluate is one process; take one node",
    ("judge",): "src.judge is one process; take one node",
}


@pytest.mark.parametrize("words", SPREAD)
def test_a_run_on_two_nodes_has_a_process_for_each_gpu(words: tuple[str, ...]) -> None:
    command = [word for word in words if word != "gpus"]
    resources = Resources(nodes=2, gpus=4 if "gpus" in words else 0).model_dump()
    run = PlannedRun(id="1", name="n", step="s", factors={}, command=command, folder="o", after=[], resources=resources)
    said = refusal(run)
    assert SPREAD[words] in said if SPREAD[words] else said is None


def test_a_command_that_is_one_process_is_not_planned_for_two_nodes(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, TWO_STEPS.replace('time = "30"', 'time = "30", nodes = 2'))
    with pytest.raises(InputError, match=r"steps.train.resources.nodes = 2: .* give num_processes = 2"):
        validate(runs, ROOT)


def test_an_experiment_that_was_moved_is_not_read_from_its_old_place(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_STEPS)
    for name in ("first", "second"):
        runs = planned_runs(read_experiment(path), tmp_path / "place")
        write_plan(tmp_path / "place", path, read_experiment(path), runs)
        refuse_moved(tmp_path / "place")
        if name == "first":
            (tmp_path / "place").rename(tmp_path / "first")
    assert {Path(run.folder).parents[2] for run in read_plan(tmp_path / "first")} == {tmp_path / "first"}
    with pytest.raises(InputError, match="where it was planned; move it back, or plan again"):
        refuse_moved(tmp_path / "first")


def test_names_are_their_keys_own_and_never_taken() -> None:
    names: list[str] = []
    for i in range(3000):
        names.append(name_of(str(i % 1500), names))
    assert len(set(names)) == 3000 and name_of("7") == names[7]


def test_a_plan_is_written_checked_and_not_overwritten(tmp_path: Path, run_module) -> None:
    text = """
question = "Do a few words do?"
[factors]
max_tokens = [4, 8]
[steps.ask]
command = "run_personas"
factors = ["max_tokens"]
[steps.ask.flags]
prompts_json = "data/personas/prompts.json"
personae_json = "data/personas/personae.json"
model_id = "bundled:smollm2-135m"
"""
    folder = tmp_path / "e"
    words = ("plan", str(written(tmp_path, text)), "--output_dir", str(folder))
    done = run_module("experiment", *words)
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout and "experiment submit" in done.stdout
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [path.name for path in sorted((folder / "runs" / "ask").iterdir())] == sorted(row["name"] for row in runs)
    assert not any(list(Path(row["folder"]).iterdir()) for row in runs)
    # A plan may change until a run has begun.
    written(tmp_path, text.replace("max_tokens = [4", "max_tokens = [5"))
    assert run_module("experiment", *words, "--validate", "false").returncode == 0
    (Path(json.loads((folder / "runs.jsonl").read_text().splitlines()[0])["folder"]) / "config.json").write_text("{}")
    written(tmp_path, text)
    done = run_module("experiment", *words, "--validate", "false")
    assert done.returncode == 2 and "has begun, and in this plan it is gone" in done.stderr
    written(
        tmp_path,
        text.replace('factors = ["max_tokens"]', 'factors = ["max_tokens"]\nafter = []').replace(
            "prompts_json", "promts_json"
        ),
    )
    done = run_module("experiment", *words)
    assert done.returncode == 2 and "unknown flag --promts_json; the nearest is --prompts_json" in done.stderr
    for words, expected in (
        (("plan", "x.toml"), "--output_dir is for `plan`, which needs it"),
        (("plam", "x"), "the nearest is 'plan'"),
        (("submit",), "submit takes the folder of an experiment"),
        (("status", str(tmp_path)), "it has no runs.jsonl; run `src.experiment plan"),
    ):
        done = run_module("experiment", *words)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
