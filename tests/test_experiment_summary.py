"""Runs joined into one table: what their numbers are called, and what does not belong into one table."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from src.cluster.alike import differences, refuse_other_inputs
from src.cluster.collecting import curves_of, numbers_of
from src.cluster.matrix import PlannedRun
from src.cluster.states import RunState
from src.cluster.summarizing import by_factor, report, summary_rows
from src.common.errors import InputError
from src.ops.statistics import summarize_few


def table(folder: Path, text: str) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    (folder / "summary.csv").write_text(text)
    return numbers_of(folder)


def test_numbers_of_a_table_have_the_same_names_in_every_run(tmp_path: Path) -> None:
    """What is one run's own, as the path of its model, is not part of a number's name."""
    rows = "task,model_id,n,score\nwords,base+{}/epoch_0,60,0.5\n"
    found = [table(tmp_path / run, rows.format(run)) for run in ("one", "other")]
    assert found == [{"n": 60, "score": 0.5}] * 2
    more = f"{rows}words,base,60,0.25\n"
    found = [table(tmp_path / run, more.format(run)) for run in ("one", "other")]
    assert found == [{"model_id 1.n": 60, "model_id 1.score": 0.5, "base.n": 60, "base.score": 0.25}] * 2


def test_no_row_of_a_table_takes_anothers_place(tmp_path: Path) -> None:
    """An arm is a dose in most rows and a word in one; where there are doses alone they are numbers."""
    head, doses = "task,arm,n,score\n", "x,+15,10,0.6\nx,-30,10,0.7\n"
    assert table(tmp_path / "a", f"{head}x,unsteered,10,0.5\n{doses}") == {
        "unsteered.n": 10, "unsteered.score": 0.5, "+15.n": 10, "+15.score": 0.6, "-30.n": 10, "-30.score": 0.7,
    }  # fmt: skip
    assert table(tmp_path / "b", head + doses) == {
        "arm +15.n": 10, "arm +15.score": 0.6, "arm -30.n": 10, "arm -30.score": 0.7,
    }  # fmt: skip
    assert table(tmp_path / "c", "task,score,auc\nx,0.5,\n") == {"score": 0.5}
    assert table(tmp_path / "d", head) == {}


def test_curves_of_a_run_that_is_writing_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert curves_of(tmp_path) == {"loss": [(1, 2.0)]}


def state(folder: Path, level: Any, values: dict[str, Any] | None, **provenance: Any) -> RunState:
    name = f"run_{len(list(folder.iterdir()))}"
    run = PlannedRun(
        id=name, name=name, step="test", factors={"level": level}, command=["probe"], folder=str(folder / name),
        after=[], resources={},
    )  # fmt: skip
    (folder / name).mkdir()
    if values is None:
        return RunState(run=run, state="failed", reason="FAILED (exit code 1:0)")
    (folder / name / "summary.json").write_text(json.dumps(values))
    (folder / name / "config.json").write_text(json.dumps({"command": "probe", "config": {"model_id": "m"}}))
    (folder / name / "provenance.json").write_text(json.dumps({"inputs": {}, "sessions": [], **provenance}))
    return RunState(run=run, state="done", seconds=3.0)


def test_a_number_does_not_take_the_place_of_what_is_known_of_the_run(tmp_path: Path) -> None:
    (row,) = summary_rows([state(tmp_path, 1, {"state": 5.0, "seconds": 7.0, "step": 9, "score": 1.0})])
    assert (row["state"], row["seconds"], row["step"], row["score"]) == ("done", 3.0, "test", 1.0)
    assert (row["result.state"], row["result.seconds"], row["result.step"]) == (5.0, 7.0, 9)


def test_levels_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    rows = summary_rows([state(tmp_path, level, {"score": score}) for level, score in ((1, 0.0), (True, 1.0))])
    assert [(row["level"], row["mean"]) for row in by_factor(rows)] == [(1, 0.0), (True, 1.0)]


def test_seeds_of_one_setting_have_their_own_interval(tmp_path: Path) -> None:
    """Over one factor's level the other factors vary too; over `all but seed` nothing but the seed."""
    rows = [
        {"step": "s", "state": "done", "factor.a": a, "factor.b": b, "factor.seed": seed, "score": 10.0 * a + b + seed}
        for a in (1, 2) for b in (0.5, 0.75) for seed in (0, 2)
    ]  # fmt: skip
    found = {(row["factor"], row["level"]): row for row in by_factor(rows) if row["measure"] == "score"}
    assert len(found) == 2 + 2 + 2 + 4 and found["a", 1]["runs"] == 4
    cell = found["all but seed", "a=2 b=0.75"]
    assert (cell["mean"], cell["runs"]) == (21.75, 2) and cell["high"] - cell["mean"] == pytest.approx(12.7062)
    alone = [{**row, "factor.a": 1, "factor.b": 1} for row in rows[:2]]
    assert [(row["factor"], row["level"], row["runs"]) for row in by_factor(alone)] == [
        ("seed", 0, 1), ("seed", 2, 1), ("all but seed", "a=1 b=1", 2),
    ]  # fmt: skip
    one = by_factor([{**row, "factor.b": 1} for row in rows])
    assert {row["factor"] for row in one} == {"a", "seed"}, "with one factor its levels say the same"


