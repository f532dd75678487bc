"""
Asks models behind APIs: from the cache where the question was asked before, once where it is being asked, else over the
network with retries, bounds on calls at once and on rates. `config.api` makes one.
"""

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from src.common.api_cache import AnswerCache
from src.common.api_costs import Usage, read_prices
from src.common.api_limits import RateLimit
from src.common.api_providers import PROVIDERS, find_model
from src.common.api_requests import check_parameters
from src.common.api_types import Answer, ApiFailure, ApiModel, AttemptFailed, Message, Question
from src.common.errors import InputError
from src.common.logs import FILE_ONLY
from src.common.secrets import variable

if TYPE_CHECKING:
    from src.common.api_inspect import InspectModel
    from src.common.experiment_config import ExperimentConfigBase

LOGGER = logging.getLogger(__name__)
DEFAULT_TIMEOUT = 600.0
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, doubled before each further one; and the most of these."""
LONGEST_ASKED_WAIT = 900.0
"""Seconds that a server may ask to be waited; a quota that is empty for the day is no reason to hang."""
HOPELESS = (401, 404)
"""A key or a model that the server does not know: the next question would fare no better."""
CHARACTERS_PER_TOKEN = 4


class _Loop(NamedTuple):
    """What belongs to one event loop."""

    slots: dict[str, asyncio.Semaphore]
    limits: dict[tuple[str, str], RateLimit]
    clients: dict[tuple[str, str, str], "InspectModel"]
    in_flight: dict[str, asyncio.Task]


class ApiClient:
    """See above. One object serves any number of models, and event loops one after another."""

    def __init__(self, config: "ExperimentConfigBase") -> None:
        """Raises InputError for a cache folder, a file of prices or a variable that will not do."""
        options = config.api_options
        self.config = config
        self.usage = Usage(read_prices(options.prices_path))
        self.max_attempts = options.max_attempts
        self.timeout = options.request_timeout or _timeout_from_environment()
        self._per_minute = {"requests": options.requests_per_minute, "tokens": options.tokens_per_minute}
        folder = config.made_folder(config.enable_cache, config.cache_dir, "cache")
        self.cache = AnswerCache(folder) if folder else None
        self._history = config.made_folder(config.enable_prompt_history, config.prompt_history_dir, "prompt-history")
        self._models: dict[str, ApiModel] = {}
        self._hopeless: dict[ApiModel, ApiFailure] = {}
        self._answered: set[ApiModel] = set()
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        self._jitter = random.Random()  # not the run's generator: waiting must not change what is drawn

    @property
    def running_cost(self) -> float:
        """US dollars so far, as far as prices are known."""
        return self.usage.dollars

    def question(self, model_id: str, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Question:
        """Raises InputError as `find_model`, and for a parameter that the provider does not have."""
        if model_id not in self._models:
            self._models[model_id] = find_model(model_id, self.config)
        model = self._models[model_id]
        given = {name: value for name, value in parameters.items() if value is not None}
        check_parameters(model.provider, given)
        return Question(model=model, messages=tuple(dict(message) for message in messages), parameters=given)

    async def ask(self, question: Question) -> list[Answer]:
        """
        The answers, one unless the parameter `n` asks for more. Equal questions that are being asked share one request
        where there is a cache; without one each is asked. Raises ApiFailure where every attempt failed.
        """
        if self.cache is None:
            return await self._ask_and_count(question)
        answers = self.cache.get(question.key)
        if answers is not None:
            self.usage.from_cache += 1
            return answers
        in_flight = self._loop.in_flight
        if question.key not in in_flight:
            task = asyncio.ensure_future(self._ask_and_keep(question))
            in_flight[question.key] = task
            task.add_done_callback(lambda _: in_flight.pop(question.key))
        # One that gives up must not take the answer from the others that wait for it.
        return await asyncio.shield(in_flight[question.key])

    async def _ask_and_keep(self, question: Question) -> list[Answer]:
        answers = await self._ask_and_count(question)
        await self.keep(question.key, answers)
        return answers

    async def keep(self, key: str, answers: Sequence[Answer]) -> None:
        """Puts the answers to the question with that key into the cache, where there is one."""
        if self.cache is not None:
            await asyncio.to_thread(self.cache.put, key, answers)

    async def _ask_and_count(self, question: Question) -> list[Answer]:
        try:
            answers = await self._ask_with_retries(question)
        except ApiFailure as failure:
            self.usage.failures += 1
            LOGGER.info("%s", failure, extra={FILE_ONLY: True})
            raise
        self.usage.count(question.model.name, answers)
        self._show(question, answers)
        return answers

    async def _ask_with_retries(self, question: Question) -> list[Answer]:
        model = question.model
        attempt = 0
        # The slot is kept while waiting: a server that cannot keep up must not be asked ever new questions meanwhile.
        async with self._slot(model):
            while True:
                if model in self._hopeless:
                    known = self._hopeless[model]
                    raise ApiFailure(model, known.reason, attempt, known.status)
                attempt += 1
                try:
                    answers = await self._attempt(question)
                except AttemptFailed as failed:
                    await self._wait_or_fail(model, attempt, failed)
                else:
                    self._answered.add(model)
                    return answers

    async def _attempt(self, question: Question) -> list[Answer]:
        requests, tokens = self._limit(question.model, "requests"), self._limit(question.model, "tokens")
        if requests:
            await requests.take(1)
        entry = await tokens.take(_estimated_tokens(question)) if tokens else None
        self.usage.requests += 1
        answers = await self._client(question.model).attempt(question)
        used = [answer.input_tokens for answer in answers] + [answer.output_tokens for answer in answers]
        if entry is not None and tokens is not None and None not in used:
            tokens.correct(entry, sum(used))
        return answers

    async def _wait_or_fail(self, model: ApiModel, attempt: int, failed: AttemptFailed) -> None:
        asked = failed.retry_after or 0.0
        reason = failed.reason
        if asked > LONGEST_ASKED_WAIT:
            reason += f" (the server asks to wait {asked:g} s)"
        if not failed.retry or attempt >= self.max_attempts or asked > LONGEST_ASKED_WAIT:
            failure = ApiFailure(model, reason, attempt, failed.status)
            if failed.status in HOPELESS and model not in self._answered:
                self._hopeless[model] = failure
            raise failure
        own = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * self._jitter.uniform(0.5, 1.0)
        LOGGER.debug("%s: attempt %d failed: %s", model, attempt, reason)
        # Somewhat more than what is asked, so that those who wait do not come back all at once.
        await asyncio.sleep(max(own, asked * self._jitter.uniform(1.0, 1.1)))

    @property
    def _loop(self) -> _Loop:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops = {known: state for known, state in self._loops.items() if not known.is_closed()}
            self._loops[loop] = _Loop({}, {}, {}, {})
        return self._loops[loop]

    def _slot(self, model: ApiModel) -> asyncio.Semaphore:
        most = getattr(self.config, PROVIDERS[model.provider].threads)
        return self._loop.slots.setdefault(model.provider, asyncio.Semaphore(most))

    def _limit(self, model: ApiModel, what: str) -> RateLimit | None:
        most = self._per_minute[what]
        return self._loop.limits.setdefault((model.provider, what), RateLimit(most)) if most else None

    def _client(self, model: ApiModel) -> "InspectModel":
        from src.common.api_inspect import InspectModel

        name = (model.provider, model.base_url, model.name)
        if name not in self._loop.clients:
            self._loop.clients[name] = InspectModel(model, self.timeout)
        return self._loop.clients[name]

    async def close(self) -> None:
        """Ends the connections of the running event loop; the object may be used on."""
        state = self._loops.pop(asyncio.get_running_loop(), None)
        if state is not None:
            for task in state.in_flight.values():
                task.cancel()
            await asyncio.gather(*state.in_flight.values(), return_exceptions=True)
            for client in state.clients.values():
                await client.close()

    def _show(self, question: Question, answers: Sequence[Answer]) -> None:
        if not (self._history or self.config.print_prompt_and_response):
            return
        asked = "\n".join(f"[{message['role']}] {message['content']}" for message in question.messages)
        text = f"{asked}\n" + "".join(f"[answer of {answer.model_id}] {answer.completion}\n" for answer in answers)
        if self.config.print_prompt_and_response:
            print(text)
        if self._history:
            path = self._history / f"{self.config.datetime_str}.txt"
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{text}\n")


def _estimated_tokens(question: Question) -> int:
    characters = sum(len(message["content"]) for message in question.messages)
    return characters // CHARACTERS_PER_TOKEN + (question.parameters.get("max_tokens") or 0) + 1


def _timeout_from_environment() -> float:
    given = variable("OPENAI_TIMEOUT")
    if given is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"OPENAI_TIMEOUT={given}: expected a positive number of seconds")
    return seconds
