"""What a command that asks an API does around the asking: the bar, the costs, what has no answer."""

import logging
from collections import Counter
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from src.common.api_asking import Asked, Failures, OnAnswer, ask_all
from src.common.api_batches import ask_in_batches
from src.common.api_client import ApiClient
from src.common.api_config import ApiConfigBase
from src.common.api_costs import read_prices
from src.common.api_providers import PROVIDERS, find_model
from src.common.api_requests import check_parameters
from src.common.api_types import Answer, ApiModel
from src.common.async_run import run_async
from src.common.errors import CheckFailed
from src.common.logs import FILE_ONLY
from src.common.progress import Progress

if TYPE_CHECKING:
    from src.common.runs import Run

LOGGER = logging.getLogger(__name__)
COSTS_NAME = "api-costs.jsonl"
COSTS = {COSTS_NAME: "requests, tokens and cost of each start"}


def check_model(config: ApiConfigBase) -> ApiModel:
    """The model that will be asked. Raises InputError for all that can be wrong with it before the first request."""
    read_prices(config.prices_path)
    if config.api_backend == "safetytooling":
        prefix, colon, name = config.model_id.partition(":")
        provider = prefix if colon and prefix in PROVIDERS else "safetytooling"
        return ApiModel(provider=provider, base_url=config.openai_base_url or "", name=name or prefix, key="")
    model = find_model(config.model_id, config)
    check_parameters(model.provider, config.parameters(0))
    return model


def ask_and_report(
    config: ApiConfigBase,
    run: "Run",
    asked: Sequence[Asked],
    done: Container[str],
    on_answer: OnAnswer,
    batches_every: float | None = None,
) -> Failures:
    """
    Asks those that are not done, under a bar, and writes api-costs.jsonl. `batches_every`: through the provider's batch
    endpoint, looking how far it is every so many seconds. Returns what has no answer.
    """
    failures = Failures(run.folder)
    # A start that was killed may have left its rows and not its costs.
    (run.folder / COSTS_NAME).touch()
    missing = [each for each in asked if each.id not in done]
    if len(missing) < len(asked):
        LOGGER.info("%d of %d rows are there already", len(asked) - len(missing), len(asked))
    if not missing:
        return failures
    api = config.api
    try:
        with Progress(total=len(asked), done=len(asked) - len(missing)) as progress:

            def answered(each: Asked, answer: Answer) -> None:
                on_answer(each, answer)
                progress.add_row()
                progress.add_tokens(answer.output_tokens or 0)

            if batches_every is None:
                run_async(ask_all(api, config.model_id, missing, answered, failures))
            else:
                assert isinstance(api, ApiClient), "the settings refuse batches of another backend"
                run_async(ask_in_batches(api, config.model_id, missing, run.folder, answered, failures, batches_every))
    finally:
        config.log_api_cost({"model_id": config.model_id, "started": config.datetime_str})
        failures.finish([each.id for each in asked])
        if isinstance(api, ApiClient):
            _tell(api)
    return failures


def _tell(api: ApiClient) -> None:
    usage = api.usage
    cost = "" if usage.unpriced or not usage.prices else f", {usage.dollars:.4f} US dollars"
    LOGGER.info(
        "%d requests, %d answers from the cache, %d questions without an answer, %d + %d tokens%s",
        usage.requests, usage.from_cache, usage.failures, usage.input_tokens, usage.output_tokens, cost,
    )  # fmt: skip


def refuse_failures(failures: Failures, n_asked: int) -> None:
    """Raises CheckFailed where a question has no answer; the run stays unfinished, and the same command asks again."""
    if not failures.rows:
        return
    reasons = Counter(str(row["reason"]) for row in failures.rows.values())
    for reason, count in reasons.most_common():
        LOGGER.info("%d without an answer: %s", count, reason, extra={FILE_ONLY: True})
    reason, count = reasons.most_common(1)[0]
    raise CheckFailed(
        f"{len(failures.rows)} of {n_asked} questions have no answer ({failures.path}), {count} of them: "
        f"{reason[:300]}; the same command asks those again"
    )
