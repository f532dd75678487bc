"""From a question to the body of a request. What the user did not set is not in it."""

from collections.abc import Mapping
from typing import Any

from src.common.api_providers import RESPONSES
from src.common.api_types import Question
from src.common.errors import InputError
from src.common.sources import nearest

SEED, REPEAT = "seed", "repeat"
"""The repeat's index, as the seed or where none is sent: without it repeats would be one question, asked once."""
OPENAI_PARAMETERS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", SEED, "stop", "n", "logprobs", "top_logprobs"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "reasoning_effort", "response_format", "extra_body"),
    REPEAT,
)
RESPONSES_PARAMETERS = ("temperature", "top_p", "max_tokens", SEED, REPEAT)
# The protocol's version that the client speaks (2026-10-21) takes no temperature, top_p or top_k, and never had seeds.
ANTHROPIC_PARAMETERS = ("max_tokens", "stop", SEED, REPEAT)


def check_parameters(provider: str, parameters: Mapping[str, Any]) -> None:
    """
    Raises InputError for a parameter that the provider's protocol does not have. A seed passes everywhere: where there
    is none it still tells repeats apart, as `repeat` does, which is never sent.
    """
    known = {"anthropic": ANTHROPIC_PARAMETERS, RESPONSES: RESPONSES_PARAMETERS}.get(provider, OPENAI_PARAMETERS)
    for name in parameters:
        if name not in known:
            raise InputError(
                f"{name}: {provider} takes no such parameter; expected one of {', '.join(known)} "
                f"(the nearest is {nearest(name, known)})"
            )


def openai_parameters(question: Question) -> dict[str, Any]:
    """The parameters of a chat completion as they stand in its body."""
    body = {name: value for name, value in question.parameters.items() if name != REPEAT}
    body |= body.pop("extra_body", None) or {}
    if question.model.provider == "openai" and "max_tokens" in body and _is_openai_itself(question):
        # Its newer models refuse the old name.
        body["max_completion_tokens"] = body.pop("max_tokens")
    return body


def _is_openai_itself(question: Question) -> bool:
    return question.model.base_url.startswith("https://api.openai.com/")


def responses_parameters(question: Question) -> dict[str, Any]:
    """The parameters as the Responses API calls them; it knows no seed."""
    names = {"max_tokens": "max_output_tokens"}
    return {names.get(name, name): value for name, value in question.parameters.items() if name not in (SEED, REPEAT)}


def openai_body(question: Question) -> dict[str, Any]:
    """The whole body of a chat completion."""
    return {"model": question.model.name, "messages": list(question.messages)} | openai_parameters(question)


def anthropic_parts(question: Question) -> tuple[str | None, list[dict[str, str]]]:
    """The system prompt, which that protocol keeps apart, and the other messages."""
    system = [message["content"] for message in question.messages if message["role"] == "system"]
    others = [message for message in question.messages if message["role"] != "system"]
    return "\n\n".join(system) or None, others


def anthropic_body(question: Question, default_max_tokens: int) -> dict[str, Any]:
    """The whole body of a message; the protocol requires max_tokens, so without one the given default is sent."""
    system, messages = anthropic_parts(question)
    parameters = question.parameters
    body: dict[str, Any] = {"model": question.model.name, "messages": messages}
    body["max_tokens"] = parameters.get("max_tokens", default_max_tokens)
    if system is not None:
        body["system"] = system
    if "stop" in parameters:
        body["stop_sequences"] = _as_list(parameters["stop"])
    return body


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)
