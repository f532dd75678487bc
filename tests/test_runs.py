"""A run folder: resumed by the same command, refused to any other, held by one process, DONE last of all."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import InputError, StopRequested
from src.common.experiment_config import WorkerConfigBase
from src.common.files import sha256_file
from src.common.provenance import command_line, git_state, without_secrets
from src.common.runs import Run, run_folder, start_run
from src.common.settings import setting

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Config(WorkerConfigBase):
    prompts_json: Path
    more: list[Path] = setting(default_factory=list)
    temperature: float = 0.0
    batch_size: int = setting(8, affects_rows=False)
    api_key: str = "sk-123"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "p.json").write_text('["a"]')
    return Config(output_dir=tmp_path / "run", prompts_json=tmp_path / "p.json")


def start(config: Config, command: str = "probe") -> Run:
    return start_run(config, command, [config.prompts_json, *config.more])


def with_a_row(config: Config, inputs: list[Path] | None = None) -> Run:
    """A run that has made something: only then does another configuration mix two runs."""
    run = start(config) if inputs is None else start_run(config, "probe", inputs)
    run.path("results.jsonl").write_text('{"id": "a"}\n')
    run.close()
    return run


def read(run_or_folder: Run | Path, name: str) -> dict:
    folder = run_or_folder.folder if isinstance(run_or_folder, Run) else run_or_folder
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_a_run_from_start_to_done(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with start(config) as run:
        assert not run.resumed
        run.path("results.jsonl").write_text("{}\n")
        run.record(device="cpu", model_fingerprint="f")
        assert not run.path("DONE").exists()
        run.finish({"results.jsonl": "one row a response", "logs": "what happened"})
    written = read(run, "config.json")
    assert (written["command"], written["config"]["temperature"]) == ("probe", 0.0)
    assert written["affects_rows"] == ["seed", "prompts_json", "more", "temperature", "api_key"]
    done = read(run, "DONE")["files"]
    assert done["results.jsonl"] == {
        "what": "one row a response",
        "bytes": 3,
        "sha256": sha256_file(run.path("results.jsonl")),
    }
    provenance = read(run, "provenance.json")
    (session,) = provenance["sessions"]
    assert provenance["inputs"] == {str(config.prompts_json): sha256_file(config.prompts_json)}
    assert (provenance["model_fingerprint"], session["device"], session["outcome"]) == ("f", "cpu", "done")
    assert session["packages"]["numpy"] == np.__version__ and session["pid"] == os.getpid()
    assert session["seconds"] >= 0 and session["peak_memory_mib"]["process"] > 10
    out = capsys.readouterr().out
    assert f"{run.path('results.jsonl')}  one row a response" in out
    assert f"uv run -m src.view {config.output_dir}" in out


def test_one_of_several_processes_of_a_launcher_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2: a launcher such as torchrun"):
        start(config)
    assert not config.output_dir.exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    start(config).close()


def test_seeds_and_log(config: Config) -> None:
    drawn = []
    for seed in (1, 2, 1):
        shutil.rmtree(config.output_dir, ignore_errors=True)
        with start(replace(config, seed=seed)) as run:
            drawn.append((random.random(), np.random.random()))
            logging.getLogger("src.part").info("said")
            logging.getLogger("other.library").info("not said")
        (log,) = run.path("logs").iterdir()
        assert log.name.startswith("probe-") and log.suffix == ".log"
        assert "(src.part) said" in log.read_text() and "not said" not in log.read_text()
    assert drawn[0] == drawn[2] != drawn[1]
    logging.getLogger("src.part").info("after the end")
    assert "after the end" not in log.read_text()


def test_the_same_command_resumes_and_keeps_every_session(config: Config) -> None:
    with pytest.raises(StopRequested), start(config) as run:
        run.path("results.jsonl").write_text("{}\n")
        raise StopRequested("SIGTERM")
    with pytest.raises(KeyError), start(replace(config)):
        raise KeyError("surprise")
    with start(replace(config, batch_size=1)) as run:
        assert run.resumed and run.path("results.jsonl").read_text() == "{}\n"
        run.finish({})
    outcomes = [session["outcome"] for session in read(run, "provenance.json")["sessions"]]
    assert outcomes == ["stopped", "failed: KeyError: 'surprise'", "done"]
    logs = [path.read_text() for path in sorted(run.path("logs").iterdir())]
    assert ["Traceback" in log for log in logs] == [False, True, False]


def test_a_finished_run_that_starts_again_is_not_done(config: Config) -> None:
    with start(config) as run:
        run.finish({})
    with start(config) as run:
        assert not run.path("DONE").exists()
        run.finish({})
    assert run.path("DONE").exists()


def test_another_configuration_is_refused_with_both_values(config: Config) -> None:
    with_a_row(config)
    before = {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        start(replace(config, temperature=0.7, seed=3, batch_size=99))
    text = str(caught.value)
    for word in ("temperature was 0.0, is now 0.7", "seed was 42, is now 3", "another --output_dir"):
        assert word in text
    assert "batch_size" not in text and "\n" not in text
    with pytest.raises(InputError, match='command was "probe", is now "other"'):
        start(config, "other")
    assert {path: path.read_bytes() for path in before} == before


def test_inputs_are_compared_by_what_they_hold(config: Config, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text("q")
    config = replace(config, more=[tmp_path / "q.json"])
    with_a_row(config)
    moved = tmp_path / "moved.json"
    shutil.copy(config.prompts_json, moved)
    with start(replace(config, prompts_json=moved)) as run:
        assert run.resumed
    moved.write_text('["b"]')
    with pytest.raises(InputError, match=r"prompts_json was \"sha256 \w+\", is now \"sha256 \w+\""):
        start(replace(config, prompts_json=moved))
    (tmp_path / "q.json").write_text("r")
    with pytest.raises(InputError, match="more was"):
        start(config)


def test_an_input_that_no_setting_names_is_compared_too(config: Config, tmp_path: Path) -> None:
    extra = tmp_path / "extra.json"
    extra.write_text("1")
    with_a_row(config, [extra])
    extra.write_text("2")
    with pytest.raises(InputError, match=r"extra\.json was"):
        start_run(config, "probe", [extra])


def test_changed_weights_under_the_same_name_are_refused(config: Config) -> None:
    with start(config) as run:
        run.record(model_fingerprint="a")
    with start(config) as run:
        run.record(model_fingerprint="a", device="cuda")
        with pytest.raises(InputError, match='model_fingerprint was "a", is now "b"'):
            run.record(model_fingerprint="b")


def test_an_older_config_without_a_new_field_has_its_default(config: Config) -> None:
    run = with_a_row(config)
    written = read(run, "config.json")
    del written["config"]["temperature"]
    run.path("config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="temperature"):
        start(replace(config, temperature=0.7))
    start(config).close()


def test_a_folder_of_somebody_else_is_refused_and_left_alone(config: Config) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds thesis\.tex"):
        start(config)
    (config.output_dir / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="not a run folder"):
        start(config)
    assert sorted(os.listdir(config.output_dir)) == ["config.json", "thesis.tex"]


def test_what_a_kill_at_the_first_start_leaves_is_taken_up(config: Config) -> None:
    with start(config) as run:
        pass
    run.path("config.json").unlink()
    run.path(".config.json.abc.tmp").touch()
    with start(config) as run:
        assert not run.resumed


@pytest.mark.parametrize("wrong", ["p.json", "p.json/below", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused(config: Config, tmp_path: Path, wrong: str) -> None:
    with pytest.raises(InputError, match=rf"--output_dir .*{wrong}: .*choose a folder"):
        start(replace(config, output_dir=tmp_path / wrong))


def test_a_missing_input_is_refused_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: No such file"):
        start(replace(config, prompts_json=tmp_path / "absent.json"))
    assert not config.output_dir.exists()


def test_workers_have_folders_of_their_own(config: Config) -> None:
    workers = [replace(config, num_workers=12, worker_index=index) for index in (0, 11)]
    assert [run_folder(worker).name for worker in workers] == ["worker-00000-of-00012", "worker-00011-of-00012"]
    with start(workers[0]) as first, start(workers[1]) as second, start(config) as one:
        assert first.folder.parent == second.folder.parent == one.path("shards")


def test_keys_are_never_written(config: Config) -> None:
    with start(config) as run:
        pass
    assert read(run, "config.json")["config"]["api_key"] == "<withheld>"
    assert not any(b"sk-123" in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    shown = command_line(
        ["x", "--api-key", "sk-1", "--hf_token=t", "--max_tokens", "64", "--openai_tag", "OPENAI_API_KEY1"]
    )
    assert shown == ["x", "--api-key", "<withheld>", "--hf_token=<withheld>", "--max_tokens", "64", *shown[-2:]]
    assert shown[-2:] == ["--openai_tag", "OPENAI_API_KEY1"]
    plain = {"max_tokens": 64, "openai_tag": "OPENAI_API_KEY1", "token_arrays": True, "top_k_mass_k": 5, "top_k": 3}
    assert without_secrets(plain) == plain


def test_git_state_is_of_this_checkout() -> None:
    expected = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    state = git_state()
    assert (state["sha"] if state else "") == expected


# ---- real processes

HOLDER = """
import sys, time
from pathlib import Path
from src.common.experiment_config import WorkerConfigBase
from src.common.runs import start_run
run = start_run(WorkerConfigBase(output_dir=Path(sys.argv[1])), "hold")
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_folder_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    config = WorkerConfigBase(output_dir=tmp_path / "run")
    process = hold(config.output_dir)
    try:
        with pytest.raises(InputError, match=rf"in use by pid {process.pid} on "):
            start_run(config, "hold")
        assert len(read(config.output_dir, "provenance.json")["sessions"]) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with start_run(config, "hold") as run:
        assert run.resumed
    assert [s["outcome"] for s in read(run, "provenance.json")["sessions"]] == ["running", "stopped"]


