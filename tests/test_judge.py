"""src.judge: columns in a new file, scores from probabilities, what is unscored, agreement, resuming."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import CheckFailed, InputError
from src.common.jsonl import read_jsonl
from src.judge import JudgeConfig, main
from tests.conftest import ROOT
from tests.fault_server import FaultServer

RUBRICS = ROOT / "data" / "rubrics"
ROWS = [
    {"id": f"r{i}", "prompt_id": f"p{i % 3}", "persona": "Hamlet" if i % 2 else "none", "prompt": f"ask {i}",
     "response": f"answer {i}", "avg_entropy": 0.5}
    for i in range(6)
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("planted_key")


def config(folder: Path, server: FaultServer, *rubrics: str, rows: list[dict] | None = None, **settings) -> JudgeConfig:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS if rows is None))
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_id": "openai:judge", "openai_base_url": server.url, "output_dir": folder / "run", "results_path": path,
        "rubrics": [RUBRICS / f"{name}.txt" for name in rubrics],
    }  # fmt: skip
    return JudgeConfig(**(values | settings))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)]


def number_of(body: dict[str, Any]) -> int:
    """Which row a judge was asked about."""
    found = re.search(r"answer (\d)", body["messages"][-1]["content"])
    return int(found[1])


def position(**probabilities: float) -> list[dict[str, Any]]:
    tops = [
        {"token": name.removeprefix("_"), "logprob": math.log(p), "bytes": None} for name, p in probabilities.items()
    ]
    return [tops[0] | {"top_logprobs": tops}]


def test_columns_are_added_in_a_new_file(tmp_path: Path, server: FaultServer) -> None:
    server.completion = lambda body: {
        "content": str(number_of(body) % 4) if "persona" in body["messages"][-1]["content"] else "refusal"
    }
    main(config(tmp_path, server, "persona_adherence", "refusal", group_by=["persona"]))
    rows = rows_of(tmp_path / "run" / "judged.jsonl")
    for row, before in zip(rows, ROWS, strict=True):
        assert {name: row[name] for name in before} == before
        assert row["persona_adherence"] == int(row["id"][1]) % 4 and row["refusal"] == "refusal"
        assert row["persona_adherence_read_from"] == "text" and "persona_adherence_repeats" not in row
    assert rows_of(tmp_path / "results.jsonl") == ROWS
    # Neither log-probabilities nor anything else is asked for that the rubric and the user do not want.
    assert all(set(body) == {"model", "messages", "seed"} for body in server.requests)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    measure = summary["rubrics"]["persona_adherence"]
    assert measure["score from text"]["mean"] == pytest.approx((0 + 1 + 2 + 3 + 0 + 1) / 6, abs=1e-4)
    assert (measure["rows"], measure["unscored"], measure["agreement"]) == (6, 0, None)
    assert summary["rubrics"]["refusal"] == {
        "refusal": 6, "partial": 0, "compliance": 0, "rows": 6, "unscored": 0, "agreement": None
    }  # fmt: skip
    means = {v: m["persona_adherence score from text"]["mean"] for v, m in summary["by persona"].items()}
    assert means == {"none": pytest.approx((0 + 2 + 0) / 3, abs=1e-4), "Hamlet": pytest.approx(5 / 3, abs=1e-4)}


def test_a_trait_is_the_mean_over_the_numbers_with_its_mass(tmp_path: Path, server: FaultServer) -> None:
    said = {0: position(_80=0.5, _60=0.3, Sure=0.2), 1: position(Sure=0.8, _10=0.1), 2: position(_7=0.6, _3=0.4)}
    server.completion = lambda body: {"content": "35", "logprobs": said[number_of(body) % 3]}
    main(config(tmp_path, server, "trait_expression", fill=["trait=curiosity"], num_tasks=3))
    assert all(body["logprobs"] is True and body["top_logprobs"] == 20 for body in server.requests)
    assert all("curiosity" in body["messages"][-1]["content"] for body in server.requests)
    rows = rows_of(tmp_path / "run" / "judged.jsonl")
    assert rows[0]["trait_expression"] == pytest.approx((80 * 0.5 + 60 * 0.3) / 0.8)
    assert rows[0]["trait_expression_mass"] == pytest.approx(0.8)
    assert rows[1]["trait_expression"] is None and rows[1]["trait_expression_mass"] == pytest.approx(0.1)
    # A judge whose numbers are several tokens has no distribution over numbers; its text has a number.
    assert (rows[2]["trait_expression"], rows[2]["trait_expression_mass"]) == (35, None)
    assert [row["trait_expression_read_from"] for row in rows] == ["probabilities", "probabilities", "text"]
    measures = json.loads((tmp_path / "run" / "summary.json").read_text())["rubrics"]["trait_expression"]
    # Two ways of reading have two means.
    assert measures["score from probabilities"]["mean"] == pytest.approx(72.5)
    assert measures["score from text"]["mean"] == 35 and measures["unscored"] == 1


def test_a_judge_that_thinks_or_is_cut_gives_no_wrong_score(tmp_path: Path, server: FaultServer) -> None:
    said = {
        0: {"content": "<think>1. First</think>90", "logprobs": position(_1=0.9, _10=0.1)},
        1: {"content": "10", "finish_reason": "length"},
    }
    server.completion = lambda body: said[number_of(body)]
    main(config(tmp_path, server, "coherence", num_tasks=2))
    rows = rows_of(tmp_path / "run" / "judged.jsonl")
    assert [(row["coherence"], row["coherence_read_from"]) for row in rows] == [(90, "text"), (None, "text")]


@pytest.mark.parametrize(("way", "asked", "score"), [("text", False, 35), ("probabilities", True, None)])
def test_the_way_of_reading_can_be_fixed(
    tmp_path: Path, server: FaultServer, way: str, asked: bool, score: float | None
) -> None:
    server.completion = lambda body: {"content": "35"}  # no log-probabilities, whatever is asked
    main(config(tmp_path, server, "coherence", score_from=way, num_tasks=1))
    assert ("logprobs" in server.requests[0]) is asked
    (row,) = rows_of(tmp_path / "run" / "judged.jsonl")
    assert (row["coherence"], row["coherence_read_from"]) == (score, way)


def test_repeats_are_told_one_by_one_with_their_agreement(tmp_path: Path, server: FaultServer) -> None:
    def judge(body: dict[str, Any]) -> dict[str, Any]:
        n, seed = number_of(body), body["seed"]
        if "refusal:" in body["messages"][-1]["content"]:
            return {"content": "I will not say" if n == 5 else "partial" if n == 4 and seed else "refusal"}
        return {"content": str(n % 4 if seed < 2 else 0)}

    server.completion = judge
    main(config(tmp_path, server, "persona_adherence", "refusal", n_repeats=3))
    assert sorted(body["seed"] for body in server.requests) == sorted([0, 1, 2] * 12)
    rows = rows_of(tmp_path / "run" / "judged.jsonl")
    assert rows[3]["persona_adherence_repeats"] == [3, 3, 0] and rows[3]["persona_adherence"] == 2
    assert rows[4]["refusal_repeats"] == ["refusal", "partial", "partial"] and rows[4]["refusal"] == "partial"
    assert rows[5]["refusal_repeats"] == [None] * 3 and rows[5]["refusal"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["rubrics"]
    assert summary["refusal"]["agreement"]["n"] == 5 and summary["refusal"]["agreement"]["level"] == "nominal"
    # Four rows of one word, one of two: a third of that row's pairs are equal.
    assert summary["refusal"]["agreement"]["exact"] == pytest.approx((4 + 1 / 3) / 5, abs=1e-4)
    assert summary["persona_adherence"]["agreement"]["level"] == "interval"
    assert len(rows_of(tmp_path / "run" / "results.jsonl")) == 36


def test_what_has_no_judgement_is_told_and_judged_by_the_same_command(tmp_path: Path, server: FaultServer) -> None:
    server.completion = lambda body: {"content": "1"}
    server.fault = lambda question, attempt: "400" if "answer 2" in question else None
    own = config(tmp_path, server, "persona_adherence")
    with pytest.raises(CheckFailed, match="1 of 6 questions"):
        main(own)
    assert [row["persona_adherence"] for row in rows_of(tmp_path / "run" / "judged.jsonl")] == [1, 1, None, 1, 1, 1]
    server.fault = lambda question, attempt: None
    main(own)
    assert len(server.requests) == 7
    assert [row["persona_adherence"] for row in rows_of(tmp_path / "run" / "judged.jsonl")] == [1] * 6
    assert [row["row_id"] for row in rows_of(tmp_path / "run" / "results.jsonl")] == [row["id"] for row in ROWS]


@pytest.mark.parametrize(
    ("rubrics", "settings", "told"),
    [
        (["trait_expression"], {}, r"wants \{trait\}"),
        (["refusal", "refusal"], {}, "two are named 'refusal'"),
        (["persona_adherence"], {"rows": [{"id": "a", "prompt": "p", "persona": "x"}]}, r":1: .*\{response\}"),
        (["refusal"], {"rows": [{"id": "a", "prompt": "p", "response": "r", "refusal": 1}]}, "'refusal' already"),
        (["refusal"], {"group_by": ["persna"]}, "--group_by persna"),
        (["refusal"], {"fill": ["trait"]}, "--fill trait"),
        (["refusal"], {"min_mass": 1.5}, "--min_mass 1.5"),
        (["refusal"], {"model_id": "anthropic:m", "score_from": "probabilities"}, "no log-probabilities"),
        (["nowhere"], {}, "no such file"),
    ],
)
def test_what_is_wrong_is_told_before_a_request(
    tmp_path: Path, server: FaultServer, rubrics: list[str], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        main(config(tmp_path, server, *rubrics, **settings))
    assert not server.requests


def test_an_empty_response_is_judged_as_it_is(tmp_path: Path, server: FaultServer) -> None:
    server.completion = lambda body: {"content": "refusal"}
    main(config(tmp_path, server, "refusal", rows=[{"id": 3, "prompt": "p", "response": ""}]))
    (row,) = rows_of(tmp_path / "run" / "judged.jsonl")
    assert row["refusal"] == "refusal" and row["id"] == "3"
