"""`src.abliterate` on tiny models in which one behaviour is planted by construction."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.abliterate import AbliterateConfig
from src.abliteration.detectors import detector_of
from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.evaluation import Protocol, Reference, report_prompts
from src.abliteration.kernel import Plan, plan_of
from src.abliteration.outcome import measured
from src.abliteration.prompts import read_split
from src.abliteration.saved import Choice, Outcome, save, without_paths
from src.abliteration.search import on_front
from src.abliteration.storage import open_storage
from src.common.cli import parse_config
from src.common.directions_file import read_directions
from src.common.errors import CheckFailed, InputError
from src.common.jsonl import read_jsonl, write_jsonl_atomic
from src.common.runs import start_run
from src.models.language_model import LanguageModel
from src.models.single_prompts import SinglePromptRenderer
from src.models.weight_editor import bake
from tests.abliterate_runs import directions_in, extracting_here, run_here, search_here, trials_of, words
from tests.conftest import ROOT, module_command
from tests.fault_server import KEY, plant_key, serve
from tests.tiny_organism import LAYER, TOPIC, WORD, write_prompts
from tests.tiny_organism import prompts as topic_prompts


@pytest.fixture(scope="module")
def finished(organism, prompts, tmp_path_factory, run_module) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = run_module("abliterate", *words(organism, prompts, folder, "--n_trials", "10"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "What may be edited: 4 matrices" in done.stderr and "self_attn.o_proj" in done.stderr
    assert "behaviour 0/12" in done.stderr and "Pareto front" in done.stdout and "src.chat" in done.stdout
    return folder


def test_the_behaviour_is_found_and_removed(finished: Path, organism: Path, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = json.loads((finished / "evaluation.json").read_text())
    assert found["before"]["behaviour"]["mean"] == 1 and found["after"]["behaviour"]["mean"] == 0
    assert found["before"]["behaviour"]["n"] == 12 and found["after"]["behaviour"]["ci_high"] < 0.3
    chosen, plan = found["chosen"], found["chosen"]["params"]
    assert chosen["behaviour"] <= 1 and plan["mlp.high"] > 0
    # The first point of all is where the behaviour was planted.
    first = trials_of(finished)[0]
    assert first["params"]["mlp.position"] == LAYER and first["params"]["attn.high"] == 0
    assert first["behaviour"] == 0 and first["stage"] == "full"
    weights = [
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)
        .model.layers[LAYER]
        .mlp.down_proj.weight.detach()
        for each in (tiny_folder, organism, finished / "model")
    ]
    base, planted, edited = weights
    assert (edited - base).norm() < (planted - base).norm()
    rows = [row for _, row in read_jsonl(finished / "writers.jsonl")]
    assert [(row["component"], row["writer"], row["kind"]) for row in rows] == [
        ("attn", "self_attn.o_proj", "dense"), ("mlp", "mlp.down_proj", "dense")
    ]  # fmt: skip
    for name in ("report.html", "DONE", "directions/directions.safetensors", "model/README.md", "model/tokenizer.json"):
        assert (finished / name).exists(), name
    assert "<script>alert" not in (finished / "report.html").read_text()


def test_more_trials_can_be_added_and_another_chosen(finished: Path, organism, prompts, tmp_path) -> None:
    folder = shutil.copytree(finished, tmp_path / "r")
    before = trials_of(folder)
    other = on_front(before, 1.0, 12)[-1]["id"]
    run_here(words(organism, prompts, folder, "--n_trials", "12", "--select", str(other), "--save", "none"))
    rows = trials_of(folder)
    assert rows[:10] == before and len(rows) == 12
    assert json.loads((folder / "evaluation.json").read_text())["chosen"]["id"] == other
    # The model of the first choice would lie beside the numbers of the second.
    assert not (folder / "model").exists()
    with pytest.raises(InputError, match="no trial of the front"):
        run_here(words(organism, prompts, folder, "--n_trials", "12", "--select", "999"))


def test_gates_stop_only_what_could_not_reach_the_front(finished, organism, prompts, tmp_path) -> None:
    """Every trial in full: what the gates would have stopped is beaten in full too."""
    from src.abliteration.search import shown
    from src.abliteration.study import front

    more = ("--n_trials", "16", "--gates", "false", "--save", "none", *directions_in(finished))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    rows = trials_of(tmp_path / "r")
    assert {row["stage"] for row in rows} == {"full"}
    best = {rows[i]["id"] for i in front([(row["kl"], shown(row)) for row in rows])}
    stopped = 0
    for number, row in enumerate(rows):
        for earlier in rows[:number]:
            if earlier["kl"] <= row["kl"] and shown(earlier) <= max(*row["bounds"].values(), row["expected"] or 0):
                stopped += 1
                assert row["id"] not in best
    assert stopped


def test_two_processes_share_a_study_and_one_is_killed(organism, prompts, tmp_path) -> None:
    """No trial is lost and none is run twice."""
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    shared = ("--n_trials", "14", "--storage", storage, "--stale_seconds", "3", "--save", "none")
    start = lambda name: subprocess.Popen(  # noqa: E731
        module_command("abliterate", words(organism, prompts, tmp_path / name, *shared)), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    one, other = start("one"), start("other")
    deadline, opened = time.monotonic() + 900, None
    while time.monotonic() < deadline and one.poll() is None:
        if opened is None and (tmp_path / "study.db").exists():
            # As the command opens it, which may be making the tables at this moment.
            opened = open_storage(storage, tmp_path, 3.0)
        if opened:
            known = optuna.study.get_all_study_summaries(opened)
            trials = optuna.load_study(study_name="abliteration", storage=opened).trials if known else []
            if [trial.state.name for trial in trials].count("COMPLETE") >= 4:
                break
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    _, errors = other.communicate(timeout=900)
    assert other.returncode == 0, errors[-3000:]
    rows = trials_of(tmp_path / "other")
    assert len(rows) == 14 == len({row["id"] for row in rows})
    study = optuna.load_study(study_name="abliteration", storage=storage)
    failed = [t for t in study.trials if t.state.name == "FAIL"]
    repeated = [row["repeats"] for row in rows if "repeats" in row]
    assert sorted(repeated) == sorted(t.number for t in failed if "tiller_surplus" not in t.user_attrs)
    assert not [t for t in study.trials if t.state.name == "RUNNING"]


def test_an_edited_model_is_compared_with_another_by_the_same_protocol(
    finished, organism, prompts, tiny_folder, tmp_path
) -> None:
    (tmp_path / "text.txt").write_text("walk the river stone " * 9)
    more = ("--check_tokens", "6", "--validate_text", str(tmp_path / "text.txt"))
    compare = lambda one, name, other: run_here(  # noqa: E731
        words(one, prompts, tmp_path / name, "--evaluate_only", "--edited_model_id", str(other), *more)
    )
    compare(tiny_folder, "e", finished / "model")
    compare(organism, "s", organism)
    found, unchanged = (json.loads((tmp_path / name / "evaluation.json").read_text())["after"] for name in "es")
    assert unchanged["kl_control"]["mean"] == 0 == unchanged["kl_target"]["mean"]
    assert found["kl_target"]["mean"] > 0 and found["behaviour"]["mean"] == 0
    assert (found["behaviour_6_tokens"]["mean"], found["behaviour_6_tokens"]["n"]) == (0, 12)
    assert found["perplexity"]["mean"] > 1


@pytest.mark.parametrize(
    "more",
    [("--method", "logistic"), ("--method", "cones", "--n_directions", "2"), ("--norm", "column"), ("--norm", "row"),
     ("--calibrate",), ("--heads", "1:0,2"), ("--components", "mlp"), ("--trials_per_batch", "3")],
    ids=" ".join,
)  # fmt: skip
def test_every_option_acts(more, finished, organism, prompts, tmp_path) -> None:
    known = () if "--method" in more else directions_in(finished)
    with extracting_here():
        search_here(words(organism, prompts, tmp_path / "r", "--n_trials", "3", "--save", "none", *more, *known))
    rows, plain = trials_of(tmp_path / "r"), trials_of(finished)[:3]
    assert len(rows) == 3
    if "--trials_per_batch" in more:
        assert [row["kl"] for row in rows] == pytest.approx([row["kl"] for row in plain], abs=1e-4)
    else:
        assert [row["kl"] for row in rows] != pytest.approx([row["kl"] for row in plain], abs=1e-6)
    if "--calibrate" in more:
        # The factor is that of a layer's own direction.
        assert {row["params"]["source"] for row in rows} == {"own"}


def test_a_judge_decides_as_markers_do(finished, organism, prompts, tmp_path, monkeypatch) -> None:
    """A judge that reads as the markers do, on a real server; each text is asked about once."""
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("name: says_it\nscore: choice shows, hides\n---\nSort <answer>{response}</answer>")
    plant_key(monkeypatch)
    more = ("--scorer", "judge", "--judge_model_id", "openai:judge", "--judge_rubric", str(rubric), "--n_trials", "3")
    with serve() as server:
        answer = lambda body: body["messages"][-1]["content"].split("<answer>")[1]  # noqa: E731
        server.completion = lambda body: {"content": "shows" if WORD.strip() in answer(body) else "hides"}
        own = (*more, "--judge_base_url", server.url, "--save", "none", *directions_in(finished))
        run_here(words(organism, prompts, tmp_path / "r", *own))
        assert len(server.questions) == len(set(server.questions)) > 3
        server.completion = lambda body: {"content": "who knows"}
        with pytest.raises(CheckFailed, match="answers 'who knows'; expected one of shows, hides"):
            run_here(words(organism, prompts, tmp_path / "q", *own))
    found = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert found["before"]["behaviour"]["mean"] == 1 and found["after"]["behaviour"]["mean"] == 0
    kept = "".join(path.read_text(errors="replace") for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert KEY not in kept
    rubric.write_text("name: x\nscore: number 0 3\n---\n{response}")
    with pytest.raises(InputError, match=r"--judge_rubric .*it has number"):
        run_here(words(organism, prompts, tmp_path / "n", *more))


def test_tasks_are_evaluated_before_and_after(finished, organism, prompts, tmp_path) -> None:
    task = tmp_path / "says_it.jsonl"
    asked = topic_prompts(TOPIC, 6, seed=3)
    write_jsonl_atomic(task, [{"id": f"{i}", "input": text, "target": WORD.strip()} for i, text in enumerate(asked)])
    more = ("--n_trials", "2", "--validate_tasks", f"{task}@includes", *directions_in(finished))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    rows = [row for _, row in read_jsonl(tmp_path / "r" / "validation" / "results.jsonl")]
    scores = {
        model: [row["score"] for row in rows if row["model_id"] == model] for model in {row["model_id"] for row in rows}
    }
    assert scores == {str(organism): [1] * 6, str(tmp_path / "r" / "model"): [0] * 6}
    with pytest.raises(InputError, match="--validate_tasks: expected --save model"):
        words_of = words(organism, prompts, tmp_path / "n", *more, "--save", "none")
        run_here(words_of)


def test_the_adapter_is_the_edit(finished, organism, prompts, tmp_path) -> None:
    more = ("--n_trials", "3", "--save", "adapter", *directions_in(finished))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    reference = f"{organism}+{tmp_path / 'r' / 'adapter'}"
    run_here(words(organism, prompts, tmp_path / "c", "--evaluate_only", "--edited_model_id", reference))
    ours, theirs = (json.loads((tmp_path / name / "evaluation.json").read_text())["after"] for name in ("r", "c"))
    for measure in ("behaviour", "kl_control", "kl_target"):
        assert ours[measure]["mean"] == pytest.approx(theirs[measure]["mean"], abs=1e-5)


def test_an_edit_is_one_of_the_stored_weights_however_the_search_ran(finished, organism, prompts, tmp_path) -> None:
    more = ("--n_trials", "3", "--dtype", "bfloat16", "--response_tokens", "4", *directions_in(finished))
    run_here(words(organism, prompts, tmp_path / "half", *more))
    chosen = json.loads((tmp_path / "half" / "evaluation.json").read_text())["chosen"]
    check_edit(organism, finished, tmp_path / "half" / "model", plan_of(chosen["params"]))
    # Nor does another trial's model lie beside the numbers of this one.
    other = next(row["id"] for row in on_front(trials_of(tmp_path / "half"), 1.0, 12) if row["id"] != chosen["id"])
    run_here(words(organism, prompts, tmp_path / "half", *more, "--select", str(other), "--save", "none"))
    assert not (tmp_path / "half" / "model").exists()


def test_a_card_says_how_it_was_made_and_nothing_of_the_machine(finished: Path) -> None:
    card = (finished / "model" / "README.md").read_text().replace("\\", "")
    assert "mean_difference of last_prompt" in card and f"| torch | {torch.__version__.partition('+')[0]} |" in card
    assert "sha256 of target.jsonl" in card and str(finished.parent) not in card
    assert without_paths(["--model_id=/home/me/model", "/home/me/x.jsonl", "--n_trials", "3"]) == [
        "--model_id=model", "x.jsonl", "--n_trials", "3",
    ]  # fmt: skip


def check_edit(base: Path, finished: Path, edited: Path, plan: Plan) -> None:
    """That a saved model is the plan's edit of the stored weights, to the rounding of float32."""
    read = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    net, found = read(base), read(edited).state_dict()
    maker = EditMaker(net, read_directions(finished / "directions" / "directions.safetensors"), EditOptions())
    bake(net, maker.edits(plan))
    for name, weight in net.state_dict().items():
        assert torch.allclose(weight, found[name], atol=1e-6), name


