"""From a provider's own response to our answers: pure functions, the same for single calls and for batches."""

from collections.abc import Mapping
from typing import Any

from src.common.api_types import Answer, AttemptFailed

END_OF_THOUGHT = "</think>"


def openai_answers(body: Mapping[str, Any]) -> list[Answer]:
    """
    The answers in a chat completion of the OpenAI protocol, in the order of their index.
    Raises AttemptFailed for a body that holds no choices, or an error in the place of them or of one of them.
    """
    choices = body.get("choices")
    if not choices:
        error = body.get("error")
        raise AttemptFailed(f"a response without choices: {error or dict(body)}"[:500], retry=True)
    for choice in choices:
        # OpenRouter's way to say that the model's own server broke off; what was written until then is no answer.
        if choice.get("error"):
            raise AttemptFailed(f"the answer broke off: {choice['error']}"[:500], retry=True)
    usage = body.get("usage") or {}
    return [
        _openai_answer(choice, body, usage if number == 0 else {"prompt_tokens": 0, "completion_tokens": 0})
        for number, choice in enumerate(sorted(choices, key=lambda choice: choice.get("index") or 0))
    ]


def _openai_answer(choice: Mapping[str, Any], body: Mapping[str, Any], usage: Mapping[str, Any]) -> Answer:
    message = choice.get("message") or {}
    text = message.get("content") or message.get("refusal") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not reasoning and END_OF_THOUGHT in text:
        # A server without a parser for it leaves the reasoning in the text, its opening tag often in the prompt.
        reasoning, _, text = text.rpartition(END_OF_THOUGHT)
        reasoning, text = reasoning.strip().removeprefix("<think>").strip(), text.lstrip()
    return Answer(
        completion=text,
        stop_reason="refusal" if message.get("refusal") else choice.get("finish_reason") or "unknown",
        model_id=body.get("model") or "unknown",
        logprobs=_logprobs(choice),
        reasoning=reasoning if isinstance(reasoning, str) and reasoning else None,
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
    )


def _logprobs(choice: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tokens = (choice.get("logprobs") or {}).get("content")
    if tokens is None:
        return None
    return [
        {
            "token": token["token"],
            "logprob": token["logprob"],
            "top": [[top["token"], top["logprob"]] for top in token.get("top_logprobs") or []],
        }
        for token in tokens
    ]


def anthropic_answer(body: Mapping[str, Any]) -> Answer:
    """The answer in a message of the Anthropic protocol. Raises AttemptFailed for a body that is no message."""
    blocks = body.get("content")
    if body.get("type") != "message" or not isinstance(blocks, list):
        raise AttemptFailed(f"a response that is no message: {dict(body)}"[:500], retry=True)
    thinking = "\n".join(block.get("thinking") or "" for block in blocks if block.get("type") == "thinking").strip()
    usage = body.get("usage") or {}
    read, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    return Answer(
        completion="".join(block.get("text") or "" for block in blocks if block.get("type") == "text"),
        stop_reason=body.get("stop_reason") or "unknown",
        model_id=body.get("model") or "unknown",
        reasoning=thinking or None,
        input_tokens=usage["input_tokens"] + read + written if "input_tokens" in usage else None,
        output_tokens=usage.get("output_tokens"),
    )


def responses_answer(body: Mapping[str, Any]) -> Answer:
    """
    The answer in a response of OpenAI's Responses API. Raises AttemptFailed for a body that is none, and for a response
    that failed or was cancelled.
    """
    output, status = body.get("output"), body.get("status")
    if not isinstance(output, list) or status not in ("completed", "incomplete"):
        raise AttemptFailed(
            f"a response that is not there ({status}): {body.get('error') or dict(body)}"[:500], retry=True
        )
    parts = [part for item in output if item.get("type") == "message" for part in item.get("content") or []]
    thoughts = [part for item in output if item.get("type") == "reasoning" for part in item.get("summary") or []]
    refusal = "".join(part.get("refusal") or "" for part in parts)
    usage = body.get("usage") or {}
    cut = (body.get("incomplete_details") or {}).get("reason") or "incomplete"
    return Answer(
        completion="".join(part.get("text") or "" for part in parts) or refusal,
        stop_reason="refusal" if refusal else "stop" if status == "completed" else cut,
        model_id=body.get("model") or "unknown",
        reasoning="\n".join(part.get("text") or "" for part in thoughts).strip() or None,
        input_tokens=usage.get("input_tokens"),
        output_tokens=usage.get("output_tokens"),
    )
