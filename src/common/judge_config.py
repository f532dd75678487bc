"""A judge beside a command's own models: what `--judge_model_id` and `--judge_base_url` mean, whatever is judged."""

from pathlib import Path
from typing import Any

from src.common.api_config import ApiConfigBase
from src.common.api_providers import find_model
from src.common.api_requests import check_parameters
from src.common.api_types import ApiModel
from src.common.errors import InputError

NAMES = (
    ("--openai_base_url", "--judge_base_url"),
    ("--model_id", "--judge_model_id"),
    ("--temperature", "--judge_temperature"),
)


def judge_config(
    model_id: str, base_url: str | None, folder: Path, *, greedy: bool = False, **settings: Any
) -> tuple[ApiConfigBase, ApiModel]:
    """
    The settings to ask a judge with, and who it is. No seed is sent: equal questions have one answer, from the cache.

    folder: of the cache, failures.jsonl and api-costs.jsonl. greedy: at temperature 0, where the protocol has one.
    settings: further fields. Raises InputError, in the words of the judge's flags, for what cannot be asked.
    """
    about = {"model_id": model_id, "openai_base_url": base_url, "output_dir": folder}
    try:
        config = ApiConfigBase(**about, send_seed=False, log_to_file=False, **settings)
        model = find_model(model_id, config)
        if greedy and model.provider != "anthropic":
            config.temperature = 0.0
        check_parameters(model.provider, config.parameters(0))
    except InputError as error:
        told = str(error)
        for theirs, ours in NAMES:
            told = told.replace(theirs, ours)
        raise InputError(told) from None
    return config, model