def test_a_run_without_results_takes_a_corrected_configuration(config: Config) -> None:
    with start(config):
        pass
    with start(replace(config, temperature=0.7)) as run:
        assert read(run, "config.json")["config"]["temperature"] == 0.7
        assert len(read(run, "provenance.json")["sessions"]) == 2


def test_a_workers_share_depends_on_the_number_of_tasks(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Shared(WorkerConfigBase):
        num_tasks: int = setting(4, affects_rows=False, affects_shares=True)

    for num_workers, refused in ((1, False), (2, True)):
        config = Shared(output_dir=tmp_path / str(num_workers), num_workers=num_workers)
        with start_run(config, "probe") as run:
            run.path("results.jsonl").write_text('{"id": "a"}\n')
        if refused:
            with pytest.raises(InputError, match="num_tasks was 4, is now 5"):
                start_run(replace(config, num_tasks=5), "probe")
        else:
            start_run(replace(config, num_tasks=5), "probe").close()


def test_a_folder_is_free_again_when_a_start_was_refused(config: Config) -> None:
    with_a_row(config)
    with pytest.raises(InputError, match="temperature"):
        start(replace(config, temperature=1.0))
    start(config).close()


def test_a_kill_at_any_moment_of_the_start_can_be_resumed(tmp_path: Path) -> None:
    config = WorkerConfigBase(output_dir=tmp_path / "run")
    for delay in (0.15, 0.2, 0.25, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(config.output_dir)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        start_run(config, "hold").close()


@pytest.mark.skipif(sys.platform != "linux", reason="the fault and its remedy are Linux's")
def test_the_peak_of_memory_is_this_process_own() -> None:
    """A process begins with its parent's peak where the system's usual count is asked."""
    held = bytearray(os.urandom(1)) * (600 << 20)
    told = "from src.common.provenance import peak_memory_mib; print(peak_memory_mib()['process'])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 5 < float(done.stdout) < 300 and len(held) == 600 << 20
    grown = "held = bytearray(b'x') * (600 << 20); " + told
    done = subprocess.run([sys.executable, "-c", grown], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 600 < float(done.stdout) < 900
