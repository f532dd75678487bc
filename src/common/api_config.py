"""The settings of every command that asks a model behind an API."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from src.common.api_providers import check_url
from src.common.api_requests import REPEAT, SEED
from src.common.errors import InputError
from src.common.experiment_config import API_OPTIONS, ApiOptions, ExperimentConfigBase
from src.common.settings import require_at_least_one, setting

SAMPLING = ("temperature", "max_tokens", "top_p")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
AT_LEAST_ONE = (*("max_attempts", "requests_per_minute", "tokens_per_minute", "max_tokens", "n_repeats", "num_tasks"),)


@dataclass(kw_only=True)
class ApiConfigBase(ExperimentConfigBase):
    """The API"""

    model_id: str = setting(aliases=("model",))
    """provider:model, the provider one of openai, anthropic, openrouter, together, google, vllm, openai-responses for
    what OpenAI offers by its Responses API alone. A server of your own: openai:NAME with --openai_base_url, or
    vllm:NAME with --vllm_base_url."""
    temperature: float | None = None
    """Sampling temperature; nothing is sent unless given."""
    max_tokens: int | None = None
    """Tokens of an answer at most; nothing is sent unless given (Anthropic's protocol requires it: there the most that
    the model may write)."""
    top_p: float | None = None
    """Nucleus sampling; nothing is sent unless given."""
    send_seed: bool = True
    """Send the repeat's index as the seed; --nosend_seed for a server that refuses seeds, whose repeats are draws of
    their own then too."""
    n_repeats: int = setting(1, aliases=("n_reps",))
    """Answers to each question; the repeat's index, from 0, is the seed."""
    num_tasks: int | None = setting(None, affects_rows=False)
    """Only the first N rows of the input."""
    batch_api: bool = setting(False, affects_rows=False)
    """Ask through the batch endpoint of OpenAI or Anthropic: cheaper, within a day; a stopped run goes on waiting."""
    poll_seconds: float = setting(30.0, affects_rows=False)
    """Batches: seconds between two looks at how far they are."""
    api_backend: str = setting(API_OPTIONS.backend, choices=("inspect", "safetytooling"))
    """What sends the questions: inspect-ai's clients, or safetytooling's InferenceAPI (extra safetytooling)."""
    max_attempts: int = setting(API_OPTIONS.max_attempts, affects_rows=False)
    """Attempts at one question, with growing waits between them."""
    request_timeout: float | None = setting(API_OPTIONS.request_timeout, affects_rows=False)
    """Seconds for one attempt; the variable OPENAI_TIMEOUT, or 600, unless given."""
    requests_per_minute: int | None = setting(API_OPTIONS.requests_per_minute, affects_rows=False)
    """Requests in any minute at most."""
    tokens_per_minute: int | None = setting(API_OPTIONS.tokens_per_minute, affects_rows=False)
    """Tokens, of prompts and answers, in any minute at most; estimated before an answer, exact after it."""
    prices_path: Path | None = setting(API_OPTIONS.prices_path, affects_rows=False)
    """JSON: model name → {"input", "output"}, US dollars per million tokens (those of batches with --batch_api).
    What is taken off for cached prompts is not counted. Without it no cost is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("openai_tag", "anthropic_tag", "openrouter_tag"):
            if not VARIABLE_NAME.fullmatch(getattr(self, name)):
                # The value is not shown: it may well be the key itself.
                raise InputError(f"--{name}: no name of a variable; expected the name, the key itself goes into .env")
        for name in ("openai_base_url", "vllm_base_url"):
            if getattr(self, name) is not None:
                check_url(getattr(self, name))
        require_at_least_one(self, (*AT_LEAST_ONE, *(f.name for f in fields(self) if f.name.endswith("_num_threads"))))
        for name, most in (("temperature", float("inf")), ("top_p", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise InputError(f"--{name} {value}: expected a number from 0" + (f" to {most:g}" if most == 1 else ""))
        for name in ("request_timeout", "poll_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < float("inf"):
                raise InputError(f"--{name} {seconds}: expected a positive number of seconds")
        if self.batch_api and self.api_backend != "inspect":
            raise InputError("--batch_api: only --api_backend inspect has it")
        if not self.send_seed and self.n_repeats > 1 and self.api_backend != "inspect":
            raise InputError(
                "--nosend_seed with --n_repeats: safetytooling's cache would answer every repeat alike; "
                "take --api_backend inspect, or one repeat"
            )

    @property
    def api_options(self) -> ApiOptions:
        return ApiOptions(
            self.api_backend,
            self.max_attempts,
            self.request_timeout,
            self.requests_per_minute,
            self.tokens_per_minute,
            self.prices_path,
        )

    def parameters(self, repeat: int) -> dict[str, Any]:
        """
        What is sent with a question: the sampling settings that were given, and the repeat's index as the seed. Without
        a seed the index goes along unsent from the second repeat on, so that each is a question of its own.
        """
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        return given | ({SEED: repeat} if self.send_seed else {REPEAT: repeat} if repeat else {})