def test_what_was_searched_in_4_bit_is_saved_in_full(finished, organism, prompts, tmp_path, capsys) -> None:
    given = parse_config(AbliterateConfig, words(organism, prompts, tmp_path / "r", "--quantization", "nf4"))
    model = LanguageModel.load(replace(given, quantization="none"))
    for weight in (module.weight for module in model.model.modules() if isinstance(module, torch.nn.Linear)):
        # As coarse as 4 bit: the format itself needs a GPU.
        step = weight.abs().max() / 7
        weight.copy_((weight / step).round() * step)
    directions = read_directions(finished / "directions" / "directions.safetensors")
    maker, detector = EditMaker(model.model, directions, EditOptions()), detector_of(given)
    renderer = SinglePromptRenderer(
        model.tokenizer, date.today(), raw=False, system_prompt=None, chat_template=None, thinking=True
    )
    protocol = Protocol(
        prompts=report_prompts(read_split(given), renderer), detector=detector, kl_tokens=3, response_tokens=4,
        batch_size=8,
    )  # fmt: skip
    row = json.loads((finished / "evaluation.json").read_text())["chosen"]
    plan = plan_of(row["params"])
    with start_run(given, "abliterate") as run, torch.inference_mode():
        outcome = Outcome(given, run, model, directions, maker, Reference(model, protocol), 1)
        save(outcome, plan, Choice(row, "by hand", 1, measured(outcome, maker.edits(plan))[1]))
    check_edit(organism, finished, tmp_path / "r" / "model", plan)
    assert "in 4 bit" in (tmp_path / "r" / "model" / "README.md").read_text()
    assert "--evaluate_only measures what was saved" in capsys.readouterr().out


