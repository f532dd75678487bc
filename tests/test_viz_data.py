"""What the app reads and says in numbers: files of every shape, roots that are kept to, statistics."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.jsonl import write_jsonl_atomic
from src.viz import charts, data, numbers
from src.viz.report import report
from tests.some_runs import dose_rows, make_run, make_runs, persona_rows


def frame_of(tmp_path: Path, rows: list[dict]) -> pd.DataFrame:
    path = tmp_path / "results.jsonl"
    write_jsonl_atomic(path, rows)
    return data.read_frame(path)


def as_rows(frame: pd.DataFrame) -> list[dict]:
    return [{k: v for k, v in row.items() if not pd.isna(v)} for row in frame.to_dict("records")]


def test_every_run_below_the_root_is_found_and_read(tmp_path: Path) -> None:
    make_runs(tmp_path)
    found = data.find_runs(tmp_path)
    assert found.runs == ["cool", "doses", "french", "older", "warm"]
    frames = {run: data.read_frame(p) for run in found.runs if (p := data.results_file(tmp_path, run))}
    assert {run: len(frame) for run, frame in frames.items()} == {"cool": 16, "warm": 16, "doses": 15, "older": 16}
    whole = data.together(frames)
    assert whole.groupby("run").size().to_dict() == {"cool": 16, "doses": 15, "older": 16, "warm": 16}
    assert len(data.scores(tmp_path, "french")) == 4 and data.scores(tmp_path, "cool") == []
    assert data.together({}).empty and data.groups_in(data.together({})) == []


def test_rows_are_read_as_they_are(tmp_path: Path) -> None:
    rows = persona_rows()
    expected = [{k: v for k, v in row.items() if v is not None} for row in rows]
    assert as_rows(frame_of(tmp_path, rows)) == expected
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert as_rows(data.read_frame(tmp_path / "results.json")) == expected


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "1", "response": "2026-11-21"}, {"id": "2", "response": "2026-11-21 10:00:00"}],
        [{"id": "1", "response": "007"}, {"id": "2", "response": ""}],
        [{"id": "1", "n": 1}, {"id": "2", "n": 1.5}, {"id": "3", "n": None}],
        [{"id": "1", "n": 1}, {"id": "2", "n": "mixed"}],
        [{"id": "1"}, {"id": "2", "late": "x"}],
        [{"id": "1", "response": "a\u2028b\r\n\x00"}],
    ],
)
def test_arrow_takes_nothing_for_something_else(tmp_path: Path, rows: list[dict]) -> None:
    expected = [{k: v for k, v in row.items() if v is not None} for row in rows]
    assert as_rows(frame_of(tmp_path, rows)) == expected


def test_what_arrow_cannot_hold_is_read_all_the_same(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, [{"id": "1", "response": "\ud800", "list": [1, 2]}])
    assert as_rows(frame) == [{"id": "1", "response": "\\ud800", "list": "[1, 2]"}]
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"id": "2", "resp')
    assert len(data.read_frame(tmp_path / "results.jsonl")) == 1
    (tmp_path / "results.jsonl").write_bytes(b"")
    assert data.read_frame(tmp_path / "results.jsonl").empty
    for text, complaint in (("{}", "expected a JSON list of rows"), ("[1]", "JSON list"), ("[", "results.json")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match=complaint):
            data.read_frame(tmp_path / "results.json")


def test_nothing_outside_the_root_is_read(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    make_run(root / "run", "run_personas", persona_rows())
    make_run(secret, "run_personas", persona_rows())
    os.symlink(secret, root / "linked")
    found = data.find_runs(root)
    assert found == data.Found(["run"], 1)
    for name in ("../secret", "linked", "/etc", "run/../../secret"):
        with pytest.raises(InputError, match="lies outside"):
            data.inside(root, name)
    (root / "run" / "results.jsonl").unlink()
    os.symlink(secret / "results.jsonl", root / "run" / "results.jsonl")
    with pytest.raises(InputError, match="lies outside"):
        data.results_file(root, "run")
    with pytest.raises(InputError, match="outside the run's folder"):
        report(root / "run")
    with pytest.raises(InputError, match="no such folder"):
        data.find_runs(tmp_path / "nowhere")


def test_filters_leave_what_was_chosen_and_an_empty_choice_leaves_all() -> None:
    frame = pd.DataFrame(persona_rows())
    assert len(data.chosen(frame, {"category": [], "persona": []})) == 16
    assert len(data.chosen(frame, {"category": ["animal"], "persona": ["cat"], "absent": ["x"]})) == 4
    assert data.chosen(frame, {"category": ["animal"], "persona": ["Hamlet"]}).empty
    assert len(data.chosen(pd.DataFrame({"persona": [1, 2, None]}), {"persona": ["1.0"]})) == 1
    assert "avg_entropy_thinking" not in data.numeric(frame) and "seed" not in data.numeric(frame)


def test_paired_differences_pair_texts_not_ids() -> None:
    first = pd.DataFrame({"prompt": ["a", "b", "c"], "prompt_id": ["0", "1", "2"], "x": [3.0, 5.0, 9.0]})
    second = pd.DataFrame({"prompt": ["b", "a", "d"], "prompt_id": ["0", "1", "2"], "x": [4.0, 1.0, 7.0]})
    found = numbers.paired_differences(first, second, "x")
    assert (found.summary.mean, found.summary.n, found.n_alone) == (1.5, 2, 2)
    assert dict(zip(found.pairs["prompt"], found.pairs["difference"], strict=True)) == {"a": 2.0, "b": 1.0}
    none = numbers.paired_differences(first, second.assign(x=np.nan), "x")
    assert none.summary is None and none.n_alone == 3


def test_later_turns_pair_within_their_own_conversation() -> None:
    rows = [(p, t, 10 * i + t) for i, p in enumerate(["a", "b"]) for t in (0, 1)]
    first = pd.DataFrame([{"prompt": "why?" if t else p, "prompt_id": p, "turn": t, "x": float(x)} for p, t, x in rows])
    found = numbers.paired_differences(first, first.assign(x=first["x"] + 1), "x")
    assert found.summary.n == 4 and set(found.pairs["difference"]) == {-1.0}


def test_runs_are_compared_persona_by_persona() -> None:
    # The second run lacks the persona with the high values: pooled, it would look lower by 4.5.
    rows = [("low", 1.0), ("high", 10.0)]
    first = pd.DataFrame([{"run": "a", "persona": p, "prompt": "q", "x": x} for p, x in rows])
    second = pd.DataFrame([{"run": "b", "persona": "low", "prompt": "q", "x": 1.0}])
    both = pd.concat([first, second])
    assert numbers.pair_within(both, "run") == ["persona"] and numbers.pair_within(both, "category") == ["run"]
    found = numbers.paired_differences(first, second, "x", ["persona"])
    assert (found.summary.mean, found.summary.n, found.n_alone) == (0.0, 1, 1)
    alone = numbers.paired_differences(first.assign(persona=None), second.assign(persona=None), "x", ["persona"])
    assert alone.summary.mean == 4.5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=20))
def test_correlations_are_those_of_numpy(pairs: list[tuple[float, float]]) -> None:
    frame = pd.DataFrame(pairs, columns=["a", "b"])
    row = numbers.correlations(frame, ["a", "b"]).iloc[0]
    assert row["n"] == len(pairs)
    if len(pairs) >= 3 and frame["a"].std() > 1e-3 and frame["b"].std() > 1e-3:
        assert abs(row["r"] - np.corrcoef(frame["a"], frame["b"])[0, 1]) < 1e-6 and 0 <= row["p"] <= 1
    elif frame["a"].nunique() < 2 or frame["b"].nunique() < 2:
        assert pd.isna(row["r"]) and pd.isna(row["p"])


def test_group_statistics_and_boxes_say_the_same() -> None:
    frame = pd.DataFrame(persona_rows(n_prompts=9))
    table = numbers.group_statistics(frame, "category", "avg_entropy")
    by_hand = frame[frame["category"] == "animal"]["avg_entropy"]
    row = table[table["category"] == "animal"].iloc[0]
    assert row["n"] == 18 and np.isclose(row["median"], by_hand.median())
    assert np.isclose(row["mean"], by_hand.mean()) and np.isclose(row["standard deviation"], by_hand.std())
    box = charts.boxes(frame, "category", "avg_entropy").data[0]
    place = list(box.x).index("animal")
    assert np.isclose(box.mean[place], by_hand.mean()) and np.isclose(box.median[place], by_hand.median())
    assert "<b>" not in json.dumps(charts.boxes(frame, "persona", "avg_entropy").to_plotly_json(), default=list)


def test_a_run_without_a_number_leaves_the_other_runs_numbers(tmp_path: Path) -> None:
    for name, value in (("a", 1.5), ("b", None)):
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", [{"id": "1", "x": value, "n": 3, "text": None}])
    both = data.together({name: data.read_frame(tmp_path / f"{name}.jsonl") for name in "ab"})
    assert data.numeric(both) == ["x", "n"] and both["x"].tolist()[0] == 1.5


def test_models_tasks_and_arms_never_share_a_mean() -> None:
    rows = [
        {"run": "r", "task": task, "model_id": model, "arm": arm, "persona": None, "category": "c", "x": float(i)}
        for i, (task, model, arm) in enumerate((t, m, a) for t in "st" for m in "mn" for a in ("unsteered", "+4"))
    ]
    frame = pd.DataFrame(rows)
    assert data.groups_in(frame) == ["run", "task", "model_id", "category", "arm"]
    for by in ("category", "arm", "task"):
        table = numbers.group_statistics(frame, by, "x")
        assert sorted(table["mean"]) == sorted(frame["x"]) and set(table["n"]) == {1}
        drawn = [mean for box in charts.boxes(frame, by, "x").data for mean in box.mean]
        assert sorted(drawn) == sorted(frame["x"])
        assert sum(len(box.y) for box in charts.violins(frame, by, "x").data) == len(frame)
    assert numbers.pair_within(frame, "arm") == ["run", "task", "model_id", "persona"]


def test_rows_without_a_group_are_a_group() -> None:
    frame = pd.DataFrame({"run": "r", "persona": ["a", None, "a"], "x": [1.0, 4.0, 5.0]})
    assert numbers.group_statistics(frame, "persona", "x").set_index("persona")["n"].to_dict() == {"a": 2, "(none)": 1}
    assert list(charts.boxes(frame, "persona", "x").data[0].x) == ["a", "(none)"]
    assert data.chosen(frame, {"persona": ["(none)"]})["x"].tolist() == [4.0]


def test_pairs_come_with_the_answers_of_their_own_conversation() -> None:
    rows = [
        {"run": run, "persona": None, "prompt_id": p, "turn": t, "prompt": "why?" if t else p, "x": 1.0,
         "response": f"{run}{p}{t}"}
        for run in "ab" for p in ("P", "Q") for t in (0, 1)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    sides = [frame[frame["run"] == name] for name in "ab"]
    within = numbers.pair_within(frame, "run")
    table = numbers.with_texts(numbers.paired_differences(*sides, "x", within).pairs, *sides, within)
    told = table[["response of the first", "response of the second"]].to_numpy().tolist()
    assert sorted(told) == [[f"a{p}{t}", f"b{p}{t}"] for p in "PQ" for t in (0, 1)]


def test_an_evaluations_control_is_told_by_its_arm() -> None:
    steered = pd.DataFrame(dose_rows()).assign(run="s")
    rows = [("unsteered", 0.0, 1.0), ("+4", 4.0, 1.0), ("+4 random", 4.0, 0.0)]
    evaluated = pd.DataFrame([{"run": "e", "arm": a, "coefficient": c, "prompt": "p", "score": s} for a, c, s in rows])
    for frame in (evaluated, pd.concat([steered, evaluated]), pd.concat([steered, evaluated.assign(task="t")])):
        table = numbers.dose_response(frame, "score")
        found = {(row.control, row.coefficient): row.mean for row in table.itertuples(index=False)}
        assert found == {(False, 0.0): 1.0, (False, 4.0): 1.0, (True, 0.0): 1.0, (True, 4.0): 0.0}
    both = numbers.dose_response(pd.concat([steered.assign(y=1.0), evaluated.assign(task="t", y=1.0)]), "y")
    assert both.groupby("run")["control"].sum().to_dict() == {"e · t": 2, "s": 3}


def test_doses_count_the_unsteered_rows_in_both_lines() -> None:
    table = numbers.dose_response(pd.DataFrame(dose_rows()).assign(run="r"), "mean_projection")
    assert list(zip(table["control"], table["coefficient"], strict=True)) == [
        (False, 0), (False, 4), (False, 8), (True, 0), (True, 4), (True, 8),
    ]  # fmt: skip
    assert table["mean"].round(6).tolist() == [1, 5, 9, 1, 1.4, 1.8] and set(table["n"]) == {3}
    assert len(charts.doses(table, "mean_projection").data) == 2
