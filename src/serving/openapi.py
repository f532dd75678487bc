"""The OpenAPI description of a server, from the same models that check its requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

TEMPLATE = "#/components/schemas/{model}"
FAULTS = {
    400: "No such request", 401: "No or a wrong key", 403: "Asked by another name", 404: "No such model",
    405: "Another method", 408: "Came too slowly", 409: "Taken already", 413: "Too large", 415: "Not application/json",
    429: "Too much waits; see Retry-After", 500: "The model failed", 503: "The server stops or has failed",
}  # fmt: skip


class Fault(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class FaultAnswer(BaseModel):
    """Every answer that is no result."""

    error: Fault


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One path and method. Without a body and an answer model: a plain GET."""

    path: str
    summary: str
    method: str = "get"
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    media: str = "application/json"
    is_open: bool = False
    examples: dict[str, Any] = field(default_factory=dict)


def describe(title: str, operations: Sequence[Operation], with_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document. with_key: whether the server asks for one."""
    bodies = [(each.body, "validation") for each in operations if each.body]
    answers = [(each.answer, "serialization") for each in operations if each.answer]
    names, schemas = models_json_schema([*bodies, *answers, (FaultAnswer, "serialization")], ref_template=TEMPLATE)
    paths: dict[str, Any] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method] = _operation(each, names, with_key)
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": title, "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _operation(each: Operation, names: dict, with_key: bool) -> dict[str, Any]:
    schema = names[(each.answer, "serialization")] if each.answer else {}
    responses = {"200": {"description": "The result", "content": {each.media: {"schema": schema}}}}
    content = {"application/json": {"schema": names[(FaultAnswer, "serialization")]}}
    for status, description in FAULTS.items():
        responses[str(status)] = {"description": description, "content": content}
    made: dict[str, Any] = {"summary": each.summary, "responses": responses}
    if each.body:
        media = {"schema": names[(each.body, "validation")]}
        if each.examples:
            media["examples"] = {name: {"value": value} for name, value in each.examples.items()}
        made["requestBody"] = {"required": True, "content": {"application/json": media}}
    if with_key and not each.is_open:
        made["security"] = [{"key": []}]
    return made
