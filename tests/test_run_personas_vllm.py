import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, heeds_ctrl_c, module_command

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROMPTS = ["Who are you?", "What is rain?", "Why sing?", "Where does the river go?"]
PERSONAS = [
    {"persona": "assistant", "category": "plain", "article": "an"},
    {"persona": "Hamlet", "category": "fiction", "article": ""},
    {"persona": "pirate", "category": "fiction", "article": "a"},
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Words of a command: 3 personas × 4 prompts × 2 turns of 12 tokens, greedy: draws may part by rounding."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in (("prompts", PROMPTS), ("personae", PERSONAS), ("turns", ["Why?"])):
        (folder / f"{name}.json").write_text(json.dumps(content))

    def words(output_dir: Path, backend: str, *more: str) -> list[str]:
        return [
            "--prompts_json", str(folder / "prompts.json"), "--personae_json", str(folder / "personae.json"),
            "--turns", str(folder / "turns.json"), "--model_id", "bundled:smollm2-135m", "--dtype", "float32",
            "--device", "cpu", "--backend", backend, "--output_dir", str(output_dir), "--max_tokens", "12",
            "--token_arrays", *more,
        ]  # fmt: skip

    return words


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


def n_rows(folder: Path) -> int:
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key, value in row.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], abs=1.1e-3), key
            else:
                assert value == other[key], key


def test_rows_are_those_of_transformers_also_after_a_kill(arguments, tmp_path: Path, run_module: Callable) -> None:
    whole = run_module("run_personas", *arguments(tmp_path / "hf", "hf"))
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "vllm"
    # Two rows at once, so that the kill falls between finished and open ones.
    words = arguments(folder, "vllm", "--batch_size", "2")
    process = subprocess.Popen(module_command("run_personas", words), cwd=ROOT, stderr=subprocess.PIPE)
    while n_rows(folder) < 5 and process.poll() is None:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    assert 5 <= n_rows(folder) < 24
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running()]
    resumed = run_module("run_personas", *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "Generating on vLLM (asked for)" in resumed.stderr and "WARNING" not in resumed.stderr
    assert_same(rows_of(folder), rows_of(tmp_path / "hf"))
    refused = run_module("run_personas", *arguments(folder, "hf", "--num_tasks", "4"))
    assert refused.returncode == 0, "nothing is left to do, so no engine is needed"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["backend"] == "vllm" and provenance["sessions"][-2]["runner"] == "v1"


@pytest.mark.parametrize("moment", ["start", "generation"])
def test_ctrl_c_ends_it_and_leaves_no_process(arguments, tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "run"
    words = arguments(folder, "vllm", "--max_tokens", "120", "--batch_size", "2")
    process = subprocess.Popen(
        module_command("run_personas", words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heeds_ctrl_c, start_new_session=True,
    )  # fmt: skip
    log = folder / "logs"
    while process.poll() is None:
        started = log.exists() and "Starting vLLM" in "".join(file.read_text() for file in log.iterdir())
        if (moment == "start" and started) or n_rows(folder) > 0:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on from here" in stderr and "Traceback" not in stderr
    left = [p.pid for p in psutil.process_iter() if p.pid != process.pid and _session(p.pid) == process.pid]
    assert left == []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_a_run_does_not_go_on_with_another_engine(arguments, tmp_path: Path, run_module: Callable) -> None:
    folder = tmp_path / "run"
    assert run_module("run_personas", *arguments(folder, "hf", "--num_tasks", "1")).returncode == 0
    other = run_module("run_personas", *arguments(folder, "vllm"))
    assert other.returncode == 2 and 'backend was "hf", is now "vllm"' in other.stderr, other.stderr
    assert "Starting vLLM" not in other.stderr
