"""`src.view` on real run folders: finished, unfinished, hostile, and no run folder at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.jsonl import JsonlWriter
from src.common.model_config import ModelConfigBase
from src.common.runs import start_run
from src.view import MOST_ROWS, ViewConfig, main

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
    assert (none.returncode, none.stderr) == (2, "error: missing --runs; --help says what each is\n")


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
