"""
The settings that commands share: RunConfigBase for every command that writes a run folder, WorkerConfigBase for those
that several processes can share, ExperimentConfigBase for those that call APIs (field names and methods as in the
safetytooling class of that name, so that a script written for either works with both).
"""

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from src.common.errors import InputError
from src.common.logs import start_logging
from src.common.settings import AFFECTS_ROWS, setting

if TYPE_CHECKING:
    from safetytooling.apis import InferenceAPI

    from src.common.api_client import ApiClient

LOGGER = logging.getLogger(__name__)
Task = TypeVar("Task")
MAX_SEED = 2**32 - 1  # what numpy's generator takes


def seed_everything(seed: int) -> None:
    """Seeds random and numpy; the model wrappers seed torch."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


@dataclass(kw_only=True)
class RunConfigBase:
    """The run"""

    output_dir: Path = setting(affects_rows=False)
    """The run's folder. The same command again in the same folder resumes."""
    seed: int = 42
    """Seed of every random choice."""
    enable_cache: bool = setting(True, affects_rows=False)
    """Keep the answers of APIs and use them again."""
    cache_dir: Path | None = setting(None, affects_rows=False)
    """Where those answers are kept; none means <output_dir>/cache. The variable TILLER_CACHE_DIR is not this: it is the
    root of every other cache."""
    log_to_file: bool = setting(True, affects_rows=False)
    """Write <output_dir>/logs/<command>-<datetime>.log."""
    datetime_str: str = field(init=False, metadata={AFFECTS_ROWS: False})

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed: {self.seed} is out of range; expected 0 to {MAX_SEED}")
        self.datetime_str = datetime.now(UTC).strftime("%Y-%m-%d-%H-%M-%S-%fZ")

    def log_path(self, folder: Path, prefix: str) -> Path | None:
        """The log file in a folder, or None where none is wanted."""
        return folder / "logs" / f"{prefix}-{self.datetime_str}.log" if self.log_to_file else None

    def setup_experiment(self, log_file_prefix: str = "run") -> None:
        """For scripts that keep no run folder: makes output_dir, seeds, and logs the settings."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        seed_everything(self.seed)
        log_path = self.log_path(self.output_dir, log_file_prefix)
        start_logging(log_path)
        if log_path is not None:
            print(f"Logging to {log_path}")
        LOGGER.info("Experiment configuration: %s", self)


def array_size() -> int:
    """Tasks of the SLURM array that this process is of, which run from 0. Raises InputError where they do not."""
    count, first, last = (_array_fact(name) for name in ("COUNT", "MIN", "MAX"))
    if (first, last) != (0, count - 1):
        raise InputError(
            f"--num_workers auto: the array has {count} tasks from {first} to {last}; expected 0 to its size − 1, or "
            f"give --num_workers and --worker_index yourself"
        )
    return count


def array_index() -> int:
    """Which task of its SLURM array this process is. Raises InputError outside of one."""
    return _array_fact("ID")


def _array_fact(name: str) -> int:
    value = os.environ.get(f"SLURM_ARRAY_TASK_{name}", "")
    if not value.isdecimal():
        raise InputError(
            "--num_workers auto and --worker_index auto are for a job of a SLURM array (sbatch --array=0-7)"
        )
    return int(value)


@dataclass(kw_only=True)
class WorkerConfigBase(RunConfigBase):
    """Several workers"""

    num_workers: int = setting(1, affects_rows=False, auto=array_size)
    """How many processes share the tasks; `auto`: as many as the SLURM array has. With more than one each writes
    <output_dir>/shards/worker-<i>-of-<n>, and src.merge_shards makes one run folder of them."""
    worker_index: int = setting(0, affects_rows=False, auto=array_index)
    """Which of them this is, from 0; `auto`: the array task's number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 1:
            raise InputError(f"--num_workers: {self.num_workers} is too few; expected 1 or more")
        if not 0 <= self.worker_index < self.num_workers:
            raise InputError(
                f"--worker_index: {self.worker_index}; expected 0 to {self.num_workers - 1} (num_workers - 1)"
            )

    def own_tasks(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """This worker's tasks: index, index + n, index + 2n, … of all of them, so that merging is interleaving."""
        return tasks[self.worker_index :: self.num_workers]


class ApiOptions(NamedTuple):
    """What is said of API calls beyond safetytooling's fields; `src.common.api_config` makes flags of it."""

    backend: str = "inspect"
    max_attempts: int = 6
    request_timeout: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    prices_path: Path | None = None


API_OPTIONS = ApiOptions()


@dataclass(kw_only=True)
class ExperimentConfigBase(RunConfigBase):
    """API calls"""

    use_redis: bool = setting(False, affects_rows=False)
    """Keep the answers in Redis instead of in files."""
    enable_prompt_history: bool = setting(False, affects_rows=False)
    """Keep a readable file of every prompt and answer."""
    prompt_history_dir: Path | None = setting(None, affects_rows=False)
    """Where those are kept; none means <output_dir>/prompt-history."""
    max_mem_usage_mb: int = setting(5000, affects_rows=False)
    """Most memory, in MB, that cached answers may take."""
    openai_fraction_rate_limit: float = setting(0.5, affects_rows=False)
    """Share of the OpenAI rate limit to use."""
    openai_num_threads: int = setting(50, affects_rows=False)
    """OpenAI calls at once."""
    openai_base_url: str | None = None
    """Another server that speaks the OpenAI protocol."""
    gemini_num_threads: int = setting(100, affects_rows=False)
    """Gemini calls at once."""
    openai_s2s_num_threads: int = setting(40, affects_rows=False)
    """OpenAI speech calls at once."""
    gpt4o_s2s_rpm_cap: int = setting(10, affects_rows=False)
    """OpenAI speech calls a minute."""
    gemini_recitation_rate_check_volume: int = setting(100, affects_rows=False)
    """Gemini calls after which its rate of recitation refusals is looked at."""
    gemini_recitation_rate_threshold: float = setting(0.5, affects_rows=False)
    """The rate of recitation refusals that stops Gemini calls."""
    anthropic_num_threads: int = setting(40, affects_rows=False)
    """Anthropic calls at once."""
    gray_swan_num_threads: int = setting(40, affects_rows=False)
    """Gray Swan calls at once."""
    huggingface_num_threads: int = setting(100, affects_rows=False)
    """Hugging Face calls at once."""
    together_num_threads: int = setting(40, affects_rows=False)
    """Together calls at once."""
    openrouter_num_threads: int = setting(40, affects_rows=False)
    """OpenRouter calls at once."""
    vllm_num_threads: int = setting(8, affects_rows=False)
    """Calls to a vLLM server at once."""
    use_vllm_if_model_not_found: bool = False
    """Send a model name that no provider knows to the vLLM server."""
    vllm_base_url: str = "http://localhost:8000/v1/chat/completions"
    """The vLLM server."""
    openai_tag: str = setting("OPENAI_API_KEY1", affects_rows=False)
    """Name of the variable that holds the OpenAI key."""
    anthropic_tag: str = setting("ANTHROPIC_API_KEY", affects_rows=False)
    """Name of the variable that holds the Anthropic key."""
    openrouter_tag: str = setting("OPENROUTER_API_KEY", affects_rows=False)
    """Name of the variable that holds the OpenRouter key."""
    print_prompt_and_response: bool = setting(False, affects_rows=False)
    """Print every prompt and answer."""

    @property
    def api_options(self) -> ApiOptions:
        """The options of `.api` that are no fields of safetytooling's."""
        return API_OPTIONS

    @property
    def api(self) -> "ApiClient | InferenceAPI":
        """
        What `src.common.safetytooling_wrappers` asks through, made at the first use and kept until `reset_api()`.
        Raises InputError for a setting that the backend does not have, and where safetytooling is not installed.
        """
        if not hasattr(self, "_api"):
            from src.common.api_backends import make_api

            self._api = make_api(self)
        return self._api

    def reset_api(self) -> None:
        """Drops the API object; the next use of `.api` makes a new one from the settings as they are then."""
        if hasattr(self, "_api"):
            del self._api

    def log_api_cost(self, metadata: Mapping[str, str] | None = None) -> None:
        """
        Appends {"cost": US dollars since the last call, or null where a price is unknown, and the counts of requests
        and tokens} and the metadata to <output_dir>/api-costs.jsonl.
        """
        from src.common.api_backends import cost_since

        row, self._last_api_cost = cost_since(self.api, getattr(self, "_last_api_cost", None))
        with (self.output_dir / "api-costs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | dict(metadata or {})) + "\n")

    def made_folder(self, wanted: bool, folder: Path | None, default: str) -> Path | None:
        """The folder, or <output_dir>/default, made; None where none is wanted."""
        if not wanted:
            return None
        folder = folder or self.output_dir / default
        folder.mkdir(parents=True, exist_ok=True)
        return folder
