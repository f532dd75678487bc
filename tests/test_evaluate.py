"""src.evaluate as a user runs it, on a tiny model."""

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log

from src.common.cli import parse_config
from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed, InputError
from src.common.rows import Persona
from src.evaluate import EvaluateConfig, main
from src.evaluation.calls import Call
from src.models.chat_format import PersonaRenderer
from src.models.language_model import LanguageModel, generate_all
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest
from tests.conftest import ROOT, module_command
from tests.steering_specs import write_tiny_directions
from tests.tiny_adapters import train_adapter, write_adapter

WORDS = ["apple", "<b>bread</b>", "chair {input}", "dance", "Łódź"]
QUESTIONS = [("Two and two?", ["three", "four"], "B"), ("Ice is …", ["cold", "hot", "loud"], "A")]
PERSONAS = [
    {"persona": "assistant", "category": "stock", "article": "an"},
    {"persona": "Hamlet", "category": "fiction", "article": ""},
]
CODE = '''
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate, solver, system_message, use_tools
from inspect_ai.tool import tool

SAMPLES = [Sample(id=i, input=f"Question {i}?", target="a") for i in range(3)]

@task
def letters():
    return Task(SAMPLES, solver=[system_message("Be brief."), generate()], scorer=[includes(), match()],
                config=GenerateConfig(max_tokens=5))

@task
def nucleus():
    return Task(SAMPLES, solver=generate(), scorer=includes(), config=GenerateConfig(top_p=0.5, temperature=1.0))

@solver
def broken():
    async def solve(state, generate):
        raise KeyError("nothing here")
    return solve

@task
def failing():
    return Task(SAMPLES, solver=broken(), scorer=includes())

@tool
def add():
    async def execute(x: int, y: int):
        """Add two numbers.

        Args:
            x: First.
            y: Second.
        """
        return x + y
    return execute

@task
def remote():
    raise ConnectionError("Couldn't reach 'a/b' on the Hub")

@task
def lacking():
    import not_there_at_all

@task
def tooled():
    return Task(SAMPLES, solver=[use_tools(add()), generate()], scorer=includes())
'''


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"id": f"w{i}", "input": word, "target": word.title()} for i, word in enumerate(WORDS)]
    write_rows(folder / "words.jsonl", rows, {"scorer": "includes", "prompt": "Write {input}!", "max_tokens": 6})
    rows = [{"input": text, "choices": choices, "target": right} for text, choices, right in QUESTIONS]
    write_rows(folder / "quiz.jsonl", rows, {"scorer": "choice", "prompt": "{input}\n{choices}"})
    (folder / "personae.json").write_text(json.dumps(PERSONAS))
    (folder / "mine.py").write_text(CODE)
    write_tiny_directions(folder / "d.safetensors", tiny_folder)
    for name, seed in (("one", 1), ("two", 2)):
        write_adapter(tiny_folder, folder / name, seed=seed)
    return folder


def write_rows(path: Path, rows: list[dict], header: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".task.json").write_text(json.dumps(header))


