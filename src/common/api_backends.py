"""From a config to the object behind `config.api`: our client, or safetytooling's InferenceAPI."""

import importlib.util
import os
from copy import copy
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from src.common.api_client import ApiClient
from src.common.api_providers import PROVIDERS
from src.common.errors import InputError
from src.common.experiment_config import ExperimentConfigBase
from src.common.jsonl import round_measured
from src.common.secrets import secret

if TYPE_CHECKING:
    from safetytooling.apis import InferenceAPI

ONLY_SAFETYTOOLING = (
    *("use_redis", "max_mem_usage_mb", "openai_fraction_rate_limit", "openai_s2s_num_threads", "gpt4o_s2s_rpm_cap"),
    *("gemini_recitation_rate_check_volume", "gemini_recitation_rate_threshold", "gray_swan_num_threads"),
    "huggingface_num_threads",
)
ONLY_OURS = ("max_attempts", "request_timeout", "requests_per_minute", "tokens_per_minute", "prices_path")


def make_api(config: ExperimentConfigBase) -> "ApiClient | InferenceAPI":
    """Raises InputError for a setting that the backend does not have, rather than doing without it."""
    if config.api_options.backend == "safetytooling":
        _refuse_changed(config, ONLY_OURS, "inspect")
        return _inference_api(config)
    _refuse_changed(config, ONLY_SAFETYTOOLING, "safetytooling")
    return ApiClient(config)


def _refuse_changed(config: ExperimentConfigBase, names: tuple[str, ...], backend: str) -> None:
    for field in fields(config):
        if field.name in names and field.default is not MISSING and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name}: only --api_backend {backend} has it; leave it out, or take that backend")


def cost_since(api: "ApiClient | InferenceAPI", earlier: Any) -> tuple[dict[str, Any], Any]:
    """What the API object used since an earlier call of this, and what to give to the next one."""
    if isinstance(api, ApiClient):
        return api.usage.since(earlier), copy(api.usage)
    return {"cost": round_measured(api.running_cost - (earlier or 0.0))}, api.running_cost


def put_keys(config: ExperimentConfigBase) -> None:
    """Each key to the variable where safetytooling looks for it; all of them are withheld from then on."""
    for name, tag in (
        ("OPENAI_API_KEY", config.openai_tag),
        ("ANTHROPIC_API_KEY", config.anthropic_tag),
        ("OPENROUTER_API_KEY", config.openrouter_tag),
    ):
        key = secret(tag) or secret(name)
        if key:
            os.environ[name] = key
    for name in {name for about in PROVIDERS.values() for name in about.key_variables}:
        secret(name)


def _inference_api(config: ExperimentConfigBase) -> "InferenceAPI":
    if importlib.util.find_spec("safetytooling") is None:
        raise InputError("--api_backend safetytooling: the package is not installed: uv sync --extra safetytooling")
    from dotenv import load_dotenv
    from safetytooling.apis import InferenceAPI

    load_dotenv()
    put_keys(config)
    return InferenceAPI(
        cache_dir=config.made_folder(config.enable_cache, config.cache_dir, "cache"),
        prompt_history_dir=config.made_folder(
            config.enable_prompt_history, config.prompt_history_dir, "prompt-history"
        ),
        use_redis=config.use_redis,
        print_prompt_and_response=config.print_prompt_and_response,
        openai_fraction_rate_limit=config.openai_fraction_rate_limit,
        openai_base_url=config.openai_base_url,
        openai_num_threads=config.openai_num_threads,
        openai_s2s_num_threads=config.openai_s2s_num_threads,
        gpt4o_s2s_rpm_cap=config.gpt4o_s2s_rpm_cap,
        gemini_num_threads=config.gemini_num_threads,
        gemini_recitation_rate_check_volume=config.gemini_recitation_rate_check_volume,
        gemini_recitation_rate_threshold=config.gemini_recitation_rate_threshold,
        anthropic_num_threads=config.anthropic_num_threads,
        together_num_threads=config.together_num_threads,
        openrouter_num_threads=config.openrouter_num_threads,
        gray_swan_num_threads=config.gray_swan_num_threads,
        huggingface_num_threads=config.huggingface_num_threads,
        vllm_num_threads=config.vllm_num_threads,
        use_vllm_if_model_not_found=config.use_vllm_if_model_not_found,
        vllm_base_url=config.vllm_base_url,
    )
