"""The batch endpoints of OpenAI and Anthropic: send, look, fetch. Each request bears the key of its question."""

import json
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

from src.common.api_answers import anthropic_answer, openai_answers
from src.common.api_inspect import InspectModel
from src.common.api_requests import anthropic_body, openai_body
from src.common.api_types import Answer, ApiModel, AttemptFailed, Question
from src.common.errors import InputError

TAG = "tiller_batch"
CLOCKS_DIFFER = timedelta(minutes=10)
"""Between this machine and the server, at most."""
RETRIES = 6
"""Of the calls about a batch; the clients' own, with growing waits."""


class Outcome(NamedTuple):
    """What became of one request of a batch."""

    key: str
    answers: list[Answer] | None
    reason: str = ""
    status: int | None = None


class BatchClient(Protocol):
    """One provider's batches."""

    most_requests: int
    most_bytes: int
    errors: type[Exception]
    """What it raises when the server cannot be reached or says no."""

    def request(self, question: Question) -> dict[str, Any]:
        """What stands in the batch for a question."""

    async def send(self, requests: Sequence[Mapping[str, Any]], tag: str) -> str:
        """Starts a batch and returns its id."""

    async def find(self, tag: str, since: datetime, known: Container[str]) -> str | None:
        """The id of a batch that was sent with a tag, None where there is none; `known` are those of other tags."""

    async def is_over(self, batch_id: str) -> bool:
        """Whether everything that will have an answer has one."""

    def outcomes(self, batch_id: str) -> AsyncIterator[Outcome]:
        """What became of each request; one of which nothing is told is left out."""

    async def close(self) -> None:
        """Lets go of the connections."""


def batch_client(model: ApiModel, timeout: float) -> BatchClient:
    """Raises InputError for a provider without a batch endpoint that we know."""
    if model.provider == "openai":
        return OpenAIBatches(model, timeout)
    if model.provider == "anthropic":
        return AnthropicBatches(model, timeout)
    raise InputError(f"--batch_api: {model.provider} has no batch endpoint that is known here; leave it out")


class OpenAIBatches:
    """A file of requests goes up, a file of responses and one of errors come down."""

    most_requests = 50_000
    most_bytes = 190_000_000

    def __init__(self, model: ApiModel, timeout: float) -> None:
        from openai import AsyncOpenAI, OpenAIError

        self.errors = OpenAIError
        self._client = AsyncOpenAI(api_key=model.key, base_url=model.base_url, timeout=timeout, max_retries=RETRIES)

    def request(self, question: Question) -> dict[str, Any]:
        return {
            "custom_id": question.key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": openai_body(question),
        }

    async def send(self, requests: Sequence[Mapping[str, Any]], tag: str) -> str:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        file = await self._client.files.create(file=(f"{tag}.jsonl", lines.encode()), purpose="batch")
        batch = await self._client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={TAG: tag},
        )
        return batch.id

    async def find(self, tag: str, since: datetime, known: Container[str]) -> str | None:
        async for batch in self._client.batches.list(limit=100):
            if batch.metadata and batch.metadata.get(TAG) == tag:
                return batch.id
            if batch.created_at < since.timestamp() - 3600:
                break  # the newest come first
        return None

    async def is_over(self, batch_id: str) -> bool:
        return (await self._client.batches.retrieve(batch_id)).status in ("completed", "failed", "expired", "cancelled")

    async def outcomes(self, batch_id: str) -> AsyncIterator[Outcome]:
        batch = await self._client.batches.retrieve(batch_id)
        if batch.status == "failed":
            told = "; ".join(str(error.message) for error in (batch.errors.data if batch.errors else None) or [])
            raise InputError(f"batch {batch_id} was refused: {told or 'no reason told'}")
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = await self._client.files.content(file_id)
                for line in content.content.split(b"\n"):
                    if line.strip():
                        yield _openai_outcome(_decoded(line, file_id))

    async def close(self) -> None:
        await self._client.close()


def _decoded(line: bytes, file_id: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise AttemptFailed(f"file {file_id} came broken: {error}", retry=True) from None


def _outcome(key: str, read: Callable[[], list[Answer]]) -> Outcome:
    """One answer that nobody can read is the failure of one question, not of the batch that it is in."""
    try:
        return Outcome(key, read())
    except AttemptFailed as failed:
        return Outcome(key, None, failed.reason, failed.status)


def _openai_outcome(row: Mapping[str, Any]) -> Outcome:
    response = row.get("response") or {}
    status, body = response.get("status_code"), response.get("body") or {}
    if row.get("error") or status != 200:
        return Outcome(row["custom_id"], None, str(row.get("error") or body.get("error") or body)[:1000], status)
    return _outcome(row["custom_id"], lambda: openai_answers(body))


class AnthropicBatches:
    """The requests go up in one call; the results come down as lines."""

    most_requests = 100_000
    most_bytes = 240_000_000

    def __init__(self, model: ApiModel, timeout: float) -> None:
        from anthropic import AnthropicError, AsyncAnthropic

        self.errors = AnthropicError
        self._client = AsyncAnthropic(api_key=model.key, base_url=model.base_url, timeout=timeout, max_retries=RETRIES)
        self._single = InspectModel(model, timeout)

    def request(self, question: Question) -> dict[str, Any]:
        return {"custom_id": question.key, "params": anthropic_body(question, self._single.default_max_tokens)}

    async def send(self, requests: Sequence[Mapping[str, Any]], tag: str) -> str:
        return (await self._client.messages.batches.create(requests=list(requests))).id  # type: ignore[arg-type]

    async def find(self, tag: str, since: datetime, known: Container[str]) -> str | None:
        """That protocol keeps no tag: a batch made since then may be ours, and only a person can tell."""
        made = []
        async for batch in self._client.messages.batches.list(limit=20):
            if batch.created_at < since - CLOCKS_DIFFER:
                break  # the newest come first
            if batch.id not in known:
                made.append(batch.id)
        if made:
            raise InputError(
                f"a batch may have been sent when the run was stopped, perhaps {' or '.join(made)}: write its id "
                "as the batch_id of the last entry of batches.json, or delete that entry to send a new one"
            )
        return None

    async def is_over(self, batch_id: str) -> bool:
        return (await self._client.messages.batches.retrieve(batch_id)).processing_status == "ended"

    async def outcomes(self, batch_id: str) -> AsyncIterator[Outcome]:
        async for row in await self._client.messages.batches.results(batch_id):
            result = row.result.model_dump(mode="json")
            if result["type"] == "succeeded":
                yield _outcome(row.custom_id, lambda: [anthropic_answer(result["message"])])  # noqa: B023 (read at once)
            else:
                yield Outcome(row.custom_id, None, f"{result['type']}: {result.get('error') or ''}"[:1000])

    async def close(self) -> None:
        await self._client.close()
        await self._single.close()
