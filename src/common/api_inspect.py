"""
One attempt at one question through inspect-ai's model layer; all that knows inspect-ai. Its providers are called
directly: retries, waiting, limits and cache are ours, so that none of them is hidden in another or multiplied by it.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from src.common.api_answers import anthropic_answer, openai_answers, responses_answer
from src.common.api_providers import RESPONSES
from src.common.api_requests import REPEAT, SEED, openai_parameters, responses_parameters
from src.common.api_types import Answer, ApiModel, AttemptFailed, Question
from src.common.errors import InputError
from src.common.secrets import withhold

if TYPE_CHECKING:
    from inspect_ai.model import GenerateConfig, ModelAPI, ModelCall, ModelOutput

MOST_OF_A_REASON = 1000
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What the libraries raise over a body that is no JSON, or other JSON than the protocol's."""


class InspectModel:
    """A model's client; it belongs to the event loop that it was made in."""

    def __init__(self, model: ApiModel, timeout: float) -> None:
        """timeout: seconds for one attempt. Raises InputError where inspect-ai will not have the model."""
        from inspect_ai._util.error import PrerequisiteError
        from inspect_ai.model import get_model

        self.model, self.timeout = model, timeout
        # Here rather than at the first error: importing takes seconds in which other questions would run out of time.
        self._errors = _errors_of(model.provider)
        # Every protocol but Anthropic's is one of OpenAI's: its plain client sends what it is given, and nothing else.
        route, arguments = f"openai-api/{model.provider}", {"client_timeout": timeout}
        if model.provider == RESPONSES:
            arguments |= {"responses_api": True}
        if model.provider == "anthropic":
            route, arguments = "anthropic", {"timeout": timeout, "streaming": False}
        try:
            self._api: ModelAPI = get_model(
                f"{route}/{model.name}",
                base_url=model.base_url,
                api_key=model.key,
                memoize=False,
                max_retries=0,
                **arguments,
            ).api
        except (PrerequisiteError, ValueError) as error:
            raise InputError(f"--model_id {model}: {withhold(str(error))}") from error

    async def attempt(self, question: Question) -> list[Answer]:
        """The answers. Raises AttemptFailed for everything that can go wrong between here and there."""
        try:
            async with asyncio.timeout(self.timeout):
                output = await self._api.generate(_messages(question), [], "none", self._config(question))
            return self._answers(question, *output)
        except TimeoutError:
            raise AttemptFailed(f"no answer within {self.timeout:g} s", retry=True) from None
        except self._errors as error:
            raise self._failed(error) from None
        except UNREADABLE as error:
            raise AttemptFailed(
                _reason(f"an unreadable response: {type(error).__name__}: {error}"), retry=True
            ) from None

    def _config(self, question: Question) -> "GenerateConfig":
        from inspect_ai.model import GenerateConfig

        given = question.parameters
        if self.model.provider == RESPONSES:
            return GenerateConfig(**{name: given.get(name) for name in ("temperature", "top_p", "max_tokens")})
        if self.model.provider != "anthropic":
            return GenerateConfig(extra_body=openai_parameters(question))
        stop = given.get("stop")
        return GenerateConfig(
            stop_seqs=[stop] if isinstance(stop, str) else stop,
            max_tokens=given.get("max_tokens", self.default_max_tokens),
            cache_prompt=False,
        )

    @property
    def default_max_tokens(self) -> int:
        """What is sent where the protocol requires max_tokens and the user set none: the most inspect-ai will ask."""
        from inspect_ai.model import GenerateConfig

        tokens = self._api.max_tokens_for_config(GenerateConfig())
        assert tokens is not None, f"{self.model} has no default for max_tokens"
        return tokens

    def _answers(self, question: Question, result: "ModelOutput | Exception", call: "ModelCall") -> list[Answer]:
        if isinstance(result, Exception):
            raise self._failed(result) from None
        if call.error:
            # inspect-ai makes some refusals of the server (a prompt too long) into an answer; they are none.
            raise AttemptFailed(_reason(result.error or result.completion), retry=False, status=400)
        _refuse_other_request(question, call.request)
        body = call.response or {}
        if self.model.provider == RESPONSES:
            return [responses_answer(body)]
        return [anthropic_answer(body)] if self.model.provider == "anthropic" else openai_answers(body)

    def _failed(self, error: BaseException) -> AttemptFailed:
        status = getattr(error, "status_code", None)
        decision = self._api.should_retry(error)
        reason = _reason(f"{type(error).__name__}: {error}")
        if status is None:
            reason += f" ({self.model.base_url})"
        if status == 404 and self.model.provider != "anthropic" and not self.model.base_url.endswith("/v1"):
            reason += " (base URLs mostly end in /v1)"
        return AttemptFailed(
            reason, retry=bool(decision), retry_after=getattr(decision, "retry_after", None), status=status
        )

    async def close(self) -> None:
        """Lets go of the connections."""
        await self._api.aclose()


def _errors_of(provider: str) -> tuple[type[Exception], ...]:
    """What the clients raise when a server cannot be reached or says no."""
    import httpx
    import httpx2

    if provider == "anthropic":
        from anthropic import AnthropicError

        return AnthropicError, httpx.HTTPError, httpx2.HTTPError, OSError
    from inspect_ai.model._openai import OpenAIResponseError
    from openai import OpenAIError

    return OpenAIError, OpenAIResponseError, httpx.HTTPError, httpx2.HTTPError, OSError


def _reason(text: str) -> str:
    return withhold(text)[:MOST_OF_A_REASON]


def _messages(question: Question) -> list[Any]:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return [kinds[message["role"]](content=message["content"]) for message in question.messages]


def _refuse_other_request(question: Question, request: dict[str, Any]) -> None:
    """Raises AttemptFailed where a set parameter was not sent: a library that leaves one out only warns."""
    if question.model.provider == "anthropic":
        sent = {"max_tokens": request.get("max_tokens"), "stop": request.get("stop_sequences")}
        asked = {name: value for name, value in question.parameters.items() if name not in (SEED, REPEAT)}
        if isinstance(asked.get("stop"), str):
            asked["stop"] = [asked["stop"]]
    elif question.model.provider == RESPONSES:
        sent, asked = request, responses_parameters(question)
    else:
        sent, asked = request.get("extra_body") or {}, openai_parameters(question)
    lost = [name for name, value in asked.items() if sent.get(name) != value]
    if lost:
        raise AttemptFailed(f"the client did not send {', '.join(lost)} as set", retry=False)
