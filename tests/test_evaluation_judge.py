"""Evaluations that a judge scores, or grades for tasks of inspect-ai; the judge is a server on loopback."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import CheckFailed, InputError
from tests.fault_server import KEY, FaultServer
from tests.test_evaluate import PERSONAS, evaluate, rows_of, write_rows

NUMBER = "name: warmth\nscore: number 0 4\n---\nAs {persona}, to {prompt}: <answer>{response}</answer>. Mind {mood}.\n"
WORDS = "name: taste\nscore: choice good, bad\n---\nTo {prompt} ({target}): <answer>{response}</answer>\n"
GRADED = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import model_graded_qa
from inspect_ai.solver import generate

@task
def graded():
    return Task([Sample(id=1, input="Question?", target="a")], solver=generate(), scorer=model_graded_qa())
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"id": f"s{i}", "input": f"q{i}"} for i in range(3)]
    header = {"scorer": "judge", "prompt": "Say {input}!", "max_tokens": 4, "rubric": "warmth.txt"}
    write_rows(folder / "warm.jsonl", rows, header | {"fill": {"mood": "calm"}})
    write_rows(folder / "taste.jsonl", [row | {"target": "t"} for row in rows], header | {"rubric": "taste.txt"})
    (folder / "warmth.txt").write_text(NUMBER)
    (folder / "taste.txt").write_text(WORDS)
    (folder / "personae.json").write_text(json.dumps(PERSONAS))
    (folder / "graded.py").write_text(GRADED)
    return folder


def words(model: Path, server: FaultServer, *more: object) -> list[object]:
    judge = ["--judge_model_id", "openai:j", "--judge_base_url", server.url]
    return ["--model_id", model, "--device", "cpu", "--backend", "hf", *judge, *more]


def verdict(body: dict[str, Any]) -> dict[str, str]:
    """A judge that has no opinion on q1."""
    asked = body["messages"][-1]["content"]
    if "q1" in asked:
        return {"content": "hard to say"}
    return {"content": "3" if "Mind" in asked else "bad" if "q2" in asked else "Good."}


def test_a_judge_scores_on_the_rubrics_scale(
    tiny_folder: Path, tasks: Path, tmp_path: Path, server: FaultServer
) -> None:
    server.completion = verdict
    own = words(
        tiny_folder, server, "--tasks", tasks / "warm.jsonl", tasks / "taste.jsonl", "--personae_json",
        tasks / "personae.json", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    said = evaluate(*own)
    rows = rows_of(tmp_path / "run")
    shown = {(row["task"], row["sample_id"]): (row["score"], row["judged"], row["answer"]) for row in rows}
    assert shown == {
        ("warm", "s0"): (0.75, 3.0, "3.0"), ("warm", "s1"): (None, None, None), ("warm", "s2"): (0.75, 3.0, "3.0"),
        ("taste", "s0"): (1.0, "good", "good"), ("taste", "s1"): (None, None, None),
        ("taste", "s2"): (0.0, "bad", "bad"),
    }  # fmt: skip
    # What is judged is the row's own answer, as the row's own persona.
    asked = set(server.questions)
    for row in rows:
        if row["task"] == "warm":
            answer = f"<answer>{row['response']}</answer>"
            assert f"As {row['persona']}, to {row['prompt']}: {answer}. Mind calm." in asked
    assert {tuple(sorted(request)) for request in server.requests} == {("messages", "model")}
    # Nothing that has no score is in a mean.
    lines = [line.split(",") for line in (tmp_path / "run" / "summary.csv").read_text().splitlines()]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [(row["n"], row["unscored"]) for row in table] == [("3", "1")] * 4
    assert [float(row["score"]) for row in table] == [0.75, 0.75, 0.5, 0.5] and "3 (1 unscored)" in said
    costs = rows_of(tmp_path / "run" / "judge", "api-costs.jsonl")
    assert sum(row["requests"] for row in costs) == len(server.requests) == len(asked)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_judge_that_fails_is_asked_only_the_rest(
    tiny_folder: Path, tasks: Path, tmp_path: Path, server: FaultServer
) -> None:
    server.completion = verdict
    server.fault = lambda question, attempt: "400" if "q2" in question else None
    own = words(tiny_folder, server, "--tasks", tasks / "taste.jsonl", "--output_dir", tmp_path / "run")
    with pytest.raises(CheckFailed, match=r"no answer after 1 attempt: .*fault 400"):
        evaluate(*own)
    assert not (tmp_path / "run" / "DONE").exists()
    assert [row["failures"] > 0 for row in rows_of(tmp_path / "run" / "judge", "api-costs.jsonl")] == [True]
    server.fault = lambda question, attempt: None
    answered = {question for question in server.questions if "q2" not in question}
    server.requests.clear()
    evaluate(*own)
    assert [row["score"] for row in rows_of(tmp_path / "run")] == [1.0, None, 0.0]
    assert not set(server.questions) & answered and any("q2" in question for question in server.questions)
    # Another judge in the same folder is another run.
    with pytest.raises(InputError, match="judge_model_id"):
        evaluate(*own, "--judge_model_id", "openai:other")


def test_a_grader_is_the_judge_and_never_the_model_itself(
    tiny_folder: Path, tasks: Path, tmp_path: Path, server: FaultServer
) -> None:
    server.completion = lambda body: {"content": "GRADE: C"}
    task = ["--tasks", f"{tasks / 'graded.py'}@graded", "--max_tokens", "4", "--output_dir"]
    evaluate(*words(tiny_folder, server, *task, tmp_path / "run"))
    assert [row["score"] for row in rows_of(tmp_path / "run")] == [1.0] and len(server.requests) == 1
    with pytest.raises(InputError, match="graded, sample 1: the task asks for a grader; give --judge_model_id"):
        evaluate("--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", *task, tmp_path / "alone")


def test_what_is_wrong_with_a_judged_task_is_told_before_a_request(
    tiny_folder: Path, tasks: Path, tmp_path: Path, server: FaultServer
) -> None:
    warm, taste = tasks / "warm.jsonl", tasks / "taste.jsonl"
    (tasks / "bare.jsonl").write_text('{"input": "q"}\n')
    write_rows(tasks / "odd.jsonl", [{"input": "q"}], {"scorer": "judge", "rubric": "warmth.txt"})
    write_rows(tasks / "aim.jsonl", [{"input": "q"}], {"scorer": "judge", "rubric": "taste.txt"})
    (tasks / "deaf.txt").write_text("name: deaf\nscore: number 0 4\n---\nTo {prompt}\n")
    write_rows(tasks / "deaf.jsonl", [{"input": "q"}], {"scorer": "judge", "rubric": "deaf.txt"})
    good = {"scorer": "judge", "rubric": "taste.txt", "positive": "fine"}
    write_rows(tasks / "fine.jsonl", [{"input": "q", "target": "t"}], good)
    folder = ["--output_dir", tmp_path / "run"]
    for more, problem in (
        (["--tasks", warm], "wants {persona}; give --personae_json"),
        (["--tasks", f"{tasks / 'bare.jsonl'}@judge"], "give --judge_rubric"),
        (["--tasks", tasks / "odd.jsonl"], "{mood} is none of .*`fill` of the header"),
        (["--tasks", tasks / "deaf.jsonl"], "{response} is not in it"),
        (["--tasks", tasks / "aim.jsonl"], "wants {target}, and sample '0' has none"),
        (["--tasks", tasks / "fine.jsonl"], "`positive` is 'fine'; its words are good, bad"),
        (["--tasks", f"{taste}@exact"], "no task wants a judge"),
        (["--tasks", taste, "--judge_model_id", "openai:"], "--judge_model_id openai:: no model after"),
        (["--tasks", taste, "--judge_model_id", "anthropic:c", "--judge_temperature", "0"], "anthropic takes no such"),
    ):
        with pytest.raises(InputError, match=problem):
            evaluate(*words(tiny_folder, server, *more, *folder))
    with pytest.raises(InputError, match="a judge scores it; give --judge_model_id"):
        evaluate("--model_id", tiny_folder, "--tasks", taste, *folder)
    with pytest.raises(InputError, match="nobody judges"):
        evaluate("--model_id", tiny_folder, "--tasks", taste, "--judge_base_url", server.url, *folder)
    assert not server.requests and not (tmp_path / "run").exists()