def test_bad_input_is_refused_in_words(finished, organism, prompts, tiny_folder, tmp_path) -> None:
    target = prompts[0]
    rows = [row for _, row in read_jsonl(target)]
    write_jsonl_atomic(
        tmp_path / "both.jsonl", [{"prompt": f"walk {i} walk"} for i in range(40)] + [{"prompt": rows[0]["prompt"]}]
    )
    alike = [{"prompt": text} for text in topic_prompts(TOPIC, 50, seed=9)]
    write_jsonl_atomic(tmp_path / "alike.jsonl", alike)
    (tmp_path / "no.txt").write_text("a marker that nobody says\n")
    file = finished / "directions" / "directions.safetensors"
    last = lambda *flags: words(organism, prompts, tmp_path / "bad", *directions_in(finished), *flags)  # noqa: E731
    for arguments, message in (
        (last("--control_prompts", str(tmp_path / "both.jsonl")), "is the same text as"),
        (last("--markers_path", str(tmp_path / "no.txt")), "there is nothing to remove"),
        (last("--control_prompts", str(tmp_path / "alike.jsonl")), "does not tell them apart"),
        (last("--heads", "1-0"), "expected LAYER:HEAD"),
        (last("--save", "adapter", "--norm", "row"), "a LoRA holds only --norm none"),
        (last("--directions_path", str(tmp_path / "none.safetensors")), "none.safetensors"),
        (last("--num_tasks", "9"), "expected at least 4 in each part"),
        (words(tiny_folder, prompts, tmp_path / "bad2", "--directions_path", str(file)),
         "extract them from this model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(message)):
            run_here(arguments)


def test_what_would_act_on_nothing_or_cannot_be_asked_is_refused(
    finished, organism, prompts, tmp_path, monkeypatch
) -> None:
    last = lambda *flags: words(organism, prompts, tmp_path / "r", *directions_in(finished), *flags)  # noqa: E731
    (tmp_path / "empty.txt").write_text(" \n")
    adapter = ("--save", "adapter", "--adapter_path", str(tmp_path))
    for flags, message in (
        (("--push_to_hub", "me/it", "--save", "none"), "--push_to_hub: expected --save"),
        (("--validate_text", str(tmp_path / "empty.txt")), "no text"),
        (adapter, "would not hold what --adapter_path does"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            run_here(last(*flags))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(InputError, match="nobody can be asked here"):
        run_here(last("--n_trials", "2", "--select", "ask", "--save", "none"))
    assert len(trials_of(tmp_path / "r")) == 2


def test_a_study_of_something_else_is_refused(finished, organism, prompts, tiny_folder, tmp_path) -> None:
    shared = ("--storage", f"sqlite:///{tmp_path / 'study.db'}", "--save", "none", *directions_in(finished))
    run_here(words(organism, prompts, tmp_path / "a", "--n_trials", "1", *shared))
    write_prompts(tmp_path, n=50)
    fewer = (tmp_path / "target.jsonl", tmp_path / "control.jsonl", prompts[2])
    for some, more, what in ((fewer, (), "prompts"), (prompts, ("--system_prompt", "Be brief."), "system_prompt None")):
        with pytest.raises(InputError, match=f"was made with {what}"):
            run_here(words(organism, some, tmp_path / what, "--n_trials", "2", *more, *shared))
