"""The shared configs: safetytooling's names and defaults, validation, logs and seeds."""

import importlib.util
import json
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from src.common.api_config import ApiConfigBase
from src.common.cli import parse_config
from src.common.errors import InputError
from src.common.experiment_config import ExperimentConfigBase, RunConfigBase, WorkerConfigBase
from src.common.model_config import ModelConfigBase

# Of the class of that name in safetytooling at 272270d.
THEIRS = {
    **{"output_dir": MISSING, "enable_cache": True, "cache_dir": None, "use_redis": False, "log_to_file": True},
    **{"enable_prompt_history": False, "prompt_history_dir": None, "max_mem_usage_mb": 5000, "seed": 42},
    **{"openai_fraction_rate_limit": 0.5, "openai_num_threads": 50, "openai_base_url": None},
    **{"gemini_num_threads": 100, "openai_s2s_num_threads": 40, "gpt4o_s2s_rpm_cap": 10},
    **{"gemini_recitation_rate_check_volume": 100, "gemini_recitation_rate_threshold": 0.5},
    **{"anthropic_num_threads": 40, "gray_swan_num_threads": 40, "together_num_threads": 40},
    **{"openrouter_num_threads": 40, "huggingface_num_threads": 100, "vllm_num_threads": 8},
    **{"use_vllm_if_model_not_found": False, "vllm_base_url": "http://localhost:8000/v1/chat/completions"},
    **{"openai_tag": "OPENAI_API_KEY1", "anthropic_tag": "ANTHROPIC_API_KEY"},
    **{"openrouter_tag": "OPENROUTER_API_KEY", "print_prompt_and_response": False, "datetime_str": MISSING},
}


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = list(logger.handlers)
    yield logger
    for handler in [handler for handler in logger.handlers if handler not in before]:
        logger.removeHandler(handler)
        handler.close()


def test_fields_and_defaults_are_theirs() -> None:
    assert {field.name: field.default for field in fields(ExperimentConfigBase)} == THEIRS


def test_datetime_is_utc_to_the_microsecond() -> None:
    text = ExperimentConfigBase(output_dir=Path("o")).datetime_str
    assert re.fullmatch(r"\d{4}(-\d\d){5}-\d{6}Z", text)


def test_setup_logs_to_a_file_and_seeds(
    tmp_path: Path, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExperimentConfigBase(output_dir=tmp_path / "new", seed=7)
    config.setup_experiment("probe")
    drawn = random.random(), np.random.random()
    random.seed(7)
    np.random.seed(7)
    assert drawn == (random.random(), np.random.random())
    path = tmp_path / "new" / "logs" / f"probe-{config.datetime_str}.log"
    logging.getLogger("src.x").info("a line")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r"[\d-]+ [\d:,]+ \[INFO\] \(src\.common\.experiment_config\) Experiment configuration: ", lines[0])
    assert lines[-1].endswith("[INFO] (src.x) a line")
    assert str(path) in capsys.readouterr().out


def test_without_log_to_file_there_is_no_file(tmp_path: Path, root_logger: logging.Logger) -> None:
    ExperimentConfigBase(output_dir=tmp_path / "new", log_to_file=False).setup_experiment()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": -1}, "--seed: -1"),
        ({"seed": 2**32}, "--seed: 4294967296"),
        ({"num_workers": 0}, "--num_workers: 0"),
        ({"num_workers": 2, "worker_index": 2}, "--worker_index: 2; expected 0 to 1"),
        ({"worker_index": -1}, "--worker_index: -1"),
    ],
)
def test_wrong_values_name_their_flag(values: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        WorkerConfigBase(output_dir=Path("o"), **values)


@pytest.mark.parametrize(("tasks", "workers"), [(10, 3), (2, 5), (0, 2), (7, 1)])
def test_workers_share_the_tasks(tasks: int, workers: int) -> None:
    configs = [WorkerConfigBase(output_dir=Path("o"), num_workers=workers, worker_index=i) for i in range(workers)]
    shares = [config.own_tasks(range(tasks)) for config in configs]
    assert sorted(task for share in shares for task in share) == list(range(tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_command_can_inherit_all_bases() -> None:
    @dataclass(kw_only=True)
    class Both(ModelConfigBase, WorkerConfigBase, ExperimentConfigBase):
        pass

    assert Both(output_dir=Path("o"), model_id="m", num_workers=2, worker_index=1).datetime_str
    with pytest.raises(InputError, match="--worker_index"):
        Both(output_dir=Path("o"), model_id="m", worker_index=1)
    with pytest.raises(InputError, match="--seed"):
        Both(output_dir=Path("o"), model_id="m", seed=-1)


@pytest.mark.skipif(importlib.util.find_spec("safetytooling") is not None, reason="safetytooling is installed")
def test_without_safetytooling_its_backend_tells_the_remedy(tmp_path: Path) -> None:
    config = ApiConfigBase(output_dir=tmp_path, model_id="openai:m", api_backend="safetytooling")
    for use in (lambda: config.api, config.log_api_cost):
        with pytest.raises(InputError, match="--extra safetytooling"):
            use()
    config.reset_api()


def backends() -> list:
    missing = importlib.util.find_spec("safetytooling") is None
    skip = pytest.mark.skipif(missing, reason="safetytooling is not installed")
    return ["inspect", pytest.param("safetytooling", marks=skip)]


@pytest.mark.parametrize("backend", backends())
def test_the_api_is_made_once_and_again_after_a_reset(tmp_path: Path, backend: str) -> None:
    config = ApiConfigBase(output_dir=tmp_path, model_id="openai:m", api_backend=backend)
    first = config.api
    assert config.api is first
    config.reset_api()
    assert config.api is not first
    config.log_api_cost({"step": "none"})
    row = json.loads((tmp_path / "api-costs.jsonl").read_text())
    assert (row["cost"], row["step"]) == (0, "none")


def test_a_setting_that_the_backend_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--use_redis: only --api_backend safetytooling has it"):
        _ = ExperimentConfigBase(output_dir=tmp_path, use_redis=True).api
    config = ApiConfigBase(output_dir=tmp_path, model_id="m", api_backend="safetytooling", requests_per_minute=5)
    with pytest.raises(InputError, match="--requests_per_minute: only --api_backend inspect has it"):
        _ = config.api


def test_a_run_needs_a_folder() -> None:
    with pytest.raises(TypeError, match="output_dir"):
        RunConfigBase()


def test_workers_are_taken_from_the_array_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--output_dir", str(tmp_path), "--num_workers", "auto", "--worker_index", "auto"]
    for name in ("COUNT", "MIN", "MAX", "ID"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    with pytest.raises(InputError, match="for a job of a SLURM array"):
        parse_config(WorkerConfigBase, words)
    for name, value in (("COUNT", "4"), ("MIN", "0"), ("MAX", "3"), ("ID", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    config = parse_config(WorkerConfigBase, words)
    assert (config.num_workers, config.worker_index) == (4, 2) and list(config.own_tasks(range(8))) == [2, 6]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "7")
    with pytest.raises(InputError, match="4 tasks from 0 to 7"):
        parse_config(WorkerConfigBase, words)