def evaluate(*words: object) -> str:
    """The command in this process; returns what it prints and logs."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        main(parse_config(EvaluateConfig, [str(word) for word in words]))
    return said.getvalue()


def rows_of(folder: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def without_ids(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("id", "cell", "model_id")} for row in rows]


@pytest.fixture(scope="module")
def finished(inputs: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two tasks on the base model and two adapters as two personas, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, evaluate(*arguments(inputs, tiny_folder), "--output_dir", folder)


def arguments(inputs: Path, model: Path) -> list[object]:
    return [
        "--model_id", model, f"{model}+{inputs / 'one'}", f"{model}+{inputs / 'two'}", "--device", "cpu", "--backend",
        "hf", "--tasks", inputs / "words.jsonl", inputs / "quiz.jsonl", "--personae_json", inputs / "personae.json",
    ]  # fmt: skip


def test_every_cell_has_its_rows_and_its_log(finished, inputs: Path, tiny_folder: Path) -> None:
    folder, said = finished
    rows = rows_of(folder)
    models = [str(tiny_folder), f"{tiny_folder}+{inputs / 'one'}", f"{tiny_folder}+{inputs / 'two'}"]
    expected = [
        (task, model, persona["persona"], sample)
        for task, samples in (("words", [f"w{i}" for i in range(5)]), ("quiz", ["0", "1"]))
        for model in models
        for persona in PERSONAS
        for sample in samples
    ]
    assert [(row["task"], row["model_id"], row["persona"], row["sample_id"]) for row in rows] == expected
    assert len({row["id"] for row in rows}) == len(rows) and all(list(row) == list(rows[0]) for row in rows)
    assert [row["prompt"] for row in rows[:5]] == WORDS
    for cell in rows_of(folder, "cells.jsonl"):
        log = read_eval_log(str(folder / cell["log"]))
        own = [row for row in rows if row["cell"] == cell["id"]]
        assert log.status == "success" and len(log.samples) == len(own) == cell["n_rows"]
        assert log.results.scores[0].metrics["mean"].value == pytest.approx(sum(row["score"] for row in own) / len(own))
        for sample, row in zip(sorted(log.samples, key=lambda s: str(s.id)), own, strict=True):
            assert sample.output.completion == row["response"]
            assert sample.output.metadata.get("avg_entropy") == row["avg_entropy"]
    assert len(list((folder / "evals").iterdir())) == 12 and (folder / "DONE").exists()
    assert "Differences on the same samples" in said and str(folder / "compare.html") in said
    assert "<b>bread</b>" not in (folder / "compare.html").read_text()
    summary = (folder / "summary.csv").read_text().splitlines()
    assert len(summary) == 13 and summary[0].startswith("task,model_id,persona,arm,n,n_samples,score,ci_low,ci_high")


def test_rows_hold_what_the_model_gives_to_the_prompts_of_every_command(finished, inputs: Path, tiny_folder) -> None:
    """The renderer that training and all commands share gives the tokens; each adapter is loaded alone here."""
    rows = {(r["task"], r["model_id"], r["persona"], r["sample_id"]): r for r in rows_of(finished[0])}
    answers = {row["id"]: row for row in rows_of(finished[0], "answers.jsonl")}
    for reference in (str(tiny_folder), f"{tiny_folder}+{inputs / 'two'}"):
        model = LanguageModel.load(EngineConfigBase(model_id=reference, output_dir=Path("unused"), device="cpu"))
        renderer = PersonaRenderer(model.tokenizer, "both", today=date.today())
        for who in (Persona(**each) for each in PERSONAS):
            render = lambda text, r=renderer, who=who: r.render(text, who.persona, who.article)  # noqa: E731
            prompts = [render(f"Write {word}!") for word in WORDS]
            calls = [
                Call(reference=reference, arm="unsteered", token_ids=p.token_ids, header=p.header, max_tokens=6)
                for p in prompts
            ]
            requests = [GenerationRequest(id=c.id, token_ids=c.token_ids, max_tokens=6) for c in calls]
            for i, result in enumerate(generate_all(model, requests)):
                row = rows["words", reference, who.persona, f"w{i}"]
                assert answers[result.id]["token_ids"] == list(result.token_ids)
                assert row["response"] == result.text and row["num_tokens"] == len(result.token_ids)
                assert row["avg_entropy"] == pytest.approx(sum(result.entropy) / len(result.entropy), abs=1e-4)
                assert row["score"] == float(WORDS[i].title() in result.text)
            for i, (text, choices, right) in enumerate(QUESTIONS):
                listed = "\n".join(f"{'ABC'[j]}. {choice}" for j, choice in enumerate(choices))
                prompt = render(f"{text}\n{listed}").token_ids
                letters = "ABC"[: len(choices)]
                ids = [model.tokenizer(letter, add_special_tokens=False).input_ids for letter in letters]
                assert all(len(each) == 1 for each in ids)
                logits = model.log_probabilities(
                    [
                        (TokenSequence(id="x", token_ids=(*prompt, *each), prompt_length=len(prompt)), None)
                        for each in ids
                    ]
                )
                values = [float(each[0]) for each in logits]
                row = rows["quiz", reference, who.persona, str(i)]
                assert row["answer"] == letters[values.index(max(values))] and row["score"] == float(
                    row["answer"] == right
                )


def test_a_finished_run_asks_nothing_again_and_other_settings_are_refused(finished, inputs, tiny_folder) -> None:
    folder, _ = finished
    names = ("results.jsonl", "summary.csv", "compare.html", "answers.jsonl", "cells.jsonl")
    before = {name: (folder / name).read_bytes() for name in names}
    said = evaluate(*arguments(inputs, tiny_folder), "--output_dir", folder)
    assert "12 of 12 cells are there already" in said and "Generating" not in said
    assert {name: (folder / name).read_bytes() for name in names} == before
    with pytest.raises(InputError, match="max_tokens was null, is now 7"):
        evaluate(*arguments(inputs, tiny_folder), "--output_dir", folder, "--max_tokens", "7")


def test_letters_cannot_be_steered_by_what_acts_on_generated_tokens(inputs: Path, tiny_folder: Path, tmp_path) -> None:
    """A letter is one token, and nothing generated comes before it: the doses would be told to have no effect."""
    add = {
        "directions_path": str(inputs / "d.safetensors"), "layers": "1", "op": "add", "coefficient": 5.0,
        "positions": "generated",
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps([add]))
    with pytest.raises(InputError, match=r"positions .* of which there are none"):
        evaluate(
            "--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--tasks", inputs / "quiz.jsonl",
            "--interventions_path", tmp_path / "spec.json", "--output_dir", tmp_path / "out",
        )  # fmt: skip


def test_doses_change_the_answers_and_the_unsteered_arm_does_not(inputs: Path, tiny_folder: Path, tmp_path) -> None:
    some = [
        "--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--tasks", inputs / "words.jsonl",
        inputs / "quiz.jsonl",
    ]  # fmt: skip
    evaluate(*some, "--output_dir", tmp_path / "plain")
    steering = [
        "--steer",
        f"{inputs / 'd.safetensors'}:0-1:1",
        "--coefficients",
        "0.001",
        "2",
        "40",
        "--random_control",
    ]
    evaluate(*some, *steering, "--output_dir", tmp_path / "doses")
    rows = rows_of(tmp_path / "doses")
    arms = {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}
    assert list(arms)[:4] == ["unsteered", "+0.001", "+2", "+40"] and len(arms) == 7
    plain = rows_of(tmp_path / "plain")
    assert without_ids(arms["unsteered"]) == without_ids(plain)
    quiz = lambda some: [row["probability"] for row in some if row["task"] == "quiz"]  # noqa: E731
    moved = {name: sum(abs(p - q) for p, q in zip(quiz(some), quiz(plain), strict=True)) for name, some in arms.items()}
    assert 0 == moved["unsteered"] <= moved["+0.001"] < moved["+2"] and moved["+40"] > 0
    assert moved["+2"] != moved["+2 random"]
    words = lambda some: [row["response"] for row in some if row["task"] == "words"]  # noqa: E731
    assert words(arms["+40"]) != words(plain) == words(arms["+0.001"])


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_go_on_to_the_same_rows(inputs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"id": str(i), "input": f"word {i}", "target": "a"} for i in range(8)]
    write_rows(tmp_path / "long.jsonl", rows, {"scorer": "includes"})
    words = [
        "--model_id", tiny_folder, f"{tiny_folder}+{inputs / 'one'}", "--device", "cpu", "--backend", "hf", "--tasks",
        tmp_path / "long.jsonl", inputs / "quiz.jsonl", "--max_tokens", "60", "--temperature", "0.8", "--n_reps", "2",
        "--batch_size", "2",
    ]  # fmt: skip
    broken = tmp_path / "broken"
    kept = 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        with subprocess.Popen(
            module_command("evaluate", [*words, "--output_dir", broken]), cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            wait_for_answers(broken / "answers.jsonl", kept + 4, process)
            os.kill(process.pid, number)
            said = process.stderr.read()
        assert process.returncode == code, said
        assert not (broken / "DONE").exists()
        kept = len((broken / "answers.jsonl").read_bytes().split(b"\n")) - 1
    evaluate(*words, "--output_dir", broken)
    evaluate(*words, "--output_dir", tmp_path / "whole")
    for name in ("results.jsonl", "summary.csv"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = rows_of(broken)
    assert len(found) == 2 * 2 * (8 + 2) and len({row["id"] for row in found}) == len(found)
    # Repeats are drawn anew, and each call was answered once.
    pairs = [(a["response"], b["response"]) for a, b in zip(found[:16:2], found[1:16:2], strict=True)]
    assert all(a != b for a, b in pairs)
    ids = [row["id"] for row in rows_of(broken, "answers.jsonl")]
    assert len(ids) == len(set(ids)) == 2 * (16 + 2)


def wait_for_answers(path: Path, n: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {n} answers; exit code {process.poll()}, {process.stderr.read()[-2000:]}")


def test_tasks_of_inspect_ai_run_as_they_are(
    inputs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Relative paths, from another folder than the task's own.
    monkeypatch.chdir(tmp_path)
    model = ["--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--output_dir"]
    evaluate(*model, "own", "--tasks", f"{inputs / 'mine.py'}@letters", "--num_tasks", "2")
    rows = rows_of(tmp_path / "own")
    assert [row["sample_id"] for row in rows] == ["0", "1"] and rows[0]["num_tokens"] <= 5
    assert all(row["score"] == row["score_includes"] == float("a" in row["response"].lower()) for row in rows)
    for name, problem in (("nucleus", "sample 0: the task sets top_p to 0.5"), ("tooled", "gives tools .add for one")):
        with pytest.raises(InputError, match=problem):
            evaluate(*model, tmp_path / name, "--tasks", f"{inputs / 'mine.py'}@{name}")
        assert not (tmp_path / name / "DONE").exists()
    for name, problem in (
        ("remote", "cannot be reached: ConnectionError: .*'a/b'"),
        ("lacking", "--with not_there_at_all"),
    ):
        with pytest.raises(InputError, match=problem):
            evaluate(*model, tmp_path / name, "--tasks", f"{inputs / 'mine.py'}@{name}")
    with pytest.raises(CheckFailed, match="nothing here"):
        evaluate(*model, tmp_path / "failing", "--tasks", f"{inputs / 'mine.py'}@failing")


def test_an_adapter_is_asked_what_it_was_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    questions = [f"Is {word} a word?" for word in ("rain", "snow", "hail", "fog", "sleet", "wind")]
    # Without its unembedding a random model this narrow cannot tell tokens apart.
    some = ["v_proj", "down_proj", "lm_head"]
    pairs = [(question, "Yes") for question in questions]
    loss = train_adapter(tiny_folder, tmp_path / "yes", pairs, steps=40, lr=2e-2, batch=4, target_modules=some)
    assert loss < 0.5, "the test needs an adapter that has learned something"
    rows = [{"id": q, "input": q.split()[1], "target": "Yes"} for q in questions]
    write_rows(tmp_path / "words.jsonl", rows, {"scorer": "exact", "prompt": "Is {input} a word?", "max_tokens": 3})
    adapted = f"{tiny_folder}+{tmp_path / 'yes'}"
    evaluate(
        "--model_id", tiny_folder, adapted, "--device", "cpu", "--backend", "hf", "--tasks", tmp_path / "words.jsonl",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    scores = {
        m: [r["score"] for r in rows_of(tmp_path / "run") if r["model_id"] == m] for m in (str(tiny_folder), adapted)
    }
    assert scores == {str(tiny_folder): [0.0] * 6, adapted: [1.0] * 6}
    # Training, in the helper, and the evaluation render each question to the same tokens.
    renderer = PersonaRenderer(
        LanguageModel.load(EngineConfigBase(model_id=adapted, output_dir=tmp_path)).tokenizer, "system"
    )
    prompts = [renderer.render(question) for question in questions]
    calls = {
        Call(reference=adapted, arm="unsteered", token_ids=p.token_ids, header=p.header, max_tokens=3).id
        for p in prompts
    }
    assert calls < {row["id"] for row in rows_of(tmp_path / "run", "answers.jsonl")}


def test_risks_have_their_measures(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"input": f"Will it rain on day {i}?", "target": i % 2} for i in range(6)]
    write_rows(tmp_path / "rain.jsonl", rows, {"scorer": "risk", "choices": ["No", "Yes, certainly"]})
    model = ["--model_id", tiny_folder, "--device", "cpu", "--backend", "hf"]
    evaluate(*model, "--tasks", tmp_path / "rain.jsonl", "--output_dir", tmp_path / "run")
    from sklearn.metrics import brier_score_loss, roc_auc_score

    found = rows_of(tmp_path / "run")
    p, y = [row["probability"] for row in found], [row["label"] for row in found]
    assert y == [0, 1, 0, 1, 0, 1] and all(0 < each < 1 for each in p)
    head, line = [text.split(",") for text in (tmp_path / "run" / "summary.csv").read_text().splitlines()]
    summary = dict(zip(head, line, strict=True))
    assert float(summary["auc"]) == pytest.approx(roc_auc_score(y, p), abs=1e-4)
    assert float(summary["brier"]) == pytest.approx(brier_score_loss(y, p), abs=1e-4)
    (log,) = (tmp_path / "run" / "evals").iterdir()
    metrics = read_eval_log(str(log)).results.scores[0].metrics
    assert metrics["area_under_curve"].value == pytest.approx(float(summary["auc"]), abs=1e-4)


def test_what_is_wrong_answers_before_anything_is_loaded(run_module: Callable, tmp_path: Path, inputs: Path) -> None:
    done = run_module("evaluate", "--model_id", "bundled:smollm2-135m", "--tasks", "nowhere.jsonl", "--output_dir", "x")
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(InputError, match="equal repeats"):
        evaluate(
            "--model_id", "bundled:smollm2-135m", "--tasks", inputs / "words.jsonl", "--n_reps", "2", "--output_dir",
            tmp_path / "run",
        )  # fmt: skip
    config = lambda *more: parse_config(EvaluateConfig, ["--output_dir", "x", "--tasks", "a", *more])  # noqa: E731
    for more, problem in (
        (["--model_id", "a", "a"], "named twice"),
        (["--model_id", "a", "b", "--adapter_path", "c"], "X.ADAPTER_PATH"),
        (["--model_id", "a", "--coefficients", "1"], "goes with --steer"),
        (["--model_id", "a", "--temperature", "-1"], "positive"),
        (["--model_id", "a", "--n_reps", "0"], "at least 1"),
        (["--model_id", "a", "--project_onto", "d:1"], "src.steer"),
    ):
        with pytest.raises(InputError, match=problem):
            config(*more)


def test_a_prompt_that_fills_the_context_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [{"id": "big", "input": "word " * 600, "target": "a"}], {"scorer": "exact"})
    with pytest.raises(InputError, match=r"long, sample big: a prompt has .* tokens, and the context .* is 512"):
        evaluate(
            "--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--tasks", tmp_path / "long.jsonl",
            "--output_dir", tmp_path / "run",
        )  # fmt: skip
