"""What goes to an API and what comes back: a model behind a URL, a question, an answer, a failure."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""{"role": system, user or assistant, "content": text}."""


@dataclass(frozen=True, kw_only=True)
class ApiModel:
    """A model behind an API."""

    provider: str
    """One of the names in `api_providers.PROVIDERS`."""
    base_url: str
    name: str
    """As the provider knows it, without our prefix."""
    key: str = field(repr=False, compare=False)
    """What the provider knows the user by; part of no cache key, no message and no file."""

    def __str__(self) -> str:
        return f"{self.provider}:{self.name} at {self.base_url}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request. Two that are equal in everything below are one question, and are asked once."""

    model: ApiModel
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    """What the user set, seed included; nothing else is sent (but for what `api_inspect` says of Anthropic)."""

    @property
    def key(self) -> str:
        """SHA-256, in hexadecimal, of provider, base URL, model, messages and every parameter."""
        about = {
            "provider": self.model.provider,
            "base_url": self.model.base_url,
            "model": self.model.name,
            "messages": self.messages,
            "parameters": dict(self.parameters),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion; the names of the first four fields are safetytooling's."""

    completion: str
    """The answer's text, without the reasoning."""
    stop_reason: str
    """The provider's own word: stop, length, content_filter, end_turn, max_tokens, refusal, …"""
    model_id: str
    """The model that says it answered; a provider may serve a dated version of the name that was asked."""
    logprobs: list[dict[str, Any]] | None = None
    """A token each: {"token", "logprob", "top": [[token, log-probability], …]}, natural logarithms."""
    reasoning: str | None = None
    input_tokens: int | None = None
    """Of the whole request; with several completions the first bears both counts and the others bear 0."""
    output_tokens: int | None = None


class ApiFailure(RuntimeError):
    """A question that has no answer after every retry. The message holds no key."""

    def __init__(self, model: ApiModel, reason: str, attempts: int, status: int | None = None) -> None:
        self.model, self.reason, self.attempts, self.status = model, reason, attempts, status
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        super().__init__(f"{model}: no answer after {tried}: {reason}")


class AttemptFailed(Exception):
    """One attempt did not give an answer."""

    def __init__(
        self, reason: str, *, retry: bool, retry_after: float | None = None, status: int | None = None
    ) -> None:
        """reason holds no key; retry_after: seconds that the server asks to wait."""
        super().__init__(reason)
        self.reason, self.retry, self.retry_after, self.status = reason, retry, retry_after, status
