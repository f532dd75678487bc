"""
One way to ask, whatever `config.api` is: our client on inspect-ai's model layer, or safetytooling's InferenceAPI.

    answers = await ask_single_question(config.api, "anthropic:claude-…", "Who are you?", system_prompt="Be brief.")
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from src.common.api_client import ApiClient
from src.common.api_providers import PROVIDERS
from src.common.api_types import Answer, ApiFailure, ApiModel, Message
from src.common.secrets import withhold

if TYPE_CHECKING:
    from safetytooling.apis import InferenceAPI
    from safetytooling.data_models import LLMResponse

THEIR_NAMES = {"google": "gemini"}
"""Our word for a provider → safetytooling's, where they differ."""
THEIR_ATTEMPTS = 10
"""What InferenceAPI does before it gives up."""


async def ask_single_question(
    api: "ApiClient | InferenceAPI",
    model_id: str,
    question: str,
    system_prompt: str | None = None,
    **api_kwargs: Any,
) -> list[str]:
    """
    The answers' texts, one unless `n` asks for more. `model_id` may have a prefix (`openai:`, `anthropic:`, …).
    api_kwargs: temperature, max_tokens, seed, …; what is not given, or None, is not sent.
    Raises what `api_call` raises.
    """
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    answers = await api_call(api, model_id, [*system, {"role": "user", "content": question}], **api_kwargs)
    return [answer.completion for answer in answers]


async def api_call(
    api: "ApiClient | InferenceAPI", model_id: str, messages: Sequence[Message], **api_kwargs: Any
) -> "list[Answer] | list[LLMResponse]":
    """
    The answers to a whole conversation; both kinds have `completion`, `stop_reason` and `model_id`.
    Raises ApiFailure where there is no answer after every retry, InputError for an unknown model or parameter.
    """
    given = {name: value for name, value in api_kwargs.items() if value is not None}
    if isinstance(api, ApiClient):
        return await api.ask(api.question(model_id, messages, given))
    return await _ask_safetytooling(api, model_id, messages, given)


async def _ask_safetytooling(
    api: "InferenceAPI", model_id: str, messages: Sequence[Message], given: dict[str, Any]
) -> "list[LLMResponse]":
    from safetytooling.data_models import ChatMessage, MessageRole, Prompt

    prefix, colon, name = model_id.partition(":")
    if colon and prefix in PROVIDERS:
        model_id, given = name, given | {"force_provider": THEIR_NAMES.get(prefix, prefix)}
    prompt = Prompt(
        messages=[ChatMessage(role=MessageRole(message["role"]), content=message["content"]) for message in messages]
    )
    try:
        return await api(model_id=model_id, prompt=prompt, **given)
    except RuntimeError as error:
        model = ApiModel(provider=prefix if colon else "safetytooling", base_url="", name=model_id, key="")
        raise ApiFailure(model, withhold(str(error)), attempts=THEIR_ATTEMPTS) from None