def test_every_step_is_plotted_by_what_differs_between_its_runs(tmp_path: Path) -> None:
    constants = {f"constant_{i}": 1.0 for i in range(50)}
    states = [state(tmp_path, level, constants | {"score": float(level)}) for level in (1, 2)]
    rows = summary_rows([*states, state(tmp_path, 2, None)])
    page = report("Which?", {}, states, rows)
    assert "<h2>test: score</h2>" in page and "<h2>test: constant_0</h2>" not in page
    assert "1 of 3 runs have not finished" in page and "factor.level" in page
    effects = {(row["measure"], row["level"]): row for row in by_factor(rows)}
    assert len(effects) == 2 * 51 and effects["score", 2]["without"] == 1 and effects["score", 1]["without"] == 0


def test_intervals_over_few_runs_cover_the_mean() -> None:
    """With two runs a percentile bootstrap's covers it half of the time."""
    draw = random.Random(0)
    for n in (2, 3, 6):
        found = [summarize_few([draw.gauss(5, 2) for _ in range(n)]) for _ in range(2_000)]
        hits = sum(each.ci_low <= 5 <= each.ci_high for each in found)
        assert 0.93 < hits / 2_000 < 0.97, (n, hits)
    one = summarize_few([3.0])
    assert (one.mean, one.std, one.n, one.ci_low, one.ci_high) == (3.0, None, 1, None, None)
    assert summarize_few([]) is None
    with pytest.raises(ValueError, match="not finite"):
        summarize_few([1.0, float("nan")])


def test_runs_of_other_inputs_do_not_share_a_table(tmp_path: Path) -> None:
    """Data that changed under their name between two runs of a matrix, or weights under a model's."""
    same = {"inputs": {"data.json": "aa"}, "model_fingerprint": "ff"}
    states = [state(tmp_path, level, {"score": 1}, **same) for level in (1, 2)]
    refuse_other_inputs([*states, state(tmp_path, 3, None)])
    for other, what in (
        ({"inputs": {"data.json": "bb"}}, "data.json: it"),
        ({"model_fingerprint": "ee"}, "--model_id"),
    ):
        with pytest.raises(InputError, match=f"{what}.* not the same for test run_0 and test run_"):
            refuse_other_inputs([*states, state(tmp_path, 4, {"score": 1}, **(same | other))])


def test_other_code_is_shown(tmp_path: Path) -> None:
    def made(sha: str, torch: str) -> dict[str, Any]:
        return {"sessions": [{"git": {"sha": sha * 40, "dirty": False}, "packages": {"torch": torch}}]}

    alike = [state(tmp_path, level, {"score": 1}, **made("a", "2.13")) for level in (1, 2)]
    assert differences(alike) == []
    found = differences([*alike, state(tmp_path, 3, {"score": 1}, **made("b", "2.13"))])
    assert [(row["what"], row["value"], row["runs"]) for row in found] == [("code", "a" * 12, 2), ("code", "b" * 12, 1)]
