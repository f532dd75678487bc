"""What the chat server's paths take and give, as OpenAPI."""

from typing import Any

from src.serving.chat_bodies import IGNORED, NEUTRAL, OF_DRAWING, ChatBody, CompletionBody, DirectionsBody
from src.serving.http_app import HEALTH, METRICS
from src.serving.metrics import CONTENT_TYPE
from src.serving.openapi import Operation, describe

CHAT, COMPLETIONS, MODELS, DIRECTIONS = "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/directions"


def description(name: str, with_key: bool) -> dict[str, Any]:
    """The whole description of a server of the model `name`."""
    question = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
    completion = {"model": name, "prompt": "Once upon a time", "max_tokens": 4}
    operations = [
        Operation(
            path=CHAT, summary="A chat completion, streamed or not", method="post", body=ChatBody,
            examples={"a question": question},
        ),
        Operation(
            path=COMPLETIONS, summary="Completions of raw texts or token ids", method="post", body=CompletionBody,
            examples={"a beginning": completion},
        ),
        Operation(path=DIRECTIONS, summary="The directions that `steering` may name"),
        Operation(path=DIRECTIONS, summary="Register the directions of a file", method="post", body=DirectionsBody),
        Operation(path=MODELS, summary="The model"),
        Operation(path=HEALTH, summary="Whether it answers", is_open=True),
        Operation(path=METRICS, summary="Counters, for Prometheus", media=CONTENT_TYPE),
    ]  # fmt: skip
    described = describe(f"Chat with {name}", operations, with_key)
    for body in (ChatBody, CompletionBody):
        schema = described["components"]["schemas"][body.__name__]
        schema["properties"] = _accepted(schema["properties"], schema["required"], name)
    for path in (CHAT, COMPLETIONS):
        answers = described["paths"][path]["post"]["responses"]["200"]["content"]
        # Of one event.
        answers["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}
    return described


def _accepted(own: dict[str, Any], required: list[str], name: str) -> dict[str, Any]:
    """Our fields, null being as good as no field, and those of OpenAI's that may stand beside them."""
    may_be_null = {
        field: schema if field in required else {"anyOf": [schema, {"type": "null"}]} for field, schema in own.items()
    }
    neutral = {field: {"enum": [*values, None]} for field, values in NEUTRAL.items() if field not in OF_DRAWING}
    ignored: dict[str, Any] = {field: {} for field in (*IGNORED, *OF_DRAWING)}
    return ignored | neutral | may_be_null | {"model": {"type": "string", "const": name}}
