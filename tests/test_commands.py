"""What holds for every command: fast to start, errors in one line, `--show_config`, a docstring that runs."""

import time
from collections.abc import Callable

import pytest

from tests.conftest import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "src").glob("*.py") if path.stem != "__init__")
HEAVY = ("torch", "transformers", "vllm", "datasets", "sklearn", "plotly")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_typo_answer_before_anything_slow_is_imported(command: str, run_module: Callable) -> None:
    # What was imported is the property; the seconds are quoted in the research log.
    shown = run_module(command, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert shown.returncode == 0 and "--" in shown.stdout
    typo = run_module(command, "--outptu_dir", "x", PYTHONPROFILEIMPORTTIME="1")
    assert typo.returncode == 2 and "--outptu_dir" in typo.stderr
    for done in (shown, typo):
        imported = {line.split("|")[-1].strip() for line in done.stderr.split("\n") if "import time" in line}
        assert imported, "the list of imports was not written"
        assert not imported & set(HEAVY)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_docstring_says_how_to_run_it(command: str) -> None:
    text = (ROOT / "src" / f"{command}.py").read_text()
    assert f"uv run -m src.{command}" in text.split('"""')[1]
    assert 'if __name__ == "__main__":' in text


def test_a_wrong_path_answers_without_a_model(run_module: Callable) -> None:
    started = time.perf_counter()
    done = run_module(
        "run_personas", "--prompts_json", "nowhere.json", "--personae_json", "p", "--model_id", "m", "--output_dir", "x"
    )
    assert done.returncode == 2 and "nowhere.json" in done.stderr and done.stderr.count("\n") == 1
    # Loose on purpose: importing torch alone takes longer than everything else here together.
    assert time.perf_counter() - started < 30
