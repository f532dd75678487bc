"""`src.view` on real run folders: finished, unfinished, hostile, and no run folder at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.jsonl import JsonlWriter, write_jsonl_atomic
from src.common.model_config import ModelConfigBase
from src.common.runs import start_run
from src.view import ViewConfig, app_root, main
from src.viz import data, numbers
from src.viz.report import MOST_ROWS, own_report, report, title
from src.viz.serving import names_of

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = {"personas": {"a <b>": {"avg_entropy": {"mean": 1.25, "std": 0.5, "n": 3}}}, "categories": {}, "rows": 7}


def make_run(folder: Path, rows: int = 3, finish: bool = True) -> Path:
    config = ModelConfigBase(output_dir=folder, model_id="some/model")
    with start_run(config, "probe") as run:
        with JsonlWriter(run.path("results.jsonl")) as writer:
            for n in range(rows):
                writer.write({"id": f"row-{n}-", "response": "</script><script>alert(1)</script>\ud800"})
        if finish:
            write_json_atomic(run.path("summary.json"), SUMMARY)
            run.finish({"results.jsonl": "one row a response", "summary.json": "means"})
    return folder


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    capsys.readouterr()
    main(ViewConfig(runs=[folder]))
    assert str(folder / "report.html") in capsys.readouterr().out
    html = (folder / "report.html").read_text(encoding="utf-8")
    for word in (
        "probe",
        "some/model",
        "row-2-",
        "one row a response",
        "a &lt;b&gt;",
        "1.25",
        "Provenance",
        "sessions",
    ):
        assert word in html, word
    assert "<script>alert" not in html


def test_an_unfinished_run_with_a_torn_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finish=False)
    with (folder / "results.jsonl").open("ab") as file:
        file.write(b'{"id": "row-3-", "resp')
    main(ViewConfig(runs=[folder]))
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "has not finished" in html and "row-2-" in html and "row-3-" not in html


def test_the_number_of_rows_is_bounded(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=MOST_ROWS + 5)
    main(ViewConfig(runs=[folder]))
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f"row-{MOST_ROWS - 1}-" in html and f"row-{MOST_ROWS}-" not in html


def test_a_viewed_run_still_resumes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finish=False)
    main(ViewConfig(runs=[folder]))
    assert make_run(folder) == folder


def test_one_wrong_folder_and_nothing_is_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="not a run folder"):
            main(ViewConfig(runs=[folder, wrong]))
    assert not (folder / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    command = [sys.executable, "-m", "src.view"]
    done = subprocess.run([*command, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all((folder / "report.html").exists() for folder in folders)
    wrong = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and str(tmp_path / "config.json") in wrong.stderr
    none = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (none.returncode, none.stderr) == (
        2,
        "error: no runs; expected run folders, or --root FOLDER for all runs below it\n",
    )


def test_provenance_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    main(ViewConfig(runs=[folder]))
    html = (folder / "report.html").read_text(encoding="utf-8")
    session = json.loads((folder / "provenance.json").read_text())["sessions"][0]
    assert session["started"] in html and f"&quot;pid&quot;: {os.getpid()}" in html


def test_a_report_that_the_run_wrote_itself_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start_run(ModelConfigBase(output_dir=folder, model_id="some/model"), "probe") as run:
        run.path("report.html").write_text("the run's own")
        run.finish({"report.html": "plots"})
    main(ViewConfig(runs=[folder]))
    assert (folder / "report.html").read_text() == "the run's own"
    assert "some/model" in (folder / "view.html").read_text(encoding="utf-8")


def test_the_title_says_what_was_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = {"model_id": "some/model", "temperature": 0.7, "max_tokens": 64, "steer": ["d:1:2", "d:2:3"], "seed": 1}
    assert title(folder, {"command": "run_personas", "config": config}) == (
        f"Personas and prompts · some/model · temperature 0.7 · max tokens 64 · steer d:1:2, d:2:3 · {folder}"
    )
    assert title(folder, {"command": "some_other", "config": {}}) == f"Some other · {folder}"
    several = {"command": "some_other", "config": {"model_id": ["one", "two"]}}
    assert title(folder, several) == f"Some other · one, two · {folder}"


def test_every_kind_of_file_in_a_run_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finish=False)
    (folder / "evaluation.json").write_text(json.dumps([{"task": "arithmetic <i>", "score": 0.5}]))
    (folder / "manifest.json").write_text(json.dumps({"shards": 3, "dimension": 384}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    (folder / "notes.txt").write_text("not shown")
    html = report(folder)
    for word in ("evaluation.json", "arithmetic &lt;i&gt;", "manifest.json", "384", "metrics.jsonl (1)", "2.5"):
        assert word in html, word
    assert "not shown" not in html


def test_rows_without_groups_without_numbers_and_none_at_all(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=0, finish=False)
    assert "Settings" in report(folder)
    write_jsonl_atomic(folder / "results.jsonl", [{"id": "1", "coefficient": "much", "avg_entropy": "high"}])
    assert "much" in report(folder)
    write_jsonl_atomic(
        folder / "results.jsonl", [{"id": str(i), "persona": "a", "avg_entropy": None} for i in range(2)]
    )
    assert "Rows (2)" in report(folder)


def test_answers_stand_beside_answers_to_the_same_question_of_the_same_model(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=0, finish=False)
    rows = [("m1", "+4", "one"), ("m1", "0", "two"), ("m2", "+4", "three")]
    rows = [
        {"id": f"{i}", "model_id": m, "arm": arm, "prompt": "p", "response": text}
        for i, (m, arm, text) in enumerate(rows)
    ]
    write_jsonl_atomic(folder / "results.jsonl", [*rows, {"id": "9", "arm": "0", "response": "without a prompt"}])
    html = report(folder).partition("Answers side by side")[2].partition("</section>")[0]
    assert html.count("<tr>") == 3 and all(text in html for text in ("one", "two", "three", "m1", "m2"))


def test_an_experiment_is_shown_with_its_plan_and_its_runs(tmp_path: Path) -> None:
    folder = tmp_path / "rates"
    folder.mkdir()
    (folder / "experiment.toml").write_text("question = 'Which <b>rate</b>?'\n")
    rows = [
        {"id": f"{i}", "name": f"lr{i}", "step": step, "state": "done", "seconds": 9, "factor.lr": lr, "loss": 2.0 - i}
        for i, (step, lr) in enumerate((("train", 0.1), ("train", 0.2), ("test", 0.1)))
    ]
    write_jsonl_atomic(folder / "summary.jsonl", rows)
    make_run(folder / "runs" / "one")
    main(ViewConfig(root=tmp_path))
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "Experiment · " in html and "Which &lt;b&gt;rate" in html and "factor.lr" in html
    assert (folder / "runs" / "one" / "report.html").exists()
    frame = data.together({"rates": data.read_frame(data.results_file(tmp_path, "rates"))})
    assert data.groups_in(frame) == ["run", "step", "factor.lr"]
    table = numbers.group_statistics(frame, "factor.lr", "loss")
    assert set(zip(table["step"], table["factor.lr"], table["mean"], strict=True)) == {
        ("train", "0.1", 2.0), ("train", "0.2", 1.0), ("test", "0.1", 0.0),
    }  # fmt: skip


def test_a_link_that_comes_later_is_refused_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    (folder / "report.html").symlink_to(tmp_path / "secret")
    for make in (own_report, report):
        with pytest.raises(InputError, match="outside the run's folder"):
            make(folder)
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).symlink_to(tmp_path / other)
    assert data.inside(tmp_path, "a") == tmp_path / "a"


def test_names_in_addresses_are_each_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run", "b/run", "c", "a/run")]
    names = names_of(folders)
    assert names == {"run": tmp_path / "a/run", "b-run": tmp_path / "b/run", "c": tmp_path / "c"}


def test_all_runs_below_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "deep/er/b"):
        make_run(tmp_path / name)
    capsys.readouterr()
    main(ViewConfig(root=tmp_path))
    assert capsys.readouterr().out.count("wrote ") == 2
    config = ViewConfig(app=True, runs=[tmp_path / "deep" / "er" / "b"], root=tmp_path)
    assert app_root(config) == (tmp_path, ["deep/er/b"])
    assert app_root(ViewConfig(app=True, runs=[tmp_path / "a"])) == (tmp_path, ["a"])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "no runs"),
        ({"runs": [Path("a")], "root": Path("b")}, "leave it or the run folders out"),
        ({"runs": [Path("a")], "serve": True, "app": True}, "exclude each other"),
        ({"root": Path("a"), "port": 0}, "--port 0"),
    ],
)
def test_what_does_not_go_together(given: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ViewConfig(**given)


def test_roots_that_hold_no_run(tmp_path: Path) -> None:
    for given in ({"root": tmp_path}, {"root": tmp_path / "absent"}, {"app": True, "runs": [tmp_path / "absent"]}):
        with pytest.raises(InputError, match=r"no run folder|no such folder"):
            main(ViewConfig(**given))
    make_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "root").mkdir()
    with pytest.raises(InputError, match="lies outside"):
        app_root(ViewConfig(app=True, runs=[tmp_path / "elsewhere" / "run"], root=tmp_path / "root"))
